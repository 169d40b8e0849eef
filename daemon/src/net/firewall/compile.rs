//! From the desired state to rules, without side effects.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::rules::{Action, Chain, Family, Hook, Kind, Match, Policy, Protocol, Rule, Ruleset, Timeout};
use crate::net::desired::{Desired, Locked, MARK};

/// How many older inbound sessions get a rule; more are not kept.
pub const MAX_SESSIONS: usize = 1024;
/// Mark of TCP connections of bypassing users. Not [`MARK`], which connections from outside carry.
pub const BYPASS_CT_MARK: u32 = MARK + 1;

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

/// Compiles the desired state to rules. `sessions`: TCP connections from outside, as (local, remote), that were open
/// before: they are kept, up to [`MAX_SESSIONS`].
pub fn compile(desired: &Desired, sessions: &[(SocketAddr, SocketAddr)]) -> Ruleset {
    let mut chains = vec![
        chain("prerouting", Kind::Filter, Hook::Prerouting, PRIORITY_MANGLE, Policy::Accept, prerouting(desired)),
        chain("input", Kind::Filter, Hook::Input, PRIORITY_FILTER, Policy::Accept, input(desired)),
        chain("output", Kind::Route, Hook::Output, PRIORITY_MANGLE, Policy::Accept, output(desired, sessions)),
    ];
    if desired.killswitch {
        let count = vec![rule(vec![], Action::Count)];
        chains.extend([
            chain("forward", Kind::Filter, Hook::Forward, PRIORITY_FILTER, Policy::Drop, count),
            chain("filter_output", Kind::Filter, Hook::Output, PRIORITY_FILTER, Policy::Accept, filter_output(desired)),
            chain("postrouting", Kind::Filter, Hook::Postrouting, PRIORITY_LAST, Policy::Drop, postrouting(desired)),
        ]);
    }
    Ruleset::new(Some(TIMEOUT), chains)
}

/// Marks what comes from outside for this machine itself; never what is forwarded.
fn prerouting(desired: &Desired) -> Vec<Rule> {
    let mut rules: Vec<Rule> = own_devices(desired).map(|name| rule(vec![Match::Iif(name)], Action::Accept)).collect();
    if desired.inbound_replies {
        // TCP with a SYN only: with UDP, or a connection picked up in its middle, the far end of an older connection of
        // ours could speak first and look like the one who began.
        rules.push(rule(vec![Match::Syn, Match::CtNew, Match::CtMark(0)], Action::SetCtMark(MARK)));
    }
    // Strict reverse-path filtering (rp_filter=1) looks up the way back with this mark.
    rules.push(rule(vec![Match::ToLocal], Action::SetMark));
    rules
}

/// The tunnel's address answers on the tunnel only (CVE-2019-14899).
fn input(desired: &Desired) -> Vec<Rule> {
    let Some(tunnel) = &desired.tunnel else { return vec![] };
    own_devices(desired)
        .map(|name| rule(vec![Match::Iif(name)], Action::Accept))
        .chain(
            [IpAddr::V4(tunnel.v4.addr()), IpAddr::V6(tunnel.v6.addr())]
                .map(|address| rule(vec![Match::Destination(IpNet::from(address))], Action::Drop)),
        )
        .collect()
}

/// Marks what may leave although its socket carries no mark: this chain then sends it by the main table.
fn output(desired: &Desired, sessions: &[(SocketAddr, SocketAddr)]) -> Vec<Rule> {
    // First: below, connections get the mark that are neither the daemon's nor in the tunnel.
    let tunnelled = desired.tunnel.iter().map(|tunnel| Match::Oif(tunnel.name.clone()));
    let mut rules: Vec<Rule> = tunnelled
        .chain([Match::Mark])
        .map(|which| rule(vec![Match::Protocol(Protocol::Tcp), Match::CtNew, which], Action::SetTimeout(TIMEOUT.name)))
        .collect();
    if desired.inbound_replies {
        rules.push(rule(vec![Match::CtReply, Match::CtMark(MARK)], Action::SetMark));
        rules.extend(
            sessions
                .iter()
                .map(|(local, remote)| (canonical(*local), canonical(*remote)))
                .filter(|(local, remote)| local.is_ipv4() == remote.is_ipv4())
                .take(MAX_SESSIONS)
                .map(|(local, remote)| rule(Match::segments(local, remote), Action::SetMark)),
        );
    }
    // A closed socket has no user any more while its last data still leaves, so the connection is marked too. A SYN has
    // a live socket: without NotSyn another user could take over the addresses and ports.
    for user in &desired.exceptions.users {
        let matches = vec![Match::Protocol(Protocol::Tcp), Match::User(*user), Match::CtMark(0)];
        rules.push(rule(matches, Action::SetCtMark(BYPASS_CT_MARK)));
    }
    if !desired.exceptions.users.is_empty() {
        rules.push(rule(vec![Match::NotSyn, Match::CtMark(BYPASS_CT_MARK)], Action::SetMark));
    }
    rules
}

