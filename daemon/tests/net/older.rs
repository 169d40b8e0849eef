//! Connections from before: those that may not go on are ended, and nothing of that is seen outside.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proxyvpnd::net::Stage;
use proxyvpnd::net::desired::{Desired, MARK, Tunnel};
use rustix::fs::{Gid, Uid, fchown};
use socket2::{Domain, Socket, Type};

use crate::world::{HOST, HOST6, PEER, PEER6, World, connect, desired, open, sh};

const RESOLVER: &str = "198.51.100.53";
const LAN: &str = "10.1.0.9";
/// Long enough for what the kernel does at once.
const SOON: Duration = Duration::from_millis(150);

/// A connection of the host to a socket that listens in the peer.
struct Pair {
    name: &'static str,
    host: Socket,
    peer: Option<TcpStream>,
}

/// Both ends of a connection to `to`, prepared before it is opened.
fn tcp(world: &World, name: &'static str, to: &str, prepare: impl Fn(&Socket) -> std::io::Result<()>) -> Pair {
    let listener = world.peer.run(|| TcpListener::bind(to).unwrap());
    let to = listener.local_addr().unwrap();
    let host = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    prepare(&host).unwrap();
    host.connect(&to.into()).unwrap();
    Pair { name, host, peer: Some(listener.accept().unwrap().0) }
}

fn udp(name: &'static str, to: &str, prepare: impl Fn(&Socket) -> std::io::Result<()>) -> Pair {
    let to: SocketAddr = to.parse().unwrap();
    let host = Socket::new(Domain::for_address(to), Type::DGRAM, None).unwrap();
    prepare(&host).unwrap();
    host.connect(&to.into()).unwrap();
    Pair { name, host, peer: None }
}

fn plain(_: &Socket) -> std::io::Result<()> {
    Ok(())
}

/// What a program sees that waits for an answer.
fn told(socket: &Socket) -> ErrorKind {
    socket.set_read_timeout(Some(SOON)).unwrap();
    (&mut &*socket).read(&mut [0]).map_or_else(|error| error.kind(), |_| ErrorKind::UnexpectedEof)
}

