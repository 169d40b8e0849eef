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
pub(super) mod tests {
    use super::*;
    use crate::net::desired::{Control, Exceptions, Gateway};

    /// A state with everything in it.
    pub(in super::super) fn desired() -> Desired {
        let v4 = ipnet::Ipv4Net::new_assert([10, 255, 255, 1].into(), 30);
        let v6 = ipnet::Ipv6Net::new_assert([0xfd70, 0x7670, 0x6e, 0, 0, 0, 0, 1].into(), 64);
        Desired {
            tunnel: Some(Tunnel { name: "pvpn0".to_owned(), v4, v6: Some(v6), mtu: 1500, gateway: None }),
            guarded: vec![v4.addr().into(), v6.addr().into()],
            exceptions: Exceptions {
                lan: vec![IpNet::new_assert([192, 168, 7, 9].into(), 24), IpNet::new_assert(v6.addr().into(), 64)],
                resolvers: vec![[9, 9, 9, 9].into()],
                users: vec![13],
                services: vec![],
            },
            steer_dns: false,
            killswitch: true,
            inbound_replies: true,
            locked: Locked::No,
            forward: Forward::Block,
            iptables_fallback: false,
        }
    }

    /// A state with nothing in it.
    fn least() -> Desired {
        let exceptions = Exceptions::default();
        Desired { tunnel: None, guarded: vec![], exceptions, killswitch: false, inbound_replies: false, ..desired() }
    }

    /// The same with a router behind the device.
    fn routed() -> Desired {
        let v4 = ipnet::Ipv4Net::new_assert([10, 10, 10, 2].into(), 30);
        let control = Control { port: 9051, user: 990 };
        let gateway = Gateway { address: [10, 10, 10, 1].into(), mac: [2; 6], own_mac: [4; 6], control };
        let tunnel = Tunnel { name: "tap0".to_owned(), v4, v6: None, mtu: 1500, gateway: Some(gateway) };
        let exceptions = Exceptions { services: vec![([127, 0, 0, 1], 3128).into()], ..Exceptions::default() };
        Desired { tunnel: Some(tunnel), guarded: vec![v4.addr().into()], exceptions, steer_dns: true, ..desired() }
    }

    /// An uplink, and a bridge to containers.
    pub(in super::super) fn devices() -> Devices {
        Devices { uplinks: vec!["eth0".to_owned()], inner: vec!["docker0".to_owned()], routed: vec![] }
    }

    fn session(local: &str, remote: &str) -> (SocketAddr, SocketAddr) {
        #[allow(clippy::unwrap_used, reason = "a test fails by a panic")]
        (local.parse().unwrap(), remote.parse().unwrap())
    }

