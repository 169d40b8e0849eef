//! Sockets for hickory that carry SO_MARK from their birth: the route is chosen at `bind` or `connect`.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::pin::Pin;
use std::time::Duration;

use hickory_resolver::net::runtime::iocompat::AsyncIoTokioAsStd;
use hickory_resolver::net::runtime::{RuntimeProvider, TokioHandle, TokioRuntimeProvider, TokioTime};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};

/// When the library names no bound itself.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// tokio, with marked sockets.
#[derive(Clone)]
pub(super) struct MarkedProvider {
    tokio: TokioRuntimeProvider,
    mark: Option<u32>,
}

impl MarkedProvider {
    pub(super) fn new(mark: Option<u32>) -> Self {
        Self { tokio: TokioRuntimeProvider::new(), mark }
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
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<tokio::net::TcpStream>;

    fn create_handle(&self) -> Self::Handle {
        self.tokio.create_handle()
    }

    fn connect_tcp(&self, server: SocketAddr, bind: Option<SocketAddr>, wait: Option<Duration>) -> Boxed<Self::Tcp> {
        let mark = self.mark;
        Box::pin(async move {
            let socket = socket(Domain::for_address(server), Type::STREAM, Protocol::TCP, mark)?;
            socket.set_tcp_nodelay(true)?;
            if let Some(bind) = bind {
                socket.bind(&bind.into())?;
            }
            let connect = TcpSocket::from_std_stream(TcpStream::from(socket)).connect(server);
            let stream = tokio::time::timeout(wait.unwrap_or(CONNECT_TIMEOUT), connect).await;
            Ok(AsyncIoTokioAsStd(stream.map_err(|_| io::ErrorKind::TimedOut)??))
        })
    }

    fn bind_udp(&self, local: SocketAddr, _server: SocketAddr) -> Boxed<Self::Udp> {
        let mark = self.mark;
        Box::pin(async move {
            let socket = socket(Domain::for_address(local), Type::DGRAM, Protocol::UDP, mark)?;
            socket.bind(&local.into())?;
            UdpSocket::from_std(socket.into())
        })
    }
}
