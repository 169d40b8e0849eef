//! Sockets towards the upstream: options before `connect`, and a race where there are several addresses.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::{Exhausted, error, ports};

/// How long an attempt has the field for itself (RFC 8305 section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// See [`limit_unsent`]; a flow that never had more to send needs no limit.
pub(crate) const UNSENT: u32 = 128 * 1024;

/// More addresses than this are not tried.
const MOST_ADDRESSES: usize = 16;

/// Why there is no TCP connection.
#[derive(Debug)]
pub(super) enum OpenError {
    /// This machine could not even try.
    Local(io::Error),
    /// The other end or the network in between.
    Remote(io::Error),
}

/// Connects to one address.
pub(super) async fn open(address: SocketAddr, mark: Option<u32>) -> Result<TcpStream, OpenError> {
    let mut windows = ports::WINDOWS;
    loop {
        windows -= 1;
        let socket = prepare(address, mark).map_err(OpenError::Local)?;
        let limited = ports::limit(&socket);
        match TcpSocket::from_std_stream(socket.into()).connect(address).await {
            Err(error) if limited && is_port_shortage(&error) && windows > 0 => {}
            outcome => return outcome.map_err(classify),
        }
    }
}

/// True when what goes to `address` stays on this machine: then the kernel takes that very address as the source (ip-route(8), type
/// local). Asked for each connection, since addresses come and go. Nothing is sent.
pub(super) fn leads_home(address: SocketAddr, mark: Option<u32>) -> Result<bool, OpenError> {
    let socket = marked(Domain::for_address(address), Type::DGRAM, mark).map_err(OpenError::Local)?;
    socket.connect(&address.into()).map_err(classify)?;
    let source = socket.local_addr().map_err(OpenError::Local)?;
    Ok(source.as_socket().is_some_and(|source| source.ip() == address.ip()))
}

fn is_port_shortage(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EADDRNOTAVAIL)
}

/// Connects to `address` unless no port is left for it.
async fn attempt(address: SocketAddr, mark: Option<u32>, exhausted: &Exhausted) -> Result<TcpStream, OpenError> {
    if exhausted.holds(address, Instant::now()) {
        return Err(OpenError::Local(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL)));
    }
    let outcome = open(address, mark).await;
    if let Err(OpenError::Local(error)) = &outcome
        && is_port_shortage(error)
    {
        exhausted.note(address, Instant::now());
    }
    outcome
}

/// Connects to the first of `addresses` that answers. Each starts [`STAGGER`] after the one before, or when that failed.
pub(super) async fn race(
    addresses: &[SocketAddr],
    mark: Option<u32>,
    exhausted: &Exhausted,
) -> Result<TcpStream, OpenError> {
    if let [only] = addresses {
        return attempt(*only, mark, exhausted).await;
    }
    let mut waiting = addresses.iter().take(MOST_ADDRESSES).copied();
    let mut running = JoinSet::new();
    let (mut remote, mut local) = (None, None);
    loop {
        if let Some(address) = waiting.next() {
            let exhausted = exhausted.clone();
            running.spawn(async move { attempt(address, mark, &exhausted).await });
        }
        let done = tokio::select! {
            done = running.join_next() => done,
            () = tokio::time::sleep(STAGGER), if waiting.len() > 0 => continue,
        };
        match done {
            Some(Ok(Ok(stream))) => return Ok(stream),
            Some(Ok(Err(OpenError::Remote(error)))) => _ = remote.get_or_insert(error),
            Some(Ok(Err(OpenError::Local(error)))) => _ = local.get_or_insert(error),
            Some(Err(error)) => _ = local.get_or_insert(error.into()),
            None => break,
        }
    }
    Err(match (remote, local) {
        // Not every address could be tried, and that is what can be mended here.
        (_, Some(error)) if error::shortage(&error).is_some() => OpenError::Local(error),
        // A family that this machine lacks must not hide what the other family met.
        (Some(error), _) => OpenError::Remote(error),
        (None, Some(error)) => OpenError::Local(error),
        (None, None) => OpenError::Remote(io::Error::new(io::ErrorKind::AddrNotAvailable, "it has no address")),
    })
}

