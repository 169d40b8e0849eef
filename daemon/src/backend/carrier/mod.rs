//! The world of both backends: the host's network, the upstream and the packet engine.
//!
//! - `torvm`: what is different with a virtual machine
//! - `watching`: what others do to the network meanwhile, and what is done about it

mod torvm;
mod watching;

pub use torvm::{Left, Paths};

use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::{Bootstrap, HealthItem};
use proxyvpn_engine::Engine;
use proxyvpn_engine::config::{Config, Limits};
use proxyvpn_engine::event::Event;
use proxyvpn_engine::upstream::{Connector, Upstream};
use proxyvpn_torvm::config::GuestConfig;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use zbus::Connection;

use super::engine::EngineSlot;
use super::guest::{Guest, News, TorSlot};
use super::inspect::CarrierInspector;
use super::lock;
use super::lookout::{Disturbance, Lookout};
use super::network::{self, texts};
use super::question::Question;
use super::shortage::Shortages;
use super::{caches, upstream};
use crate::config::profile::{Backend, Scheme, TunSpec};
use crate::machine::world::{Facts, Fault, Inspector, World};
use crate::machine::{Ending, Failure, Phase, Request};
use crate::net::desired::{Desired, Locked, Tunnel};
use crate::net::{self, Keep, Keeping, Network, Owned, Stage};
use crate::resolvers::Resolvers;
use crate::tor::Password;
use crate::vm::Image;

