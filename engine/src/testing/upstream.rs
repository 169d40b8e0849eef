//! Upstreams: attempts that the test answers, tunnels whose far end it holds.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

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
