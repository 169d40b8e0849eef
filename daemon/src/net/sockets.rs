//! TCP sockets of this network namespace, from /proc/thread-self/net/tcp and tcp6 (proc_pid_net(5)). Both are readable for
//! everyone, and remain so under `ProtectProc=invisible`. Who opened a connection is told by its counters.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_sock_diag::constants::{TCP_CLOSE_WAIT, TCP_ESTABLISHED, TCP_LISTEN};
use netlink_packet_sock_diag::inet::ExtensionFlags;

use super::diag::{Found, SockDiag};
use super::firewall::MAX_SESSIONS;

/// thread-self: the namespace of this thread, not of the main one.
const TABLES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
/// How often the counters of a busy connection are read until they agree.
const READS: u32 = 4;

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Socket {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
    uid: u32,
}

/// Open connections that began outside, as (local, remote): their local address is one of `outside`, the addresses that are
/// not the tunnel's, a socket listens there, and this machine did not open them. IPv4 over an IPv6 socket is given as IPv4.
/// Connections of this machine with itself are left out. At most one more than [`MAX_SESSIONS`], which tells that there are
/// more.
pub fn inbound_sessions(outside: &HashSet<IpAddr>) -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
    let mut inbound = Inbound::new(outside)?;
    let mut sessions = vec![];
    for_each(|socket| {
        if inbound.has(socket.local, socket.remote, socket.state) {
            sessions.push((socket.local, socket.remote));
        }
        sessions.len() <= MAX_SESSIONS
    })?;
    Ok(sessions)
}

/// Tells connections that began outside from those of this machine's own.
pub(super) struct Inbound<'a> {
    outside: &'a HashSet<IpAddr>,
    listening: HashSet<SocketAddr>,
    /// `None`: the kernel does not tell, so that a connection to a listening socket counts as one from outside.
    diag: Option<SockDiag>,
}

impl<'a> Inbound<'a> {
    /// A pass over the table of its own, so that memory is bounded by the listening sockets and not by the connections.
    pub(super) fn new(outside: &'a HashSet<IpAddr>) -> io::Result<Self> {
        let mut listening = HashSet::new();
        for_each(|socket| {
            if socket.state == TCP_LISTEN {
                listening.insert(socket.local);
            }
            true
        })?;
        let diag = SockDiag::open()
            .inspect_err(|error| tracing::warn!(%error, "cannot ask the kernel who opened a connection"))
            .ok();
        Ok(Self { outside, listening, diag })
    }

    /// Whether the connection of that socket began outside and is open.
    pub(super) fn has(&mut self, local: SocketAddr, remote: SocketAddr, state: u8) -> bool {
        [TCP_ESTABLISHED, TCP_CLOSE_WAIT].contains(&state)
            && !local.ip().is_loopback()
            && local.ip() != remote.ip()
            && self.outside.contains(&local.ip().to_canonical())
            && self.listens(local)
            && self.diag.as_mut().is_none_or(|diag| opened(diag, local, remote) != Some(Opened::Here))
    }

    fn listens(&self, local: SocketAddr) -> bool {
        let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
        // The first serves both versions.
        let any = &any[..if local.ip().to_canonical().is_ipv4() { 2 } else { 1 }];
        let local = SocketAddr::new(local.ip().to_canonical(), local.port());
        self.listening.contains(&local)
            || any.iter().any(|ip| self.listening.contains(&SocketAddr::new(*ip, local.port())))
    }
}

/// Who sent the SYN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opened {
    Here,
    Outside,
}

/// A program may listen and connect from one port (`SO_REUSEPORT`): what it opened must not count as begun outside.
fn opened(diag: &mut SockDiag, local: SocketAddr, remote: SocketAddr) -> Option<Opened> {
    for _ in 0..READS {
        let found = diag.find(local, remote, ExtensionFlags::INFO).ok()??;
        if let Some(opened) = opener(&found) {
            return Some(opened);
        }
    }
    None
}

