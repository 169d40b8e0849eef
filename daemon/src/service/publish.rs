//! What the machine shows, as properties; and signals for what changes.

use std::borrow::Cow;
use std::collections::HashMap;

use proxyvpn_dbus::names::{MANAGER, MANAGER_PATH, TORVM, TORVM_PATH};
use proxyvpn_dbus::options::status;
use proxyvpn_dbus::types::State;
use tokio::sync::watch;
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, Variant, fdo};

use super::manager::Manager;
use crate::log::Log;
use crate::machine::View;

/// How a property is read from a view.
type Read = fn(&View) -> Variant<'static>;

/// The properties that follow the view, by their name on the bus.
pub(super) const PROPERTIES: [(&str, Read); 10] = [
    ("State", |view| view.state.as_str().into()),
    ("Phase", |view| view.phase.into()),
    ("Reason", |view| view.reason.clone().into()),
    ("Backend", |view| view.backend.into()),
    ("Profile", |view| view.profile.clone().into()),
    ("Since", |view| view.since.into()),
    ("Progress", |view| view.progress.clone().into()),
    ("Blocking", |view| view.blocking.into()),
    ("Lockdown", |view| view.lockdown.into()),
    ("Health", |view| view.health.clone().into()),
];

/// The same of the `TorVm` interface.
pub(super) const TORVM_PROPERTIES: [(&str, Read); 4] = [
    (status::BOOTSTRAP, |view| view.bootstrap.clone().into()),
    (status::ACCELERATOR, |view| view.accelerator.0.into()),
    (status::ACCELERATOR_REASON, |view| view.accelerator.1.clone().into()),
    (status::TRANSPORT, |view| view.transport.into()),
];

fn changes(properties: &[(&'static str, Read)], old: &View, new: &View) -> HashMap<&'static str, Variant<'static>> {
    let changed = properties.iter().map(|(name, read)| (*name, read(old), read(new)));
    changed.filter(|(_, old, new)| old != new).map(|(name, _, new)| (name, new)).collect()
}

/// Follows the view until the machine ends. Views that follow each other faster than the bus takes them are joined.
/// When a connection ends, so does `log` being verbose for it.
pub(super) async fn follow(mut view: watch::Receiver<View>, connection: Connection, log: Log) -> zbus::Result<()> {
    let emitter = SignalEmitter::new(&connection, MANAGER_PATH)?;
    let tor = SignalEmitter::new(&connection, TORVM_PATH)?;
    let (interface, tor_interface) = (InterfaceName::try_from(MANAGER)?, InterfaceName::try_from(TORVM)?);
    let mut seen = view.borrow_and_update().clone();
    while view.changed().await.is_ok() {
        let now = view.borrow_and_update().clone();
        if seen.state != State::Disconnected && now.state == State::Disconnected {
            log.set_verbose(false);
        }
        let changed = changes(&TORVM_PROPERTIES, &seen, &now);
        if !changed.is_empty() {
            fdo::Properties::properties_changed(&tor, tor_interface.clone(), changed, Cow::Borrowed(&[])).await?;
        }
        let changed = changes(&PROPERTIES, &seen, &now);
        if !changed.is_empty() {
            // Before `StateChanged`: whoever acts on that may look at cached properties.
            fdo::Properties::properties_changed(&emitter, interface.clone(), changed, Cow::Borrowed(&[])).await?;
        }
        if (seen.state, seen.phase, &seen.reason) != (now.state, now.phase, &now.reason) {
            Manager::transition(&emitter, now.state.as_str(), now.phase, now.reason.clone()).await?;
        }
        seen = now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_told() {
        let old = View::default();
        assert!(changes(&PROPERTIES, &old, &old).is_empty());
        let new = View { blocking: true, profile: "work".to_owned(), device: "pvpn0".to_owned(), ..View::default() };
        let changed = changes(&PROPERTIES, &old, &new);
        assert_eq!(changed.len(), 2, "the device is no property: {changed:?}");
        assert_eq!(changed.get("Blocking"), Some(&true.into()));
        assert_eq!(changed.get("Profile"), Some(&"work".into()));
        assert!(changes(&TORVM_PROPERTIES, &old, &new).is_empty());
        let new = View { transport: "obfs4", ..new };
        assert_eq!(changes(&TORVM_PROPERTIES, &old, &new).get("Transport"), Some(&"obfs4".into()));
    }
}
