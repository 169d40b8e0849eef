//! The rules in nft notation (nft(8)): for the dry run, for error messages and for the `nft` program.

use std::fmt::{self, Display, Formatter};

use ipnet::IpNet;

use super::{
    compile::{PRIORITY_FILTER, PRIORITY_MANGLE},
    rules::{Action, Chain, Family, Hook, Kind, Match, Policy, Protocol, Rule, Ruleset, Timeout},
};
use crate::net::desired::{MARK, NFT_TABLE, PASSED};

impl Ruleset {
    /// One line per object, chain and rule in nft notation, such as `inet proxyvpn forward { type filter … }` and
    /// `inet proxyvpn postrouting oifname "lo" accept`.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.timeout.iter().map(|timeout| format!("inet {NFT_TABLE} {timeout}")).collect();
        for chain in &self.chains {
            lines.push(format!("{} {{ {} }}", chain.label(), Base(chain)));
            lines.extend(chain.rules.iter().map(|rule| format!("{} {}", chain.label(), chain.text(rule))));
        }
        lines
    }

    /// A script for `nft -f`: puts this firewall in place of an older one, in one transaction.
    pub fn script(&self) -> String {
        let (egress, others): (Vec<_>, Vec<_>) = self.chains.iter().partition(|chain| chain.is_egress());
        let timeout = self.timeout.iter().map(|timeout| format!("\t{timeout}\n")).collect::<String>();
        let mut script = format!("{REMOVAL}table inet {NFT_TABLE} {{\n{timeout}{}}}\n", body(&others));
        if !egress.is_empty() {
            script += &format!("table netdev {NFT_TABLE} {{\n{}}}\n", body(&egress));
        }
        script
    }
}

/// A script for `nft -f` that removes our tables. Adding before deleting makes it succeed also when there are none.
pub(super) const REMOVAL: &str = "table inet proxyvpn\ndelete table inet proxyvpn\n\
                                  table netdev proxyvpn\ndelete table netdev proxyvpn\n";

fn body(chains: &[&Chain]) -> String {
    let text = |chain: &&Chain| {
        let rules = chain.rules.iter().map(|rule| format!("\t\t{}\n", chain.text(rule))).collect::<String>();
        format!("\tchain {} {{\n\t\t{}\n{rules}\t}}\n", chain.name, Base(chain))
    };
    chains.iter().map(text).collect()
}

impl Chain {
    /// Family, table and name.
    pub(super) fn label(&self) -> String {
        format!("{} {NFT_TABLE} {}", if self.is_egress() { "netdev" } else { "inet" }, self.name)
    }

    /// A rule of this chain.
    pub(super) fn text(&self, rule: &Rule) -> String {
        let matches = rule.matches.iter().map(|m| match m {
            // A frame has no IP version before somebody looks into it.
            Match::Family(Family::V4) if self.is_egress() => "meta protocol ip ".to_owned(),
            Match::Family(Family::V6) if self.is_egress() => "meta protocol ip6 ".to_owned(),
            other => format!("{other} "),
        });
        format!("{}{}", matches.collect::<String>(), rule.action)
    }
}

impl Display for Timeout {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { name, time_wait } = self;
        // In the family inet one object serves both IP versions: the kernel compares the transport protocol only.
        write!(f, "ct timeout {name} {{ protocol tcp; l3proto inet; policy = {{ time_wait : {time_wait} }}; }}")
    }
}

/// What makes a base chain: type, hook, priority, policy.
pub(super) struct Base<'a>(pub(super) &'a Chain);

impl Display for Base<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Chain { kind, hook, priority, policy, .. } = self.0;
        let kind = match kind {
            Kind::Filter => "filter",
            Kind::Route => "route",
        };
        let policy = match policy {
            Policy::Accept => "accept",
            Policy::Drop => "drop",
        };
        write!(f, "type {kind} hook {hook} priority ")?;
        match *priority {
            PRIORITY_MANGLE => f.write_str("mangle")?,
            PRIORITY_FILTER => f.write_str("filter")?,
            other => write!(f, "{other}")?,
        }
        write!(f, "; policy {policy};")
    }
}

