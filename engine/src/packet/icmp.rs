//! ICMP port-unreachable, so that UDP programs (QUIC above all) give up at once and fall back to TCP.

use std::net::IpAddr;

use super::checksum::Sum;

/// An answer never makes the IPv4 packet longer than this (RFC 1812 section 4.3.2.3).
const MAX_V4: usize = 576;
/// An answer never makes the IPv6 packet longer than this (RFC 4443 section 2.4 (c)).
const MAX_V6: usize = 1280;
const HOP_LIMIT: u8 = 64;

/// The answer to the UDP packet `original` (an IP packet from `source` to `destination`): Destination Unreachable, port
/// (RFC 792, RFC 4443 section 3.1), from the address that was asked, quoting as much as fits. `None` for mixed families.
pub(crate) fn port_unreachable(original: &[u8], source: IpAddr, destination: IpAddr) -> Option<Vec<u8>> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let quote = &original[..original.len().min(MAX_V4 - 28)];
            let mut packet = Vec::with_capacity(28 + quote.len());
            packet.extend_from_slice(&[0x45, 0xc0]);
            packet.extend_from_slice(&u16::try_from(28 + quote.len()).ok()?.to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0, 0, HOP_LIMIT, 1, 0, 0]);
            packet.extend_from_slice(&destination.octets());
            packet.extend_from_slice(&source.octets());
            let sum = Sum::default().add(&packet).checksum();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend_from_slice(&[3, 3, 0, 0, 0, 0, 0, 0]);
            packet.extend_from_slice(quote);
            let sum = Sum::default().add(&packet[20..]).checksum();
            packet[22..24].copy_from_slice(&sum.to_be_bytes());
            Some(packet)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let quote = &original[..original.len().min(MAX_V6 - 48)];
            let mut packet = Vec::with_capacity(48 + quote.len());
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&u16::try_from(8 + quote.len()).ok()?.to_be_bytes());
            packet.extend_from_slice(&[58, HOP_LIMIT]);
            packet.extend_from_slice(&destination.octets());
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
            packet.extend_from_slice(quote);
            let length = packet.len() - 40;
            let sum = Sum::pseudo_header(destination.into(), source.into(), 58, length).add(&packet[40..]).checksum();
            packet[42..44].copy_from_slice(&sum.to_be_bytes());
            Some(packet)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, Ipv4Packet, Ipv4Repr};
    use smoltcp::wire::{Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr, Ipv6Packet};

    use super::*;

    fn v4(length: u16) -> Vec<u8> {
        let mut original = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 192, 0, 2, 9];
        original[2..4].copy_from_slice(&length.to_be_bytes());
        original.resize(length.into(), 0xaa);
        port_unreachable(&original, "10.0.0.1".parse().unwrap(), "192.0.2.9".parse().unwrap()).unwrap()
    }

    #[test]
    fn a_v4_answer_is_well_formed_and_quotes_the_packet() {
        let answer = v4(400);
        let ip = Ipv4Packet::new_checked(&answer[..]).unwrap();
        let repr = Ipv4Repr::parse(&ip, &ChecksumCapabilities::default()).unwrap();
        assert_eq!((repr.src_addr.to_string(), repr.dst_addr.to_string()), ("192.0.2.9".into(), "10.0.0.1".into()));
        let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        let parsed = Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::default()).unwrap();
        let Icmpv4Repr::DstUnreachable { reason, header, data } = parsed else { unreachable!("{parsed:?}") };
        assert_eq!(reason, Icmpv4DstUnreachable::PortUnreachable);
        assert_eq!((header.dst_addr.to_string(), data.len()), ("192.0.2.9".into(), 380));
    }

    #[test]
    fn a_long_v4_packet_is_quoted_in_part() {
        let answer = v4(1500);
        assert_eq!(answer.len(), 576);
        assert_eq!(Ipv4Packet::new_checked(&answer[..]).unwrap().total_len(), 576);
        assert!(Sum::default().add(&answer[20..]).is_valid());
    }

    #[test]
    fn a_v6_answer_is_well_formed_and_stays_below_the_minimum_mtu() {
        let (source, destination) = ("fd00::1".parse().unwrap(), "2001:db8::9".parse().unwrap());
        let mut original = vec![0x60, 0, 0, 0, 0x05, 0xb4, 17, 64];
        for address in [source, destination] {
            let IpAddr::V6(address) = address else { unreachable!() };
            original.extend_from_slice(&address.octets());
        }
        original.resize(1500, 0xbb);
        let answer = port_unreachable(&original, source, destination).unwrap();
        assert_eq!(answer.len(), 1280);
        let ip = Ipv6Packet::new_checked(&answer[..]).unwrap();
        let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        let parsed =
            Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &icmp, &ChecksumCapabilities::default()).unwrap();
        let Icmpv6Repr::DstUnreachable { reason, .. } = parsed else { unreachable!("{parsed:?}") };
        assert_eq!(reason, Icmpv6DstUnreachable::PortUnreachable);
    }
}
