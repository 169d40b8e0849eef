//! UDP over IPv4 (RFC 768): a guest's datagrams, and those for it.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::checksum::Sum;
use super::parse::{Drop, UDP};

/// Bytes of the two headers in front of a payload for the guest.
pub(crate) const HEADERS: usize = 28;
const HOP_LIMIT: u8 = 64;

/// A datagram, all lengths checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Datagram<'a> {
    /// The sender's port; never 0.
    pub(crate) source_port: u16,
    /// Who is to have it; the port is never 0.
    pub(crate) destination: SocketAddrV4,
    /// What was sent.
    pub(crate) payload: &'a [u8],
}

/// Takes a UDP packet apart that [`parse`](super::parse::parse) gave, from `source` to `destination`. Nobody vouches for its checksum.
///
/// # Errors
/// Why it is dropped.
pub(crate) fn parse(packet: &[u8], source: Ipv4Addr, destination: Ipv4Addr) -> Result<Datagram<'_>, Drop> {
    let header = packet.first().map_or(0, |byte| usize::from(byte & 0x0f) * 4);
    let udp = packet.get(header..).ok_or(Drop::Malformed)?;
    let [s0, s1, d0, d1, l0, l1, c0, c1, ..] = *udp else { return Err(Drop::Malformed) };
    let (source_port, port) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
    let length = usize::from(u16::from_be_bytes([l0, l1]));
    let udp = udp.get(..length).ok_or(Drop::Malformed)?;
    let payload = udp.get(8..).ok_or(Drop::Malformed)?;
    if source_port == 0 || port == 0 {
        return Err(Drop::Malformed);
    }
    // 0 says that the sender made none.
    let summed = [c0, c1] != [0, 0];
    if summed && !Sum::pseudo_header(source.into(), destination.into(), UDP, length).add(udp).is_valid() {
        return Err(Drop::Checksum);
    }
    Ok(Datagram { source_port, destination: SocketAddrV4::new(destination, port), payload })
}

/// Writes the headers of `packet`, a datagram of at most 65,535 bytes whose payload begins at [`HEADERS`].
pub(crate) fn address(packet: &mut [u8], source: SocketAddrV4, destination: SocketAddrV4) {
    let total = packet.len() as u16;
    let length = total.saturating_sub(20).to_be_bytes();
    let Some((ip, udp)) = packet.split_first_chunk_mut::<20>() else { return };
    let Some(header) = udp.first_chunk_mut::<8>() else { return };
    // Don't fragment: then the identification says nothing (RFC 6864 section 4.1).
    *ip = [0x45, 0, 0, 0, 0, 0, 0x40, 0, HOP_LIMIT, UDP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    ip[12..16].copy_from_slice(&source.ip().octets());
    ip[16..].copy_from_slice(&destination.ip().octets());
    let sum = Sum::default().add(ip).checksum();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let [s0, s1] = source.port().to_be_bytes();
    let [d0, d1] = destination.port().to_be_bytes();
    *header = [s0, s1, d0, d1, length[0], length[1], 0, 0];
    let sum = Sum::pseudo_header((*source.ip()).into(), (*destination.ip()).into(), UDP, udp.len()).add(udp);
    // 0 would say that there is none.
    let sum = if sum.checksum() == 0 { 0xffff } else { sum.checksum() };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{IpAddress, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr};

    use super::*;

    const GUEST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 10, 11, 2), 4000);
    const PEER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 9), 443);

    fn packet(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
        let mut packet = [&[0; HEADERS], payload].concat();
        address(&mut packet, from, to);
        packet
    }

    /// Of a datagram of the guest's with `bytes` at `at`.
    fn changed(at: usize, bytes: &[u8]) -> Result<Vec<u8>, Drop> {
        let mut packet = packet(GUEST, PEER, b"payload");
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        parse(&packet, *GUEST.ip(), *PEER.ip()).map(|datagram| datagram.payload.to_vec())
    }

    #[test]
    fn what_is_made_is_what_others_read() {
        for length in [0, 1, 2, 1200, 65_507] {
            let payload = vec![0xa5; length];
            let packet = packet(PEER, GUEST, &payload);
            let all = ChecksumCapabilities::default();
            let ip = Ipv4Packet::new_checked(&packet[..]).unwrap();
            let repr = Ipv4Repr::parse(&ip, &all).unwrap();
            assert_eq!((repr.src_addr, repr.dst_addr, repr.hop_limit), (*PEER.ip(), *GUEST.ip(), 64));
            assert!(ip.dont_frag());
            let udp = UdpPacket::new_checked(ip.payload()).unwrap();
            let addresses = [*PEER.ip(), *GUEST.ip()].map(IpAddress::from);
            let repr = UdpRepr::parse(&udp, &addresses[0], &addresses[1], &all).unwrap();
            assert_eq!((repr.src_port, repr.dst_port, udp.payload()), (443, 4000, &payload[..]));
        }
    }

    #[test]
    fn a_checksum_of_nothing_is_written_as_all_ones() {
        let found = (0..=u16::MAX).map(|number| packet(PEER, GUEST, &number.to_be_bytes()));
        let ones = found.clone().filter(|packet| packet[26..28] == [0xff, 0xff]).count();
        assert_eq!((ones, found.filter(|packet| packet[26..28] == [0, 0]).count()), (1, 0));
    }

    #[test]
    fn the_guests_datagrams_are_read_with_options_padding_and_without_a_checksum() {
        let mut packet = packet(GUEST, PEER, b"payload");
        let expected = Datagram { source_port: 4000, destination: PEER, payload: b"payload" };
        assert_eq!(parse(&packet, *GUEST.ip(), *PEER.ip()), Ok(expected));
        packet.extend_from_slice(b"behind its end");
        assert_eq!(parse(&packet, *GUEST.ip(), *PEER.ip()), Ok(expected));
        packet[26..28].fill(0);
        assert_eq!(parse(&packet, *GUEST.ip(), *PEER.ip()), Ok(expected));
        packet[0] = 0x46;
        packet.splice(20..20, [1; 4]);
        assert_eq!(parse(&packet, *GUEST.ip(), *PEER.ip()), Ok(expected));
    }

    #[test]
    fn what_cannot_be_is_dropped() {
        assert_eq!(changed(0, &[]).unwrap(), b"payload");
        for (what, at, bytes, reason) in [
            ("a wrong checksum", 26, &[1, 1], Drop::Checksum),
            ("other bytes", 32, &[0x20, 0x20], Drop::Checksum),
            ("a length below the header's", 24, &[0, 7], Drop::Malformed),
            ("no length", 24, &[0, 0], Drop::Malformed),
            ("a length beyond the packet's", 24, &[0, 16], Drop::Malformed),
            ("the longest length", 24, &[0xff, 0xff], Drop::Malformed),
            ("no source port", 20, &[0, 0], Drop::Malformed),
            ("no destination port", 22, &[0, 0], Drop::Malformed),
        ] {
            assert_eq!(changed(at, bytes), Err(reason), "{what}");
        }
        let whole = packet(GUEST, PEER, b"");
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length], *GUEST.ip(), *PEER.ip()), Err(Drop::Malformed), "cut to {length}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes, *GUEST.ip(), *PEER.ip());
            address(&mut bytes, PEER, GUEST);
        }
    }
}