    #[test]
    fn a_full_state_gives_these_rules() {
        let sessions = [
            session("192.0.2.1:22", "198.51.100.7:40000"),
            session("[::ffff:192.0.2.1]:22", "[::ffff:198.51.100.8]:40001"),
            session("[2001:db8::1]:22", "[2001:db8::2]:40002"),
            session("192.0.2.1:22", "[2001:db8::2]:40003"),
        ];
        let want = r#"
ct timeout tunnelled { protocol tcp; l3proto inet; policy = { time_wait : 10 }; }
prerouting { type filter hook prerouting priority mangle; policy accept; }
prerouting iifname "lo" accept
prerouting iifname "pvpn0" accept
prerouting tcp flags & (fin|syn|rst|ack) == syn ct state new ct mark 0x00000000 fib daddr type local ct mark set 0x7076706e
prerouting fib daddr type local meta mark set 0x7076706e
input { type filter hook input priority filter; policy accept; }
input iifname "lo" accept
input iifname "pvpn0" accept
input ip daddr 10.255.255.1 counter drop
input ip6 daddr fd70:7670:6e::1 counter drop
output { type route hook output priority mangle; policy accept; }
output meta l4proto tcp ct state new oifname "pvpn0" ct timeout set "tunnelled"
output meta l4proto tcp ct state new meta mark 0x7076706e ct timeout set "tunnelled"
output ct direction reply ct mark 0x7076706e meta mark set 0x7076706e
output ip saddr 192.0.2.1 ip daddr 198.51.100.7 tcp sport 22 tcp dport 40000 tcp flags & (fin|syn|rst|ack) != syn meta mark set 0x7076706e
output ip saddr 192.0.2.1 ip daddr 198.51.100.8 tcp sport 22 tcp dport 40001 tcp flags & (fin|syn|rst|ack) != syn meta mark set 0x7076706e
output ip6 saddr 2001:db8::1 ip6 daddr 2001:db8::2 tcp sport 22 tcp dport 40002 tcp flags & (fin|syn|rst|ack) != syn meta mark set 0x7076706e
output meta l4proto tcp meta skuid 13 ct mark 0x00000000 ct mark set 0x7076706f
output tcp flags & (fin|syn|rst|ack) != syn ct mark 0x7076706f meta mark set 0x7076706e
forward { type filter hook forward priority filter; policy drop; }
forward iifname "docker0" oifname "docker0" meta mark set 0x7076706e
forward iifname "docker0" oifname "docker0" accept
forward counter drop
filter_output { type filter hook output priority filter; policy accept; }
ALLOWED filter_output
SERVICES filter_output
filter_output meta l4proto tcp reject with tcp reset
filter_output meta l4proto udp reject with icmpx port-unreachable
filter_output reject with icmpx admin-prohibited
postrouting { type filter hook postrouting priority 300; policy drop; }
postrouting oifname "pvpn0" meta mark 0x7076706e counter drop
ALLOWED postrouting
SERVICES postrouting
postrouting counter drop
netdev egress_eth0 { type filter hook egress device "eth0" priority filter; policy drop; }
netdev egress_eth0 meta mark 0x7076706e accept
netdev egress_eth0 arp saddr ip 10.255.255.1 counter drop
netdev egress_eth0 icmpv6 type nd-neighbor-advert @th,64,128 0xfd707670006e00000000000000000001 counter drop
netdev egress_eth0 meta protocol arp accept
netdev egress_eth0 meta protocol 0x888e accept
netdev egress_eth0 meta protocol 0x8809 accept
netdev egress_eth0 meta protocol 0x0004 accept
netdev egress_eth0 meta protocol 0x8863 accept
netdev egress_eth0 meta protocol 0x8864 accept
netdev egress_eth0 meta skuid 13 accept
netdev egress_eth0 ip daddr 192.168.7.0/24 accept
netdev egress_eth0 ip6 daddr fd70:7670:6e::/64 accept
netdev egress_eth0 ip daddr 9.9.9.9 udp dport 53 accept
netdev egress_eth0 ip daddr 9.9.9.9 tcp dport 53 accept
netdev egress_eth0 meta protocol ip udp sport 68 udp dport 67 accept
netdev egress_eth0 meta protocol ip6 udp sport 546 udp dport 547 accept
netdev egress_eth0 icmpv6 type nd-router-solicit ip6 hoplimit 255 accept
netdev egress_eth0 icmpv6 type nd-neighbor-solicit ip6 hoplimit 255 accept
netdev egress_eth0 icmpv6 type nd-neighbor-advert ip6 hoplimit 255 accept
netdev egress_eth0 counter drop
"#;
        let allowed = r#"CHAIN oifname "lo" accept
CHAIN oifname "pvpn0" accept
CHAIN meta mark 0x7076706e accept
CHAIN icmpv6 type nd-neighbor-advert @th,64,128 0xfd707670006e00000000000000000001 counter drop
CHAIN meta skuid 13 accept
CHAIN ip daddr 192.168.7.0/24 accept
CHAIN ip6 daddr fd70:7670:6e::/64 accept
CHAIN ip daddr 9.9.9.9 udp dport 53 accept
CHAIN ip daddr 9.9.9.9 tcp dport 53 accept
CHAIN meta nfproto ipv4 udp sport 68 udp dport 67 accept
CHAIN meta nfproto ipv6 udp sport 546 udp dport 547 accept
CHAIN icmpv6 type nd-router-solicit ip6 hoplimit 255 accept
CHAIN icmpv6 type nd-neighbor-solicit ip6 hoplimit 255 accept
CHAIN icmpv6 type nd-neighbor-advert ip6 hoplimit 255 accept"#;
        let services = r#"CHAIN meta nfproto ipv4 udp sport 67 udp dport 68 oifname "docker0" accept
CHAIN meta nfproto ipv6 udp sport 547 udp dport 546 oifname "docker0" accept
CHAIN udp sport 53 oifname "docker0" accept
CHAIN icmp type destination-unreachable oifname "docker0" accept
CHAIN icmpv6 type destination-unreachable oifname "docker0" accept
CHAIN icmpv6 type packet-too-big oifname "docker0" accept
CHAIN icmpv6 type nd-router-advert oifname "docker0" accept"#;
        let want = ["filter_output", "postrouting"].iter().fold(want.trim().to_owned(), |text, chain| {
            text.replace(&format!("ALLOWED {chain}"), &allowed.replace("CHAIN", chain))
                .replace(&format!("SERVICES {chain}"), &services.replace("CHAIN", chain))
        });
        let full = |line: &str| match line.strip_prefix("netdev ") {
            Some(line) => format!("netdev proxyvpn {line}"),
            None => format!("inet proxyvpn {line}"),
        };
        let want: Vec<String> = want.lines().map(full).collect();
        assert_eq!(compile(&desired(), &sessions, &devices()).lines(), want);
    }

