//! Frames of a guest on its link.

use std::net::Ipv4Addr;

use crate::config::Link;
use crate::packet::ethernet;

/// The link of the tests.
pub(crate) const LINK: Link = Link {
    guest: Ipv4Addr::new(10, 10, 11, 2),
    gateway: Ipv4Addr::new(10, 10, 11, 1),
    guest_mac: [0x52, 0x54, 0, 0x10, 0x11, 2],
    gateway_mac: [0x52, 0x54, 0, 0x10, 0x11, 1],
    udp: false,
};

/// A frame of the guest's to its gateway.
pub(crate) fn guest(kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ethernet::LENGTH + payload.len());
    frame.extend_from_slice(&LINK.gateway_mac);
    frame.extend_from_slice(&LINK.guest_mac);
    frame.extend_from_slice(&kind);
    frame.extend_from_slice(payload);
    frame
}

/// A frame of the guest's with an IPv4 packet.
pub(crate) fn guest_ipv4(packet: &[u8]) -> Vec<u8> {
    guest([8, 0], packet)
}

/// The guest asks everybody who has `address`.
pub(crate) fn who_has(address: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend_from_slice(&LINK.guest_mac);
    packet.extend_from_slice(&LINK.guest.octets());
    packet.extend_from_slice(&[0; 6]);
    packet.extend_from_slice(&address.octets());
    let mut frame = guest([8, 6], &packet);
    frame[..6].fill(0xff);
    frame
}

/// The IPv4 packet in a frame of the engine's.
pub(crate) fn to_guest(frame: &[u8]) -> Result<&[u8], String> {
    let (header, packet) = frame.split_first_chunk().ok_or("a frame without a header")?;
    let destination = packet.get(16..20).unwrap_or_default();
    if *header != ethernet::header(&LINK) || destination != LINK.guest.octets() {
        return Err(format!("a frame for somebody else: {header:?}, {destination:?}"));
    }
    Ok(packet)
}
