//! What every state has at hand: the world, the orders that come in, and the view that goes out.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{Bootstrap, Check, HealthItem, PlanStep, Progress, Reason, State};
use tokio::sync::{mpsc, oneshot, watch};

use super::intent::IntentFile;
use super::lockdown::{Lockdown, LockdownFiles};
use super::world::{Inspector, World};
use super::{Command, Ending, Failure, Request, View};
use crate::config::check;
use crate::config::profile::{Backend, Profile};

/// Most orders that are held.
const MAX_HELD: usize = 4;

/// Answer to an order.
pub(super) type Reply = oneshot::Sender<Result<(), Error>>;

/// What a state must react to. Questions are answered beside the states.
pub(super) enum Order {
    Connect(Box<Request>, Reply),
    Disconnect(Reply),
    Reconnect(Reply),
    /// On, with the profiles that could be connected then; or off.
    Lockdown(Option<Vec<Profile>>, Reply),
    /// The daemon is told to end.
    Shutdown,
}

/// Where orders come from.
pub(super) struct Orders<I> {
    commands: mpsc::Receiver<Command>,
    /// Orders that wait for a state in which they can be done.
    held: VecDeque<Order>,
    /// Those that no longer wait.
    ready: VecDeque<Order>,
    shutdown: watch::Receiver<bool>,
    pub(super) stopping: bool,
    inspector: I,
}

