//! The kernel's table of TCP and UDP sockets over netlink: sock_diag(7).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

/// Any socket with these ends (`INET_DIAG_NOCOOKIE`).
const NO_COOKIE: [u8; 8] = [0xff; 8];
/// No socket: the kernel counts cookies from 1 on.
const NO_SUCH_COOKIE: [u8; 8] = [0; 8];
/// More than the kernel puts into one datagram of a listing (32 KiB).
const BUFFER: usize = 1 << 16;
/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// A question to the kernel, which answers before the call that asks returns. For the network namespace of the thread that
/// opens it.
#[derive(Debug)]
pub(super) struct SockDiag {
    socket: OwnedFd,
    asked: u32,
    buffer: Vec<u8>,
}

/// A socket as the kernel tells it. IPv4 over an IPv6 socket is given as IPv4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// `TCP_ESTABLISHED` and so on, for UDP too.
    pub(super) state: u8,
    pub(super) uid: u32,
    /// Whether a program still holds it.
    pub(super) held: bool,
    /// `SO_MARK`; only told to who has `CAP_NET_ADMIN`.
    pub(super) mark: Option<u32>,
    /// Bytes that the program has written and the other side has not acknowledged.
    pub(super) queued: u32,
    /// `struct tcp_info` (linux/tcp.h), if it was asked for.
    pub(super) info: Option<Vec<u8>>,
    /// With the kernel's cookie, which no other socket gets.
    id: SocketId,
}

impl SockDiag {
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?;
        Ok(Self { socket, asked: 0, buffer: vec![0; BUFFER] })
    }

    /// The TCP socket with exactly these ends.
    pub(super) fn find(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        extensions: ExtensionFlags,
    ) -> io::Result<Option<Found>> {
        let request = request(IPPROTO_TCP, ends(local, remote), extensions, StateFlags::all());
        let mut found = None;
        let asked = self.ask(NLM_F_REQUEST, request, |answer| {
            found = Some(answer);
            true
        });
        match asked {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            asked => asked.map(|()| found),
        }
    }

    /// Every socket of a protocol in one of these states.
    pub(super) fn each(&mut self, protocol: u8, states: &StateFlags, mut visit: impl FnMut(Found)) -> io::Result<()> {
        for mut any in [SocketId::new_v4(), SocketId::new_v6()] {
            any.cookie = NO_COOKIE;
            let request = request(protocol, any, ExtensionFlags::empty(), states.clone());
            self.ask(NLM_F_REQUEST | NLM_F_DUMP, request, |answer| {
                visit(answer);
                false
            })?;
        }
        Ok(())
    }

    /// Ends a socket (`SOCK_DESTROY`): its program is told `ECONNABORTED`. `false`: it was gone already.
    pub(super) fn destroy(&mut self, protocol: u8, socket: &Found) -> io::Result<bool> {
        self.destroy_by(protocol, socket.id.clone())
    }

    /// Whether this kernel ends sockets (`CONFIG_INET_DIAG_DESTROY`).
    pub(super) fn can_destroy(&mut self) -> io::Result<bool> {
        let nobody = SocketId { cookie: NO_SUCH_COOKIE, ..SocketId::new_v4() };
        match self.destroy_by(IPPROTO_TCP, nobody) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
            answer => answer.map(|_| true),
        }
    }

    fn destroy_by(&mut self, protocol: u8, id: SocketId) -> io::Result<bool> {
        let request = request(protocol, id, ExtensionFlags::empty(), StateFlags::all());
        let destroy = SockDiagDestroy::new(request);
        match self.ask(NLM_F_REQUEST | NLM_F_ACK, destroy, |_| false) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            asked => asked.map(|()| true),
        }
    }

    /// Sends a request and hands over the sockets of the answer, until `last` says that one was the last, or the kernel.
    fn ask<M: NetlinkSerializable>(
        &mut self,
        flags: u16,
        request: M,
        mut last: impl FnMut(Found) -> bool,
    ) -> io::Result<()> {
        self.asked = self.asked.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.asked;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        send(&self.socket, &bytes, SendFlags::empty())?;
        loop {
            let (length, sent) = recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC)?;
            if sent > length {
                return Err(io::Error::other("an answer that is too long"));
            }
            let mut rest = &self.buffer[..length];
            while rest.len() >= HEADER {
                let answer = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
                let taken = usize::try_from(answer.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
                rest = rest.get(taken.max(HEADER)..).unwrap_or_default();
                // An answer that was not taken in, because of an error in between.
                if answer.header.sequence_number != self.asked {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket)) => {
                        if last(Found::new(*socket)) {
                            return Ok(());
                        }
                    }
                    NetlinkPayload::Error(error) if error.raw_code() != 0 => return Err(error.to_io()),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(()),
                    other => return Err(io::Error::other(format!("an answer of type {}", other.message_type()))),
                }
            }
        }
    }
}