    /// The rules of these chains that name the device, loopback or the gateway.
    fn about_the_gateway(desired: &Desired, devices: &Devices) -> String {
        let lines = compile(desired, &[], devices).lines();
        let about = |line: &&String| ["\"tap0\"", "\"lo\"", "10.10.10.1"].iter().any(|text| line.contains(text));
        lines.iter().filter(about).map(|line| line.replace("inet proxyvpn ", "") + "\n").collect()
    }

    #[test]
    fn a_router_behind_the_device_gets_what_it_takes_and_begins_nothing() {
        let prerouting = r#"
prerouting meta l4proto tcp iifname "tap0" ct direction reply accept
prerouting udp sport 53 iifname "tap0" ct direction reply accept
prerouting icmp type destination-unreachable iifname "tap0" ct direction reply accept
prerouting iifname "tap0" counter drop
prerouting ip daddr 10.10.10.1 tcp dport 9051 counter drop
prerouting iifname "lo" accept
prerouting iifname "tap0" accept
"#
        .trim_start();
        let input = "input iifname \"lo\" accept\ninput iifname \"tap0\" accept\n";
        let output = r#"
output meta l4proto tcp ct state new oifname "tap0" ct timeout set "tunnelled"
output ip daddr 127.0.0.1 tcp dport 3128 oifname "lo" meta mark 0x7076706e accept
output oifname "lo" meta mark 0x7076706e counter drop
output ip daddr 10.10.10.1 oifname "tap0" accept
"#
        .trim_start();
        let into = r#"
filter_output ip daddr 10.10.10.1 tcp dport 9051 oifname "tap0" tcp flags & (fin|syn|rst|ack) == syn ip saddr 10.10.10.2 meta skuid 990 accept
filter_output ip daddr 10.10.10.1 tcp dport 9051 oifname "tap0" tcp flags & (fin|syn|rst|ack) == syn reject with tcp reset
filter_output meta l4proto tcp oifname "tap0" ip saddr 10.10.10.2 accept
filter_output udp dport 53 oifname "tap0" ip saddr 10.10.10.2 accept
filter_output meta l4proto tcp oifname "tap0" reject with tcp reset
filter_output meta l4proto udp oifname "tap0" reject with icmpx port-unreachable
filter_output oifname "tap0" reject with icmpx admin-prohibited
"#
        .trim_start();
        let last = r#"
postrouting oifname "tap0" meta mark 0x7076706e counter drop
postrouting oifname "lo" accept
postrouting ip daddr 10.10.10.1 tcp dport 9051 oifname "tap0" tcp flags & (fin|syn|rst|ack) == syn ip saddr 10.10.10.2 meta skuid 990 accept
postrouting ip daddr 10.10.10.1 tcp dport 9051 oifname "tap0" tcp flags & (fin|syn|rst|ack) == syn counter drop
postrouting meta l4proto tcp oifname "tap0" ip saddr 10.10.10.2 accept
postrouting udp dport 53 oifname "tap0" ip saddr 10.10.10.2 accept
postrouting oifname "tap0" counter drop
"#
        .trim_start();
        let want = format!("{prerouting}{input}{output}filter_output oifname \"lo\" accept\n{into}{last}");
        assert_eq!(about_the_gateway(&routed(), &devices()), want);
        // Without the kill switch what leaves elsewhere is not looked at, but all of this is.
        let off = Desired { killswitch: false, ..routed() };
        assert_eq!(
            about_the_gateway(&off, &devices()),
            format!("{prerouting}{input}{output}{into}{}\n", last.lines().next().unwrap_or_default())
        );
        // Under a lock what goes into it says so.
        let locked = about_the_gateway(&Desired { locked: Locked::Yes, ..routed() }, &devices());
        assert!(
            locked.contains(
                "postrouting udp dport 53 oifname \"tap0\" ip saddr 10.10.10.2 meta mark set 0x70767071 accept"
            )
        );
    }

