//! One change of the kernel's network state, and its undo.

use std::fmt;
use std::net::Ipv4Addr;

use ipnet::IpNet;

use super::desired::{Gateway, ROUTE_PROTOCOL, SYSCTL_ON, TABLE, Tunnel};
use super::observed::Link;

/// `rp_filter` of a device with a gateway: who answers from behind it has any address. The way back to a resolver leads there
/// only for its port, which older kernels do not look for.
pub(super) const LOOSE: u32 = 2;

/// Groups of steps that are applied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The device and its addresses.
    Tunnel,
    /// The firewall.
    Firewall,
    /// Routes, policy rules and what strict reverse-path filtering needs.
    Routes,
}

/// Part of the network that a step changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Network device.
    Link,
    /// Address of a device.
    Address,
    /// Route.
    Route,
    /// Policy rule (ip-rule(8)).
    Rule,
    /// Firewall rule.
    Nft,
    /// Kernel parameter of a device.
    Sysctl,
}

impl Layer {
    /// The name on the bus.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Address => "address",
            Self::Route => "route",
            Self::Rule => "rule",
            Self::Nft => "nft",
            Self::Sysctl => "sysctl",
        }
    }
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make it.
    Add,
    /// Take it away.
    Remove,
    /// Give it a value.
    Set,
}

impl Action {
    /// The name on the bus.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Set => "set",
        }
    }
}

/// IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The version of a prefix.
    pub(super) const fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// Option of `ip` in front of what is not IPv4.
    const fn option(self) -> &'static str {
        match self {
            Self::V4 => "",
            Self::V6 => "-6 ",
        }
    }
}

/// A route in our table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) family: Family,
    /// `None`: default.
    pub(super) to: Option<IpNet>,
    pub(super) target: Target,
    /// The lowest wins.
    pub(super) metric: u32,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// Out by this device.
    Device(String),
    /// To this router behind the device, though no address of the device is in its network.
    Gateway(Ipv4Addr, String),
    /// Refused as unreachable.
    Unreachable,
}

/// A policy rule of ours. What is `None` matches everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) family: Family,
    /// The lowest is asked first.
    pub(super) priority: u32,
    /// Mark and mask.
    pub(super) mark: Option<(u32, u32)>,
    /// The device that it came in by.
    pub(super) device: Option<String>,
    pub(super) to: Option<IpNet>,
    /// First and last user id.
    pub(super) users: Option<(u32, u32)>,
    /// IP protocol number.
    pub(super) protocol: Option<u8>,
    /// First and last destination port.
    pub(super) ports: Option<(u16, u16)>,
    pub(super) verdict: Verdict,
}

/// What becomes of what a policy rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// This table is asked; the next rule, if it has no route.
    Lookup(u32),
    /// Refused as unreachable.
    Unreachable,
}

/// What a step changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// The device itself.
    Device {
        name: String,
        tap: bool,
    },
    /// MTU, queue length, MAC address, up.
    Settings(Tunnel),
    /// The MAC address of the router behind the device, which is not asked for it.
    Neighbour {
        device: String,
        gateway: Gateway,
    },
    Address {
        device: String,
        address: IpNet,
    },
    Route(Route),
    Rule(Rule),
    /// `src_valid_mark` of a device.
    SourceMark {
        device: String,
        value: u32,
    },
    /// A rule of the firewall, in nft notation. The firewall is always set as a whole.
    Firewall(String),
}

impl Change {
    /// A device that is there.
    pub(super) fn device(link: &Link) -> Self {
        Self::Device { name: link.name.clone(), tap: link.mac.is_some() }
    }
}

/// A MAC address.
struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// One step of a plan. [`Display`](fmt::Display) gives its object in the notation of `ip`, `nft` or `sysctl`; `-6 ` in
/// front is the option of `ip`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub(super) action: Action,
    pub(super) change: Change,
}

impl Step {
    /// What it does.
    #[must_use]
    pub const fn action(&self) -> Action {
        self.action
    }

    /// When it is done.
    #[must_use]
    pub const fn stage(&self) -> Stage {
        match self.change {
            Change::Device { .. } | Change::Settings(_) | Change::Neighbour { .. } | Change::Address { .. } => {
                Stage::Tunnel
            }
            Change::Firewall(_) => Stage::Firewall,
            Change::Route(_) | Change::Rule(_) | Change::SourceMark { .. } => Stage::Routes,
        }
    }

