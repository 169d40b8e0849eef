//! Sockets for datagrams: what is sent is kept, what the test puts there is received.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::upstream::{ConnectError, Connector, NOT_FOR_GUESTS, Socket, Sockets, Upstream};

/// All sockets of a shard's. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Outside(Rc<RefCell<State>>);

#[derive(Debug)]
struct State {
    connector: Connector,
    opened: Vec<Weak<Outlet>>,
    errno: Option<i32>,
    /// How often it was asked who may be sent to.
    asked: usize,
}

/// One socket, as long as the shard has it.
#[derive(Debug, Default)]
pub(crate) struct Outlet {
    sent: RefCell<Vec<(Vec<u8>, SocketAddrV4)>>,
    coming: RefCell<VecDeque<(Vec<u8>, SocketAddr)>>,
    waker: RefCell<Option<Waker>>,
    errno: RefCell<Option<i32>>,
}

impl Default for Outside {
    fn default() -> Self {
        let (upstream, refused) = (Upstream::Direct, NOT_FOR_GUESTS.to_vec());
        let connector = Connector { upstream, mark: None, timeout: Duration::ZERO, refused, only: None };
        Self(Rc::new(RefCell::new(State { connector, opened: Vec::new(), errno: None, asked: 0 })))
    }
}

impl Outside {
    /// Nothing goes to `address` any more.
    pub(crate) fn refuse(&self, address: &str) {
        self.0.borrow_mut().connector.refused.push(address.parse().unwrap());
    }

    /// What opening gives from now on.
    pub(crate) fn fail(&self, errno: Option<i32>) {
        self.0.borrow_mut().errno = errno;
    }

    /// The sockets that are open, in the order in which they were opened.
    pub(crate) fn ports(&self) -> Vec<Rc<Outlet>> {
        self.0.borrow().opened.iter().filter_map(Weak::upgrade).collect()
    }

    /// How often it was asked who may be sent to.
    pub(crate) fn asked(&self) -> usize {
        self.0.borrow().asked
    }
}

impl Outlet {
    /// What was sent since the last call.
    pub(crate) fn sent(&self) -> Vec<(Vec<u8>, SocketAddrV4)> {
        self.sent.take()
    }

    /// Lets `payload` come from `peer`.
    pub(crate) fn put(&self, payload: &[u8], peer: &str) {
        self.coming.borrow_mut().push_back((payload.to_vec(), peer.parse().unwrap()));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Datagrams that were not received yet.
    pub(crate) fn left(&self) -> usize {
        self.coming.borrow().len()
    }

    /// What sending, and receiving when nothing is there, give from now on.
    pub(crate) fn fail(&self, errno: Option<i32>) {
        self.errno.replace(errno);
    }

    fn failure(&self) -> Option<io::Error> {
        self.errno.borrow().map(io::Error::from_raw_os_error)
    }
}

impl Sockets for Outside {
    fn permits(&self, peer: SocketAddrV4) -> Result<(), ConnectError> {
        let mut state = self.0.borrow_mut();
        state.asked += 1;
        state.connector.permits_datagrams(peer)
    }

    fn open(&self) -> io::Result<Box<dyn Socket>> {
        let mut state = self.0.borrow_mut();
        if let Some(errno) = state.errno {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let port = Rc::<Outlet>::default();
        state.opened.retain(|port| port.strong_count() > 0);
        state.opened.push(Rc::downgrade(&port));
        Ok(Box::new(port))
    }
}

impl Socket for Rc<Outlet> {
    fn send(&self, payload: &[u8], peer: SocketAddrV4) -> io::Result<()> {
        match self.failure() {
            Some(error) => Err(error),
            None => {
                self.sent.borrow_mut().push((payload.to_vec(), peer));
                Ok(())
            }
        }
    }

    fn poll_receive(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>> {
        let Some((payload, peer)) = self.coming.borrow_mut().pop_front() else {
            self.waker.replace(Some(context.waker().clone()));
            return self.failure().map_or(Poll::Pending, |error| Poll::Ready(Err(error)));
        };
        let length = payload.len().min(buffer.len());
        buffer[..length].copy_from_slice(&payload[..length]);
        Poll::Ready(Ok((length, peer)))
    }
}
