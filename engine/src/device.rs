//! The device seam: frames in and out, and smoltcp's view of them.
//!
//! A frame is an IP packet behind a fixed number of bytes ([`Framing`]): the virtio-net header of a TUN queue, the Ethernet header of a
//! guest's link, or nothing.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta, SegmentationCapabilities};
use smoltcp::time::Instant;
use tokio::io::unix::AsyncFd;

use crate::config::Link;
use crate::counters::Counters;
use crate::packet::checksum::Sum;
use crate::packet::ethernet;
use crate::packet::parse::Drop as Reason;
use crate::packet::vnet::{self, TcpOffload};

/// The largest IP packet, and the largest super-segment.
pub(crate) const MAX_PACKET: usize = 65_535;
/// Room for the longest prefix and packet.
pub(crate) const MAX_FRAME: usize = ethernet::LENGTH + MAX_PACKET;

const TCP: u8 = 6;

/// What stands in front of each IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// A virtio-net header: checksums and segmentation are the other side's work.
    Vnet,
    /// Nothing: packets are complete and fit the MTU.
    Bare,
    /// An Ethernet header between the two ends of a link; packets as with [`Bare`](Self::Bare), IPv4 only.
    Ethernet(Link),
}

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content<'a> {
    /// A packet, and whether its checksum needs no verifying.
    Packet(&'a [u8], bool),
    /// The guest asks for its gateway's MAC address.
    WhoHasGateway,
}

impl Framing {
    /// Bytes in front of the packet.
    pub(crate) fn prefix(&self) -> usize {
        match self {
            Self::Vnet => vnet::LENGTH,
            Self::Bare => 0,
            Self::Ethernet(_) => ethernet::LENGTH,
        }
    }

    /// Takes a frame apart.
    ///
    /// # Errors
    /// Why it is dropped: too short, or from or to somebody who has no business on the link.
    pub(crate) fn split<'f>(&self, frame: &'f [u8]) -> Result<Content<'f>, Reason> {
        match self {
            Self::Vnet => {
                let (header, packet) = frame.split_first_chunk().ok_or(Reason::Malformed)?;
                Ok(Content::Packet(packet, vnet::is_vouched_for(header)))
            }
            Self::Bare => Ok(Content::Packet(frame, false)),
            Self::Ethernet(link) => Ok(match ethernet::parse(link, frame)? {
                ethernet::Frame::Ipv4(packet) => Content::Packet(packet, false),
                ethernet::Frame::WhoHasGateway => Content::WhoHasGateway,
            }),
        }
    }

    /// What smoltcp may leave to the device. Its IPv6 path knows no segmentation: it drops what exceeds the MTU and passes no
    /// segment size on. So with offloads the IPv6 side is told the largest MTU and [`Port::mss6`] gives the size.
    pub(crate) fn capabilities(&self, mtu: u16, v6: bool) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(mtu);
        // What comes in was verified before smoltcp sees it.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        if *self == Self::Vnet {
            capabilities.checksum.tcp = Checksum::None;
            let largest = NonZeroUsize::new(MAX_PACKET);
            let mut segmentation = SegmentationCapabilities::default();
            if v6 {
                capabilities.max_transmission_unit = MAX_PACKET;
                segmentation.tcpv6 = largest;
            } else {
                segmentation.tcpv4 = largest;
            }
            capabilities.segmentation = segmentation;
        }
        capabilities
    }
}

/// Where frames go. One call is one frame; neither call blocks.
pub(crate) trait Queue {
    /// Reads a frame.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; anything else as the device says.
    fn read(&self, frame: &mut [u8]) -> io::Result<usize>;

    /// Writes a frame.
    ///
    /// # Errors
    /// `WouldBlock` when it cannot take one now; anything else as the device says.
    fn write(&self, frame: &[u8]) -> io::Result<()>;
}

