//! Sorts an IP packet: TCP for the flow table, UDP to be refused, or a reason to drop it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum::Sum;

const TCP: u8 = 6;
const UDP: u8 = 17;

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

    /// The maximum segment size that a SYN announces (RFC 9293 section 3.7.1), if it does.
    pub(crate) fn mss(&self) -> Option<u16> {
        let ip_header = if self.tuple.is_v6() { 40 } else { usize::from(self.packet[0] & 0x0f) * 4 };
        let mut options = &self.packet[ip_header + 20..self.headers];
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
    /// To be refused.
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
