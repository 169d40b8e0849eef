#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use super::super::desired::{Control, Forward};
use super::super::observed::{Address, Kind};
use super::*;

pub(in crate::net) fn link(index: u32, name: &str, rp_filter: u32, src_valid_mark: u32) -> Link {
    Link {
        index,
        name: name.to_owned(),
        ours: false,
        kind: Kind::Other,
        master: None,
        carries_ip: true,
        loopback: name == "lo",
        up: true,
        carrier: true,
        mtu: 1500,
        queue: 1000,
        multicast: true,
        arp: true,
        mac: Some([2, 0, 0, 0, 0, index.to_le_bytes()[0]]),
        address_generation_off: false,
        source_validation: Some(SourceValidation { rp_filter, src_valid_mark }),
        has_ipv6: true,
        ipv6: true,
        forwarding: false,
    }
}

pub(in crate::net) fn machine() -> Observed {
    Observed {
        links: vec![link(1, "lo", 0, 0), link(2, "eth0", 0, 0)],
        ipv6: true,
        ipv6_for_new: true,
        ..Observed::default()
    }
}

pub(in crate::net) fn desired() -> Desired {
    Desired {
        tunnel: Some(Tunnel {
            name: "pvpn0".to_owned(),
            v4: "10.255.255.1/30".parse().unwrap(),
            v6: Some("fd70:7670:6e::1/64".parse().unwrap()),
            mtu: 65535,
            gateway: None,
        }),
        ..Desired::closed()
    }
}

/// A TAP device with a router behind it.
pub(in crate::net) fn routed() -> Desired {
    let gateway = Gateway {
        address: "10.10.10.1".parse().unwrap(),
        mac: [2, 0, 0, 0, 1, 1],
        own_mac: [2, 0, 0, 0, 1, 2],
        control: Control { port: 9051, user: 990 },
    };
    let (v4, gateway) = ("10.10.10.2/30".parse().unwrap(), Some(gateway));
    let tunnel = Tunnel { name: "tap0".to_owned(), v4, v6: None, mtu: 1500, gateway };
    Desired { tunnel: Some(tunnel), steer_dns: true, ..desired() }
}

fn text(steps: &[Step]) -> String {
    steps.iter().map(|step| step.line() + "\n").collect()
}

/// Does the steps to the observed state, as the kernel would.
fn apply(observed: &mut Observed, steps: &[Step]) {
    for step in steps {
        let add = step.action == Action::Add;
        let index = |o: &Observed, name: &str| o.link(name).unwrap().index;
        match step.change.clone() {
            Change::Device { name, tap } if add => {
                let ipv6 = observed.ipv6_for_new;
                let mac = tap.then_some([2; 6]);
                observed.links.push(Link { ours: true, ipv6, mac, up: false, ..link(9, &name, 0, 0) });
            }
            Change::Device { name, .. } => observed.links.retain(|link| link.name != name),
            Change::Settings(t) => {
                let link = observed.links.iter_mut().find(|link| link.name == t.name).unwrap();
                (link.up, link.mtu, link.queue) = (true, u32::from(t.mtu), super::super::tun::QUEUE);
                (link.address_generation_off, link.multicast) = (true, false);
                if let Some(gateway) = t.gateway {
                    (link.mac, link.arp) = (Some(gateway.own_mac), false);
                    link.source_validation.as_mut().unwrap().rp_filter = LOOSE;
                }
            }
            Change::Neighbour { device, gateway } => {
                let index = index(observed, &device);
                let (address, mac) = (gateway.address, gateway.mac);
                observed.neighbours.retain(|neighbour| neighbour.index != index);
                observed.neighbours.push(Neighbour { index, address, mac });
            }
            Change::Address { device, address } => {
                let index = index(observed, &device);
                observed.addresses.push(Address { index, address });
            }
            Change::Route(route) if add => observed.routes.push(route),
            Change::Route(route) => observed.routes.retain(|r| *r != route),
            Change::Rule(rule) if add => observed.rules.push(rule),
            Change::Rule(rule) => observed.rules.retain(|r| *r != rule),
            Change::SourceMark { device, value } => {
                let link = observed.links.iter_mut().find(|link| link.name == device).unwrap();
                link.source_validation.as_mut().unwrap().src_valid_mark = value;
            }
            Change::Firewall(_) => panic!("the firewall is not planned here"),
        }
    }
}

