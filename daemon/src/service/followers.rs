//! `LogEntry` to those who called `GetLog`, until they leave the bus. Unicast: nobody else may see the log.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use proxyvpn_dbus::Error;
use proxyvpn_dbus::names::MANAGER_PATH;
use proxyvpn_dbus::types::LogRecord;
use tokio::sync::broadcast::error::RecvError;
use zbus::Connection;
use zbus::names::UniqueName;
use zbus::object_server::SignalEmitter;

use super::manager::Manager;
use crate::authority::Authority;
use crate::log::Log;

/// Most connections that follow the log.
const MAX_FOLLOWERS: usize = 32;

/// Who follows the log.
#[derive(Debug, Clone, Default)]
pub(super) struct Followers(Arc<Mutex<HashSet<String>>>);

impl Followers {
    /// The newest records for `name`, which gets those to come as signals from now on. A second call is only a look.
    pub(super) fn add(
        &self,
        log: &Log,
        count: usize,
        name: UniqueName<'static>,
        connection: &Connection,
        authority: &Arc<Authority>,
    ) -> Result<Vec<LogRecord>, Error> {
        {
            let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if names.contains(name.as_str()) {
                return Ok(log.recent(count));
            }
            if names.len() >= MAX_FOLLOWERS {
                return Err(Error::LimitExceeded(format!("{MAX_FOLLOWERS} programs follow the log already")));
            }
            names.insert(name.as_str().to_owned());
        }
        let (records, mut next) = log.follow(count);
        let (followers, authority, connection) = (self.clone(), Arc::clone(authority), connection.clone());
        tokio::spawn(async move {
            let forward = async {
                let Ok(emitter) = SignalEmitter::new(&connection, MANAGER_PATH) else { return };
                let emitter = emitter.set_destination(name.clone().into());
                loop {
                    match next.recv().await {
                        // An error here is one of our own connection; the follower's leaving is seen below.
                        Ok(record) => drop(Manager::log_entry(&emitter, record).await),
                        Err(RecvError::Lagged(_)) => {}
                        Err(RecvError::Closed) => return,
                    }
                }
            };
            tokio::select! {
                () = authority.vanished(&name) => {}
                () = forward => {}
            }
            followers.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name.as_str());
        });
        Ok(records)
    }
}
