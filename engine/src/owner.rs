//! Whose a flow is: the seam to what knows the machine's sockets, which the engine does not.

use std::fmt::Debug;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::packet::parse::Tuple;

/// Tells whose a connection of this machine is. Asked only about new connections, and only while more than half of a bound
/// ([`Limits`](crate::config::Limits)) is in use.
pub trait Owners: Debug + Send + Sync {
    /// What one shard asks. Called on the shard's thread; must not block.
    fn lookup(&self) -> Box<dyn Lookup>;
}

/// One shard's way to ask. Stays on its thread.
pub trait Lookup {
    /// The user id of the socket that connects from `source` to `destination`, or `None` if there is no such socket here (forwarded
    /// traffic) or nobody can tell. All packets of the shard wait for the answer: some microseconds are well, milliseconds are not.
    fn uid(&mut self, source: SocketAddr, destination: SocketAddr) -> Option<u32>;
}

/// Who a flow is counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// A user of this machine.
    User(u32),
    /// Another host: its IPv4 address, or its IPv6 network, since one host has all addresses of that.
    Host(IpAddr),
}

impl Owner {
    /// Whose the flow `tuple` is.
    pub(crate) fn of(tuple: &Tuple, lookup: Option<&mut (dyn Lookup + 'static)>) -> Self {
        let source = SocketAddr::new(tuple.source, tuple.source_port);
        let destination = SocketAddr::new(tuple.destination, tuple.destination_port);
        match (lookup.and_then(|lookup| lookup.uid(source, destination)), tuple.source) {
            (Some(uid), _) => Self::User(uid),
            (None, IpAddr::V6(address)) => {
                Self::Host(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into())
            }
            (None, address) => Self::Host(address),
        }
    }
}
