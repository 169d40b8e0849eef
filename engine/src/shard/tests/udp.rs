//! A guest's datagrams: by which port they leave, who gets in by it, and what is refused.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Wake;

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr};

use super::super::udp::{PEERS, PORTS};
use crate::config::Link;
use crate::device::Framing;
use crate::event::Event;
use crate::packet::parse::{RST, SYN};
use crate::packet::udp::{HEADERS, address};
use crate::testing::{Bench, LINK, Outlet, Packets, fix_header, guest_ipv4, read_tcp, to_guest};
use crate::upstream::{NOT_FOR_GUESTS, Shortage};

const PEER: &str = "192.0.2.9:443";
const OTHER: &str = "198.51.100.7:3478";

fn bench() -> Bench {
    Bench::framed(Framing::Ethernet(Link { udp: true, ..LINK }))
}

/// A datagram of the guest's from `port`.
fn packet(port: u16, to: &str, payload: &[u8]) -> Vec<u8> {
    let mut packet = [&[0; HEADERS], payload].concat();
    address(&mut packet, SocketAddrV4::new(LINK.guest, port), to.parse().unwrap());
    packet
}

fn send(bench: &mut Bench, port: u16, to: &str, payload: &[u8]) {
    bench.feed(&guest_ipv4(&packet(port, to, payload)));
    bench.turn();
}

/// What the sockets sent since the last call.
fn left(bench: &Bench) -> Vec<Vec<(Vec<u8>, SocketAddrV4)>> {
    bench.outside.ports().iter().map(|port| port.sent()).collect()
}

fn sent(payload: &[u8], to: &str) -> (Vec<u8>, SocketAddrV4) {
    (payload.to_vec(), to.parse().unwrap())
}

/// A frame for the guest: source, port of the guest's, payload. Its checksums must be right.
fn read(frame: &[u8]) -> (SocketAddr, u16, Vec<u8>) {
    let all = ChecksumCapabilities::default();
    let ip = Ipv4Packet::new_checked(to_guest(frame).unwrap()).unwrap();
    let repr = Ipv4Repr::parse(&ip, &all).unwrap();
    let udp = UdpPacket::new_checked(ip.payload()).unwrap();
    UdpRepr::parse(&udp, &repr.src_addr.into(), &repr.dst_addr.into(), &all).unwrap();
    assert_ne!(udp.checksum(), 0, "the guest can check it");
    (SocketAddr::new(repr.src_addr.into(), udp.src_port()), udp.dst_port(), udp.payload().to_vec())
}

/// What the guest gets next, as [`read`] gives it.
fn next(bench: &mut Bench) -> Option<(SocketAddr, u16, Vec<u8>)> {
    bench.turn();
    bench.device.next().map(|frame| read(&frame))
}

/// True when the guest was told that nobody is there.
fn unreachable(bench: &Bench) -> bool {
    bench.device.next().is_some_and(|frame| {
        let answer = to_guest(&frame).unwrap();
        (answer[9], &answer[20..22]) == (1, &[3, 3])
    })
}

/// Lets the guest's port 4000 send to [`PEER`]; its socket.
fn opened(bench: &mut Bench) -> Rc<Outlet> {
    send(bench, 4000, PEER, b"question");
    assert_eq!(left(bench), [[sent(b"question", PEER)]]);
    bench.outside.ports().remove(0)
}

#[test]
fn a_port_has_one_socket_whoever_it_sends_to() {
    let mut bench = bench();
    send(&mut bench, 4000, PEER, b"one");
    send(&mut bench, 4000, OTHER, b"two");
    send(&mut bench, 4001, PEER, b"");
    send(&mut bench, 4000, PEER, b"three");
    let expected = [vec![sent(b"one", PEER), sent(b"two", OTHER), sent(b"three", PEER)], vec![sent(b"", PEER)]];
    assert_eq!(left(&bench), expected);
    assert_eq!((bench.counters.udp_mappings.get(), bench.counters.udp_out.get()), (2, 4));
    assert_eq!(bench.device.next(), None);
}