/// Whether the other side has been told anything.
fn silent(peer: &TcpStream) -> bool {
    peer.set_read_timeout(Some(SOON)).unwrap();
    (&mut &*peer).read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

fn addresses(world: &World) {
    world.peer.run(|| {
        sh(&format!("ip addr add {RESOLVER}/32 dev lo; ip addr add {LAN}/32 dev lo; ip addr add 203.0.113.9/32 dev lo"))
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_may_not_go_on_is_ended_and_the_rest_stays() {
    for killswitch in [true, false] {
        let world = World::new();
        addresses(&world);
        world.host.run_async(async || {
            let own = TcpListener::bind((HOST, 0)).unwrap();
            let to_own = TcpStream::connect(own.local_addr().unwrap()).unwrap();
            let inbound = TcpListener::bind("[::]:0").unwrap();
            let port = inbound.local_addr().unwrap().port();
            let outside = world.peer.run(|| {
                [SocketAddr::from((HOST, port)), SocketAddr::new(HOST6.parse().unwrap(), port)]
                    .map(|to| TcpStream::connect(to).unwrap())
            });
            let accepted = [inbound.accept().unwrap().0, inbound.accept().unwrap().0];
            let user = |socket: &Socket| {
                fchown(socket.as_fd(), Some(Uid::from_raw(13)), Some(Gid::from_raw(13))).map_err(Into::into)
            };
            // A program that listens on the port that it connects from.
            let both = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            both.set_reuse_port(true).unwrap();
            both.bind(&SocketAddr::from((HOST, 4001)).into()).unwrap();
            both.listen(1).unwrap();
            let listening = |socket: &Socket| {
                socket.set_reuse_port(true)?;
                socket.bind(&SocketAddr::from((HOST, 4001)).into())
            };
            // The port of a socket that listens elsewhere.
            let elsewhere = TcpListener::bind("127.0.0.1:4002").unwrap();
            let mapped = |to: &str| format!("[::ffff:{to}]:0");
            let ended = [
                tcp(&world, "tcp", "203.0.113.9:0", plain),
                tcp(&world, "tcp, on-link", &format!("{PEER}:0"), plain),
                tcp(&world, "tcp, IPv6", &format!("[{PEER6}]:0"), plain),
                tcp(&world, "tcp, bound", &format!("{PEER}:0"), |s| s.bind_device(Some(b"up0"))),
                tcp(&world, "tcp with another mark", &format!("{PEER}:0"), |s| s.set_mark(MARK + 1)),
                tcp(&world, "tcp to another port of a resolver", &format!("{RESOLVER}:853"), plain),
                tcp(&world, "tcp of an IPv6 socket to IPv4", &mapped(&PEER.to_string()), plain),
                tcp(&world, "tcp from a port that listens", &format!("{PEER}:0"), listening),
                tcp(&world, "tcp from a port that listens elsewhere", &format!("{PEER}:0"), |s| {
                    s.bind(&SocketAddr::from((HOST, 4002)).into())
                }),
            ];
            let half = tcp(&world, "tcp that the other side has closed", &format!("{PEER}:0"), plain);
            half.peer.as_ref().unwrap().shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(told(&half.host), ErrorKind::UnexpectedEof);
            let datagrams = [
                udp("udp", "203.0.113.9:443", plain),
                udp("udp, IPv6", &format!("[{PEER6}]:443"), plain),
                udp("udp of an IPv6 socket to IPv4", "[::ffff:203.0.113.9]:443", plain),
                udp("udp to another port of a resolver", &format!("{RESOLVER}:54"), plain),
                udp("udp, bound", "203.0.113.9:443", |s| s.bind_device(Some(b"up0"))),
            ];
            let kept = [
                tcp(&world, "tcp with our mark", &format!("{PEER}:0"), |s| s.set_mark(MARK)),
                tcp(&world, "tcp of a user", &format!("{PEER}:0"), user),
                tcp(&world, "tcp to the LAN", &format!("{LAN}:0"), plain),
                tcp(&world, "dns over tcp", &format!("{RESOLVER}:53"), plain),
            ];
            let kept_datagrams = [
                udp("udp with our mark", "203.0.113.9:443", |s| s.set_mark(MARK)),
                udp("udp of a user", "203.0.113.9:443", user),
                udp("udp to the LAN", &format!("{LAN}:9"), plain),
                udp("dns", &format!("{RESOLVER}:53"), plain),
                udp("dhcp", &format!("{PEER}:67"), |s| s.bind(&SocketAddr::from((HOST, 68)).into())),
                udp("to this machine", &format!("{HOST}:9"), plain),
            ];
            // One that nobody answers.
            world.peer.run(|| sh("ip route add blackhole 203.0.113.200"));
            let opening = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            opening.set_nonblocking(true).unwrap();
            let _ = opening.connect(&"203.0.113.200:9".parse::<SocketAddr>().unwrap().into());

            let mut network = open(&world.state).await;
            let desired = Desired { killswitch, ..desired() };
            let _fds = connect(&mut network, &desired).await;
            // Through the tunnel: on a device of ours, but nobody answers on it.
            let tunnelled = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            tunnelled.set_nonblocking(true).unwrap();
            let _ = tunnelled.connect(&"203.0.113.9:80".parse::<SocketAddr>().unwrap().into());

            let start = Instant::now();
            network.end_older(&desired).await;
            let took = start.elapsed();
            assert!(took < Duration::from_secs(1), "{took:?}");
            assert_eq!(opening.take_error().unwrap().map(|e| e.kind()), Some(ErrorKind::ConnectionAborted));
            assert_eq!(tunnelled.take_error().unwrap().map(|e| e.kind()), None, "in the tunnel");
            for pair in &ended {
                assert_eq!(told(&pair.host), ErrorKind::ConnectionAborted, "{}, {killswitch}", pair.name);
            }
            assert_eq!(half.host.take_error().unwrap().map(|e| e.kind()), Some(ErrorKind::ConnectionAborted));
            for pair in &datagrams {
                let expected = if killswitch { ErrorKind::ConnectionAborted } else { ErrorKind::WouldBlock };
                assert_eq!(told(&pair.host), expected, "{}, {killswitch}", pair.name);
            }
            for pair in kept.iter().chain(&kept_datagrams) {
                assert_eq!(told(&pair.host), ErrorKind::WouldBlock, "{}, {killswitch}", pair.name);
            }
            // What the kernel sends for an ended connection does not leave. Only the firewall holds what is bound to a device.
            for pair in ended.iter().filter(|pair| killswitch || pair.name != "tcp, bound") {
                assert!(silent(pair.peer.as_ref().unwrap()), "{}, {killswitch}: the other side was told", pair.name);
            }
            for (mut client, mut server) in outside.into_iter().zip(accepted) {
                server.write_all(b"x").unwrap();
                client.set_read_timeout(Some(SOON)).unwrap();
                client.read_exact(&mut [0]).expect("a connection from outside");
            }
            assert!(to_own.take_error().unwrap().is_none());
            drop((own, both, elsewhere));
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_the_rules_the_other_side_would_be_told() {
    let world = World::new();
    world.host.run_async(async || {
        let pair = tcp(&world, "tcp", &format!("{PEER}:0"), plain);
        let network = open(&world.state).await;
        network.end_older(&desired()).await;
        assert_eq!(told(&pair.host), ErrorKind::ConnectionAborted);
        let peer = pair.peer.unwrap();
        peer.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!((&mut &peer).read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_inbound_replies_connections_from_outside_end() {
    let world = World::new();
    world.host.run_async(async || {
        let listener = TcpListener::bind((HOST, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let _client = world.peer.run(|| TcpStream::connect(to).unwrap());
        let server = Socket::from(listener.accept().unwrap().0);
        let mut network = open(&world.state).await;
        let mut desired = desired();
        let _fds = connect(&mut network, &desired).await;
        network.end_older(&desired).await;
        assert_eq!(told(&server), ErrorKind::WouldBlock);
        desired.inbound_replies = false;
        network.apply(Stage::Firewall, &desired).await.unwrap();
        network.end_older(&desired).await;
        assert_eq!(told(&server), ErrorKind::ConnectionAborted);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_clean_up_ends_what_went_through_the_tunnel_and_tells_nobody() {
    for (killswitch, held) in [(true, true), (true, false), (false, true), (false, false)] {
        let world = World::new();
        world.host.run_async(async || {
            let listener = TcpListener::bind((HOST, 0)).unwrap();
            let others = Socket::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            let mut network = open(&world.state).await;
            let desired = Desired { killswitch, ..desired() };
            let fds = network.create_tunnel(desired.tunnel.as_ref().unwrap(), 1).await.unwrap();
            // Before there are rules, so that a peer is there who would hear of the end.
            let from = |address: &'static str| {
                move |socket: &Socket| socket.bind(&address.parse::<SocketAddr>().unwrap().into())
            };
            let tunnelled = [
                tcp(&world, "IPv4", &format!("{PEER}:0"), from("10.255.255.1:0")),
                tcp(&world, "IPv6", &format!("[{PEER6}]:0"), from("[fd70:7670:6e::1]:0")),
            ];
            network.apply(Stage::Firewall, &desired).await.unwrap();
            network.apply(Stage::Routes, &desired).await.unwrap();
            // Half of the time the engine still holds the device.
            let fds = held.then_some(fds);
            let done = network.clean_up(proxyvpnd::net::Owned::Unexpected).await;
            assert!(done.errors.is_empty(), "{:?}", done.errors);
            for Pair { name, host, peer } in tunnelled {
                assert_eq!(told(&host), ErrorKind::ConnectionAborted, "{name}, {killswitch}, {held}");
                assert!(silent(&peer.unwrap()), "{name}, {killswitch}, {held}: the other side was told");
            }
            assert_eq!(told(&others), ErrorKind::WouldBlock);
            drop(fds);
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_is_opened_while_the_tunnel_goes_is_ended_with_it() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        // Several times: it has to meet the right moment.
        for killswitch in [true, false].repeat(6) {
            let desired = Desired { killswitch, ..desired() };
            let fds = connect(&mut network, &desired).await;
            let begin = |to: &str| {
                let to: SocketAddr = to.parse().unwrap();
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
                socket.set_nonblocking(true).unwrap();
                let _ = socket.connect(&to.into());
                socket
            };
            let tunnel: Vec<IpAddr> = desired.tunnel.iter().flat_map(Tunnel::addresses).collect();
            let tunnelled = |socket: &Socket| {
                let local = socket.local_addr().unwrap().as_socket();
                local.is_some_and(|local| tunnel.contains(&local.ip()))
            };
            let mut open: Vec<_> =
                ["203.0.113.9:80", "[2001:db8:9::9]:80"].repeat(4).into_iter().map(|to| (to, begin(to))).collect();
            assert!(open.iter().all(|(_, socket)| tunnelled(socket)));
            let end = Arc::new(AtomicBool::new(false));
            // A program that connects again as soon as it is told.
            let program = {
                let end = Arc::clone(&end);
                std::thread::spawn(move || {
                    while !end.load(Ordering::Relaxed) {
                        for (to, socket) in &mut open {
                            if socket.take_error().unwrap().is_some() {
                                *socket = begin(to);
                            }
                        }
                        std::thread::yield_now();
                    }
                    open
                })
            };
            let done = network.clean_up(proxyvpnd::net::Owned::Unexpected).await;
            assert!(done.errors.is_empty(), "{:?}", done.errors);
            end.store(true, Ordering::Relaxed);
            for (to, socket) in program.join().unwrap() {
                let waits = socket.take_error().unwrap().is_none();
                assert!(!(waits && tunnelled(&socket)), "{to}, {killswitch}: waits in a tunnel that is gone");
            }
            drop(fds);
        }
    });
}
