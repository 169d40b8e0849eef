//! From the desired state to rules, without side effects.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::rules::{Action, Chain, Family, Hook, Kind, Match, Policy, Protocol, Rule, Ruleset, Timeout};
use crate::net::{
    desired::{Desired, Forward, Locked, MARK, Tunnel},
    devices::Devices,
};

/// How many older inbound sessions get a rule; more are not kept.
pub const MAX_SESSIONS: usize = 1024;
/// Mark of TCP connections of bypassing users. Not [`MARK`], which connections from outside carry.
pub const BYPASS_CT_MARK: u32 = MARK + 1;
/// Mark of TCP connections from containers and virtual machines to this machine, where those from outside get no answer.
const INNER_CT_MARK: u32 = MARK + 2;

/// `NF_IP_PRI_MANGLE`: after connection tracking, before anything that decides.
pub(super) const PRIORITY_MANGLE: i32 = -150;
/// `NF_IP_PRI_FILTER`.
pub(super) const PRIORITY_FILTER: i32 = 0;
/// After source NAT (100) and everything usual.
pub(super) const PRIORITY_LAST: i32 = 300;

/// For both connections of a tunnelled one, program to device and daemon to proxy: at the kernel's own 120 s, some 1,100
/// short connections per second would fill its table. 10 s are long enough for what is repeated when the last segments
/// get lost (RFC 6298: after 1, 3 and 7 s). The other states may still have something to come and keep their limits.
const TIMEOUT: Timeout = Timeout { name: "tunnelled", time_wait: 10 };

/// Router solicitation, neighbour solicitation, neighbour advertisement (RFC 4861).
const NEIGHBOUR_DISCOVERY: [u8; 3] = [133, 135, 136];
/// Destination unreachable (RFC 792).
const UNREACHABLE: u8 = 3;
/// Destination unreachable, packet too big (RFC 4443), router advertisement (RFC 4861).
const INNER_ICMP6: [u8; 3] = [1, 2, 134];
/// EtherTypes without which a link goes down, and which no router passes on: ARP, IEEE 802.1X (also the keys of a wireless
/// network), link aggregation, spanning tree (IEEE 802.2), PPPoE, whose content has met the chain of its own device.
const LINK_CONTROL: [u16; 6] = [0x0806, 0x888e, 0x8809, 0x0004, 0x8863, 0x8864];

/// Compiles the desired state to rules. `sessions`: TCP connections from outside, as (local, remote), that were open
/// before: they are kept, up to [`MAX_SESSIONS`]. `devices`: those of the machine.
pub fn compile(desired: &Desired, sessions: &[(SocketAddr, SocketAddr)], devices: &Devices) -> Ruleset {
    let mut chains = vec![
        chain(
            "prerouting",
            Kind::Filter,
            Hook::Prerouting,
            PRIORITY_MANGLE,
            Policy::Accept,
            prerouting(desired, devices),
        ),
        chain("input", Kind::Filter, Hook::Input, PRIORITY_FILTER, Policy::Accept, input(desired)),
        chain("output", Kind::Route, Hook::Output, PRIORITY_MANGLE, Policy::Accept, output(desired, sessions, devices)),
    ];
    let filter = filter_output(desired, devices);
    let filter = chain("filter_output", Kind::Filter, Hook::Output, PRIORITY_FILTER, Policy::Accept, filter);
    if desired.killswitch {
        let (forward, last) = (forward(desired, devices), postrouting(desired, devices));
        chains.extend([
            chain("forward", Kind::Filter, Hook::Forward, PRIORITY_FILTER, Policy::Drop, forward),
            filter,
            chain("postrouting", Kind::Filter, Hook::Postrouting, PRIORITY_LAST, Policy::Drop, last),
        ]);
    } else {
        chains.push(filter);
        let last = never_in(desired).filter(|_| desired.tunnel.iter().any(|tunnel| tunnel.gateway.is_some()));
        let last = last.into_iter().collect();
        chains.push(chain("postrouting", Kind::Filter, Hook::Postrouting, PRIORITY_LAST, Policy::Accept, last));
    }
    let policy = if desired.killswitch { Policy::Drop } else { Policy::Accept };
    chains.extend(devices.uplinks.iter().map(|name| {
        let hook = Hook::Egress(name.clone());
        chain(format!("egress_{name}"), Kind::Filter, hook, PRIORITY_FILTER, policy, egress(desired))
    }));
    Ruleset::new(Some(TIMEOUT), chains)
}

