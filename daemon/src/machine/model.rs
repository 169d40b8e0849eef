//! The states on a model of the kernel, explored: whatever comes before or after each single step, in any order, once traffic is
//! stopped it stays so until somebody disconnects, and then nothing of ours is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::{Bootstrap, Check, Circuit, Flow, HealthItem, PlanStep, State};
use tokio::sync::{Notify, oneshot, watch};

use super::intent::IntentFile;
use super::lockdown::LockdownFiles;
use super::tests::profile;
use super::world::{Facts, Fault, Inspector, World};
use super::{Command, Ending, Failure, Handle, Machine, Phase, Request};
use crate::config::profile::{Backend, Profile};
use crate::net::Stage;
use crate::net::Step;
use crate::net::desired::Desired;
use crate::net::model::Model;
use crate::test_dir::TestDir;

/// What can happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Event {
    /// The step that is about to be done succeeds.
    Go,
    /// It fails.
    Fail,
    /// The daemon is killed before it, and started again.
    Crash,
    /// The daemon is told to end, and started again when it has ended.
    Stop,
    Connect,
    Disconnect,
    Reconnect,
    /// A minute passes.
    Minute,
    UpstreamGone,
    UpstreamBack,
    /// Another program removes the device, the rules, the routes.
    DeviceGone,
    RulesGone,
    RoutesGone,
}

impl Event {
    const ALL: [Self; 13] = [
        Self::Go,
        Self::Fail,
        Self::Crash,
        Self::Stop,
        Self::Connect,
        Self::Disconnect,
        Self::Reconnect,
        Self::Minute,
        Self::UpstreamGone,
        Self::UpstreamBack,
        Self::DeviceGone,
        Self::RulesGone,
        Self::RoutesGone,
    ];
}

/// A defect that the exploration must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Defect {
    None,
    /// The firewall is taken down before the rules and routes.
    FirewallFirst,
    /// The record of what is wanted does not survive a crash.
    RecordLost,
    /// A block without the firewall.
    BlockOnlyRoutes,
    /// A clean-up that leaves the routes.
    RoutesLeft,
}

/// What the double of the world shares with the exploration.
struct Shared {
    kernel: RefCell<Model>,
    /// The step that is about to be done.
    gate: RefCell<Option<String>>,
    answer: Cell<Option<bool>>,
    answered: Notify,
    faults: RefCell<VecDeque<Fault>>,
    fault: Notify,
    upstream: Cell<bool>,
    /// Holds the device.
    engine: Cell<bool>,
    backend: Backend,
    defect: Defect,
}

/// Clears the gate also when what waits at it is dropped.
struct Gate<'a>(&'a Shared);

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        *self.0.gate.borrow_mut() = None;
        self.0.answer.set(None);
    }
}

impl Shared {
    /// Waits until the exploration lets the step be done, or fail.
    async fn gate(&self, what: String) -> Result<(), Failure> {
        *self.gate.borrow_mut() = Some(what);
        let _gate = Gate(self);
        loop {
            match self.answer.take() {
                Some(true) => return Ok(()),
                Some(false) => return Err(failure()),
                None => self.answered.notified().await,
            }
        }
    }

    async fn step(&self, step: &Step) -> Result<(), Failure> {
        self.gate(step.line()).await?;
        self.kernel.borrow_mut().run(step);
        Ok(())
    }

    /// As `Network::apply`: until nothing is left to do, and back after a failure.
    async fn apply(&self, stage: Stage, desired: &Desired) -> Result<(), Failure> {
        let mut begun = vec![];
        for _ in 0..3 {
            let steps = self.kernel.borrow().plan(stage, desired);
            if steps.is_empty() {
                return Ok(());
            }
            for step in steps {
                begun.push(step.clone());
                if let Err(failure) = self.step(&step).await {
                    for step in begun.iter().rev().skip(1).filter_map(Step::inverse) {
                        let _ = self.step(&step).await;
                    }
                    return Err(failure);
                }
            }
        }
        if self.kernel.borrow().plan(stage, desired).is_empty() { Ok(()) } else { Err(failure()) }
    }

