//! What belongs to others stays theirs.

use proxyvpnd::net::{Error, Owned, Stage};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::world::{World, chain, connect, desired, open, sh, snapshot};

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_device_of_that_name_is_refused() {
    let foreign = [
        ("ip link add pvpn0 type veth peer name other0", "veth"),
        ("ip tuntap add pvpn0 mode tun", "a tunnel without our mark"),
        ("ip link add pvpn0 type veth peer name other0; ip link set pvpn0 alias proxyvpn", "our mark on another kind"),
    ];
    for (make, name) in foreign {
        let world = World::new();
        world.host.run_async(async || {
            sh(make);
            let before = snapshot();
            let mut network = open(&world.state).await;
            let desired = desired();
            let error = network.preflight(&desired).await.unwrap_err();
            assert!(matches!(&error, Error::NameTaken(name) if name == "pvpn0"), "{name}: {error:?}");
            let error = network.create_tunnel(desired.tunnel.as_ref().unwrap(), 1).await.unwrap_err();
            assert!(matches!(error, Error::NameTaken(_)), "{name}: {error:?}");
            assert!(network.clean_up(Owned::Unexpected).await.errors.is_empty());
            assert_eq!(snapshot(), before, "{name}");
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_tunnel_that_an_earlier_run_left_is_replaced() {
    let world = World::new();
    world.host.run_async(async || {
        sh("ip tuntap add pvpn0 mode tun; ip link set pvpn0 alias proxyvpn; ip addr add 10.7.7.7/32 dev pvpn0");
        let mut network = open(&world.state).await;
        let _fds = connect(&mut network, &desired()).await;
        assert!(!snapshot().contains("10.7.7.7"));
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn rules_and_routes_of_others_stay() {
    let world = World::new();
    world.host.run_async(async || {
        // In our range, as ours but for the owner; ours but for the range; our table's number from afar.
        sh("ip rule add priority 3710 to 203.0.113.0/24 lookup main
            ip rule add priority 3700 fwmark 0x7076706e/0xffffffff lookup main protocol 99
            ip rule add priority 3731 ipproto tcp lookup 7376750 protocol 99
            ip -6 rule add priority 3702 to fd01::/16 lookup main
            ip rule add priority 5000 to 203.0.113.0/24 lookup main protocol 112
            ip route add 203.0.113.0/24 dev up0 protocol 112
            echo 1 > /proc/sys/net/ipv4/conf/up0/src_valid_mark; echo 1 > /proc/sys/net/ipv4/conf/up0/rp_filter");
        let before = snapshot();
        let mut network = open(&world.state).await;
        let fds = connect(&mut network, &desired()).await;
        let during = snapshot();
        assert!(during.contains("fwmark 0x7076706e lookup main proto 112"), "{during}");
        assert!(during.contains("ipproto tcp lookup 7376750 proto 112"), "{during}");
        let findings = network.health(&desired()).await.unwrap();
        assert!(findings.iter().any(|finding| finding.code == "earlier-rule"), "{findings:?}");
        drop(fds);
        let done = network.clean_up(Owned::Unexpected).await;
        assert!(done.errors.is_empty(), "{:?}", done.errors);
        assert_eq!(snapshot(), before);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_foreign_route_in_our_table_is_refused() {
    for route in ["203.0.113.0/24 dev up0", "default dev up0 metric 1", "-6 2001:db8:1::/48 dev up0"] {
        let world = World::new();
        world.host.run_async(async || {
            let option = if route.starts_with("-6") { "-6" } else { "-4" };
            sh(&format!("ip {option} route add {} table 7376750", route.trim_start_matches("-6 ")));
            let mut network = open(&world.state).await;
            let desired = desired();
            let error = network.preflight(&desired).await.unwrap_err();
            assert!(matches!(error, Error::TableTaken { count: 1, .. }), "{error:?}");
            let before = snapshot();
            network.apply(Stage::Routes, &desired).await.unwrap_err();
            assert_eq!(snapshot(), before);
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn one_capability_is_enough() {
    let world = World::new();
    world.host.run_async(async || {
        sh("echo 1 > /proc/sys/net/ipv4/conf/up0/rp_filter");
        let before = snapshot();
        let whole = capabilities(None).unwrap();
        let mut sets = whole;
        sets.effective = CapabilitySet::NET_ADMIN;
        set_capabilities(None, sets).unwrap();
        let mut network = open(&world.state).await;
        let fds = connect(&mut network, &desired()).await;
        assert_eq!(network.firewall_name(), "nftnl");
        assert!(network.plan(&desired()).await.unwrap().is_empty());
        drop(fds);
        let done = network.clean_up(Owned::Unexpected).await;
        assert!(done.errors.is_empty(), "{:?}", done.errors);
        set_capabilities(None, whole).unwrap();
        assert_eq!(snapshot(), before);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_the_capability_nothing_is_touched() {
    let world = World::new();
    world.host.run_async(async || {
        let before = snapshot();
        // Of this thread only, which ends with the test.
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).unwrap();
        let mut network = open(&world.state).await;
        let desired = desired();
        assert!(matches!(network.preflight(&desired).await, Err(Error::Privilege)));
        let error = network.apply(Stage::Routes, &desired).await.unwrap_err();
        assert!(chain(&error).contains("CAP_NET_ADMIN"), "{}", chain(&error));
        network.create_tunnel(desired.tunnel.as_ref().unwrap(), 1).await.unwrap_err();
        let mut sets = capabilities(None).unwrap();
        sets.effective.insert(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).unwrap();
        assert_eq!(snapshot(), before);
    });
}