/// Events that may wait; the engine coalesces what does not fit.
const EVENTS: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Carrier {
    paths: Paths,
    queues: usize,
    limits: Limits,
    bus: Connection,
    keeping: Keeping,
    /// Where the virtual machine outlives the process.
    store: Option<Arc<dyn Keep>>,
    /// What the daemon before left of its own.
    left: Option<Left>,
    /// Which backend the present or last attempt has.
    backend: Backend,
    /// Something was wanted before, so that a device in the store is not of the daemon before.
    begun: bool,
    /// Opened at the first use, so that a daemon without privileges can still say what is missing.
    network: Option<Network>,
    engine: EngineSlot,
    events: Option<mpsc::Receiver<Event>>,
    /// Checked, and not yet used.
    image: Option<Image>,
    /// For the next virtual machine.
    told: Option<(Password, GuestConfig)>,
    /// The queue that the virtual machine has too.
    tap: Vec<OwnedFd>,
    guest: Option<Guest>,
    /// A virtual machine that is being ended.
    ending: Option<JoinHandle<()>>,
    accelerator: (&'static str, String),
    /// Whether systemd-resolved asks Tor; `None` before it was told.
    dns_told: Option<bool>,
    tor: TorSlot,
    /// The device in the place of the tunnel while all is blocked.
    held: Vec<OwnedFd>,
    /// What the present or last attempt wants.
    desired: Option<Desired>,
    resolvers: Option<Resolvers>,
    connector: Option<Arc<Connector>>,
    /// What is applied, and put back when others change it.
    in_force: Option<Desired>,
    lookout: Lookout,
    question: Question,
    /// The upstream's answer to it was no; to be told.
    refused: Option<Failure>,
    /// What runs can't go on; to be told.
    broken: Option<Failure>,
    shortages: Shortages,
    /// Whether the firewall is in force, and whether it blocks.
    applied: bool,
    /// Under lockdown the kill switch is on, whatever the profile says.
    locked: bool,
    /// What the profile says.
    killswitch: bool,
    bootstrap: watch::Sender<Bootstrap>,
}

impl Carrier {
    /// A backend at rest, whose device will have so many `queues`.
    #[must_use]
    pub fn new(
        paths: Paths,
        queues: usize,
        limits: Limits,
        bus: Connection,
        keeping: Keeping,
        left: Option<Left>,
    ) -> Self {
        Self {
            paths,
            store: keeping.store.clone(),
            left,
            backend: Backend::Proxy,
            image: None,
            told: None,
            tap: Vec::new(),
            guest: None,
            ending: None,
            accelerator: Default::default(),
            dns_told: None,
            tor: TorSlot::default(),
            queues,
            limits,
            bus,
            keeping,
            begun: false,
            network: None,
            engine: EngineSlot::default(),
            events: None,
            held: Vec::new(),
            desired: None,
            resolvers: None,
            connector: None,
            in_force: None,
            lookout: Lookout::default(),
            question: Question::default(),
            refused: None,
            broken: None,
            shortages: Shortages::default(),
            applied: false,
            locked: false,
            killswitch: false,
            bootstrap: watch::Sender::default(),
        }
    }

    async fn network(&mut self) -> Result<&mut Network, Failure> {
        let network = match self.network.take() {
            Some(network) => network,
            None => Network::open(&self.paths.state, std::mem::take(&mut self.keeping))
                .await
                .map_err(|error| network::failure(&error))?,
        };
        Ok(self.network.insert(network))
    }

    /// What is wanted from now on.
    fn want(&mut self, desired: Desired) -> &Desired {
        self.killswitch = desired.killswitch;
        let killswitch = desired.killswitch || self.locked;
        let locked = match desired.locked {
            _ if !self.locked => Locked::No,
            Locked::Idle => Locked::Idle,
            Locked::No | Locked::Yes => Locked::Yes,
        };
        self.desired.insert(Desired { killswitch, locked, ..desired })
    }

    fn desired(&self) -> Result<Desired, Failure> {
        self.desired.clone().ok_or_else(|| internal("the phases are out of order"))
    }

    fn connector(&self) -> Result<Arc<Connector>, Failure> {
        self.connector.clone().ok_or_else(|| internal("the phases are out of order"))
    }

    async fn check_privileges(&mut self, request: &Request) -> Result<(), Failure> {
        let (desired, resolvers) = network::desired(&request.profile);
        self.backend = request.profile.backend;
        self.network().await?.preflight(&desired).await.map_err(|error| network::failure(&error))?;
        self.want(desired);
        self.resolvers = Some(resolvers);
        if self.backend == Backend::TorVm {
            self.check_image().await?;
            // Without an upstream there is no phase for it.
            if request.profile.upstream.scheme == Scheme::Direct {
                self.resolve_upstream(request).await?;
            }
        }
        Ok(())
    }

    async fn resolve_upstream(&mut self, request: &Request) -> Result<(), Failure> {
        let own = self.network().await?.own_addresses().await.map_err(|error| network::failure(&error))?;
        let resolvers = self.resolvers.as_ref().map(|found| found.for_lookup().to_vec()).unwrap_or_default();
        self.connector = None;
        self.another_upstream().await?;
        let mut work = pin!(upstream::connector(request, &resolvers, &own));
        let found = loop {
            tokio::select! {
                found = &mut work => break found,
                what = self.lookout.next() => self.attend(what).await,
            }
        };
        match found {
            Ok(connector) => self.connector = Some(Arc::new(connector)),
            Err(failure) => return Err(self.explain(failure).await),
        }
        self.another_upstream().await?;
        if self.backend == Backend::TorVm { self.tell(request).await } else { Ok(()) }
    }

    async fn create_tun(&mut self) -> Result<(), Failure> {
        let tunnel = self.tunnel()?;
        let connector = self.connector()?;
        let mtu = tunnel.mtu;
        let queues = self.queues;
        let queues =
            self.network().await?.create_tunnel(&tunnel, queues).await.map_err(|error| network::failure(&error))?;
        self.held.clear();
        let (sender, events) = mpsc::channel(EVENTS);
        let config = Config { mtu, limits: self.limits, connector, owners: Some(Arc::new(net::SocketOwners)) };
        let engine = Engine::start(queues, config, sender)
            .map_err(|error| Failure::from_error(ReasonCode::EngineFailed, &error))?;
        self.engine.put(engine).await;
        self.events = Some(events);
        self.shortages = Shortages::default();
        Ok(())
    }

    fn tunnel(&self) -> Result<Tunnel, Failure> {
        self.desired()?.tunnel.ok_or_else(|| internal("a connection without a device"))
    }

    async fn apply(&mut self, stage: Stage) -> Result<(), Failure> {
        let desired = self.desired()?;
        self.network().await?.apply(stage, &desired).await.map_err(|error| network::failure(&error))
    }

    /// Asks the upstream, beside everything else. `anew`: an answer to an older question does not count.
    fn ask(&mut self, anew: bool) -> Result<(), Failure> {
        let connector = Connector { timeout: upstream::PROBE_TIMEOUT, ..(*self.connector()?).clone() };
        self.question.ask(connector, anew);
        Ok(())
    }

    /// The device of the daemon before, if this one only now begins and can go on with it: then programs that connect wait in it.
    async fn resumed(&mut self, request: Option<&Request>) -> Option<Tunnel> {
        let begins = !std::mem::replace(&mut self.begun, true);
        let profile = &request.filter(|_| begins)?.profile;
        let (tunnel, queues) = match profile.backend {
            Backend::Proxy => (network::tunnel(profile), self.queues),
            Backend::TorVm => (self.left.is_some().then(|| network::tunnel(profile))?, 1),
        };
        // What can't be found out must not keep the block from being put in force.
        let there = self.network().await.ok()?.has_tunnel(&tunnel, queues).await.unwrap_or(false);
        there.then_some(tunnel)
    }

    /// How many addresses the upstream has; each has a whole range of ports.
    fn addresses(&self) -> usize {
        match self.connector.as_ref().map(|connector| &connector.upstream) {
            Some(Upstream::HttpConnect(proxy)) => proxy.addresses.len(),
            Some(Upstream::Direct) | None => 1,
        }
    }

    /// Applies anew what is in force, with or without a lock beside it.
    async fn tell_lock(&mut self, locked: bool) -> Result<(), Failure> {
        self.locked = locked;
        // What is idle is the same with a lock and without.
        if let Some(desired) = self.desired.take_if(|desired| desired.locked != Locked::Idle) {
            let killswitch = self.killswitch;
            self.want(Desired { killswitch, ..desired });
            if self.applied {
                self.apply(Stage::Firewall).await?;
                self.in_force = self.desired.clone();
            }
        }
        Ok(())
    }

    /// Puts a device into the place of the tunnel, so that connections from outside are answered while all is blocked.
    async fn hold(&mut self, request: Option<&Request>, desired: &Desired) -> Result<(), net::Error> {
        if !desired.killswitch || !desired.inbound_replies || desired.locked == Locked::Idle {
            return Ok(());
        }
        let tunnel = match request {
            Some(request) => network::tunnel(&request.profile),
            None => network::tun(&TunSpec::default()),
        };
        let Some(network) = self.network.as_mut() else { return Ok(()) };
        match network.hold(&tunnel).await {
            Ok(held) => self.held = held,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "connections from outside are not answered until there is a tunnel again");
                return Ok(());
            }
        }
        network.apply(Stage::Routes, desired).await
    }

    async fn stop_engine(&mut self) {
        self.engine.stop().await;
        self.events = None;
        self.question = Question::default();
        self.refused = None;
        self.broken = None;
    }
}

