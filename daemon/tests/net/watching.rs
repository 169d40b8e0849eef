//! What others remove is put back at once, and nothing leaves meanwhile that something else still stops.

use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proxyvpnd::net::desired::Desired;
use proxyvpnd::net::{Look, Network, Watch};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::{Instant, timeout};

use crate::world::{PEER, World, connect, desired, open, sh, snapshot};

/// What a repair may take. Far more than it does, so that a busy machine fails no test.
const BOUND: Duration = Duration::from_secs(1);

/// Looks whenever the watch says so, for ever; `looked` gets each look.
async fn keep(network: &mut Network, watch: &mut Watch, desired: &Desired, mut looked: impl FnMut(Look)) {
    loop {
        watch.changed().await;
        let began = Instant::now();
        let look = network.look(desired).await.unwrap();
        watch.looked(began, !look.put_back.is_empty());
        looked(look);
    }
}

/// Runs a command beside the watch, and gives how long it took from its begin until something was put back.
pub(crate) async fn repaired(network: &mut Network, watch: &mut Watch, desired: &Desired, command: &str) -> Duration {
    let (began, command) = (Instant::now(), command.to_owned());
    let mut done = None;
    let damage = tokio::task::spawn_blocking(move || sh(&command));
    let (mended, mut wait) = tokio::sync::mpsc::unbounded_channel();
    let keeping = keep(network, watch, desired, |look| {
        assert!(look.errors.is_empty(), "{:?}", look.errors);
        if !look.put_back.is_empty() {
            mended.send(Instant::now()).unwrap();
        }
    });
    let end = async {
        damage.await.unwrap();
        let mut patience = BOUND;
        while let Ok(Some(when)) = timeout(patience, wait.recv()).await {
            (done, patience) = (Some(when), Duration::from_millis(300));
        }
    };
    tokio::select! {
        () = keeping => {}
        () = end => {}
    }
    done.map_or(Duration::MAX, |done| done - began)
}

/// The network is what it was.
fn same(before: &str, command: &str) {
    let now = snapshot();
    let missing: Vec<&str> = before.lines().filter(|line| !now.lines().any(|other| other == *line)).collect();
    let more: Vec<&str> = now.lines().filter(|line| !before.lines().any(|other| other == *line)).collect();
    let lines = (before.lines().count(), now.lines().count());
    assert!(now == before, "{command}: missing {missing:#?}, more {more:#?}, lines {lines:?}");
}

/// Packets that the peer gets from the host, by protocol.
fn counted(world: &World) -> [u64; 3] {
    world.peer.run(|| {
        ["tcp", "udp", "icmp"].map(|name| {
            let text = sh(&format!("nft list counter inet seen seen_{name}"));
            let mut words = text.split_ascii_whitespace();
            words.find(|word| *word == "packets").unwrap();
            words.next().unwrap().parse().unwrap()
        })
    })
}

