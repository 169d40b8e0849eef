//! What the engine tells.

use std::net::SocketAddr;

use crate::upstream::{ConnectError, Shortage};

/// Something that the controller must act on. Events are coalesced: a flood of failures is one event.
#[derive(Debug)]
pub enum Event {
    /// The device can no longer be read or written (`EBADFD`: it was deleted; `UnexpectedEof`: the
    /// virtual machine closed its end of the link).
    DeviceLost(std::io::Error),
    /// Attempts to reach the upstream itself (not a destination behind it) failed several times in a row and none succeeded.
    UpstreamFailing(ConnectError),
    /// The upstream answers again after [`Event::UpstreamFailing`].
    UpstreamWorking,
    /// Connections are refused because this machine has run out of something. Told about once a second while it lasts.
    Shortage(Shortage),
    /// A shard ended unexpectedly; the engine is of no use any more.
    Failed(String),
}

/// One flow, as `proxyctl flows` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowInfo {
    /// Unique while the process lives.
    pub id: u64,
    /// Address on this machine.
    pub source: SocketAddr,
    /// Address that the program asked for.
    pub destination: SocketAddr,
    /// TCP state as in `ss`.
    pub state: &'static str,
    /// Bytes to the upstream.
    pub sent: u64,
    /// Bytes from the upstream.
    pub received: u64,
    /// Milliseconds since the SYN.
    pub age: u64,
}