    fn stop_engine(&self) {
        if self.engine.replace(false) {
            self.kernel.borrow_mut().lose_device();
        }
    }
}

fn failure() -> Failure {
    Failure::new(ReasonCode::NetworkFailed, "no way")
}

/// As both backends, on the model.
struct Double {
    shared: Rc<Shared>,
    desired: Option<Desired>,
}

impl World for Double {
    async fn phase(&mut self, phase: Phase, _: &Request) -> Result<(), Failure> {
        let shared = &self.shared;
        match phase {
            Phase::CheckPrivileges => {
                self.desired = Some(Model::desired());
                shared.gate(phase.as_str().to_owned()).await
            }
            Phase::ProbeUpstream => {
                shared.gate(phase.as_str().to_owned()).await?;
                if shared.upstream.get() { Ok(()) } else { Err(failure()) }
            }
            Phase::CreateTun | Phase::CreateTap => {
                shared.engine.set(true);
                let made = shared.apply(Stage::Tunnel, &Model::desired()).await;
                if made.is_err() {
                    shared.stop_engine();
                }
                made
            }
            Phase::ApplyFirewall => shared.apply(Stage::Firewall, &Model::desired()).await,
            Phase::ApplyRoutes => shared.apply(Stage::Routes, &Model::desired()).await,
            Phase::ConfigureTap => {
                shared.apply(Stage::Firewall, &Model::desired()).await?;
                shared.apply(Stage::Routes, &Model::desired()).await
            }
            Phase::SaveNetwork | Phase::LaunchVm | Phase::WaitTap | Phase::WaitBootstrap => {
                shared.gate(phase.as_str().to_owned()).await
            }
            Phase::ResolveUpstream | Phase::ConfigureDns | Phase::FlushDns => Ok(()),
        }
    }

    async fn block(&mut self, _: Option<&Request>) -> Result<(), Failure> {
        let blocked = Desired { tunnel: None, ..Model::desired() };
        let firewall = match self.shared.defect {
            Defect::BlockOnlyRoutes => Ok(()),
            _ => self.shared.apply(Stage::Firewall, &blocked).await,
        };
        let routes = self.shared.apply(Stage::Routes, &blocked).await;
        self.desired = Some(blocked);
        self.shared.stop_engine();
        firewall.and(routes)
    }

    async fn probe(&mut self) -> Result<(), Failure> {
        if self.shared.upstream.get() { Ok(()) } else { Err(failure()) }
    }

    async fn fault(&mut self) -> Fault {
        loop {
            if let Some(fault) = self.shared.faults.borrow_mut().pop_front() {
                return fault;
            }
            self.shared.fault.notified().await;
        }
    }

    async fn health(&mut self) -> Vec<HealthItem> {
        if let Some(desired) = &self.desired {
            let _ = self.shared.apply(Stage::Firewall, desired).await;
            let _ = self.shared.apply(Stage::Routes, desired).await;
        }
        Vec::new()
    }

    async fn lock(&mut self, _: bool) -> Result<Vec<HealthItem>, Failure> {
        Ok(Vec::new())
    }

    async fn tear_down(&mut self, _: &dyn Fn(Ending)) -> Vec<String> {
        self.shared.stop_engine();
        self.desired = None;
        let mut steps = self.shared.kernel.borrow().plan_removal();
        match self.shared.defect {
            Defect::FirewallFirst if !steps.is_empty() => steps.rotate_right(1),
            Defect::RoutesLeft => steps.retain(|step| !step.line().starts_with("route")),
            _ => {}
        }
        let mut left = vec![];
        for step in steps {
            if self.shared.step(&step).await.is_err() {
                left.push(step.line());
            }
        }
        left
    }

    fn facts(&self) -> Facts {
        Facts::default()
    }

    fn bootstrap(&self) -> watch::Receiver<Bootstrap> {
        watch::channel(Bootstrap::default()).1
    }

