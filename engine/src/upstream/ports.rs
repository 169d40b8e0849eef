//! A window of local ports for each socket.
//!
//! connect(2) looks at every port of one parity before it tries the other one, which takes milliseconds once half of the range is in
//! use, on the thread that connects. Among a few ports at a random place it finds a free one at once, or knows that there is none.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use socket2::Socket;

use super::sys;

/// Ports in a window.
const WIDTH: u16 = 256;
/// Windows in which a port is looked for. With 99 of 100 ports in use all of them miss once in 30,000 times.
pub(super) const WINDOWS: usize = 4;

/// ip(7), `ip_local_port_range`; of the thread's network namespace.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Limits `socket` to ports at a random place of the system's range. False when that would change nothing: the range is small, or the
/// kernel has no such option (Linux 6.3).
pub(super) fn limit(socket: &Socket) -> bool {
    window(range(), RandomState::new().hash_one(())).is_some_and(|(first, last)| set(socket, first, last).is_ok())
}

fn set(socket: &Socket, first: u16, last: u16) -> io::Result<()> {
    sys::local_port_range(socket, u32::from(last) << 16 | u32::from(first))
}

/// The window in `first..=last` that `random` chooses.
fn window((first, last): (u16, u16), random: u64) -> Option<(u16, u16)> {
    let places = u64::from(last.checked_sub(first)?.checked_sub(WIDTH)?) + 1;
    let first = first + u16::try_from(random % places).ok()?;
    Some((first, first + WIDTH))
}

/// The system's range, at most a second old; empty when it cannot be read.
fn range() -> (u16, u16) {
    /// Seconds since `START`, first and last port: one word, so that threads need no lock.
    static KNOWN: AtomicU64 = AtomicU64::new(u64::MAX);
    static START: OnceLock<Instant> = OnceLock::new();
    let second = START.get_or_init(Instant::now).elapsed().as_secs() & 0xffff_ffff;
    let mut known = KNOWN.load(Ordering::Relaxed);
    if known >> 32 != second {
        let (first, last) = std::fs::read_to_string(RANGE).ok().and_then(|text| parse(&text)).unwrap_or((1, 0));
        known = second << 32 | u64::from(first) << 16 | u64::from(last);
        KNOWN.store(known, Ordering::Relaxed);
    }
    let [.., a, b, c, d] = known.to_be_bytes();
    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}

fn parse(text: &str) -> Option<(u16, u16)> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::collections::HashSet;
    use std::net::{Ipv6Addr, SocketAddr, TcpListener};

    use socket2::{Domain, Type};

    use super::*;

    #[test]
    fn windows_lie_in_the_range_and_reach_both_ends() {
        assert_eq!(window((1, 0), 7), None);
        assert_eq!(window((30_000, 30_199), 7), None, "a small range is searched as a whole");
        assert_eq!(window((32_768, 33_024), 7), Some((32_768, 33_024)));
        assert_eq!(window((32_768, 60_999), 0), Some((32_768, 33_024)));
        let places = 60_999 - 32_768 - 256 + 1;
        assert_eq!(window((32_768, 60_999), places - 1), Some((60_743, 60_999)));
        assert_eq!(window((32_768, 60_999), places), Some((32_768, 33_024)));
        assert_eq!(window((1, u16::MAX), u64::MAX).map(|(first, last)| last - first), Some(256));
    }

    #[test]
    fn the_system_has_a_range() {
        let text = std::fs::read_to_string(RANGE).unwrap();
        assert_eq!(Some(range()), parse(&text));
        assert_eq!((parse(""), parse("1"), parse("1 x"), parse("1\t70000")), (None, None, None, None));
    }

    #[test]
    fn the_kernel_keeps_to_the_window() {
        let listeners =
            [TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap()];
        for listener in listeners {
            let address: SocketAddr = listener.local_addr().unwrap();
            let socket = || Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
            let (first, last) = window(range(), 12_345).unwrap();
            if let Err(error) = set(&socket(), first, last) {
                assert_eq!(error.raw_os_error(), Some(libc::ENOPROTOOPT), "an older kernel");
                return;
            }
            let connect = || {
                let socket = socket();
                set(&socket, first, first + 3).unwrap();
                socket.connect(&address.into()).map(|()| socket)
            };
            let sockets: Vec<_> = (0..20).map_while(|_| connect().ok()).collect();
            let port = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap().port();
            let ports: HashSet<_> = sockets.iter().map(port).collect();
            assert!(!ports.is_empty() && ports.iter().all(|port| (first..=first + 3).contains(port)), "{ports:?}");
            assert_eq!(connect().unwrap_err().raw_os_error(), Some(libc::EADDRNOTAVAIL));
        }
    }
}
