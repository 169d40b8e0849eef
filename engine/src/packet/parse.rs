//! Sorts an IP packet: TCP for the flow table, UDP to be refused or carried, or a reason to drop it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum::Sum;

const TCP: u8 = 6;
/// UDP's number in an IP header.
pub(super) const UDP: u8 = 17;

/// FIN bit of a TCP header (RFC 9293 section 3.1).
pub(crate) const FIN: u8 = 0x01;
/// SYN bit.
pub(crate) const SYN: u8 = 0x02;
/// RST bit.
pub(crate) const RST: u8 = 0x04;
/// ACK bit.
pub(crate) const ACK: u8 = 0x10;

/// The two ends of a connection, as the program sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Tuple {
    /// The program's address.
    pub(crate) source: IpAddr,
    /// The address that it wants.
    pub(crate) destination: IpAddr,
    /// The program's port.
    pub(crate) source_port: u16,
    /// The port that it wants; never 0, like the other.
    pub(crate) destination_port: u16,
}

impl Tuple {
    /// True for IPv6.
    pub(crate) fn is_v6(&self) -> bool {
        self.source.is_ipv6()
    }
}

/// Where a segment's data stands in the program's stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Data {
    /// Sequence number of its first byte.
    pub(crate) sequence: u32,
    /// Bytes.
    pub(crate) length: usize,
}

/// A TCP segment, all lengths checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment<'a> {
    /// Whose it is.
    pub(crate) tuple: Tuple,
    /// Flags byte of the TCP header.
    pub(crate) flags: u8,
    /// The IP packet, without anything after its end.
    pub(crate) packet: &'a [u8],
    /// Bytes of the IP and the TCP header.
    pub(crate) headers: usize,
}

impl Segment<'_> {
    /// True for the first packet of a connection.
    pub(crate) fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// The headers alone, the IP length corrected: what is kept of a SYN until the upstream has answered. The IPv4 header
    /// checksum is not: the stack behind does not verify it again.
    pub(crate) fn without_payload(&self) -> Box<[u8]> {
        let mut packet: Box<[u8]> = self.packet[..self.headers].into();
        // Both headers together are at most 60 + 60 bytes.
        let (at, length) = if self.tuple.is_v6() { (4, self.headers - 40) } else { (2, self.headers) };
        packet[at..at + 2].copy_from_slice(&(length as u16).to_be_bytes());
        packet
    }

    /// The sequence number.
    pub(crate) fn sequence(&self) -> u32 {
        let number = self.packet.get(self.ip_header() + 4..).and_then(|rest| rest.first_chunk());
        number.map_or(0, |number| u32::from_be_bytes(*number))
    }

    /// The same without FIN, and the FIN alone behind it; `None` when there is no FIN, or no data before it.
    pub(crate) fn split_fin(&self) -> Option<[Box<[u8]>; 2]> {
        let Data { sequence, length } = self.data();
        if self.flags & (FIN | RST) != FIN || length == 0 {
            return None;
        }
        let (mut data, mut fin) = (Box::<[u8]>::from(self.packet), self.without_payload());
        let tcp = self.ip_header();
        data[tcp + 13] &= !FIN;
        fin[tcp + 4..tcp + 8].copy_from_slice(&sequence.wrapping_add(length as u32).to_be_bytes());
        Some([data, fin])
    }

    /// Where its data stands in the stream.
    pub(crate) fn data(&self) -> Data {
        Data { sequence: self.sequence(), length: self.packet.len() - self.headers }
    }

    fn ip_header(&self) -> usize {
        if self.tuple.is_v6() { 40 } else { usize::from(self.packet[0] & 0x0f) * 4 }
    }

    /// The maximum segment size that a SYN announces (RFC 9293 section 3.7.1), if it does.
    pub(crate) fn mss(&self) -> Option<u16> {
        let mut options = &self.packet[self.ip_header() + 20..self.headers];
        loop {
            match *options {
                [] | [0, ..] => return None,
                [1, ref rest @ ..] => options = rest,
                [2, 4, high, low, ..] => return Some(u16::from_be_bytes([high, low])),
                [_, length, ..] if length >= 2 => options = options.get(usize::from(length)..)?,
                _ => return None,
            }
        }
    }
}

/// What a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packet<'a> {
    /// For the flow table.
    Tcp(Segment<'a>),
    /// To be refused, or a guest's to be carried. Its header is not looked at yet.
    Udp {
        /// The IP packet.
        packet: &'a [u8],
        /// Who asks.
        source: IpAddr,
        /// Who is asked.
        destination: IpAddr,
    },
}

/// Why a packet is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drop {
    /// Neither IPv4 nor IPv6, or a header or length that cannot be.
    Malformed,
    /// A checksum that does not fit.
    Checksum,
    /// A fragment.
    Fragment,
    /// To a group or to everyone.
    Multicast,
    /// From or to an address that no host can have.
    Address,
    /// Neither TCP nor UDP, or behind an IPv6 extension header.
    NotTcp,
    /// A guest's frame under a MAC address that it does not have, or to somebody else than its gateway.
    Mac,
    /// A guest's frame that is neither IP nor ARP.
    EtherType,
    /// A guest's ARP, other than the one question that is answered.
    Arp,
    /// A guest's IPv6.
    Ipv6,
    /// A guest's packet from an address that it does not have.
    Source,
}