impl Display for Hook {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Egress(device) => return write!(f, "egress device \"{device}\""),
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        })
    }
}

impl Display for Protocol {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Icmp6 => "ipv6-icmp",
        })
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iif(name) => write!(f, "iifname \"{name}\""),
            Self::Oif(name) => write!(f, "oifname \"{name}\""),
            Self::Mark => write!(f, "meta mark {MARK:#010x}"),
            Self::Passed => write!(f, "meta mark {PASSED:#010x}"),
            Self::CtMark(mark) => write!(f, "ct mark {mark:#010x}"),
            Self::CtNew => f.write_str("ct state new"),
            Self::CtReply => f.write_str("ct direction reply"),
            Self::ToLocal => f.write_str("fib daddr type local"),
            Self::Family(Family::V4) => f.write_str("meta nfproto ipv4"),
            Self::Family(Family::V6) => f.write_str("meta nfproto ipv6"),
            Self::EtherType(0x0806) => f.write_str("meta protocol arp"),
            Self::EtherType(kind) => write!(f, "meta protocol {kind:#06x}"),
            Self::ArpSender(address) => write!(f, "arp saddr ip {address}"),
            Self::Protocol(protocol) => write!(f, "meta l4proto {protocol}"),
            Self::Syn => f.write_str("tcp flags & (fin|syn|rst|ack) == syn"),
            Self::NotSyn => f.write_str("tcp flags & (fin|syn|rst|ack) != syn"),
            Self::Source(net) => write!(f, "{} saddr {}", version(net), Short(net)),
            Self::Destination(net) => write!(f, "{} daddr {}", version(net), Short(net)),
            Self::SourcePort(protocol, port) => write!(f, "{protocol} sport {port}"),
            Self::DestinationPort(protocol, port) => write!(f, "{protocol} dport {port}"),
            Self::IcmpType(3) => f.write_str("icmp type destination-unreachable"),
            Self::IcmpType(kind) => write!(f, "icmp type {kind}"),
            Self::Icmp6Type(1) => f.write_str("icmpv6 type destination-unreachable"),
            Self::Icmp6Type(2) => f.write_str("icmpv6 type packet-too-big"),
            Self::Icmp6Type(134) => f.write_str("icmpv6 type nd-router-advert"),
            Self::Icmp6Type(133) => f.write_str("icmpv6 type nd-router-solicit"),
            Self::Icmp6Type(135) => f.write_str("icmpv6 type nd-neighbor-solicit"),
            Self::Icmp6Type(136) => f.write_str("icmpv6 type nd-neighbor-advert"),
            Self::Icmp6Type(kind) => write!(f, "icmpv6 type {kind}"),
            // Behind type, code, checksum and flags (RFC 4861 section 4.4); older versions of nft have no name for it.
            Self::NdTarget(address) => write!(f, "@th,64,128 {:#x}", address.to_bits()),
            Self::HopLimit(limit) => write!(f, "ip6 hoplimit {limit}"),
            Self::User(uid) => write!(f, "meta skuid {uid}"),
        }
    }
}

impl Display for Action {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetMark(mark) => write!(f, "meta mark set {mark:#010x}"),
            Self::SetCtMark(mark) => write!(f, "ct mark set {mark:#010x}"),
            Self::SetTimeout(name) => write!(f, "ct timeout set \"{name}\""),
            Self::Accept => f.write_str("accept"),
            Self::Pass => write!(f, "meta mark set {PASSED:#010x} accept"),
            Self::Drop => f.write_str("counter drop"),
            Self::RejectReset => f.write_str("reject with tcp reset"),
            Self::RejectPort => f.write_str("reject with icmpx port-unreachable"),
            Self::RejectProhibited => f.write_str("reject with icmpx admin-prohibited"),
        }
    }
}

fn version(net: &IpNet) -> &'static str {
    if net.addr().is_ipv4() { "ip" } else { "ip6" }
}

/// A network, or an address where it is only one.
pub(super) struct Short<'a>(pub(super) &'a IpNet);

impl Display for Short<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() {
            write!(f, "{}", self.0.addr())
        } else {
            write!(f, "{}", self.0)
        }
    }
}