impl Found {
    fn new(answer: InetResponse) -> Self {
        let InetResponse { header, nlas } = answer;
        let (mut mark, mut info) = (None, None);
        for nla in nlas {
            match nla {
                Nla::Mark(value) => mark = Some(value),
                Nla::TcpInfo(bytes) => info = Some(bytes),
                _ => {}
            }
        }
        let id = header.socket_id;
        let end = |ip: IpAddr, port| SocketAddr::new(ip.to_canonical(), port);
        Self {
            local: end(id.source_address, id.source_port),
            remote: end(id.destination_address, id.destination_port),
            state: header.state,
            uid: header.uid,
            held: header.inode != 0,
            mark,
            queued: header.send_queue,
            info,
            id,
        }
    }
}

fn ends(local: SocketAddr, remote: SocketAddr) -> SocketId {
    SocketId {
        source_port: local.port(),
        destination_port: remote.port(),
        source_address: local.ip(),
        destination_address: remote.ip(),
        interface_id: 0,
        cookie: NO_COOKIE,
    }
}

fn request(protocol: u8, socket_id: SocketId, extensions: ExtensionFlags, states: StateFlags) -> SockDiagMessage {
    let family = if socket_id.source_address.is_ipv4() { AF_INET } else { AF_INET6 };
    SockDiagMessage::InetRequest(InetRequest { family, protocol, extensions, states, socket_id })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_socket_that_took_the_place_of_another_is_not_hit() {
        let mut diag = SockDiag::open().unwrap();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            client.set_nonblocking(true).unwrap();
            let (ours, theirs) = (client.local_addr().unwrap(), listener.local_addr().unwrap());
            let found = diag.find(ours, theirs, ExtensionFlags::empty()).unwrap().unwrap();
            assert!(found.held && found.local == ours && found.remote == theirs);
            let mut other = found.clone();
            other.id.cookie[0] ^= 1;
            assert!(!diag.destroy(IPPROTO_TCP, &other).unwrap());
            assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            // Only with CAP_NET_ADMIN.
            match diag.destroy(IPPROTO_TCP, &found) {
                Ok(there) => {
                    assert!(there);
                    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
                    assert!(!diag.destroy(IPPROTO_TCP, &found).unwrap(), "gone");
                }
                Err(error) => {
                    assert!(matches!(error.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)), "{error}");
                }
            }
        }
    }

    #[test]
    fn every_socket_of_both_versions_is_told_once() {
        let mut diag = SockDiag::open().unwrap();
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        // More than fit into one datagram of the answer.
        let clients: Vec<_> = (0..200)
            .map(|n| TcpStream::connect((if n % 2 == 0 { "127.0.0.1" } else { "::1" }, port)).unwrap())
            .map(|client| (client, listener.accept().unwrap()))
            .collect();
        let mut told = vec![];
        diag.each(IPPROTO_TCP, &StateFlags::ESTABLISHED, |socket| {
            if socket.remote.port() == port {
                told.push(socket.local);
            }
        })
        .unwrap();
        told.sort_unstable();
        let mut expected: Vec<_> = clients.iter().map(|(client, _)| client.local_addr().unwrap()).collect();
        expected.sort_unstable();
        assert_eq!(told, expected);
    }
}
