//! A virtual machine's link: the real kernel's TCP as the guest, the engine as its only way out.

#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a failure here is the test's failure")]

mod lab;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use lab::{Lab, V4, connect, echo, echo_through, switches_of};

const MIB: usize = 1024 * 1024;

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_guests_bytes_pass_unchanged_at_small_and_large_mtu() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    for mtu in [1500, 65520] {
        let (guest, link) = lab.guest(mtu);
        let running = lab.start_link(link, mtu, &[]);
        let start = Instant::now();
        assert_eq!(guest.program(|| echo_through(V4, 64 * MIB)).join().unwrap(), 64 * MIB, "mtu {mtu}");
        println!("mtu {mtu}: 64 MiB there and back in {:?}, {}", start.elapsed(), running.counters());
        running.wait_until_empty();
        for drop in ["drop-malformed", "drop-checksum", "drop-device", "drop-mac", "drop-source", "drop-arp"] {
            assert_eq!(running.counter(drop), 0, "{drop}");
        }
        assert!(running.counter("arp-answered") > 0);
        assert!(running.counter("drop-ipv6") > 0, "its kernel looks for routers");
        assert_eq!(running.stop().len(), 1);
        guest.end();
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_guest_is_refused_at_once_what_it_may_not_or_cannot_have() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let (guest, link) = lab.guest(65520);
    let running = lab.start_link(link, 65520, &["10.88.7.0/24"]);
    let start = Instant::now();
    // The host's own, which nobody told the engine of, and where somebody listens.
    let own = "10.77.0.1";
    let _listener = lab.program(move || TcpListener::bind((own, 9000)).unwrap()).join().unwrap();
    for (address, port) in [(V4, 9), ("10.88.7.1", 9000), ("10.10.11.1", 9000), (own, 9000)] {
        let error = guest.program(move || connect(address, port).unwrap_err()).join().unwrap();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    let error = guest.program(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((V4, 9000)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.send(b"datagram").unwrap();
        socket.recv(&mut [0; 10]).unwrap_err()
    });
    assert_eq!(error.join().unwrap().kind(), ErrorKind::ConnectionRefused);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!((running.counter("flows-refused-forbidden"), running.counter("udp-unreachable")), (2, 1));
    drop(running.stop());
    guest.end();
}

/// A guest's socket that gives up after a while.
fn datagrams() -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_guests_datagrams_leave_marked_and_only_answers_come_back() {
    let lab = Lab::new();
    lab.public();
    let (guest, link) = lab.guest(65520);
    let running = lab.start_link_with_udp(link, 65520, &[]);
    lab.nft(
        "add table inet seen; add counter inet seen marked; add counter inet seen bare; \
         add chain inet seen leaving { type filter hook postrouting priority 300; }; \
         add rule inet seen leaving oifname vb meta l4proto udp meta mark 0x77 counter name marked; \
         add rule inet seen leaving oifname vb meta l4proto udp meta mark != 0x77 counter name bare",
    );
    let servers = ["192.0.2.1:9000", "192.0.2.2:9001"].map(|address| lab.udp(address));
    let socket = guest.program(datagrams).join().unwrap();
    let mut seen = Vec::new();
    let mut buffer = vec![0; 70_000];
    // The second one goes over the wire in fragments.
    for (server, length) in servers.iter().zip([1200, 30_000]) {
        socket.send_to(&vec![7; length], server.local_addr().unwrap()).unwrap();
        let (got, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!((got, from.ip()), (length, [10, 77, 0, 1].into()));
        server.send_to(&buffer[..got], from).unwrap();
        assert_eq!(socket.recv_from(&mut buffer).unwrap(), (length, server.local_addr().unwrap()));
        assert!(buffer[..length].iter().all(|byte| *byte == 7));
        seen.push(from);
    }
    assert_eq!(seen[0], seen[1], "one port for both");
    assert!(seen[0].port() >= 1024);
    assert_eq!((lab.seen("marked"), lab.seen("bare")), (2, 0));

    for stranger in ["192.0.2.3:9000", "192.0.2.1:9001"] {
        lab.udp(stranger).send_to(b"stranger", seen[0]).unwrap();
    }
    lab::wait_until("strangers are dropped", || running.counter("drop-udp-stranger") == 2);
    servers[0].send_to(b"answer", seen[0]).unwrap();
    assert_eq!(socket.recv_from(&mut buffer).unwrap(), (6, servers[0].local_addr().unwrap()));

    let before = switches_of("engine-0");
    std::thread::sleep(Duration::from_secs(1));
    assert!(switches_of("engine-0") - before < 5, "an open port costs nothing");
    assert_eq!((running.counter("udp-mappings"), running.counter("udp-in")), (1, 3));
    drop(running.stop());
    assert!(servers[0].send_to(b"late", seen[0]).is_ok());
    guest.end();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_guests_datagrams_reach_nobody_near_and_nothing_of_this_machine() {
    let lab = Lab::new();
    lab.public();
    let (guest, link) = lab.guest(65520);
    let running = lab.start_link_with_udp(link, 65520, &["192.0.2.128/25"]);
    // An address that nobody told the engine of, and somebody who listens on all.
    lab.app("addr add 192.0.2.77/32 dev vb");
    let listener = lab.program(|| UdpSocket::bind("0.0.0.0:9000").unwrap()).join().unwrap();
    listener.set_nonblocking(true).unwrap();
    for address in ["192.0.2.77:9000", "10.77.0.1:9000", "10.77.0.2:9000", "192.0.2.129:9000", "192.0.2.1:53"] {
        let error = guest.program(move || {
            let socket = datagrams();
            socket.connect(address).unwrap();
            socket.send(b"x").unwrap();
            socket.recv(&mut [0; 10]).unwrap_err()
        });
        assert_eq!(error.join().unwrap().kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    assert_eq!((running.counter("udp-refused-forbidden"), running.counter("udp-mappings")), (5, 0));
    assert_eq!(listener.recv_from(&mut [0; 10]).unwrap_err().kind(), ErrorKind::WouldBlock);
    drop(running.stop());
    guest.end();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_flood_of_datagrams_is_bounded_and_connections_go_on() {
    const PORTS: u64 = 256;
    let lab = Lab::new();
    lab.public();
    lab.serve(9000, echo);
    let (guest, link) = lab.guest(1500);
    let running = lab.start_link_with_udp(link, 1500, &[]);
    let server = lab.udp("192.0.2.1:9000");
    let echoing = std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            if &buffer[..length] == b"end" {
                return;
            }
            let _ = server.send_to(&buffer[..length], from);
        }
    });
    let first = guest.program(datagrams).join().unwrap();
    first.set_nonblocking(true).unwrap();
    let answered = |word: &[u8]| {
        let mut buffer = [0; 2000];
        first.send_to(word, "192.0.2.1:9000").unwrap();
        std::iter::from_fn(|| first.recv_from(&mut buffer).ok()).any(|(length, _)| length == word.len())
    };
    lab::wait_until("the first one is answered", || answered(b"first"));
    let flood = guest.program(|| {
        let sockets: Vec<_> = (0..300).map(|_| datagrams()).collect();
        for _ in 0..200 {
            for socket in &sockets {
                let _ = socket.send_to(&[7; 1200], "192.0.2.1:9000");
            }
        }
    });
    assert_eq!(guest.program(|| echo_through(V4, 4 * MIB)).join().unwrap(), 4 * MIB);
    flood.join().unwrap();
    lab::wait_until("all ports are taken", || running.counter("udp-refused-full") > 0);
    println!("{}", running.counters());
    assert_eq!(running.counter("udp-mappings"), PORTS);
    // Who has a port still has it, and a no of the firewall's ends nothing.
    lab.nft("add table inet no; add chain inet no out { type filter hook output priority 0; udp dport 9000 drop; }");
    let lost = running.counter("drop-udp-send");
    lab::wait_until("it is counted", || {
        answered(b"not taken");
        running.counter("drop-udp-send") > lost
    });
    lab.nft("delete table inet no");
    lab::wait_until("it is answered again", || answered(b"once more"));
    lab::wait_until("the server ends", || {
        answered(b"end");
        echoing.is_finished()
    });
    drop(running.stop());
    guest.end();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn after_another_engine_took_the_link_old_connections_end_at_once_and_new_ones_work() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let (guest, link) = lab.guest(65520);
    // A supervisor keeps another descriptor of the same end.
    let kept = link.try_clone().unwrap();
    let running = lab.start_link(link, 65520, &[]);
    let (open, opened) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let program = guest.program(move || {
        let mut stream = connect(V4, 9000).unwrap();
        stream.write_all(b"before").unwrap();
        stream.read_exact(&mut [0; 6]).unwrap();
        open.send(()).unwrap();
        gone.recv().unwrap();
        let start = Instant::now();
        let _ = stream.write_all(b"after");
        (stream.read(&mut [0; 6]).unwrap_err().kind(), start.elapsed())
    });
    opened.recv().unwrap();
    // As after kill -9: the guest hears nothing of the end.
    guest.nft("add table ip deaf; add chain ip deaf input { type filter hook input priority 0; policy drop; }");
    drop(running.stop());
    guest.nft("delete table ip deaf");
    let running = lab.start_link(kept, 65520, &[]);
    go.send(()).unwrap();
    let (error, time) = program.join().unwrap();
    assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error:?}");
    assert!(time < Duration::from_secs(2), "{time:?}");
    assert!(running.counter("unknown-flow") > 0);
    assert_eq!(guest.program(|| echo_through(V4, MIB)).join().unwrap(), MIB);
    drop(running.stop());
    guest.end();
}
