//! `status`.

use std::collections::HashMap;

use proxyvpn_dbus::options::status as key;
use proxyvpn_dbus::types::{Bootstrap, HealthItem, Progress, Reason, State};
use serde::Serialize;
use zbus::OwnedVariant;

use crate::args::Status;
use crate::bus::{Bus, take, vanished};
use crate::events::Events;
use crate::exit::{Exit, Failure, Outcome};
use crate::text;

/// What `Manager.Status` says; as JSON, the output of `status --json`. Fields are only ever added.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Snapshot {
    pub(crate) version: u32,
    pub(crate) daemon_version: String,
    pub(crate) state: String,
    pub(crate) phase: String,
    pub(crate) reason: Reason,
    pub(crate) backend: String,
    pub(crate) profile: String,
    pub(crate) upstream: String,
    /// Microseconds since 1970-01-01 UTC.
    pub(crate) since: u64,
    pub(crate) progress: Progress,
    pub(crate) blocking: bool,
    pub(crate) lockdown: bool,
    pub(crate) firewall: String,
    pub(crate) device: String,
    pub(crate) resolvers: Vec<String>,
    /// With the torvm backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) torvm: Option<Tor>,
    pub(crate) health: Vec<HealthItem>,
    pub(crate) statistics: std::collections::BTreeMap<String, u64>,
}

/// What there is only with the torvm backend.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Tor {
    pub(crate) bootstrap: Bootstrap,
    pub(crate) accelerator: String,
    pub(crate) accelerator_reason: String,
    pub(crate) transport: String,
}

impl Tor {
    fn take(map: &mut HashMap<String, OwnedVariant>) -> Result<Self, Failure> {
        Ok(Self {
            bootstrap: take(map, key::BOOTSTRAP)?,
            accelerator: take(map, key::ACCELERATOR)?,
            accelerator_reason: take(map, key::ACCELERATOR_REASON)?,
            transport: take(map, key::TRANSPORT)?,
        })
    }

    /// The lines of `status`.
    fn fields(&self, mut field: impl FnMut(&str, &str)) {
        let Bootstrap { percent, summary, warning, reason, hint, .. } = &self.bootstrap;
        if !summary.is_empty() {
            field("Tor", &format!("{percent}%: {summary}"));
        }
        if !warning.is_empty() {
            let code = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
            field("Tor warns", &format!("{warning}{code}"));
        }
        field("Hint", hint);
        field("Transport", if self.transport == "none" { "" } else { &self.transport });
        let why =
            if self.accelerator_reason.is_empty() { String::new() } else { format!(": {}", self.accelerator_reason) };
        if !self.accelerator.is_empty() {
            field("VM runs by", &format!("{}{why}", self.accelerator));
        }
    }
}

impl Snapshot {
    /// Asks the daemon.
    pub(crate) async fn read(bus: &Bus) -> Result<Self, Failure> {
        Self::from_reply(bus.status().await?)
    }

    fn from_reply(mut map: HashMap<String, OwnedVariant>) -> Result<Self, Failure> {
        let torvm = if map.contains_key(key::BOOTSTRAP) { Some(Tor::take(&mut map)?) } else { None };
        Ok(Self {
            version: 1,
            daemon_version: take(&mut map, "Version")?,
            state: take(&mut map, "State")?,
            phase: take(&mut map, "Phase")?,
            reason: take(&mut map, "Reason")?,
            backend: take(&mut map, "Backend")?,
            profile: take(&mut map, "Profile")?,
            upstream: take(&mut map, key::UPSTREAM)?,
            since: take(&mut map, "Since")?,
            progress: take(&mut map, "Progress")?,
            blocking: take(&mut map, "Blocking")?,
            lockdown: take(&mut map, "Lockdown")?,
            firewall: take(&mut map, key::FIREWALL)?,
            device: take(&mut map, key::DEVICE)?,
            resolvers: take(&mut map, key::RESOLVERS)?,
            torvm,
            health: take(&mut map, "Health")?,
            statistics: take(&mut map, "Statistics")?,
        })
    }

    /// Says on standard error what is not as it should be.
    pub(crate) fn warn(&self) {
        for item in self.health.iter().filter(|item| item.severity != "info") {
            text::note(&format!("proxyctl: {}: {}", text::line(&item.severity), text::indented(&item.text, 2)));
        }
    }

    fn exit(&self) -> Exit {
        match State::from_name(&self.state) {
            Some(State::Connected) => Exit::Ok,
            Some(State::Blocked) => Exit::Blocked,
            _ => Exit::NotConnected,
        }
    }

