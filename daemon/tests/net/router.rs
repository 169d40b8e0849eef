//! A router behind a TAP device: it gets TCP and DNS, and nothing that it begins gets in.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use proxyvpnd::net::desired::{Control, Desired, Forward, Gateway, MARK, Tunnel};
use proxyvpnd::net::{Owned, Stage};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};

use crate::watching::repaired;
use crate::world::{HOST, Namespace, PEER, World, connect, desired, open, sh, snapshot};

const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 10, 10, 1);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 10, 10, 2);
const ROUTER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const OWN_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const CONTROL: Control = Control { port: 9051, user: 990 };
/// Longer than a refusal takes, shorter than a program's patience.
const AT_ONCE: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_millis(700);

/// The host's device.
pub(crate) fn tunnel(name: &str) -> Tunnel {
    between(name, (OWN, OWN_MAC), (ROUTER, ROUTER_MAC))
}

fn between(name: &str, own: (Ipv4Addr, [u8; 6]), other: (Ipv4Addr, [u8; 6])) -> Tunnel {
    let gateway = Gateway { address: other.0, mac: other.1, own_mac: own.1, control: CONTROL };
    let v4 = ipnet::Ipv4Net::new(own.0, 30).unwrap();
    Tunnel { name: name.to_owned(), v4, v6: None, mtu: 1500, gateway: Some(gateway) }
}

fn routed() -> Desired {
    let mut desired = desired();
    desired.tunnel = Some(tunnel("tap0"));
    desired.guarded = vec![OWN.into()];
    // The router's own network, too.
    desired.exceptions.lan.push("10.0.0.0/8".parse().unwrap());
    desired.exceptions.lan.push("192.0.2.64/26".parse().unwrap());
    desired.exceptions.resolvers = vec![];
    desired.steer_dns = true;
    desired
}

/// The router: a namespace with the other end of the wire. It answers TCP and DNS to any address.
struct Router {
    space: Namespace,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    to_host: Arc<OwnedFd>,
    end: Arc<AtomicBool>,
    wire: Option<JoinHandle<()>>,
}

impl Router {
    /// Behind the host's device.
    fn new(world: &World, host: &OwnedFd) -> Self {
        let space = Namespace::new();
        let other = between("g0", (ROUTER, ROUTER_MAC), (OWN, OWN_MAC));
        let guest =
            space.run_async(async || open(&world.state).await.create_tunnel(&other, 1).await.unwrap().pop().unwrap());
        space.run(|| {
            sh(&format!(
                "nft delete table inet proxyvpn; nft delete table netdev proxyvpn 2>/dev/null || true
                 ip route add {OWN} dev g0; ip route add default via {OWN} dev g0 onlink
                 nft -f - <<'END'
                 table ip router {{
                     chain redirected {{
                         type nat hook prerouting priority dstnat
                         iifname g0 ip daddr {ROUTER} tcp dport 9051 accept
                         iifname g0 meta l4proto tcp redirect to :9095
                         iifname g0 udp dport 53 redirect to :9093
                     }}
                 }}
END"
            ));
            for port in [9095, CONTROL.port] {
                answer(TcpListener::bind(("0.0.0.0", port)).unwrap());
            }
            let dns = UdpSocket::bind("0.0.0.0:9093").unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 1500];
                while let Ok((length, from)) = dns.recv_from(&mut buffer) {
                    let _ = dns.send_to(&buffer[..length], from);
                }
            });
        });
        let (seen, end) = (Arc::new(Mutex::new(vec![])), Arc::new(AtomicBool::new(false)));
        let to_host = Arc::new(host.try_clone().unwrap());
        let wire = {
            let (seen, end, host) = (seen.clone(), end.clone(), to_host.clone());
            std::thread::spawn(move || carry(&host, &guest, &seen, &end))
        };
        Self { space, seen, to_host, end, wire: Some(wire) }
    }

    /// Frames from the host since the last call: MAC addresses and IPv4 source, or what it is instead.
    fn seen(&self) -> BTreeSet<String> {
        std::thread::sleep(Duration::from_millis(20));
        let frames = std::mem::take(&mut *self.seen.lock().unwrap());
        let line = |frame: Vec<u8>| {
            let (to, from, kind) = (&frame[10..16], &frame[16..22], u16::from_be_bytes([frame[22], frame[23]]));
            let ip = &frame[24..];
            match kind {
                0x0800 if to == ROUTER_MAC && from == OWN_MAC => {
                    format!("{} from {}.{}.{}.{}", ip[9], ip[12], ip[13], ip[14], ip[15])
                }
                _ => format!("ethertype {kind:#06x} to {to:02x?} from {from:02x?}"),
            }
        };
        frames.into_iter().map(line).collect()
    }

    /// Puts a frame on the wire to the host.
    fn inject(&self, kind: u16, payload: &[u8]) {
        let header = [&[0; 10], &OWN_MAC[..], &ROUTER_MAC, &kind.to_be_bytes()].concat();
        rustix::io::write(&*self.to_host, &[&header[..], payload].concat()).unwrap();
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(wire) = self.wire.take() {
            wire.join().unwrap();
        }
    }
}

