//! Structures that cross the bus. Fields are only ever added by new methods or keys: a signature never changes.

use serde::{Deserialize, Serialize};
use zbus::{OwnedVariant, Type, Variant};

/// State of the connection (`Manager.State`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum State {
    #[default]
    /// No connection is wanted; the network is as it was.
    Disconnected,
    /// On the way to [`State::Connected`].
    Connecting,
    /// Traffic goes through the upstream.
    Connected,
    /// On the way to [`State::Disconnected`].
    Disconnecting,
    /// A connection is wanted but cannot be had: traffic is stopped, with a reason and a retry.
    Blocked,
}

impl State {
    /// Every state, for tests and documentation.
    pub const ALL: [Self; 5] =
        [Self::Disconnected, Self::Connecting, Self::Connected, Self::Disconnecting, Self::Blocked];

    /// The name on the bus.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Disconnecting => "disconnecting",
            Self::Blocked => "blocked",
        }
    }

    /// The state of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

/// Why the state is what it is (`Manager.Reason`): a stable code (see [`crate::ReasonCode`], empty when there is none) and a
/// sentence for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Type, Variant, OwnedVariant)]
pub struct Reason {
    /// Stable code.
    pub code: String,
    /// Cause, effect and next step.
    pub text: String,
}

/// How far a connection attempt is (`Manager.Progress`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Type, Variant, OwnedVariant)]
pub struct Progress {
    /// 0 to 100.
    pub percent: u32,
    /// What is being done.
    pub summary: String,
}

/// How far Tor is with its way into the network (`TorVm.Bootstrap`). All texts are Tor's own but the hint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Type, Variant, OwnedVariant)]
pub struct Bootstrap {
    /// 0 to 100.
    pub percent: u32,
    /// Stable code of the step, as `conn_or`.
    pub tag: String,
    /// What is being done.
    pub summary: String,
    /// What went wrong last, or empty.
    pub warning: String,
    /// Stable code of that, as `TIMEOUT`, or empty.
    pub reason: String,
    /// What it may mean and what to do, or empty.
    pub hint: String,
}

/// A relay of a [`Circuit`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Relay {
    /// 40 hexadecimal digits.
    pub fingerprint: String,
    /// What its operator calls it, or empty.
    pub nickname: String,
    /// Its address, or empty.
    pub address: String,
}

/// A way through the Tor network (`TorVm.Circuits`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Circuit {
    /// Tor's name of it.
    pub id: String,
    /// What it is for, as `GENERAL`.
    pub purpose: String,
    /// From the guard to the exit.
    pub relays: Vec<Relay>,
}

/// One entry of `Manager.Health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type, Variant, OwnedVariant)]
pub struct HealthItem {
    /// Stable code.
    pub code: String,
    /// `info`, `warning` or `error`.
    pub severity: String,
    /// What it means and what to do.
    pub text: String,
}

/// One step of `Manager.Plan`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct PlanStep {
    /// `link`, `address`, `route`, `rule`, `nft`, `sysctl` or `dns`.
    pub layer: String,
    /// `add`, `remove` or `set`.
    pub action: String,
    /// The object, in the notation of `ip`, `nft` and `sysctl`.
    pub text: String,
}

/// One record of `Manager.GetLog` and the signal `LogEntry`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct LogRecord {
    /// Microseconds since 1970-01-01 UTC.
    pub time: u64,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
    /// The part of the daemon that says it.
    pub target: String,
    /// The message, free of secrets.
    pub message: String,
}

/// One connection in the tunnel (`Manager.ListFlows`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Flow {
    /// Number of the connection, unique while the daemon runs.
    pub id: u64,
    /// `address:port` on this machine.
    pub source: String,
    /// `address:port` that the program asked for.
    pub destination: String,
    /// TCP state as in `ss`.
    pub state: String,
    /// Bytes to the upstream.
    pub sent: u64,
    /// Bytes from the upstream.
    pub received: u64,
    /// Age in milliseconds.
    pub age: u64,
}

/// One result of `Manager.Diagnose`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Check {
    /// Stable code.
    pub code: String,
    /// `ok`, `warning`, `failed` or `skipped`.
    pub outcome: String,
    /// What was found.
    pub text: String,
    /// One line that says what to do; empty when there is nothing to do.
    pub remedy: String,
}
