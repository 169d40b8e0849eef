//! What goes into the tunnel, and what around it.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use proxyvpnd::net::desired::MARK;
use proxyvpnd::net::{Owned, Stage, sockets};
use socket2::{Domain, Socket, Type};

use crate::world::{HOST, HOST6, PEER, PEER6, World, connect, desired, open, sh};

/// Where `ip route get` would send it: the device, or the error.
fn way(arguments: &str) -> String {
    let text = sh(&format!("ip route get {arguments} 2>&1 || true"));
    let mut words = text.split_ascii_whitespace();
    if text.starts_with("RTNETLINK") {
        return text.trim().rsplit(": ").next().unwrap().to_owned();
    }
    words.find(|word| *word == "dev").and_then(|_| words.next()).unwrap_or(&text).to_owned()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn each_kind_of_traffic_takes_its_way() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let mut desired = desired();
        let _fds = connect(&mut network, &desired).await;
        sh("ip route add throw 198.18.99.0/24");
        // 1886810222 is the mark.
        assert_eq!(MARK, 1_886_810_222);
        let cases = [
            ("203.0.113.9 ipproto tcp dport 443", "pvpn0"),
            ("2001:db8:9::9 ipproto tcp dport 443", "pvpn0"),
            ("192.0.2.2 ipproto tcp dport 443", "pvpn0"),
            ("203.0.113.9 ipproto tcp dport 443 mark 1886810222", "up0"),
            ("2001:db8:9::9 ipproto tcp dport 443 mark 1886810222", "up0"),
            ("203.0.113.9 ipproto tcp dport 443 mark 1886810223", "pvpn0"),
            ("203.0.113.9 ipproto tcp dport 443 mark 0x706e", "pvpn0"),
            // Not even where the main table has no way for it.
            ("198.18.99.9 ipproto tcp dport 443 mark 1886810222", "Network is unreachable"),
            ("198.18.99.9 ipproto tcp dport 443", "pvpn0"),
            ("203.0.113.9 ipproto tcp dport 443 uid 13", "up0"),
            ("2001:db8:9::9 ipproto tcp dport 443 uid 13", "up0"),
            ("203.0.113.9 ipproto tcp dport 443 uid 14", "pvpn0"),
            ("10.1.2.3 ipproto tcp dport 443", "up0"),
            ("fd01::1 ipproto tcp dport 443", "up0"),
            ("198.51.100.53 ipproto tcp dport 53", "up0"),
            ("198.51.100.53 ipproto udp dport 53", "up0"),
            ("2001:db8:53::53 ipproto tcp dport 53", "up0"),
            ("198.51.100.53 ipproto tcp dport 853", "pvpn0"),
            ("198.51.100.54 ipproto tcp dport 53", "pvpn0"),
            ("203.0.113.9 ipproto udp dport 443", "up0"),
            ("192.0.2.1 ipproto tcp dport 22", "lo"),
            ("127.0.0.1 ipproto tcp dport 22", "lo"),
            ("10.255.255.1 ipproto tcp dport 22", "lo"),
        ];
        for (arguments, expected) in cases {
            assert_eq!(way(arguments), expected, "{arguments}");
        }
        // Without the tunnel what would go into it is refused, first by its absence, then as desired.
        sh("ip link del pvpn0");
        desired.tunnel = None;
        for _ in 0..2 {
            assert_eq!(way("203.0.113.9 ipproto tcp dport 443"), "No route to host");
            assert_eq!(way("2001:db8:9::9 ipproto tcp dport 443"), "No route to host");
            assert_eq!(way("203.0.113.9 ipproto tcp dport 443 mark 1886810222"), "up0");
            network.apply(Stage::Routes, &desired).await.unwrap();
        }
    });
}

/// Connects to `to`, with our mark or without, and exchanges a byte.
fn reach(to: SocketAddr, mark: Option<u32>) -> std::io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    mark.map_or(Ok(()), |mark| socket.set_mark(mark))?;
    socket.connect_timeout(&to.into(), Duration::from_millis(700))?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_millis(700)))?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])
}

/// Answers each connection with a byte for a byte, until the listener is dropped with the process's thread.
fn serve(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if stream.read_exact(&mut [0]).is_ok() {
                stream.write_all(b"!").unwrap();
            }
        }
    });
}

fn listen(address: &str) -> u16 {
    let address: IpAddr = address.parse().unwrap();
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    serve(listener);
    port
}

