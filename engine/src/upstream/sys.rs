//! Socket options that neither socket2 nor rustix has.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sets `IP_BIND_ADDRESS_NO_PORT` (ip(7), Linux 4.2): a `bind` to port 0 takes no port, `connect` chooses it by the whole
/// 4-tuple. Works on IPv6 sockets too.
pub(super) fn bind_address_no_port(socket: impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is borrowed for the whole call; the pointer and length describe `on`, which the kernel only reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