    fn inspector(&self) -> impl Inspector + use<> {
        Nobody
    }
}

/// Nobody asks.
#[derive(Clone)]
struct Nobody;

impl Inspector for Nobody {
    async fn plan(&self, _: &Request) -> Result<Vec<PlanStep>, Failure> {
        Ok(Vec::new())
    }
    async fn diagnose(&self, _: Option<&Request>) -> Vec<Check> {
        Vec::new()
    }
    async fn flows(&self) -> Vec<Flow> {
        Vec::new()
    }
    fn statistics(&self) -> HashMap<String, u64> {
        HashMap::new()
    }

    async fn new_identity(&self) -> Result<(), Failure> {
        Ok(())
    }

    async fn circuits(&self) -> Result<Vec<Circuit>, Failure> {
        Ok(vec![])
    }
}

/// A daemon on the model, and what is known of what it owes.
struct Trial {
    shared: Rc<Shared>,
    directory: TestDir,
    handle: Handle,
    shutdown: watch::Sender<bool>,
    machine: tokio::task::JoinHandle<()>,
    /// Who waits for an answer.
    replies: Vec<oneshot::Receiver<Result<(), proxyvpn_dbus::Error>>>,
    /// Somebody asked for a connection that has not been given up.
    asked: bool,
    /// It was there, or a crash came between: no failure may give it up.
    promised: bool,
    /// All was stopped at some time, and something of it is left.
    covered: bool,
    /// A step failed since the last state of rest: one for each way between two of them.
    failed: bool,
    /// A step failed, and something is left that it concerns.
    excused: bool,
    /// The last order that the present state took.
    order: Option<Event>,
    /// It is to end, though the state does not show it yet.
    leaving: bool,
}

impl Trial {
    async fn new(backend: Backend, defect: Defect) -> Self {
        let shared = Rc::new(Shared {
            kernel: RefCell::new(Model::new()),
            gate: RefCell::default(),
            answer: Cell::default(),
            answered: Notify::new(),
            faults: RefCell::default(),
            fault: Notify::new(),
            upstream: Cell::new(true),
            engine: Cell::default(),
            backend,
            defect,
        });
        let directory = TestDir::in_memory("model");
        let (handle, shutdown, machine) = start(&shared, &directory);
        let (replies, order) = (vec![], None);
        let mut trial = Self {
            shared,
            directory,
            handle,
            shutdown,
            machine,
            replies,
            asked: false,
            promised: false,
            covered: false,
            failed: false,
            excused: false,
            order,
            leaving: false,
        };
        trial.settle().await;
        trial
    }

    /// Whether the record says that a connection is wanted.
    fn wanted(&self) -> bool {
        self.directory.path("intent.json").exists()
    }

    fn state(&self) -> State {
        self.handle.view.borrow().state
    }

    fn gate(&self) -> Option<String> {
        self.shared.gate.borrow().clone()
    }

    async fn settle(&mut self) {
        let before = self.state();
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
        self.replies.retain(|reply| !reply.is_terminated() && reply.is_empty());
        if self.state() != before {
            self.order = None;
        }
        if self.gate().is_none() {
            self.failed = false;
        }
        match self.state() {
            State::Connected if !self.leaving => (self.asked, self.promised) = (true, true),
            State::Disconnected | State::Disconnecting if !self.promised => (self.asked, self.leaving) = (false, false),
            _ => {}
        }
    }