impl World for Carrier {
    async fn phase(&mut self, phase: Phase, request: &Request) -> Result<(), Failure> {
        match phase {
            Phase::CheckPrivileges => self.check_privileges(request).await,
            Phase::ResolveUpstream => self.resolve_upstream(request).await,
            Phase::ProbeUpstream => self.probe().await,
            Phase::SaveNetwork => self.network().await?.save().map_err(|error| network::failure(&error)),
            Phase::CreateTun => self.create_tun().await,
            Phase::ApplyFirewall => {
                self.watch().await;
                self.apply(Stage::Firewall).await?;
                self.applied = true;
                Ok(())
            }
            Phase::ApplyRoutes => {
                self.apply(Stage::Routes).await?;
                let desired = self.desired()?;
                self.network().await?.end_older(&desired).await;
                self.in_force = Some(desired);
                Ok(())
            }
            // `bypass` leaves the resolvers as they are: rules and firewall let them through.
            Phase::ConfigureDns => Ok(()),
            Phase::CreateTap => self.create_tap().await,
            Phase::LaunchVm => self.launch_vm(request).await,
            Phase::WaitTap => self.wait_tap().await,
            Phase::ConfigureTap => self.configure_tap().await,
            Phase::WaitBootstrap => self.wait_bootstrap().await,
            Phase::FlushDns => {
                caches::flush(&self.bus).await;
                Ok(())
            }
        }
    }

