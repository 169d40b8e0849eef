//! The shape of the files: keys and types, before any check of values.

use serde::Deserialize;
use toml::Spanned;

/// A text with its place.
pub(super) type Text = Spanned<String>;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Profile {
    pub(super) backend: Option<Text>,
    pub(super) autoconnect: bool,
    pub(super) upstream: Option<Spanned<Upstream>>,
    pub(super) tun: Tun,
    pub(super) dns: Dns,
    pub(super) protect: Protect,
    pub(super) bypass: Bypass,
    pub(super) torvm: Option<Spanned<TorVm>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Upstream {
    pub(super) url: Option<Text>,
    pub(super) addresses: Vec<Text>,
    pub(super) username: Option<Text>,
    pub(super) password_credential: Option<Text>,
    pub(super) password_file: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Tun {
    pub(super) name: Option<Text>,
    pub(super) cidr: Option<Text>,
    pub(super) cidr6: Option<Text>,
    pub(super) mtu: Option<Spanned<i64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Dns {
    pub(super) mode: Option<Text>,
    pub(super) servers: Vec<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Protect {
    pub(super) killswitch: Option<bool>,
    pub(super) inbound_replies: Option<bool>,
    pub(super) lan: Vec<Text>,
    pub(super) forward: Option<Text>,
    pub(super) iptables_fallback: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Bypass {
    /// Names or numbers.
    pub(super) users: Vec<Spanned<toml::Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct TorVm {
    pub(super) memory_mib: Option<Spanned<i64>>,
    pub(super) accel: Option<Text>,
    pub(super) transport: Option<Text>,
    pub(super) bridges: Vec<Text>,
    pub(super) entry_nodes: Vec<Text>,
    pub(super) exit_nodes: Vec<Text>,
    pub(super) exit_country: Option<Text>,
    pub(super) exclude_nodes: Vec<Text>,
    pub(super) exclude_exit_nodes: Vec<Text>,
    pub(super) strict_nodes: bool,
    pub(super) https_proxy: Option<Text>,
    pub(super) socks5_proxy: Option<Text>,
    pub(super) proxy_username: Option<Text>,
    pub(super) proxy_password_credential: Option<Text>,
    pub(super) proxy_password_file: Option<Text>,
    pub(super) testing: Option<Spanned<bool>>,
    pub(super) directory_authorities: Vec<Text>,
    pub(super) tor_log: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Daemon {
    pub(super) log_level: Option<Text>,
    pub(super) max_flows: Option<Spanned<i64>>,
    pub(super) max_memory_mib: Option<Spanned<i64>>,
    pub(super) queues: Option<Spanned<i64>>,
}
