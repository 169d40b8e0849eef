//! The rules as a value. Each kind of match and action is one that nftables and iptables both have, but for
//! [`Action::SetTimeout`], [`Match::NdTarget`] and the chains of [`Hook::Egress`], which nftables alone has and which the rules
//! can do without.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use super::error::Error;
use crate::net::devices::is_plain;

/// Every rule of the firewall, ready to be sent. Made by [`compile`](super::compile()).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    /// What [`Action::SetTimeout`] sets; `None` where the kernel does not have it.
    pub(super) timeout: Option<Timeout>,
    /// In the order in which a packet meets them. A chain without a rule and with policy accept is not there.
    pub(super) chains: Vec<Chain>,
}

/// An object of the table `inet proxyvpn`: how long connection tracking keeps a TCP connection. States that are not named
/// here keep the machine's own limits (`net.netfilter.nf_conntrack_tcp_timeout_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Timeout {
    pub(super) name: &'static str,
    /// After both ends have closed, in seconds.
    pub(super) time_wait: u32,
}

/// A base chain of the table `inet proxyvpn`, or `netdev proxyvpn` for [`Hook::Egress`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) hook: Hook,
    pub(super) priority: i32,
    pub(super) policy: Policy,
    pub(super) rules: Vec<Rule>,
}

/// Type of a chain: a route chain looks the route up again when a rule changed the mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Filter,
    Route,
}

/// Where in the kernel's path a chain stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
    /// At the exit of the device with this name, where every frame comes through whoever made it.
    Egress(String),
}

/// What becomes of a packet that no rule decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Policy {
    Accept,
    Drop,
}

/// All matches must hold, then the action is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) matches: Vec<Match>,
    pub(super) action: Action,
}

/// IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

/// Transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp,
    Udp,
    Icmp,
    Icmp6,
}

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Match {
    /// Came in by this device.
    Iif(String),
    /// Leaves by this device.
    Oif(String),
    /// Carries our mark.
    Mark,
    /// Our table let it through.
    Passed,
    /// Its connection carries this mark.
    CtMark(u32),
    /// Opens a connection.
    CtNew,
    /// Goes against the direction in which its connection was opened.
    CtReply,
    /// Is addressed to this machine itself (not broadcast or multicast).
    ToLocal,
    Family(Family),
    /// EtherType of the frame, at the exit of a device.
    EtherType(u16),
    /// ARP that says that the sender has this address (RFC 826).
    ArpSender(Ipv4Addr),
    Protocol(Protocol),
    /// TCP: of FIN, SYN, RST and ACK only SYN is set.
    Syn,
    /// TCP: anything but [`Match::Syn`].
    NotSyn,
    Source(IpNet),
    Destination(IpNet),
    SourcePort(Protocol, u16),
    DestinationPort(Protocol, u16),
    /// ICMP type (RFC 792).
    IcmpType(u8),
    /// ICMPv6 type (RFC 4443, RFC 4861).
    Icmp6Type(u8),
    /// IPv6 hop limit.
    HopLimit(u8),
    /// A neighbour advertisement for this address (RFC 4861).
    NdTarget(Ipv6Addr),
    /// Sent by a socket of this local user.
    User(u32),
}

/// What is done to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Set the packet's mark, and go on.
    SetMark(u32),
    /// Set the connection's mark, and go on.
    SetCtMark(u32),
    /// Give the connection the timeout with this name if it is a new one, and go on.
    SetTimeout(&'static str),
    /// Leave this chain; chains of others still decide.
    Accept,
    /// The same, and tell the lock.
    Pass,
    /// Count and drop. A chain whose policy is drop ends with this all the same: when a table is replaced, the kernel puts the
    /// policy in force later than the rules.
    Drop,
    /// Answer with a TCP reset.
    RejectReset,
    /// Answer with ICMP port unreachable.
    RejectPort,
    /// Answer with ICMP administratively prohibited.
    RejectProhibited,
}