#[test]
fn from_nothing() {
    let mut desired = desired();
    desired.exceptions.users = vec![13, 13];
    desired.exceptions.lan = vec!["192.168.7.9/16".parse().unwrap(), "fe80::/10".parse().unwrap()];
    desired.exceptions.resolvers = vec!["192.0.2.53".parse().unwrap(), "::ffff:192.0.2.54".parse().unwrap()];
    let expected = "\
link add pvpn0 type tun
link set pvpn0 mtu 65535 txqueuelen 10000 addrgenmode none multicast off up
address add 10.255.255.1/30 dev pvpn0 noprefixroute
address add fd70:7670:6e::1/64 dev pvpn0 noprefixroute
route add unreachable default table 7376750 proto 112 metric 4294967295
route add -6 unreachable default table 7376750 proto 112 metric 4294967295
route add default dev pvpn0 table 7376750 proto 112 metric 1
route add -6 default dev pvpn0 table 7376750 proto 112 metric 1
rule add priority 3700 fwmark 0x7076706e/0xffffffff lookup main protocol 112
rule add priority 3701 uidrange 13-13 lookup main protocol 112
rule add priority 3702 to 192.168.0.0/16 lookup main protocol 112
rule add priority 3703 to 192.0.2.53/32 ipproto udp dport 53 lookup main protocol 112
rule add priority 3703 to 192.0.2.53/32 ipproto tcp dport 53 lookup main protocol 112
rule add priority 3703 to 192.0.2.54/32 ipproto udp dport 53 lookup main protocol 112
rule add priority 3703 to 192.0.2.54/32 ipproto tcp dport 53 lookup main protocol 112
rule add priority 3730 fwmark 0x7076706e/0xffffffff unreachable protocol 112
rule add priority 3731 ipproto tcp lookup 7376750 protocol 112
rule add -6 priority 3700 fwmark 0x7076706e/0xffffffff lookup main protocol 112
rule add -6 priority 3701 uidrange 13-13 lookup main protocol 112
rule add -6 priority 3702 to fe80::/10 lookup main protocol 112
rule add -6 priority 3730 fwmark 0x7076706e/0xffffffff unreachable protocol 112
rule add -6 priority 3731 ipproto tcp lookup 7376750 protocol 112
";
    let mut observed = machine();
    let steps = plan(&observed, &desired);
    assert_eq!(text(&steps), expected);
    apply(&mut observed, &steps);
    assert_eq!(text(&plan(&observed, &desired)), "", "a second plan is empty");
    assert_ne!(plan_removal(&observed), vec![]);
    let steps = plan_removal(&observed);
    apply(&mut observed, &steps);
    assert_eq!(plan_removal(&observed), vec![]);
    assert_eq!((observed.rules.len(), observed.routes.len(), observed.links), (0, 0, machine().links));
}