#[test]
fn answers_come_from_whom_the_port_has_sent_to_and_from_nobody_else() {
    let mut bench = bench();
    let port = opened(&mut bench);
    send(&mut bench, 4001, OTHER, b"question");
    // Another address, another port of the peer's, whom another port has sent to, and IPv6.
    for stranger in ["192.0.2.10:443", "192.0.2.9:444", OTHER, "[2001:db8::9]:443", "[::ffff:192.0.2.9]:443"] {
        port.put(b"stranger", stranger);
    }
    port.put(b"answer", PEER);
    port.put(b"", PEER);
    assert_eq!(next(&mut bench), Some((PEER.parse().unwrap(), 4000, b"answer".to_vec())));
    assert_eq!(next(&mut bench), Some((PEER.parse().unwrap(), 4000, b"".to_vec())));
    assert_eq!(next(&mut bench), None);
    assert_eq!((bench.counters.drop_udp_stranger.get(), bench.counters.udp_in.get()), (5, 2));
}

#[test]
fn a_port_ends_two_minutes_after_the_guests_last_packet() {
    let mut bench = bench();
    let port = opened(&mut bench);
    bench.later(100);
    send(&mut bench, 4000, PEER, b"refreshes");
    bench.later(119);
    port.put(b"answer", PEER);
    assert!(next(&mut bench).is_some(), "and refreshes nothing");
    assert!(bench.shard.next_deadline().unwrap() <= bench.now + smoltcp::time::Duration::from_secs(1));
    drop(port);
    assert_eq!((bench.outside.ports().len(), bench.shard.held()[8]), (1, 1));
    bench.later(1);
    assert_eq!((bench.outside.ports().len(), bench.shard.held()[8]), (0, 0));
    assert_eq!((bench.counters.udp_mappings_ended.get(), bench.shard.next_deadline()), (1, None));
    send(&mut bench, 4000, PEER, b"again");
    assert_eq!(left(&bench), [[sent(b"again", PEER)]]);
}

#[test]
fn a_peer_that_the_port_does_not_speak_to_any_more_is_a_stranger_again() {
    let mut bench = bench();
    let port = opened(&mut bench);
    for _ in 0..2 {
        bench.later(60);
        send(&mut bench, 4000, OTHER, b"goes on");
    }
    port.put(b"late", PEER);
    port.put(b"answer", OTHER);
    assert_eq!(next(&mut bench), Some((OTHER.parse().unwrap(), 4000, b"answer".to_vec())));
    assert_eq!((next(&mut bench), bench.counters.drop_udp_stranger.get()), (None, 1));
}

#[test]
fn nobody_near_is_sent_to_nor_a_resolver_nor_what_is_refused() {
    let mut bench = bench();
    bench.outside.refuse("203.0.113.5/32");
    let near = NOT_FOR_GUESTS.iter().filter_map(|net| match net.network() {
        // Groups and reserved ones, with broadcast, are dropped as they come in, or are no address to send to.
        IpAddr::V4(ip) if !ip.is_unspecified() && !ip.is_multicast() => Some(format!("{}:443", first_host(ip))),
        _ => None,
    });
    let others = ["203.0.113.5:443", "192.0.2.9:53"].map(str::to_owned);
    let mut number = 0;
    for to in near.chain(others) {
        number += 1;
        send(&mut bench, 4000, &to, b"x");
        assert!(unreachable(&bench), "{to}");
        assert_eq!(bench.counters.udp_refused_forbidden.get(), number, "{to}");
    }
    assert!(number > 10);
    for to in ["224.0.0.1:443", "255.255.255.255:443", "0.0.0.0:443", "192.0.2.9:0"] {
        send(&mut bench, 4000, to, b"x");
        assert_eq!(bench.device.next(), None, "{to}");
    }
    assert_eq!((bench.outside.ports().len(), bench.counters.udp_mappings.get()), (0, 0));
    send(&mut bench, 4000, PEER, b"goes");
    assert_eq!(left(&bench).len(), 1);
}

fn first_host(network: Ipv4Addr) -> Ipv4Addr {
    (u32::from(network) + 1).into()
}

