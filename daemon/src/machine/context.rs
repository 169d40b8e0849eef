//! What every state has at hand: the world, the orders that come in, and the view that goes out.

use std::time::{SystemTime, UNIX_EPOCH};

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{Check, HealthItem, PlanStep, Progress, Reason, State};
use tokio::sync::{mpsc, oneshot, watch};

use super::intent::IntentFile;
use super::world::{Inspector, World};
use super::{Command, Request, View};
use crate::config::profile::Backend;

/// Answer to an order.
pub(super) type Reply = oneshot::Sender<Result<(), Error>>;

/// What a state must react to. Questions are answered beside the states.
pub(super) enum Order {
    Connect(Box<Request>, Reply),
    Disconnect(Reply),
    Reconnect(Reply),
    /// The daemon is told to end.
    Shutdown,
}

/// Where orders come from.
pub(super) struct Orders<I> {
    commands: mpsc::Receiver<Command>,
    shutdown: watch::Receiver<bool>,
    pub(super) stopping: bool,
    inspector: I,
}

impl<I: Inspector> Orders<I> {
    /// The next order. May be dropped while it waits: nothing is lost.
    pub(super) async fn next(&mut self) -> Order {
        loop {
            let command = tokio::select! {
                command = self.commands.recv() => command,
                _ = self.shutdown.wait_for(|stop| *stop), if !self.stopping => None,
            };
            match command {
                None if self.stopping => std::future::pending().await,
                None => {
                    self.stopping = true;
                    return Order::Shutdown;
                }
                Some(Command::Connect(request, reply)) => return Order::Connect(request, reply),
                Some(Command::Disconnect(reply)) => return Order::Disconnect(reply),
                Some(Command::Reconnect(reply)) => return Order::Reconnect(reply),
                Some(Command::Plan(request, reply)) => self.plan(request, reply),
                Some(Command::Diagnose(request, reply)) => self.diagnose(request, reply),
                Some(Command::Flows(reply)) => {
                    let inspector = self.inspector.clone();
                    tokio::spawn(async move { reply.send(inspector.flows().await) });
                }
                Some(Command::Statistics(reply)) => {
                    let _ = reply.send(self.inspector.statistics());
                }
            }
        }
    }

    fn plan(&self, request: Box<Request>, reply: oneshot::Sender<Result<Vec<PlanStep>, Error>>) {
        let inspector = self.inspector.clone();
        tokio::spawn(async move {
            reply.send(inspector.plan(&request).await.map_err(|failure| Error::NotSupported(failure.text)))
        });
    }

    fn diagnose(&self, request: Option<Box<Request>>, reply: oneshot::Sender<Vec<Check>>) {
        let inspector = self.inspector.clone();
        tokio::spawn(async move { reply.send(inspector.diagnose(request.as_deref()).await) });
    }
}

/// See the module.
pub(super) struct Context<W, I> {
    pub(super) world: W,
    pub(super) orders: Orders<I>,
    pub(super) intent: IntentFile,
    view: watch::Sender<View>,
    /// What is not as it should be for as long as the daemon runs.
    standing: Vec<HealthItem>,
}

impl<W: World, I: Inspector> Context<W, I> {
    pub(super) fn new(
        world: W,
        inspector: I,
        commands: mpsc::Receiver<Command>,
        shutdown: watch::Receiver<bool>,
        (view, standing): (watch::Sender<View>, Vec<HealthItem>),
        intent: IntentFile,
    ) -> Self {
        Self { world, orders: Orders { commands, shutdown, stopping: false, inspector }, intent, view, standing }
    }

    /// Shows a new state. `request` is what is wanted, if anything is.
    pub(super) fn enter(&mut self, state: State, reason: Reason, request: Option<&Request>) {
        let facts = self.world.facts();
        self.view.send_modify(|view| {
            if view.state != state {
                view.since = now();
            }
            view.state = state;
            view.phase = "";
            view.reason = reason;
            view.backend = request.map_or("", |request| match request.profile.backend {
                Backend::Proxy => "proxy",
                Backend::TorVm => "torvm",
            });
            view.profile = request.map(|request| request.profile.name.clone()).unwrap_or_default();
            view.upstream = request.map(|request| request.profile.upstream.to_string()).unwrap_or_default();
            view.progress = match state {
                State::Connected => Progress { percent: 100, summary: "Connected".to_owned() },
                _ => Progress::default(),
            };
            view.firewall = facts.firewall;
            view.device = facts.device;
            view.resolvers = facts.resolvers;
            view.blocking = facts.blocking;
        });
    }

    /// Shows how far the present state is.
    pub(super) fn progress(&mut self, phase: &'static str, percent: u32, summary: &str) {
        let facts = self.world.facts();
        self.view.send_modify(|view| {
            view.phase = phase;
            view.progress = Progress { percent, summary: summary.to_owned() };
            view.firewall = facts.firewall;
            view.device = facts.device;
            view.resolvers = facts.resolvers;
            view.blocking = facts.blocking;
        });
    }

    /// Shows a new reason for the present state.
    pub(super) fn because(&mut self, reason: Reason) {
        self.view.send_if_modified(|view| {
            let changed = view.reason != reason;
            view.reason = reason;
            changed
        });
    }

    /// Looks at what is in force, and shows what is found.
    pub(super) async fn look(&mut self) {
        let found = self.world.health().await;
        self.health(found);
        let facts = self.world.facts();
        self.view.send_if_modified(|view| {
            let changed = view.resolvers != facts.resolvers || view.firewall != facts.firewall;
            view.resolvers = facts.resolvers;
            view.firewall = facts.firewall;
            changed
        });
    }

    /// Shows what is not as it should be.
    pub(super) fn health(&mut self, found: Vec<HealthItem>) {
        let health: Vec<_> = self.standing.iter().cloned().chain(found).collect();
        self.view.send_if_modified(|view| {
            let changed = view.health != health;
            view.health = health;
            changed
        });
    }
}

/// Accepts an order. The caller may be gone, which changes nothing.
pub(super) fn accept(reply: Reply) {
    let _ = reply.send(Ok(()));
}

/// Refuses an order.
pub(super) fn refuse(reply: Reply, error: Error) {
    let _ = reply.send(Err(error));
}

/// Refuses because of what is going on.
pub(super) fn busy(reply: Reply, what: &str) {
    refuse(reply, Error::Busy(what.to_owned()));
}

fn now() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX)
}
