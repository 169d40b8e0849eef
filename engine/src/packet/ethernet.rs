//! Ethernet on a guest's link: the header is ours, so that smoltcp sees IP packets only. It would answer ARP for every address, learn
//! neighbours from anybody, and lose a RST to one that it does not know yet.
//!
//! The link has two ends, and both are known: what is not from the one to the other is dropped here, before anything else looks at it.

use super::parse::Drop;
use crate::config::Link;

/// Bytes of the header.
pub(crate) const LENGTH: usize = 14;

const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];
const BROADCAST: [u8; 6] = [0xff; 6];

/// Bytes of an ARP packet for IPv4 over Ethernet (RFC 826).
const ARP_LENGTH: usize = 28;
/// How such a packet begins: hardware Ethernet, protocol IPv4, lengths of their addresses.
const ARP_START: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];

/// What a guest's frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Frame<'a> {
    /// What claims to be an IPv4 packet from the guest's address; nothing else of it is checked.
    Ipv4(&'a [u8]),
    /// The guest asks for its gateway's MAC address.
    WhoHasGateway,
}

/// Sorts `frame`, which came from the guest of `link`.
///
/// # Errors
/// Why it is dropped.
pub(crate) fn parse<'a>(link: &Link, frame: &'a [u8]) -> Result<Frame<'a>, Drop> {
    let (header, payload) = frame.split_first_chunk::<LENGTH>().ok_or(Drop::Malformed)?;
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *header;
    let (destination, source) = ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]);
    if source != link.guest_mac {
        return Err(Drop::Mac);
    }
    match [t0, t1] {
        // Sent to groups, mostly: counted as what it is.
        IPV6 => Err(Drop::Ipv6),
        IPV4 if destination == link.gateway_mac => from_guest(link, payload),
        ARP if destination == link.gateway_mac || destination == BROADCAST => question(link, payload),
        IPV4 | ARP => Err(Drop::Mac),
        _ => Err(Drop::EtherType),
    }
}

fn from_guest<'a>(link: &Link, packet: &'a [u8]) -> Result<Frame<'a>, Drop> {
    let fixed: &[u8; 20] = packet.first_chunk().ok_or(Drop::Malformed)?;
    // IPv6 in disguise would have its source elsewhere.
    if fixed[0] >> 4 != 4 {
        return Err(Drop::Malformed);
    }
    if fixed[12..16] == link.guest.octets() { Ok(Frame::Ipv4(packet)) } else { Err(Drop::Source) }
}

/// Nothing but "who has the gateway's address, tell the guest": all else that ARP can say would be a claim to somebody's address.
fn question<'a>(link: &Link, packet: &[u8]) -> Result<Frame<'a>, Drop> {
    let packet: &[u8; ARP_LENGTH] = packet.first_chunk().ok_or(Drop::Malformed)?;
    let asked = packet[..6] == ARP_START
        && packet[6..8] == REQUEST
        && packet[8..14] == link.guest_mac
        && packet[14..18] == link.guest.octets()
        && packet[24..28] == link.gateway.octets();
    if asked { Ok(Frame::WhoHasGateway) } else { Err(Drop::Arp) }
}

/// The header of an IPv4 packet to the guest.
pub(crate) fn header(link: &Link) -> [u8; LENGTH] {
    header_of(link, IPV4)
}

fn header_of(link: &Link, kind: [u8; 2]) -> [u8; LENGTH] {
    let mut header = [0; LENGTH];
    header[..6].copy_from_slice(&link.guest_mac);
    header[6..12].copy_from_slice(&link.gateway_mac);
    header[12..].copy_from_slice(&kind);
    header
}