    /// What part of the network it changes.
    #[must_use]
    pub const fn layer(&self) -> Layer {
        match self.change {
            Change::Device { .. } | Change::Settings(_) | Change::Neighbour { .. } => Layer::Link,
            Change::Address { .. } => Layer::Address,
            Change::Firewall(_) => Layer::Nft,
            Change::Route(_) => Layer::Route,
            Change::Rule(_) => Layer::Rule,
            Change::SourceMark { .. } => Layer::Sysctl,
        }
    }

    /// The step that takes it back. `None`: nothing to take back, because it goes with the device.
    pub(crate) fn inverse(&self) -> Option<Self> {
        let change = match &self.change {
            Change::Settings(_) | Change::Neighbour { .. } => return None,
            Change::SourceMark { device, value } => {
                let value = if *value == 0 { SYSCTL_ON } else { 0 };
                return Some(Self {
                    action: Action::Set,
                    change: Change::SourceMark { device: device.clone(), value },
                });
            }
            other => other.clone(),
        };
        let action = match self.action {
            Action::Add => Action::Remove,
            Action::Remove => Action::Add,
            Action::Set => Action::Set,
        };
        Some(Self { action, change })
    }

    /// The whole line, for logs and the journal.
    pub(crate) fn line(&self) -> String {
        format!("{} {} {self}", self.layer().as_str(), self.action.as_str())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.change {
            Change::Device { name, tap: false } => write!(f, "{name} type tun"),
            Change::Device { name, tap: true } => write!(f, "{name} type tap"),
            Change::Settings(tunnel) => {
                let (name, mtu, queue) = (&tunnel.name, tunnel.mtu, super::tun::QUEUE);
                write!(f, "{name} mtu {mtu} txqueuelen {queue} addrgenmode none multicast off")?;
                if let Some(gateway) = &tunnel.gateway {
                    write!(f, " arp off rp_filter {LOOSE} address {}", Mac(gateway.own_mac))?;
                }
                f.write_str(" up")
            }
            Change::Neighbour { device, gateway } => {
                write!(f, "{} lladdr {} dev {device} nud permanent", gateway.address, Mac(gateway.mac))
            }
            Change::Address { device, address } => write!(f, "{address} dev {device} noprefixroute"),
            Change::Route(route) => route.fmt(f),
            Change::Rule(rule) => rule.fmt(f),
            Change::SourceMark { device, value } => write!(f, "net.ipv4.conf.{device}.src_valid_mark={value}"),
            Change::Firewall(line) => f.write_str(line),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.family.option())?;
        if self.target == Target::Unreachable {
            f.write_str("unreachable ")?;
        }
        match &self.to {
            None => f.write_str("default")?,
            Some(net) => write!(f, "{net}")?,
        }
        match &self.target {
            Target::Device(name) => write!(f, " dev {name}")?,
            Target::Gateway(address, name) => write!(f, " via {address} dev {name} onlink")?,
            Target::Unreachable => {}
        }
        write!(f, " table {TABLE} proto {ROUTE_PROTOCOL} metric {}", self.metric)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}priority {}", self.family.option(), self.priority)?;
        if let Some((mark, mask)) = self.mark {
            write!(f, " fwmark {mark:#x}/{mask:#x}")?;
        }
        if let Some(device) = &self.device {
            write!(f, " iif {device}")?;
        }
        if let Some(net) = self.to {
            write!(f, " to {net}")?;
        }
        if let Some((first, last)) = self.users {
            write!(f, " uidrange {first}-{last}")?;
        }
        match self.protocol {
            None => {}
            Some(6) => f.write_str(" ipproto tcp")?,
            Some(17) => f.write_str(" ipproto udp")?,
            Some(other) => write!(f, " ipproto {other}")?,
        }
        match self.ports {
            None => {}
            Some((first, last)) if first == last => write!(f, " dport {first}")?,
            Some((first, last)) => write!(f, " dport {first}-{last}")?,
        }
        match self.verdict {
            Verdict::Lookup(254) => f.write_str(" lookup main")?,
            Verdict::Lookup(other) => write!(f, " lookup {other}")?,
            Verdict::Unreachable => f.write_str(" unreachable")?,
        }
        write!(f, " protocol {ROUTE_PROTOCOL}")
    }
}