#[test]
fn from_nothing_to_a_router_behind_the_device() {
    let expected = "\
link add tap0 type tap
link set tap0 mtu 1500 txqueuelen 10000 addrgenmode none multicast off arp off rp_filter 2 address 02:00:00:00:01:02 up
address add 10.10.10.2/30 dev tap0 noprefixroute
link set 10.10.10.1 lladdr 02:00:00:00:01:01 dev tap0 nud permanent
route add unreachable default table 7376750 proto 112 metric 4294967295
route add -6 unreachable default table 7376750 proto 112 metric 4294967295
route add default via 10.10.10.1 dev tap0 onlink table 7376750 proto 112 metric 1
rule add priority 3700 fwmark 0x7076706e/0xffffffff lookup main protocol 112
rule add priority 3700 to 10.10.10.1/32 lookup 7376750 protocol 112
rule add priority 3702 ipproto udp dport 53 lookup 7376750 protocol 112
rule add priority 3702 ipproto tcp dport 53 lookup 7376750 protocol 112
rule add priority 3703 to 10.0.0.0/8 lookup main protocol 112
rule add priority 3730 fwmark 0x7076706e/0xffffffff unreachable protocol 112
rule add priority 3731 ipproto tcp lookup 7376750 protocol 112
rule add -6 priority 3700 fwmark 0x7076706e/0xffffffff lookup main protocol 112
rule add -6 priority 3702 ipproto udp dport 53 lookup 7376750 protocol 112
rule add -6 priority 3702 ipproto tcp dport 53 lookup 7376750 protocol 112
rule add -6 priority 3730 fwmark 0x7076706e/0xffffffff unreachable protocol 112
rule add -6 priority 3731 ipproto tcp lookup 7376750 protocol 112
";
    let (mut observed, mut desired) = (machine(), routed());
    desired.exceptions.lan = vec!["10.0.0.0/8".parse().unwrap()];
    let steps = plan(&observed, &desired);
    assert_eq!(text(&steps), expected);
    apply(&mut observed, &steps);
    assert_eq!(text(&plan(&observed, &desired)), "", "a second plan is empty");
    // DNS has no other way while there is no device.
    let (connected, blocked) = (observed.clone(), Desired { tunnel: None, ..desired.clone() });
    let steps = plan(&observed, &blocked);
    let gone = "\
route add default dev tap0 table 7376750 proto 112 metric 1
route add -6 default dev tap0 table 7376750 proto 112 metric 1
rule add priority 3702 ipproto udp dport 53 unreachable protocol 112
rule add priority 3702 ipproto tcp dport 53 unreachable protocol 112
rule add -6 priority 3702 ipproto udp dport 53 unreachable protocol 112
rule add -6 priority 3702 ipproto tcp dport 53 unreachable protocol 112
rule remove priority 3700 to 10.10.10.1/32 lookup 7376750 protocol 112
rule remove priority 3702 ipproto udp dport 53 lookup 7376750 protocol 112
rule remove priority 3702 ipproto tcp dport 53 lookup 7376750 protocol 112
rule remove -6 priority 3702 ipproto udp dport 53 lookup 7376750 protocol 112
rule remove -6 priority 3702 ipproto tcp dport 53 lookup 7376750 protocol 112
route remove default via 10.10.10.1 dev tap0 onlink table 7376750 proto 112 metric 1
";
    assert_eq!(text(&steps), gone);
    apply(&mut observed, &steps);
    assert_eq!(text(&plan(&observed, &blocked)), "");
    assert!(text(&plan_removal(&observed)).ends_with("link remove tap0 type tap\n"));

    type Edit = fn(&mut Observed);
    let settings = "link set tap0 mtu 1500 txqueuelen 10000 addrgenmode none multicast off arp off rp_filter 2 address 02:00:00:00:01:02 up\n";
    let neighbour = "link set 10.10.10.1 lladdr 02:00:00:00:01:01 dev tap0 nud permanent\n";
    let cases: [(&str, Edit, &str); 6] = [
        ("the neighbour is gone", |o| o.neighbours.clear(), neighbour),
        ("another neighbour", |o| o.neighbours[0].mac[5] = 9, neighbour),
        ("another MAC address", |o| o.links[2].mac = Some([2; 6]), settings),
        ("it answers ARP", |o| o.links[2].arp = true, settings),
        (
            "strict filtering",
            |o| o.links[2].source_validation = Some(SourceValidation { rp_filter: 1, src_valid_mark: 0 }),
            settings,
        ),
        ("a TUN device in its place", |o| o.links[2].mac = None, "link add tap0 type tap\n"),
    ];
    for (name, edit, expected) in cases {
        let mut observed = connected.clone();
        edit(&mut observed);
        let steps = text(&plan(&observed, &desired));
        assert!(steps.starts_with(expected) && (steps == expected || name.contains("TUN")), "{name}: {steps}");
    }
}

#[test]
fn without_anything_wanted_a_lock_steers_nothing() {
    let (mut observed, mut desired) = (machine(), desired());
    desired.tunnel = None;
    let wanted = plan(&observed, &desired);
    assert!(wanted.iter().any(|step| step.line().contains("ipproto tcp")));
    desired.locked = Locked::Idle;
    assert_eq!(plan(&observed, &desired), []);
    observed.rules = rules(&observed, &desired);
    observed.routes = routes(&observed, &desired);
    let (steps, there) = (plan(&observed, &desired), observed.rules.len() + observed.routes.len());
    assert!(steps.iter().all(|step| step.action() == Action::Remove) && steps.len() == there, "{steps:?}");
}