/// Carries frames both ways until the end; one device's virtio headers are the other's.
fn carry(host: &OwnedFd, guest: &OwnedFd, seen: &Mutex<Vec<Vec<u8>>>, end: &AtomicBool) {
    let mut frame = vec![0; 70_000];
    while !end.load(Ordering::Relaxed) {
        let mut fds = [host, guest].map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 })).unwrap();
        while let Ok(length) = rustix::io::read(host, &mut frame) {
            seen.lock().unwrap().push(frame[..length].to_vec());
            let _ = rustix::io::write(guest, &frame[..length]);
        }
        while let Ok(length) = rustix::io::read(guest, &mut frame) {
            let _ = rustix::io::write(host, &frame[..length]);
        }
    }
}

/// Answers each connection with what it says, and closes when the other end does.
fn answer(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 100];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    let _ = stream.write_all(&buffer[..length]);
                }
            });
        }
    });
}

/// Says something over TCP and gets it back; how long that took, or why not.
fn say(to: impl Into<SocketAddr>, mark: Option<u32>) -> Result<(), (ErrorKind, Duration)> {
    let (to, began) = (to.into(), Instant::now());
    let said = || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        mark.map_or(Ok(()), |mark| socket.set_mark(mark))?;
        socket.connect_timeout(&to.into(), PATIENCE)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])
    };
    said().map_err(|error: std::io::Error| (error.kind(), began.elapsed()))
}

/// Asks over UDP, by a connected socket or not, and gives who answers; or why nobody.
fn ask(to: &str, connected: bool) -> Result<SocketAddr, (ErrorKind, Duration)> {
    let (to, began): (SocketAddr, _) = (to.parse().unwrap(), Instant::now());
    let asked = || {
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        if connected {
            socket.connect(to)?;
            socket.send(b"?")?;
        } else {
            socket.send_to(b"?", to)?;
        }
        socket.recv_from(&mut [0; 10]).map(|(_, from)| from)
    };
    asked().map_err(|error: std::io::Error| (error.kind(), began.elapsed()))
}

fn at_once<T: std::fmt::Debug>(result: Result<T, (ErrorKind, Duration)>, name: &str) {
    let (kind, after) = result.expect_err(name);
    assert!(after < AT_ONCE && kind != ErrorKind::WouldBlock, "{name}: {kind:?} after {after:?}");
}

