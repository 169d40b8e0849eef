//! The states on a double of the world.
//!
//! - `blocked`: how a block begins and ends
//! - `lockdown`: what a lock changes
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed set-up is a failed test")]

mod blocked;
mod lockdown;

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxyvpn_dbus::types::{Bootstrap, Check, Circuit, Flow, HealthItem, PlanStep, State};
use proxyvpn_dbus::{Error, ReasonCode};
use tokio::sync::{Notify, oneshot, watch};

use super::intent::{Intent, IntentFile};
use super::lockdown::{Lockdown, LockdownFiles};
use super::world::{Facts, Fault, Inspector, World};
use super::{Command, Ending, Failure, Handle, Machine, Phase, Request, View};
use crate::config::profile::{Backend, DnsSpec, Profile, ProtectSpec, Scheme, TunSpec, UpstreamSpec};

/// A profile that passes all checks.
pub(super) fn profile() -> Profile {
    Profile {
        name: "office".to_owned(),
        backend: Backend::Proxy,
        autoconnect: false,
        upstream: UpstreamSpec {
            scheme: Scheme::Http,
            host: "proxy.example".to_owned(),
            port: 8080,
            addresses: Vec::new(),
            username: None,
            password: None,
        },
        tun: TunSpec {
            name: "pvpn0".to_owned(),
            cidr: "10.255.255.1/30".parse().unwrap(),
            cidr6: "fd70:7670:6e::1/64".parse().unwrap(),
            mtu: 65535,
        },
        dns: DnsSpec { servers: Vec::new() },
        protect: ProtectSpec::default(),
        bypass_users: Vec::new(),
        torvm: None,
    }
}

fn request() -> Request {
    Request { profile: profile(), password: None }
}

/// What the double does and has done.
#[derive(Default)]
struct Script {
    calls: Mutex<Vec<String>>,
    /// Phases that fail, once per entry.
    failing: Mutex<VecDeque<Phase>>,
    /// Phases that never end.
    hanging: Mutex<Option<Phase>>,
    faults: Mutex<VecDeque<Fault>>,
    fault: Notify,
    probe_fails: AtomicU32,
    /// The probe never ends.
    probe_hangs: AtomicBool,
    block_fails: AtomicU32,
    locked: AtomicBool,
    lock_fails: AtomicU32,
    /// What the lock falls short of.
    lock_health: Mutex<Vec<HealthItem>>,
    leftovers: Mutex<Vec<String>>,
    health: Mutex<Vec<HealthItem>>,
    bootstrap: watch::Sender<Bootstrap>,
}

impl Script {
    fn fault(&self, fault: Fault) {
        self.faults.lock().unwrap().push_back(fault);
        self.fault.notify_one();
    }

    fn calls(&self) -> String {
        std::mem::take(&mut *self.calls.lock().unwrap()).join(" ")
    }
}

#[derive(Clone)]
struct Double(Arc<Script>);

/// Lets the test see the present view before the next one.
async fn seen() {
    for _ in 0..4 {
        tokio::task::yield_now().await;
    }
}

fn failure() -> Failure {
    Failure::new(ReasonCode::UpstreamUnreachable, "no way")
}

fn take_one(counter: &AtomicU32) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

impl World for Double {
    async fn phase(&mut self, phase: Phase, _: &Request) -> Result<(), Failure> {
        self.0.calls.lock().unwrap().push(phase.as_str().to_owned());
        if *self.0.hanging.lock().unwrap() == Some(phase) {
            std::future::pending::<()>().await;
        }
        seen().await;
        let mut failing = self.0.failing.lock().unwrap();
        if failing.front() == Some(&phase) {
            failing.pop_front();
            return Err(failure());
        }
        Ok(())
    }

    async fn block(&mut self, request: Option<&Request>) -> Result<(), Failure> {
        let what = if request.is_some() { "block" } else { "close" };
        self.0.calls.lock().unwrap().push(what.to_owned());
        if take_one(&self.0.block_fails) { Err(failure()) } else { Ok(()) }
    }

    async fn probe(&mut self) -> Result<(), Failure> {
        self.0.calls.lock().unwrap().push("probe".to_owned());
        if self.0.probe_hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if take_one(&self.0.probe_fails) { Err(failure()) } else { Ok(()) }
    }

    async fn fault(&mut self) -> Fault {
        loop {
            if let Some(fault) = self.0.faults.lock().unwrap().pop_front() {
                return fault;
            }
            self.0.fault.notified().await;
        }
    }

    async fn health(&mut self) -> Vec<HealthItem> {
        seen().await;
        self.0.health.lock().unwrap().clone()
    }