    #[test]
    fn a_router_behind_a_device_begins_nothing_while_all_is_blocked() {
        let devices = Devices { routed: vec!["tap0".to_owned()], ..devices() };
        for killswitch in [true, false] {
            let blocked = about_the_gateway(&Desired { tunnel: None, killswitch, ..routed() }, &devices);
            let dropped = "prerouting iifname \"tap0\" counter drop\nprerouting iifname \"lo\" accept\n";
            assert!(
                blocked.contains(dropped)
                    && blocked.contains("output oifname \"lo\" meta mark 0x7076706e counter drop"),
                "{blocked}"
            );
        }
        // The tunnel itself is named once.
        let lines = about_the_gateway(&routed(), &devices);
        assert_eq!(lines.matches("prerouting iifname \"tap0\" counter drop").count(), 1);
    }

    #[test]
    fn what_is_forwarded_into_a_router_is_tcp_and_dns() {
        let lines = |desired: &Desired| compile(desired, &[], &devices()).lines();
        let tunnel = Desired { forward: Forward::Tunnel, ..routed() };
        let only: Vec<_> = lines(&tunnel).into_iter().filter(|line| !lines(&routed()).contains(line)).collect();
        let want = r#"
forward meta l4proto tcp oifname "tap0" ct state new ct timeout set "tunnelled"
forward meta l4proto tcp oifname "tap0" accept
forward meta l4proto tcp iifname "tap0" ct direction reply meta mark set 0x7076706e
forward meta l4proto tcp iifname "tap0" ct direction reply accept
forward udp dport 53 oifname "tap0" accept
forward udp sport 53 iifname "tap0" ct direction reply meta mark set 0x7076706e
forward udp sport 53 iifname "tap0" ct direction reply accept
forward icmp type destination-unreachable iifname "tap0" ct direction reply meta mark set 0x7076706e
forward icmp type destination-unreachable iifname "tap0" ct direction reply accept
forward meta l4proto udp reject with icmpx port-unreachable
forward reject with icmpx admin-prohibited"#;
        let want: Vec<_> = want.trim().lines().map(|line| format!("inet proxyvpn {line}")).collect();
        assert_eq!(only, want);
    }

    #[test]
    fn each_switch_takes_its_rules_away() {
        let chains = |desired: &Desired| -> Vec<String> {
            compile(desired, &[], &devices()).chains.into_iter().map(|chain| chain.name).collect()
        };
        let has =
            |desired: &Desired, text: &str| compile(desired, &[], &devices()).lines().iter().any(|l| l.contains(text));
        let base = desired();
        let off = Desired { killswitch: false, ..base.clone() };
        assert_eq!(chains(&off), ["prerouting", "input", "output", "egress_eth0"]);
        let blocked = Desired { tunnel: None, ..base.clone() };
        assert_eq!(
            chains(&blocked),
            ["prerouting", "input", "output", "forward", "filter_output", "postrouting", "egress_eth0"]
        );
        assert!(has(&base, "pvpn0") && !has(&blocked, "pvpn0"));
        let silent = Desired { inbound_replies: false, ..base.clone() };
        assert!(has(&base, "ct mark 0x7076706e meta mark") && !has(&silent, "ct mark 0x7076706e meta mark"));
        assert!(has(&base, "local ct mark set 0x7076706e") && !has(&silent, "local ct mark set 0x7076706e"));
        assert!(has(&silent, "fib daddr type local"));
        // Containers get their answers all the same.
        assert!(
            has(&silent, "iifname \"docker0\" ct mark set 0x70767070")
                && has(&silent, "ct mark 0x70767070 meta mark set")
        );
        let least = least();
        assert_eq!(chains(&least), ["prerouting", "output"]);
        assert!(has(&least, "meta mark 0x7076706e ct timeout set"));
    }

