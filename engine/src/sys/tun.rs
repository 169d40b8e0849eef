//! One queue of a TUN device.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::device::Queue;

/// A descriptor of `/dev/net/tun`, kept open by every clone. There is no way to put another descriptor in.
#[derive(Debug, Clone)]
pub(crate) struct TunQueue(Arc<OwnedFd>);

impl TunQueue {
    /// Wraps `fd`.
    pub(crate) fn new(fd: Arc<OwnedFd>) -> Self {
        Self(fd)
    }

    /// The `IFF_*` flags that the queue was opened with (`TUNGETIFF`, linux/if_tun.h).
    ///
    /// # Errors
    /// `ENOTTY` or `EBADFD` when this is not a TUN queue, or not any more.
    pub(crate) fn flags(&self) -> io::Result<i32> {
        // SAFETY: `ifreq` is plain old data; all-zero bytes are a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open while `self` lives, and TUNGETIFF writes one `ifreq` to the pointer.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: TUNGETIFF sets the flags member of the union; every bit pattern is a valid integer.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(i32::from(flags))
    }

    /// Makes the queue non-blocking and registers it with the current runtime, for errors too.
    ///
    /// # Errors
    /// fcntl(2)'s and epoll_ctl(2)'s.
    pub(crate) fn watch(&self) -> io::Result<AsyncFd<Self>> {
        let status = rustix::fs::fcntl_getfl(&self.0)?;
        rustix::fs::fcntl_setfl(&self.0, status | rustix::fs::OFlags::NONBLOCK)?;
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::ERROR;
        // SAFETY: the clone keeps the descriptor open while the `AsyncFd` lives, and always is the same descriptor: nothing
        // changes what the `Arc` holds.
        Ok(unsafe { AsyncFd::register_with_interest(self.clone(), interest) }?)
    }
}

impl AsRawFd for TunQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Queue for TunQueue {
    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, frame)?)
    }

    fn write(&self, frame: &[u8]) -> io::Result<()> {
        // A TUN queue takes a frame whole or not at all.
        rustix::io::write(&self.0, frame)?;
        Ok(())
    }
}