    async fn lock(&mut self, on: bool) -> Result<Vec<HealthItem>, Failure> {
        if self.0.locked.swap(on, Ordering::SeqCst) != on {
            self.0.calls.lock().unwrap().push(if on { "lock" } else { "unlock" }.to_owned());
        }
        seen().await;
        if take_one(&self.0.lock_fails) { Err(failure()) } else { Ok(self.0.lock_health.lock().unwrap().clone()) }
    }

    async fn tear_down(&mut self, _: &dyn Fn(Ending)) -> Vec<String> {
        self.0.calls.lock().unwrap().push("tear-down".to_owned());
        seen().await;
        self.0.leftovers.lock().unwrap().clone()
    }

    fn facts(&self) -> Facts {
        Facts::default()
    }

    fn bootstrap(&self) -> watch::Receiver<Bootstrap> {
        self.0.bootstrap.subscribe()
    }

    fn inspector(&self) -> impl Inspector + use<> {
        self.clone()
    }
}

impl Inspector for Double {
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
        HashMap::from([("flows-opened".to_owned(), 7)])
    }

    async fn new_identity(&self) -> Result<(), Failure> {
        Ok(())
    }

    async fn circuits(&self) -> Result<Vec<Circuit>, Failure> {
        Ok(vec![])
    }
}

struct Rig {
    handle: Handle,
    script: Arc<Script>,
    shutdown: watch::Sender<bool>,
    directory: PathBuf,
    machine: tokio::task::JoinHandle<()>,
}

impl Rig {
    fn start(script: Script, wanted: Option<&str>, autoconnect: Option<Request>) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("proxyvpn-machine-{}-{number}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let intent = IntentFile::new(&directory);
        match wanted {
            Some("profile") => intent.write(&profile()).unwrap(),
            Some(text) => std::fs::write(directory.join("intent.json"), text).unwrap(),
            None => {}
        }
        Self::go(script, directory, autoconnect)
    }

    /// One at rest that was then told to connect.
    async fn connected(script: Script) -> Self {
        let mut rig = Self::start(script, None, None);
        rig.at_rest().await;
        rig.connect().await.unwrap();
        rig.until(State::Connected).await;
        rig
    }

    /// Another daemon where this one has ended.
    async fn restart(mut self, script: Script) -> Self {
        self.machine.abort();
        let _ = (&mut self.machine).await;
        Self::go(script, std::mem::take(&mut self.directory), None)
    }

    fn go(script: Script, directory: PathBuf, autoconnect: Option<Request>) -> Self {
        let intent = IntentFile::new(&directory);
        let script = Arc::new(script);
        let (machine, handle) = Machine::new(vec![standing()], intent, autoconnect);
        let (shutdown, receiver) = watch::channel(false);
        let world = Double(Arc::clone(&script));
        let machine = tokio::task::spawn_local(machine.run(world, LockdownFiles::new(&directory), receiver));
        Self { handle, script, shutdown, directory, machine }
    }

    fn intent(&self) -> Intent {
        IntentFile::new(&self.directory).read()
    }

    async fn until(&mut self, state: State) {
        self.handle.view.wait_for(|view| view.state == state && view.phase.is_empty()).await.unwrap();
    }

    async fn connect(&self) -> Result<(), Error> {
        self.connect_to(request()).await
    }

    async fn connect_to(&self, request: Request) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.handle.commands.send(Command::Connect(Box::new(request), reply)).await.unwrap();
        answer.await.unwrap()
    }

    async fn disconnect(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.handle.commands.send(Command::Disconnect(reply)).await.unwrap();
        answer.await.unwrap()
    }

    async fn lockdown(&self, on: bool) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let profiles = on.then(|| vec![profile()]);
        self.handle.commands.send(Command::Lockdown(profiles, reply)).await.unwrap();
        answer.await.unwrap()
    }

    async fn ask_lockdown(&self) -> oneshot::Receiver<Result<(), Error>> {
        let (reply, answer) = oneshot::channel();
        self.handle.commands.send(Command::Lockdown(None, reply)).await.unwrap();
        answer
    }

    fn recorded(&self) -> Lockdown {
        LockdownFiles::new(&self.directory).read()
    }

    /// A machine that has connected, under lockdown, and at rest again.
    async fn locked() -> Self {
        let mut rig = Self::start(Script::default(), None, None);
        rig.at_rest().await;
        rig.connect().await.unwrap();
        rig.until(State::Connected).await;
        rig.disconnect().await.unwrap();
        rig.until(State::Disconnected).await;
        rig.lockdown(true).await.unwrap();
        rig.script.calls();
        rig
    }

    async fn reconnect(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.handle.commands.send(Command::Reconnect(reply)).await.unwrap();
        answer.await.unwrap()
    }

    async fn at_rest(&mut self) {
        while self.script.calls.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        self.until(State::Disconnected).await;
        self.script.calls();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Runs `test` with time that passes by itself when all wait.
fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    // What waits for a state that never comes ends too.
    let bounded = async { tokio::time::timeout(Duration::from_secs(1 << 20), test).await.unwrap() };
    tokio::task::LocalSet::new().block_on(&runtime, bounded);
}