/// Counts what the peer gets from the host on the uplink, but neighbour discovery.
fn uplink(world: &World) -> u64 {
    world.peer.run(|| {
        let text = sh("nft list table inet seen 2>/dev/null || nft -f - <<'END'
            table inet seen { chain seen { type filter hook prerouting priority raw; meta l4proto { tcp, udp, icmp } counter; }; }
END");
        let mut words = text.split_ascii_whitespace();
        words.find(|word| *word == "packets").and_then(|_| words.next()).map_or(0, |count| count.parse().unwrap())
    })
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn tcp_and_dns_go_to_the_router_with_every_reverse_path_filter_and_nothing_else_goes_anywhere() {
    let world = World::new();
    uplink(&world);
    for setting in 0..27 {
        let (all, default, up0) = (setting % 3, setting / 3 % 3, setting / 9);
        let name = format!("rp_filter all={all} default={default} up0={up0}");
        world.host.run_async(async || {
            sh(&format!(
                "cd /proc/sys/net/ipv4/conf; echo {all} > all/rp_filter; echo {default} > default/rp_filter; echo {up0} > up0/rp_filter"
            ));
            let mut network = open(&world.state).await;
            let fds = connect(&mut network, &routed()).await;
            let router = Router::new(&world, &fds[0]);
            router.seen();
            let before = uplink(&world);
            for to in ["203.0.113.9:443", "192.0.2.2:80", "10.10.10.1:9050", "192.0.2.65:53"] {
                assert_eq!(say(to.parse::<SocketAddr>().unwrap(), None), Ok(()), "{name}: {to}");
            }
            assert_eq!(router.seen(), BTreeSet::from([format!("6 from {OWN}")]), "{name}");
            for to in ["9.9.9.9:53", "192.0.2.2:53", "192.0.2.65:53", "10.10.10.1:53"] {
                for connected in [true, false] {
                    let answered = ask(to, connected).map(|from| from.to_string());
                    assert_eq!(answered, Ok(to.to_owned()), "{name}, connected: {connected}");
                }
            }
            assert_eq!(router.seen(), BTreeSet::from([format!("17 from {OWN}")]), "{name}");
            if setting > 2 {
                return;
            }
            for to in ["203.0.113.9:443", "9.9.9.9:54", "192.0.2.2:123", "10.10.10.1:9093"] {
                at_once(ask(to, true), &format!("{name}: UDP to {to}"));
            }
            for to in ["[2001:db8:9::9]:443", "[2001:db8::2]:80"] {
                at_once(say(to.parse::<SocketAddr>().unwrap(), None), &format!("{name}: TCP to {to}"));
            }
            for to in ["[2620:fe::fe]:53", "[2001:db8::2]:53"] {
                at_once(ask(to, false), &format!("{name}: UDP to {to}"));
            }
            // Another address of this machine is not told, whoever insists on it or on the device.
            let bound = sh("/usr/bin/python3 - <<'END'
import socket
for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM:
    for option in 'address', 'device':
        s = socket.socket(socket.AF_INET, kind); s.settimeout(0.7)
        try:
            if option == 'address': s.bind(('192.0.2.1', 0))
            else: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'tap0')
            s.connect(('203.0.113.9', 53 if option == 'address' else 54)); s.send(b'?'); print(s.recv(1))
        except OSError as e: print(e.strerror or e)
END");
            let refused = ["Connection refused", "b'?'", "Operation not permitted", "Operation not permitted"];
            assert_eq!(bound.lines().collect::<Vec<_>>(), refused, "{name}");
            assert_eq!(router.seen(), BTreeSet::from([format!("6 from {OWN}")]), "{name}");
            assert_eq!(uplink(&world), before, "{name}");
            // Anti-test: without rules, routes and firewall all of it is on the uplink.
            sh("nft delete table inet proxyvpn; nft delete table netdev proxyvpn
                for p in 3700 3702 3731; do while ip rule del priority $p 2>/dev/null; do :; done; done");
            for to in ["203.0.113.9:443", "9.9.9.9:53"] {
                ask(to, true).expect_err(to);
            }
            assert!(uplink(&world) > before);
        });
    }
}

/// What the router reaches of the host and through it.
fn begun(router: &Router, port: u16) -> Vec<String> {
    let reached = router.space.run(|| {
        sh(&format!(
            "sysctl -q net.ipv4.conf.g0.route_localnet=1 net.ipv4.conf.all.route_localnet=1
             ip route replace 127.0.0.2 via {OWN} dev g0 onlink
             ip -6 addr replace fe80::1/64 dev g0 nodad; ip -6 neigh replace fe80::2 lladdr 52:54:00:00:00:02 dev g0
             /usr/bin/python3 - <<'END'
import socket, subprocess
def tcp(to, family=socket.AF_INET):
    s = socket.socket(family); s.settimeout(0.2); s.connect(to); s.send(b'?'); return s.recv(1)
def udp(to):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.2); s.connect(to); s.send(b'?'); return s.recv(1)
scope = socket.if_nametoindex('g0')
for name, what in [
    ('host', lambda: tcp(('{OWN}', {port}))), ('uplink', lambda: tcp(('{HOST}', {port}))),
    ('loopback', lambda: tcp(('127.0.0.2', {port}))), ('lan', lambda: tcp(('{PEER}', {port}))),
    ('udp', lambda: udp(('{OWN}', {port}))), ('dns', lambda: udp(('{PEER}', 53))),
    ('ipv6', lambda: tcp(('fe80::2', {port}, 0, scope), socket.AF_INET6)),
]:
    try: what(); print(name)
    except OSError: pass
if not subprocess.call(['ping', '-c1', '-W1', '-q', '{OWN}'], stdout=subprocess.DEVNULL): print('ping')
END"
        ))
    });
    router.seen();
    // Who has an address of the host? (RFC 826)
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1], &ROUTER_MAC[..], &ROUTER.octets(), &[0; 6], &HOST.octets()].concat();
    router.inject(0x0806, &arp);
    let arp = router.seen().iter().any(|line| line.starts_with("ethertype 0x0806"));
    // A router advertisement with a prefix (RFC 4861).
    router.inject(0x86dd, &advertisement());
    std::thread::sleep(Duration::from_millis(50));
    let routes = sh("ip -6 addr show dev tap0; ip -6 route show dev tap0");
    let advertised = routes.contains("2001:db8:bad:") || routes.contains("default");
    let more = [arp.then(|| "arp".to_owned()), advertised.then(|| "advertisement".to_owned())];
    reached.lines().map(ToOwned::to_owned).chain(more.into_iter().flatten()).collect()
}

