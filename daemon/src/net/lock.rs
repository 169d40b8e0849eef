//! The lock: the table by which nothing leaves but what the daemon sends or lets through, whether the daemon runs or not.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::kernel::Kernel;
use super::network::{blocking, inbound_sessions};
use super::{Error, Keep, firewall};

/// Name of the socket that owns the lock, where it is kept.
pub const SOCKET: &str = "nft-lock";

/// Whether there is a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There is none.
    None,
    /// There is one that others can remove.
    Plain,
    /// There is one that belongs to a socket: it goes with that, and nobody else can remove it.
    Owned,
}

/// Whether there is a lock.
///
/// # Errors
/// When the kernel's firewall can't be asked.
pub async fn state() -> Result<State, Error> {
    Ok(blocking(firewall::lock::state).await?)
}

/// Puts the lock in force, in place of one that is there.
///
/// # Errors
/// The kernel's refusal; [`firewall::Error::Owned`] if there is one that belongs to somebody.
pub async fn install() -> Result<(), Error> {
    let sessions = open_sessions().await;
    Ok(blocking(move || firewall::lock::install(&sessions)).await?)
}

/// Puts the lock in force, in place of one that is there: it belongs to a socket that `store` keeps, which is `inherited` if
/// it was kept before. A kernel that does not know owners (before Linux 5.12) gets one without.
///
/// # Errors
/// The kernel's refusal, or that of the store.
pub async fn install_kept(inherited: Option<OwnedFd>, store: Arc<dyn Keep>) -> Result<(), Error> {
    let sessions = open_sessions().await;
    Ok(blocking(move || firewall::lock::install_kept(inherited, &*store, &sessions)).await?)
}

/// Takes the lock away; none is fine. Says whether there was one.
///
/// # Errors
/// [`firewall::Error::Owned`], or the kernel's refusal.
pub async fn remove() -> Result<bool, Error> {
    Ok(blocking(firewall::lock::remove).await?)
}

/// Connections from outside that are open. A lock without them is better than none.
async fn open_sessions() -> Vec<(std::net::SocketAddr, std::net::SocketAddr)> {
    let observed = match Kernel::connect() {
        Ok(kernel) => kernel.observe().await,
        Err(error) => Err(error),
    };
    match observed {
        Ok(observed) => inbound_sessions(&observed).await,
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "open connections from outside will end");
            vec![]
        }
    }
}
