//! What each fuzz target does with its bytes. A broken promise is a panic.

use std::net::{IpAddr, SocketAddrV4};

use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket};
use tokio::runtime::Runtime;
use tokio::task::yield_now;

use crate::config::{Limits, Link};
use crate::device::{Content, Framing, MAX_FRAME};
use crate::packet::checksum::Sum;
use crate::packet::ethernet::gateway_is_at;
use crate::packet::icmp::port_unreachable;
use crate::packet::parse::{self, Drop as Reason, Packet, Segment};
use crate::packet::udp;
use crate::testing::{Bench, Far, LINK, Script, complete, fix_header, guest_ipv4, pair, who_has, world};
use crate::upstream::{ConnectError, NOT_FOR_GUESTS};

thread_local! {
    static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
}

/// Frame, IP and TCP headers, checksums, ICMP answers.
pub fn parse(bytes: &[u8]) {
    let Some((choice, frame)) = bytes.split_first() else { return };
    let framing = if choice & 1 == 0 { Framing::Bare } else { Framing::Vnet };
    let Ok(Content::Packet(packet, vouched_for)) = framing.split(frame) else { return };
    let mut packet = packet.to_vec();
    if choice & 2 == 0 {
        fix_header(&mut packet);
    }
    sums(&packet);
    let vouched_for = vouched_for || choice & 4 == 0;
    match parse::parse(&packet, vouched_for) {
        Ok(Packet::Tcp(segment)) => {
            assert!(packet.starts_with(segment.packet));
            tcp(&segment);
            segment.mss();
            let mut kept = segment.without_payload().to_vec();
            fix_header(&mut kept);
            let Ok(Packet::Tcp(again)) = parse::parse(&kept, true) else { panic!("{kept:?} is no packet any more") };
            assert_eq!((again.tuple, again.flags, again.packet), (segment.tuple, segment.flags, &kept[..]));
        }
        Ok(Packet::Udp { packet, source, destination }) => {
            unreachable(packet, source, destination);
            datagram(packet, source, destination);
        }
        Err(_) => {}
    }
}

/// The checksum against the definition (RFC 1071 section 1).
fn sums(bytes: &[u8]) {
    let mut sum = 0_u32;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let (left, right) = bytes.split_at(bytes.len() / 4 * 2);
    assert_eq!(u32::from(Sum::default().add(left).add(right).folded()), sum);
}

/// smoltcp must be able to read what the engine hands it.
fn tcp(segment: &Segment<'_>) {
    let tuple = segment.tuple;
    let (source, destination, payload): (IpAddr, IpAddr, _) = if tuple.is_v6() {
        let ip = Ipv6Packet::new_checked(segment.packet).unwrap();
        (ip.src_addr().into(), ip.dst_addr().into(), ip.payload())
    } else {
        let ip = Ipv4Packet::new_checked(segment.packet).unwrap();
        (ip.src_addr().into(), ip.dst_addr().into(), ip.payload())
    };
    let tcp = TcpPacket::new_checked(payload).unwrap();
    assert_eq!((source, destination), (tuple.source, tuple.destination));
    assert_eq!((tcp.src_port(), tcp.dst_port()), (tuple.source_port, tuple.destination_port));
    assert_eq!(segment.headers + tcp.payload().len(), segment.packet.len());
}

/// An answer to a datagram is a valid packet to where that came from.
fn unreachable(packet: &[u8], source: IpAddr, destination: IpAddr) {
    let answer = port_unreachable(packet, source, destination).unwrap();
    let (to, quote) = if source.is_ipv6() {
        let ip = Ipv6Packet::new_checked(&answer[..]).unwrap();
        let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        assert!(icmp.verify_checksum(&ip.src_addr(), &ip.dst_addr()) && answer.len() <= 1280);
        (IpAddr::from(ip.dst_addr()), &answer[48..])
    } else {
        let ip = Ipv4Packet::new_checked(&answer[..]).unwrap();
        let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        assert!(ip.verify_checksum() && icmp.verify_checksum() && answer.len() <= 576);
        (IpAddr::from(ip.dst_addr()), &answer[28..])
    };
    assert!(to == source && packet.starts_with(quote));
}