/// Who opened an established connection, by what its counters leave over: the kernel counts the SYN of the side that opened
/// as an acknowledged byte, and no byte for the SYN-ACK of the other (RFC 4898, tcpEStatsAppHCThruOctetsAcked). `None`: the
/// counters moved while they were read, or a segment was lost within this machine.
fn opener(socket: &Found) -> Option<Opened> {
    let info = socket.info.as_deref()?;
    let four = |at: usize| info.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let eight = |at: usize| info.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    // Offsets in struct tcp_info (linux/tcp.h): tcpi_unacked, notsent_bytes, bytes_acked, bytes_sent, bytes_retrans.
    let (segments, unsent, acknowledged) = (four(24)?, four(144)?, eight(120)?);
    let (sent, again) = (eight(200)?, eight(208)?);
    // Under way: only this number is read apart from the others.
    let under_way = if segments == 0 { 0 } else { socket.queued.wrapping_sub(unsent) };
    match acknowledged.wrapping_add(under_way.into()).wrapping_sub(sent.wrapping_sub(again)) {
        0 => Some(Opened::Outside),
        1 => Some(Opened::Here),
        _ => None,
    }
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
    if socket.state != TCP_LISTEN || socket.local.port() != address.port() {
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
    use netlink_packet_sock_diag::constants::TCP_SYN_SENT;

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
    fn a_connection_from_outside_meets_a_listening_socket_and_not_the_tunnel() {
        let outside = HashSet::from(["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()]);
        let listening = ["0.0.0.0:22", "[::]:24", "192.0.2.1:25", "127.0.0.1:26", "10.255.255.1:27"];
        let listening = listening.map(|address| address.parse().unwrap()).into();
        let mut inbound = Inbound { outside: &outside, listening, diag: None };
        let cases = [
            ("192.0.2.1:22", "198.51.100.7:5000", TCP_ESTABLISHED, true),
            ("192.0.2.1:22", "198.51.100.7:5000", TCP_CLOSE_WAIT, true),
            ("192.0.2.1:22", "198.51.100.7:5000", TCP_SYN_SENT, false),
            ("[::ffff:192.0.2.1]:22", "[::ffff:198.51.100.7]:5000", TCP_ESTABLISHED, true),
            ("[2001:db8::1]:22", "[2001:db8::7]:5000", TCP_ESTABLISHED, false),
            ("192.0.2.1:23", "198.51.100.7:5000", TCP_ESTABLISHED, false),
            ("192.0.2.1:24", "198.51.100.7:5000", TCP_ESTABLISHED, true),
            ("[2001:db8::1]:24", "[2001:db8::7]:5000", TCP_ESTABLISHED, true),
            ("192.0.2.1:25", "198.51.100.7:5000", TCP_ESTABLISHED, true),
            // An own connection can have the port of a socket that listens on another address.
            ("192.0.2.1:26", "198.51.100.7:443", TCP_ESTABLISHED, false),
            ("192.0.2.1:22", "192.0.2.1:5000", TCP_ESTABLISHED, false),
            ("10.255.255.1:27", "198.51.100.7:443", TCP_ESTABLISHED, false),
        ];
        for (local, remote, state, expected) in cases {
            let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
            assert_eq!(inbound.has(local, remote, state), expected, "{local} {remote} {state}");
        }
    }

    #[test]
    fn counters_tell_who_opened_a_connection() {
        use std::io::{Read as _, Write as _};
        let mut diag = SockDiag::open().unwrap();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = std::net::TcpListener::bind(address).unwrap();
            let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let (ours, theirs) = (client.local_addr().unwrap(), server.local_addr().unwrap());
            let mut told = |what: &str| {
                assert_eq!(opened(&mut diag, ours, theirs), Some(Opened::Here), "{address} {what}");
                assert_eq!(opened(&mut diag, theirs, ours), Some(Opened::Outside), "{address} {what}");
            };
            told("at once");
            client.write_all(b"hello").unwrap();
            server.read_exact(&mut [0; 5]).unwrap();
            server.write_all(&[1; 70_000]).unwrap();
            told("with bytes that wait in the other program");
            client.read_exact(&mut [0; 70_000]).unwrap();
            told("after bytes both ways");
            // More than the other side takes.
            for stream in [&mut client, &mut server] {
                stream.set_nonblocking(true).unwrap();
                while stream.write(&[2; 1 << 16]).is_ok() {}
            }
            told("with full buffers");
        }
    }

    #[test]
    fn counters_that_make_no_sense_tell_nothing() {
        let mut diag = SockDiag::open().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let found = diag.find(client.local_addr().unwrap(), listener.local_addr().unwrap(), ExtensionFlags::INFO);
        let found = found.unwrap().unwrap();
        assert_eq!(opener(&found), Some(Opened::Here));
        let with = |info: Option<Vec<u8>>| {
            let mut other = found.clone();
            other.info = info;
            opener(&other)
        };
        let info = found.info.clone().unwrap();
        assert_eq!(with(None), None);
        assert_eq!(with(Some(info[..200].to_vec())), None, "of a kernel that does not count so much");
        let mut odd = info;
        odd[120] = 9;
        assert_eq!(with(Some(odd)), None);
        assert_eq!(opened(&mut diag, "192.0.2.9:1".parse().unwrap(), "192.0.2.8:1".parse().unwrap()), None);
    }

    #[test]
    fn ranks_the_nearest_listener() {
        let listen = |local: &str| Socket {
            local: local.parse().unwrap(),
            remote: "0.0.0.0:0".parse().unwrap(),
            state: TCP_LISTEN,
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