const ALL_PHASES: &str = "check-privileges resolve-upstream probe-upstream save-network create-tun apply-firewall \
                          apply-routes configure-dns flush-dns";

/// A request for the other backend.
fn through_tor(scheme: Scheme) -> Request {
    let upstream = UpstreamSpec { scheme, ..profile().upstream };
    Request { profile: Profile { backend: Backend::TorVm, upstream, ..profile() }, password: None }
}

#[test]
fn tor_has_phases_of_its_own() {
    run(async {
        let mut rig = Rig::start(Script::default(), None, None);
        rig.at_rest().await;
        let phases = "save-network create-tap launch-vm wait-tap configure-tap flush-dns wait-bootstrap";
        let upstream = "resolve-upstream probe-upstream";
        for (scheme, expected) in [
            (Scheme::Direct, format!("check-privileges {phases}")),
            (Scheme::Http, format!("check-privileges {upstream} {phases}")),
        ] {
            rig.connect_to(through_tor(scheme)).await.unwrap();
            rig.until(State::Connected).await;
            assert_eq!(rig.script.calls(), expected);
            assert_eq!(rig.handle.view.borrow().backend, "torvm");
            rig.disconnect().await.unwrap();
            rig.until(State::Disconnected).await;
            rig.script.calls();
        }
    });
}

#[test]
fn it_is_seen_how_far_tor_is_and_waiting_for_it_can_be_ended() {
    run(async {
        let script = Script::default();
        *script.hanging.lock().unwrap() = Some(Phase::WaitBootstrap);
        let mut rig = Rig::start(script, None, None);
        rig.at_rest().await;
        rig.connect_to(through_tor(Scheme::Direct)).await.unwrap();
        let mut view = rig.handle.view.clone();
        view.wait_for(|view| view.phase == "wait-bootstrap").await.unwrap();
        let mut last = view.borrow().progress.percent;
        for percent in [10, 55, 90] {
            let summary = format!("step {percent}");
            rig.script.bootstrap.send_replace(Bootstrap { percent, summary: summary.clone(), ..Bootstrap::default() });
            let seen = view.wait_for(|view| view.progress.summary == summary).await.unwrap().clone();
            assert!(seen.progress.percent > last && seen.progress.percent < 100, "{seen:?}");
            assert_eq!((seen.state, seen.bootstrap.percent), (State::Connecting, percent));
            last = seen.progress.percent;
        }
        rig.disconnect().await.unwrap();
        rig.until(State::Disconnected).await;
        assert!(rig.script.calls().ends_with("wait-bootstrap tear-down"));
    });
}

#[test]
fn connects_and_disconnects() {
    run(async {
        let mut rig = Rig::connected(Script::default()).await;
        assert_eq!(rig.script.calls(), ALL_PHASES);
        assert_eq!(rig.intent(), Intent::Profile(Box::new(profile())));
        assert_eq!(rig.handle.view.borrow().upstream, "http://proxy.example:8080");
        rig.disconnect().await.unwrap();
        rig.until(State::Disconnected).await;
        assert_eq!(rig.script.calls(), "tear-down");
        assert_eq!(rig.intent(), Intent::Nothing);
        assert_eq!(rig.handle.view.borrow().reason.code, "requested");
    });
}

#[test]
fn the_price_of_the_settings_is_told_with_the_state_and_goes_with_it() {
    run(async {
        let mut rig = Rig::start(Script::default(), None, None);
        rig.at_rest().await;
        let text = "backend = \"torvm\"\n[torvm]\nexit-country = \"de\"\n";
        let mut request = request();
        request.profile.torvm = crate::config::parse::profile("tor", "tor.toml", text).unwrap().torvm;
        let (reply, answer) = oneshot::channel();
        rig.handle.commands.send(Command::Connect(Box::new(request), reply)).await.unwrap();
        answer.await.unwrap().unwrap();
        rig.until(State::Connected).await;
        let health = rig.handle.view.borrow().health.clone();
        assert!(health.iter().any(|item| item.code == "settings" && item.text.contains("{de}")), "{health:?}");
        rig.disconnect().await.unwrap();
        rig.until(State::Disconnected).await;
        let health = rig.handle.view.borrow().health.clone();
        assert!(health.iter().all(|item| item.code != "settings"), "{health:?}");
    });
}

