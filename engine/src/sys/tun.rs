//! One queue of a TUN device.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use tokio::io::unix::AsyncFd;

use super::watch;
use crate::device::{Framing, Queue, Watched, is_lost};

/// A descriptor of `/dev/net/tun`, kept open by every clone. There is no way to put another descriptor in.
#[derive(Debug, Clone)]
pub(crate) struct TunQueue(Arc<OwnedFd>);

impl TunQueue {
    /// Wraps `fd`.
    pub(crate) fn new(fd: Arc<OwnedFd>) -> Self {
        Self(fd)
    }

    /// What stands in front of its packets.
    ///
    /// # Errors
    /// As [`flags`](Self::flags); `EINVAL` for a queue of a TAP device.
    pub(crate) fn framing(&self) -> io::Result<Framing> {
        let flags = self.flags()?;
        if flags & libc::IFF_TUN == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(if flags & libc::IFF_VNET_HDR == 0 { Framing::Bare } else { Framing::Vnet })
    }

    /// The `IFF_*` flags that the queue was opened with (`TUNGETIFF`, linux/if_tun.h).
    ///
    /// # Errors
    /// `ENOTTY` or `EBADFD` when this is not a TUN queue, or not any more.
    fn flags(&self) -> io::Result<i32> {
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

impl Watched for TunQueue {
    fn watch(&self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the clone keeps the descriptor open, and nothing changes what the `Arc` holds.
        unsafe { watch(self.clone(), &self.0) }
    }

    fn lost(&self) -> Option<io::Error> {
        self.flags().err().filter(is_lost)
    }
}