/// Marks what comes from outside for this machine itself, and what comes back for those behind it.
fn prerouting(desired: &Desired, devices: &Devices) -> Vec<Rule> {
    let mut rules = from_gateway(desired, devices);
    rules.extend(own_devices(desired).map(|name| rule(vec![Match::Iif(name)], Action::Accept)));
    // TCP with a SYN only: with UDP, or a connection picked up in its middle, the far end of an older connection of ours
    // could speak first and look like the one who began. For this machine only: what it says of others' is no answer.
    let begins = [Match::Syn, Match::CtNew, Match::CtMark(0), Match::ToLocal];
    if desired.inbound_replies {
        rules.push(rule(begins.to_vec(), Action::SetCtMark(MARK)));
    } else {
        let inner = devices.inner.iter().map(|name| [&begins[..], &[Match::Iif(name.clone())]].concat());
        rules.extend(inner.map(|matches| rule(matches, Action::SetCtMark(INNER_CT_MARK))));
    }
    if desired.forwards() {
        // Otherwise the answers would be steered into the tunnel, as TCP, and strict reverse-path filtering would take that
        // for the way back of the questions.
        let tcp = [Protocol::Tcp];
        let questions = resolvers(desired, &tcp, Match::Destination, Match::DestinationPort);
        rules.extend(questions.map(|matches| rule(matches, Action::SetMark(MARK))));
        let answers = resolvers(desired, &tcp, Match::Source, Match::SourcePort);
        rules.extend(answers.map(|matches| rule([matches, vec![Match::CtReply]].concat(), Action::SetMark(MARK))));
    }
    // Strict reverse-path filtering (rp_filter=1) looks up the way back with this mark.
    rules.push(rule(vec![Match::ToLocal], Action::SetMark(MARK)));
    rules
}

/// Of what comes in by a TAP device of ours, only what answers goes on: TCP, DNS, and that something can't be reached. So nothing
/// that is begun behind it gets to this machine or through it, whatever the other chains say.
fn from_gateway(desired: &Desired, devices: &Devices) -> Vec<Rule> {
    let tunnel = desired.tunnel.iter().filter(|tunnel| tunnel.gateway.is_some()).map(|tunnel| &tunnel.name);
    let others =
        devices.routed.iter().filter(|name| desired.tunnel.as_ref().is_none_or(|tunnel| tunnel.name != **name));
    let answers = [Match::Protocol(Protocol::Tcp), Match::SourcePort(Protocol::Udp, 53), Match::IcmpType(UNREACHABLE)];
    let mut rules: Vec<Rule> = tunnel
        .chain(others)
        .flat_map(|name| {
            let from = |what: &Match| vec![what.clone(), Match::Iif(name.clone()), Match::CtReply];
            let dropped = rule(vec![Match::Iif(name.clone())], Action::Drop);
            answers.iter().map(from).map(|matches| rule(matches, Action::Accept)).chain([dropped]).collect::<Vec<_>>()
        })
        .collect();
    // This machine's own packets do not come by here.
    rules.extend(control(desired).map(|matches| rule(matches, Action::Drop)));
    rules
}

/// What begins a connection to the service of the gateway that is not for everybody.
fn control(desired: &Desired) -> Option<Vec<Match>> {
    let gateway = desired.tunnel.as_ref()?.gateway?;
    let to = Match::Destination(IpAddr::V4(gateway.address).into());
    Some(vec![to, Match::DestinationPort(Protocol::Tcp, gateway.control.port)])
}

/// What may go into the tunnel. With a gateway that is what it takes, from the device's own address, which tells nothing of
/// this machine's others; the rest is refused.
fn into_tunnel(desired: &Desired, tunnel: &Tunnel, refuse: Refuse) -> Vec<Rule> {
    let oif = || Match::Oif(tunnel.name.clone());
    let Some(gateway) = tunnel.gateway else { return vec![rule(vec![oif()], accept(desired))] };
    let own = || Match::Source(IpAddr::V4(tunnel.v4.addr()).into());
    // The device that is seen in `output` is that of before a mark led elsewhere.
    let mut rules = vec![rule(vec![Match::Mark], Action::Accept)];
    // Only a socket that a program holds has a user, and a SYN has such. Without one nobody gets an answer there.
    let begin: Vec<Match> = control(desired).into_iter().flatten().chain([oif(), Match::Syn]).collect();
    rules.push(rule([&begin[..], &[own(), Match::User(gateway.control.user)]].concat(), accept(desired)));
    rules.push(rule(begin, if refuse == Refuse::Silently { Action::Drop } else { Action::RejectReset }));
    for what in [Match::Protocol(Protocol::Tcp), Match::DestinationPort(Protocol::Udp, 53)] {
        rules.push(rule(vec![what, oif(), own()], accept(desired)));
    }
    rules.extend(refuse.rules(&[oif()]));
    rules
}

