//! Typed client proxies.

use std::collections::HashMap;

use zbus::{Fd, OwnedObjectPath, OwnedVariant, Variant};

use crate::types::{Bootstrap, Check, Circuit, Flow, HealthItem, LogRecord, PlanStep, Progress, Reason};

/// `org.proxyvpn1.Manager`. `docs/dbus.md` documents each member.
#[zbus::proxy(interface = "org.proxyvpn1.Manager", default_service = "org.proxyvpn1", default_path = "/org/proxyvpn1")]
pub trait Manager {
    /// Starts a connection; returns when accepted.
    #[zbus(allow_interactive_auth)]
    fn connect(&self, profile: &str, options: HashMap<&str, Variant<'_>>) -> Result<(), crate::Error>;
    /// Ends the connection; returns when accepted.
    #[zbus(allow_interactive_auth)]
    fn disconnect(&self, options: HashMap<&str, Variant<'_>>) -> Result<(), crate::Error>;
    /// Makes the present connection anew without opening the network.
    #[zbus(allow_interactive_auth)]
    fn reconnect(&self) -> Result<(), crate::Error>;
    /// Everything about the present state in one reply.
    fn status(&self) -> Result<HashMap<String, OwnedVariant>, crate::Error>;
    /// What `Connect` with these arguments would change.
    #[zbus(allow_interactive_auth)]
    fn plan(&self, profile: &str, options: HashMap<&str, Variant<'_>>) -> Result<Vec<PlanStep>, crate::Error>;
    /// Checks what a connection needs, one result a check.
    #[zbus(allow_interactive_auth)]
    fn diagnose(&self, profile: &str, options: HashMap<&str, Variant<'_>>) -> Result<Vec<Check>, crate::Error>;
    /// Stores the TOML text that the descriptor gives as a profile.
    #[zbus(allow_interactive_auth)]
    fn import_profile(
        &self,
        text: Fd<'_>,
        options: HashMap<&str, Variant<'_>>,
    ) -> Result<OwnedObjectPath, crate::Error>;
    /// Removes an imported profile.
    #[zbus(allow_interactive_auth)]
    fn remove_profile(&self, name: &str) -> Result<(), crate::Error>;
    /// The newest log records, oldest first; 0 means all that are kept.
    #[zbus(allow_interactive_auth)]
    fn get_log(&self, count: u32) -> Result<Vec<LogRecord>, crate::Error>;
    /// The connections in the tunnel.
    #[zbus(allow_interactive_auth)]
    fn list_flows(&self) -> Result<Vec<Flow>, crate::Error>;

    /// From now on no network without a connection, also after a reboot; or as before. Returns when it is done.
    #[zbus(allow_interactive_auth)]
    fn set_lockdown(&self, on: bool) -> Result<(), crate::Error>;

    /// A new state, with its phase and reason.
    #[zbus(signal, name = "StateChanged")]
    fn transition(&self, state: &str, phase: &str, reason: Reason);
    /// A new log record; sent to the callers of `GetLog` alone.
    #[zbus(signal)]
    fn log_entry(&self, record: LogRecord);

    /// Version of the daemon.
    #[zbus(property)]
    fn version(&self) -> zbus::Result<String>;
    /// See [`State`](crate::types::State).
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;
    /// Phase within `connecting` or `disconnecting`.
    #[zbus(property)]
    fn phase(&self) -> zbus::Result<String>;
    /// Why the state is what it is.
    #[zbus(property)]
    fn reason(&self) -> zbus::Result<Reason>;
    /// `proxy`, `torvm` or empty.
    #[zbus(property)]
    fn backend(&self) -> zbus::Result<String>;
    /// Name of the profile; `adhoc` for a connection without one; empty when disconnected.
    #[zbus(property)]
    fn profile(&self) -> zbus::Result<String>;
    /// When the state began, microseconds since 1970-01-01 UTC.
    #[zbus(property)]
    fn since(&self) -> zbus::Result<u64>;
    /// How far a connection attempt is.
    #[zbus(property)]
    fn progress(&self) -> zbus::Result<Progress>;
    /// Whether traffic around the tunnel is blocked now.
    #[zbus(property)]
    fn blocking(&self) -> zbus::Result<bool>;
    /// Whether nothing may leave without a connection.
    #[zbus(property)]
    fn lockdown(&self) -> zbus::Result<bool>;
    /// What is not as it should be.
    #[zbus(property)]
    fn health(&self) -> zbus::Result<Vec<HealthItem>>;
    /// Counters of the engine. Not signalled: read it when needed.
    #[zbus(property(emits_changed_signal = "false"))]
    fn statistics(&self) -> zbus::Result<HashMap<String, u64>>;
}

/// `org.proxyvpn1.TorVm`.
#[zbus::proxy(
    interface = "org.proxyvpn1.TorVm",
    default_service = "org.proxyvpn1",
    default_path = "/org/proxyvpn1/torvm"
)]
pub trait TorVm {
    /// Connections from now on take other ways through the Tor network.
    #[zbus(allow_interactive_auth)]
    fn new_identity(&self) -> Result<(), crate::Error>;
    /// The ways through the Tor network.
    #[zbus(allow_interactive_auth)]
    fn circuits(&self) -> Result<Vec<Circuit>, crate::Error>;
    /// Sets transport and bridges of an imported profile, from its next connection on.
    #[zbus(allow_interactive_auth)]
    fn set_bridges(&self, profile: &str, transport: &str, lines: &[&str]) -> Result<(), crate::Error>;

    /// How far Tor is.
    #[zbus(property)]
    fn bootstrap(&self) -> zbus::Result<Bootstrap>;
    /// How the virtual machine runs: `kvm`, `tcg` or empty.
    #[zbus(property)]
    fn accelerator(&self) -> zbus::Result<String>;
    /// Why it runs so.
    #[zbus(property)]
    fn accelerator_reason(&self) -> zbus::Result<String>;
    /// How Tor's bridges are reached: `none`, `obfs4`, `meek`, `snowflake` or empty.
    #[zbus(property)]
    fn transport(&self) -> zbus::Result<String>;
}

/// `org.proxyvpn1.Profile`.
#[zbus::proxy(interface = "org.proxyvpn1.Profile", default_service = "org.proxyvpn1", assume_defaults = false)]
pub trait Profile {
    /// Name, as `Connect` takes it.
    #[zbus(property)]
    fn name(&self) -> zbus::Result<String>;
    /// `proxy` or `torvm`.
    #[zbus(property)]
    fn backend(&self) -> zbus::Result<String>;
    /// The upstream as a URL without secrets.
    #[zbus(property)]
    fn upstream(&self) -> zbus::Result<String>;
    /// Whether the daemon connects it by itself when it starts.
    #[zbus(property)]
    fn autoconnect(&self) -> zbus::Result<bool>;
    /// `system` (the administrator's file) or `imported` (may be removed over the bus).
    #[zbus(property)]
    fn origin(&self) -> zbus::Result<String>;
    /// The profile as TOML without secrets.
    #[zbus(property)]
    fn text(&self) -> zbus::Result<String>;
}