/// A socket that is ready for `connect`.
fn prepare(address: SocketAddr, mark: Option<u32>) -> io::Result<Socket> {
    let socket = marked(Domain::for_address(address), Type::STREAM, mark)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// A socket for TCP (`STREAM`) or UDP (`DGRAM`) that does not block. It has the mark before anything leaves by it.
pub(super) fn marked(domain: Domain, kind: Type, mark: Option<u32>) -> io::Result<Socket> {
    let socket = Socket::new(domain, kind.nonblocking().cloexec(), None)?;
    mark.map_or(Ok(()), |mark| socket.set_mark(mark))?;
    Ok(socket)
}

/// Lets the system find out about a peer that vanished: asked after 60 s of silence, given up after another minute.
///
/// # Errors
/// setsockopt(2)'s, for a socket that is no longer connected.
pub(crate) fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15)).with_retries(4);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// Lets the system hold no more than [`UNSENT`] bytes that the network is not ready for (`TCP_NOTSENT_LOWAT`, tcp(7)). Without it, its
/// buffer grows to megabytes on a long way, and what a program writes last waits behind all of them.
///
/// # Errors
/// setsockopt(2)'s.
pub(crate) fn limit_unsent(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT)
}

/// Whose fault a failed `connect(2)` is.
fn classify(error: io::Error) -> OpenError {
    match error.raw_os_error() {
        Some(
            libc::EMFILE
            | libc::ENFILE
            | libc::ENOBUFS
            | libc::ENOMEM
            | libc::EADDRNOTAVAIL
            | libc::EPERM
            | libc::EACCES,
        ) => OpenError::Local(error),
        _ => OpenError::Remote(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rustix::fs::{OFlags, fcntl_getfl};
    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    #[test]
    fn options_are_set_before_connect() {
        for address in ["127.0.0.1:1", "[::1]:1"] {
            let socket = prepare(address.parse().unwrap(), None).unwrap();
            assert!(socket.tcp_nodelay().unwrap());
            assert_eq!(socket.mark().unwrap(), 0);
            assert!(fcntl_getfl(&socket).unwrap().contains(OFlags::NONBLOCK));
            assert!(fcntl_getfd(&socket).unwrap().contains(FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn what_stays_on_this_machine_is_told_by_the_kernel() {
        for (address, home) in
            [("127.0.0.1:1", true), ("[::1]:1", true), ("[::ffff:127.0.0.1]:1", true), ("192.0.2.9:1", false)]
        {
            // Without a network there is no way there, which is no way home either.
            let leads = leads_home(address.parse().unwrap(), None).unwrap_or(false);
            assert_eq!(leads, home, "{address}");
        }
    }

    #[tokio::test]
    async fn ports_come_from_windows() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        if !ports::limit(&prepare(address, None).unwrap()) {
            return;
        }
        let mut parities = [0, 0];
        for _ in 0..64 {
            let stream = open(address, None).await.unwrap();
            parities[usize::from(stream.local_addr().unwrap().port() % 2)] += 1;
        }
        // Without a window connect(2) takes one parity only, as long as that has free ports.
        assert!(parities.iter().all(|count| *count > 0), "{parities:?}");
    }

    #[tokio::test]
    async fn a_vanished_peer_is_noticed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = open(listener.local_addr().unwrap(), None).await.unwrap();
        let socket = SockRef::from(&stream);
        assert!(!socket.keepalive().unwrap());
        keep_alive(&stream).unwrap();
        limit_unsent(&stream).unwrap();
        assert_eq!(SockRef::from(&stream).tcp_notsent_lowat().unwrap(), UNSENT);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(60));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(15));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 4);
    }

    #[tokio::test]
    async fn a_socket_has_the_mark_or_there_is_none() {
        let address = "127.0.0.1:1".parse().unwrap();
        match prepare(address, Some(0x7076)) {
            Ok(socket) => assert_eq!(socket.mark().unwrap(), 0x7076),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM));
                assert!(matches!(open(address, Some(0x7076)).await, Err(OpenError::Local(_))));
            }
        }
    }

    #[test]
    fn whose_fault() {
        for (code, local) in [
            (libc::EMFILE, true),
            (libc::ENFILE, true),
            (libc::EADDRNOTAVAIL, true),
            (libc::EPERM, true),
            (libc::ENOBUFS, true),
            (libc::ECONNREFUSED, false),
            (libc::ETIMEDOUT, false),
            (libc::EHOSTUNREACH, false),
            (libc::ENETUNREACH, false),
        ] {
            let got = classify(io::Error::from_raw_os_error(code));
            assert_eq!(matches!(got, OpenError::Local(_)), local, "{got:?}");
        }
    }
}
