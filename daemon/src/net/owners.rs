//! Whose a connection of this machine is: one exact question to the kernel (sock_diag(7)), answered before the call that asks returns.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, TCP_SYN_SENT};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use proxyvpn_engine::owner::{Lookup, Owners};
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

/// Any socket with these ends (`INET_DIAG_NOCOOKIE`).
const NO_COOKIE: [u8; 8] = [0xff; 8];
/// Room for one answer; more than any has.
const ANSWER: usize = 4096;

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
    socket: Option<OwnedFd>,
    asked: u32,
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
        let socket = match &self.socket {
            Some(socket) => socket,
            None => self.socket.insert(socket_with(
                AddressFamily::NETLINK,
                SocketType::RAW,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                Some(netlink::SOCK_DIAG),
            )?),
        };
        self.asked = self.asked.wrapping_add(1);
        send(socket, &request(self.asked, source, destination), SendFlags::empty())?;
        let mut answer = [0; ANSWER];
        loop {
            let (length, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
            let answer = NetlinkMessage::<SockDiagMessage>::deserialize(&answer[..length]).map_err(io::Error::other)?;
            // An answer that was not taken in, because of an error in between.
            if answer.header.sequence_number != self.asked {
                continue;
            }
            return match answer.payload {
                // Others of the same ends are no socket that has just sent a SYN: a listening one, or one in TIME-WAIT.
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found)) => {
                    Ok((found.header.state == TCP_SYN_SENT).then_some(found.header.uid))
                }
                NetlinkPayload::Error(error) if error.raw_code() == -libc::ENOENT => Ok(None),
                NetlinkPayload::Error(error) => Err(error.to_io()),
                other => Err(io::Error::other(format!("an answer of type {}", other.message_type()))),
            };
        }
    }
}

fn request(number: u32, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    header.sequence_number = number;
    let request = InetRequest {
        family: if source.is_ipv4() { AF_INET } else { AF_INET6 },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: source.port(),
            destination_port: destination.port(),
            source_address: source.ip(),
            destination_address: destination.ip(),
            interface_id: 0,
            cookie: NO_COOKIE,
        },
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
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