fn count(world: &World) {
    world.peer.run(|| {
        sh("nft -f - <<'END'
            table inet seen {
                counter seen_tcp { }
                counter seen_udp { }
                counter seen_icmp { }
                chain everything { type filter hook prerouting priority -400;
                    meta l4proto tcp counter name seen_tcp
                    meta l4proto udp counter name seen_udp
                    meta l4proto icmp counter name seen_icmp
                }
            }\nEND\n")
    });
}

/// What programs send, some hundred times per second, until it is dropped.
struct Traffic(Arc<AtomicBool>);

impl Traffic {
    fn begin() -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        std::thread::spawn(move || {
            let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            let icmp = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap();
            let to = |port: u16| SocketAddr::from((PEER, port));
            while !ended.load(Ordering::Relaxed) {
                let _ = udp.send_to(b"x", to(9999));
                let _ = icmp.send_to(&[8, 0, 0xf7, 0xff, 0, 0, 0, 0], &to(0).into());
                let _ = TcpStream::connect_timeout(&to(80), Duration::from_millis(1));
            }
        });
        Self(end)
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_others_remove_is_back_at_once_and_nothing_leaves_meanwhile() {
    let steering = [
        "ip rule del priority 3731",
        "ip -6 rule del priority 3731",
        "ip rule del priority 3700",
        "ip rule flush protocol 112; ip -6 rule flush protocol 112",
        "ip route flush table 7376750",
        "ip -6 route flush table 7376750",
        "ip route del default dev pvpn0 table 7376750",
        "ip addr flush dev pvpn0",
        "ip link set pvpn0 mtu 1400",
        "ip link set pvpn0 down",
    ];
    let firewall = [
        "nft flush ruleset",
        "nft delete table inet proxyvpn",
        "nft delete table netdev proxyvpn",
        "nft flush chain inet proxyvpn postrouting",
        "nft insert rule inet proxyvpn postrouting accept",
    ];
    let world = World::new();
    count(&world);
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let desired = desired();
        let mut watch = network.watch().unwrap();
        let _traffic = Traffic::begin();
        let until = Instant::now() + Duration::from_secs(5);
        while counted(&world).contains(&0) {
            assert!(Instant::now() < until, "the detector does not see what leaves: {:?}", counted(&world));
        }
        let _fds = connect(&mut network, &desired).await;
        let whole = snapshot();
        let mut times = vec![];
        for command in steering {
            let before = counted(&world);
            let took = repaired(&mut network, &mut watch, &desired, command).await;
            assert_eq!(counted(&world), before, "{command}: something left");
            same(&whole, command);
            times.push((took, command));
        }
        for command in firewall {
            let before = counted(&world);
            let took = repaired(&mut network, &mut watch, &desired, command).await;
            let after = counted(&world);
            assert_eq!(after[0], before[0], "{command}: TCP left");
            eprintln!("{command}: {} UDP and {} ICMP packets left", after[1] - before[1], after[2] - before[2]);
            same(&whole, command);
            times.push((took, command));
        }
        for (took, command) in &times {
            eprintln!("put back {:5.1} ms after the begin of: {command}", took.as_secs_f64() * 1e3);
            assert!(*took < BOUND, "{command}: {took:?}");
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn our_own_changes_and_those_of_others_elsewhere_cost_no_endless_looks() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let desired = desired();
        let mut watch = network.watch().unwrap();
        let _fds = connect(&mut network, &desired).await;
        let looks = async |network: &mut Network, watch: &mut Watch, span: Duration| {
            let mut looks = 0;
            let _ = timeout(span, keep(network, watch, &desired, |_| looks += 1)).await;
            looks
        };
        let after = looks(&mut network, &mut watch, Duration::from_secs(2)).await;
        assert!((1..=4).contains(&after), "{after} looks after our own changes");
        assert_eq!(looks(&mut network, &mut watch, Duration::from_secs(2)).await, 0, "and then there is quiet");
        assert!(repaired(&mut network, &mut watch, &desired, "ip rule del priority 3731").await < BOUND);
        let after = looks(&mut network, &mut watch, Duration::from_secs(1)).await;
        assert!(after <= 1, "{after} looks after a repair");
        assert_eq!(looks(&mut network, &mut watch, Duration::from_secs(1)).await, 0, "and then there is quiet");

        // A route daemon and a firewall daemon: a thousand changes per second each, in their own tables and in main.
        let noise = "ip link add noise0 type dummy 2>/dev/null || ip link add noise0 type veth peer name noise1
            ip link set noise0 up; sleep 1.5
            for i in $(seq 0 2999); do t=$((i % 2 ? 100 : 254)); echo route add 10.77.$((i / 250)).$((i % 250))/32 dev noise0 table $t; done >$0.r
            for i in $(seq 0 1999); do echo \"add rule ip noise c counter\"; done >$0.n
            nft add table ip noise; nft add chain ip noise c
            ip -batch $0.r & split -l 20 $0.n $0.n.; for f in $0.n.*; do nft -f $f; done; wait; rm -f $0.*";
        let script = world.state.join("noise").display().to_string();
        let damage = tokio::task::spawn_blocking(move || sh(&format!("sh -euc '{noise}' {script}")));
        let (mut count, mut busy, began) = (0_u32, Duration::ZERO, Instant::now());
        let keeping = async {
            loop {
                watch.changed().await;
                let begin = Instant::now();
                let look = network.look(&desired).await.unwrap();
                watch.looked(begin, !look.put_back.is_empty());
                (count, busy) = (count + 1, busy + begin.elapsed());
            }
        };
        tokio::select! {
            () = keeping => {}
            done = damage => drop(done.unwrap()),
        }
        let span = began.elapsed();
        eprintln!("{count} looks of {busy:?} altogether while others made 5,000 changes in {span:?}");
        assert!(count < 12, "{count} looks at what is no concern of ours");
        assert!(repaired(&mut network, &mut watch, &desired, "ip rule del priority 3731").await < BOUND);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn an_uplink_that_comes_goes_or_is_renamed_is_taken_in() {
    let world = World::new();
    world.host.run_async(async || {
        sh("echo 1 > /proc/sys/net/ipv4/conf/default/rp_filter");
        let mut network = open(&world.state).await;
        let desired = desired();
        let mut watch = network.watch().unwrap();
        let _fds = connect(&mut network, &desired).await;
        let steps: [(&str, &[&str], &[&str]); 4] = [
            (
                "ip link add up1 type veth peer name far1; ip link set up1 up; ip link set far1 up; ip addr add 198.18.1.1/24 dev up1
                 ip route add default via 198.18.1.2 metric 50",
                &["up0", "up1"],
                &[],
            ),
            ("ip link set up1 down; ip link set up1 name wan7; ip link set wan7 up", &["up0", "wan7"], &["up1"]),
            ("ip link del wan7", &["up0"], &["wan7", "up1"]),
            ("ip link set up0 down; ip link set up0 up", &["up0"], &[]),
        ];
        for (command, there, gone) in steps {
            let command = command.to_owned();
            let begun = Instant::now();
            let damage = tokio::task::spawn_blocking({
                let command = command.clone();
                move || sh(&command)
            });
            let settled = || {
                let rules = sh("nft list tables | grep -q 'netdev proxyvpn' && nft list table netdev proxyvpn || true");
                let named = |name: &&&str| rules.contains(&format!("device \"{name}\"")) || rules.contains(&format!("device {name}"));
                let marked = |name: &&&str| {
                    let path = format!("/proc/sys/net/ipv4/conf/{name}/src_valid_mark");
                    **name == "up0" || std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "112")
                };
                there.iter().all(|name| named(&name) && marked(&name)) && !gone.iter().any(|name| named(&name))
            };
            let mut errors = vec![];
            let keeping = keep(&mut network, &mut watch, &desired, |look| {
                errors.extend(look.errors.iter().map(ToString::to_string));
            });
            let end = async {
                damage.await.unwrap();
                while !settled() && begun.elapsed() < BOUND * 3 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::select! {
                () = keeping => {}
                () = end => {}
            }
            let rules = sh("nft list table netdev proxyvpn");
            assert!(settled(), "{command}: {rules}");
            eprintln!("taken in {:?} after the begin of: {command}; errors: {errors:?}", begun.elapsed());
        }
        let _ = timeout(Duration::from_secs(1), keep(&mut network, &mut watch, &desired, |_| {})).await;
        let codes: Vec<&str> = network.look(&desired).await.unwrap().findings.iter().map(|found| found.code).collect();
        assert!(!codes.contains(&"firewall-missing") && !codes.contains(&"steering-changed"), "{codes:?}");
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_fight_is_bounded_and_told() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let desired = desired();
        let mut watch = network.watch().unwrap();
        let _fds = connect(&mut network, &desired).await;
        let script = "end=$(($(date +%s) + 6)); while [ $(date +%s) -lt $end ]; do ip rule del priority 3731 2>/dev/null || true; done";
        let fight = tokio::task::spawn_blocking(move || sh(script));
        let (mut looks, mut contested) = (0, false);
        let keeping = async {
            loop {
                watch.changed().await;
                let began = Instant::now();
                let look = network.look(&desired).await.unwrap();
                watch.looked(began, !look.put_back.is_empty());
                looks += 1;
                contested |= watch.contested();
            }
        };
        tokio::select! {
            () = keeping => {}
            done = fight => drop(done.unwrap()),
        }
        eprintln!("{looks} looks in a fight of 6 s");
        assert!(contested && looks < 60, "{looks}");
        // When the other gives up, all is put back.
        let _ = timeout(Duration::from_secs(3), keep(&mut network, &mut watch, &desired, |_| {})).await;
        assert!(snapshot().contains("ipproto tcp lookup 7376750"));
    });
}