/// How what may not leave is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refuse {
    /// So that programs fail at once.
    AtOnce,
    /// By dropping it.
    Silently,
}

impl Refuse {
    /// Refuses what matches.
    fn rules(self, matches: &[Match]) -> Vec<Rule> {
        if self == Self::Silently {
            return vec![rule(matches.to_vec(), Action::Drop)];
        }
        let of = |protocol, action| rule([&[Match::Protocol(protocol)], matches].concat(), action);
        let others = rule(matches.to_vec(), Action::RejectProhibited);
        vec![of(Protocol::Tcp, Action::RejectReset), of(Protocol::Udp, Action::RejectPort), others]
    }
}

/// The tunnel's address answers on the tunnel only (CVE-2019-14899).
fn input(desired: &Desired) -> Vec<Rule> {
    if desired.guarded.is_empty() {
        return vec![];
    }
    let guard = |address: &IpAddr| rule(vec![Match::Destination(IpNet::from(*address))], Action::Drop);
    own_devices(desired)
        .map(|name| rule(vec![Match::Iif(name)], Action::Accept))
        .chain(desired.guarded.iter().map(guard))
        .collect()
}

/// Marks what may leave although its socket carries no mark: this chain then sends it by the main table.
fn output(desired: &Desired, sessions: &[(SocketAddr, SocketAddr)], devices: &Devices) -> Vec<Rule> {
    // First: below, connections get the mark that are neither the daemon's nor in the tunnel.
    let tunnelled = desired.tunnel.iter().map(|tunnel| Match::Oif(tunnel.name.clone()));
    let mut rules: Vec<Rule> = tunnelled
        .chain([Match::Mark])
        .map(|which| rule(vec![Match::Protocol(Protocol::Tcp), Match::CtNew, which], Action::SetTimeout(TIMEOUT.name)))
        .collect();
    rules.extend(to_itself(desired, devices));
    // Users with an exception too: nobody has another way to it.
    let gateway = desired.tunnel.iter().filter_map(|tunnel| Some((tunnel, tunnel.gateway?)));
    rules.extend(gateway.map(|(tunnel, gateway)| {
        let to = Match::Destination(IpAddr::V4(gateway.address).into());
        rule(vec![to, Match::Oif(tunnel.name.clone())], Action::Accept)
    }));
    if !desired.inbound_replies && !devices.inner.is_empty() {
        rules.push(rule(vec![Match::CtReply, Match::CtMark(INNER_CT_MARK)], Action::SetMark(MARK)));
    }
    if desired.inbound_replies {
        rules.push(rule(vec![Match::CtReply, Match::CtMark(MARK)], Action::SetMark(MARK)));
        rules.extend(
            sessions
                .iter()
                .map(|(local, remote)| (canonical(*local), canonical(*remote)))
                .filter(|(local, remote)| local.is_ipv4() == remote.is_ipv4())
                .take(MAX_SESSIONS)
                .map(|(local, remote)| rule(Match::segments(local, remote), Action::SetMark(MARK))),
        );
    }
    // A closed socket has no user any more while its last data still leaves, so the connection is marked too. A SYN has
    // a live socket: without NotSyn another user could take over the addresses and ports.
    for user in &desired.exceptions.users {
        let matches = vec![Match::Protocol(Protocol::Tcp), Match::User(*user), Match::CtMark(0)];
        rules.push(rule(matches, Action::SetCtMark(BYPASS_CT_MARK)));
    }
    if !desired.exceptions.users.is_empty() {
        rules.push(rule(vec![Match::NotSyn, Match::CtMark(BYPASS_CT_MARK)], Action::SetMark(MARK)));
    }
    rules
}

/// Who is behind a TAP device of ours speaks through sockets with our mark, and must not reach this machine. Here a mark is still
/// that of the socket.
fn to_itself(desired: &Desired, devices: &Devices) -> Vec<Rule> {
    if devices.routed.is_empty() && desired.tunnel.as_ref().is_none_or(|tunnel| tunnel.gateway.is_none()) {
        return vec![];
    }
    let itself = [Match::Oif("lo".to_owned()), Match::Mark];
    let services = desired.exceptions.services.iter().map(|service| {
        let (to, port) = (service.ip().to_canonical().into(), service.port());
        [vec![Match::Destination(to), Match::DestinationPort(Protocol::Tcp, port)], itself.to_vec()].concat()
    });
    services.map(|matches| rule(matches, Action::Accept)).chain([rule(itself.to_vec(), Action::Drop)]).collect()
}