fn advertisement() -> Vec<u8> {
    let mut icmp = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend([3, 4, 64, 0xc0, 0, 0, 7, 8, 0, 0, 7, 8, 0, 0, 0, 0]);
    icmp.extend([0x20, 1, 0xd, 0xb8, 0xb, 0xad, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let (from, to) =
        ("fe80::1".parse::<std::net::Ipv6Addr>().unwrap(), "ff02::1".parse::<std::net::Ipv6Addr>().unwrap());
    let length = u16::try_from(icmp.len()).unwrap();
    let pseudo = [&from.octets()[..], &to.octets(), &[0, 0], &length.to_be_bytes(), &[0, 0, 0, 58]].concat();
    let sum = crate::steering::checksum(&[&pseudo, &icmp]);
    icmp[2..4].copy_from_slice(&sum);
    let header = [&[0x60, 0, 0, 0], &length.to_be_bytes()[..], &[58, 255], &from.octets(), &to.octets()].concat();
    [header, icmp].concat()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_router_is_kept_out_as_soon_as_there_is_a_device() {
    let world = World::new();
    world.host.run_async(async || {
        answer(TcpListener::bind(("::", 7000)).unwrap());
        let at_peer = world.peer.run(|| {
            let listener = TcpListener::bind((PEER, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            answer(listener);
            port
        });
        for behind_a_block in [false, true] {
            let mut network = open(&world.state).await;
            let wanted = routed();
            if behind_a_block {
                let blocked = Desired { tunnel: None, ..wanted.clone() };
                network.apply(Stage::Firewall, &blocked).await.unwrap();
                network.apply(Stage::Routes, &blocked).await.unwrap();
            }
            let fds = network.create_tunnel(wanted.tunnel.as_ref().unwrap(), 1).await.unwrap();
            if behind_a_block {
                // As the watch has it done.
                network.look(&Desired { tunnel: None, ..wanted.clone() }).await.unwrap();
            }
            let router = Router::new(&world, &fds[0]);
            assert_eq!(begun(&router, 7000), [""; 0], "behind a block: {behind_a_block}");
            // Nothing else has changed: what the block stops, and without one the network is open, in both directions.
            assert_eq!(say((PEER, at_peer), None).is_ok(), !behind_a_block);
            assert_eq!(world.peer.run(|| say((HOST, 7000), None)), Ok(()));
            assert_eq!(router.seen(), BTreeSet::new());
            network.apply(Stage::Firewall, &wanted).await.unwrap();
            network.apply(Stage::Routes, &wanted).await.unwrap();
            assert_eq!(sh("ip route show table 7376750").lines().count(), 2);
            assert_eq!(say((PEER, at_peer), None), Ok(()));
            assert_eq!(world.peer.run(|| say((HOST, 7000), None)), Ok(()));
            assert_eq!(router.seen(), BTreeSet::from([format!("6 from {OWN}")]));
            // What is in force is not opened by the next process.
            drop((router, fds, network));
            let mut network = open(&world.state).await;
            let fds = network.create_tunnel(wanted.tunnel.as_ref().unwrap(), 1).await.unwrap();
            assert!(sh("nft list chain inet proxyvpn postrouting").contains("policy drop"));
            drop(fds);
            assert!(network.clean_up(Owned::Unexpected).await.errors.is_empty());
            assert_eq!(sh("nft list tables"), "");
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn nothing_that_the_router_begins_gets_in() {
    let world = World::new();
    world.peer.run(|| answer(TcpListener::bind(("0.0.0.0", 7000)).unwrap()));
    world.host.run(|| {
        answer(TcpListener::bind(("::", 7000)).unwrap());
        let udp = UdpSocket::bind("0.0.0.0:7000").unwrap();
        std::thread::spawn(move || {
            while let Ok((_, from)) = udp.recv_from(&mut [0; 10]) {
                let _ = udp.send_to(b"!", from);
            }
        });
        sh("sysctl -q net.ipv4.ip_forward=1; sysctl -q net.ipv6.conf.all.forwarding=0");
    });
    for combination in 0..8 {
        let mut wanted = routed();
        (wanted.killswitch, wanted.inbound_replies) = (combination & 1 == 0, combination & 2 == 0);
        let blocked = combination & 4 != 0;
        let name = format!("{} {} {blocked}", wanted.killswitch, wanted.inbound_replies);
        world.host.run_async(async || {
            let mut network = open(&world.state).await;
            let fds = connect(&mut network, &wanted).await;
            if blocked {
                // As when the daemon starts anew: the block comes before anything is known of the router.
                let none = Desired { tunnel: None, ..wanted.clone() };
                network.apply(Stage::Firewall, &none).await.unwrap();
                network.apply(Stage::Routes, &none).await.unwrap();
            }
            let router = Router::new(&world, &fds[0]);
            assert_eq!(begun(&router, 7000), [""; 0], "{name}");
            if ![0, 7].contains(&combination) {
                return;
            }
            // Anti-test: without our rules it reaches what the machine offers.
            sh("nft delete table inet proxyvpn; ip link set tap0 arp on; sysctl -q net.ipv4.conf.all.route_localnet=1
                ip -6 addr add fe80::2/64 dev tap0 nodad
                ip neigh replace 10.10.10.1 lladdr 52:54:00:00:00:01 dev tap0; ip -6 neigh replace fe80::1 lladdr 52:54:00:00:00:01 dev tap0
                ip route replace {ROUTER} dev tap0
                ip rule add to 10.10.10.1 lookup main priority 1"
                .replace("{ROUTER}", "10.10.10.1")
                .as_str());
            let open = begun(&router, 7000).join(" ");
            for what in ["host", "uplink", "udp", "ipv6", "ping", "arp", "advertisement"] {
                assert!(open.contains(what), "{name}: {open}");
            }
            sh("ip rule del priority 1; sysctl -q net.ipv4.conf.all.route_localnet=0");
        });
    }
}

/// Connects as a local user, says something and closes; or how long it took to fail.
fn as_user(user: u32, to: &str, port: u16) -> String {
    sh(&format!(
        "setpriv --reuid {user} --regid {user} --clear-groups /usr/bin/python3 - <<'END'
import socket, time
began = time.monotonic()
try:
    s = socket.create_connection(('{to}', {port}), 0.7); s.send(b'?'); assert s.recv(1) == b'?'
    s.close(); print('answered')
except OSError as e: print('refused at once' if time.monotonic() - began < 0.3 else 'timed out')
END"
    ))
    .trim()
    .to_owned()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_control_port_is_for_one_user() {
    let world = World::new();
    for killswitch in [true, false] {
        world.host.run_async(async || {
            let mut network = open(&world.state).await;
            let wanted = Desired { killswitch, ..routed() };
            let fds = connect(&mut network, &wanted).await;
            let router = Router::new(&world, &fds[0]);
            let (to, port) = (ROUTER.to_string(), CONTROL.port);
            assert_eq!(as_user(CONTROL.user, &to, port), "answered", "{killswitch}");
            for other in [0, 13, 991] {
                assert_eq!(as_user(other, &to, port), "refused at once", "{killswitch}: {other}");
                assert_eq!(as_user(other, &to, 9050), "answered", "{killswitch}: {other}");
            }
            // The last segments come when no program holds the socket any more.
            std::thread::sleep(Duration::from_millis(100));
            let left = router.space.run(|| sh("ss -Hatn exclude listening exclude time-wait sport = :9051"));
            assert_eq!(left, "", "{killswitch}");
            // Anti-test.
            sh("nft flush chain inet proxyvpn filter_output; nft flush chain inet proxyvpn postrouting 2>/dev/null || true
                nft 'chain inet proxyvpn postrouting { policy accept; }' 2>/dev/null || true");
            assert_eq!(as_user(991, &to, port), "answered");
            drop((router, fds));
            network.clean_up(Owned::Unexpected).await;
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn marked_sockets_do_not_reach_this_machine() {
    let world = World::new();
    world.host.run_async(async || {
        for port in [7000, 7001] {
            answer(TcpListener::bind(("0.0.0.0", port)).unwrap());
        }
        let mut network = open(&world.state).await;
        let mut wanted = routed();
        wanted.exceptions.services = vec![([127, 0, 0, 1], 7001).into()];
        for killswitch in [true, false] {
            wanted.killswitch = killswitch;
            let fds = connect(&mut network, &wanted).await;
            let router = Router::new(&world, &fds[0]);
            for to in [[127, 0, 0, 1], [192, 0, 2, 1], [10, 10, 10, 2]] {
                assert!(say((to, 7000), Some(MARK)).is_err(), "{to:?}");
                assert_eq!(say((to, 7000), None), Ok(()), "{to:?}");
            }
            assert_eq!(say(([127, 0, 0, 1], 7001), Some(MARK)), Ok(()));
            assert!(say(([192, 0, 2, 1], 7001), Some(MARK)).is_err());
            // A user with an exception keeps the local services, though the connection's later segments are marked.
            assert_eq!(as_user(13, "127.0.0.1", 7000), "answered");
            router.seen();
            assert!(say((ROUTER, 9050), Some(MARK)).is_err());
            assert_eq!(router.seen(), BTreeSet::new(), "marked sockets do not reach the router");
            // Anti-test: with a device that takes every packet itself the daemon may.
            drop((router, fds));
            network.clean_up(Owned::Unexpected).await;
            let fds = connect(&mut network, &Desired { killswitch, ..desired() }).await;
            assert_eq!(say(([127, 0, 0, 1], 7000), Some(MARK)), Ok(()));
            drop(fds);
            network.clean_up(Owned::Unexpected).await;
        }
    });
}

/// A datagram by an unconnected socket, as the engine sends a guest's; who answers.
fn datagram(to: SocketAddr, mark: Option<u32>) -> Result<SocketAddr, ErrorKind> {
    let sent = || {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        mark.map_or(Ok(()), |mark| socket.set_mark(mark))?;
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(b"?", to)?;
        socket.recv_from(&mut [0; 10]).map(|(_, from)| from)
    };
    sent().map_err(|error: std::io::Error| error.kind())
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn marked_datagrams_leave_and_are_answered_with_every_reverse_path_filter_and_no_others() {
    let world = World::new();
    let servers: [SocketAddr; 2] = [(PEER, 3478).into(), ([203, 0, 113, 9], 50_000).into()];
    world.peer.run(|| {
        sh("ip addr add 203.0.113.9/32 dev lo");
        for server in servers {
            let socket = UdpSocket::bind(server).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 10];
                while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..length], from);
                }
            });
        }
    });
    world.host.run_async(async || {
        for (filter, killswitch) in [0, 1, 2].into_iter().flat_map(|filter| [(filter, true), (filter, false)]) {
            let name = format!("rp_filter={filter} killswitch={killswitch}");
            sh(&format!("cd /proc/sys/net/ipv4/conf; for v in all default up0; do echo {filter} > $v/rp_filter; done"));
            let mut network = open(&world.state).await;
            let fds = connect(&mut network, &Desired { killswitch, ..routed() }).await;
            let router = Router::new(&world, &fds[0]);
            router.seen();
            for server in servers {
                assert_eq!(datagram(server, Some(MARK)), Ok(server), "{name}");
                // Without the kill switch UDP that is not DNS goes its own way.
                assert_eq!(datagram(server, None).is_ok(), !killswitch, "{name}: {server} without the mark");
            }
            let own: SocketAddr = (HOST, 3478).into();
            let listener = UdpSocket::bind(own).unwrap();
            listener.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            datagram(own, Some(MARK)).unwrap_err();
            assert!(listener.recv_from(&mut [0; 10]).is_err(), "{name}: this machine was reached");
            assert_eq!(router.seen(), BTreeSet::new(), "{name}");
            drop((router, fds));
            network.clean_up(Owned::Unexpected).await;
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_others_change_of_the_device_is_put_back() {
    let world = World::new();
    world.host.run_async(async || {
        let untouched = snapshot();
        let mut network = open(&world.state).await;
        let wanted = routed();
        let fds = connect(&mut network, &wanted).await;
        let link = sh("ip -d link show tap0; ip neigh show dev tap0; ip route show table all dev tap0");
        for part in [
            "NOARP", "52:54:00:00:00:02", "mtu 1500", "tun type tap pi off vnet_hdr on", "alias proxyvpn", "addrgenmode none",
            "10.10.10.1 lladdr 52:54:00:00:00:01 PERMANENT", "default via 10.10.10.1 table 7376750 proto 112 metric 1 onlink",
        ] {
            assert!(link.contains(part), "{part} is not in {link}");
        }
        assert!(!link.contains("MULTICAST") && !sh("ip -6 addr show tap0").contains("inet6"), "{link}");
        let mut watch = network.watch().unwrap();
        // The first look tells the watch which device it is.
        network.look(&wanted).await.unwrap();
        let before = snapshot();
        for damage in [
            "ip neigh del 10.10.10.1 dev tap0",
            "ip neigh replace 10.10.10.1 lladdr 52:54:00:00:00:09 dev tap0 nud reachable",
            "ip link set tap0 address 52:54:00:00:00:07",
            "ip link set tap0 arp on",
            "ip link set tap0 mtu 1400",
            "ip addr flush dev tap0",
            "ip route flush table 7376750",
            "while ip rule del priority 3700 2>/dev/null; do :; done; while ip rule del priority 3731 2>/dev/null; do :; done",
            "ip link set tap0 down; ip neigh flush dev tap0 nud all",
            "nft delete table inet proxyvpn",
        ] {
            let took = repaired(&mut network, &mut watch, &wanted, damage).await;
            assert!(took < Duration::from_secs(1), "{damage}: {took:?}");
            let (now, same) = (snapshot(), |text: &str| text.lines().map(ToOwned::to_owned).collect::<BTreeSet<String>>());
            let differences: Vec<_> = same(&before).symmetric_difference(&same(&now)).cloned().collect();
            assert_eq!(differences, [""; 0], "{damage}");
            let neighbour = sh("ip neigh show dev tap0");
            assert_eq!(neighbour.trim(), "10.10.10.1 lladdr 52:54:00:00:00:01 PERMANENT", "{damage}");
        }
        // What can't be put back is found.
        for gone in ["ip link set tap0 name gone0 2>/dev/null || { ip link set tap0 down; ip link set tap0 name gone0; }", "ip link del gone0"] {
            sh(gone);
            assert!(!network.has_tunnel(wanted.tunnel.as_ref().unwrap(), 1).await.unwrap());
            let found = network.health(&wanted).await.unwrap();
            assert!(found.iter().any(|finding| finding.code == "tunnel-missing"), "{gone}: {found:?}");
        }
        drop(fds);
        assert!(network.clean_up(Owned::Unexpected).await.errors.is_empty());
        assert_eq!(snapshot(), untouched);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_a_router_nothing_has_a_way() {
    let world = World::new();
    uplink(&world);
    world.host.run_async(async || {
        for (killswitch, held) in [(true, false), (true, true), (false, false)] {
            let name = format!("kill switch: {killswitch}, held: {held}");
            let mut network = open(&world.state).await;
            let wanted = Desired { killswitch, ..routed() };
            let blocked = Desired { tunnel: None, ..wanted.clone() };
            let fds = connect(&mut network, &wanted).await;
            // The device goes first, as when somebody removes it.
            for closed in [false, true] {
                if closed {
                    network.apply(Stage::Firewall, &blocked).await.unwrap();
                    network.apply(Stage::Routes, &blocked).await.unwrap();
                } else {
                    sh("ip link del tap0");
                }
                let placeholder = if closed && held {
                    let placeholder = network.hold(wanted.tunnel.as_ref().unwrap()).await.unwrap();
                    network.apply(Stage::Routes, &blocked).await.unwrap();
                    assert!(sh("ip route show table 7376750").contains("dev tap0"), "{name}");
                    placeholder
                } else {
                    vec![]
                };
                let before = uplink(&world);
                for to in ["203.0.113.9:443", "[2001:db8:9::9]:443", "9.9.9.9:53"] {
                    at_once(say(to.parse::<SocketAddr>().unwrap(), None), &format!("{name}, {closed}: TCP to {to}"));
                }
                for to in ["9.9.9.9:53", "192.0.2.65:53", "[2001:db8:9::9]:53"] {
                    at_once(ask(to, true), &format!("{name}, {closed}: UDP to {to}"));
                }
                assert_eq!(uplink(&world), before, "{name}, {closed}");
                let mut frame = vec![0; 70_000];
                let waiting = placeholder.iter().any(|fd| rustix::io::read(fd, &mut frame).is_ok());
                assert!(!waiting, "{name}: nothing is in the placeholder");
            }
            // Anti-test: without the rules DNS leaves.
            sh("nft delete table inet proxyvpn; nft delete table netdev proxyvpn 2>/dev/null || true; ip rule del priority 3702; ip rule del priority 3702");
            let before = uplink(&world);
            ask("9.9.9.9:53", true).unwrap_err();
            assert!(uplink(&world) > before, "{name}");
            drop(fds);
            network.clean_up(Owned::Unexpected).await;
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_containers_send_goes_to_the_router_as_the_profile_says() {
    let world = World::new();
    let container = Namespace::new();
    let pid = container.pid();
    world.host.run(|| {
        sh(&format!(
            "ip link add ct0 type veth peer name eth0 netns {pid}; ip addr add 10.9.0.1/24 dev ct0; ip link set ct0 up
             sysctl -q net.ipv4.ip_forward=1"
        ))
    });
    container.run(|| sh("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; ip route add default via 10.9.0.1"));
    world.host.run_async(async || {
        for (forward, nat) in [(Forward::Tunnel, true), (Forward::Tunnel, false), (Forward::Block, true)] {
            let mut network = open(&world.state).await;
            let mut wanted = Desired { forward, ..routed() };
            wanted.exceptions.lan.clear();
            let fds = connect(&mut network, &wanted).await;
            let router = Router::new(&world, &fds[0]);
            if nat {
                sh("nft 'table ip others { chain nat { type nat hook postrouting priority srcnat; ip saddr 10.9.0.0/24 masquerade; }; }'");
            }
            router.seen();
            let passes = forward == Forward::Tunnel && nat;
            let (tcp, dns, control, udp) = container.run(|| {
                let to = |address: [u8; 4], port: u16| SocketAddr::from((address, port));
                (say(to([203, 0, 113, 9], 443), None), ask("9.9.9.9:53", true), say((ROUTER, 9051), None), ask("9.9.9.9:54", true))
            });
            assert_eq!((tcp.is_ok(), dns.is_ok()), (passes, passes), "{forward:?} {nat}: {tcp:?} {dns:?}");
            assert!(control.is_err() && udp.is_err(), "{forward:?} {nat}");
            let seen = router.seen();
            let want = if passes { BTreeSet::from([6, 17].map(|kind| format!("{kind} from {OWN}"))) } else { BTreeSet::new() };
            assert_eq!(seen, want, "{forward:?} {nat}");
            sh("nft delete table ip others 2>/dev/null || true");
            drop((router, fds));
            network.clean_up(Owned::Unexpected).await;
        }
    });
}