/// What a guest's would be taken for is what smoltcp reads.
fn datagram(packet: &[u8], source: IpAddr, destination: IpAddr) {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (source, destination) else { return };
    let ip = Ipv4Packet::new_checked(packet).unwrap();
    let read = UdpPacket::new_checked(ip.payload());
    match (udp::parse(packet, source, destination), read) {
        (Ok(datagram), Ok(read)) => {
            assert!(read.verify_checksum(&source.into(), &destination.into()));
            let ports = (datagram.source_port, datagram.destination.port());
            assert_eq!((ports, datagram.payload), ((read.src_port(), read.dst_port()), read.payload()));
        }
        (Err(Reason::Checksum), Ok(read)) => assert!(!read.verify_checksum(&source.into(), &destination.into())),
        (Err(Reason::Malformed), Ok(read)) => assert!(read.src_port() == 0 || read.dst_port() == 0),
        (parsed, read) => assert!(parsed.is_err() && read.is_err(), "{parsed:?} {read:?}"),
    }
}

/// The answer to CONNECT, however it is cut.
pub fn answer(bytes: &[u8]) {
    let (pieces, bytes) = bytes.split_at(bytes.len().min(4));
    crate::upstream::harness::answer(pieces, bytes);
}

/// Any frames, one after the other, into a shard whose upstream accepts or refuses.
pub fn frames(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let framing = if script.byte() & 1 == 0 { Framing::Bare } else { Framing::Vnet };
    fed(framing, script);
}

/// The same on a guest's link, by which UDP leaves: what is not its own is not taken in.
pub fn link(bytes: &[u8]) {
    fed(Framing::Ethernet(Link { udp: true, ..LINK }), Script::new(bytes));
}

fn fed(framing: Framing, mut script: Script<'_>) {
    const LIMITS: Limits = Limits { flows: 3, pending: 2, ring: 8192, memory: 64 << 20 };
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let mut bench = Bench::wrapped(framing, LIMITS, |device| device);
            let mut fars = Vec::<Far>::new();
            let (mut packets, mut questions) = (0, 0);
            let mut peers = Vec::new();
            while !script.is_over() {
                let choice = script.byte();
                let length = script.below(2000);
                let mut frame = script.take(length).to_vec();
                if let Framing::Ethernet(_) = framing {
                    disguise(&mut frame, choice);
                }
                if choice & 1 == 0
                    && let Some(packet) = frame.get_mut(framing.prefix()..)
                {
                    fix_header(packet);
                    if let Framing::Ethernet(_) = framing {
                        fix_transport(packet);
                    }
                }
                match framing {
                    Framing::Ethernet(_) => {
                        packets += u64::from(is_guests(&frame));
                        questions += u64::from(is_question(&frame));
                    }
                    _ => packets += u64::from(frame.len() >= framing.prefix()),
                }
                bench.feed(&frame);
                sent_to(&bench, &mut peers);
                yield_now().await;
                if let Some((_, attempt)) = bench.attempts.next() {
                    let outcome = if choice & 2 == 0 {
                        let (tunnel, far) = pair(choice, usize::from(choice), 4096);
                        fars.push(far);
                        Ok(tunnel)
                    } else {
                        Err(ConnectError::Forbidden([127, 0, 0, 1].into()))
                    };
                    // The attempt may have been given up.
                    let _ = attempt.send(outcome);
                    yield_now().await;
                }
                while let Ok((id, outcome)) = bench.outcomes.try_recv() {
                    bench.shard.connected(bench.now, id, outcome);
                }
                match (choice >> 2 & 15, fars.last_mut()) {
                    (0, _) => bench.now += smoltcp::time::Duration::from_millis(700),
                    (1, Some(far)) => far.write(3000),
                    (2, Some(far)) => far.finish(),
                    (3, Some(far)) => far.close(),
                    (4..8, _) => come_in(&bench, &peers, choice),
                    _ => {}
                }
                bench.turn();
                written(&mut bench, framing, &peers);
            }
            drop(fars);
            for _ in 0..1000 {
                yield_now().await;
                bench.turn();
                written(&mut bench, framing, &peers);
                if bench.shard.is_busy() {
                    continue;
                }
                let Some(next) = bench.shard.next_deadline() else { break };
                bench.now = next.max(bench.now);
            }
            assert_eq!((bench.shard.next_deadline(), bench.shard.held()), (None, [0; 9]));
            assert_eq!((bench.counters.packets_in.get(), bench.counters.arp_answered.get()), (packets, questions));
        });
    });
}

