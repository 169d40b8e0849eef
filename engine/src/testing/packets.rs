//! Packets of a program, made and read with smoltcp's wire formats.

use std::net::IpAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpAddress, IpProtocol, IpRepr, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, TcpControl, TcpPacket, TcpRepr,
    TcpSeqNumber,
};

use super::to_guest;
use crate::device::Framing;
use crate::packet::checksum::Sum;
use crate::packet::parse::{ACK, FIN, RST, SYN, Tuple};

/// Makes the packets of one program's connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packets {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) source_port: u16,
    /// What every segment offers, in bytes.
    pub(crate) window: u16,
}

impl Packets {
    pub(crate) fn new(source: &str, destination: &str) -> Self {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        Self { source, destination, source_port: 4000, window: 60_000 }
    }

    pub(crate) fn tuple(&self) -> Tuple {
        Tuple {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port,
            destination_port: 80,
        }
    }

    /// A SYN with sequence number `seq` and an MSS of 1400.
    pub(crate) fn syn(&self, seq: i32) -> Vec<u8> {
        self.tcp(SYN, seq, 0, &[])
    }

    /// A segment.
    pub(crate) fn tcp(&self, flags: u8, seq: i32, ack: i32, payload: &[u8]) -> Vec<u8> {
        let control = match flags & (SYN | FIN | RST) {
            SYN => TcpControl::Syn,
            FIN => TcpControl::Fin,
            RST => TcpControl::Rst,
            _ => TcpControl::None,
        };
        let tcp = TcpRepr {
            src_port: self.source_port,
            dst_port: 80,
            control,
            seq_number: TcpSeqNumber(seq),
            ack_number: (flags & ACK != 0).then_some(TcpSeqNumber(ack)),
            window_len: self.window,
            window_scale: None,
            max_seg_size: (flags & SYN != 0).then_some(1400),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload,
        };
        self.ip(IpProtocol::Tcp, tcp.buffer_len(), |buffer| {
            tcp.emit(
                &mut TcpPacket::new_unchecked(buffer),
                &IpAddress::from(self.source),
                &IpAddress::from(self.destination),
                &ChecksumCapabilities::default(),
            );
        })
    }

    /// A UDP packet.
    pub(crate) fn udp(&self, payload: &[u8]) -> Vec<u8> {
        self.ip(IpProtocol::Udp, 8 + payload.len(), |buffer| {
            buffer[..2].copy_from_slice(&self.source_port.to_be_bytes());
            buffer[2..4].copy_from_slice(&443_u16.to_be_bytes());
            buffer[4..6].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
            buffer[8..].copy_from_slice(payload);
        })
    }

    fn ip(&self, protocol: IpProtocol, length: usize, emit: impl FnOnce(&mut [u8])) -> Vec<u8> {
        let ip = IpRepr::new(self.source.into(), self.destination.into(), protocol, length, 64);
        let mut packet = vec![0; ip.buffer_len()];
        ip.emit(&mut packet[..], &ChecksumCapabilities::default());
        emit(&mut packet[ip.header_len()..]);
        packet
    }
}

/// Corrects the checksum of an IPv4 header, as far as there is one.
pub(crate) fn fix_header(packet: &mut [u8]) {
    let length = packet.first().filter(|byte| **byte >> 4 == 4).map_or(0, |byte| usize::from(byte & 15) * 4);
    if length >= 20 && packet.len() >= length {
        packet[10..12].fill(0);
        let sum = Sum::default().add(&packet[..length]).checksum();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// A TCP segment that the engine sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) tuple: Tuple,
    pub(crate) flags: u8,
    pub(crate) seq: i32,
    pub(crate) ack: i32,
    pub(crate) window: u16,
    pub(crate) payload: Vec<u8>,
}

/// Takes a complete TCP packet of the engine's apart; its checksums must be right.
pub(crate) fn read_tcp(packet: &[u8]) -> Sent {
    let all = ChecksumCapabilities::default();
    let (source, destination, payload): (IpAddr, IpAddr, _) = if packet[0] >> 4 == 4 {
        let ip = Ipv4Packet::new_checked(packet).unwrap();
        let repr = Ipv4Repr::parse(&ip, &all).unwrap();
        (repr.src_addr.into(), repr.dst_addr.into(), ip.payload())
    } else {
        let ip = Ipv6Packet::new_checked(packet).unwrap();
        let repr = Ipv6Repr::parse(&ip).unwrap();
        (repr.src_addr.into(), repr.dst_addr.into(), ip.payload())
    };
    let tcp = TcpPacket::new_checked(payload).unwrap();
    TcpRepr::parse(&tcp, &source.into(), &destination.into(), &all).unwrap();
    let flags = [(tcp.fin(), FIN), (tcp.syn(), SYN), (tcp.rst(), RST), (tcp.ack(), ACK)];
    Sent {
        tuple: Tuple { source, destination, source_port: tcp.src_port(), destination_port: tcp.dst_port() },
        flags: flags.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum(),
        seq: tcp.seq_number().0,
        ack: tcp.ack_number().0,
        window: tcp.window_len(),
        payload: tcp.payload().to_vec(),
    }
}

/// What the kernel makes of a frame of ours: the packet, its checksum complete. A super-segment stays whole, after a look at
/// how it is to be cut; `mss` is the largest payload that may go uncut.
pub(crate) fn complete(framing: Framing, frame: &[u8], mss: usize) -> Result<Vec<u8>, String> {
    let (header, packet) = match framing {
        Framing::Ethernet(_) => (&[][..], to_guest(frame)?),
        _ => frame.split_at(framing.prefix()),
    };
    let mut packet = packet.to_vec();
    let payload = || {
        let ip_header = if packet[0] >> 4 == 6 { 40 } else { usize::from(packet[0] & 15) * 4 };
        packet.len() - ip_header - usize::from(packet[ip_header + 12] >> 4) * 4
    };
    let short = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
    if header.is_empty() || header[0] & 1 == 0 {
        let is_tcp = packet[if packet[0] >> 4 == 6 { 6 } else { 9 }] == 6;
        let fits = !is_tcp || header.is_empty() && payload() <= mss;
        return if fits { Ok(packet) } else { Err(format!("a frame without what it needs: {header:?}")) };
    }
    let (length, kind, size, start, at) = (payload(), header[1], short(4), short(6), short(6) + short(8));
    let expected = if packet[0] >> 4 == 6 { 4 } else { 1 };
    let cut = kind == expected && size > 0 && size <= mss && short(2) == packet.len() - length;
    if !(kind == 0 && length <= mss || cut) {
        return Err(format!("{length} bytes of payload under the header {header:?}"));
    }
    let sum = Sum::default().add(&packet[start..]).checksum();
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    Ok(packet)
}