/// A queue that an event loop can wait for.
pub(crate) trait Watched: Queue + AsRawFd + Send + Sized + 'static {
    /// Makes the queue non-blocking and registers it with the current runtime, for errors too.
    ///
    /// # Errors
    /// fcntl(2)'s and epoll_ctl(2)'s.
    fn watch(&self) -> io::Result<AsyncFd<Self>>;

    /// Why there will be no more frames, if the device is gone.
    fn lost(&self) -> Option<io::Error>;
}

/// The sending side of a queue. Frames that it cannot take at once wait here, because a segment lost on the way to the kernel
/// stalls its flow for a second.
#[derive(Debug)]
pub(crate) struct Sender<Q> {
    queue: Q,
    framing: Framing,
    frame: Box<[u8]>,
    waiting: VecDeque<Box<[u8]>>,
    lost: Option<io::Error>,
    counters: Arc<Counters>,
}

impl<Q: Queue> Sender<Q> {
    /// Sends into `queue`.
    pub(crate) fn new(queue: Q, framing: Framing, counters: Arc<Counters>) -> Self {
        let frame = vec![0; MAX_FRAME].into_boxed_slice();
        Self { queue, framing, frame, waiting: VecDeque::new(), lost: None, counters }
    }

    /// What stands in front of packets.
    pub(crate) fn framing(&self) -> &Framing {
        &self.framing
    }

    /// True while frames wait. Nothing that makes more of them may be started then.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Writes frames that wait; true when none is left.
    pub(crate) fn flush(&mut self) -> bool {
        while let Some(frame) = self.waiting.pop_front() {
            if !self.write(&frame) {
                self.waiting.push_front(frame);
                return false;
            }
        }
        true
    }

    /// The error that says that the device is gone, once.
    pub(crate) fn take_lost(&mut self) -> Option<io::Error> {
        self.lost.take()
    }

    /// Sends a complete IP packet.
    pub(crate) fn send_packet(&mut self, packet: &[u8]) {
        let prefix = self.framing.prefix();
        let mut frame = vec![0; prefix + packet.len()];
        frame[prefix..].copy_from_slice(packet);
        if let Framing::Ethernet(link) = &self.framing {
            frame[..prefix].copy_from_slice(&ethernet::header(link));
        }
        self.send_whole(frame.into());
    }

    /// Tells a guest its gateway's MAC address.
    pub(crate) fn answer_who_has(&mut self) {
        if let Framing::Ethernet(link) = &self.framing {
            self.send_whole(Box::new(ethernet::gateway_is_at(link)));
        }
    }

    fn send_whole(&mut self, frame: Box<[u8]>) {
        if self.is_blocked() || !self.write(&frame) {
            self.waiting.push_back(frame);
        }
    }

    /// False when the queue would block.
    fn write(&mut self, frame: &[u8]) -> bool {
        match self.queue.write(frame) {
            Ok(()) => {
                self.counters.packets_out.increment();
                self.counters.bytes_out.add((frame.len() - self.framing.prefix()) as u64);
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                self.counters.drop_device.increment();
                if is_lost(&error) {
                    self.lost.get_or_insert(error);
                }
                true
            }
        }
    }

    /// Sends `self.frame[..length]`.
    fn send_frame(&mut self, length: usize) {
        // Lent out for the call, so that `write` can borrow the rest.
        let frame = std::mem::take(&mut self.frame);
        if self.is_blocked() || !self.write(&frame[..length]) {
            self.waiting.push_back(frame[..length].into());
        }
        self.frame = frame;
    }
}

/// True for the errors of a queue whose device is gone, as against one that is down or refuses one packet.
pub(crate) fn is_lost(error: &io::Error) -> bool {
    let Some(code) = error.raw_os_error() else { return false };
    let tun = matches!(code, libc::EBADFD | libc::EFAULT | libc::ENODEV | libc::ENXIO | libc::EBADF);
    tun || matches!(code, libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN)
}

