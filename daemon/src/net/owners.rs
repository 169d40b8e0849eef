//! Whose a connection of this machine is: one exact question to the kernel (sock_diag(7)), answered before the call that asks returns.

use std::io;
use std::net::SocketAddr;

use netlink_packet_sock_diag::constants::TCP_SYN_SENT;
use netlink_packet_sock_diag::inet::ExtensionFlags;
use proxyvpn_engine::owner::{Lookup, Owners};

use super::diag::SockDiag;

/// The kernel's table of TCP sockets, in the network namespace of the thread that asks.
#[derive(Debug)]
pub struct SocketOwners;

impl Owners for SocketOwners {
    fn lookup(&self) -> Box<dyn Lookup> {
        Box::new(SocketLookup::default())
    }
}

/// One thread's netlink socket, opened by the first question.
#[derive(Debug, Default)]
struct SocketLookup {
    diag: Option<SockDiag>,
    told: bool,
}

impl Lookup for SocketLookup {
    fn uid(&mut self, source: SocketAddr, destination: SocketAddr) -> Option<u32> {
        self.ask(source, destination).unwrap_or_else(|error| {
            // Once: every new connection would repeat it.
            if !std::mem::replace(&mut self.told, true) {
                tracing::warn!(%error, "cannot ask the kernel whose connections are; users share what is scarce as one");
            }
            None
        })
    }
}

impl SocketLookup {
    fn ask(&mut self, source: SocketAddr, destination: SocketAddr) -> io::Result<Option<u32>> {
        let diag = match &mut self.diag {
            Some(diag) => diag,
            None => self.diag.insert(SockDiag::open()?),
        };
        // Others of the same ends are no socket that has just sent a SYN: a listening one, or one in TIME-WAIT.
        let found = diag.find(source, destination, ExtensionFlags::empty())?;
        Ok(found.filter(|socket| socket.state == TCP_SYN_SENT).map(|socket| socket.uid))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::net::TcpListener;

    use socket2::{Domain, Socket, Type};

    use super::*;

    #[test]
    fn a_connecting_socket_has_an_owner_and_nothing_else_has() {
        let mut lookup = SocketOwners.lookup();
        let own = rustix::process::geteuid().as_raw();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // A backlog that is full keeps the next one in SYN-SENT.
            let listener = Socket::new(Domain::for_address(address.parse().unwrap()), Type::STREAM, None).unwrap();
            listener.bind(&address.parse::<SocketAddr>().unwrap().into()).unwrap();
            listener.listen(0).unwrap();
            let to = listener.local_addr().unwrap();
            let connect = || {
                let socket = Socket::new(to.domain(), Type::STREAM, None).unwrap();
                socket.set_nonblocking(true).unwrap();
                let _ = socket.connect(&to);
                socket
            };
            let sockets: Vec<_> = (0..3).map(|_| connect()).collect();
            let to = to.as_socket().unwrap();
            let local = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap();
            assert_eq!(lookup.uid(local(&sockets[0]), to), None, "established");
            assert_eq!(lookup.uid(local(&sockets[2]), to), Some(own), "connecting");
            assert_eq!(lookup.uid(to, SocketAddr::new(to.ip(), 9)), None, "listening");
            let gone = local(&sockets[2]);
            drop(sockets);
            assert_eq!(lookup.uid(gone, to), None, "closed");
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let nobody = SocketAddr::new([192, 0, 2, 9].into(), 4000);
        assert_eq!(lookup.uid(nobody, listener.local_addr().unwrap()), None, "of another host");
    }
}
