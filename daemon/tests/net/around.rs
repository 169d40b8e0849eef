//! What of the network around is seen: the way to the upstream, and what a network does to get at traffic.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use proxyvpnd::net::desired::Desired;
use proxyvpnd::net::{Cut, Network};

use crate::world::{PEER, World, connect, desired, open, sh};

async fn codes(network: &Network, desired: &Desired, upstream: &[IpAddr]) -> Vec<&'static str> {
    network.surroundings(desired, upstream).await.unwrap().iter().map(|finding| finding.code).collect()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_a_network_does_to_get_at_traffic_is_told() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let mut desired = desired();
        desired.exceptions.resolvers = vec!["198.51.100.53".parse().unwrap()];
        let _fds = connect(&mut network, &desired).await;
        let upstream = ["203.0.113.10".parse().unwrap(), "2001:db8:2::10".parse().unwrap()];
        assert_eq!(codes(&network, &desired, &upstream).await, [""; 0], "a usual machine");
        let cases = [
            ("ip route add 203.0.114.0/24 via 192.0.2.66 proto dhcp", "route-specific"),
            ("ip route add 203.0.114.0/24 proto dhcp nexthop via 192.0.2.66 nexthop via 192.0.2.67", "route-specific"),
            ("ip route add 203.0.114.0/24 via inet6 fe80::66 dev up0 proto dhcp", "route-specific"),
            ("ip -6 route add 2001:db8:77::/48 via 2001:db8::66 proto ra", "route-specific"),
            ("ip route add 0.0.0.0/1 via 192.0.2.66 proto dhcp", "route-shadow"),
            ("ip route add 198.51.100.53/32 via 192.0.2.66 proto dhcp", "route-shadow"),
            ("ip route add 10.1.7.0/24 via 192.0.2.66 proto dhcp", "route-shadow"),
            ("ip addr add 198.51.100.9/24 dev up0", "resolver-on-link"),
            ("ip addr add 11.0.0.9/7 dev up0", "lan-public"),
        ];
        for (command, code) in cases {
            sh(command);
            assert_eq!(codes(&network, &desired, &upstream).await, [code], "{command}");
            sh(&command.replacen(" add ", " del ", 1));
        }
        for harmless in [
            "route add 203.0.114.0/24 via 192.0.2.2 proto dhcp",
            "route add 203.0.113.10/32 via 192.0.2.66 proto static",
            "route add unreachable 203.0.114.0/24",
            "route add 10.9.0.0/16 via 192.0.2.66",
        ] {
            sh(&format!("ip {harmless}"));
            assert_eq!(codes(&network, &desired, &upstream).await, [""; 0], "{harmless}");
            sh(&format!("ip {}", harmless.replacen(" add ", " del ", 1)));
        }
        assert_eq!(codes(&network, &desired, &upstream[..1]).await, ["ipv6-no-upstream"]);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_way_to_the_upstream_is_told_with_what_cuts_it() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let _fds = connect(&mut network, &desired()).await;
        let proxy: IpAddr = "203.0.113.10".parse().unwrap();
        let first = network.way(&[proxy]).await.unwrap();
        assert_eq!(first.cut(), None);
        assert_eq!(network.way(&[proxy]).await.unwrap(), first, "nothing changed");
        let steps = [
            ("ip route replace default via 192.0.2.66", None),
            ("ip addr add 192.0.2.9/24 dev up0; ip route replace default via 192.0.2.66 src 192.0.2.9", None),
            ("ip route add unreachable 203.0.113.0/24", Some(Cut::NoRoute(vec![proxy]))),
            ("ip route del default", Some(Cut::NoDefaultRoute)),
            ("ip route del unreachable 203.0.113.0/24; ip route add 203.0.113.10/32 via 192.0.2.2", None),
        ];
        let mut last = first;
        for (command, cut) in steps {
            sh(command);
            let way = network.way(&[proxy]).await.unwrap();
            assert_eq!(way.cut(), cut, "{command}");
            assert_ne!(way, last, "{command}");
            last = way;
        }
        world.peer.run(|| sh("ip link set peer0 down"));
        assert_eq!(network.way(&[proxy]).await.unwrap().cut(), Some(Cut::NoConnection));
        sh("ip link add other0 type veth peer name other1; ip link set other0 up; ip link set other1 up");
        assert_eq!(network.way(&[proxy]).await.unwrap().cut(), Some(Cut::NoCarrier("up0".to_owned())));
        sh("ip link set up0 down");
        assert_eq!(network.way(&[proxy]).await.unwrap().cut(), Some(Cut::NoDefaultRoute));
        // A proxy of this machine needs no network.
        sh("ip link del other0; ip addr add 203.0.113.10/32 dev lo");
        assert_eq!(network.way(&[proxy]).await.unwrap().cut(), None);
        assert_eq!(network.way(&[PEER.into()]).await.unwrap().cut(), Some(Cut::NoConnection));
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_look_does_not_read_the_routes_of_a_router() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let desired = desired();
        let _fds = connect(&mut network, &desired).await;
        let mut look = async || {
            let mut times: Vec<Duration> = vec![];
            for _ in 0..5 {
                let begin = Instant::now();
                assert!(network.look(&desired).await.unwrap().put_back.is_empty());
                times.push(begin.elapsed());
            }
            times.sort();
            times[2]
        };
        let few = look().await;
        let file = world.state.join("routes");
        sh(&format!(
            "i=0; while [ $i -lt 250 ]; do j=0; while [ $j -lt 200 ]; do echo route add 10.$i.$j.0/24 via {PEER}; j=$((j+1)); done; \
             i=$((i+1)); done > {0}; ip -batch {0}; rm {0}",
            file.display()
        ));
        let many = look().await;
        eprintln!("a look takes {few:?}, and {many:?} with 50,000 more routes in main");
        assert!(many < few * 4 + Duration::from_millis(40), "{few:?} {many:?}");
        let begin = Instant::now();
        assert_eq!(codes(&network, &desired, &[PEER.into()]).await.first(), Some(&"ipv6-no-upstream"));
        eprintln!("the surroundings take {:?} then", begin.elapsed());
    });
}
