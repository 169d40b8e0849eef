//! Datagrams of a guest: whom they may go to, and the sockets that they leave by.

use std::io;
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use socket2::{Domain, Type};
use tokio::io::unix::AsyncFd;

use super::socket::{OpenError, leads_home, marked};
use super::{ConnectError, Connector};
use crate::sys::watch_reads;

/// The way out for datagrams: the seam between a guest's ports and the system.
pub(crate) trait Sockets {
    /// May datagrams be sent to `peer`?
    ///
    /// # Errors
    /// See [`ConnectError`].
    fn permits(&self, peer: SocketAddrV4) -> Result<(), ConnectError>;

    /// A socket without a peer.
    ///
    /// # Errors
    /// The system's.
    fn open(&self) -> io::Result<Box<dyn Socket>>;
}

/// A socket for datagrams. Neither call blocks.
pub(crate) trait Socket {
    /// Sends `payload` to `peer`.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; anything else as the system says.
    fn send(&self, payload: &[u8], peer: SocketAddrV4) -> io::Result<()>;

    /// Receives a datagram: the length of its beginning that fits into `buffer`, and who sent it. Pending, it wakes later.
    ///
    /// # Errors
    /// The system's.
    fn poll_receive(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>>;
}

impl Sockets for Arc<Connector> {
    fn permits(&self, peer: SocketAddrV4) -> Result<(), ConnectError> {
        self.permits_datagrams(peer)?;
        let forbidden = Err(ConnectError::Forbidden((*peer.ip()).into()));
        match leads_home(peer.into(), self.mark) {
            Ok(false) => Ok(()),
            Ok(true) => forbidden,
            // The broadcast address of a network that this machine is on (udp(7)), or a route that prohibits.
            Err(OpenError::Local(error)) if error.raw_os_error() == Some(libc::EACCES) => forbidden,
            Err(OpenError::Local(source)) => Err(ConnectError::Local { upstream: peer.to_string(), source }),
            Err(OpenError::Remote(source)) => Err(ConnectError::Direct { target: peer.to_string(), source }),
        }
    }

    fn open(&self) -> io::Result<Box<dyn Socket>> {
        Ok(Box::new(Unconnected(watch_reads(prepare(self.mark)?)?)))
    }
}

/// A marked socket for IPv4. The system gives it a port with the first datagram.
fn prepare(mark: Option<u32>) -> io::Result<UdpSocket> {
    Ok(marked(Domain::IPV4, Type::DGRAM, mark)?.into())
}

struct Unconnected(AsyncFd<UdpSocket>);

impl Socket for Unconnected {
    fn send(&self, payload: &[u8], peer: SocketAddrV4) -> io::Result<()> {
        // A datagram goes whole or not at all.
        self.0.get_ref().send_to(payload, peer).map(|_| ())
    }

    fn poll_receive(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            if let Ok(received) = guard.try_io(|socket| socket.get_ref().recv_from(buffer)) {
                return Poll::Ready(received);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use rustix::fs::{OFlags, fcntl_getfl};
    use rustix::io::{FdFlags, fcntl_getfd};
    use socket2::SockRef;

    use super::super::Upstream;
    use super::*;

    #[test]
    fn a_socket_is_like_those_of_connections_and_sends_to_no_broadcast_address() {
        let socket = prepare(None).unwrap();
        assert!(fcntl_getfl(&socket).unwrap().contains(OFlags::NONBLOCK));
        assert!(fcntl_getfd(&socket).unwrap().contains(FdFlags::CLOEXEC));
        assert_eq!((SockRef::from(&socket).mark().unwrap(), socket.broadcast().unwrap()), (0, false));
        match prepare(Some(0x7076)) {
            Ok(socket) => assert_eq!(SockRef::from(&socket).mark().unwrap(), 0x7076),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "the mark or no socket"),
        }
    }

    #[tokio::test]
    async fn datagrams_go_both_ways_from_the_first_one_on() {
        let upstream = Upstream::Direct;
        let connector = Connector { upstream, mark: None, timeout: Duration::ZERO, refused: Vec::new(), only: None };
        let connector = Arc::new(connector);
        let far = UdpSocket::bind("127.0.0.1:0").unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let SocketAddr::V4(address) = far.local_addr().unwrap() else { unreachable!() };
        let socket = connector.open().unwrap();
        let mut buffer = [0; 10];
        for payload in [&b"question"[..], b""] {
            socket.send(payload, address).unwrap();
            let (length, from) = far.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], payload);
            assert!(from.port() >= 1024, "{from}");
            far.send_to(payload, from).unwrap();
            let (length, from) = poll_fn(|context| socket.poll_receive(context, &mut buffer)).await.unwrap();
            assert_eq!((&buffer[..length], from), (payload, address.into()));
        }
    }
}
