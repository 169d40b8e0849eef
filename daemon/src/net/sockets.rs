//! TCP sockets of this network namespace, from /proc/thread-self/net/tcp and tcp6 (proc_pid_net(5)). Both are readable for
//! everyone, and remain so under `ProtectProc=invisible`.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::firewall::MAX_SESSIONS;

/// thread-self: the namespace of this thread, not of the main one.
const TABLES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
/// `TCP_ESTABLISHED` (include/net/tcp_states.h).
const ESTABLISHED: u8 = 1;
/// `TCP_LISTEN`.
const LISTEN: u8 = 10;

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Socket {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
    uid: u32,
}

/// Established connections that began outside, as (local, remote): their local port has a listening socket, and their local
/// address is one of `outside`, the addresses that are not the tunnel's. IPv4 over an IPv6 socket is given as IPv4.
/// Connections of this machine with itself are left out. At most one more than [`MAX_SESSIONS`], which tells that there are
/// more.
pub fn inbound_sessions(outside: &HashSet<IpAddr>) -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
    // Two passes, so that memory is bounded by the ports and not by the connections.
    let mut ports = HashSet::new();
    for_each(|socket| {
        if socket.state == LISTEN {
            ports.insert(socket.local.port());
        }
        true
    })?;
    let mut sessions = vec![];
    for_each(|socket| {
        if is_inbound(socket, &ports, outside) {
            sessions.push((socket.local, socket.remote));
        }
        sessions.len() <= MAX_SESSIONS
    })?;
    Ok(sessions)
}

/// A program may listen and connect from one port: what goes through the tunnel must not count as begun outside.
fn is_inbound(socket: Socket, ports: &HashSet<u16>, outside: &HashSet<IpAddr>) -> bool {
    let own = socket.local.ip().is_loopback() || socket.local.ip() == socket.remote.ip();
    socket.state == ESTABLISHED
        && !own
        && ports.contains(&socket.local.port())
        && outside.contains(&socket.local.ip().to_canonical())
}

/// The user id of the listening TCP socket that a connection to `address`, an address of this machine, would reach.
#[must_use]
pub fn listener_uid(address: SocketAddr) -> Option<u32> {
    let mut best: Option<(u8, u32)> = None;
    let read = for_each(|socket| {
        if let Some(rank) = rank(socket, address)
            && best.is_none_or(|(other, _)| rank > other)
        {
            best = Some((rank, socket.uid));
        }
        true
    });
    if let Err(error) = read {
        tracing::warn!(%error, "the table of sockets can't be read");
    }
    best.map(|(_, uid)| uid)
}

/// How well a listening socket fits: exact address, any address of this version, any address of both versions.
fn rank(socket: Socket, address: SocketAddr) -> Option<u8> {
    if socket.state != LISTEN || socket.local.port() != address.port() {
        return None;
    }
    let wanted = address.ip().to_canonical();
    match socket.local.ip() {
        ip if ip == wanted => Some(3),
        ip if ip.is_unspecified() && ip.is_ipv4() == wanted.is_ipv4() => Some(2),
        IpAddr::V6(ip) if ip.is_unspecified() => Some(1),
        _ => None,
    }
}

/// Calls `visit` with each socket until it says no.
fn for_each(mut visit: impl FnMut(Socket) -> bool) -> io::Result<()> {
    for table in TABLES {
        let file = match File::open(table) {
            // A kernel without IPv6 has no tcp6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table.ends_with('6') => continue,
            file => file?,
        };
        for line in BufReader::with_capacity(64 * 1024, file).lines().skip(1) {
            if let Some(socket) = parse(&line?)
                && !visit(socket)
            {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// `sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid …`, numbers in hexadecimal but for the uid.
fn parse(line: &str) -> Option<Socket> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = parse_address(fields.next()?)?;
    let remote = parse_address(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let uid = fields.nth(3)?.parse().ok()?;
    Some(Socket { local, remote, state, uid })
}

/// Groups of 32 bits in this machine's byte order, then the port.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut octets = [0; 16];
            for (index, chunk) in octets.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(index * 8)?);
            }
            IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn parses_both_tables() {
        let cases = [
            (
                "   0: 0100007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000   101        0 1 1 0 100 0 0 10 0",
                "127.0.0.1:53 0.0.0.0:0 10 101",
            ),
            (
                "  22: 0000000000000000FFFF00000100000A:0016 0000000000000000FFFF00000200000A:D431 01 00000000:00000000 02:000A 00000000 0 0 2 2",
                "10.0.0.1:22 10.0.0.2:54321 1 0",
            ),
            (
                "   1: 000080FE00000000FF565002BD69B1FE:0016 B80D0120000000000000000001000000:0050 01 0:0 0:0 0 1000 0",
                "[fe80::250:56ff:feb1:69bd]:22 [2001:db8::1]:80 1 1000",
            ),
        ];
        for (line, expected) in cases {
            let socket = parse(line).unwrap();
            assert_eq!(format!("{} {} {} {}", socket.local, socket.remote, socket.state, socket.uid), expected);
        }
        for line in
            ["", "0: 0100007F 0", "0: 0100007F:0035 00000000:0000 zz", "0: é00007F:0035 00000000:0000 0A 1 1 1 1"]
        {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn a_listener_is_found_by_the_address_that_is_asked_for() {
        let exact = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = exact.local_addr().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(listener_uid(address), Some(uid));
        assert_eq!(listener_uid(SocketAddr::new("127.0.0.2".parse().unwrap(), address.port())), None);
        drop(exact);
        assert_eq!(listener_uid(address), None);
    }

    #[test]
    fn what_goes_through_the_tunnel_did_not_begin_outside() {
        let (ports, outside) = (HashSet::from([22]), HashSet::from(["192.0.2.1".parse().unwrap()]));
        let cases = [
            ("192.0.2.1:22", "198.51.100.7:5000", true),
            ("[::ffff:192.0.2.1]:22", "[::ffff:198.51.100.7]:5000", true),
            ("192.0.2.1:23", "198.51.100.7:5000", false),
            ("192.0.2.1:22", "192.0.2.1:5000", false),
            ("10.255.255.1:22", "198.51.100.7:443", false),
        ];
        for (local, remote, expected) in cases {
            let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
            let socket = Socket { local, remote, state: ESTABLISHED, uid: 0 };
            assert_eq!(is_inbound(socket, &ports, &outside), expected, "{local} {remote}");
        }
    }

    #[test]
    fn ranks_the_nearest_listener() {
        let listen = |local: &str| Socket {
            local: local.parse().unwrap(),
            remote: "0.0.0.0:0".parse().unwrap(),
            state: LISTEN,
            uid: 0,
        };
        let cases = [
            ("10.0.0.1:80", "10.0.0.1:80", Some(3)),
            ("0.0.0.0:80", "10.0.0.1:80", Some(2)),
            ("[::]:80", "10.0.0.1:80", Some(1)),
            ("[::]:80", "[2001:db8::1]:80", Some(2)),
            ("0.0.0.0:80", "[2001:db8::1]:80", None),
            ("10.0.0.2:80", "10.0.0.1:80", None),
            ("0.0.0.0:81", "10.0.0.1:80", None),
        ];
        for (socket, address, expected) in cases {
            assert_eq!(rank(listen(socket), address.parse().unwrap()), expected, "{socket} {address}");
        }
    }
}