#[test]
fn a_wrong_upstream_costs_nothing() {
    for phase in [Phase::CheckPrivileges, Phase::ResolveUpstream, Phase::ProbeUpstream] {
        run(async move {
            let script = Script { failing: Mutex::new([phase].into()), ..Script::default() };
            let mut rig = Rig::start(script, None, None);
            rig.at_rest().await;
            rig.connect().await.unwrap();
            rig.handle.view.wait_for(|view| view.reason.code == "upstream-unreachable").await.unwrap();
            rig.until(State::Disconnected).await;
            assert!(!rig.script.calls().contains("tear-down"));
            assert_eq!(rig.intent(), Intent::Nothing);
        });
    }
}

#[test]
fn a_first_attempt_that_touched_the_network_gives_it_back() {
    for phase in &Phase::PROXY[3..] {
        run(async move {
            let script = Script { failing: Mutex::new([*phase].into()), ..Script::default() };
            let mut rig = Rig::start(script, None, None);
            rig.at_rest().await;
            rig.connect().await.unwrap();
            rig.handle.view.wait_for(|view| view.state == State::Disconnecting).await.unwrap();
            rig.until(State::Disconnected).await;
            assert!(rig.script.calls().ends_with("tear-down"));
            assert_eq!(rig.handle.view.borrow().reason.text, "no way");
        });
    }
}

#[test]
fn disconnect_does_not_wait_for_a_silent_upstream() {
    run(async {
        let script = Script { hanging: Mutex::new(Some(Phase::ProbeUpstream)), ..Script::default() };
        let mut rig = Rig::start(script, None, None);
        rig.at_rest().await;
        rig.connect().await.unwrap();
        rig.handle.view.wait_for(|view| view.phase == "probe-upstream").await.unwrap();
        assert!(matches!(rig.connect().await, Err(Error::Busy(_))));
        assert!(matches!(rig.reconnect().await, Err(Error::Busy(_))));
        rig.disconnect().await.unwrap();
        rig.until(State::Disconnected).await;
    });
}

#[test]
fn reconnect_blocks_first() {
    run(async {
        let mut rig = Rig::connected(Script::default()).await;
        rig.script.calls();
        rig.reconnect().await.unwrap();
        rig.handle.view.wait_for(|view| view.state == State::Connecting).await.unwrap();
        rig.until(State::Connected).await;
        assert_eq!(rig.script.calls(), format!("block {ALL_PHASES}"));
    });
}

#[test]
fn a_killed_daemon_goes_on_behind_the_block() {
    run(async {
        let mut rig = Rig::start(Script::default(), Some("profile"), None);
        rig.until(State::Connected).await;
        assert_eq!(rig.script.calls(), format!("block {ALL_PHASES}"));
    });
}

#[test]
fn an_unreadable_record_blocks_until_somebody_decides() {
    run(async {
        let mut rig = Rig::start(Script::default(), Some("{"), None);
        rig.until(State::Blocked).await;
        assert_eq!(rig.script.calls(), "close");
        assert_eq!(rig.handle.view.borrow().reason.code, "intent-unreadable");
        assert!(matches!(rig.reconnect().await, Err(Error::NotConnected(_))));
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(rig.script.calls().split(' ').all(|call| call == "close"), "looked after, never connected");
        rig.disconnect().await.unwrap();
        rig.until(State::Disconnected).await;
        assert_eq!(rig.intent(), Intent::Nothing);
    });
}

#[test]
fn who_asks_before_it_runs_is_told_that_something_is_wanted() {
    run(async {
        let state = |wanted, autoconnect| {
            let rig = Rig::start(Script::default(), wanted, autoconnect);
            let view = rig.handle.view.borrow().clone();
            assert!(view.since > 0);
            view.state
        };
        assert_eq!(state(None, None), State::Disconnected);
        assert_eq!(state(Some("profile"), None), State::Connecting);
        assert_eq!(state(Some("{"), None), State::Connecting);
        assert_eq!(state(None, Some(request())), State::Connecting);
    });
}

#[test]
fn autoconnect_never_opens() {
    run(async {
        let script = Script { failing: Mutex::new([Phase::ResolveUpstream].into()), ..Script::default() };
        let mut rig = Rig::start(script, None, Some(request()));
        rig.until(State::Blocked).await;
        rig.until(State::Connected).await;
        assert!(!rig.script.calls().contains("tear-down"));
    });
}