/// Refuses at once, so that programs fail fast. The device that is seen here can be stale; `postrouting` decides.
fn filter_output(desired: &Desired) -> Vec<Rule> {
    let mut rules = allowed(desired);
    rules.push(rule(vec![Match::Protocol(Protocol::Tcp)], Action::RejectReset));
    rules.push(rule(vec![Match::Protocol(Protocol::Udp)], Action::RejectPort));
    rules.push(rule(vec![], Action::RejectProhibited));
    rules
}

/// Drops by the final device whatever is not allowed, also what was forwarded.
fn postrouting(desired: &Desired) -> Vec<Rule> {
    // The daemon's own connections into its own tunnel would come back to it, without an end.
    let tunnel = desired.tunnel.iter().map(|tunnel| vec![Match::Oif(tunnel.name.clone()), Match::Mark]);
    let mut rules: Vec<Rule> = tunnel.map(|matches| rule(matches, Action::Drop)).collect();
    rules.extend(allowed(desired));
    rules.push(rule(vec![], Action::Count));
    rules
}

/// What may leave. To the lock the daemon's own says itself what it is.
pub(super) fn allowed(desired: &Desired) -> Vec<Rule> {
    let own = |m: &Match| matches!(m, Match::Mark) || matches!(m, Match::Oif(name) if name == "lo");
    let pass = |matches: &[Match]| desired.locked != Locked::No && !matches.iter().any(own);
    let mut matches: Vec<Vec<Match>> = own_devices(desired).map(|name| vec![Match::Oif(name)]).collect();
    matches.push(vec![Match::Mark]);
    matches.extend(desired.exceptions.users.iter().map(|user| vec![Match::User(*user)]));
    matches.extend(desired.exceptions.lan.iter().map(|net| vec![Match::Destination(net.trunc())]));
    for resolver in &desired.exceptions.resolvers {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let to = Match::Destination(IpNet::from(resolver.to_canonical()));
            matches.push(vec![to, Match::DestinationPort(protocol, 53)]);
        }
    }
    // DHCP (RFC 2131) and DHCPv6 (RFC 8415).
    for (family, from, to) in [(Family::V4, 68, 67), (Family::V6, 546, 547)] {
        matches.push(vec![
            Match::Family(family),
            Match::SourcePort(Protocol::Udp, from),
            Match::DestinationPort(Protocol::Udp, to),
        ]);
    }
    matches.extend(NEIGHBOUR_DISCOVERY.map(|kind| vec![Match::Icmp6Type(kind)]));
    let accept =
        |matches: Vec<Match>| if pass(&matches) { rule(matches, Action::Pass) } else { rule(matches, Action::Accept) };
    matches.into_iter().map(accept).collect()
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
    name: &'static str,
    kind: Kind,
    hook: Hook,
    priority: i32,
    policy: Policy,
    rules: Vec<Rule>,
) -> Chain {
    Chain { name, kind, hook, priority, policy, rules }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::net::desired::{Exceptions, Tunnel};

    /// A state with everything in it.
    pub(in super::super) fn desired() -> Desired {
        let v4 = ipnet::Ipv4Net::new_assert([10, 255, 255, 1].into(), 30);
        let v6 = ipnet::Ipv6Net::new_assert([0xfd70, 0x7670, 0x6e, 0, 0, 0, 0, 1].into(), 64);
        Desired {
            tunnel: Some(Tunnel { name: "pvpn0".to_owned(), v4, v6, mtu: 1500 }),
            exceptions: Exceptions {
                lan: vec![IpNet::new_assert([192, 168, 7, 9].into(), 24), IpNet::new_assert(v6.addr().into(), 64)],
                resolvers: vec![[9, 9, 9, 9].into()],
                users: vec![13],
            },
            killswitch: true,
            inbound_replies: true,
            locked: Locked::No,
        }
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
prerouting tcp flags & (fin|syn|rst|ack) == syn ct state new ct mark 0x00000000 ct mark set 0x7076706e
prerouting fib daddr type local meta mark set 0x7076706e
input { type filter hook input priority filter; policy accept; }
input iifname "lo" accept
input iifname "pvpn0" accept
input ip daddr 10.255.255.1 drop
input ip6 daddr fd70:7670:6e::1 drop
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
forward counter
filter_output { type filter hook output priority filter; policy accept; }
ALLOWED filter_output
filter_output meta l4proto tcp reject with tcp reset
filter_output meta l4proto udp reject with icmpx port-unreachable
filter_output reject with icmpx admin-prohibited
postrouting { type filter hook postrouting priority 300; policy drop; }
postrouting oifname "pvpn0" meta mark 0x7076706e drop
ALLOWED postrouting
postrouting counter
"#;
        let allowed = r#"CHAIN oifname "lo" accept
CHAIN oifname "pvpn0" accept
CHAIN meta mark 0x7076706e accept
CHAIN meta skuid 13 accept
CHAIN ip daddr 192.168.7.0/24 accept
CHAIN ip6 daddr fd70:7670:6e::/64 accept
CHAIN ip daddr 9.9.9.9 udp dport 53 accept
CHAIN ip daddr 9.9.9.9 tcp dport 53 accept
CHAIN meta nfproto ipv4 udp sport 68 udp dport 67 accept
CHAIN meta nfproto ipv6 udp sport 546 udp dport 547 accept
CHAIN icmpv6 type nd-router-solicit accept
CHAIN icmpv6 type nd-neighbor-solicit accept
CHAIN icmpv6 type nd-neighbor-advert accept"#;
        let want = ["filter_output", "postrouting"].iter().fold(want.trim().to_owned(), |text, chain| {
            text.replace(&format!("ALLOWED {chain}"), &allowed.replace("CHAIN", chain))
        });
        let want: Vec<String> = want.lines().map(|line| format!("inet proxyvpn {line}")).collect();
        assert_eq!(compile(&desired(), &sessions).lines(), want);
    }

    #[test]
    fn each_switch_takes_its_rules_away() {
        let chains = |desired: &Desired| -> Vec<&str> { compile(desired, &[]).chains.iter().map(|c| c.name).collect() };
        let has = |desired: &Desired, text: &str| compile(desired, &[]).lines().iter().any(|l| l.contains(text));
        let base = desired();
        let off = Desired { killswitch: false, ..base.clone() };
        assert_eq!(chains(&off), ["prerouting", "input", "output"]);
        let blocked = Desired { tunnel: None, ..base.clone() };
        assert_eq!(chains(&blocked), ["prerouting", "output", "forward", "filter_output", "postrouting"]);
        assert!(has(&base, "pvpn0") && !has(&blocked, "pvpn0"));
        let silent = Desired { inbound_replies: false, ..base.clone() };
        assert!(has(&base, "ct direction reply") && !has(&silent, "ct direction reply"));
        assert!(has(&base, "prerouting tcp flags") && !has(&silent, "prerouting tcp flags"));
        assert!(has(&silent, "fib daddr type local"));
        let least = Desired {
            tunnel: None,
            exceptions: Exceptions::default(),
            killswitch: false,
            inbound_replies: false,
            ..base.clone()
        };
        assert_eq!(chains(&least), ["prerouting", "output"]);
        assert!(has(&least, "meta mark 0x7076706e ct timeout set"));
    }

    #[test]
    fn without_timeouts_nothing_else_changes() {
        for desired in [desired(), Desired { killswitch: false, ..desired() }] {
            let (with, without) = (compile(&desired, &[]), compile(&desired, &[]).without_timeout());
            let rest: Vec<_> = with.lines().into_iter().filter(|line| !line.contains("ct timeout")).collect();
            assert_eq!(with.lines().len() - rest.len(), 3);
            assert_eq!(without.lines(), rest);
        }
        let least = Desired {
            tunnel: None,
            exceptions: Exceptions::default(),
            killswitch: false,
            inbound_replies: false,
            ..desired()
        };
        let names: Vec<_> = compile(&least, &[]).without_timeout().chains.iter().map(|chain| chain.name).collect();
        assert_eq!(names, ["prerouting"]);
    }

    #[test]
    fn nothing_passes_because_it_is_established() {
        let lines = compile(&desired(), &[]).lines().join("\n");
        assert!(!lines.contains("established") && !lines.contains("related"), "{lines}");
    }

    #[test]
    fn sessions_are_bounded() {
        let many: Vec<_> = (0..u16::MAX).map(|p| session("192.0.2.1:22", &format!("192.0.2.2:{p}"))).collect();
        let rules = |sessions: &[_]| compile(&desired(), sessions).lines().len();
        assert_eq!(rules(&many) - rules(&[]), MAX_SESSIONS);
    }

    #[test]
    fn names_that_are_syntax_are_refused() {
        for name in ["", "pvpn*", "pvpn+", "a\" accept; #", "-j", "a b", "0123456789abcdef", "tün"] {
            let mut desired = desired();
            desired.tunnel.iter_mut().for_each(|t| t.name = name.to_owned());
            assert!(compile(&desired, &[]).check().is_err(), "{name:?}");
        }
        assert!(compile(&desired(), &[]).check().is_ok());
    }
}
