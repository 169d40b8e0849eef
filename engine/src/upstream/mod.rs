//! The way out of the engine.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;

use crate::secret::Secret;

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
    /// `host:port` as the user wrote it, for messages and the `Host` field.
    pub name: String,
    /// Addresses, tried in order.
    pub addresses: Vec<SocketAddr>,
    /// User name and password for Basic authentication (RFC 7617).
    pub credentials: Option<(String, Secret)>,
}

/// Where a connection is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name that the upstream resolves, and a port.
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
    /// Addresses that must never be connected to directly, whatever asks for them (checked by `Direct`).
    pub refused: Vec<ipnet::IpNet>,
}

/// An established tunnel.
#[derive(Debug)]
pub struct Tunnel {
    /// The socket, non-blocking.
    pub stream: TcpStream,
    /// Bytes of the destination that came in the same segment as the proxy's answer.
    pub early: Vec<u8>,
}

/// Why there is no tunnel. `Display` is a sentence that names the proxy and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No TCP connection to the proxy (`Direct`: to the destination).
    #[error("{upstream} cannot be reached")]
    Unreachable {
        /// Who.
        upstream: String,
        /// Why.
        source: std::io::Error,
    },
    /// The proxy accepted the connection and did not finish its answer in time.
    #[error("{upstream} accepted the connection but did not answer within {seconds} s; is it an HTTP proxy?")]
    Silent {
        /// Who.
        upstream: String,
        /// The bound.
        seconds: u64,
    },
    /// 407.
    #[error("{upstream} wants a user name and password, or other ones (407)")]
    Authentication {
        /// Who.
        upstream: String,
    },
    /// The proxy refuses the destination or the client (403, 405 and other 4xx).
    #[error("{upstream} refuses {target} ({status} {reason})")]
    Refused {
        /// Who.
        upstream: String,
        /// What was asked for.
        target: String,
        /// HTTP status.
        status: u16,
        /// Reason phrase, cut and free of control characters.
        reason: String,
    },
    /// The proxy could not reach the destination (5xx).
    #[error("{upstream} cannot reach {target} ({status} {reason})")]
    Destination {
        /// Who.
        upstream: String,
        /// What was asked for.
        target: String,
        /// HTTP status.
        status: u16,
        /// Reason phrase, cut and free of control characters.
        reason: String,
    },
    /// Not HTTP, too long, or broken.
    #[error("{upstream} does not answer as an HTTP proxy: {detail}")]
    Protocol {
        /// Who.
        upstream: String,
        /// What was wrong.
        detail: String,
    },
    /// This process cannot open a socket (out of descriptors, mark refused, no port left).
    #[error("no socket for {upstream}")]
    Local {
        /// Who.
        upstream: String,
        /// Why.
        source: std::io::Error,
    },
    /// The address is one that must not be connected to directly.
    #[error("{0} is not reachable through the tunnel")]
    Forbidden(IpAddr),
}