/// The frame that tells the guest its gateway's MAC address.
pub(crate) fn gateway_is_at(link: &Link) -> [u8; LENGTH + ARP_LENGTH] {
    let mut frame = [0; LENGTH + ARP_LENGTH];
    frame[..LENGTH].copy_from_slice(&header_of(link, ARP));
    let packet = &mut frame[LENGTH..];
    packet[..6].copy_from_slice(&ARP_START);
    packet[6..8].copy_from_slice(&REPLY);
    packet[8..14].copy_from_slice(&link.gateway_mac);
    packet[14..18].copy_from_slice(&link.gateway.octets());
    packet[18..24].copy_from_slice(&link.guest_mac);
    packet[24..].copy_from_slice(&link.guest.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{LINK, guest, who_has};

    /// A frame of the guest's with an IPv4 packet that is nothing but a source.
    fn ipv4() -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[12..16].copy_from_slice(&LINK.guest.octets());
        guest(IPV4, &packet)
    }

    fn changed(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    }

    #[test]
    fn the_guests_packets_pass() {
        let frame = ipv4();
        assert_eq!(parse(&LINK, &frame), Ok(Frame::Ipv4(&frame[LENGTH..])));
    }

    #[test]
    fn what_is_not_from_the_guest_to_its_gateway_is_dropped() {
        const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];
        for (what, frame, reason) in [
            ("another sender", changed(ipv4(), 6, &OTHER), Drop::Mac),
            ("the gateway itself as sender", changed(ipv4(), 6, &LINK.gateway_mac), Drop::Mac),
            ("to somebody else", changed(ipv4(), 0, &OTHER), Drop::Mac),
            ("to everybody", changed(ipv4(), 0, &BROADCAST), Drop::Mac),
            ("to a group", changed(ipv4(), 0, &[1, 0, 0x5e, 0, 0, 1]), Drop::Mac),
            ("a question of somebody else", changed(who_has(LINK.gateway), 6, &OTHER), Drop::Mac),
            ("a question to somebody else", changed(who_has(LINK.gateway), 0, &OTHER), Drop::Mac),
            ("from another address", changed(ipv4(), LENGTH + 12, &[10, 10, 10, 2]), Drop::Source),
            ("from the gateway's address", changed(ipv4(), LENGTH + 12, &LINK.gateway.octets()), Drop::Source),
            ("IPv6", changed(ipv4(), 12, &IPV6), Drop::Ipv6),
            ("IPv6 to a group", changed(changed(ipv4(), 12, &IPV6), 0, &[0x33, 0x33, 0, 0, 0, 1]), Drop::Ipv6),
            ("IPv6 that says IPv4", changed(ipv4(), LENGTH, &[0x60]), Drop::Malformed),
            ("a VLAN", changed(ipv4(), 12, &[0x81, 0]), Drop::EtherType),
            ("IEEE 802.3", changed(ipv4(), 12, &[0, 40]), Drop::EtherType),
        ] {
            assert_eq!(parse(&LINK, &frame), Err(reason), "{what}");
        }
    }

    #[test]
    fn frames_that_are_cut_are_malformed() {
        for whole in [ipv4(), who_has(LINK.gateway)] {
            for length in 0..whole.len() {
                assert_eq!(parse(&LINK, &whole[..length]), Err(Drop::Malformed), "cut to {length}");
            }
        }
    }

    #[test]
    fn only_the_question_for_the_gateway_is_answered() {
        let asked = who_has(LINK.gateway);
        assert_eq!(parse(&LINK, &asked), Ok(Frame::WhoHasGateway));
        assert_eq!(parse(&LINK, &changed(asked.clone(), 0, &LINK.gateway_mac)), Ok(Frame::WhoHasGateway));
        for (what, at, bytes) in [
            ("for another address", 24, &[10, 10, 11, 9][..]),
            ("for its own (announcement)", 24, &LINK.guest.octets()),
            ("from no address (probe)", 14, &[0; 4]),
            ("from another address", 14, &[10, 10, 11, 9]),
            ("from another MAC address", 8, &[2, 0, 0, 0, 0, 9]),
            ("a reply", 6, &REPLY),
            ("RARP", 6, &[0, 3]),
            ("not for Ethernet", 0, &[0, 6]),
            ("not for IPv4", 2, &IPV6),
            ("other lengths", 4, &[4, 6]),
        ] {
            assert_eq!(parse(&LINK, &changed(asked.clone(), LENGTH + at, bytes)), Err(Drop::Arp), "{what}");
        }
    }

    #[test]
    fn the_answer_is_what_rfc_826_has() {
        let expected = [
            &LINK.guest_mac[..],
            &LINK.gateway_mac,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
            &LINK.gateway_mac,
            &LINK.gateway.octets(),
            &LINK.guest_mac,
            &LINK.guest.octets(),
        ];
        assert_eq!(gateway_is_at(&LINK)[..], expected.concat());
    }
}
