//! A guest's link: one end of a `socketpair(AF_UNIX, SOCK_SEQPACKET)`, of which QEMU has the other (`-netdev dgram` on a descriptor).
//! One packet is one Ethernet frame.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, send, sockopt};
use tokio::io::unix::AsyncFd;

use super::watch;
use crate::device::{Queue, Watched};

/// Bytes of frames that wait in the kernel until the guest takes them; the kernel doubles it for its own overhead. At least twice the
/// largest frame: one that does not fit would never go.
const WAITING: usize = 192 * 1024;

/// The descriptor, kept open by every clone. There is no way to put another one in.
#[derive(Debug, Clone)]
pub(crate) struct LinkQueue(Arc<OwnedFd>);

impl LinkQueue {
    /// Wraps `fd`.
    ///
    /// # Errors
    /// `EINVAL` when it is no unix socket of that kind; getsockopt(2)'s and setsockopt(2)'s.
    pub(crate) fn new(fd: Arc<OwnedFd>) -> io::Result<Self> {
        let kind = (sockopt::socket_domain(&fd)?, sockopt::socket_type(&fd)?);
        if kind != (AddressFamily::UNIX, SocketType::SEQPACKET) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        sockopt::set_socket_send_buffer_size(&fd, WAITING)?;
        Ok(Self(fd))
    }
}

impl AsRawFd for LinkQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Queue for LinkQueue {
    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        let room = frame.len();
        // With TRUNC the length is that of the frame, even where only a part of it had room (recv(2)).
        let (_, length) = recv(&self.0, frame, RecvFlags::TRUNC)?;
        match length {
            // A frame without a byte is read like the end of the link.
            0 => self.lost().map_or(Ok(0), Err),
            // No packet can be that long: nothing of it is taken in.
            _ if length > room => Ok(0),
            _ => Ok(length),
        }
    }

    fn write(&self, frame: &[u8]) -> io::Result<()> {
        // A packet goes whole or not at all.
        send(&self.0, frame, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

impl Watched for LinkQueue {
    fn watch(&self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the clone keeps the descriptor open, and nothing changes what the `Arc` holds.
        unsafe { watch(self.clone(), &self.0) }
    }

    fn lost(&self) -> Option<io::Error> {
        let mut other_end = [PollFd::new(&self.0, PollFlags::RDHUP)];
        match poll(&mut other_end, Some(&Timespec::default())) {
            Ok(0) => None,
            Ok(_) => Some(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end is closed")),
            Err(error) => Some(error.into()),
        }
    }
}