/// Packets that wait on the device.
fn waiting(device: &OwnedFd) -> usize {
    let mut frame = vec![0; 70_000];
    std::iter::from_fn(|| rustix::io::read(device, &mut frame).ok()).count()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_daemons_own_connections_never_go_into_the_tunnel() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let fds = connect(&mut network, &desired()).await;
        let destinations: [SocketAddr; 2] =
            ["203.0.113.9:443".parse().unwrap(), "[2001:db8:9::9]:443".parse().unwrap()];
        // The uplink is gone, then somebody removes the rule that leads marked connections to it, then the one that refuses them.
        for step in ["ip route del default; ip -6 route del default", "rule 3700", "rule 3730"] {
            match step.strip_prefix("rule ") {
                Some(priority) => sh(&format!("ip rule del priority {priority}; ip -6 rule del priority {priority}")),
                None => sh(step),
            };
            for to in destinations {
                waiting(&fds[0]);
                assert!(reach(to, Some(MARK)).is_err());
                assert_eq!(waiting(&fds[0]), 0, "after {step}: {to} went into the tunnel");
                // Anti-test: what is not the daemon's does.
                assert!(reach(to, None).is_err());
                assert!(waiting(&fds[0]) > 0);
            }
        }
        assert!(network.clean_up(Owned::Unexpected).await.errors.is_empty());
    });
}

/// Plays the far end of one TCP connection over IPv4 on the device: reads until a SYN to `to` comes and answers it.
fn answer_syn(device: &OwnedFd, to: SocketAddr) {
    let end = Instant::now() + Duration::from_secs(2);
    let mut frame = vec![0; 70_000];
    while Instant::now() < end {
        let Ok(length) = rustix::io::read(device, &mut frame) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        // struct virtio_net_hdr is 10 bytes.
        let packet = &frame[10..length];
        let IpAddr::V4(ip) = to.ip() else { panic!("IPv4 only") };
        let tcp = usize::from(packet[0] & 15) * 4;
        let is_syn = packet[0] >> 4 == 4
            && packet[9] == 6
            && packet[16..20] == ip.octets()
            && packet[tcp + 2..tcp + 4] == to.port().to_be_bytes()
            && packet[tcp + 13] == 2;
        if !is_syn {
            continue;
        }
        let mut answer = vec![0; 10 + 20 + 20];
        let ip = &mut answer[10..30];
        ip[..4].copy_from_slice(&[0x45, 0, 0, 40]);
        (ip[8], ip[9]) = (64, 6);
        ip[12..16].copy_from_slice(&packet[16..20]);
        ip[16..20].copy_from_slice(&packet[12..16]);
        let sum = checksum(&[ip]);
        ip[10..12].copy_from_slice(&sum);
        let addresses: Vec<u8> = ip[12..20].to_vec();
        let out = &mut answer[30..];
        out[..2].copy_from_slice(&packet[tcp + 2..tcp + 4]);
        out[2..4].copy_from_slice(&packet[tcp..tcp + 2]);
        let sequence = u32::from_be_bytes(packet[tcp + 4..tcp + 8].try_into().unwrap());
        out[8..12].copy_from_slice(&sequence.wrapping_add(1).to_be_bytes());
        // Data offset; SYN, ACK; window.
        (out[12], out[13], out[14]) = (0x50, 0x12, 0x20);
        let sum = checksum(&[&addresses, &[0, 6, 0, 20], out]);
        out[16..18].copy_from_slice(&sum);
        assert_eq!(rustix::io::write(device, &answer).unwrap(), answer.len());
        return;
    }
    panic!("no SYN to {to} came out of the device");
}

