//! The way out of the engine: marked TCP connections to a destination, straight or through an HTTP proxy, and marked datagrams.
//!
//! - [`Upstream`], [`Target`], [`Connector`], [`Tunnel`]: what is asked for and what comes back (here)
//! - `connect`: [`Connector::connect`]
//! - `probe`: [`Connector::probe`]
//! - `credentials`: a user name and password that Basic authentication can carry
//! - `datagrams`: marked sockets for a guest's UDP
//! - `error`: [`ConnectError`], [`Shortage`]
//! - `exhausted`: addresses for which no port is left
//! - `http`: request and answer of CONNECT as bytes, no I/O
//! - `policy`: who may not be connected to; [`NOT_FOR_GUESTS`]
//! - `ports`: a window of local ports for each socket
//! - `socket`: sockets and their options, racing several addresses
//! - `sys`: a socket option that no crate has

mod connect;
mod credentials;
mod datagrams;
mod error;
mod exhausted;
#[cfg(feature = "harness")]
pub(crate) mod harness;
mod http;
mod policy;
mod ports;
mod probe;
mod socket;
mod sys;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

pub use credentials::{Credentials, CredentialsError};
pub(crate) use datagrams::{Socket, Sockets};
pub use error::{AuthenticationFault, ConnectError, Shortage};
pub use exhausted::Exhausted;
pub use policy::NOT_FOR_GUESTS;
pub(crate) use socket::{UNSENT, keep_alive, limit_unsent};

/// What carries the connections.
#[derive(Debug, Clone)]
pub enum Upstream {
    /// Each connection goes straight to its destination.
    Direct,
    /// HTTP CONNECT (RFC 9110 section 9.3.6).
    HttpConnect(HttpProxy),
}

/// An HTTP proxy.
#[derive(Debug, Clone)]
pub struct HttpProxy {
    /// `host:port` as the user wrote it, for messages.
    pub name: String,
    /// Addresses, tried in order; the next one starts 250 ms after the one before, or when that failed.
    pub addresses: Vec<SocketAddr>,
    /// User name and password for Basic authentication.
    pub credentials: Option<Credentials>,
    /// Which of the addresses are not worth a try just now.
    pub exhausted: Exhausted,
}

/// Where a connection is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name that the upstream resolves, and a port. Checked by [`Connector::connect`].
    Name(String, u16),
}

/// Makes connections through an [`Upstream`].
#[derive(Debug, Clone)]
pub struct Connector {
    /// The way.
    pub upstream: Upstream,
    /// `SO_MARK` of every socket; needs CAP_NET_ADMIN. `None` only in tests and before the network is steered.
    pub mark: Option<u32>,
    /// Bound on TCP connect plus handshake.
    pub timeout: Duration,
    /// Networks that nobody may be connected or send to, whatever the upstream: a proxy is not even asked. Loopback, groups and broadcast always
    /// are, and with [`Direct`](Upstream::Direct) whatever is this machine's at the time. For a guest: this machine's addresses and,
    /// unless `only` says who is left, [`NOT_FOR_GUESTS`].
    pub refused: Vec<ipnet::IpNet>,
    /// If given, nobody else may be connected to, and no name. What is [`refused`](Self::refused) stays so.
    pub only: Option<Vec<SocketAddr>>,
}

/// An established tunnel.
#[derive(Debug)]
pub struct Tunnel {
    /// The socket, non-blocking.
    pub stream: TcpStream,
    /// Bytes of the destination that came right after the proxy's answer; at most 4 KiB. They come before what `stream` gives.
    pub early: Vec<u8>,
}