/// What this machine forwards. What is accepted here gets our mark where the chains behind would not know it.
fn forward(desired: &Desired, devices: &Devices) -> Vec<Rule> {
    let mut rules = vec![];
    let tcp = || Match::Protocol(Protocol::Tcp);
    if let Some(tunnel) = desired.tunnel.as_ref().filter(|_| desired.forwards()) {
        let (into, back) = (Match::Oif(tunnel.name.clone()), Match::Iif(tunnel.name.clone()));
        rules.push(rule(vec![tcp(), into.clone(), Match::CtNew], Action::SetTimeout(TIMEOUT.name)));
        rules.push(rule(vec![tcp(), into.clone()], accept(desired)));
        rules.extend(pass(&[tcp(), back.clone(), Match::CtReply]));
        if tunnel.gateway.is_some() {
            rules.push(rule(vec![Match::DestinationPort(Protocol::Udp, 53), into], accept(desired)));
            for answer in [Match::SourcePort(Protocol::Udp, 53), Match::IcmpType(UNREACHABLE)] {
                rules.extend(pass(&[answer, back.clone(), Match::CtReply]));
            }
        }
    }
    // With bridge-nf-call-iptables what one port of a bridge sends to another comes here too.
    for name in &devices.inner {
        rules.extend(pass(&[Match::Iif(name.clone()), Match::Oif(name.clone())]));
    }
    if desired.forward == Forward::Tunnel {
        let both = [Protocol::Udp, Protocol::Tcp];
        for matches in resolvers(desired, &both, Match::Destination, Match::DestinationPort) {
            rules.push(rule(matches, accept(desired)));
        }
        for matches in resolvers(desired, &both, Match::Source, Match::SourcePort) {
            rules.extend(pass(&[matches, vec![Match::CtReply]].concat()));
        }
    }
    if desired.forward == Forward::Tunnel {
        rules.push(rule(vec![Match::Protocol(Protocol::Udp)], Action::RejectPort));
        // TCP too: a reset would be steered into the tunnel.
        rules.push(rule(vec![], Action::RejectProhibited));
    } else {
        rules.push(rule(vec![], Action::Drop));
    }
    rules
}

/// Marks and accepts.
fn pass(matches: &[Match]) -> [Rule; 2] {
    [Action::SetMark(MARK), Action::Accept].map(|action| rule(matches.to_vec(), action))
}

/// Refuses at once, so that programs fail fast. The device that is seen here can be stale; `postrouting` decides.
fn filter_output(desired: &Desired, devices: &Devices) -> Vec<Rule> {
    let refuse = Refuse::AtOnce;
    if desired.killswitch {
        return leaving(desired, devices, refuse).into_iter().chain(refuse.rules(&[])).collect();
    }
    let gateway = desired.tunnel.iter().filter(|tunnel| tunnel.gateway.is_some());
    gateway.flat_map(|tunnel| into_tunnel(desired, tunnel, refuse)).collect()
}

/// Drops by the final device whatever is not allowed, also what was forwarded.
fn postrouting(desired: &Desired, devices: &Devices) -> Vec<Rule> {
    let mut rules: Vec<Rule> = never_in(desired).into_iter().collect();
    rules.extend(leaving(desired, devices, Refuse::Silently));
    rules.push(rule(vec![], Action::Drop));
    rules
}

/// The daemon's own connections into its own tunnel would come back to it, without an end.
fn never_in(desired: &Desired) -> Option<Rule> {
    let tunnel = desired.tunnel.as_ref()?;
    Some(rule(vec![Match::Oif(tunnel.name.clone()), Match::Mark], Action::Drop))
}

/// Stops frames that met no chain of the IP layer: of packet sockets, of bridges, of network namespaces that share the
/// device (macvlan).
fn egress(desired: &Desired) -> Vec<Rule> {
    let mut rules = vec![];
    if desired.killswitch {
        rules.push(rule(vec![Match::Mark], Action::Accept));
    }
    rules.extend(guarded(desired));
    if desired.killswitch {
        rules.extend(LINK_CONTROL.map(|kind| rule(vec![Match::EtherType(kind)], Action::Accept)));
        rules.extend(allowed(desired));
        rules.push(rule(vec![], Action::Drop));
    }
    rules
}

/// Stops what tells that a guarded address is here.
fn guarded(desired: &Desired) -> impl Iterator<Item = Rule> {
    let tells = |address: &IpAddr| match address {
        IpAddr::V4(address) => vec![Match::ArpSender(*address)],
        IpAddr::V6(address) => vec![Match::Icmp6Type(136), Match::NdTarget(*address)],
    };
    desired.guarded.iter().map(move |address| rule(tells(address), Action::Drop))
}