    /// Lets an event happen; whether it could.
    async fn happen(&mut self, event: Event) -> bool {
        let shared = Rc::clone(&self.shared);
        match event {
            Event::Go | Event::Fail => {
                if self.gate().is_none() || event == Event::Fail && self.failed {
                    return false;
                }
                if event == Event::Fail {
                    (self.failed, self.excused) = (true, true);
                }
                shared.answer.set(Some(event == Event::Go));
                shared.answered.notify_one();
            }
            Event::Crash => {
                self.machine.abort();
                self.restart().await;
                self.promised |= self.asked;
            }
            Event::Stop => {
                if self.machine.is_finished() {
                    self.restart().await;
                    self.promised |= self.asked;
                } else if !*self.shutdown.borrow() {
                    // Without systemd the network is given back, and what is wanted is remembered.
                    (self.asked, self.promised, self.leaving) = (false, false, true);
                    self.shutdown.send(true).unwrap();
                } else {
                    return false;
                }
            }
            Event::Connect | Event::Disconnect | Event::Reconnect => return self.ask(event).await,
            Event::Minute => {
                if self.gate().is_some() {
                    return false;
                }
                tokio::time::advance(Duration::from_secs(61)).await;
            }
            Event::UpstreamGone | Event::UpstreamBack => {
                if shared.upstream.replace(event == Event::UpstreamBack) == (event == Event::UpstreamBack) {
                    return false;
                }
                if shared.engine.get() && self.gate().is_none() {
                    let gone = Fault::Upstream(failure());
                    self.fault(if event == Event::UpstreamGone { gone } else { Fault::UpstreamWorking });
                }
            }
            Event::DeviceGone => {
                // While steps are done the engine's news comes too late, or the steps fail.
                if !shared.engine.get() || self.gate().is_some() {
                    return false;
                }
                shared.kernel.borrow_mut().lose_device();
                self.fault(Fault::Broken(failure()));
            }
            Event::RulesGone | Event::RoutesGone => {
                if !self.others(if event == Event::RulesGone { Model::lose_rules } else { Model::lose_routes }) {
                    return false;
                }
            }
        }
        self.settle().await;
        true
    }

    fn fault(&self, fault: Fault) {
        self.shared.faults.borrow_mut().push_back(fault);
        self.shared.fault.notify_one();
    }

    fn others(&self, lose: fn(&mut Model)) -> bool {
        // Between two states of rest it comes to the same as a step that failed.
        if self.gate().is_some() {
            return false;
        }
        let mut kernel = self.shared.kernel.borrow_mut();
        let before = kernel.clone();
        lose(&mut kernel);
        let lost = *kernel != before;
        drop(kernel);
        if lost {
            self.fault(Fault::Health);
        }
        lost
    }

    async fn ask(&mut self, event: Event) -> bool {
        if self.order.is_some() || self.machine.is_finished() || *self.shutdown.borrow() {
            return false;
        }
        let (reply, answer) = oneshot::channel();
        let command = match event {
            Event::Connect => {
                let profile = Profile { backend: self.shared.backend, ..profile() };
                Command::Connect(Box::new(Request { profile, password: None }), reply)
            }
            Event::Disconnect => Command::Disconnect(reply),
            _ => Command::Reconnect(reply),
        };
        self.handle.commands.try_send(command).unwrap();
        self.replies.push(answer);
        let state = self.state();
        self.settle().await;
        // What is refused changes nothing; what waits counts as taken.
        let refused = self.replies.last_mut().is_none() && state == self.state() && self.gate().is_none();
        if self.state() == state {
            self.order = Some(event);
        }
        match event {
            Event::Connect if state == State::Disconnected => self.asked = true,
            Event::Disconnect if state != State::Disconnected => {
                (self.asked, self.promised, self.leaving) = (false, false, self.state() == state);
            }
            _ => {}
        }
        !refused
    }

    /// The next daemon. The device went with the last, and so did what it had heard.
    async fn restart(&mut self) {
        let _ = (&mut self.machine).await;
        let shared = &self.shared;
        shared.stop_engine();
        shared.faults.borrow_mut().clear();
        if shared.defect == Defect::RecordLost {
            IntentFile::new(&self.directory.path("")).clear().unwrap();
        }
        self.replies.clear();
        (self.failed, self.order, self.leaving) = (false, None, false);
        (self.handle, self.shutdown, self.machine) = start(shared, &self.directory);
    }

