//! What reaches the wire. Each forbidden way out is first seen to work without the firewall.

use std::{
    io::ErrorKind,
    net::TcpListener,
    time::{Duration, Instant},
};

use proxyvpnd::net::{
    desired::Desired,
    firewall::{Backend, compile},
};

use crate::{
    probes::{allowed, connect, datagram, forbidden},
    state::backends,
    world::{CONTAINER, PEER, World, desired, devices, opted_in},
};

/// What a killswitch lets out although nobody asked for it.
pub(crate) fn neighbours(line: &str) -> bool {
    let discovery = line.starts_with("icmp6 ") && ["133", "135", "136"].iter().any(|t| line.ends_with(t));
    line == "arp" || discovery
}

fn apply(world: &World, backend: &Backend, desired: &Desired) {
    world.host.run(|| backend.apply(&compile(desired, &[], &devices())).unwrap());
    world.seen();
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn only_what_is_allowed_leaves() {
    opted_in();
    let world = World::new();
    for backend in backends() {
        // Anti-test: the sniffer sees each of them.
        for probe in forbidden().iter().chain(&allowed()) {
            let result = world.host.run(|| (probe.send)());
            let seen = world.seen();
            assert!(seen.iter().any(|l| l.starts_with(&probe.line)), "{}: {result:?}, {seen:?}", probe.name);
        }
        for state in [desired(), Desired { tunnel: None, ..desired() }] {
            apply(&world, &backend, &state);
            for probe in forbidden() {
                let context = format!("{}: {}", backend.name(), probe.name);
                // The best of three: a busy machine can delay any of them.
                let attempt = || {
                    let start = Instant::now();
                    ((probe.send)(), start.elapsed())
                };
                let attempts = world.host.run(|| [attempt(), attempt(), attempt()]);
                let (result, took) = attempts.into_iter().min_by_key(|(_, took)| *took).unwrap();
                if probe.told {
                    let error = result.expect_err(&context).kind();
                    let want = [ErrorKind::ConnectionRefused, ErrorKind::PermissionDenied];
                    assert!(want.contains(&error), "{context}: {error:?}");
                    assert!(took < Duration::from_millis(50), "{context}: failed only after {took:?}");
                }
                let leaked: Vec<_> = world.seen().into_iter().filter(|line| !neighbours(line)).collect();
                assert!(leaked.is_empty(), "{context}: {leaked:?}");
            }
            world.host.run(|| crate::world::sh("ip neigh flush dev up0"));
            for probe in allowed() {
                let result = world.host.run(|| (probe.send)());
                let seen = world.seen();
                let context = format!("{}: {}: {result:?}, {seen:?}", backend.name(), probe.name);
                assert!(seen.iter().any(|l| l.starts_with(&probe.line)), "{context}");
                assert!(seen.iter().all(|l| l.starts_with(&probe.line) || neighbours(l)), "{context}");
            }
        }
        world.host.run(|| {
            backend.remove().unwrap();
            crate::world::sh("ip neigh flush dev up0");
        });
        world.seen();
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn loopback_and_the_tunnel_stay_open() {
    opted_in();
    let world = World::new();
    world.steer();
    for backend in backends() {
        apply(&world, &backend, &desired());
        world.host.run(|| {
            let listener = TcpListener::bind("0.0.0.0:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            for own in ["127.0.0.1", "192.0.2.1", "10.255.255.1"] {
                connect(&format!("{own}:{port}"), |_| Ok(())).unwrap();
            }
            // The tunnel swallows it: nobody refuses.
            for to in ["203.0.113.1:80", "[2001:db8:1::1]:80"] {
                assert_eq!(connect(to, |_| Ok(())).unwrap_err().kind(), ErrorKind::TimedOut, "{to}");
            }
        });
        let seen = world.seen();
        assert!(seen.iter().all(|line| neighbours(line)), "{}: {seen:?}", backend.name());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn nothing_is_forwarded() {
    opted_in();
    let world = World::new();
    world.peer.run(|| crate::world::sh("ip route add 10.9.0.0/24 via 192.0.2.1"));
    let listener = world.container.run(|| TcpListener::bind(format!("{CONTAINER}:80")).unwrap());
    let port = listener.local_addr().unwrap().port();
    let forward = || {
        world.container.run(|| {
            drop(connect("203.0.113.1:80", |_| Ok(())));
            drop(connect(&format!("{PEER}:80"), |_| Ok(())));
            drop(datagram("203.0.113.1:443", |_| Ok(())));
        });
        // From outside to the container: the answer would leave.
        let inward = world.peer.run(|| connect(&format!("{CONTAINER}:{port}"), |_| Ok(())).is_ok());
        (inward, world.seen())
    };
    let (inward, seen) = forward();
    assert!(inward, "the container is not reached without a firewall");
    for line in ["tcp 203.0.113.1 80", "tcp 192.0.2.2 80", "udp 203.0.113.1 443"] {
        assert!(seen.iter().any(|l| l == line), "{line}: {seen:?}");
    }
    for backend in backends() {
        apply(&world, &backend, &desired());
        let (inward, seen) = forward();
        assert!(!inward && seen.iter().all(|line| neighbours(line)), "{}: {seen:?}", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_is_forwarded_is_steered_like_the_rest_without_a_killswitch() {
    opted_in();
    let world = World::new();
    let forward = || {
        world.container.run(|| drop(connect("203.0.113.1:80", |_| Ok(()))));
        world.seen().iter().any(|line| line == "tcp 203.0.113.1 80")
    };
    assert!(forward(), "not seen without a firewall");
    world.steer();
    for backend in backends() {
        apply(&world, &backend, &Desired { killswitch: false, ..desired() });
        assert!(!forward(), "{}: forwarded TCP carries our mark", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn nothing_is_forwarded_into_the_tunnel() {
    opted_in();
    let world = World::new();
    world.steer();
    let forwarded = || {
        let sent = || world.host.run(|| crate::world::sh("ip -s link show pvpn0 | tail -1 | awk '{print $2}'"));
        let before = sent();
        world.container.run(|| drop(connect("203.0.113.1:80", |_| Ok(()))));
        sent() != before
    };
    assert!(forwarded(), "not seen without a firewall");
    for backend in backends() {
        apply(&world, &backend, &desired());
        assert!(!forwarded(), "{}", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_gets_another_way_after_the_output_hook_is_dropped() {
    opted_in();
    let world = World::new();
    // To the machine itself, so by loopback, until another program's NAT rule sends it away.
    let send = || {
        world.host.run(|| drop(datagram("192.0.2.1:8080", |_| Ok(()))));
        world.seen().into_iter().filter(|line| !neighbours(line)).collect::<Vec<_>>()
    };
    world.host.run(|| {
        crate::world::sh(
            "nft 'add table ip nat; add chain ip nat out { type nat hook output priority -100; }
             add rule ip nat out udp dport 8080 dnat to 203.0.113.9:80'",
        )
    });
    assert_eq!(send(), ["udp 203.0.113.9 80"]);
    for backend in backends() {
        apply(&world, &backend, &desired());
        assert!(send().is_empty(), "{}", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_tunnels_address_answers_on_the_tunnel_only() {
    opted_in();
    let world = World::new();
    world.peer.run(|| crate::world::sh("ip route add 10.255.255.0/30 via 192.0.2.1"));
    let listener = world.host.run(|| TcpListener::bind("0.0.0.0:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    let reached = |address: &str| world.peer.run(|| connect(&format!("{address}:{port}"), |_| Ok(())).is_ok());
    for backend in backends() {
        assert!(reached("10.255.255.1"), "not reached without a firewall");
        apply(&world, &backend, &Desired { killswitch: false, ..desired() });
        assert!(!reached("10.255.255.1"), "{}", backend.name());
        assert!(reached("192.0.2.1"), "{}", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}