impl Chain {
    /// Stands in the table `netdev proxyvpn`.
    pub(super) const fn is_egress(&self) -> bool {
        matches!(self.hook, Hook::Egress(_))
    }
}

impl Rule {
    /// The IP version that the rule is limited to.
    pub(super) fn family(&self) -> Option<Family> {
        self.matches.iter().find_map(|m| match m {
            Match::Family(family) => Some(*family),
            Match::Source(net) | Match::Destination(net) => Some(Family::of(net.addr())),
            Match::Protocol(Protocol::Icmp) | Match::IcmpType(_) => Some(Family::V4),
            Match::Protocol(Protocol::Icmp6) | Match::Icmp6Type(_) | Match::NdTarget(_) | Match::HopLimit(_) => {
                Some(Family::V6)
            }
            _ => None,
        })
    }

    /// The transport protocol that the rule is limited to.
    pub(super) fn protocol(&self) -> Option<Protocol> {
        self.matches.iter().find_map(Match::protocol)
    }
}

impl Match {
    /// The transport protocol that the match is about.
    pub(super) fn protocol(&self) -> Option<Protocol> {
        match self {
            Self::Protocol(protocol) | Self::SourcePort(protocol, _) | Self::DestinationPort(protocol, _) => {
                Some(*protocol)
            }
            Self::Syn | Self::NotSyn => Some(Protocol::Tcp),
            Self::IcmpType(_) => Some(Protocol::Icmp),
            Self::Icmp6Type(_) | Self::NdTarget(_) => Some(Protocol::Icmp6),
            _ => None,
        }
    }

    /// The segments that this machine sends on an open TCP connection.
    pub(super) fn segments(local: SocketAddr, remote: SocketAddr) -> Vec<Self> {
        vec![
            Self::Source(IpNet::from(local.ip())),
            Self::Destination(IpNet::from(remote.ip())),
            Self::SourcePort(Protocol::Tcp, local.port()),
            Self::DestinationPort(Protocol::Tcp, remote.port()),
            Self::NotSyn,
        ]
    }
}

impl Family {
    /// The version of an address.
    pub(super) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl Ruleset {
    /// Puts chains together; a chain without a rule and with policy accept is left out.
    pub(super) fn new(timeout: Option<Timeout>, mut chains: Vec<Chain>) -> Self {
        chains.retain(|chain| !chain.rules.is_empty() || chain.policy == Policy::Drop);
        Self { timeout, chains }
    }

    /// The same for a kernel or a program that has no timeouts.
    pub(super) fn without_timeout(&self) -> Self {
        let mut chains = self.chains.clone();
        for chain in &mut chains {
            chain.rules.retain(|rule| !matches!(rule.action, Action::SetTimeout(_)));
        }
        Self::new(None, chains)
    }

    /// The same for a kernel or a program without chains at the exit of a device.
    pub(super) fn without_egress(&self) -> Self {
        let chains = self.chains.iter().filter(|chain| !chain.is_egress());
        Self::new(self.timeout, chains.cloned().collect())
    }

    /// Whether there is a chain of the table `netdev proxyvpn`.
    pub(super) fn has_egress(&self) -> bool {
        self.chains.iter().any(Chain::is_egress)
    }

    /// Refuses device names that nft or iptables would read as a pattern or as syntax.
    pub(super) fn check(&self) -> Result<(), Error> {
        let mut devices = self.chains.iter().flat_map(|chain| {
            let matches = chain.rules.iter().flat_map(|rule| &rule.matches);
            let named =
                matches.filter_map(|m| if let Match::Iif(name) | Match::Oif(name) = m { Some(name) } else { None });
            named.chain(if let Hook::Egress(name) = &chain.hook { Some(name) } else { None })
        });
        devices.find(|name| !is_plain(name)).map_or(Ok(()), |name| Err(Error::Device(name.clone())))
    }
}
