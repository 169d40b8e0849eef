//! `lockdown`.

use proxyvpn_dbus::types::HealthItem;
use serde::Serialize;

use crate::agent::Agent;
use crate::args::{Lockdown, Switch};
use crate::bus::{AUTHENTICATED, Bus, bounded};
use crate::exit::{Exit, Outcome};
use crate::status::Snapshot;
use crate::text;

/// `lockdown`.
pub(crate) async fn lockdown(args: &Lockdown) -> Outcome {
    let bus = Bus::open().await?;
    if args.what != Switch::Status {
        let agent = Agent::start();
        bounded(AUTHENTICATED, bus.manager.set_lockdown(args.what == Switch::On)).await?;
        drop(agent);
    }
    let snapshot = Snapshot::read(&bus).await?;
    if args.output.json {
        text::json(&Output::of(&snapshot))?;
    } else {
        snapshot.warn();
        text::out(&describe(&snapshot))?;
    }
    Ok(Exit::Ok)
}

/// What `lockdown --json` prints. Fields are only ever added.
#[derive(Serialize)]
struct Output<'a> {
    version: u32,
    lockdown: bool,
    state: &'a str,
    blocking: bool,
    health: Vec<&'a HealthItem>,
}

impl<'a> Output<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let health = snapshot.health.iter().filter(|item| item.code.starts_with("lockdown-")).collect();
        let Snapshot { lockdown, blocking, .. } = *snapshot;
        Self { version: 1, lockdown, state: &snapshot.state, blocking, health }
    }
}

fn describe(snapshot: &Snapshot) -> String {
    let text = match (snapshot.lockdown, snapshot.state.as_str(), snapshot.blocking) {
        (false, ..) => "lockdown is off: without a connection the network is open",
        (true, "disconnected", true) => "lockdown is on: nothing leaves until you connect (proxyctl connect)",
        (true, "disconnected", false) => "lockdown is on, but the block is not in force: traffic may leave",
        (true, ..) => "lockdown is on: nothing leaves without the connection, also after a reboot",
    };
    format!("{text}\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;

    fn snapshot(lockdown: bool, state: &str, blocking: bool) -> Snapshot {
        let item =
            |code: &str| HealthItem { code: code.to_owned(), severity: "warning".to_owned(), text: String::new() };
        let health = vec![item("lockdown-unguarded"), item("ports-scarce")];
        Snapshot { lockdown, state: state.to_owned(), blocking, health, ..Snapshot::default() }
    }

    #[test]
    fn what_is_in_force_is_said() {
        for (lockdown, state, blocking, words) in [
            (false, "connected", true, "is off"),
            (true, "disconnected", true, "until you connect"),
            (true, "disconnected", false, "may leave"),
            (true, "connected", true, "without the connection"),
        ] {
            let text = describe(&snapshot(lockdown, state, blocking));
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn only_its_own_health_is_in_the_output() {
        let json = serde_json::to_value(Output::of(&snapshot(true, "blocked", true))).unwrap();
        assert_eq!(json["lockdown"], true);
        assert_eq!(json["health"].as_array().unwrap().len(), 1);
    }
}
