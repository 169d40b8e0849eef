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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use socket2::{Domain, Socket, Type};

    use super::*;

    fn get(socket: &Socket) -> libc::c_int {
        let mut value: libc::c_int = -1;
        let mut length = size_of_val(&value) as libc::socklen_t;
        // SAFETY: the descriptor is open; the pointers are to two locals of the sizes that getsockopt(2) wants.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_BIND_ADDRESS_NO_PORT,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        value
    }

    #[test]
    fn the_option_is_set_on_both_families() {
        for domain in [Domain::IPV4, Domain::IPV6] {
            let socket = Socket::new(domain, Type::STREAM, None).unwrap();
            assert_eq!(get(&socket), 0);
            bind_address_no_port(&socket).unwrap();
            assert_eq!(get(&socket), 1, "{domain:?}");
        }
    }
}