/// smoltcp's view: at most one packet to take in, and a [`Sender`].
#[derive(Debug)]
pub(crate) struct Port<'p, Q> {
    /// The packet that [`phy::Device::receive`] gives, once.
    pub(crate) packet: Option<&'p [u8]>,
    /// Where packets go.
    pub(crate) sender: &'p mut Sender<Q>,
    /// What the interface was made with.
    pub(crate) capabilities: &'p DeviceCapabilities,
    /// The program's maximum segment size, for IPv6 with segmentation offload.
    pub(crate) mss6: u16,
}

impl<Q: Queue> phy::Device for Port<'_, Q> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Transmit<'a, Q>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Transmit<'_, Q>)> {
        let packet = self.packet.take()?;
        Some((Received(packet), Transmit { sender: self.sender, segment: 0, mss6: self.mss6 }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmit<'_, Q>> {
        if self.sender.is_blocked() {
            return None;
        }
        Some(Transmit { sender: self.sender, segment: 0, mss6: self.mss6 })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

/// The packet to take in.
#[derive(Debug)]
pub(crate) struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Leave to send one packet.
#[derive(Debug)]
pub(crate) struct Transmit<'a, Q> {
    sender: &'a mut Sender<Q>,
    segment: u16,
    mss6: u16,
}

impl<Q: Queue> phy::TxToken for Transmit<'_, Q> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let prefix = self.sender.framing.prefix();
        let end = prefix + length;
        if self.sender.frame.len() < end {
            // smoltcp keeps to `MAX_PACKET`; a longer packet would still be whole here, and the device would refuse it.
            self.sender.frame = vec![0; end].into_boxed_slice();
        }
        let result = f(&mut self.sender.frame[prefix..end]);
        let (header, packet) = self.sender.frame[..end].split_at_mut(prefix);
        match &self.sender.framing {
            Framing::Vnet => header.copy_from_slice(&offload(packet, self.segment, self.mss6)),
            Framing::Bare => {}
            Framing::Ethernet(link) => header.copy_from_slice(&ethernet::header(link)),
        }
        self.sender.send_frame(end);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map_or(0, std::num::NonZeroU16::get);
    }
}

/// Prepares a packet of smoltcp's for the offloading device and gives the header for it.
fn offload(packet: &mut [u8], segment: u16, mss6: u16) -> [u8; vnet::LENGTH] {
    let plain = [0; vnet::LENGTH];
    let Some((ip_header, protocol, source, destination)) = addresses(packet) else { return plain };
    let length = packet.len() - ip_header;
    let tcp = &mut packet[ip_header..];
    if protocol != TCP || length < 20 {
        return plain;
    }
    let sum = Sum::pseudo_header(source, destination, TCP, length).folded();
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let tcp_header = usize::from(tcp[12] >> 4) * 4;
    let v6 = source.is_ipv6();
    let segment = if v6 {
        // Options such as timestamps come out of the maximum segment size (RFC 6691).
        let size = usize::from(mss6).saturating_sub(tcp_header - 20);
        if size != 0 && length - tcp_header > size { size as u16 } else { 0 }
    } else {
        segment
    };
    TcpOffload { ip_header: ip_header as u16, tcp_header: tcp_header as u16, segment, v6 }.header()
}

/// IP header length, protocol and addresses of a packet that smoltcp wrote.
fn addresses(packet: &[u8]) -> Option<(usize, u8, IpAddr, IpAddr)> {
    match packet.first()? >> 4 {
        4 => {
            let fixed: &[u8; 20] = packet.first_chunk()?;
            let source = <[u8; 4]>::try_from(&fixed[12..16]).ok()?;
            let destination = <[u8; 4]>::try_from(&fixed[16..20]).ok()?;
            Some((usize::from(fixed[0] & 15) * 4, fixed[9], source.into(), destination.into()))
        }
        6 => {
            let fixed: &[u8; 40] = packet.first_chunk()?;
            let source = <[u8; 16]>::try_from(&fixed[8..24]).ok()?;
            let destination = <[u8; 16]>::try_from(&fixed[24..40]).ok()?;
            Some((40, fixed[6], source.into(), destination.into()))
        }
        _ => None,
    }
}