#[test]
fn whom_the_port_speaks_to_is_asked_about_again() {
    let mut bench = bench();
    let _port = opened(&mut bench);
    bench.later(9);
    send(&mut bench, 4000, PEER, b"goes");
    assert_eq!((left(&bench)[0].len(), bench.outside.asked()), (1, 1));
    bench.later(1);
    send(&mut bench, 4000, PEER, b"goes");
    assert_eq!((left(&bench)[0].len(), bench.outside.asked()), (1, 2));
    // It became this machine's own.
    bench.outside.refuse("192.0.2.9/32");
    bench.later(10);
    send(&mut bench, 4000, PEER, b"does not");
    assert!(left(&bench)[0].is_empty() && unreachable(&bench));
}

#[test]
fn ports_and_peers_are_bounded_and_nobody_has_to_make_room() {
    let mut bench = bench();
    let peer = |number: usize| format!("198.51.{}.{}:443", number / 200 + 1, number % 200 + 1);
    for number in 0..PEERS {
        send(&mut bench, 4000, &peer(number), b"x");
    }
    send(&mut bench, 4000, &peer(PEERS), b"x");
    assert!(unreachable(&bench));
    assert_eq!((bench.counters.udp_refused_peers.get(), left(&bench)[0].len()), (1, PEERS));
    for port in 1..PORTS as u16 {
        send(&mut bench, 4000 + port, PEER, b"x");
    }
    send(&mut bench, 3999, PEER, b"x");
    assert!(unreachable(&bench));
    assert_eq!((bench.counters.udp_refused_full.get(), bench.outside.ports().len()), (1, PORTS));
    // Those that are there go on; a peer that is over gives its place away.
    bench.later(60);
    send(&mut bench, 4000, &peer(0), b"y");
    bench.later(60);
    send(&mut bench, 4000, &peer(PEERS), b"y");
    send(&mut bench, 3999, PEER, b"y");
    assert_eq!(bench.device.next(), None);
    assert_eq!(left(&bench), [vec![sent(b"y", &peer(0)), sent(b"y", &peer(PEERS))], vec![sent(b"y", PEER)]]);
}

#[test]
fn without_a_descriptor_udp_is_refused_and_the_controller_told() {
    let mut bench = bench();
    bench.outside.fail(Some(libc::EMFILE));
    send(&mut bench, 4000, PEER, b"x");
    assert!(unreachable(&bench));
    assert_eq!((bench.counters.udp_refused_no_socket.get(), bench.counters.udp_mappings.get()), (1, 0));
    assert!(matches!(bench.events.try_recv(), Ok(Event::Shortage(Shortage::Descriptors))));
    bench.outside.fail(None);
    opened(&mut bench);
}

#[test]
fn what_cannot_be_is_dropped_without_an_answer() {
    let mut bench = bench();
    let changed = |at: usize, bytes: &[u8]| {
        let mut packet = packet(4000, PEER, b"payload");
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        fix_header(&mut packet);
        guest_ipv4(&packet)
    };
    for (what, frame) in [
        ("a wrong checksum", changed(26, &[1, 1])),
        ("a wrong payload", changed(30, b"x")),
        ("a length beyond the packet's", changed(24, &[0, 16])),
        ("a length below the header's", changed(24, &[0, 7])),
        ("no source port", changed(20, &[0, 0])),
        ("a fragment", changed(6, &[0x20, 0])),
        ("a later fragment", changed(6, &[0, 9])),
        ("a total length below the headers'", changed(2, &[0, 27])),
        ("another source", changed(15, &[9])),
    ] {
        bench.feed(&frame);
        bench.turn();
        assert_eq!((bench.device.next(), bench.outside.asked()), (None, 0), "{what}");
    }
    let drops = [&bench.counters.drop_checksum, &bench.counters.drop_malformed, &bench.counters.drop_fragment];
    assert_eq!(drops.map(crate::counters::Counter::get), [2, 4, 2]);
    // None is legal (RFC 768).
    bench.feed(&changed(26, &[0, 0]));
    assert_eq!(left(&bench), [[sent(b"payload", PEER)]]);
}

#[test]
fn what_is_longer_than_the_guests_mtu_is_dropped() {
    let mut bench = bench();
    let port = opened(&mut bench);
    for length in [1473, 1474, 60_000, 1472] {
        port.put(&vec![7; length], PEER);
    }
    assert_eq!(next(&mut bench).map(|(_, _, payload)| payload), Some(vec![7; 1472]));
    assert_eq!((next(&mut bench), bench.counters.drop_udp_long.get()), (None, 3));
}

