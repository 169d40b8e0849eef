//! What the guest is told at its start, by fw_cfg.
//!
//! - [`bridge`]: bridges and what they make Tor contact
//! - [`node`]: relays by country or fingerprint
//! - [`network`]: directory authorities of a private Tor network
//! - [`proxy`]: a proxy that Tor itself goes through
//! - [`list`](mod@list): lists with a bound

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Types that are a text outside, and go through their `FromStr` when they are read.
macro_rules! by_text {
    ($($name:ty),+) => {$(
        impl TryFrom<String> for $name {
            type Error = $crate::config::Rejected;

            fn try_from(text: String) -> Result<Self, $crate::config::Rejected> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )+};
}
use by_text;

pub mod bridge;
pub mod list;
pub mod network;
pub mod node;
pub mod proxy;

pub use bridge::{Bridge, Host, HostName, Transport};
pub use list::List;
pub use network::{DirAuthority, Network};
pub use node::{Country, Fingerprint, Node};
pub use proxy::{Login, Proxy, Secret};

/// Name of the file in fw_cfg (`/sys/firmware/qemu_fw_cfg/by_name/NAME/raw`).
pub const FW_CFG: &str = "opt/org.proxyvpn/config";
/// Bytes of the longest configuration as JSON; all lists at their bounds are shorter.
pub const MAX_CONFIG: usize = 64 * 1024;
/// The pluggable transports obfs4 and meek_lite in the guest, only in the image's initramfs with transports (`ClientTransportPlugin … exec`).
/// Tor cannot start it under `Sandbox 1`, and has that without transports only.
pub const OBFS4PROXY: &str = "/usr/bin/obfs4proxy";
/// As [`OBFS4PROXY`], for snowflake. It logs nothing unless it is told to, and keeps addresses out of what it tells Tor.
pub const SNOWFLAKE_CLIENT: &str = "/usr/bin/snowflake-client";
/// Most bridges.
pub const MAX_BRIDGES: usize = 16;
/// Most entries of each list of nodes.
pub const MAX_NODES: usize = 64;
/// Most names with an address: every bridge has at most one front; for STUN servers there is the rest.
pub const MAX_HOSTS: usize = 64;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GuestConfig {
    /// Tor's hash of the control password (`HashedControlPassword`), made anew for each run.
    pub control_password: HashedPassword,
    /// What the profile says about Tor.
    #[serde(default)]
    pub tor: TorSettings,
    /// Proxy that Tor itself goes through.
    #[serde(default)]
    pub proxy: Option<Proxy>,
    /// Addresses of the names that [`TorSettings::names`] gives: the guest has no resolver on its way out.
    #[serde(default)]
    pub hosts: List<Host, MAX_HOSTS>,
}

/// What a profile may say about Tor. Nothing in it is secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct TorSettings {
    /// Where circuits begin.
    pub entry: Entry,
    /// Where they end; empty: anywhere (`ExitNodes`).
    pub exit_nodes: List<Node, MAX_NODES>,
    /// Nowhere in a circuit (`ExcludeNodes`).
    pub exclude_nodes: List<Node, MAX_NODES>,
    /// Not at a circuit's end (`ExcludeExitNodes`).
    pub exclude_exit_nodes: List<Node, MAX_NODES>,
    /// Whether `exclude_nodes` holds even where Tor then can't do something (`StrictNodes`).
    pub strict_nodes: bool,
    /// Another network than the public one.
    pub network: Option<Network>,
    /// Tor's log.
    pub log: LogLevel,
}

/// Where circuits begin. Tor refuses entry nodes and bridges together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entry {
    /// At guards of Tor's choice.
    #[default]
    Any,
    /// At one of these (`EntryNodes`).
    Nodes(List<Node, MAX_NODES>),
    /// At one of these bridges; nothing else is contacted, but for what [`TorSettings::udp`] says. An empty list makes Tor stop at its start.
    Bridges(List<Bridge, MAX_BRIDGES>),
}

/// From which level on Tor logs. Nothing below `info`: there it names what is visited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// What is wrong.
    Warn,
    /// And what happens.
    #[default]
    Notice,
    /// And why.
    Info,
}

/// As `tor --hash-password` gives it: `16:` and 58 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HashedPassword(String);

/// What a value may not be, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Rejected(pub String);