    #[test]
    fn forwarded_traffic_goes_into_the_tunnel_or_nowhere() {
        let tunnel = Desired { forward: Forward::Tunnel, ..desired() };
        let lines = |desired: &Desired| compile(desired, &[], &devices()).lines();
        let only: Vec<_> = lines(&tunnel).into_iter().filter(|line| !lines(&desired()).contains(line)).collect();
        let want = r#"
prerouting ip daddr 9.9.9.9 tcp dport 53 meta mark set 0x7076706e
prerouting ip saddr 9.9.9.9 tcp sport 53 ct direction reply meta mark set 0x7076706e
forward meta l4proto tcp oifname "pvpn0" ct state new ct timeout set "tunnelled"
forward meta l4proto tcp oifname "pvpn0" accept
forward meta l4proto tcp iifname "pvpn0" ct direction reply meta mark set 0x7076706e
forward meta l4proto tcp iifname "pvpn0" ct direction reply accept
forward ip daddr 9.9.9.9 udp dport 53 accept
forward ip daddr 9.9.9.9 tcp dport 53 accept
forward ip saddr 9.9.9.9 udp sport 53 ct direction reply meta mark set 0x7076706e
forward ip saddr 9.9.9.9 udp sport 53 ct direction reply accept
forward ip saddr 9.9.9.9 tcp sport 53 ct direction reply meta mark set 0x7076706e
forward ip saddr 9.9.9.9 tcp sport 53 ct direction reply accept
forward meta l4proto udp reject with icmpx port-unreachable
forward reject with icmpx admin-prohibited"#;
        let want: Vec<_> = want.trim().lines().map(|line| format!("inet proxyvpn {line}")).collect();
        assert_eq!(only, want);
        // Without a tunnel TCP has no route.
        let blocked = lines(&Desired { tunnel: None, ..tunnel });
        assert!(
            !blocked
                .iter()
                .any(|line| line.contains("forward meta l4proto tcp oifname") || line.contains("prerouting ip"))
        );
        // Without the kill switch it is steered as well, so what comes back has to find its way.
        let off = lines(&Desired { killswitch: false, ..desired() });
        assert!(
            off.iter().any(|line| line.contains("prerouting ip daddr"))
                && !off.iter().any(|line| line.contains(" forward "))
        );
    }

    #[test]
    fn without_timeouts_nothing_else_changes() {
        for desired in [desired(), Desired { killswitch: false, ..desired() }] {
            let (with, without) =
                (compile(&desired, &[], &devices()), compile(&desired, &[], &devices()).without_timeout());
            let rest: Vec<_> = with.lines().into_iter().filter(|line| !line.contains("ct timeout")).collect();
            assert_eq!(with.lines().len() - rest.len(), 3);
            assert_eq!(without.lines(), rest);
        }
        let least = least();
        let names: Vec<_> = compile(&least, &[], &Devices::default())
            .without_timeout()
            .chains
            .into_iter()
            .map(|chain| chain.name)
            .collect();
        assert_eq!(names, ["prerouting"]);
    }

    #[test]
    fn a_chain_whose_policy_is_drop_ends_with_a_rule_that_does() {
        for desired in
            [desired(), Desired { forward: Forward::Tunnel, ..desired() }, Desired { tunnel: None, ..desired() }]
        {
            let rules = [compile(&desired, &[], &devices()), super::super::lock::lock(&[])];
            for chain in rules.iter().flat_map(|rules| &rules.chains).filter(|chain| chain.policy == Policy::Drop) {
                let last = chain.rules.last().filter(|rule| rule.matches.is_empty()).map(|rule| rule.action);
                assert!(matches!(last, Some(Action::Drop | Action::RejectProhibited)), "{}: {last:?}", chain.name);
            }
        }
    }

    #[test]
    fn nothing_passes_because_it_is_established() {
        let lines = compile(&desired(), &[], &devices()).lines().join("\n");
        assert!(!lines.contains("established") && !lines.contains("related"), "{lines}");
    }

    #[test]
    fn sessions_are_bounded() {
        let many: Vec<_> = (0..u16::MAX).map(|p| session("192.0.2.1:22", &format!("192.0.2.2:{p}"))).collect();
        let rules = |sessions: &[_]| compile(&desired(), sessions, &devices()).lines().len();
        assert_eq!(rules(&many) - rules(&[]), MAX_SESSIONS);
    }

    #[test]
    fn names_that_are_syntax_are_refused() {
        for name in ["", "pvpn*", "pvpn+", "a\" accept; #", "-j", "a b", "0123456789abcdef", "tün"] {
            let mut desired = desired();
            desired.tunnel.iter_mut().for_each(|t| t.name = name.to_owned());
            assert!(compile(&desired, &[], &devices()).check().is_err(), "{name:?}");
        }
        assert!(compile(&desired(), &[], &devices()).check().is_ok());
    }
}
