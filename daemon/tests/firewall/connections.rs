//! Connections: those from outside are answered, older ones of our own do not go on in clear.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, UdpSocket},
    os::unix::process::CommandExt,
    process::Command,
    time::Duration,
};

use proxyvpnd::net::{
    desired::{Desired, MARK},
    firewall::compile,
};
use socket2::Socket;

use crate::{
    probes::{connect, read},
    state::backends,
    world::{BYPASS_USER, HOST, HOST6, PEER, PEER6, World, desired, devices, opted_in, sh},
};

/// A connection between two namespaces: the client's socket, the server's.
pub(crate) fn pair(
    listener: &TcpListener,
    client: impl FnOnce(SocketAddr) -> std::io::Result<Socket>,
) -> std::io::Result<(Socket, Socket)> {
    let client = client(listener.local_addr()?)?;
    Ok((client, listener.accept()?.0.into()))
}

/// Whether both can still talk.
pub(crate) fn alive(a: &Socket, b: &Socket) -> bool {
    let there = |from: &Socket, to: &Socket| from.send(b"hello").is_ok() && read(to).is_ok_and(|got| got == b"hello");
    there(a, b) && there(b, a)
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn connections_from_outside_are_answered() {
    opted_in();
    let world = World::new();
    world.steer();
    // From the link, and from a network behind it.
    world.peer.run(|| sh("ip addr add 203.0.113.7/32 dev lo; ip addr add 2001:db8:1::7/128 dev lo"));
    let inbound = |from: &str, to: &str| {
        let listener = world.host.run(|| TcpListener::bind(to).unwrap());
        let from: SocketAddr = from.parse().unwrap();
        let dial = |to: SocketAddr| world.peer.run(|| connect(&to.to_string(), |s| s.bind(&from.into())));
        pair(&listener, dial).is_ok_and(|(a, b)| alive(&a, &b))
    };
    let cases = [
        (format!("{PEER}:0"), format!("{HOST}:0")),
        ("203.0.113.7:0".to_owned(), format!("{HOST}:0")),
        (format!("[{PEER6}]:0"), format!("[{HOST6}]:0")),
        ("[2001:db8:1::7]:0".to_owned(), format!("[{HOST6}]:0")),
    ];
    for backend in backends() {
        for rp_filter in [0, 1, 2] {
            world.host.run(|| {
                sh(&format!(
                    "for f in all up0; do echo {rp_filter} > /proc/sys/net/ipv4/conf/$f/rp_filter; done
                     echo 1 > /proc/sys/net/ipv4/conf/up0/src_valid_mark"
                ))
            });
            for killswitch in [true, false] {
                let on = Desired { killswitch, ..desired() };
                world.host.run(|| backend.apply(&compile(&on, &[], &devices())).unwrap());
                for (from, to) in &cases {
                    let context = format!("{}, rp_filter {rp_filter}, killswitch {killswitch}, {from}", backend.name());
                    assert!(inbound(from, to), "{context}");
                }
                // A marked socket gets its answers.
                let listener = world.peer.run(|| TcpListener::bind(format!("{PEER}:0")).unwrap());
                let dial = |to: SocketAddr| world.host.run(|| connect(&to.to_string(), |s| s.set_mark(MARK)));
                let (a, b) = pair(&listener, dial).unwrap();
                assert!(alive(&a, &b), "{}, rp_filter {rp_filter}", backend.name());
                // Anti-test: without the rules for it the answers go into the tunnel.
                let off = Desired { inbound_replies: false, ..on };
                world.host.run(|| backend.apply(&compile(&off, &[], &devices())).unwrap());
                for (from, to) in &cases {
                    assert!(!inbound(from, to), "{}: {from} is answered without a rule", backend.name());
                }
            }
        }
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn an_older_session_from_outside_survives_if_it_is_named() {
    opted_in();
    for backend in backends() {
        let world = World::new();
        let open = |to: &str| {
            let listener = world.host.run(|| TcpListener::bind(to).unwrap());
            pair(&listener, |to| world.peer.run(|| connect(&to.to_string(), |_| Ok(())))).unwrap()
        };
        // A server of both versions reports an IPv4 peer as an IPv6 address.
        let mapped = {
            let listener = world.host.run(|| TcpListener::bind("[::]:0").unwrap());
            let port = listener.local_addr().unwrap().port();
            pair(&listener, |_| world.peer.run(|| connect(&format!("{HOST}:{port}"), |_| Ok(())))).unwrap()
        };
        let kept = [open(&format!("{HOST}:0")), open(&format!("[{HOST6}]:0")), mapped];
        let lost = open(&format!("{HOST}:0"));
        let address = |a: socket2::SockAddr| a.as_socket().unwrap();
        let sessions: Vec<_> = kept
            .iter()
            .map(|(_, host)| (address(host.local_addr().unwrap()), address(host.peer_addr().unwrap())))
            .collect();
        world.steer();
        world.host.run(|| backend.apply(&compile(&desired(), &sessions, &devices())).unwrap());
        for (peer, host) in &kept {
            assert!(alive(peer, host), "{}", backend.name());
        }
        assert!(!alive(&lost.0, &lost.1), "{}: a session that was not named goes on", backend.name());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn older_connections_of_our_own_are_cut() {
    opted_in();
    for backend in backends() {
        // With connection tracking already on, and picked up in its middle with either end speaking first.
        for tracked in [true, false] {
            for peer_first in [true, false] {
                let world = World::new();
                let context = format!("{}, tracked {tracked}, peer first {peer_first}", backend.name());
                if tracked {
                    world.host.run(|| sh("nft 'add table inet t; add chain inet t c { type filter hook output priority 5; }; add rule inet t c ct state new counter'"));
                }
                let listener = world.peer.run(|| TcpListener::bind(format!("{PEER}:0")).unwrap());
                let (host, peer) =
                    pair(&listener, |to| world.host.run(|| connect(&to.to_string(), |_| Ok(())))).unwrap();
                let (udp, far) = (
                    world.host.run(|| UdpSocket::bind(format!("{HOST}:0")).unwrap()),
                    world.peer.run(|| UdpSocket::bind(format!("{PEER}:0")).unwrap()),
                );
                udp.connect(far.local_addr().unwrap()).unwrap();
                far.connect(udp.local_addr().unwrap()).unwrap();
                for socket in [&udp, &far] {
                    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
                }
                let mut buffer = [0; 64];
                // Anti-test: both work, and the sniffer sees them.
                assert!(alive(&host, &peer), "{context}");
                udp.send(b"hello").unwrap();
                far.recv(&mut buffer).unwrap();
                let seen = world.seen();
                assert!(
                    seen.iter().any(|l| l.starts_with("tcp ")) && seen.iter().any(|l| l.starts_with("udp ")),
                    "{seen:?}"
                );

                world.host.run(|| backend.apply(&compile(&desired(), &[], &devices())).unwrap());
                world.seen();
                if peer_first {
                    peer.send(b"hello").unwrap();
                    far.send(b"hello").unwrap();
                    udp.recv(&mut buffer).unwrap();
                }
                let sent = host.send(b"secret").map_err(|error| error.kind());
                assert_eq!(udp.send(b"secret").unwrap_err().kind(), ErrorKind::PermissionDenied, "{context}");
                assert!(read(&peer).is_err(), "{context}: the peer got data");
                assert!(far.recv(&mut buffer).is_err(), "{context}: the peer got a datagram");
                // The reset is told once, by whichever call comes first.
                let end = std::iter::once(sent.map(drop))
                    .chain(std::iter::repeat_with(|| read(&host).map(drop).map_err(|error| error.kind())))
                    .take(4)
                    .find_map(Result::err);
                assert_eq!(end, Some(ErrorKind::ConnectionReset), "{context}: not cut at once");
                let leaked: Vec<_> =
                    world.seen().into_iter().filter(|l| l.starts_with("tcp ") || l.starts_with("udp ")).collect();
                assert!(leaked.is_empty(), "{context}: {leaked:?}");
            }
        }
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_a_bypassing_user_sent_before_closing_arrives() {
    opted_in();
    const LENGTH: usize = 20_000;
    for backend in backends() {
        let world = World::new();
        world.steer();
        world.host.run(|| backend.apply(&compile(&desired(), &[], &devices())).unwrap());
        let listener = world.peer.run(|| {
            let listener = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            // A small window, so that most of it waits in the sender's kernel.
            listener.set_recv_buffer_size(2304).unwrap();
            listener.bind(&format!("{PEER}:0").parse::<SocketAddr>().unwrap().into()).unwrap();
            listener.listen(1).unwrap();
            TcpListener::from(listener)
        });
        let to = listener.local_addr().unwrap();
        let script = format!("head -c {LENGTH} /dev/zero > /dev/tcp/{}/{}", to.ip(), to.port());
        let done = world.host.run(|| Command::new("bash").uid(BYPASS_USER).args(["-c", &script]).status().unwrap());
        assert!(done.success());
        // The program has ended: its socket has no user any more.
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let mut got = vec![];
        let end = stream.read_to_end(&mut got);
        assert!(end.is_ok() && got.len() == LENGTH, "{}: {} bytes, {end:?}", backend.name(), got.len());
        stream.write_all(b"").unwrap();
    }
}