    /// What does not hold now.
    fn wrong(&mut self) -> Option<String> {
        let kernel = self.shared.kernel.borrow();
        let (open, clean) = (kernel.open(), kernel.is_clean());
        let (state, gate) = (self.state(), self.gate());
        let view = self.handle.view.borrow();
        let told = view.reason.text.contains("traffic may leave unprotected");
        if clean {
            self.excused = self.failed;
        }
        if open.is_none() {
            self.covered = true;
        } else if !self.promised && (clean || self.excused) {
            // A step of the undoing failed: that is told, and the network is given back all the same.
            self.covered = false;
        }
        if let Some(kind) = open {
            if self.covered {
                return Some(format!("{kind} leaves, and it was stopped before"));
            }
            // Nothing is done before the block; where even that failed, it is said.
            if self.promised && state == State::Connecting && !view.phase.is_empty() {
                return Some(format!("{kind} leaves in phase {}", view.phase));
            }
            if self.promised && [State::Connected, State::Blocked].contains(&state) && !told && gate.is_none() {
                return Some(format!("{kind} leaves while {state:?}"));
            }
        }
        if state == State::Disconnected && gate.is_none() && self.order.is_none() && !self.machine.is_finished() {
            let left = kernel.lines();
            let told = view.health.iter().any(|item| item.code == "not-undone");
            if !left.is_empty() && !told {
                return Some(format!("left behind: {left:?}"));
            }
            if self.wanted() {
                return Some("disconnected, and the record wants a connection".to_owned());
            }
            if self.promised {
                return Some("disconnected, and nobody asked for it".to_owned());
            }
        }
        None
    }

    /// All that makes a difference for what can come.
    fn key(&self) -> String {
        let view = self.handle.view.borrow();
        let shared = &self.shared;
        format!(
            "{:?} {} {:?} {:?} {} {} {} {} {} {} {} {} {} {:?} {:?}",
            view.state,
            view.phase,
            self.gate(),
            self.order,
            self.machine.is_finished(),
            shared.upstream.get(),
            shared.engine.get(),
            self.asked,
            self.promised,
            self.covered,
            self.failed,
            self.excused,
            self.leaving,
            self.wanted(),
            shared.kernel.borrow().lines(),
        )
    }
}

fn start(shared: &Rc<Shared>, directory: &TestDir) -> (Handle, watch::Sender<bool>, tokio::task::JoinHandle<()>) {
    let (machine, handle) = Machine::new(Vec::new(), IntentFile::new(&directory.path("")), None);
    let (shutdown, receiver) = watch::channel(false);
    let world = Double { shared: Rc::clone(shared), desired: None };
    let lockdown = LockdownFiles::new(&directory.path(""));
    let machine = tokio::task::spawn_local(machine.run(world, lockdown, receiver));
    (handle, shutdown, machine)
}

/// What an exploration found.
struct Found {
    states: usize,
    events: usize,
    /// Some of the states are connected: the model can do what the plan asks for.
    connected: bool,
    /// A way to what does not hold, and what that is.
    wrong: Option<(Vec<Event>, String)>,
}

/// How far one walk goes.
const WALK: usize = 24;

/// A state that was reached.
struct Reached {
    way: Vec<Event>,
    untried: VecDeque<Event>,
}

/// How many states are gone on from; the nearest come first. `PROXYVPN_MODEL_STATES=1000000` reaches all that there are.
fn bound() -> usize {
    std::env::var("PROXYVPN_MODEL_STATES").ok().and_then(|states| states.parse().ok()).unwrap_or(400)
}