pub(crate) fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn connections_work_with_every_reverse_path_filter() {
    let world = World::new();
    let at_peer = world.peer.run(|| (listen(&PEER.to_string()), listen(PEER6)));
    let at_host = world.host.run(|| (listen("0.0.0.0"), listen("::")));
    for setting in 0..27 {
        let (all, default, uplink) = (setting % 3, setting / 3 % 3, setting / 9);
        let name = format!("rp_filter all={all} default={default} up0={uplink}");
        world.host.run_async(async || {
            sh(&format!(
                "cd /proc/sys/net/ipv4/conf; echo {all} > all/rp_filter; echo {default} > default/rp_filter
                 echo {uplink} > up0/rp_filter"
            ));
            let mut network = open(&world.state).await;
            let fds = connect(&mut network, &desired()).await;
            assert_eq!(sh("cat /proc/sys/net/ipv4/conf/pvpn0/rp_filter").trim(), default.to_string(), "{name}");

            reach((PEER, at_peer.0).into(), Some(MARK)).expect(&name);
            reach((PEER6.parse::<IpAddr>().unwrap(), at_peer.1).into(), Some(MARK)).expect(&name);
            for port in [at_host.0, at_host.1] {
                world.peer.run(|| reach((HOST, port).into(), None)).expect(&name);
            }
            world.peer.run(|| reach((HOST6.parse::<IpAddr>().unwrap(), at_host.1).into(), None)).expect(&name);

            // The real peer would answer on this port; the connection is made with us, on the device.
            let unmarked = std::thread::scope(|scope| {
                let connecting = scope.spawn(|| {
                    let to: SocketAddr = (PEER, at_peer.0).into();
                    TcpStream::connect_timeout(&to, Duration::from_secs(2)).map(|s| s.local_addr().unwrap().ip())
                });
                answer_syn(&fds[0], (PEER, at_peer.0).into());
                connecting.join().unwrap()
            });
            assert_eq!(unmarked.expect(&name), "10.255.255.1".parse::<IpAddr>().unwrap(), "{name}");

            if all.max(uplink) == 1 {
                // Anti-test: what makes strict filtering work is really needed.
                sh("echo 0 > /proc/sys/net/ipv4/conf/up0/src_valid_mark");
                reach((PEER, at_peer.0).into(), Some(MARK)).expect_err(&name);
                assert!(network.health(&desired()).await.unwrap().iter().any(|f| f.code == "reverse-path-filter"));
            }
            drop(fds);
            assert!(network.clean_up(Owned::Unexpected).await.errors.is_empty(), "{name}");
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn sessions_from_outside_are_found() {
    let world = World::new();
    let elsewhere = world.peer.run(|| listen(&PEER.to_string()));
    world.host.run(|| {
        let (v4, both) = (TcpListener::bind((HOST, 0)).unwrap(), TcpListener::bind("[::]:0").unwrap());
        let (v4_port, both_port) = (v4.local_addr().unwrap().port(), both.local_addr().unwrap().port());
        let _outgoing = TcpStream::connect((PEER, elsewhere)).unwrap();
        let _own = TcpStream::connect((HOST, v4_port)).unwrap();
        let targets = [
            SocketAddr::from((HOST, v4_port)),
            SocketAddr::from((HOST, both_port)),
            SocketAddr::new(HOST6.parse().unwrap(), both_port),
        ];
        let clients = world.peer.run(|| targets.map(|target| TcpStream::connect(target).unwrap()));
        let outside = HashSet::from([IpAddr::from(HOST), HOST6.parse().unwrap()]);
        let mut found = sockets::inbound_sessions(&outside).unwrap();
        let mut expected: Vec<_> = targets.into_iter().zip(clients.iter().map(|c| c.local_addr().unwrap())).collect();
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected);
        assert!(sockets::inbound_sessions(&HashSet::new()).unwrap().is_empty(), "only those of the given addresses");
        assert_eq!(sockets::listener_uid(targets[1]), Some(0));
        drop((v4, both));
        assert_eq!(sockets::listener_uid(targets[1]), None);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn an_open_session_from_outside_survives() {
    let world = World::new();
    world.host.run_async(async || {
        let listener = TcpListener::bind((HOST, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let mut client = world.peer.run(|| TcpStream::connect(to).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        let mut network = open(&world.state).await;
        let mut say = |expected: bool| {
            client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            server.write_all(b"x").unwrap();
            assert_eq!(client.read_exact(&mut [0]).is_ok(), expected);
        };
        say(true);
        let mut desired = desired();
        let _fds = connect(&mut network, &desired).await;
        say(true);
        // Anti-test: without this promise the session is cut.
        desired.inbound_replies = false;
        network.apply(Stage::Firewall, &desired).await.unwrap();
        say(false);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_ipv6_in_new_devices_it_is_refused() {
    let world = World::new();
    world.host.run_async(async || {
        sh("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
        let mut network = open(&world.state).await;
        let _fds = connect(&mut network, &desired()).await;
        assert_eq!(way("203.0.113.9 ipproto tcp dport 443"), "pvpn0");
        assert_eq!(way("2001:db8:9::9 ipproto tcp dport 443"), "No route to host");
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_device_has_its_queues_and_settings() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let desired = desired();
        let fds = network.create_tunnel(desired.tunnel.as_ref().unwrap(), 3).await.unwrap();
        assert_eq!(fds.len(), 3);
        let link = sh("ip -d link show pvpn0");
        for part in [
            "mtu 65535",
            "qlen 10000",
            "alias proxyvpn",
            "addrgenmode none",
            "pi off vnet_hdr on multi_queue numqueues 3",
            "persist off",
        ] {
            assert!(link.contains(part), "{part} is not in {link}");
        }
        assert!(
            sh("ip route show table main; ip -6 route show table main").lines().all(|line| !line.contains("pvpn0"))
        );
        assert!(!sh("ip -6 addr show pvpn0").contains("fe80"));
        assert!(!link.contains("MULTICAST"), "{link}");
        let features = sh("ethtool -k pvpn0 2>/dev/null || true");
        for feature in ["tx-checksumming: on", "tx-tcp-segmentation: on", "tx-tcp6-segmentation: on"] {
            assert!(features.is_empty() || features.contains(feature), "{feature} is not in {features}");
        }
        drop(fds);
        assert!(!sh("ip link").contains("pvpn0"), "the device goes with its descriptors");
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_device_is_made_anew_with_any_number_of_queues() {
    let world = World::new();
    world.host.run_async(async || {
        let mut network = open(&world.state).await;
        let desired = desired();
        let mut held = vec![];
        for queues in [1, 2, 8, 1] {
            // The device of an earlier run is there, and somebody still holds it.
            held.push(network.create_tunnel(desired.tunnel.as_ref().unwrap(), queues).await.unwrap());
            let link = sh("ip -d link show pvpn0");
            assert_eq!(link.contains(&format!("multi_queue numqueues {queues}")), queues > 1, "{link}");
            assert_eq!(held.last().unwrap().len(), queues);
        }
        drop(held);
        assert!(!sh("ip link").contains("pvpn0"));
    });
}
