//! The socket option that neither socket2 nor rustix has.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `IP_LOCAL_PORT_RANGE` of linux/in.h.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

/// Sets `IP_LOCAL_PORT_RANGE` (ip(7), Linux 6.3): the first port in the lower half of `range`, the last one in the upper. Works on IPv6
/// sockets too.
///
/// # Errors
/// setsockopt(2)'s; `ENOPROTOOPT` for an older kernel.
pub(super) fn local_port_range(socket: impl AsFd, range: u32) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed for the whole call; the pointer and length describe `range`, which the kernel only reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_IP,
            IP_LOCAL_PORT_RANGE,
            (&raw const range).cast(),
            size_of_val(&range) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