/// What may leave through the IP layer, and how what may not go into the tunnel is refused. To the lock the daemon's own says
/// itself what it is.
pub(super) fn leaving(desired: &Desired, devices: &Devices, refuse: Refuse) -> Vec<Rule> {
    let mut rules = vec![rule(vec![Match::Oif("lo".to_owned())], Action::Accept)];
    rules.extend(desired.tunnel.iter().flat_map(|tunnel| into_tunnel(desired, tunnel, refuse)));
    rules.push(rule(vec![Match::Mark], Action::Accept));
    // The IP layer sends no ARP.
    rules.extend(guarded(desired).filter(|rule| rule.family() == Some(Family::V6)));
    rules.extend(allowed(desired));
    let services = devices.inner.iter().flat_map(|name| services(name));
    rules.extend(services.map(|matches| rule(matches, accept(desired))));
    rules
}

/// Accepts what is not the daemon's own, and tells the lock if there is one.
fn accept(desired: &Desired) -> Action {
    if desired.locked == Locked::No { Action::Accept } else { Action::Pass }
}

/// What may leave without our mark.
fn allowed(desired: &Desired) -> Vec<Rule> {
    let mut matches: Vec<Vec<Match>> = desired.exceptions.users.iter().map(|user| vec![Match::User(*user)]).collect();
    matches.extend(desired.exceptions.lan.iter().map(|net| vec![Match::Destination(net.trunc())]));
    matches.extend(resolvers(desired, &[Protocol::Udp, Protocol::Tcp], Match::Destination, Match::DestinationPort));
    matches.push(dhcp(Family::V4, 68, 67));
    matches.push(dhcp(Family::V6, 546, 547));
    // What a router passed on has another hop limit; nobody takes such (RFC 4861 section 7.1).
    matches.extend(NEIGHBOUR_DISCOVERY.map(|kind| vec![Match::Icmp6Type(kind), Match::HopLimit(255)]));
    matches.into_iter().map(|matches| rule(matches, accept(desired))).collect()
}

/// What this machine's own services send to containers and virtual machines on it: addresses, names, and that something
/// can't be reached. TCP has a connection mark.
fn services(device: &str) -> impl Iterator<Item = Vec<Match>> {
    let out = Match::Oif(device.to_owned());
    let mut matches =
        vec![dhcp(Family::V4, 67, 68), dhcp(Family::V6, 547, 546), vec![Match::SourcePort(Protocol::Udp, 53)]];
    matches.push(vec![Match::IcmpType(UNREACHABLE)]);
    matches.extend(INNER_ICMP6.map(|kind| vec![Match::Icmp6Type(kind)]));
    matches.into_iter().map(move |matches| [matches, vec![out.clone()]].concat())
}

/// DHCP (RFC 2131) and DHCPv6 (RFC 8415), in one direction.
fn dhcp(family: Family, from: u16, to: u16) -> Vec<Match> {
    vec![Match::Family(family), Match::SourcePort(Protocol::Udp, from), Match::DestinationPort(Protocol::Udp, to)]
}

/// Packets to or from port 53 of each resolver.
fn resolvers(
    desired: &Desired,
    protocols: &[Protocol],
    address: fn(IpNet) -> Match,
    port: fn(Protocol, u16) -> Match,
) -> impl Iterator<Item = Vec<Match>> {
    let addresses = desired.exceptions.resolvers.iter().map(|resolver| IpNet::from(resolver.to_canonical()));
    addresses.flat_map(move |net| protocols.iter().map(move |protocol| vec![address(net), port(*protocol, 53)]))
}

/// Loopback and the tunnel.
fn own_devices(desired: &Desired) -> impl Iterator<Item = String> {
    ["lo".to_owned()].into_iter().chain(desired.tunnel.iter().map(|tunnel| tunnel.name.clone()))
}

/// Sockets that serve both versions report IPv4 peers as `::ffff:a.b.c.d`; on the wire it is IPv4.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

pub(super) fn rule(matches: Vec<Match>, action: Action) -> Rule {
    Rule { matches, action }
}

pub(super) fn chain(
    name: impl Into<String>,
    kind: Kind,
    hook: Hook,
    priority: i32,
    policy: Policy,
    rules: Vec<Rule>,
) -> Chain {
    Chain { name: name.into(), kind, hook, priority, policy, rules }
}

#[cfg(test)]
#[path = "compile_tests.rs"]
pub(super) mod tests;