impl<I: Inspector> Orders<I> {
    /// The next order. May be dropped while it waits: nothing is lost.
    pub(super) async fn next(&mut self) -> Order {
        loop {
            if let Some(order) = self.ready.pop_front() {
                return order;
            }
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
                Some(Command::Lockdown(on, reply)) => return Order::Lockdown(on, reply),
                Some(Command::Plan(request, reply)) => self.plan(request, reply),
                Some(Command::Diagnose(request, reply)) => self.diagnose(request, reply),
                Some(Command::Flows(reply)) => {
                    let inspector = self.inspector.clone();
                    tokio::spawn(async move { reply.send(inspector.flows().await) });
                }
                Some(Command::Statistics(reply)) => {
                    let _ = reply.send(self.inspector.statistics());
                }
                Some(Command::NewIdentity(reply)) => {
                    let inspector = self.inspector.clone();
                    tokio::spawn(async move { reply.send(inspector.new_identity().await.map_err(without_tor)) });
                }
                Some(Command::Circuits(reply)) => {
                    let inspector = self.inspector.clone();
                    tokio::spawn(async move { reply.send(inspector.circuits().await.map_err(without_tor)) });
                }
            }
        }
    }

    /// Keeps what is asked about lockdown until the network is not being changed.
    pub(super) fn hold(&mut self, on: Option<Vec<Profile>>, reply: Reply) {
        if self.held.len() + self.ready.len() < MAX_HELD {
            self.held.push_back(Order::Lockdown(on, reply));
        } else {
            busy(reply, "the connection is being changed");
        }
    }

    /// What was held comes next, unless who asked has given up.
    pub(super) fn release(&mut self) {
        let waits = |order: &Order| !matches!(order, Order::Lockdown(_, reply) if reply.is_closed());
        self.ready.extend(self.held.drain(..).filter(waits));
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

/// What everybody may see.
pub(super) struct Shown(watch::Sender<View>);

impl Shown {
    /// What of the end begins.
    fn ending(&self, ending: Ending) {
        self.0.send_modify(|view| {
            view.phase = ending.as_str();
            ending.summary().clone_into(&mut view.progress.summary);
        });
    }

    /// How far Tor is; `percent` of the attempt.
    pub(super) fn bootstrap(&self, bootstrap: Bootstrap, percent: u32) {
        self.0.send_modify(|view| {
            view.progress = Progress { percent, summary: bootstrap.summary.clone() };
            view.bootstrap = bootstrap;
        });
    }
}

/// See the module.
pub(super) struct Context<W, I> {
    pub(super) world: W,
    pub(super) orders: Orders<I>,
    pub(super) intent: IntentFile,
    pub(super) view: Shown,
    /// What is not as it should be for as long as the daemon runs.
    standing: Vec<HealthItem>,
    /// What people should know about the settings of what is wanted.
    notes: Vec<HealthItem>,
    /// What could not be undone, or not be closed: it stays so, whatever is tried meanwhile, until the next time.
    pub(super) unsettled: Vec<HealthItem>,
    pub(super) lockdown: Lock,
}

/// Lockdown as it is.
pub(super) struct Lock {
    files: LockdownFiles,
    pub(super) on: bool,
    /// The lock is in force: what the daemon applies may be taken away.
    holds: bool,
    health: Vec<HealthItem>,
}

impl<W: World, I: Inspector> Context<W, I> {
    pub(super) fn new(
        world: W,
        inspector: I,
        commands: mpsc::Receiver<Command>,
        shutdown: watch::Receiver<bool>,
        (view, standing): (watch::Sender<View>, Vec<HealthItem>),
        (intent, files): (IntentFile, LockdownFiles),
    ) -> Self {
        let (held, ready) = (VecDeque::new(), VecDeque::new());
        let orders = Orders { commands, held, ready, shutdown, stopping: false, inspector };
        let lockdown = Lock { files, on: false, holds: false, health: Vec::new() };
        Self { world, orders, intent, view: Shown(view), standing, notes: Vec::new(), unsettled: Vec::new(), lockdown }
    }

    /// Whether nothing may leave without a connection.
    pub(super) const fn locked(&self) -> bool {
        self.lockdown.on
    }

    /// What was recorded before this daemon.
    pub(super) async fn recall_lockdown(&mut self) {
        let recorded = self.lockdown.files.read();
        let on = recorded != Lockdown::Off;
        let locked = self.world.lock(on).await;
        self.lockdown.on = on;
        self.lockdown.holds = on && locked.is_ok();
        self.lockdown.health = locked.unwrap_or_else(|failure| vec![not_locked(on, &failure)]);
        if let Lockdown::Unreadable(cause) = recorded {
            let text = format!(
                "The record of lockdown is not to be trusted ({cause}), so lockdown is on. \
                 `proxyctl lockdown on` or `proxyctl lockdown off` writes it anew"
            );
            self.lockdown.health.push(item("lockdown-unreadable", "error", text));
        }
        for item in &self.lockdown.health {
            tracing::warn!(code = item.code, "{}", item.text);
        }
        self.show_lockdown();
        self.health(Vec::new());
    }

    /// Turns lockdown on or off. What fails leaves it as it was.
    pub(super) async fn set_lockdown(&mut self, on: Option<Vec<Profile>>) -> Result<(), Error> {
        let lock = &mut self.lockdown;
        let before = lock.on;
        let on = match on {
            Some(profiles) if !before && !lock.files.has_connected(&profiles) => {
                return Err(Error::NeverConnected(
                    "no profile has connected yet, so lockdown could cut this machine off for good. \
                     Connect one first: proxyctl connect NAME"
                        .to_owned(),
                ));
            }
            Some(_) => lock.files.write().map(|()| true),
            None => lock.files.clear().map(|_| false),
        };
        let on =
            on.map_err(|error| Error::Internal(format!("lockdown stays as it is: it cannot be recorded: {error}")))?;
        match self.world.lock(on).await {
            Ok(health) => self.lockdown.health = health,
            Err(failure) => {
                self.restore_lockdown(before).await;
                let what = if before { "on" } else { "off" };
                return Err(Error::Internal(format!("lockdown stays {what}: {}", failure.text)));
            }
        }
        (self.lockdown.on, self.lockdown.holds) = (on, on);
        tracing::info!(on, "lockdown");
        self.show_lockdown();
        self.look().await;
        Ok(())
    }

    async fn restore_lockdown(&mut self, before: bool) {
        let files = &self.lockdown.files;
        let recorded = if before { files.write() } else { files.clear().map(drop) };
        if let Err(error) = recorded {
            tracing::error!("the record of lockdown cannot be put back: {error}");
        }
        if let Err(failure) = self.world.lock(before).await {
            tracing::error!("the lock cannot be put back: {}", failure.text);
        }
    }

    /// Remembers that the profile has connected, so that lockdown may be turned on. Ad-hoc settings are nobody's later.
    pub(super) fn remember(&self, profile: &Profile) {
        if check::profile_name(&profile.name).is_ok()
            && let Err(error) = self.lockdown.files.remember(profile)
        {
            tracing::warn!("cannot record that the profile has connected: {error}");
        }
    }

    /// Puts in force what holds while nothing is wanted: nothing of ours, or under lockdown the block. What is not as it
    /// should be is in the answer.
    pub(super) fn rest(&mut self) -> (impl Future<Output = Vec<HealthItem>>, &mut Orders<I>) {
        // A daemon that ends leaves the lock alone, if that holds.
        let closed = self.lockdown.on && !(self.orders.stopping && self.lockdown.holds);
        let Self { world, orders, view, .. } = self;
        let rest = async move {
            if closed {
                let blocked = world.block(None).await;
                return blocked.err().map(|failure| open(&failure)).into_iter().collect();
            }
            world.tear_down(&|ending| view.ending(ending)).await.into_iter().map(not_undone).collect()
        };
        (rest, orders)
    }

    fn show_lockdown(&mut self) {
        let (on, facts) = (self.lockdown.on, self.world.facts());
        self.view.0.send_modify(|view| {
            view.lockdown = on;
            view.blocking = facts.blocking;
        });
    }

    /// Shows a new state. `request` is what is wanted, if anything is.
    pub(super) fn enter(&mut self, state: State, reason: Reason, request: Option<&Request>) {
        self.orders.release();
        let (facts, bootstrap) = (self.world.facts(), self.world.bootstrap().borrow().clone());
        let told =
            |request: &Request| request.profile.notes().into_iter().map(|note| item("settings", "warning", note));
        self.notes = request.map(|request| told(request).collect()).unwrap_or_default();
        let notes = self.notes.clone();
        self.view.0.send_modify(|view| {
            // At once, so that who waits for the new state is warned.
            view.health.retain(|item| item.code != "settings");
            view.health.extend(notes);
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
            let torvm = request.and_then(|request| request.profile.torvm.as_ref());
            view.transport = torvm.map_or("", |torvm| torvm.tor.transport().as_str());
            view.upstream = request.map(|request| request.profile.upstream.to_string()).unwrap_or_default();
            view.progress = match state {
                State::Connected => Progress { percent: 100, summary: "Connected".to_owned() },
                _ => Progress::default(),
            };
            view.firewall = facts.firewall;
            view.device = facts.device;
            view.resolvers = facts.resolvers;
            view.blocking = facts.blocking;
            view.accelerator = facts.accelerator;
            view.bootstrap = bootstrap;
        });
    }

    /// Shows how far the present state is.
    pub(super) fn progress(&mut self, phase: &'static str, percent: u32, summary: &str) {
        let facts = self.world.facts();
        self.view.0.send_modify(|view| {
            view.phase = phase;
            view.progress = Progress { percent, summary: summary.to_owned() };
            view.firewall = facts.firewall;
            view.device = facts.device;
            view.resolvers = facts.resolvers;
            view.blocking = facts.blocking;
            view.accelerator = facts.accelerator;
        });
    }

    /// Shows a new reason for the present state.
    pub(super) fn because(&mut self, reason: Reason) {
        self.view.0.send_if_modified(|view| {
            let changed = view.reason != reason;
            view.reason = reason;
            changed
        });
    }

    /// Looks at what is in force, and shows what is found.
    pub(super) async fn look(&mut self) {
        let found = self.world.health().await;
        self.health(found);
        let (facts, bootstrap) = (self.world.facts(), self.world.bootstrap().borrow().clone());
        self.view.0.send_if_modified(|view| {
            let changed =
                view.resolvers != facts.resolvers || view.firewall != facts.firewall || view.bootstrap != bootstrap;
            view.bootstrap = bootstrap;
            view.resolvers = facts.resolvers;
            view.firewall = facts.firewall;
            changed
        });
    }

    /// Shows what is not as it should be.
    pub(super) fn health(&mut self, found: Vec<HealthItem>) {
        let known = self.standing.iter().chain(&self.lockdown.health);
        let health: Vec<_> = known.cloned().chain(found).chain(self.notes.iter().cloned()).collect();
        self.view.0.send_if_modified(|view| {
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

/// Tells how an order went.
pub(super) fn answer(reply: Reply, result: Result<(), Error>) {
    let _ = reply.send(result);
}

/// Refuses because of what is going on.
pub(super) fn busy(reply: Reply, what: &str) {
    refuse(reply, Error::Busy(what.to_owned()));
}

fn without_tor(failure: Failure) -> Error {
    Error::NotConnected(failure.text)
}

fn item(code: &str, severity: &str, text: String) -> HealthItem {
    HealthItem { code: code.to_owned(), severity: severity.to_owned(), text }
}

fn not_undone(what: String) -> HealthItem {
    item("not-undone", "error", format!("{what}. Run `sudo proxyctl rescue` to try again"))
}

fn open(failure: &Failure) -> HealthItem {
    let text = format!(
        "Lockdown is on, but the block could not be put in force: {}. The daemon tries again; until then traffic may leave",
        failure.text
    );
    item("lockdown-open", "error", text)
}

fn not_locked(on: bool, failure: &Failure) -> HealthItem {
    let text = if on {
        format!("Lockdown is on, but holds only while the daemon runs: {}", failure.text)
    } else {
        format!("Lockdown is off, but its lock is still there: {}. Run `sudo proxyctl rescue`", failure.text)
    };
    item("lockdown-lock", "error", text)
}

/// Microseconds since 1970-01-01 UTC.
pub(super) fn now() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX)
}