#[test]
fn what_the_system_does_not_take_is_lost_and_counted() {
    let mut bench = bench();
    let port = opened(&mut bench);
    for (number, errno) in
        [libc::EAGAIN, libc::EPERM, libc::ENETUNREACH, libc::ENOBUFS, libc::EMSGSIZE].iter().enumerate()
    {
        port.fail(Some(*errno));
        bench.feed(&guest_ipv4(&packet(4000, PEER, b"lost")));
        assert_eq!(bench.counters.drop_udp_send.get(), number as u64 + 1);
    }
    port.fail(None);
    send(&mut bench, 4000, PEER, b"goes");
    assert_eq!((port.sent(), bench.device.next()), (vec![sent(b"goes", PEER)], None));
}

#[test]
fn a_socket_that_fails_is_replaced_by_the_next_packet() {
    let mut bench = bench();
    let port = opened(&mut bench);
    port.fail(Some(libc::ENOMEM));
    port.put(b"last", PEER);
    assert!(next(&mut bench).is_some());
    drop(port);
    assert_eq!((bench.outside.ports().len(), bench.counters.udp_mappings_ended.get()), (0, 1));
    assert!(!bench.shard.is_busy());
    opened(&mut bench);
}

#[test]
fn a_flood_leaves_room_for_others_and_what_the_guest_does_not_take_stays_in_the_system() {
    let mut bench = bench();
    let flooded = opened(&mut bench);
    send(&mut bench, 4001, OTHER, b"x");
    let quiet = bench.outside.ports().remove(1);
    for _ in 0..200 {
        flooded.put(b"flood", PEER);
    }
    quiet.put(b"answer", OTHER);
    let mut turns = 0;
    while flooded.left() + quiet.left() > 0 {
        bench.turn();
        turns += 1;
        let ports: Vec<_> = std::iter::from_fn(|| bench.device.next()).map(|frame| read(&frame).1).collect();
        assert!(ports.len() <= 64, "{} in one turn", ports.len());
        assert!(turns > 1 || ports.contains(&4001));
        assert_eq!(bench.shard.is_busy(), flooded.left() > 0 || ports.len() == 64);
    }
    bench.turn();
    assert!(!bench.shard.is_busy());

    bench.device.fail(Some(libc::EAGAIN));
    for _ in 0..10 {
        flooded.put(b"flood", PEER);
    }
    bench.turn();
    assert_eq!(flooded.left(), 9, "one waits for the device");
    assert!(!bench.shard.is_busy(), "and nothing turns meanwhile");
    bench.device.fail(None);
    assert!(bench.shard.sender.flush());
    bench.shard.unblocked();
    assert!(bench.shard.is_busy());
    bench.turn();
    assert_eq!(std::iter::from_fn(|| bench.device.next()).count(), 10);
}

#[test]
fn what_comes_in_wakes_the_shard() {
    struct Woken(AtomicUsize);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let woken = Arc::new(Woken(AtomicUsize::new(0)));
    let mut bench = bench();
    bench.shard.register(&Arc::clone(&woken).into());
    let port = opened(&mut bench);
    assert_eq!(woken.0.load(Ordering::Relaxed), 0);
    for number in 1..4 {
        port.put(b"answer", PEER);
        assert_eq!(woken.0.load(Ordering::Relaxed), number);
        assert!(next(&mut bench).is_some() && !bench.shard.is_busy());
    }
}

#[test]
fn the_end_closes_all_ports() {
    let mut bench = bench();
    drop(opened(&mut bench));
    send(&mut bench, 4001, PEER, b"x");
    bench.shard.abort_all(bench.now);
    assert!(bench.outside.ports().is_empty() && !bench.shard.is_busy());
    assert_eq!((bench.shard.held(), bench.shard.next_deadline()), ([0; 9], None));
    assert_eq!(bench.counters.udp_mappings_ended.get(), 2);
}

