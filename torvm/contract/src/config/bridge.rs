//! Bridges: relays that are in no public list, some of them behind a pluggable transport (torrc(5), `Bridge`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::network::words;
use super::{Fingerprint, OBFS4PROXY, Rejected, SNOWFLAKE_CLIENT};

/// Where a front is contacted: its URL is `https` without a port.
pub const FRONT_PORT: u16 = 443;
/// Bytes of all arguments of a bridge: they travel to the transport as user and password of SOCKS 5 (pt-spec, section 3.5).
const MAX_ARGUMENTS: usize = 510;
/// What one may write for each transport, beside addresses.
const OBFS4: &[&str] = &["cert", "iat-mode"];
const MEEK: &[&str] = &["url", "front", "utls"];
const SNOWFLAKE: &[&str] = &["fingerprint", "url", FRONT, "fronts", "ice", "max", "utls-imitate", "utls-nosni"];
const FRONT: &str = "front";
/// Most fronts of a line, and most STUN servers.
const MAX_SERVERS: usize = 16;
/// Fronts of meek that do not answer any more: Azure closed domain fronting.
const GONE: &[&str] = &["ajax.aspnetcdn.com", "meek.azureedge.net", "az786092.vo.msecnd.net", "az668014.vo.msecnd.net"];

/// How a bridge is reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Transport {
    /// As any relay.
    #[default]
    None,
    /// obfs4: looks like nothing.
    Obfs4,
    /// meek: looks like a visit of a large web site, its front.
    Meek,
    /// snowflake: looks like a video call (WebRTC) with a volunteer, whom a broker behind a front names.
    Snowflake,
}

/// `[transport] IP:PORT [fingerprint] [key=value…]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bridge {
    transport: Transport,
    address: SocketAddr,
    fingerprint: Option<Fingerprint>,
    /// In the order in which they were given.
    arguments: Vec<(&'static str, String)>,
    /// The front.
    name: Option<HostName>,
    /// Names of STUN servers.
    stun: Vec<HostName>,
}

/// A DNS name, kept in lower case; no address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(String);

/// A name and its address, for `/etc/hosts` of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Host {
    /// The name.
    pub name: HostName,
    /// Its address; the guest's way out is IPv4.
    pub address: Ipv4Addr,
}

impl Transport {
    /// What Tor calls it, if it is one. Debian's obfs4proxy speaks meek under this name.
    #[must_use]
    pub const fn plugin(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Obfs4 => Some("obfs4"),
            Self::Meek => Some("meek_lite"),
            Self::Snowflake => Some("snowflake"),
        }
    }

    /// The guest's program for it, if it needs one.
    #[must_use]
    pub const fn program(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Obfs4 | Self::Meek => Some(OBFS4PROXY),
            Self::Snowflake => Some(SNOWFLAKE_CLIENT),
        }
    }

    /// The word in profiles and on the bus.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Obfs4 => "obfs4",
            Self::Meek => "meek",
            Self::Snowflake => "snowflake",
        }
    }
}

impl FromStr for Transport {
    type Err = Rejected;

    fn from_str(text: &str) -> Result<Self, Rejected> {
        match text {
            "none" => Ok(Self::None),
            "obfs4" => Ok(Self::Obfs4),
            // meek-azure: the forerunner's word; what a bridge's front is stands in its line.
            "meek" | "meek_lite" | "meek-azure" => Ok(Self::Meek),
            "snowflake" => Ok(Self::Snowflake),
            _ => Err(Rejected::quoting(text, "is no transport; use none, obfs4, meek or snowflake")),
        }
    }
}

impl Bridge {
    /// How it is reached.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// Its address. For meek and snowflake only a label: what is contacted is [`name`](Self::name).
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The name that is contacted instead of the address, at [`FRONT_PORT`].
    #[must_use]
    pub const fn name(&self) -> Option<&HostName> {
        self.name.as_ref()
    }

    /// Names of servers that are asked by UDP which address others see (RFC 8489). One that has no address can be done without.
    #[must_use]
    pub fn stun(&self) -> &[HostName] {
        &self.stun
    }

    /// What people should know about it.
    #[must_use]
    pub fn note(&self) -> Option<String> {
        let name = self.name.as_ref().filter(|name| GONE.contains(&name.as_ref()))?;
        Some(format!("meek's front {name} is gone: Azure does not carry meek any more; ask for other bridges"))
    }
}

impl FromStr for Bridge {
    type Err = Rejected;

