//! A virtual machine's link: the real kernel's TCP as the guest, the engine as its only way out.

#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a failure here is the test's failure")]

mod lab;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use lab::{Lab, V4, connect, echo, echo_through};

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