#[tokio::test]
async fn a_link_without_it_and_a_device_of_programs_refuse_all_udp() {
    for framing in [Framing::Ethernet(LINK), Framing::Bare] {
        let mut bench = Bench::framed(framing);
        let frame = |packet: Vec<u8>| if framing == Framing::Bare { packet } else { guest_ipv4(&packet) };
        let mut broken = packet(4000, PEER, b"payload");
        broken[26] ^= 1;
        for packet in [packet(4000, PEER, b"x"), packet(4000, "10.0.0.1:53", b"x"), broken] {
            bench.feed(&frame(packet.clone()));
            bench.turn();
            let answer = bench.device.next().unwrap();
            let answer = &answer[framing.prefix()..];
            assert_eq!((&answer[20..22], &answer[28..]), (&[3, 3][..], &packet[..]));
        }
        assert_eq!((bench.counters.udp_unreachable.get(), bench.outside.asked(), bench.shard.held()), (3, 0, [0; 9]));
    }
}

#[tokio::test]
async fn tcp_beside_it_is_as_before() {
    let mut bench = bench();
    let _port = opened(&mut bench);
    bench.feed(&guest_ipv4(&Packets::new("10.10.11.2", "192.0.2.9").tcp(SYN, 100, 0, b"")));
    bench.refuse(super::unreachable()).await;
    let answer = read_tcp(to_guest(&bench.device.next().unwrap()).unwrap());
    assert_eq!(answer.flags & RST, RST);
}

/// What a guest and the world around it do.
#[derive(Debug, Clone)]
enum Move {
    /// From a port, to a peer.
    Send(u16, u8),
    /// A damaged one: which byte, and what it becomes.
    Damaged(usize, u8),
    Bytes(Vec<u8>),
    /// The socket of so many receives from a peer.
    Receive(usize, u8),
    Block(bool),
    Later(u8),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        4 => (1..4_u16, 0..8_u8).prop_map(|(port, peer)| Move::Send(port, peer)),
        2 => (0..40_usize, any::<u8>()).prop_map(|(at, byte)| Move::Damaged(at, byte)),
        1 => proptest::collection::vec(any::<u8>(), 0..120).prop_map(Move::Bytes),
        4 => (0..3_usize, 0..8_u8).prop_map(|(socket, peer)| Move::Receive(socket, peer)),
        1 => any::<bool>().prop_map(Move::Block),
        2 => any::<u8>().prop_map(Move::Later),
    ];
    proptest::collection::vec(one, 1..80)
}

proptest! {
    #[test]
    fn whatever_comes_only_those_get_in_that_were_sent_to(moves in moves()) {
        let mut bench = bench();
        let peer = |number: u8| format!("192.0.2.{}:{}", number / 2 + 1, number % 2 + 1);
        let mut known = HashSet::<SocketAddr>::new();
        for step in moves {
            match step {
                Move::Send(port, number) => send(&mut bench, port, &peer(number), b"x"),
                Move::Damaged(at, byte) => {
                    let mut frame = guest_ipv4(&packet(4, PEER, b"x"));
                    if let Some(at) = frame.get_mut(at) {
                        *at = byte;
                    }
                    fix_header(&mut frame[14..]);
                    bench.feed(&frame);
                }
                Move::Bytes(bytes) => bench.feed(&guest_ipv4(&bytes)),
                Move::Receive(socket, number) => {
                    if let Some(port) = bench.outside.ports().get(socket) {
                        port.put(b"y", &peer(number));
                    }
                }
                Move::Block(blocked) => {
                    bench.device.fail(blocked.then_some(libc::EAGAIN));
                    if bench.shard.sender.flush() {
                        bench.shard.unblocked();
                    }
                }
                Move::Later(seconds) => bench.later(u64::from(seconds)),
            }
            known.extend(left(&bench).into_iter().flatten().map(|(_, to)| SocketAddr::from(to)));
            bench.turn();
            while let Some(frame) = bench.device.next() {
                if frame[14 + 9] == 17 {
                    let (from, ..) = read(&frame);
                    prop_assert!(known.contains(&from), "{from} got in");
                }
            }
        }
        bench.device.fail(None);
        bench.shard.sender.flush();
        bench.later(120);
        bench.later(120);
        prop_assert_eq!((bench.shard.next_deadline(), bench.shard.held()), (None, [0; 9]));
    }
}
