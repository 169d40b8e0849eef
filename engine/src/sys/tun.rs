//! What kind of TUN queue a descriptor is (linux/if_tun.h).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The `IFF_*` flags that the queue was opened with (`TUNGETIFF`).
///
/// # Errors
/// `ENOTTY` or `EBADFD` when `fd` is not an attached TUN queue.
pub(crate) fn queue_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: `ifreq` is plain old data; all-zero bytes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open while it is borrowed, and TUNGETIFF writes one `ifreq` to the pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNGETIFF sets the flags member of the union; every bit pattern is a valid integer.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(i32::from(flags))
}