    fn from_str(text: &str) -> Result<Self, Rejected> {
        let wrong = |problem: String| Rejected::quoting(text, format!("is not a bridge: {problem}"));
        let mut words =
            words(text).ok_or_else(|| wrong("it is too long, or not of plain words".to_owned()))?.peekable();
        // An address begins with a digit or a bracket, a transport with a letter.
        let transport = match words.next_if(|word| word.starts_with(|c: char| c.is_ascii_alphabetic())) {
            None => Transport::None,
            Some(word) => *[Transport::Obfs4, Transport::Meek, Transport::Snowflake]
                .iter()
                .find(|transport| transport.plugin() == Some(word))
                .ok_or_else(|| wrong("it begins with neither an address, obfs4, meek_lite nor snowflake".to_owned()))?,
        };
        let address = words.next().and_then(|word| word.parse().ok()).filter(usable);
        let address = address
            .ok_or_else(|| wrong("it needs the bridge's address, as 192.0.2.1:443 or [2001:db8::1]:443".to_owned()))?;
        let fingerprint = words.next_if(|word| !word.contains('=')).map(str::parse).transpose()?;
        let keys = match transport {
            Transport::None => &[],
            Transport::Obfs4 => OBFS4,
            Transport::Meek => MEEK,
            Transport::Snowflake => SNOWFLAKE,
        };
        let mut arguments: Vec<(&str, String)> = Vec::new();
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| wrong(format!("{word} is not key=value")))?;
            let Some(&key) = keys.iter().find(|&&known| known == key) else {
                return Err(wrong(format!("{key}= is not known for transport {}", transport.as_str())));
            };
            if !argument(key, value) {
                return Err(wrong(format!("the value of {key}= is not allowed")));
            }
            // Clients before 2.6 know one front only, and later ones still understand that.
            let (key, value) = match key {
                "fronts" => (FRONT, value.split(',').next().unwrap_or_default()),
                _ => (key, value),
            };
            if arguments.iter().any(|(known, _)| *known == key) {
                return Err(wrong(format!("{key}= stands in it twice")));
            }
            arguments.push((key, value.to_owned()));
        }
        if arguments.iter().map(|(key, value)| key.len() + value.len() + 2).sum::<usize>() > MAX_ARGUMENTS {
            return Err(wrong(format!("its arguments are longer than {MAX_ARGUMENTS} bytes")));
        }
        let get = |key| arguments.iter().find(|(known, _)| *known == key).map(|(_, value)| value.as_str());
        let missing = |key: &str| wrong(format!("{key}= is missing"));
        let (mut name, mut stun) = (None, Vec::new());
        match transport {
            Transport::None => {}
            Transport::Obfs4 => _ = get("cert").ok_or_else(|| missing("cert"))?,
            Transport::Meek | Transport::Snowflake => {
                let url = get("url").ok_or_else(|| missing("url"))?;
                name = Some(get(FRONT).map_or_else(|| front_of(url), |front| front.parse())?);
            }
        }
        if transport == Transport::Snowflake {
            // Without one the client makes no offer to a volunteer.
            let servers = get("ice").and_then(ice).ok_or_else(|| missing("ice"))?;
            stun.extend(servers.into_iter().flatten());
        }
        Ok(Self { transport, address, fingerprint, arguments, name, stun })
    }
}

/// Whether one can connect to it: Tor is not to talk to itself.
fn usable(address: &SocketAddr) -> bool {
    let ip = address.ip().to_canonical();
    let broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
    let zone = matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0 || v6.flowinfo() != 0);
    address.port() != 0 && !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || broadcast || zone)
}

/// Whether `key` may have this value.
fn argument(key: &str, value: &str) -> bool {
    let of = |most: usize, more: &[u8]| {
        (1..=most).contains(&value.len())
            && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.contains(&byte))
    };
    match key {
        "cert" => of(128, b"+/="),
        "iat-mode" => matches!(value, "0" | "1" | "2"),
        "url" => of(256, b"-._~:/%") && front_of(value).is_ok(),
        FRONT => value.parse::<HostName>().is_ok(),
        "fronts" => servers(value, |front| front.parse::<HostName>().ok()).is_some(),
        "ice" => ice(value).is_some(),
        "utls" | "utls-imitate" => of(64, b"_"),
        "utls-nosni" => matches!(value, "true" | "yes" | "false" | "no"),
        "max" => matches!(value.as_bytes(), [b'1'..=b'9']),
        "fingerprint" => value.len() == 40 && value.bytes().all(|byte| byte.is_ascii_hexdigit()),
        _ => false,
    }
}

/// A list with commas, each entry through `read`; None when one of them is wrong or there are too many.
fn servers<T>(value: &str, read: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
    (value.split(',').count() <= MAX_SERVERS).then(|| value.split(',').map(read).collect())?
}

/// `stun:HOST[:PORT]` (RFC 7064), more of them with commas: their names, None for one that has an IPv4 address instead.
fn ice(value: &str) -> Option<Vec<Option<HostName>>> {
    servers(value, |server| {
        let server = server.strip_prefix("stun:")?;
        let (host, port) = server.split_once(':').unwrap_or((server, "3478"));
        let port = port.parse().ok().filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()))?;
        match host.parse() {
            Ok(address) => usable(&SocketAddr::new(IpAddr::V4(address), port)).then_some(None),
            Err(_) => host.parse().ok().filter(|_| port != 0).map(Some),
        }
    })
}

/// The host of `https://HOST[/PATH]`.
fn front_of(url: &str) -> Result<HostName, Rejected> {
    let rest = url.strip_prefix("https://").unwrap_or_default();
    rest.split('/').next().unwrap_or_default().parse()
}

impl fmt::Display for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(plugin) = self.transport.plugin() {
            write!(f, "{plugin} ")?;
        }
        write!(f, "{}", self.address)?;
        if let Some(fingerprint) = &self.fingerprint {
            write!(f, " {fingerprint}")?;
        }
        self.arguments.iter().try_for_each(|(key, value)| write!(f, " {key}={value}"))
    }
}

impl FromStr for HostName {
    type Err = Rejected;

    fn from_str(text: &str) -> Result<Self, Rejected> {
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // What ends in a number is an address to most programs (URL standard, "ends in a number").
        let last = text.rsplit('.').next().unwrap_or_default();
        let address = last.starts_with(|c: char| c.is_ascii_digit());
        if text.len() <= 253 && text.split('.').all(label) && !address {
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err(Rejected::quoting(text, "is not a host name"))
        }
    }
}

impl AsRef<str> for HostName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

super::by_text!(Bridge, HostName, Transport);