    /// The lines of `status`.
    fn describe(&self, now: u64) -> String {
        let mut lines = String::new();
        let mut field = |name: &str, value: &str| {
            if !value.is_empty() {
                lines.push_str(&format!("{name:<11}{}\n", text::indented(value, 11)));
            }
        };
        let mut state = self.state.clone();
        if !self.phase.is_empty() {
            state.push_str(&format!(": {}", self.phase));
        }
        if self.progress.percent > 0 && self.state == State::Connecting.as_str() {
            state.push_str(&format!(" {}%", self.progress.percent));
        }
        if self.since > 0 {
            state.push_str(&format!(", for {}", text::span(now.saturating_sub(self.since) / 1_000_000)));
        }
        field("State", &state);
        if !self.reason.code.is_empty() && self.reason.code != "requested" {
            field("Reason", &format!("{} ({})", self.reason.text, self.reason.code));
        }
        field("Profile", &self.profile);
        field("Backend", &self.backend);
        field("Upstream", &self.upstream);
        if let Some(tor) = &self.torvm {
            tor.fields(&mut field);
        }
        field("Device", &self.device);
        field("Firewall", &self.firewall);
        field("Blocking", if self.blocking { "yes: nothing goes around the tunnel" } else { "no" });
        field("Lockdown", if self.lockdown { "on: nothing leaves without a connection" } else { "" });
        field("Resolvers", &self.resolvers.join(", "));
        for item in &self.health {
            field("Health", &format!("{}: {} ({})", item.severity, item.text, item.code));
        }
        for (name, value) in self.statistics.iter().filter(|(_, value)| **value > 0) {
            let amount = if name.contains("bytes") { text::bytes(*value) } else { value.to_string() };
            field("Counter", &format!("{name} {amount}"));
        }
        field("Daemon", &self.daemon_version);
        lines
    }

    /// The line of `status --watch`.
    fn brief(&self) -> String {
        let mut line = self.state.clone();
        for (open, value, close) in
            [(": ", &self.phase, ""), (" [", &self.profile, "]"), (" - ", &self.reason.text, "")]
        {
            if !value.is_empty() {
                line.push_str(&format!("{open}{value}{close}"));
            }
        }
        if self.progress.percent > 0 && self.state == State::Connecting.as_str() {
            line.push_str(&format!(" {}%", self.progress.percent));
        }
        text::line(&line).into_owned()
    }
}

/// `status`.
pub(crate) async fn status(args: &Status) -> Outcome {
    let bus = Bus::open().await?;
    if args.watch {
        return watch(&bus, args.output.json).await;
    }
    let snapshot = Snapshot::read(&bus).await?;
    if args.output.json {
        text::json(&snapshot)?;
    } else {
        text::out(&snapshot.describe(text::now()))?;
    }
    Ok(if args.check { snapshot.exit() } else { Exit::Ok })
}

/// One line at the start and one for each change, until the daemon stops.
async fn watch(bus: &Bus, json: bool) -> Outcome {
    let mut events = Events::subscribe(bus).await?;
    let mut last = None;
    loop {
        let snapshot = Snapshot::read(bus).await?;
        // Counters change all the time and are not signalled: they make no line.
        let compared = Snapshot { statistics: std::collections::BTreeMap::default(), ..snapshot.clone() };
        if last.as_ref() != Some(&compared) {
            if json {
                text::json(&snapshot)?;
            } else {
                text::out(&format!("{}  {}\n", text::time(text::now()), snapshot.brief()))?;
            }
            last = Some(compared);
        }
        if !events.settle().await {
            return Err(vanished());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;

    #[test]
    fn the_description_is_safe_and_complete() {
        let snapshot = Snapshot {
            state: "blocked".to_owned(),
            reason: Reason {
                code: "device-lost".to_owned(),
                text: "the device\x1b[2J vanished\nState connected".to_owned(),
            },
            profile: "office".to_owned(),
            blocking: true,
            since: 1_000_000,
            ..Snapshot::default()
        };
        let text = snapshot.describe(61_000_000);
        assert!(text.starts_with("State      blocked, for 1 min\n"), "{text}");
        assert!(text.contains("vanished\n           State connected (device-lost)\n"), "{text}");
        assert!(text.contains("Blocking   yes") && !text.contains('\x1b'));
    }

    #[test]
    fn the_exit_code_tells_the_state() {
        let exit = |state: &str| Snapshot { state: state.to_owned(), ..Snapshot::default() }.exit();
        assert_eq!(exit("connected"), Exit::Ok);
        assert_eq!(exit("blocked"), Exit::Blocked);
        for state in ["connecting", "disconnected", "disconnecting", "", "new"] {
            assert_eq!(exit(state), Exit::NotConnected, "{state}");
        }
    }

    #[test]
    fn an_answer_of_another_form_is_an_error() {
        let reply = |value: zbus::Variant<'static>| {
            HashMap::from([("State".to_owned(), OwnedVariant::try_from(value).unwrap())])
        };
        assert_eq!(Snapshot::from_reply(reply("connected".into())).unwrap().state, "connected");
        assert_eq!(Snapshot::from_reply(reply(7_u32.into())).unwrap_err().exit, Exit::Failure);
    }
}