    async fn block(&mut self, request: Option<&Request>) -> Result<(), Failure> {
        let (desired, resolvers) = match request {
            Some(request) => network::blocked(&request.profile),
            None => (network::idle(), None),
        };
        self.watch().await;
        let tunnel = self.resumed(request).await;
        let desired = self.want(Desired { tunnel, ..desired }).clone();
        let network = self.network().await?;
        let firewall = network.apply(Stage::Firewall, &desired).await;
        let routes = network.apply(Stage::Routes, &desired).await;
        self.applied = firewall.is_ok();
        // Also what could not be applied: the next look tries again.
        self.in_force = Some(desired.clone());
        self.resolvers = resolvers;
        self.stop_engine().await;
        if desired.tunnel.is_none() {
            self.end_vm();
        }
        let (device, routes) = if desired.tunnel.is_some() {
            (Ok(()), routes)
        } else {
            let device = self.network().await?.drop_tunnel().await;
            (device, routes.and(self.hold(request, &desired).await))
        };
        // Also those that went through the engine. Without a firewall their resets could leave.
        if firewall.is_ok() && routes.is_ok() {
            let network = self.network().await?;
            network.end_older(&desired).await;
            if let Some(tunnel) = &desired.tunnel {
                network.end_tunnelled(tunnel).await;
            }
        }
        firewall.and(routes).and(device).map_err(|error| network::failure(&error))
    }

    async fn probe(&mut self) -> Result<(), Failure> {
        let targets = self.targets();
        let way = self.network().await?.way(&targets).await;
        if let Some(cut) = way.ok().and_then(|way| way.cut()) {
            return Err(network::cut(&cut));
        }
        self.ask(false)?;
        loop {
            tokio::select! {
                answer = self.question.answer() => {
                    return match answer {
                        Ok(()) => Ok(()),
                        Err(error) => Err(self.explain(upstream::failure(&error)).await),
                    };
                }
                what = self.lookout.next() => self.attend(what).await,
            }
            if std::mem::take(&mut self.lookout.moved) {
                self.ask(true)?;
            }
        }
    }