/// Every event in every state, until nothing new comes.
async fn explore(backend: Backend, defect: Defect, bound: usize) -> Found {
    let reached = |way| Reached { way, untried: Event::ALL.into() };
    let mut states = vec![reached(Vec::new())];
    let mut numbers = HashMap::from([(Trial::new(backend, defect).await.key(), 0)]);
    let (mut events, mut first, mut connected) = (0, 0, false);
    while first < bound
        && let Some(state) = states.get(first)
    {
        if state.untried.is_empty() {
            first += 1;
            continue;
        }
        // There again, and on from it as long as something is untried.
        let (mut at, mut way) = (first, state.way.clone());
        let mut trial = Trial::new(backend, defect).await;
        for event in &way {
            trial.happen(*event).await;
            trial.wrong();
        }
        // The longer it goes on, the longer are the ways to what it finds.
        let end = way.len() + WALK;
        while way.len() < end
            && let Some(event) = states[at].untried.pop_front()
        {
            if !trial.happen(event).await {
                continue;
            }
            events += 1;
            connected |= trial.state() == State::Connected;
            way.push(event);
            if let Some(wrong) = trial.wrong() {
                return Found { states: states.len(), events, connected, wrong: Some((way, wrong)) };
            }
            at = *numbers.entry(trial.key()).or_insert(states.len());
            if at == states.len() {
                states.push(reached(way.clone()));
            }
        }
        trial.machine.abort();
    }
    Found { states: states.len(), events, connected, wrong: None }
}

fn run<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

#[test]
fn nothing_leaves_and_nothing_is_left_whatever_comes() {
    for backend in [Backend::Proxy, Backend::TorVm] {
        let found = run(explore(backend, Defect::None, bound()));
        println!("{backend:?}: {} states, {} events", found.states, found.events);
        assert_eq!(found.wrong, None, "{backend:?}");
        assert!(found.connected, "the model never gets connected by {backend:?}");
        assert!(found.states > 500, "only {} states by {backend:?}: the model does not go far enough", found.states);
    }
}

#[test]
fn the_exploration_finds_each_defect() {
    for defect in [Defect::FirewallFirst, Defect::RecordLost, Defect::BlockOnlyRoutes, Defect::RoutesLeft] {
        for backend in [Backend::Proxy, Backend::TorVm] {
            let found = run(explore(backend, defect, usize::MAX));
            let (way, wrong) = found.wrong.unwrap_or_else(|| panic!("{defect:?} of {backend:?} is not found"));
            println!("{defect:?} of {backend:?}: {wrong} after {way:?}");
        }
    }
}

/// Until nothing happens by itself any more.
async fn come_to_rest(trial: &mut Trial) {
    for _ in 0..500 {
        if !trial.happen(Event::Go).await {
            let state = trial.state();
            let waits = state == State::Connecting || state == State::Blocked && trial.shared.upstream.get();
            if !waits || !trial.happen(Event::Minute).await {
                return;
            }
        }
    }
    panic!("it never comes to rest: {:?}", trial.gate());
}

#[test]
fn the_model_does_what_the_real_daemon_does() {
    let traces = include_str!("../../../tests/e2e/traces.txt").lines().filter(|line| !line.starts_with('#'));
    for trace in traces {
        run(async {
            let mut trial = Trial::new(Backend::Proxy, Defect::None).await;
            come_to_rest(&mut trial).await;
            for step in trace.split_whitespace() {
                let (what, expected) = step.split_once('=').unwrap();
                let event = match what {
                    "connect" => Event::Connect,
                    "disconnect" => Event::Disconnect,
                    "reconnect" => Event::Reconnect,
                    "crash" => Event::Crash,
                    "stop" | "start" => Event::Stop,
                    "upstream-gone" => Event::UpstreamGone,
                    "upstream-back" => Event::UpstreamBack,
                    "device-gone" => Event::DeviceGone,
                    "rules-gone" => Event::RulesGone,
                    "routes-gone" => Event::RoutesGone,
                    other => panic!("unknown: {other}"),
                };
                assert!(trial.happen(event).await, "{step} of {trace}");
                come_to_rest(&mut trial).await;
                let state = if trial.machine.is_finished() { "ended" } else { trial.state().as_str() };
                let open = if trial.shared.kernel.borrow().open().is_some() { "open" } else { "closed" };
                assert_eq!(format!("{state},{open}"), expected, "{step} of {trace}");
                assert_eq!(trial.wrong(), None, "{step} of {trace}");
            }
        });
    }
}
