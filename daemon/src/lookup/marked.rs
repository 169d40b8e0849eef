//! Sockets for hickory that carry SO_MARK from their birth: the route is chosen at `bind` or `connect`.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hickory_resolver::net::runtime::iocompat::AsyncIoTokioAsStd;
use hickory_resolver::net::runtime::{DnsUdpSocket, RuntimeProvider, TokioHandle, TokioRuntimeProvider, TokioTime};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};

/// When the library names no bound itself.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// tokio, with marked sockets.
#[derive(Clone)]
pub(super) struct MarkedProvider {
    tokio: TokioRuntimeProvider,
    mark: Option<u32>,
    /// errno of the newest failure to send or connect, 0 for none: the library only says "no connections available".
    fault: Arc<AtomicI32>,
}

impl MarkedProvider {
    pub(super) fn new(mark: Option<u32>) -> Self {
        Self { tokio: TokioRuntimeProvider::new(), mark, fault: Arc::default() }
    }

    /// The newest failure of a socket.
    pub(super) fn fault(&self) -> Option<io::Error> {
        Some(self.fault.load(Ordering::Relaxed)).filter(|&errno| errno != 0).map(io::Error::from_raw_os_error)
    }
}

fn note(fault: &AtomicI32, error: &io::Error) {
    if let Some(errno) = error.raw_os_error() {
        fault.store(errno, Ordering::Relaxed);
    }
}

/// A UDP socket that remembers why it could not send.
pub(super) struct MarkedUdp {
    socket: UdpSocket,
    fault: Arc<AtomicI32>,
}

impl DnsUdpSocket for MarkedUdp {
    type Time = TokioTime;

    fn poll_recv_from(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>> {
        DnsUdpSocket::poll_recv_from(&self.socket, cx, buffer)
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, buffer: &[u8], target: SocketAddr) -> Poll<io::Result<usize>> {
        let sent = DnsUdpSocket::poll_send_to(&self.socket, cx, buffer, target);
        if let Poll::Ready(Err(error)) = &sent {
            note(&self.fault, error);
        }
        sent
    }
}

/// Whether this process may mark sockets.
pub(super) fn probe(mark: Option<u32>) -> io::Result<()> {
    socket(Domain::IPV4, Type::DGRAM, Protocol::UDP, mark).map(drop)
}

fn socket(domain: Domain, kind: Type, protocol: Protocol, mark: Option<u32>) -> io::Result<Socket> {
    let socket = Socket::new(domain, kind, Some(protocol))?;
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

type Boxed<T> = Pin<Box<dyn Send + Future<Output = io::Result<T>>>>;

impl RuntimeProvider for MarkedProvider {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = MarkedUdp;
    type Tcp = AsyncIoTokioAsStd<tokio::net::TcpStream>;

    fn create_handle(&self) -> Self::Handle {
        self.tokio.create_handle()
    }

    fn connect_tcp(&self, server: SocketAddr, bind: Option<SocketAddr>, wait: Option<Duration>) -> Boxed<Self::Tcp> {
        let (mark, fault) = (self.mark, Arc::clone(&self.fault));
        Box::pin(async move {
            let socket = socket(Domain::for_address(server), Type::STREAM, Protocol::TCP, mark)?;
            socket.set_tcp_nodelay(true)?;
            if let Some(bind) = bind {
                socket.bind(&bind.into())?;
            }
            let connect = TcpSocket::from_std_stream(TcpStream::from(socket)).connect(server);
            let stream = tokio::time::timeout(wait.unwrap_or(CONNECT_TIMEOUT), connect).await;
            let stream = stream.map_err(|_| io::ErrorKind::TimedOut)?;
            Ok(AsyncIoTokioAsStd(stream.inspect_err(|error| note(&fault, error))?))
        })
    }

    fn bind_udp(&self, local: SocketAddr, _server: SocketAddr) -> Boxed<Self::Udp> {
        let (mark, fault) = (self.mark, Arc::clone(&self.fault));
        Box::pin(async move {
            let socket = socket(Domain::for_address(local), Type::DGRAM, Protocol::UDP, mark)?;
            socket.bind(&local.into())?;
            Ok(MarkedUdp { socket: UdpSocket::from_std(socket.into())?, fault })
        })
    }
}
