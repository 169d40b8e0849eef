//! What the machine is told and what it shows.

use std::collections::HashMap;

use proxyvpn_dbus::types::{Bootstrap, Check, Circuit, Flow, HealthItem, PlanStep, Progress, Reason, State};
use proxyvpn_engine::secret::Secret;
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::profile::Profile;

/// A connection that somebody asked for, already authorised and checked.
#[derive(Debug, Clone)]
pub struct Request {
    /// What to connect; for an ad-hoc connection its name is `adhoc`.
    pub profile: Profile,
    /// A password that came with the call; otherwise the profile's source is read.
    pub password: Option<Secret>,
}

/// What the machine can be told. Replies come when the command is accepted, not when it is done.
#[derive(Debug)]
pub enum Command {
    /// Make a connection.
    Connect(Box<Request>, oneshot::Sender<Result<(), proxyvpn_dbus::Error>>),
    /// End it.
    Disconnect(oneshot::Sender<Result<(), proxyvpn_dbus::Error>>),
    /// Make it anew without opening the network.
    Reconnect(oneshot::Sender<Result<(), proxyvpn_dbus::Error>>),
    /// Lockdown on, with the profiles that could be connected then; or off (`None`). The reply comes when it is done.
    Lockdown(Option<Vec<Profile>>, oneshot::Sender<Result<(), proxyvpn_dbus::Error>>),
    /// What `Connect` would change.
    Plan(Box<Request>, oneshot::Sender<Result<Vec<PlanStep>, proxyvpn_dbus::Error>>),
    /// Check what a connection needs; without a request, only what needs no upstream.
    Diagnose(Option<Box<Request>>, oneshot::Sender<Vec<Check>>),
    /// The connections in the tunnel.
    Flows(oneshot::Sender<Vec<Flow>>),
    /// Counters of the engine by name; empty when it does not run.
    Statistics(oneshot::Sender<HashMap<String, u64>>),
    /// Connections from now on take other ways through the Tor network.
    NewIdentity(oneshot::Sender<Result<(), proxyvpn_dbus::Error>>),
    /// The ways through the Tor network.
    Circuits(oneshot::Sender<Result<Vec<Circuit>, proxyvpn_dbus::Error>>),
}

/// What the machine shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// State.
    pub state: State,
    /// Phase within `connecting` or `disconnecting`, else empty.
    pub phase: &'static str,
    /// Why.
    pub reason: Reason,
    /// Backend or empty.
    pub backend: &'static str,
    /// Profile or empty.
    pub profile: String,
    /// Upstream without secrets or empty.
    pub upstream: String,
    /// Microseconds since 1970-01-01 UTC.
    pub since: u64,
    /// How far an attempt is.
    pub progress: Progress,
    /// Whether traffic around the tunnel is blocked now.
    pub blocking: bool,
    /// Whether nothing may leave without a connection.
    pub lockdown: bool,
    /// `nftnl`, `nft`, `iptables` or empty.
    pub firewall: &'static str,
    /// Tunnel device or empty.
    pub device: String,
    /// Resolvers reached around the tunnel.
    pub resolvers: Vec<String>,
    /// How far Tor is; the default without one.
    pub bootstrap: Bootstrap,
    /// How the virtual machine runs, `kvm` or `tcg`, and why; empty without one.
    pub accelerator: (&'static str, String),
    /// How Tor's bridges are reached; empty without Tor.
    pub transport: &'static str,
    /// What is not as it should be.
    pub health: Vec<HealthItem>,
}

/// The service's end of the machine.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Bounded: a full queue is `LimitExceeded`.
    pub commands: mpsc::Sender<Command>,
    /// The newest view.
    pub view: watch::Receiver<View>,
}
