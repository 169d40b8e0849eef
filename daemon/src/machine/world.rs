//! What the states do to the world. The states are tested on a double of it.

use std::collections::HashMap;

use proxyvpn_dbus::types::{Bootstrap, Check, Circuit, Flow, HealthItem, PlanStep};
use tokio::sync::watch;

use super::{Ending, Failure, Phase, Request};

/// The effects of a backend.
#[allow(async_fn_in_trait, reason = "the machine runs on the thread that drives it, so nothing here need be Send")]
pub trait World {
    /// Runs one phase. Dropped half-way only where [`Phase::interruptible`].
    async fn phase(&mut self, phase: Phase, request: &Request) -> Result<(), Failure>;
    /// Stops all traffic around *and* through the tunnel, except what `request` exempts, whatever is there now. Idempotent.
    async fn block(&mut self, request: Option<&Request>) -> Result<(), Failure>;
    /// Asks the upstream of the last attempt again. Keeps meanwhile what is in force, as [`phase`](Self::phase) does.
    async fn probe(&mut self) -> Result<(), Failure>;
    /// Waits for a fault of what runs, or a change of what is around it. Never returns when nothing is in force.
    async fn fault(&mut self) -> Fault;
    /// Looks whether all is still as applied, puts back what others changed, and tells what else the user should know.
    async fn health(&mut self) -> Vec<HealthItem>;
    /// Puts the lock in force, which lets nothing leave but what the daemon sends or lets through, whether the daemon runs or
    /// not; or takes it away. What is applied is changed with it. Idempotent. What falls short is in the answer.
    async fn lock(&mut self, on: bool) -> Result<Vec<HealthItem>, Failure>;
    /// Takes everything away but the lock; what could not be undone is in the answer, one line each.
    /// `begins` is told what begins.
    async fn tear_down(&mut self, begins: &dyn Fn(Ending)) -> Vec<String>;
    /// How far Tor is, as it changes; the default without one.
    fn bootstrap(&self) -> watch::Receiver<Bootstrap>;
    /// What the view shows of the running connection.
    fn facts(&self) -> Facts;
    /// Answers questions beside the states.
    fn inspector(&self) -> impl Inspector + use<Self>;
}

/// What a running connection shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Backend of the firewall or empty.
    pub firewall: &'static str,
    /// Tunnel device or empty.
    pub device: String,
    /// Resolvers reached around the tunnel.
    pub resolvers: Vec<String>,
    /// Whether traffic around the tunnel is blocked.
    pub blocking: bool,
    /// How the virtual machine runs, `kvm` or `tcg`, and why; empty without one.
    pub accelerator: (&'static str, String),
}

/// A change in what runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The upstream does not answer; what is applied stays.
    Upstream(Failure),
    /// The upstream answers again.
    UpstreamWorking,
    /// Somebody changed the network, or [`World::health`] has something else to tell: look at once.
    Health,
    /// The way to the upstream is another one, or the machine woke up: what failed may succeed now. What runs asks the upstream by
    /// itself, and tells the answer.
    Uplink,
    /// The device or the engine is gone: it must be built anew.
    Broken(Failure),
}

/// Answers questions without holding up the states; clones share what runs.
pub trait Inspector: Clone + Send + 'static {
    /// What a connection would change.
    fn plan(&self, request: &Request) -> impl Future<Output = Result<Vec<PlanStep>, Failure>> + Send;
    /// What a connection needs, checked.
    fn diagnose(&self, request: Option<&Request>) -> impl Future<Output = Vec<Check>> + Send;
    /// The connections in the tunnel.
    fn flows(&self) -> impl Future<Output = Vec<Flow>> + Send;
    /// Counters of the engine.
    fn statistics(&self) -> HashMap<String, u64>;
    /// Has connections from now on take other ways through the Tor network.
    fn new_identity(&self) -> impl Future<Output = Result<(), Failure>> + Send;
    /// The ways through the Tor network.
    fn circuits(&self) -> impl Future<Output = Result<Vec<Circuit>, Failure>> + Send;
}
