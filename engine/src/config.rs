//! What the engine is told.

use std::net::Ipv4Addr;
use std::sync::Arc;

use crate::owner::Owners;
use crate::upstream::Connector;

/// Settings of an [`Engine`](crate::Engine).
#[derive(Debug, Clone)]
pub struct Config {
    /// MTU of the device, 1280 to 65535 bytes, without an Ethernet header.
    pub mtu: u16,
    /// Bounds on what the engine may use.
    pub limits: Limits,
    /// The way out.
    pub connector: Arc<Connector>,
    /// Tells whose a connection is, so that what is scarce is shared between users; without it, between hosts.
    pub owners: Option<Arc<dyn Owners>>,
}

/// The two ends of a virtual machine's link: who may send, and whom it finds there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The guest's address, the only one that it may send from.
    pub guest: Ipv4Addr,
    /// The engine's address, for nothing else than to be asked for by ARP (RFC 826).
    pub gateway: Ipv4Addr,
    /// MAC address of the guest's device.
    pub guest_mac: [u8; 6],
    /// MAC address that the engine answers by.
    pub gateway_mac: [u8; 6],
    /// Whether the guest's UDP leaves too, by sockets of this machine with the connector's mark, to where
    /// [`Connector::refused`](crate::upstream::Connector::refused) lets it ([`Connector::only`](crate::upstream::Connector::only)
    /// is of TCP); never to [`NOT_FOR_GUESTS`](crate::upstream::NOT_FOR_GUESTS) or a DNS port. With another upstream than
    /// [`Upstream::Direct`](crate::upstream::Upstream::Direct) it does not.
    pub udp: bool,
}

/// Bounds of all shards together; what goes over one is refused with a RST and counted. Once more than half of `flows` or `pending` is in
/// use, a user or host gets more only while it has less than what is still free, so one alone reaches three quarters.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Flows, from the SYN to the end.
    pub flows: usize,
    /// Flows whose upstream has not answered yet.
    pub pending: usize,
    /// Bytes of each of a flow's two rings.
    pub ring: usize,
    /// Bytes that all rings together may hold. Rings hold the pages that were used, until the flow comes to rest or ends. Above the
    /// half flows grow less, the more they hold already.
    pub memory: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { flows: 98_304, pending: 4_096, ring: 256 * 1024, memory: 1 << 30 }
    }
}
