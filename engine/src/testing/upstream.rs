//! Upstreams: attempts that the test answers, tunnels whose far end it holds.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use super::script::contents;
use crate::shard::core::{Dial, Outcome};
use crate::upstream::{ConnectError, Target, Tunnel};

type Waiting = VecDeque<(Target, oneshot::Sender<Outcome>)>;

/// Attempts that wait for the test to answer them.
#[derive(Clone, Default)]
pub(crate) struct Attempts(Arc<Mutex<Waiting>>);

impl Attempts {
    /// The way to this upstream.
    pub(crate) fn dial(&self) -> Dial {
        let attempts = self.clone();
        Arc::new(move |target| {
            let (answer, answered) = oneshot::channel();
            attempts.0.lock().unwrap().push_back((target, answer));
            Box::pin(async move {
                let refused = |_| Err(ConnectError::Forbidden([127, 0, 0, 1].into()));
                answered.await.unwrap_or_else(refused)
            })
        })
    }

    /// The oldest attempt.
    pub(crate) fn next(&self) -> Option<(Target, oneshot::Sender<Outcome>)> {
        self.0.lock().unwrap().pop_front()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// A tunnel and the far end of it.
pub(crate) async fn tunnel(early: &[u8]) -> (Tunnel, TcpStream) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    (Tunnel { stream, early: early.to_vec() }, far)
}

/// The far end of a tunnel that is a pair of local sockets: nothing in it depends on time. A reset of the far end is a close
/// with bytes unread.
#[derive(Debug)]
pub(crate) struct Far {
    stream: Option<UnixStream>,
    salt: u8,
    /// Bytes of the program that came, all of them as they should be.
    pub(crate) read: usize,
    /// Bytes for the program, early ones included.
    pub(crate) written: usize,
    /// It will write no more.
    pub(crate) finished: bool,
    /// The program's end was seen.
    pub(crate) saw_end: bool,
    /// The tunnel was reset, or this end closed without a look at what comes.
    pub(crate) broken: bool,
}

/// A tunnel with `early` early bytes, whose socket takes about `room` bytes, and the far end of it. The program's stream is
/// that of `salt`, the far end's that of `!salt`.
pub(crate) fn pair(salt: u8, early: usize, room: usize) -> (Tunnel, Far) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&near, room).unwrap();
    let stream = TcpStream::from_std(std::net::TcpStream::from(OwnedFd::from(near))).unwrap();
    let tunnel = Tunnel { stream, early: contents(!salt, 0, early) };
    let far = Far { stream: Some(far), salt, read: 0, written: early, finished: false, saw_end: false, broken: false };
    (tunnel, far)
}

impl Far {
    /// Writes up to `most` bytes.
    pub(crate) fn write(&mut self, most: usize) {
        let bytes = contents(!self.salt, self.written, self.written + most);
        if let Some(stream) = self.stream.as_mut().filter(|_| !self.finished && !self.broken) {
            match stream.write(&bytes) {
                Ok(n) => self.written += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.broken = true,
            }
        }
    }

    /// Reads up to `most` bytes.
    pub(crate) fn read(&mut self, most: usize) -> Result<(), String> {
        let mut bytes = vec![0; most];
        let Some(stream) = self.stream.as_mut().filter(|_| most > 0 && !self.saw_end && !self.broken) else {
            return Ok(());
        };
        match stream.read(&mut bytes) {
            Ok(0) => self.saw_end = true,
            Ok(n) if bytes[..n] != contents(self.salt, self.read, self.read + n) => {
                return Err(format!("the upstream got other bytes than the program sent, from {} on", self.read));
            }
            Ok(n) => self.read += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.broken = true,
        }
        Ok(())
    }

    /// Writes no more.
    pub(crate) fn finish(&mut self) {
        self.finished = true;
        if let Some(stream) = &self.stream {
            // Fails only when the other end has gone.
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
    }

    /// Closes the socket.
    pub(crate) fn close(&mut self) {
        (self.finished, self.broken) = (true, true);
        self.stream = None;
    }
}