/// Makes of `frame` something that comes further than noise, as `choice` says.
fn disguise(frame: &mut [u8], choice: u8) {
    let (question, packet) = (who_has(LINK.gateway), guest_ipv4(&[]));
    let template = if choice & 0xc0 == 0x40 { &question } else { &packet };
    if choice & 0xc0 != 0xc0 {
        let length = template.len().min(frame.len());
        frame[..length].copy_from_slice(&template[..length]);
    }
    if choice & 0xc0 == 0
        && let Some(source) = frame.get_mut(26..30)
    {
        source.copy_from_slice(&LINK.guest.octets());
    }
}

/// Corrects the checksum of a TCP segment or a datagram: nobody vouches for a guest's.
fn fix_transport(packet: &mut [u8]) {
    let (source, destination, protocol, at) = match parse::parse(packet, true) {
        // No guest's; how long it is stands elsewhere.
        Ok(_) if packet[0] >> 4 == 6 => return,
        Ok(Packet::Tcp(Segment { tuple, .. })) => (tuple.source, tuple.destination, 6, 16),
        Ok(Packet::Udp { source, destination, .. }) => (source, destination, 17, 6),
        Err(_) => return,
    };
    let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let header = usize::from(packet[0] & 15) * 4;
    let mut segment = &mut packet[header..total];
    if protocol == 17 {
        let length = usize::from(u16::from_be_bytes([segment[4], segment[5]])).clamp(8, segment.len());
        segment = &mut segment[..length];
    }
    segment[at..at + 2].fill(0);
    let sum = Sum::pseudo_header(source, destination, protocol, segment.len()).add(segment).checksum();
    segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Adds to `peers` whom the guest's ports sent to. Only to those that may be.
fn sent_to(bench: &Bench, peers: &mut Vec<SocketAddrV4>) {
    for (_, to) in bench.outside.ports().iter().flat_map(|port| port.sent()) {
        let near = NOT_FOR_GUESTS.iter().any(|net| net.contains(&IpAddr::V4(*to.ip())));
        assert!(!near && ![0, 53].contains(&to.port()), "{to} was sent to");
        peers.push(to);
    }
}

/// Lets a datagram come in by one of the guest's ports: from a peer, or from a stranger beside one.
fn come_in(bench: &Bench, peers: &[SocketAddrV4], choice: u8) {
    let (ports, choice) = (bench.outside.ports(), usize::from(choice));
    if let (Some(port), Some(peer)) = (ports.get(choice % ports.len().max(1)), peers.last()) {
        let stranger = SocketAddrV4::new(*peer.ip(), !peer.port());
        let from = if choice & 1 == 0 { *peer } else { stranger };
        port.put(&vec![7; choice * 8], &from.to_string());
    }
}

fn is_guests(frame: &[u8]) -> bool {
    let ip = frame.get(14..).unwrap_or_default();
    frame.starts_with(&guest_ipv4(&[])) && ip.len() >= 20 && ip[0] >> 4 == 4 && ip[12..16] == LINK.guest.octets()
}

fn is_question(frame: &[u8]) -> bool {
    let question = who_has(LINK.gateway);
    let to = [&[0xff; 6], &LINK.gateway_mac];
    // Whose MAC address is asked for is what the asker does not know.
    frame.len() >= question.len()
        && to.iter().any(|to| frame.starts_with(*to))
        && frame[6..32] == question[6..32]
        && frame[38..42] == question[38..]
}

/// Whatever the shard writes can be taken.
fn written(bench: &mut Bench, framing: Framing, peers: &[SocketAddrV4]) {
    while let Some(frame) = bench.device.next() {
        assert!(frame.len() <= MAX_FRAME);
        if let Framing::Ethernet(link) = framing
            && frame == gateway_is_at(&link)
        {
            continue;
        }
        let packet = complete(framing, &frame, 1460).unwrap();
        if let (Framing::Ethernet(_), &[_, _, _, _, _, _, _, _, _, 17, ..]) = (framing, &packet[..]) {
            let port = u16::from_be_bytes([packet[20], packet[21]]);
            let from = SocketAddrV4::new([packet[12], packet[13], packet[14], packet[15]].into(), port);
            assert!(packet.len() <= 1500 && peers.contains(&from), "{from} got in with {} bytes", packet.len());
        }
    }
}

/// The whole loop among models: see [`world`].
pub fn turns(bytes: &[u8]) {
    RUNTIME.with(|runtime| {
        if let Err(error) = runtime.block_on(world::run(bytes, "turns")) {
            panic!("{error}");
        }
    });
}
