//! Why there is no tunnel, in words for the user.

use std::io;
use std::net::IpAddr;

/// Why there is no tunnel. `Display` is a sentence that names the proxy and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No TCP connection to the proxy.
    #[error("{upstream} cannot be reached; check its address and port, and that this machine has a network connection")]
    Unreachable {
        /// Who.
        upstream: String,
        /// Why.
        source: io::Error,
    },
    /// The proxy accepted the connection and did not finish its answer in time. A destination that swallows packets looks the
    /// same, since most proxies then wait for longer than we do: several in a row are a reason to probe.
    #[error(
        "{upstream} accepted the connection but did not answer within {seconds} s; it is overloaded, still trying to reach the \
         destination, or no HTTP proxy"
    )]
    Silent {
        /// Who.
        upstream: String,
        /// The bound.
        seconds: u64,
    },
    /// 407, or 401: a wrong password is a 401 to tinyproxy, and nobody but the proxy can answer a CONNECT.
    #[error("{upstream} {fault}")]
    Authentication {
        /// Who.
        upstream: String,
        /// What is wrong with the credentials.
        fault: AuthenticationFault,
    },
    /// The proxy refuses the destination, the client or the method (3xx, 4xx, 501, 505).
    #[error("{upstream} refuses {target} ({}); {}", answer(*status, reason), advice(*status))]
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
    /// The proxy could not reach the destination (other 5xx).
    #[error("{upstream} cannot reach {target} ({}); {}", answer(*status, reason), advice(*status))]
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
    #[error("{upstream} does not answer as an HTTP proxy: {detail}; check its address and port")]
    Protocol {
        /// Who.
        upstream: String,
        /// What was wrong.
        detail: String,
    },
    /// This process cannot open a socket (out of descriptors, mark refused, no port left).
    #[error("this machine has no socket for {upstream}; {}", remedy(source))]
    Local {
        /// Who.
        upstream: String,
        /// Why.
        source: io::Error,
    },
    /// [`Upstream::Direct`](super::Upstream::Direct): no TCP connection to the destination.
    #[error("{target} cannot be reached")]
    Direct {
        /// What was asked for.
        target: String,
        /// Why.
        source: io::Error,
    },
    /// The address is one that must not be connected to: see [`Connector::refused`](super::Connector::refused).
    #[error("{0} is not reachable through the tunnel")]
    Forbidden(IpAddr),
    /// The name cannot be passed on.
    #[error("cannot connect to {name:?}: {problem}")]
    Name {
        /// What was asked for, cut.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// What this machine has run out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Shortage {
    /// Local ports towards the upstream (`EADDRNOTAVAIL`).
    Ports,
    /// File descriptors, of the process or of the system (`EMFILE`, `ENFILE`).
    Descriptors,
}

/// What a 407 or 401 complains about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthenticationFault {
    /// We sent no credentials.
    #[error(
        "wants a user name and password; add username and password-file to the profile, or give --username and --password"
    )]
    Missing,
    /// We sent some.
    #[error("does not take this user name and password; check both")]
    Rejected,
    /// The proxy named its schemes, and Basic is not one.
    #[error(
        "wants a kind of authentication other than Basic, the only one that proxyvpn has; ask its operator for Basic"
    )]
    NoBasic,
}

impl ConnectError {
    /// True when the upstream itself is at fault, not the destination behind it and not this machine. For
    /// [`Silent`](Self::Silent) that is only a suspicion: squid says nothing while a destination or a name server does not
    /// answer. [`Connector::probe`](super::Connector::probe) settles it, and is to be asked before anything is blamed.
    #[must_use]
    pub fn is_upstream(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } | Self::Authentication { .. } | Self::Protocol { .. } => {
                true
            }
            Self::Refused { status, .. } | Self::Destination { status, .. } => no_connect(*status) || *status == 511,
            Self::Local { .. } | Self::Direct { .. } | Self::Forbidden(_) | Self::Name { .. } => false,
        }
    }

    /// What this machine lacked, if that was the reason.
    #[must_use]
    pub fn shortage(&self) -> Option<Shortage> {
        match self {
            Self::Local { source, .. } => shortage(source),
            _ => None,
        }
    }
}

/// What `error` of socket(2) or connect(2) says that this machine lacks.
pub(super) fn shortage(error: &io::Error) -> Option<Shortage> {
    match error.raw_os_error() {
        Some(libc::EADDRNOTAVAIL) => Some(Shortage::Ports),
        Some(libc::EMFILE | libc::ENFILE) => Some(Shortage::Descriptors),
        _ => None,
    }
}

/// True for a status that refuses CONNECT as such, whatever the destination: Method Not Allowed, Not Implemented, HTTP
/// Version Not Supported (RFC 9110 section 15).
pub(super) fn no_connect(status: u16) -> bool {
    matches!(status, 405 | 501 | 505)
}

/// Status and reason phrase, which may be empty.
fn answer(status: u16, reason: &str) -> String {
    if reason.is_empty() { status.to_string() } else { format!("{status} {reason}") }
}

/// What the user can do about a status.
fn advice(status: u16) -> &'static str {
    match status {
        300..=399 | 511 => {
            "it wants a web page to be visited first, such as a log-in: open a page through it in a browser"
        }
        400 => "it may be a web server and not a proxy: check its address and port",
        405 | 501 | 505 => "it does not do CONNECT, as a web server that is no proxy: check its address and port",
        403 => "ask its operator to allow this destination and port for this machine",
        429 | 503 => "it may be overloaded or the destination down: try again later",
        500 | 502 | 504 => "the destination may be down, or the proxy has no way to it",
        _ => "the proxy's log may say more",
    }
}

/// What the administrator can do about a socket that could not be had.
fn remedy(error: &io::Error) -> &'static str {
    match (shortage(error), error.raw_os_error()) {
        (Some(Shortage::Descriptors), _) => "raise LimitNOFILE of the service",
        (Some(Shortage::Ports), _) => {
            "no port is free: set net.ipv4.tcp_tw_reuse=1, widen net.ipv4.ip_local_port_range, or give the proxy more addresses"
        }
        (None, Some(libc::EPERM | libc::EACCES)) => {
            "the service needs CAP_NET_ADMIN, and no firewall or route of this machine may forbid the connection"
        }
        _ => "the system log may say more",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16) -> ConnectError {
        ConnectError::Refused { upstream: "p:1".into(), target: "t:2".into(), status, reason: String::new() }
    }

    #[test]
    fn blame() {
        let upstream = || "p:1".to_owned();
        let cause = || io::Error::from(io::ErrorKind::Other);
        for (error, want) in [
            (ConnectError::Unreachable { upstream: upstream(), source: cause() }, true),
            (ConnectError::Silent { upstream: upstream(), seconds: 1 }, true),
            (ConnectError::Authentication { upstream: upstream(), fault: AuthenticationFault::Missing }, true),
            (ConnectError::Protocol { upstream: upstream(), detail: String::new() }, true),
            (refused(403), false),
            (refused(302), false),
            (refused(405), true),
            (refused(501), true),
            (ConnectError::Local { upstream: upstream(), source: cause() }, false),
            (ConnectError::Direct { target: upstream(), source: cause() }, false),
            (ConnectError::Forbidden(IpAddr::from([127, 0, 0, 1])), false),
            (ConnectError::Name { name: String::new(), problem: "x" }, false),
        ] {
            assert_eq!(error.is_upstream(), want, "{error}");
        }
    }

    #[test]
    fn an_empty_reason_leaves_no_gap() {
        assert!(refused(403).to_string().starts_with("p:1 refuses t:2 (403); ask"));
    }
}
