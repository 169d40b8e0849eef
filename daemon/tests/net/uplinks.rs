//! Uplinks that come and go while a connection is wanted.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proxyvpnd::net::desired::Desired;
use proxyvpnd::net::{Network, Stage};

use crate::world::{HOST, World, desired, open, sh};

/// Devices that have a chain, in order.
fn chains() -> Vec<String> {
    let listed = sh("nft list table netdev proxyvpn 2>/dev/null || true");
    let device = |line: &str| Some(line.split_once("hook egress device \"")?.1.split_once('"')?.0.to_owned());
    let mut devices: Vec<_> = listed.lines().filter_map(device).collect();
    devices.sort();
    devices
}

async fn applied(network: &mut Network, desired: &Desired) -> Vec<String> {
    network.apply(Stage::Firewall, desired).await.unwrap();
    chains()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn uplinks_that_come_and_go_have_their_chain() {
    let world = World::new();
    world.host.run_async(async || {
        let desired = desired();
        let mut network = open(&world.state).await;
        let mut after = async |command: &str| {
            sh(command);
            applied(&mut network, &desired).await
        };
        assert_eq!(after("true").await, ["up0"]);
        assert_eq!(after("ip link add up1 type veth peer name far1").await, ["far1", "up0", "up1"]);
        assert_eq!(after("ip link set up1 name lan7").await, ["far1", "lan7", "up0"]);
        // A container's bridge and its port are inner, until something leads out there.
        assert_eq!(after("ip link add br0 type bridge").await, ["far1", "lan7", "up0"]);
        assert_eq!(after("ip link set far1 master br0").await, ["lan7", "up0"]);
        assert!(sh("nft list chain inet proxyvpn postrouting").contains("oifname \"br0\""));
        // The uplink here is a virtual device too: that a gateway was behind it is not forgotten.
        let moved = "ip link set up0 master br0; ip addr flush dev up0";
        assert_eq!(after(moved).await, ["br0", "far1", "lan7", "up0"]);
        assert!(!sh("nft list chain inet proxyvpn postrouting").contains("oifname \"br0\""));
        assert_eq!(after("ip link set far1 nomaster").await, ["br0", "far1", "lan7", "up0"]);
        assert_eq!(after("ip link del br0; ip link del lan7").await, ["up0"]);
        let off = Desired { killswitch: false, guarded: vec![], ..desired.clone() };
        assert_eq!(applied(&mut network, &off).await, Vec::<String>::new());
        assert!(network.clean_up(proxyvpnd::net::Owned::Unexpected).await.errors.is_empty());
        assert_eq!(sh("nft list ruleset"), "");
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn devices_that_flap_open_and_cut_nothing() {
    let world = World::new();
    let listener = world.host.run(|| TcpListener::bind((HOST, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    world.host.run_async(async || {
        let desired = desired();
        let mut network = open(&world.state).await;
        network.apply(Stage::Firewall, &desired).await.unwrap();
        // From outside, and known by its mark only.
        let mut peer = world.peer.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(3)).unwrap());
        let (mut host, _) = listener.accept().unwrap();
        for stream in [&peer, &host] {
            stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        }
        let stop = Arc::new(AtomicBool::new(false));
        let flap = {
            let stop = Arc::clone(&stop);
            // On this thread's network namespace, which the runtime's own threads have too.
            tokio::task::spawn_blocking(move || {
                while !stop.load(Ordering::Relaxed) {
                    sh("ip link add flap0 type veth peer name flap1; ip link add flap2 type veth peer name flap3
                        ip link del flap0; ip link del flap2");
                }
            })
        };
        let mut seen = 0;
        for round in 0..60 {
            network.apply(Stage::Firewall, &desired).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
            let table = sh("nft list table inet proxyvpn");
            assert!(table.contains("chain filter_output") && table.contains("chain postrouting"), "round {round}");
            seen += usize::from(chains().len() > 1);
            host.write_all(b"a").unwrap();
            peer.read_exact(&mut [0]).unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
        stop.store(true, Ordering::Relaxed);
        flap.await.unwrap();
        assert!(seen > 0, "no device came while rules were set, so nothing was shown");
        assert_eq!(applied(&mut network, &desired).await, ["up0"]);
    });
}
