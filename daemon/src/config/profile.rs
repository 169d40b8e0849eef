//! A profile after all checks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxyvpn_torvm::config::TorSettings;
use proxyvpn_torvm::config::proxy::Kind;
use proxyvpn_torvm::launch::Accelerator;
use serde::{Deserialize, Serialize};

use super::error::Rejected;

/// A profile: what to connect to and what to protect (`proxyvpn-profile(5)`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name: 1 to 64 of `[A-Za-z0-9._-]`, not starting with `.` or `-`
    /// ([`check::profile_name`](super::check::profile_name)); `adhoc` for a connection without a profile.
    pub name: String,
    /// Which backend carries it.
    pub backend: Backend,
    /// Connect when the daemon starts.
    pub autoconnect: bool,
    /// The way out.
    pub upstream: UpstreamSpec,
    /// The device.
    pub tun: TunSpec,
    /// Name resolution.
    pub dns: DnsSpec,
    /// What is blocked.
    pub protect: ProtectSpec,
    /// Local users (ids) whose traffic goes around the tunnel.
    pub bypass_users: Vec<u32>,
    /// What the virtual machine and Tor in it are told; `Some` with [`Backend::TorVm`]. A record of an older version has none.
    #[serde(default)]
    pub torvm: Option<TorVmSpec>,
}

/// Which backend carries a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backend {
    /// TUN and packet engine.
    Proxy,
    /// A VM that runs Tor.
    TorVm,
}

/// `[upstream]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamSpec {
    /// Protocol.
    pub scheme: Scheme,
    /// Host name or address literal without brackets; empty for [`Scheme::Direct`].
    pub host: String,
    /// TCP port; 0 for [`Scheme::Direct`].
    pub port: u16,
    /// Addresses that save the look-up of `host`.
    pub addresses: Vec<IpAddr>,
    /// User name.
    pub username: Option<String>,
    /// Where the password comes from.
    pub password: Option<PasswordSource>,
}

/// The upstream as a URL without secrets.
impl std::fmt::Display for UpstreamSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.scheme {
            Scheme::Direct => f.write_str("direct://"),
            Scheme::Http if self.host.contains(':') => write!(f, "http://[{}]:{}", self.host, self.port),
            Scheme::Http => write!(f, "http://{}:{}", self.host, self.port),
        }
    }
}

/// Protocol to the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scheme {
    /// HTTP CONNECT over TCP.
    Http,
    /// No upstream.
    Direct,
}

/// Where a password comes from. Read anew at each connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PasswordSource {
    /// A file, checked when opened.
    File(PathBuf),
    /// A systemd credential (`LoadCredential=`), by name.
    Credential(String),
    /// It came with the call that connected, and is nowhere on disk.
    Caller,
}

/// `[tun]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunSpec {
    /// Device name, 1 to 15 bytes.
    pub name: String,
    /// IPv4 address with prefix.
    pub cidr: Ipv4Net,
    /// IPv6 address with prefix.
    pub cidr6: Ipv6Net,
    /// MTU in bytes, 1280 to 65535.
    pub mtu: u16,
}

impl Default for TunSpec {
    fn default() -> Self {
        Self {
            name: "pvpn0".to_owned(),
            cidr: Ipv4Net::new_assert(Ipv4Addr::new(10, 255, 255, 1), 30),
            cidr6: Ipv6Net::new_assert(Ipv6Addr::new(0xfd70, 0x7670, 0x6e, 0, 0, 0, 0, 1), 64),
            mtu: 65535,
        }
    }
}

/// `[torvm]`. No secret is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TorVmSpec {
    /// The virtual machine's memory in MiB, 128 to 4096.
    pub memory_mib: u32,
    /// What runs its instructions; `None`: the processor if that is seen to work, otherwise emulation.
    pub accel: Option<Accelerator>,
    /// What Tor is told.
    pub tor: TorSettings,
    /// Proxy that Tor itself goes through.
    pub proxy: Option<TorProxySpec>,
}

impl Default for TorVmSpec {
    fn default() -> Self {
        Self { memory_mib: 256, accel: None, tor: TorSettings::default(), proxy: None }
    }
}

/// `[torvm] https-proxy` or `socks5-proxy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TorProxySpec {
    /// What it speaks.
    pub kind: Kind,
    /// Host name or IPv4 address. The host looks it up: the guest has no resolver on its way out.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// User name; a password comes with it and only with it.
    pub username: Option<String>,
    /// Where the password comes from.
    pub password: Option<PasswordSource>,
}

/// `[dns]`. The modes other than `bypass` are rejected with a clear error until they are built.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsSpec {
    /// Resolvers that may be asked around the tunnel; empty means those of the machine.
    pub servers: Vec<IpAddr>,
}

/// `[protect]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectSpec {
    /// Block what does not go through the tunnel.
    pub killswitch: bool,
    /// Answer connections that began outside the way they came.
    pub inbound_replies: bool,
    /// Prefixes that go around the tunnel.
    pub lan: Vec<IpNet>,
    /// What becomes of traffic that this machine forwards. A record of an older version has none.
    #[serde(default)]
    pub forward: ForwardSpec,
    /// Whether iptables may be used where the kernel has no nf_tables.
    #[serde(default)]
    pub iptables_fallback: bool,
}

/// `[protect] forward`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForwardSpec {
    /// Nothing is forwarded.
    #[default]
    Block,
    /// TCP goes through the tunnel, DNS to the resolvers; the rest is refused.
    Tunnel,
}

impl Profile {
    /// Whether a stored password is sent to somebody whom the profile names.
    #[must_use]
    pub fn stored_password(&self) -> bool {
        let proxy = self.torvm.as_ref().and_then(|torvm| torvm.proxy.as_ref());
        self.upstream.password.is_some() || proxy.is_some_and(|proxy| proxy.password.is_some())
    }

    /// Whether the upstream carries what Tor's bridges need.
    ///
    /// # Errors
    /// Snowflake's UDP goes through no HTTP proxy.
    pub fn fits_upstream(&self) -> Result<(), Rejected> {
        if self.upstream.scheme != Scheme::Direct && self.torvm.as_ref().is_some_and(|torvm| torvm.tor.udp()) {
            let text = "snowflake needs UDP, which goes through no HTTP proxy; use obfs4 or meek bridges, or direct://";
            return Err(Rejected::new(text));
        }
        Ok(())
    }

    /// What people should know about these settings before they rely on them.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        self.torvm.as_ref().map(|torvm| torvm.tor.notes()).unwrap_or_default()
    }
}

impl Default for ProtectSpec {
    fn default() -> Self {
        Self {
            killswitch: true,
            inbound_replies: true,
            lan: Vec::new(),
            forward: ForwardSpec::Block,
            iptables_fallback: false,
        }
    }
}
