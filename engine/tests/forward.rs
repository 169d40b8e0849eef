//! Connections of others that this machine forwards into the TUN device: packets whose checksums are complete, and a peer
//! whose wire is narrower than the device.

#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a failure here is the test's failure")]

mod lab;

use lab::{Lab, V4, V6, echo, echo_through};
use proxyvpn_engine::config::Limits;

const MIB: usize = 1024 * 1024;
/// Of the TCP header, with timestamps.
const TIMESTAMPS: usize = 12;

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_forwarded_peer_gets_segments_of_its_own_size() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let peer = lab.peer(1500, false);
    for (mtu, offload) in [(1500, true), (9000, true), (65535, true), (9000, false)] {
        let running = lab.start_with(mtu, offload, Limits::default());
        for (address, mss) in [(V4, 1460), (V6, 1440)] {
            let (bytes, seen) = peer.watched(move || echo_through(address, 16 * MIB));
            assert_eq!(bytes, 16 * MIB, "mtu {mtu}, offload {offload}, {address}");
            assert_eq!(
                (seen.largest, seen.fragments),
                (mss - TIMESTAMPS, 0),
                "mtu {mtu}, offload {offload}, {address}"
            );
        }
        running.wait_until_empty();
        for drop in ["drop-malformed", "drop-checksum", "drop-device"] {
            assert_eq!(running.counter(drop), 0, "{drop}");
        }
        drop(running.stop());
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn the_size_is_what_the_peer_announced_not_its_mtu() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let peer = lab.peer(1500, false);
    let running = lab.start(65535);
    for address in [V4, V6] {
        peer.sysctl("tcp_timestamps", "0");
        let (bytes, seen) = peer.watched(move || echo_through(address, 4 * MIB));
        assert_eq!((bytes, seen.largest), (4 * MIB, if address == V6 { 1440 } else { 1460 }), "{address}");
        peer.sysctl("tcp_timestamps", "1");
        let (family, via) = if address == V6 { ("-6", "fd99::1") } else { ("-4", "10.99.0.1") };
        peer.ip(&format!("{family} route replace default via {via} advmss 1000"));
        let (bytes, seen) = peer.watched(move || echo_through(address, 4 * MIB));
        assert_eq!((bytes, seen.largest), (4 * MIB, 1000 - TIMESTAMPS), "{address}");
    }
    running.wait_until_empty();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_damaged_segment_is_dropped_counted_and_sent_again() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let peer = lab.peer(1500, false);
    peer.damage();
    let running = lab.start(65535);
    for address in [V4, V6] {
        let before = (running.counter("drop-checksum"), peer.damaged());
        assert_eq!(peer.program(move || echo_through(address, 4 * MIB)).join().unwrap(), 4 * MIB, "{address}");
        let (dropped, damaged) = (running.counter("drop-checksum") - before.0, peer.damaged() - before.1);
        // The byte that damages one may have been there before, one in 256.
        assert!(damaged > 10 && dropped <= damaged && dropped * 10 >= damaged * 9, "{dropped} of {damaged} {address}");
    }
    running.wait_until_empty();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_peer_with_offloads_and_one_with_a_wider_wire_than_the_device_work_too() {
    for (wire, device, offload) in [(1500, 65535, true), (9000, 1500, false), (9000, 1500, true)] {
        let lab = Lab::new();
        lab.serve(9000, echo);
        let peer = lab.peer(wire, offload);
        let running = lab.start(device);
        for address in [V4, V6] {
            let bytes = peer.program(move || echo_through(address, 16 * MIB)).join().unwrap();
            assert_eq!(bytes, 16 * MIB, "wire {wire}, device {device}, offload {offload}, {address}");
        }
        running.wait_until_empty();
        assert_eq!(running.counter("drop-checksum"), 0);
    }
}