/// Sorts `packet`. Its transport checksum is verified unless it is `vouched_for`.
///
/// # Errors
/// Why it is dropped.
pub(crate) fn parse(packet: &[u8], vouched_for: bool) -> Result<Packet<'_>, Drop> {
    let (packet, header, protocol, source, destination) = match packet.first().map(|byte| byte >> 4) {
        Some(4) => ipv4(packet)?,
        Some(6) => ipv6(packet)?,
        _ => return Err(Drop::Malformed),
    };
    if destination.is_multicast() || destination == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(Drop::Multicast);
    }
    let impossible = source.is_unspecified()
        || source.is_multicast()
        || source == IpAddr::V4(Ipv4Addr::BROADCAST)
        || destination.is_unspecified();
    if impossible {
        return Err(Drop::Address);
    }
    let transport = &packet[header..];
    match protocol {
        TCP => {
            let [s0, s1, d0, d1, _, _, _, _, _, _, _, _, offset, flags, ..] = *transport else {
                return Err(Drop::Malformed);
            };
            let tcp_header = usize::from(offset >> 4) * 4;
            let (source_port, destination_port) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
            if tcp_header < 20 || tcp_header > transport.len() || source_port == 0 || destination_port == 0 {
                return Err(Drop::Malformed);
            }
            let sum = || Sum::pseudo_header(source, destination, TCP, transport.len()).add(transport);
            if !vouched_for && !sum().is_valid() {
                return Err(Drop::Checksum);
            }
            let tuple = Tuple { source, destination, source_port, destination_port };
            Ok(Packet::Tcp(Segment { tuple, flags, packet, headers: header + tcp_header }))
        }
        UDP if transport.len() >= 8 => Ok(Packet::Udp { packet, source, destination }),
        UDP => Err(Drop::Malformed),
        _ => Err(Drop::NotTcp),
    }
}

type Header<'a> = (&'a [u8], usize, u8, IpAddr, IpAddr);

/// RFC 791.
fn ipv4(packet: &[u8]) -> Result<Header<'_>, Drop> {
    let fixed: &[u8; 20] = packet.first_chunk().ok_or(Drop::Malformed)?;
    let header = usize::from(fixed[0] & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
    if header < 20 || total < header || total > packet.len() {
        return Err(Drop::Malformed);
    }
    let packet = &packet[..total];
    if !Sum::default().add(&packet[..header]).is_valid() {
        return Err(Drop::Checksum);
    }
    // More Fragments, or an offset.
    if u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3fff != 0 {
        return Err(Drop::Fragment);
    }
    let source = Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]);
    let destination = Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]);
    Ok((packet, header, fixed[9], source.into(), destination.into()))
}

