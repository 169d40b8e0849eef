//! Descriptors by number.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Descriptors that were handed over to this process, with their names; none the second time.
pub(super) fn listen_fds() -> io::Result<Vec<(String, OwnedFd)>> {
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(vec![]);
    }
    let fds = sd_notify::listen_fds_with_names()?;
    // SAFETY: by sd_listen_fds(3) these numbers are open and meant for this process. Nobody else here takes them, and we
    // only once.
    Ok(fds.map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect())
}
