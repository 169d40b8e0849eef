//! One connection: checks, TCP, CONNECT, answer.

use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::error::no_connect;
use super::http::{self, Answer, Decoder, Malformed};
use super::socket::{self, OpenError};
use super::{AuthenticationFault, ConnectError, Connector, HttpProxy, Target, Tunnel, Upstream};

/// Bytes asked for at once; also the most that can be early.
const CHUNK: usize = 4096;

impl Connector {
    /// Makes a connection to `target`, within [`timeout`](Self::timeout).
    ///
    /// # Errors
    /// See [`ConnectError`]. Dropping the future closes the socket.
    pub async fn connect(&self, target: &Target) -> Result<Tunnel, ConnectError> {
        self.permits(target)?;
        match &self.upstream {
            Upstream::Direct => self.direct(target).await,
            Upstream::HttpConnect(proxy) => self.through(proxy, target).await,
        }
    }

    async fn direct(&self, target: &Target) -> Result<Tunnel, ConnectError> {
        let address = match target {
            Target::Address(address) => *address,
            Target::Name(name, _) => {
                return Err(ConnectError::Name {
                    name: http::excerpt(name.as_bytes()),
                    problem: "a direct upstream resolves no names",
                });
            }
        };
        let attempt = async {
            if socket::leads_home(address, self.mark)? {
                Ok(None)
            } else {
                socket::open(address, self.mark).await.map(Some)
            }
        };
        match timeout_at(Instant::now() + self.timeout, attempt).await {
            Ok(Ok(None)) => Err(ConnectError::Forbidden(address.ip())),
            Ok(Ok(Some(stream))) => Ok(Tunnel { stream, early: Vec::new() }),
            Ok(Err(OpenError::Local(source))) => Err(ConnectError::Local { upstream: address.to_string(), source }),
            Ok(Err(OpenError::Remote(source))) => Err(ConnectError::Direct { target: address.to_string(), source }),
            Err(_) => Err(ConnectError::Direct { target: address.to_string(), source: late(self.timeout) }),
        }
    }

    async fn through(&self, proxy: &HttpProxy, target: &Target) -> Result<Tunnel, ConnectError> {
        let authority = http::authority(target)?;
        let deadline = Instant::now() + self.timeout;
        let stream = self.reach(proxy, &proxy.addresses, deadline).await?;
        let (stream, answer) = self.ask(proxy, stream, &authority, deadline).await?;
        judge(proxy, authority, answer).map(|early| Tunnel { stream, early })
    }

    /// The TCP connection to the proxy.
    pub(super) async fn reach(
        &self,
        proxy: &HttpProxy,
        addresses: &[SocketAddr],
        deadline: Instant,
    ) -> Result<TcpStream, ConnectError> {
        let upstream = proxy.name.clone();
        match timeout_at(deadline, socket::race(addresses, self.mark, &proxy.exhausted)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(OpenError::Local(source))) => Err(ConnectError::Local { upstream, source }),
            Ok(Err(OpenError::Remote(source))) => Err(ConnectError::Unreachable { upstream, source }),
            Err(_) => Err(ConnectError::Unreachable { upstream, source: late(self.timeout) }),
        }
    }

    /// Sends the request and waits for the final answer, whatever it says.
    pub(super) async fn ask(
        &self,
        proxy: &HttpProxy,
        mut stream: TcpStream,
        authority: &str,
        deadline: Instant,
    ) -> Result<(TcpStream, Answer), ConnectError> {
        let request = http::request(authority, proxy.credentials.as_ref());
        let exchange = async {
            stream.write_all(&request).await?;
            read_answer(&mut stream).await
        };
        let upstream = proxy.name.clone();
        match timeout_at(deadline, exchange).await {
            Ok(Ok(answer)) => Ok((stream, answer)),
            Ok(Err(Broken::Malformed(detail))) => Err(ConnectError::Protocol { upstream, detail: detail.to_string() }),
            Ok(Err(Broken::Io(source))) => Err(match source.kind() {
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                    ConnectError::Protocol { upstream, detail: "it reset the connection instead of answering".into() }
                }
                _ => ConnectError::Unreachable { upstream, source },
            }),
            // Rounded up, so that a bound below one second does not read as 0.
            Err(_) => Err(ConnectError::Silent {
                upstream,
                seconds: u64::try_from(self.timeout.as_millis().div_ceil(1000)).unwrap_or(u64::MAX),
            }),
        }
    }
}

/// What a final answer means for a connection: early bytes, or the error.
pub(super) fn judge(proxy: &HttpProxy, target: String, answer: Answer) -> Result<Vec<u8>, ConnectError> {
    let Answer { status, reason, other_schemes_only, early } = answer;
    let upstream = proxy.name.clone();
    match status {
        200..=299 => Ok(early),
        401 | 407 => Err(ConnectError::Authentication {
            upstream,
            fault: match (other_schemes_only, &proxy.credentials) {
                (true, _) => AuthenticationFault::NoBasic,
                (false, None) => AuthenticationFault::Missing,
                (false, Some(_)) => AuthenticationFault::Rejected,
            },
        }),
        500..=599 if !no_connect(status) => Err(ConnectError::Destination { upstream, target, status, reason }),
        _ => Err(ConnectError::Refused { upstream, target, status, reason }),
    }
}

/// Why there is no answer.
enum Broken {
    Io(io::Error),
    Malformed(Malformed),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

async fn read_answer(stream: &mut TcpStream) -> Result<Answer, Broken> {
    let mut decoder = Decoder::default();
    loop {
        let step = std::future::poll_fn(|context| {
            // Not held across an await, so it does not make every waiting connection 4 KiB larger.
            let mut chunk = [MaybeUninit::uninit(); CHUNK];
            let mut chunk = ReadBuf::uninit(&mut chunk);
            ready!(Pin::new(&mut *stream).poll_read(context, &mut chunk))?;
            let bytes = chunk.filled();
            let step = if bytes.is_empty() { Err(decoder.end()) } else { decoder.feed(bytes) };
            Poll::Ready(step.map_err(Broken::Malformed))
        });
        if let Some(answer) = step.await? {
            return Ok(answer);
        }
    }
}

/// The cause of a TCP connect that took longer than `bound`.
fn late(bound: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", bound.as_secs_f32()))
}
