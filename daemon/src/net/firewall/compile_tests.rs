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
        ..Desired::closed()
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
        locked
            .contains("postrouting udp dport 53 oifname \"tap0\" ip saddr 10.10.10.2 meta mark set 0x70767071 accept")
    );
}

#[test]
fn a_router_behind_a_device_begins_nothing_while_all_is_blocked() {
    let devices = Devices { routed: vec!["tap0".to_owned()], ..devices() };
    for killswitch in [true, false] {
        let blocked = about_the_gateway(&Desired { tunnel: None, killswitch, ..routed() }, &devices);
        let dropped = "prerouting iifname \"tap0\" counter drop\nprerouting iifname \"lo\" accept\n";
        assert!(
            blocked.contains(dropped) && blocked.contains("output oifname \"lo\" meta mark 0x7076706e counter drop"),
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
        has(&silent, "iifname \"docker0\" ct mark set 0x70767070") && has(&silent, "ct mark 0x70767070 meta mark set")
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
        !blocked.iter().any(|line| line.contains("forward meta l4proto tcp oifname") || line.contains("prerouting ip"))
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
    for desired in [desired(), Desired { forward: Forward::Tunnel, ..desired() }, Desired { tunnel: None, ..desired() }]
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
