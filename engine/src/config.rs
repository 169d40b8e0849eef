//! What the engine is told.

use std::sync::Arc;

use crate::upstream::Connector;

/// Settings of an [`Engine`](crate::Engine).
#[derive(Debug, Clone)]
pub struct Config {
    /// MTU of the device, 1280 to 65535 bytes.
    pub mtu: u16,
    /// Bounds on what the engine may use.
    pub limits: Limits,
    /// The way out.
    pub connector: Arc<Connector>,
}

/// Bounds; what goes over one is refused with a RST and counted.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Established flows, all shards together.
    pub flows: usize,
    /// Flows whose upstream has not answered yet, all shards together.
    pub pending: usize,
    /// Bytes of each of a flow's two rings.
    pub ring: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { flows: 65_536, pending: 4_096, ring: 256 * 1024 }
    }
}