#[test]
fn shutdown_takes_everything_away_and_keeps_the_record() {
    run(async {
        let mut rig = Rig::connected(Script::default()).await;
        rig.script.calls();
        rig.shutdown.send(true).unwrap();
        (&mut rig.machine).await.unwrap();
        assert_eq!(rig.script.calls(), "tear-down");
        assert_eq!(rig.intent(), Intent::Profile(Box::new(profile())));
    });
}

#[test]
fn what_could_not_be_undone_is_shown() {
    run(async {
        let script = Script { leftovers: Mutex::new(vec!["route x".to_owned()]), ..Script::default() };
        let mut rig = Rig::start(script, None, None);
        rig.handle.view.wait_for(|view| view.health.len() == 2).await.unwrap();
        let health = rig.handle.view.borrow().health.clone();
        assert_eq!(health[1].code, "not-undone");
        assert!(health[1].text.contains("rescue"));
        // An attempt that changed nothing does not change that.
        *rig.script.failing.lock().unwrap() = [Phase::ResolveUpstream].into();
        rig.connect().await.unwrap();
        rig.handle.view.wait_for(|view| view.reason.code == "upstream-unreachable").await.unwrap();
        rig.until(State::Disconnected).await;
        seen().await;
        assert_eq!(rig.handle.view.borrow().health, health);
    });
}

/// What every view of these tests must show.
fn standing() -> HealthItem {
    HealthItem { code: "standing".to_owned(), severity: "error".to_owned(), text: String::new() }
}

#[test]
fn what_stands_is_shown_in_every_state() {
    run(async {
        let mut rig = Rig::start(Script::default(), None, None);
        assert_eq!(rig.handle.view.borrow().health, [standing()]);
        rig.at_rest().await;
        assert_eq!(rig.handle.view.borrow().health, [standing()]);
        rig.connect().await.unwrap();
        rig.until(State::Connected).await;
        seen().await;
        assert_eq!(rig.handle.view.borrow().health, [standing()]);
    });
}

#[test]
fn news_of_the_health_is_shown_at_once() {
    run(async {
        let mut rig = Rig::connected(Script::default()).await;
        seen().await;
        for state in [State::Connected, State::Blocked] {
            if state == State::Blocked {
                rig.script.probe_fails.store(u32::MAX, Ordering::SeqCst);
                rig.script.fault(Fault::Upstream(failure()));
                rig.until(state).await;
            }
            let item = HealthItem { code: state.as_str().to_owned(), severity: "info".to_owned(), text: String::new() };
            *rig.script.health.lock().unwrap() = vec![item];
            rig.script.fault(Fault::Health);
            let shown = |view: &View| view.health.iter().any(|item| item.code == state.as_str());
            tokio::time::timeout(Duration::from_millis(900), rig.handle.view.wait_for(shown)).await.unwrap().unwrap();
        }
    });
}

#[test]
fn questions_are_answered_in_every_state() {
    run(async {
        let script = Script { hanging: Mutex::new(Some(Phase::ProbeUpstream)), ..Script::default() };
        let rig = Rig::start(script, Some("profile"), None);
        let (reply, answer) = oneshot::channel();
        rig.handle.commands.send(Command::Statistics(reply)).await.unwrap();
        assert_eq!(answer.await.unwrap()["flows-opened"], 7);
        let (reply, answer) = oneshot::channel();
        rig.handle.commands.send(Command::Plan(Box::new(request()), reply)).await.unwrap();
        assert!(answer.await.unwrap().unwrap().is_empty());
    });
}

#[test]
fn a_connect_during_the_clean_up_waits_for_its_end() {
    run(async {
        // The first thing that a daemon does when it starts is to clean up, and a call may have started it.
        let mut rig = Rig::start(Script::default(), None, None);
        rig.handle.view.wait_for(|view| view.state == State::Disconnecting).await.unwrap();
        let (first, second) = tokio::join!(rig.connect(), rig.connect());
        first.unwrap();
        assert!(matches!(second, Err(Error::Busy(_))));
        rig.until(State::Connected).await;
        assert_eq!(rig.script.calls(), format!("tear-down {ALL_PHASES}"));
    });
}

#[test]
fn who_gave_up_waiting_is_not_connected() {
    run(async {
        let mut rig = Rig::start(Script::default(), None, None);
        rig.handle.view.wait_for(|view| view.state == State::Disconnecting).await.unwrap();
        let (reply, answer) = oneshot::channel();
        drop(answer);
        rig.handle.commands.send(Command::Connect(Box::new(request()), reply)).await.unwrap();
        rig.until(State::Disconnected).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(rig.handle.view.borrow().state, State::Disconnected);
    });
}
