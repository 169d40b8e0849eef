//! What outlives the process.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Where descriptors outlive the process.
pub trait Keep: fmt::Debug + Send + Sync {
    /// Gives a copy of the descriptor away to be kept under `name`, and waits until it is.
    ///
    /// # Errors
    /// When nobody takes it.
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()>;
}

/// What the network gets from an earlier process, and leaves to a later one.
#[derive(Debug, Default)]
pub struct Keeping {
    /// Where it is left.
    pub store: Option<Arc<dyn Keep>>,
    /// The socket that owns the firewall's tables.
    pub firewall: Option<OwnedFd>,
}

impl Keeping {
    /// Name of the socket that owns the firewall's tables.
    pub const FIREWALL: &'static str = "nft";
}
