//! After a connection the network is what it was.

use proxyvpnd::net::{Owned, Stage};

use crate::world::{World, chain, connect, desired, open, sh, snapshot, text};

#[test]
#[ignore = "needs root and makes network namespaces"]
fn fifty_connections_leave_no_trace() {
    let world = World::new();
    world.host.run_async(async || {
        sh("echo 1 > /proc/sys/net/ipv4/conf/up0/rp_filter");
        let before = snapshot();
        let mut network = open(&world.state).await;
        assert_eq!(snapshot(), before, "opening changes nothing");
        for round in 0..50 {
            let fds = connect(&mut network, &desired()).await;
            let during = snapshot();
            for part in ["fwmark 0x7076706e", "dev pvpn0 table 7376750", "src_valid_mark:112", "table inet proxyvpn"] {
                assert!(during.contains(part), "{part} is not in\n{during}");
            }
            assert!(network.health(&desired()).await.unwrap().iter().all(|f| f.code != "steering-changed"));
            // Half of the time the engine still holds the device.
            let held = (round % 2 == 0).then_some(fds);
            let done = network.clean_up(Owned::Unexpected).await;
            assert!(done.errors.is_empty(), "{:?}", done.errors);
            assert_eq!(snapshot(), before, "round {round}");
            drop(held);
        }
        assert!(network.clean_up(Owned::Unexpected).await.removed.is_empty(), "nothing was left to remove");
        assert_eq!(std::fs::read_dir(&world.state).unwrap().count(), 0, "the journal is gone");
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_lost_or_broken_journal_does_not_stop_a_clean_up() {
    for journal in [None, Some("{"), Some(r#"{"version":99}"#)] {
        let world = World::new();
        world.host.run_async(async || {
            sh("echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter");
            let before = snapshot();
            let mut network = open(&world.state).await;
            assert!(!network.interrupted());
            // As after kill -9: nobody cleans up, and another process still holds the device.
            let _fds = connect(&mut network, &desired()).await;
            drop(network);
            let file = world.state.join("journal.json");
            assert!(std::fs::read_to_string(&file).unwrap().contains("rule remove priority 3700"));
            match journal {
                None => std::fs::remove_file(&file).unwrap(),
                Some(text) => std::fs::write(&file, text).unwrap(),
            }
            let mut network = open(&world.state).await;
            assert_eq!(network.interrupted(), journal.is_some());
            let done = network.clean_up(Owned::Unexpected).await;
            assert!(done.errors.is_empty(), "{:?}", done.errors);
            assert!(done.removed.iter().any(|line| line.contains("pvpn0 type tun")), "{:?}", done.removed);
            assert_eq!(snapshot(), before);
            assert!(!open(&world.state).await.interrupted());
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_second_apply_changes_nothing() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        assert!(text(&network.plan(&desired()).await.unwrap()).contains("nft add inet proxyvpn"));
        let _fds = connect(&mut network, &desired()).await;
        let once = snapshot();
        assert_eq!(text(&network.plan(&desired()).await.unwrap()), "");
        for stage in [Stage::Tunnel, Stage::Firewall, Stage::Routes] {
            network.apply(stage, &desired()).await.unwrap();
        }
        assert_eq!(snapshot(), once);
    });
}

/// Removes the rules that set a timeout.
const LESS: &str = "for h in $(nft -a list chain inet proxyvpn output | sed -n 's/.*ct timeout set.*handle //p')
    do nft delete rule inet proxyvpn output handle $h; done";

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_others_removed_is_put_back() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let desired = desired();
        let _fds = connect(&mut network, &desired).await;
        let whole = snapshot();
        let damage = [
            ("ip -6 rule del priority 3731", "steering-changed"),
            ("ip route flush table 7376750", "steering-changed"),
            ("ip addr del 10.255.255.1/30 dev pvpn0", "tunnel-changed"),
            ("nft flush ruleset", "firewall-missing"),
            ("nft delete chain inet proxyvpn forward", "firewall-missing"),
            ("nft insert rule inet proxyvpn postrouting accept", "firewall-missing"),
            ("nft add ct timeout inet proxyvpn other '{ protocol tcp; }'", "firewall-missing"),
            (LESS, "firewall-missing"),
        ];
        for (command, code) in damage {
            let codes = async |network: &proxyvpnd::net::Network| -> Vec<&'static str> {
                network.health(&desired).await.unwrap().iter().map(|finding| finding.code).collect()
            };
            assert!(!codes(&network).await.contains(&code));
            sh(command);
            assert!(codes(&network).await.contains(&code), "{command}");
            for stage in [Stage::Tunnel, Stage::Firewall, Stage::Routes] {
                network.apply(stage, &desired).await.unwrap();
            }
            assert_eq!(snapshot(), whole, "{command}");
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_failure_in_the_middle_leaves_what_was_there() {
    let world = World::new();
    world.host.run_async(async || {
        sh("echo 1 > /proc/sys/net/ipv4/conf/up0/rp_filter");
        let mut network = open(&world.state).await;
        let good = desired();
        let mut bad = desired();
        // No user has this number: the kernel refuses the rule after a dozen steps.
        bad.exceptions.users = vec![u32::MAX];
        let _fds = network.create_tunnel(good.tunnel.as_ref().unwrap(), 1).await.unwrap();
        let before = snapshot();
        let error = network.apply(Stage::Routes, &bad).await.unwrap_err();
        assert!(chain(&error).contains("uidrange 4294967295-4294967295"), "{}", chain(&error));
        assert_eq!(snapshot(), before, "from nothing");

        network.apply(Stage::Routes, &good).await.unwrap();
        let before = snapshot();
        bad.exceptions.lan = vec![];
        network.apply(Stage::Routes, &bad).await.unwrap_err();
        assert_eq!(snapshot(), before, "from a good state");

        sh("ip link set pvpn0 down; ip rule del priority 3731");
        let before = snapshot();
        let error = network.apply(Stage::Routes, &good).await.unwrap_err();
        assert!(chain(&error).contains("Network is down"), "{}", chain(&error));
        assert_eq!(snapshot(), before, "with the device down");
    });
}