impl Rejected {
    /// A message that quotes `text`, which may be hostile: cut short, with all but plain characters escaped.
    fn quoting(text: &str, problem: impl fmt::Display) -> Self {
        let shown: String = text.chars().take(64).flat_map(char::escape_default).collect();
        let more = if text.chars().nth(64).is_some() { "…" } else { "" };
        Self(format!("\"{shown}{more}\" {problem}"))
    }
}

impl GuestConfig {
    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// Too long, not JSON, an unknown field, or a value that is not allowed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Rejected> {
        if bytes.len() > MAX_CONFIG {
            return Err(Rejected(format!("the configuration is longer than {MAX_CONFIG} bytes")));
        }
        serde_json::from_slice(bytes).map_err(|error| Rejected(format!("not a configuration: {error}")))
    }

    /// As JSON.
    ///
    /// # Errors
    /// It is longer than [`MAX_CONFIG`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, Rejected> {
        let bytes = serde_json::to_vec(self).map_err(|error| Rejected(format!("not a configuration: {error}")))?;
        if bytes.len() > MAX_CONFIG {
            return Err(Rejected(format!("the configuration is longer than {MAX_CONFIG} bytes")));
        }
        Ok(bytes)
    }

    /// All that Tor contacts by TCP, where that is known: the proxy, or else the bridges. `None`: any relay. A bridge whose name has no
    /// address in `hosts` contributes nothing.
    #[must_use]
    pub fn contacts(&self) -> Option<Vec<SocketAddr>> {
        if let Some(proxy) = &self.proxy {
            return Some(vec![SocketAddr::V4(proxy.address)]);
        }
        let Entry::Bridges(bridges) = &self.tor.entry else { return None };
        let addresses = |bridge: &Bridge| -> Vec<SocketAddr> {
            let Some(name) = bridge.name() else { return vec![bridge.address()] };
            let known = self.hosts.iter().filter(|host| host.name == *name);
            known.map(|host| SocketAddr::from((host.address, bridge::FRONT_PORT))).collect()
        };
        Some(bridges.iter().flat_map(addresses).collect())
    }
}

impl TorSettings {
    /// Names that the host must look up and give as [`GuestConfig::hosts`].
    pub fn names(&self) -> impl Iterator<Item = &HostName> {
        self.bridges().iter().filter_map(Bridge::name)
    }

    /// Names that the host should look up too: without some of them Tor gets on.
    pub fn stun(&self) -> impl Iterator<Item = &HostName> {
        self.bridges().iter().flat_map(Bridge::stun)
    }

    /// Whether Tor also contacts addresses by UDP that nobody knows before: snowflake's volunteers, and STUN servers.
    #[must_use]
    pub fn udp(&self) -> bool {
        self.bridges().iter().any(|bridge| bridge.transport() == Transport::Snowflake)
    }

    /// The bridges, if any.
    #[must_use]
    pub fn bridges(&self) -> &[Bridge] {
        match &self.entry {
            Entry::Bridges(bridges) => bridges,
            Entry::Any | Entry::Nodes(_) => &[],
        }
    }

    /// What people should know about these settings before they rely on them.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.exit_nodes.is_empty() {
            let nodes: Vec<_> = self.exit_nodes.iter().map(ToString::to_string).collect();
            notes.push(format!(
                "Tor leaves its network only at {}: with fewer relays to choose from you are easier to recognise",
                nodes.join(", ")
            ));
        }
        notes.extend(self.bridges().iter().filter_map(Bridge::note));
        if self.udp() {
            notes.push(
                "snowflake contacts volunteers and STUN servers by UDP, wherever they are: your network sees that, and they \
                 see your address, though not what you visit"
                    .to_owned(),
            );
        }
        if self.network.is_some() {
            notes.push(
                "This is not the public Tor network: who runs its authorities decides how anonymous you are".to_owned(),
            );
        }
        notes
    }

    /// How the first of them is reached.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.bridges().first().map_or(Transport::None, Bridge::transport)
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Warn => "warn",
            Self::Notice => "notice",
            Self::Info => "info",
        })
    }
}

impl TryFrom<String> for HashedPassword {
    type Error = Rejected;

    fn try_from(text: String) -> Result<Self, Rejected> {
        let digits = text.strip_prefix("16:").unwrap_or_default();
        if digits.len() == 58 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            Ok(Self(text))
        } else {
            Err(Rejected("a hashed password is 16: and 58 hexadecimal digits".to_owned()))
        }
    }
}

impl From<HashedPassword> for String {
    fn from(password: HashedPassword) -> Self {
        password.0
    }
}

impl AsRef<str> for HashedPassword {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests;