#[test]
fn differences() {
    type Edit = fn(&mut Observed, &mut Desired);
    let cases: [(&str, Edit, &str); 10] = [
        ("nothing", |_, _| {}, ""),
        (
            "the tunnel goes, traffic is refused",
            |_, desired| desired.tunnel = None,
            "route remove default dev pvpn0 table 7376750 proto 112 metric 1\n\
             route remove -6 default dev pvpn0 table 7376750 proto 112 metric 1\n",
        ),
        (
            "forwarded TCP goes into the tunnel and comes back",
            |_, desired| desired.forward = Forward::Tunnel,
            "rule add priority 3704 iif pvpn0 lookup main protocol 112\n\
             rule add -6 priority 3704 iif pvpn0 lookup main protocol 112\n",
        ),
        (
            "a change adds before it removes",
            |_, desired| desired.exceptions.lan = vec!["10.2.0.0/16".parse().unwrap()],
            "rule add priority 3702 to 10.2.0.0/16 lookup main protocol 112\n\
             rule remove priority 3702 to 10.1.0.0/16 lookup main protocol 112\n",
        ),
        (
            "somebody removed the rule that steers IPv6",
            |observed, _| {
                observed.rules.retain(|rule| rule.family == Family::V4 || rule.verdict != Verdict::Lookup(TABLE))
            },
            "rule add -6 priority 3731 ipproto tcp lookup 7376750 protocol 112\n",
        ),
        (
            "somebody took the device down and its addresses away",
            |observed, _| {
                observed.links.iter_mut().for_each(|link| link.up = false);
                observed.addresses.clear();
            },
            "link set pvpn0 mtu 65535 txqueuelen 10000 addrgenmode none multicast off up\n\
             address add 10.255.255.1/30 dev pvpn0 noprefixroute\n\
             address add fd70:7670:6e::1/64 dev pvpn0 noprefixroute\n",
        ),
        (
            "a strict uplink appears",
            |observed, _| observed.links.push(link(3, "wlan0", 1, 0)),
            "sysctl set net.ipv4.conf.wlan0.src_valid_mark=112\n",
        ),
        (
            "strictness of all counts, loopback and the tunnel don't",
            |observed, _| observed.all.rp_filter = 1,
            "sysctl set net.ipv4.conf.eth0.src_valid_mark=112\n",
        ),
        (
            "what is not needed any more is given back",
            |observed, _| observed.links.push(link(3, "wlan0", 2, 112)),
            "sysctl set net.ipv4.conf.wlan0.src_valid_mark=0\n",
        ),
        (
            "the administrator's setting stays",
            |observed, _| {
                observed.links.push(link(3, "wlan0", 1, 1));
                observed.links.push(link(4, "wlan1", 2, 1));
            },
            "",
        ),
    ];
    for (name, edit, expected) in cases {
        let (mut observed, mut desired) = (machine(), desired());
        desired.exceptions.lan = vec!["10.1.0.0/16".parse().unwrap()];
        let steps = plan(&observed, &desired);
        apply(&mut observed, &steps);
        edit(&mut observed, &mut desired);
        let steps = plan(&observed, &desired);
        assert_eq!(text(&steps), expected, "{name}");
        apply(&mut observed, &steps);
        assert_eq!(text(&plan(&observed, &desired)), "", "{name}: a second plan is empty");
    }
}

#[test]
fn without_ipv6() {
    let mut observed = Observed { ipv6: false, ipv6_for_new: false, ..machine() };
    assert!(!text(&plan(&observed, &desired())).contains("-6"));
    // Disabled for new devices: none in the tunnel, but refused like everything else.
    observed.ipv6 = true;
    let steps = text(&plan(&observed, &desired()));
    assert!(!steps.contains("fd70") && !steps.contains("-6 default dev"), "{steps}");
    assert!(steps.contains("route add -6 unreachable default"), "{steps}");
    assert!(steps.contains("rule add -6 priority 3731 ipproto tcp"), "{steps}");
}

#[test]
fn every_step_is_undone_by_its_inverse() {
    let mut before = machine();
    before.links.push(link(3, "wlan0", 1, 0));
    let mut observed = before.clone();
    let steps = plan(&observed, &desired());
    apply(&mut observed, &steps);
    let undo: Vec<Step> = steps.iter().rev().filter_map(Step::inverse).collect();
    let undo: Vec<Step> = undo.into_iter().filter(|s| !matches!(s.change, Change::Address { .. })).collect();
    apply(&mut observed, &undo);
    observed.addresses.clear();
    assert_eq!(observed, before);
}

#[test]
fn a_device_holds_what_is_blocked() {
    let mut observed = machine();
    let blocked = Desired { tunnel: None, ..desired() };
    let into = |observed: &Observed, desired: &Desired| {
        plan(observed, desired).iter().filter(|step| step.line().contains("dev pvpn0")).count()
    };
    assert_eq!(into(&observed, &blocked), 0, "there is none");
    observed.links.push(Link { ours: true, mac: None, ..link(9, "pvpn0", 0, 0) });
    assert_eq!(into(&observed, &blocked), 2);
    let open = Desired { killswitch: false, ..blocked.clone() };
    assert_eq!(into(&observed, &open), 0, "nothing would refuse what goes there");
    let steps = plan(&observed, &blocked);
    apply(&mut observed, &steps);
    assert_eq!(text(&plan(&observed, &blocked)), "");
    let address = "10.255.255.1/30".parse().unwrap();
    observed.addresses.push(Address { index: 9, address });
    assert_eq!(into(&observed, &blocked), 2, "a tunnel is none: its routes are removed");
}
