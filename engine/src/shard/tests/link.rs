//! A guest's link: what comes in by it, and what it gets.

use std::collections::BTreeMap;

use crate::counters::Counters;
use crate::device::Framing;
use crate::packet::parse::{ACK, RST, SYN};
use crate::testing::{Bench, LINK, Packets, fix_header, guest, guest_ipv4, read_tcp, to_guest, who_has};
use crate::upstream::ConnectError;

fn bench() -> Bench {
    Bench::framed(Framing::Ethernet(LINK))
}

/// A connection of the guest's.
fn packets() -> Packets {
    Packets::new("10.10.11.2", "192.0.2.9")
}

/// What rose since `before`.
fn rose(bench: &Bench, before: &[(&'static str, u64)]) -> BTreeMap<&'static str, u64> {
    let now = Counters::sum([&*bench.counters].into_iter());
    now.iter()
        .zip(before)
        .map(|((name, now), (_, before))| (*name, now - before))
        .filter(|(_, rose)| *rose > 0)
        .collect()
}

#[tokio::test]
async fn a_hostile_frame_is_dropped_under_its_name_and_nothing_comes_of_it() {
    let mut bench = bench();
    let changed = |at: usize, bytes: &[u8]| {
        let mut packet = packets().syn(1);
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        fix_header(&mut packet);
        guest_ipv4(&packet)
    };
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = guest_ipv4(&packets().syn(1));
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let whole = guest_ipv4(&packets().syn(1));
    for (what, frame, counter) in [
        ("nothing", vec![], "drop-malformed"),
        ("half a header", whole[..10].to_vec(), "drop-malformed"),
        ("no packet", whole[..14].to_vec(), "drop-malformed"),
        ("a cut packet", whole[..40].to_vec(), "drop-malformed"),
        ("another sender", with(6, &[2, 0, 0, 0, 0, 9]), "drop-mac"),
        ("another receiver", with(0, &[2, 0, 0, 0, 0, 9]), "drop-mac"),
        ("to everybody", with(0, &[0xff; 6]), "drop-mac"),
        ("a VLAN", with(12, &[0x81, 0]), "drop-ethertype"),
        ("IPv6", guest([0x86, 0xdd], &Packets::new("fd00::1", "2001:db8::9").syn(1)), "drop-ipv6"),
        ("IPv6 that says IPv4", guest_ipv4(&Packets::new("fd00::1", "2001:db8::9").syn(1)), "drop-malformed"),
        ("the host's source", guest_ipv4(&Packets::new("10.10.10.2", "192.0.2.9").syn(1)), "drop-source"),
        ("the gateway's source", guest_ipv4(&Packets::new("10.10.11.1", "192.0.2.9").syn(1)), "drop-source"),
        ("no source", guest_ipv4(&Packets::new("0.0.0.0", "192.0.2.9").syn(1)), "drop-source"),
        ("UDP with another source", guest_ipv4(&Packets::new("10.10.10.2", "192.0.2.9").udp(b"x")), "drop-source"),
        ("ARP for another", who_has([10, 10, 11, 9].into()), "drop-arp"),
        ("ARP for the world", who_has([192, 0, 2, 9].into()), "drop-arp"),
        ("a first fragment", changed(6, &[0x20, 0]), "drop-fragment"),
        ("a later fragment", changed(6, &[0, 9]), "drop-fragment"),
        ("a group", guest_ipv4(&Packets::new("10.10.11.2", "224.0.0.1").udp(b"x")), "drop-multicast"),
        ("a ping", changed(9, &[1]), "drop-not-tcp"),
        ("a wrong header checksum", with(14 + 10, &[0, 0]), "drop-checksum"),
        ("a wrong checksum", with(14 + 36, &[0, 0]), "drop-checksum"),
        ("a port that is none", changed(22, &[0, 0]), "drop-malformed"),
    ] {
        let before = Counters::sum([&*bench.counters].into_iter());
        bench.feed(&frame);
        bench.turn();
        tokio::task::yield_now().await;
        let mut rose = rose(&bench, &before);
        // What was a packet between the right ends is counted as one.
        let at_all = (rose.remove("packets-in").is_some(), rose.remove("bytes-in").is_some());
        assert_eq!(at_all.0, at_all.1, "{what}");
        assert_eq!(rose, BTreeMap::from([(counter, 1)]), "{what}");
        assert_eq!((bench.attempts.len(), bench.device.next(), bench.flows()), (0, None, vec![]), "{what}");
    }
    bench.feed(&whole);
    assert_eq!(bench.flows(), ["SYN-SENT"], "and what they were made of is a SYN");
}

#[tokio::test]
async fn a_connection_has_complete_checksums_and_the_guests_address_both_ways() {
    let mut bench = bench();
    bench.feed(&guest_ipv4(&packets().syn(100)));
    let (_, answer) = bench.attempt().await;
    let (tunnel, mut far) = crate::testing::pair(0, 0, 4096);
    answer.send(Ok(tunnel)).unwrap();
    bench.outcome().await;
    // Whole frames for the guest, with sums that are right: the two readers see to it.
    let next = |bench: &mut Bench| read_tcp(to_guest(&bench.device.next().unwrap()).unwrap());
    let syn_ack = next(&mut bench);
    assert_eq!((syn_ack.flags, syn_ack.ack), (SYN | ACK, 101));
    bench.feed(&guest_ipv4(&packets().tcp(ACK, 101, syn_ack.seq.wrapping_add(1), &crate::testing::contents(0, 0, 5))));
    far.write(5);
    let mut down = Vec::new();
    for _ in 0..100 {
        tokio::task::yield_now().await;
        bench.turn();
        far.read(100).unwrap();
        while let Some(frame) = bench.device.next() {
            down.extend(read_tcp(to_guest(&frame).unwrap()).payload);
        }
    }
    assert_eq!((far.read, down), (5, crate::testing::contents(!0, 0, 5)));
}

#[tokio::test]
async fn what_the_guest_may_not_reach_is_a_reset_and_a_number_of_its_own() {
    let mut bench = bench();
    bench.feed(&guest_ipv4(&packets().syn(100)));
    bench.refuse(ConnectError::Forbidden([192, 0, 2, 9].into())).await;
    let sent = read_tcp(to_guest(&bench.device.next().unwrap()).unwrap());
    assert_eq!((sent.flags, sent.ack), (RST | ACK, 101));
    assert_eq!((bench.counters.flows_refused_forbidden.get(), bench.counters.flows_refused.get()), (1, 0));
}

#[tokio::test]
async fn a_connection_of_before_is_reset() {
    let mut bench = bench();
    bench.feed(&guest_ipv4(&packets().tcp(ACK, 5, 77, b"x")));
    let sent = read_tcp(to_guest(&bench.device.next().unwrap()).unwrap());
    assert_eq!((sent.flags, sent.seq), (RST, 77));
}

#[tokio::test]
async fn udp_is_answered_and_arp_for_the_gateway_too() {
    let mut bench = bench();
    bench.feed(&guest_ipv4(&packets().udp(b"quic")));
    let frame = bench.device.next().unwrap();
    let answer = to_guest(&frame).unwrap();
    assert_eq!((answer[9], answer[20..22].to_vec()), (1, vec![3, 3]), "port unreachable");
    bench.feed(&who_has(LINK.gateway));
    let answer = bench.device.next().unwrap();
    assert_eq!((&answer[12..14], &answer[22..28]), (&[8, 6][..], &LINK.gateway_mac[..]));
    assert_eq!((bench.counters.arp_answered.get(), bench.counters.udp_unreachable.get()), (1, 1));
}

#[tokio::test]
async fn a_guest_that_does_not_read_gets_its_frames_later_and_no_more_of_them() {
    let mut bench = bench();
    bench.device.fail(Some(libc::EAGAIN));
    bench.feed(&who_has(LINK.gateway));
    assert!(bench.shard.sender.is_blocked());
    bench.device.fail(None);
    assert!(bench.shard.sender.flush());
    assert_eq!(bench.device.next().unwrap().len(), 42);
}

#[tokio::test]
async fn a_frame_that_the_link_does_not_take_is_counted_and_the_link_goes_on() {
    let mut bench = bench();
    for (errno, lost) in [
        (libc::EMSGSIZE, false),
        (libc::ENOBUFS, false),
        (libc::ENOMEM, false),
        (libc::EPERM, false),
        (libc::EPIPE, true),
        (libc::ECONNRESET, true),
        (libc::ENOTCONN, true),
    ] {
        bench.device.fail(Some(errno));
        let before = bench.counters.drop_device.get();
        bench.feed(&who_has(LINK.gateway));
        assert_eq!(bench.counters.drop_device.get(), before + 1);
        assert_eq!(bench.shard.sender.take_lost().is_some(), lost, "{errno}");
    }
}
