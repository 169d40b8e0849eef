//! What outlives the process.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::desired::Tunnel;
use super::tun;

/// Where descriptors outlive the process.
pub trait Keep: fmt::Debug + Send + Sync {
    /// Gives a copy of the descriptor away to be kept under `name`, and waits until it is.
    ///
    /// # Errors
    /// When nobody takes it.
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Has everything of this name closed; nothing is fine.
    ///
    /// # Errors
    /// When nobody listens.
    fn forget(&self, name: &str) -> io::Result<()>;
}

/// What the network gets from an earlier process, and leaves to a later one.
#[derive(Debug, Default)]
pub struct Keeping {
    /// Where it is left.
    pub store: Option<Arc<dyn Keep>>,
    /// The socket that owns the firewall's tables.
    pub firewall: Option<OwnedFd>,
    /// The queues of the tunnel device.
    pub tunnel: Vec<OwnedFd>,
}

impl Keeping {
    /// Name of the socket that owns the firewall's tables.
    pub const FIREWALL: &'static str = "nft";
    /// Name of each queue of the tunnel device.
    pub const TUNNEL: &'static str = "tun";
}

/// The queues of the tunnel device where they outlive the process. With them the device stays, with its addresses and the
/// routes into it: programs that connect meanwhile wait for the next daemon, and are not refused.
#[derive(Debug)]
pub(super) struct Queues {
    store: Option<Arc<dyn Keep>>,
    /// Of an earlier process.
    inherited: Vec<OwnedFd>,
}

impl Queues {
    pub(super) const fn new(store: Option<Arc<dyn Keep>>, inherited: Vec<OwnedFd>) -> Self {
        Self { store, inherited }
    }

    /// Whether an earlier process left this device with so many queues.
    pub(super) fn fit(&self, tunnel: &Tunnel, queues: usize) -> bool {
        self.inherited.len() == queues && self.inherited.iter().all(|fd| tun::is_queue(fd.as_fd(), tunnel, queues))
    }

    /// What an earlier process left, if it fits.
    pub(super) fn take(&mut self, tunnel: &Tunnel, queues: usize) -> Option<Vec<OwnedFd>> {
        self.fit(tunnel, queues).then(|| std::mem::take(&mut self.inherited))
    }

    /// Leaves the device to a later process.
    pub(super) fn leave(&self, queues: &[OwnedFd]) {
        let Some(store) = &self.store else { return };
        if let Err(error) = queues.iter().try_for_each(|queue| store.keep(Keeping::TUNNEL, queue.as_fd())) {
            tracing::warn!(%error, "the tunnel device will go with the daemon");
            // Some of the queues would take packets that nobody reads.
            self.close();
        }
    }

    /// Lets go of the device, here and where it is kept.
    pub(super) fn forget(&mut self) {
        self.inherited.clear();
        self.close();
    }

    fn close(&self) {
        if let Some(Err(error)) = self.store.as_ref().map(|store| store.forget(Keeping::TUNNEL)) {
            tracing::warn!(%error, "the tunnel device is kept although it is not needed");
        }
    }
}
