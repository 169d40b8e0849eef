//! The lock: alone nothing leaves but what the daemon sends; beside our table, what that lets through. What it stops is first
//! seen to leave without it.

use std::{
    io,
    net::TcpListener,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use proxyvpnd::net::{
    Error, Keep,
    desired::{Desired, Locked},
    firewall::{self, compile},
    lock::{self, State},
};

use crate::{
    connections::{alive, pair},
    probes::{Probe, allowed, connect, datagram, forbidden},
    state::NFTNL,
    wire::neighbours,
    world::{CONTAINER, HOST, PEER, World, desired, devices, opted_in, sh},
};

/// What may leave with the lock alone.
const ALONE: [&str; 7] = [
    "tcp with our mark",
    "tcp with our mark, IPv6",
    "udp with our mark",
    "dhcp",
    "dhcp, IPv6",
    "neighbour discovery",
    "arp",
];

fn locked() -> Desired {
    Desired { locked: Locked::Yes, ..desired() }
}

/// Runs to its end in the namespace of the calling thread.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

pub(crate) fn close(world: &World) {
    world.host.run(|| block_on(lock::install()).unwrap());
    world.seen();
}

fn open(world: &World) {
    assert!(world.host.run(|| block_on(lock::remove()).unwrap()));
}

/// What the sniffer saw of a probe, but for neighbours.
fn sent(world: &World, probe: &Probe) -> (io::Result<()>, Duration, Vec<String>) {
    let (result, took) = world.host.run(|| {
        let start = Instant::now();
        ((probe.send)(), start.elapsed())
    });
    let seen = world.seen().into_iter().filter(|l| l.starts_with(&probe.line) || !neighbours(l)).collect();
    (result, took, seen)
}

fn leaves(world: &World, probe: &Probe) {
    world.host.run(|| sh("ip neigh flush dev up0"));
    world.seen();
    let (result, _, seen) = sent(world, probe);
    assert!(seen.iter().any(|line| line.starts_with(&probe.line)), "{}: {result:?}, {seen:?}", probe.name);
}

fn stays(world: &World, probe: &Probe) {
    let attempts = [sent(world, probe), sent(world, probe), sent(world, probe)];
    let took = attempts.iter().map(|(_, took, _)| *took).min().unwrap();
    for (result, _, seen) in attempts {
        assert!(seen.is_empty(), "{}: {seen:?}", probe.name);
        // A user's program tells nothing.
        if probe.told && probe.name != "a bypassing user" {
            assert!(result.is_err() && took < Duration::from_millis(50), "{}: {result:?} after {took:?}", probe.name);
        }
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn alone_it_lets_out_what_the_daemon_sends() {
    opted_in();
    let world = World::new();
    for probe in forbidden().iter().chain(&allowed()) {
        leaves(&world, probe);
    }
    close(&world);
    for probe in forbidden() {
        stays(&world, &probe);
    }
    for probe in allowed() {
        if ALONE.contains(&probe.name) { leaves(&world, &probe) } else { stays(&world, &probe) }
    }
    open(&world);
    for probe in forbidden() {
        leaves(&world, &probe);
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn beside_our_table_it_lets_out_what_that_lets_out() {
    opted_in();
    let world = World::new();
    world.steer();
    let tunnelled = || {
        let to = ["203.0.113.1:80", "[2001:db8:1::1]:80"];
        to.map(|to| world.host.run(|| connect(to, |_| Ok(()))).unwrap_err().kind())
    };
    for order in ["the lock first", "the lock last"] {
        let ours = |desired: &Desired| world.host.run(|| NFTNL.apply(&compile(desired, &[], &devices())).unwrap());
        if order == "the lock last" {
            ours(&locked());
        }
        close(&world);
        ours(&locked());
        world.seen();
        for probe in forbidden().iter().filter(|probe| !probe.line.starts_with("tcp ")) {
            stays(&world, probe);
        }
        for probe in
            allowed().iter().filter(|probe| !probe.name.starts_with("lan, tcp") && probe.name != "dns over tcp")
        {
            leaves(&world, probe);
        }
        // The tunnel swallows it: nobody refuses.
        assert_eq!(tunnelled(), [io::ErrorKind::TimedOut; 2], "{order}");
        world.host.run(|| {
            let listener = TcpListener::bind("0.0.0.0:0").unwrap();
            for own in ["127.0.0.1", HOST] {
                connect(&format!("{own}:{}", listener.local_addr().unwrap().port()), |_| Ok(())).unwrap();
            }
        });
        // Anti-test: what our table does not say to the lock does not leave.
        ours(&desired());
        world.seen();
        for probe in allowed().iter().filter(|probe| ["dns", "lan"].contains(&probe.name)) {
            stays(&world, probe);
        }
        assert_eq!(tunnelled(), [io::ErrorKind::ConnectionRefused; 2], "{order}");
        world.host.run(|| NFTNL.remove().unwrap());
        open(&world);
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_gets_another_way_after_the_output_hook_is_dropped() {
    opted_in();
    let world = World::new();
    // Into the tunnel, and to the machine itself, until another program's NAT rule sends it away.
    world.host.run(|| {
        sh("ip route add 203.0.113.50/32 dev pvpn0
            nft 'add table ip nat; add chain ip nat out { type nat hook output priority -100; }
                 add rule ip nat out udp dport 8080 dnat to 203.0.113.9:80'")
    });
    let send = |to: &str| {
        world.host.run(|| drop(datagram(to, |_| Ok(()))));
        world.seen().into_iter().filter(|line| !neighbours(line)).collect::<Vec<_>>()
    };
    let ways = ["203.0.113.50:8080", "192.0.2.1:8080"];
    for way in ways {
        assert_eq!(send(way), ["udp 203.0.113.9 80"], "{way}");
    }
    close(&world);
    for way in ways {
        assert!(send(way).is_empty(), "{way} with the lock alone");
    }
    world.host.run(|| NFTNL.apply(&compile(&locked(), &[], &devices())).unwrap());
    for way in ways {
        assert!(send(way).is_empty(), "{way} with both");
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn nothing_is_forwarded() {
    opted_in();
    let world = World::new();
    world.peer.run(|| sh("ip route add 10.9.0.0/24 via 192.0.2.1"));
    let listener = world.container.run(|| TcpListener::bind(format!("{CONTAINER}:0")).unwrap());
    let port = listener.local_addr().unwrap().port();
    let forward = || {
        world.container.run(|| {
            drop(connect("203.0.113.1:80", |_| Ok(())));
            drop(datagram("203.0.113.1:443", |_| Ok(())));
        });
        let inward = world.peer.run(|| connect(&format!("{CONTAINER}:{port}"), |_| Ok(())).is_ok());
        (inward, world.seen().into_iter().filter(|line| !neighbours(line)).collect::<Vec<_>>())
    };
    let (inward, seen) = forward();
    assert!(inward && seen.contains(&"udp 203.0.113.1 443".to_owned()), "{seen:?}");
    close(&world);
    assert_eq!(forward(), (false, vec![]));
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn connections_from_outside_go_on_and_our_own_end() {
    opted_in();
    let world = World::new();
    let here = world.host.run(|| TcpListener::bind(format!("{HOST}:0")).unwrap());
    let there = world.peer.run(|| TcpListener::bind(format!("{PEER}:0")).unwrap());
    let inbound = || pair(&here, |to| world.peer.run(|| connect(&to.to_string(), |_| Ok(()))));
    let outbound = || pair(&there, |to| world.host.run(|| connect(&to.to_string(), |_| Ok(()))));
    let (a, b) = inbound().unwrap();
    let (c, d) = outbound().unwrap();
    assert!(alive(&a, &b) && alive(&c, &d));
    close(&world);
    assert!(alive(&a, &b), "a session from before the lock");
    let (e, f) = inbound().unwrap();
    assert!(alive(&e, &f), "a session after the lock");
    assert!(!alive(&c, &d) && outbound().is_err(), "our own");
    // The daemon's profile decides: this one does not answer.
    world.host.run(|| NFTNL.apply(&compile(&Desired { inbound_replies: false, ..locked() }, &[], &devices())).unwrap());
    assert!(!alive(&e, &f) && inbound().is_err());
    world.host.run(|| NFTNL.apply(&compile(&locked(), &[], &devices())).unwrap());
    let (g, h) = inbound().unwrap();
    assert!(alive(&g, &h));
}

/// Keeps what it is given until it is dropped, as systemd does.
#[derive(Debug, Default)]
struct Store(Mutex<Vec<OwnedFd>>);

impl Keep for Store {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        assert_eq!(name, lock::SOCKET);
        self.0.lock().unwrap().push(fd.as_fd().try_clone_to_owned()?);
        Ok(())
    }

    fn forget(&self, _: &str) -> io::Result<()> {
        unreachable!("the lock's socket is kept for ever")
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_lock_that_is_kept_can_be_removed_by_nobody_else() {
    opted_in();
    let world = World::new();
    let store = Arc::new(Store::default());
    let plain = || datagram("203.0.113.1:443", |_| Ok(())).is_ok();
    world.host.run(|| {
        assert!(plain());
        // In place of one without an owner.
        block_on(lock::install()).unwrap();
        assert_eq!(block_on(lock::state()).unwrap(), State::Plain);
        block_on(lock::install_kept(None, store.clone())).unwrap();
        assert_eq!(block_on(lock::state()).unwrap(), State::Owned);
        sh("nft flush ruleset; nft delete table inet proxyvpn-lock && exit 1 || true");
        assert!(matches!(block_on(lock::remove()), Err(Error::Firewall(firewall::Error::Owned))));
        assert!(matches!(block_on(lock::install()), Err(Error::Firewall(firewall::Error::Owned))));
        assert!(!plain());
        // Started again, as after an upgrade: the same socket goes on.
        let kept = store.0.lock().unwrap()[0].try_clone().unwrap();
        block_on(lock::install_kept(Some(kept), store.clone())).unwrap();
        assert_eq!((block_on(lock::state()).unwrap(), store.0.lock().unwrap().len()), (State::Owned, 1));
        assert!(!plain());
        store.0.lock().unwrap().clear();
        assert_eq!(block_on(lock::state()).unwrap(), State::None);
        assert!(plain());
    });
}
