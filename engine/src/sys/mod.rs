//! The only place with `unsafe`: memory that the kernel backs on first touch, TUN ioctls, descriptors in an event loop.
#![allow(unsafe_code)]

mod connection;
mod link;
mod slab;
mod tun;
mod udp;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub(crate) use connection::Connection;
pub(crate) use link::LinkQueue;
pub(crate) use slab::Slab;
pub(crate) use tun::TunQueue;
pub(crate) use udp::watch_reads;

/// Makes `queue`, whose descriptor is `fd`, non-blocking and registers it with the current runtime, for errors too.
///
/// # Safety
/// `queue` must keep `fd` open while it lives, and give no other descriptor.
unsafe fn watch<Q: AsRawFd>(queue: Q, fd: &OwnedFd) -> io::Result<AsyncFd<Q>> {
    let status = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, status | rustix::fs::OFlags::NONBLOCK)?;
    let interest = Interest::READABLE | Interest::WRITABLE | Interest::ERROR;
    // SAFETY: the caller's promise is what is asked for.
    Ok(unsafe { AsyncFd::register_with_interest(queue, interest) }?)
}