/// RFC 8200.
fn ipv6(packet: &[u8]) -> Result<Header<'_>, Drop> {
    const FRAGMENT: u8 = 44;
    let fixed: &[u8; 40] = packet.first_chunk().ok_or(Drop::Malformed)?;
    let total = 40 + usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
    if total > packet.len() {
        return Err(Drop::Malformed);
    }
    if fixed[6] == FRAGMENT {
        return Err(Drop::Fragment);
    }
    let mut source = [0; 16];
    source.copy_from_slice(&fixed[8..24]);
    let mut destination = [0; 16];
    destination.copy_from_slice(&fixed[24..40]);
    Ok((&packet[..total], 40, fixed[6], Ipv6Addr::from(source).into(), Ipv6Addr::from(destination).into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's failure")]

    use proptest::prelude::*;

    use super::*;
    use crate::testing::Packets;

    fn v4() -> Packets {
        Packets::new("10.0.0.1", "192.0.2.9")
    }

    fn v6() -> Packets {
        Packets::new("fd00::1", "2001:db8::9")
    }

    fn segment(packet: &[u8], vouched_for: bool) -> Segment<'_> {
        match parse(packet, vouched_for) {
            Ok(Packet::Tcp(segment)) => segment,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_syn_of_either_family_is_understood() {
        for packets in [v4(), v6()] {
            let packet = packets.syn(7);
            let segment = segment(&packet, false);
            assert!(segment.opens());
            assert_eq!(segment.tuple, packets.tuple());
            assert_eq!(segment.mss(), Some(1400));
            assert_eq!(segment.headers, packet.len());
        }
    }

    #[test]
    fn bytes_behind_the_end_of_the_packet_are_cut_off() {
        for packets in [v4(), v6()] {
            let mut packet = packets.syn(7);
            let length = packet.len();
            packet.extend_from_slice(b"padding");
            assert_eq!(segment(&packet, false).packet.len(), length);
        }
    }

    #[test]
    fn what_is_kept_of_a_syn_has_no_payload_and_is_a_packet_again() {
        for packets in [v4(), v6()] {
            let packet = packets.tcp(SYN, 7, 0, &[9; 1000]);
            let kept = segment(&packet, false).without_payload();
            assert_eq!(kept.len(), packet.len() - 1000);
            let mut kept = kept.to_vec();
            if !packets.tuple().is_v6() {
                // Stale on purpose: the stack does not verify it again.
                crate::testing::fix_header(&mut kept);
            }
            assert_eq!(segment(&kept, true).packet.len(), kept.len());
        }
    }

    #[test]
    fn a_wrong_checksum_counts_unless_someone_vouches_for_it() {
        for packets in [v4(), v6()] {
            let mut packet = packets.tcp(ACK, 7, 8, b"hello");
            *packet.last_mut().unwrap() ^= 1;
            assert_eq!(parse(&packet, false), Err(Drop::Checksum));
            assert!(parse(&packet, true).is_ok());
        }
        let mut packet = v4().syn(7);
        packet[8] ^= 1;
        assert_eq!(parse(&packet, true), Err(Drop::Checksum), "nobody vouches for an IPv4 header");
    }

    #[test]
    fn fragments_are_dropped() {
        for bits in [[0x20, 0], [0, 1], [0x1f, 0xff]] {
            let mut packet = v4().syn(7);
            packet[6..8].copy_from_slice(&bits);
            crate::testing::fix_header(&mut packet);
            assert_eq!(parse(&packet, true), Err(Drop::Fragment));
        }
        let mut packet = v4().syn(7);
        packet[6..8].copy_from_slice(&[0x40, 0]);
        crate::testing::fix_header(&mut packet);
        assert!(parse(&packet, true).is_ok(), "don't fragment is no fragment");
        let mut packet = v6().syn(7);
        packet[6] = 44;
        assert_eq!(parse(&packet, true), Err(Drop::Fragment));
    }

    #[test]
    fn groups_and_impossible_addresses_are_dropped() {
        for (source, destination, reason) in [
            ("10.0.0.1", "224.0.0.1", Drop::Multicast),
            ("10.0.0.1", "255.255.255.255", Drop::Multicast),
            ("fd00::1", "ff02::1", Drop::Multicast),
            ("10.0.0.1", "0.0.0.0", Drop::Address),
            ("0.0.0.0", "192.0.2.9", Drop::Address),
            ("224.0.0.1", "192.0.2.9", Drop::Address),
            ("255.255.255.255", "192.0.2.9", Drop::Address),
            ("::", "2001:db8::9", Drop::Address),
            ("fd00::1", "::", Drop::Address),
            ("ff02::1", "2001:db8::9", Drop::Address),
        ] {
            assert_eq!(parse(&Packets::new(source, destination).syn(7), false), Err(reason), "{source} {destination}");
        }
    }

    #[test]
    fn lengths_that_cannot_be_are_malformed() {
        for packets in [v4(), v6()] {
            let packet = packets.syn(7);
            for length in 0..packet.len() {
                assert_eq!(parse(&packet[..length], true), Err(Drop::Malformed), "cut to {length}");
            }
            let mut packet = packets.syn(7);
            let offset = packet.len() - 24 + 12;
            for words in [0, 4, 7, 15] {
                packet[offset] = words << 4;
                assert_eq!(parse(&packet, true), Err(Drop::Malformed), "{words} words of TCP header");
            }
        }
    }

    #[test]
    fn other_protocols_are_not_tcp() {
        for next in [0, 43, 50, 58, 60] {
            let mut packet = v6().syn(7);
            packet[6] = next;
            assert_eq!(parse(&packet, true), Err(Drop::NotTcp));
        }
        let mut packet = v4().syn(7);
        packet[9] = 1;
        crate::testing::fix_header(&mut packet);
        assert_eq!(parse(&packet, true), Err(Drop::NotTcp));
    }

    #[test]
    fn broken_options_give_no_mss() {
        for options in [[2, 4, 5, 0xb4], [1, 1, 1, 0], [2, 0, 0, 0], [2, 3, 0, 0], [9, 200, 0, 0], [1, 1, 1, 2]] {
            let mut packet = v4().syn(7);
            let end = packet.len();
            packet[end - 4..].copy_from_slice(&options);
            let expected = (options == [2, 4, 5, 0xb4]).then_some(1460);
            assert_eq!(segment(&packet, true).mss(), expected, "{options:?}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), version in any::<bool>()) {
            if let Some(first) = bytes.first_mut() {
                *first = if version { 0x60 | (*first & 15) } else { 0x40 | (*first & 15) };
            }
            if let Ok(Packet::Tcp(segment)) = parse(&bytes, true) {
                segment.mss();
                segment.without_payload();
            }
        }

        #[test]
        fn a_damaged_packet_never_panics(six in any::<bool>(), at in 0_usize..64, byte in any::<u8>(), vouched in any::<bool>()) {
            let mut packet = if six { v6() } else { v4() }.syn(7);
            let length = packet.len();
            packet[at % length] = byte;
            if !six {
                crate::testing::fix_header(&mut packet);
            }
            if let Ok(Packet::Tcp(segment)) = parse(&packet, vouched) {
                segment.mss();
                segment.without_payload();
            }
        }
    }
}
