//! Readiness of a socket that tokio has no type for.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Takes over a non-blocking socket.
pub(super) fn watch(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same open descriptor as long as it lives, and AsyncFd owns it.
    Ok(unsafe { AsyncFd::register(socket) }?)
}