    async fn fault(&mut self) -> Fault {
        loop {
            // Kept in `self` until they are told, because this future may be dropped half-way.
            if let Some(broken) = self.broken.take() {
                return Fault::Broken(broken);
            }
            if let Some(failure) = self.refused.clone() {
                let failure = self.explain(failure).await;
                self.refused = None;
                return Fault::Upstream(failure);
            }
            if std::mem::take(&mut self.lookout.moved) {
                if self.events.is_some() {
                    let answer = match self.lookout.cut() {
                        Some(cut) => Err(network::cut(&cut)),
                        None => self.ask(true),
                    };
                    self.refused = answer.err();
                }
                return Fault::Uplink;
            }
            let (events, guest) = (&mut self.events, &mut self.guest);
            let event = async {
                match events {
                    Some(events) => events.recv().await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                biased;
                what = self.lookout.next() => match what {
                    Disturbance::Network => return Fault::Health,
                    Disturbance::Resolvers => {
                        self.lookout.resolvers_changed();
                        return Fault::Health;
                    }
                    Disturbance::Resumed => {
                        tracing::info!("the machine woke up");
                        if let Some(guest) = guest {
                            guest.set_clock();
                        }
                        self.lookout.moved = true;
                        continue;
                    }
                },
                answer = self.question.answer() => {
                    match answer {
                        Ok(()) => return Fault::UpstreamWorking,
                        // The question did not leave this machine, so it says nothing about the upstream.
                        Err(error) if error.shortage().is_some() => {}
                        Err(error) => self.refused = Some(upstream::failure(&error)),
                    }
                    continue;
                }
                news = news(guest) => match news {
                    News::Network => continue,
                    News::Progress => return Fault::Health,
                    News::Down(failure) => return Fault::Broken(failure),
                },
                event = event => event,
                () = self.shortages.over() => return Fault::Health,
            };
            let failure = match event {
                Some(Event::Shortage(shortage)) if self.shortages.note(shortage, Instant::now()) => {
                    return Fault::Health;
                }
                Some(Event::Shortage(_)) => continue,
                Some(Event::UpstreamFailing(error)) => {
                    // One dead destination looks like a dead upstream, so the upstream is asked itself.
                    tracing::debug!("the engine suspects the upstream: {error}");
                    if let Err(failure) = self.ask(false) {
                        self.refused = Some(failure);
                    }
                    continue;
                }
                Some(Event::UpstreamWorking) => return Fault::UpstreamWorking,
                Some(Event::DeviceLost(error)) => {
                    let text = format!("The tunnel device is gone ({error}); it is made anew");
                    let failure = Failure::new(ReasonCode::DeviceLost, text);
                    self.broken = Some(failure.clone());
                    let nearer = self.last_words().await;
                    self.broken = None;
                    nearer.unwrap_or(failure)
                }
                Some(Event::Failed(cause)) => Failure::new(
                    ReasonCode::EngineFailed,
                    format!("The packet engine stopped ({cause}); it is started anew"),
                ),
                None => {
                    self.events = None;
                    Failure::new(ReasonCode::EngineFailed, "The packet engine stopped; it is started anew")
                }
            };
            return Fault::Broken(failure);
        }
    }

    async fn health(&mut self) -> Vec<HealthItem> {
        let mut items = Vec::new();
        let warning = self.resolvers.as_ref().and_then(|found| match self.backend {
            Backend::Proxy => found.warning.as_ref().map(ToString::to_string),
            Backend::TorVm => torvm::names(found, self.dns_told),
        });
        items.extend(warning.map(|text| item("resolvers", "warning", text)));
        if self.lookout.resolvers_stale() {
            self.follow_resolvers().await;
        }
        if self.desired.as_ref().is_some_and(|desired| !desired.killswitch) {
            items.push(item("killswitch-off", "warning", "What does not go through the tunnel is not blocked"));
        }
        items.extend(self.shortages.items(&self.engine.counters(), self.addresses(), Instant::now()));
        items.extend(self.look().await);
        items.extend(self.lookout.items());
        items
    }

    async fn lock(&mut self, on: bool) -> Result<Vec<HealthItem>, Failure> {
        // First what is let through says so to the lock; last it stops.
        if on {
            self.tell_lock(true).await?;
            return lock::close(&self.bus).await;
        }
        lock::open(&self.bus).await?;
        self.tell_lock(false).await?;
        Ok(Vec::new())
    }

    async fn tear_down(&mut self, begins: &dyn Fn(Ending)) -> Vec<String> {
        self.stop_engine().await;
        if self.guest.is_some() {
            begins(Ending::Shutdown);
        }
        // While nothing can leave: what Tor has to write reaches its disk.
        self.end_vm();
        if let Some(ending) = self.ending.take() {
            let _ = ending.await;
        }
        begins(Ending::RestoreNetwork);
        self.held.clear();
        self.desired = None;
        self.connector = None;
        self.resolvers = None;
        self.in_force = None;
        self.lookout = Lookout::default();
        self.applied = false;
        let bus = self.bus.clone();
        match self.network().await {
            Ok(network) => {
                let done = network.clean_up(Owned::Unexpected).await;
                begins(Ending::CleanUp);
                if !done.removed.is_empty() {
                    caches::flush(&bus).await;
                }
                done.errors.iter().map(|error| crate::machine::failure::chain(error)).collect()
            }
            Err(failure) => vec![format!("Looking for what an earlier run may have left: {}", failure.text)],
        }
    }

    fn bootstrap(&self) -> watch::Receiver<Bootstrap> {
        self.bootstrap.subscribe()
    }

    fn facts(&self) -> Facts {
        let desired = self.desired.as_ref().filter(|_| self.applied);
        Facts {
            firewall: self.network.as_ref().filter(|_| self.applied).map_or("", Network::firewall_name),
            device: desired
                .and_then(|desired| desired.tunnel.as_ref())
                .map(|tunnel| tunnel.name.clone())
                .unwrap_or_default(),
            resolvers: desired.map(|desired| texts(&desired.exceptions.resolvers)).unwrap_or_default(),
            blocking: desired.is_some_and(|desired| desired.killswitch),
            accelerator: self.accelerator.clone(),
        }
    }

    fn inspector(&self) -> impl Inspector + use<> {
        CarrierInspector::new(self.paths.clone(), self.engine.clone(), self.tor.clone())
    }
}

async fn news(guest: &mut Option<Guest>) -> News {
    match guest {
        Some(guest) => guest.next().await,
        None => std::future::pending().await,
    }
}

pub(super) fn item(code: impl Into<String>, severity: &str, text: impl Into<String>) -> HealthItem {
    HealthItem { code: code.into(), severity: severity.to_owned(), text: text.into() }
}

fn internal(what: &str) -> Failure {
    Failure::new(ReasonCode::EngineFailed, format!("The daemon failed ({what}). Please report this"))
}
