//! The lock: a unit of systemd's keeps it, which needs no process. Without systemd it is a table that stays until somebody
//! removes it.

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::HealthItem;
use zbus::Connection;

use super::carrier::item;
use super::network;
use crate::machine::Failure;
use crate::net::lock::{self, State};
use crate::systemd::{self, LOCK_UNIT};

/// Puts the lock in force. What falls short of a lock that nobody can remove is in the answer.
pub(super) async fn close(bus: &Connection) -> Result<Vec<HealthItem>, Failure> {
    let cause = match systemd::start_lock(bus).await {
        Ok(()) => match lock::state().await.map_err(|error| network::failure(&error))? {
            State::Owned => return Ok(Vec::new()),
            State::Plain => "the kernel does not let a table belong to anybody (before Linux 5.12)".to_owned(),
            State::None => format!("{LOCK_UNIT} was started, but there is no lock"),
        },
        Err(cause) => cause,
    };
    match lock::state().await {
        // An older one that systemd keeps, whatever it said now.
        Ok(State::Owned) => return Ok(Vec::new()),
        Ok(State::Plain | State::None) => lock::install().await.map_err(|error| network::failure(&error))?,
        Err(error) => return Err(network::failure(&error)),
    }
    let text = format!(
        "The lock is a table of nftables that other programs can remove, and after a reboot the network is open until the \
         daemon runs: {cause}"
    );
    Ok(vec![item("lockdown-unguarded", "warning", text)])
}

/// Takes the lock away.
pub(super) async fn open(bus: &Connection) -> Result<(), Failure> {
    let there = lock::state().await.map_err(|error| network::failure(&error))?;
    if there == State::None {
        return Ok(());
    }
    let stopped = systemd::stop_lock(bus).await;
    match (lock::remove().await, stopped) {
        (Ok(_), _) => Ok(()),
        (Err(_), Err(cause)) => Err(Failure::new(ReasonCode::FirewallFailed, cause)),
        (Err(error), Ok(())) => Err(network::failure(&error)),
    }
}
