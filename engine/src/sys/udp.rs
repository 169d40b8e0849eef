//! Sockets for datagrams in an event loop.

use std::io;
use std::net::UdpSocket;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers `socket`, which does not block, with the current runtime, for what comes in. Not for room to send: the loop would be woken
/// for each datagram that leaves.
///
/// # Errors
/// epoll_ctl(2)'s.
pub(crate) fn watch_reads(socket: UdpSocket) -> io::Result<AsyncFd<UdpSocket>> {
    // SAFETY: the socket owns its descriptor and keeps it open; the callers don't put another one in.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}
