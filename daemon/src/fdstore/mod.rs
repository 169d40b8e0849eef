//! Descriptors that outlive the daemon, in the service manager's fd store (sd_pid_notify_with_fds(3)).

mod sys;

use std::env;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use sd_notify::NotifyState;

use crate::net::Keep;

/// The service manager answers at once, or is in trouble.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What an earlier process of this service left in the store.
#[derive(Debug, Default)]
pub struct Inherited(Vec<(String, OwnedFd)>);

impl Inherited {
    /// Takes what was handed over to this process (sd_listen_fds_with_names(3)). Whatever is wrong with it is as nothing.
    /// Only the first call gives anything.
    #[must_use]
    pub fn take() -> Self {
        match sys::listen_fds() {
            Ok(fds) => Self(fds),
            Err(error) => {
                tracing::warn!(%error, "what an earlier daemon left in the fd store cannot be taken over");
                Self::default()
            }
        }
    }

    /// The descriptor of this name. Others of that name are closed.
    pub fn named(&mut self, name: &str) -> Option<OwnedFd> {
        self.all(name).into_iter().next()
    }

    /// Every descriptor of this name.
    pub fn all(&mut self, name: &str) -> Vec<OwnedFd> {
        self.0.extract_if(.., |(known, _)| known == name).map(|(_, fd)| fd).collect()
    }
}

/// The store of the service that this process belongs to.
#[derive(Debug)]
pub struct FdStore;

impl FdStore {
    /// `None` without a service manager.
    #[must_use]
    pub fn from_env() -> Option<Self> {
        env::var_os("NOTIFY_SOCKET").map(|_| Self)
    }
}

impl Keep for FdStore {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        // Without FDPOLL=0 an unread answer of the kernel would count as an error of the socket, and end its keeping.
        let state = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
        sd_notify::notify_with_fds(&state, &[fd])?;
        barrier()
    }

    fn forget(&self, name: &str) -> io::Result<()> {
        sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
    }
}

/// Waits until the service manager has read all that was sent before (sd_notify_barrier(3)).
fn barrier() -> io::Result<()> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[writer.as_fd()])?;
    drop(writer);
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        // The other end is closed when the message has been read: that is all that is waited for.
        match poll(&mut [PollFd::new(&reader, PollFlags::empty())], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
