//! What is scarce in the engine is shared between the users of this machine.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proxyvpn_engine::Engine;
use proxyvpn_engine::config::{Config, Limits};
use proxyvpn_engine::upstream::{Connector, Exhausted, HttpProxy, Upstream};
use proxyvpnd::net::desired::MARK;
use proxyvpnd::net::{SocketOwners, Stage};
use rustix::fs::Uid;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

use crate::world::{PEER, World, desired, open};

/// Both are ordinary users to the kernel, and neither has an exception in [`desired`].
const GREEDY: u32 = 65534;
const MODEST: u32 = 1;
const SYNS: u16 = 50_000;
/// Sockets that the greedy user keeps; a closed one's SYN has no owner any more.
const KEPT: usize = 8_000;

/// A connection under way.
fn connecting(to: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    let error = socket.connect(&to.into()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS), "{error}");
    socket
}

/// This thread becomes a user who may do nothing.
fn become_user(uid: u32) {
    let uid = Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn fifty_thousand_syns_of_one_user_do_not_keep_another_out() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    if limit.maximum.is_some_and(|maximum| maximum < 16_000) {
        println!("skipped: 16000 descriptors are needed, {limit:?} are allowed");
        return;
    }
    let world = World::new();
    let proxy = SocketAddr::new(PEER.into(), 3128);
    // Takes connections and never answers.
    let _silent = world.peer.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&proxy.into()).unwrap();
        socket.listen(4096).unwrap();
        socket
    });
    let upstream = Upstream::HttpConnect(HttpProxy {
        name: proxy.to_string(),
        addresses: vec![proxy],
        credentials: None,
        exhausted: Exhausted::default(),
    });
    let connector =
        Connector { upstream, mark: Some(MARK), timeout: Duration::from_secs(600), refused: vec![], only: None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let engine = world.host.run_async(async || {
        let (mut network, desired) = (open(&world.state).await, desired());
        let queues = network.create_tunnel(desired.tunnel.as_ref().unwrap(), 2).await.unwrap();
        let limits = Limits::default();
        let config =
            Config { mtu: 65535, limits, connector: Arc::new(connector), owners: Some(Arc::new(SocketOwners)) };
        let (events, _) = tokio::sync::mpsc::channel(8);
        let engine = Engine::start(queues, config, events).unwrap();
        network.apply(Stage::Firewall, &desired).await.unwrap();
        network.apply(Stage::Routes, &desired).await.unwrap();
        engine
    });
    let counter = |name: &str| engine.counters().into_iter().find(|(known, _)| *known == name).unwrap().1;
    let (pause, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            world.host.run(|| {
                become_user(GREEDY);
                let mut kept = VecDeque::new();
                for number in (0..SYNS).chain(std::iter::repeat_n(0, 10_000_000)) {
                    while pause.load(Ordering::Relaxed) && !stop.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    // As many destinations as it takes: one has only 28,000 ports for it.
                    kept.push_back(connecting(SocketAddr::new([203, 0, 113, (number % 10) as u8].into(), 443)));
                    if kept.len() > KEPT {
                        kept.pop_front();
                    }
                }
            });
        });
        let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until("50,000 SYNs have come", || {
                counter("flows-refused-fair") + counter("flows-refused-pending") + 4096 >= u64::from(SYNS)
            });
            let pending = || {
                let flows = runtime.block_on(engine.flows());
                flows.iter().map(|flow| flow.source).collect::<Vec<_>>()
            };
            world.host.run(|| {
                become_user(MODEST);
                for to in ["203.0.113.80:443", "[2001:db8:9::80]:443"] {
                    let socket = connecting(to.parse().unwrap());
                    let own = socket.local_addr().unwrap().as_socket().unwrap();
                    wait_until("the engine has the modest user's connection", || {
                        let error = socket.take_error().unwrap();
                        assert!(error.is_none(), "refused to {to}: {error:?}");
                        pending().contains(&own)
                    });
                }
            });
            // Half, half of the rest for the user, and half of that for sockets that were closed before anybody asked whose they are.
            let limit = Limits::default().pending;
            let count = pending().len();
            assert!(count <= limit * 7 / 8 + 3, "{count} of {limit} wait");
            assert_eq!(counter("flows-refused-pending"), 0, "the bound itself was reached");
            // The greedy user's others are refused, at once. A flood would fill the device, and nobody would be told anything.
            pause.store(true, Ordering::Relaxed);
            world.host.run(|| {
                become_user(GREEDY);
                let to = SocketAddr::new([203, 0, 113, 99].into(), 443);
                wait_until("the greedy user is refused", || {
                    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                    let error = socket.connect_timeout(&to.into(), Duration::from_secs(1)).unwrap_err();
                    error.kind() == ErrorKind::ConnectionRefused
                });
            });
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = tried {
            std::panic::resume_unwind(panic);
        }
    });
    let counters = engine.counters();
    let shown: Vec<_> = counters.iter().filter(|(name, n)| *n > 0 && name.starts_with("flows")).collect();
    println!("{shown:?}");
    assert_eq!(runtime.block_on(engine.stop()).len(), 2);
}
