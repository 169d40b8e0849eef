//! The proxy backend: TUN device and packet engine.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::HealthItem;
use proxyvpn_engine::Engine;
use proxyvpn_engine::config::{Config, Limits};
use proxyvpn_engine::event::Event;
use proxyvpn_engine::upstream::{ConnectError, Connector, Shortage, Upstream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use zbus::Connection;

use super::engine::EngineSlot;
use super::inspect::ProxyInspector;
use super::network::{self, texts};
use super::shortage::Shortages;
use super::{caches, upstream};
use crate::machine::world::{Facts, Fault, Inspector, World};
use crate::machine::{Failure, Phase, Request};
use crate::net::desired::{Desired, Tunnel};
use crate::net::{self, Finding, Keeping, Network, Owned, Severity, Stage};
use crate::resolvers::{self, Origin, Resolvers};

/// Events that may wait; the engine coalesces what does not fit.
const EVENTS: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Proxy {
    state_dir: PathBuf,
    queues: usize,
    limits: Limits,
    bus: Connection,
    keeping: Keeping,
    /// Opened at the first use, so that a daemon without privileges can still say what is missing.
    network: Option<Network>,
    engine: EngineSlot,
    events: Option<mpsc::Receiver<Event>>,
    /// What the present or last attempt wants.
    desired: Option<Desired>,
    resolvers: Option<Resolvers>,
    connector: Option<Arc<Connector>>,
    /// The engine suspects the upstream; a probe will decide.
    suspicious: bool,
    shortages: Shortages,
    /// Whether the firewall is in force, and whether it blocks.
    applied: bool,
}

impl Proxy {
    /// A backend at rest, whose device will have so many `queues`.
    #[must_use]
    pub fn new(state_dir: PathBuf, queues: usize, limits: Limits, bus: Connection, keeping: Keeping) -> Self {
        Self {
            state_dir,
            queues,
            limits,
            bus,
            keeping,
            network: None,
            engine: EngineSlot::default(),
            events: None,
            desired: None,
            resolvers: None,
            connector: None,
            suspicious: false,
            shortages: Shortages::default(),
            applied: false,
        }
    }

    async fn network(&mut self) -> Result<&mut Network, Failure> {
        let network = match self.network.take() {
            Some(network) => network,
            None => Network::open(&self.state_dir, std::mem::take(&mut self.keeping))
                .await
                .map_err(|error| network::failure(&error))?,
        };
        Ok(self.network.insert(network))
    }

    fn desired(&self) -> Result<Desired, Failure> {
        self.desired.clone().ok_or_else(|| internal("the phases are out of order"))
    }

    fn connector(&self) -> Result<Arc<Connector>, Failure> {
        self.connector.clone().ok_or_else(|| internal("the phases are out of order"))
    }

    async fn check_privileges(&mut self, request: &Request) -> Result<(), Failure> {
        let (desired, resolvers) = network::desired(&request.profile)?;
        self.network().await?.preflight(&desired).await.map_err(|error| network::failure(&error))?;
        self.desired = Some(desired);
        self.resolvers = Some(resolvers);
        Ok(())
    }

    async fn resolve_upstream(&mut self, request: &Request) -> Result<(), Failure> {
        let own = self.network().await?.own_addresses().await.map_err(|error| network::failure(&error))?;
        let resolvers = self.resolvers.as_ref().map(|found| found.for_lookup().to_vec()).unwrap_or_default();
        self.connector = Some(Arc::new(upstream::connector(request, &resolvers, &own).await?));
        Ok(())
    }

    async fn create_tun(&mut self) -> Result<(), Failure> {
        let tunnel = self.tunnel()?;
        let connector = self.connector()?;
        let mtu = tunnel.mtu;
        let queues = self.queues;
        let queues =
            self.network().await?.create_tunnel(&tunnel, queues).await.map_err(|error| network::failure(&error))?;
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

    /// The resolvers that the present profile would let through now; `None` when it names its own, or when no file can be opened.
    fn resolvers_now(&self) -> Option<Vec<IpAddr>> {
        if self.shortages.shows(Shortage::Descriptors) {
            return None;
        }
        let named = self.resolvers.as_ref()?.origin == Origin::Given;
        (!named).then(|| resolvers::find(&[], &resolvers::Paths::default()).addresses)
    }

    async fn ask_upstream(&self) -> Result<Result<(), ConnectError>, Failure> {
        let connector = Connector { timeout: upstream::PROBE_TIMEOUT, ..(*self.connector()?).clone() };
        Ok(connector.probe().await)
    }

    /// How many addresses the upstream has; each has a whole range of ports.
    fn addresses(&self) -> usize {
        match self.connector.as_ref().map(|connector| &connector.upstream) {
            Some(Upstream::HttpConnect(proxy)) => proxy.addresses.len(),
            Some(Upstream::Direct) | None => 1,
        }
    }

    async fn stop_engine(&mut self) {
        self.engine.stop().await;
        self.events = None;
    }
}

impl World for Proxy {
    async fn phase(&mut self, phase: Phase, request: &Request) -> Result<(), Failure> {
        match phase {
            Phase::CheckPrivileges => self.check_privileges(request).await,
            Phase::ResolveUpstream => self.resolve_upstream(request).await,
            Phase::ProbeUpstream => self.probe().await,
            Phase::SaveNetwork => self.network().await?.save().map_err(|error| network::failure(&error)),
            Phase::CreateTun => self.create_tun().await,
            Phase::ApplyFirewall => {
                self.apply(Stage::Firewall).await?;
                self.applied = true;
                Ok(())
            }
            Phase::ApplyRoutes => self.apply(Stage::Routes).await,
            // `bypass` leaves the resolvers as they are: rules and firewall let them through.
            Phase::ConfigureDns => Ok(()),
            Phase::FlushDns => {
                caches::flush(&self.bus).await;
                Ok(())
            }
        }
    }

    async fn block(&mut self, request: Option<&Request>) -> Result<(), Failure> {
        let desired = request.map_or_else(network::closed, |request| network::blocked(&request.profile));
        let network = self.network().await?;
        let firewall = network.apply(Stage::Firewall, &desired).await;
        let routes = network.apply(Stage::Routes, &desired).await;
        self.applied = firewall.is_ok();
        self.desired = Some(desired);
        self.stop_engine().await;
        firewall.and(routes).map_err(|error| network::failure(&error))
    }

    async fn probe(&mut self) -> Result<(), Failure> {
        self.ask_upstream().await?.map_err(|error| upstream::failure(&error))
    }

    async fn fault(&mut self) -> Fault {
        loop {
            // One dead destination looks like a dead upstream, so the upstream is asked itself. The suspicion is kept in
            // `self`, because this future may be dropped half-way.
            if self.suspicious {
                let answer = self.ask_upstream().await;
                self.suspicious = false;
                match answer {
                    // The question did not leave this machine, so it says nothing about the upstream.
                    Ok(Err(error)) if error.shortage().is_some() => {}
                    Ok(Err(error)) => return Fault::Upstream(upstream::failure(&error)),
                    Ok(Ok(())) => {}
                    Err(failure) => return Fault::Upstream(failure),
                }
            }
            let Some(events) = self.events.as_mut() else { return std::future::pending().await };
            let event = tokio::select! {
                event = events.recv() => event,
                () = self.shortages.over() => return Fault::Health,
            };
            let failure = match event {
                Some(Event::Shortage(shortage)) if self.shortages.note(shortage, Instant::now()) => {
                    return Fault::Health;
                }
                Some(Event::Shortage(_)) => continue,
                Some(Event::UpstreamFailing(error)) => {
                    tracing::debug!("the engine suspects the upstream: {error}");
                    self.suspicious = true;
                    continue;
                }
                Some(Event::UpstreamWorking) => return Fault::UpstreamWorking,
                Some(Event::DeviceLost(error)) => Failure::new(
                    ReasonCode::DeviceLost,
                    format!("The tunnel device is gone ({error}); it is made anew"),
                ),
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
        if let Some(warning) = self.resolvers.as_ref().and_then(|resolvers| resolvers.warning.as_ref()) {
            items.push(item("resolvers", "warning", warning.to_string()));
        }
        let Some(desired) = self.desired.clone() else { return items };
        if !desired.killswitch {
            items.push(item("killswitch-off", "warning", "What does not go through the tunnel is not blocked"));
        }
        if let (Some(resolvers), Some(now)) = (&self.resolvers, self.resolvers_now())
            && resolvers.addresses != now
        {
            let now = if now.is_empty() { "none".to_owned() } else { texts(&now).join(", ") };
            let text = format!(
                "The machine's DNS servers changed (now: {now}), and the new ones are not let through. \
                 Run `proxyctl reconnect`"
            );
            items.push(item("resolvers-changed", "warning", text));
        }
        items.extend(self.shortages.items(&self.engine.counters(), self.addresses(), Instant::now()));
        match self.network().await {
            Ok(network) => match checked(network, &desired).await {
                Ok(found) => {
                    items.extend(found.into_iter().map(|found| item(found.code, found.severity.as_str(), found.text)));
                    items.extend(fallback(network.firewall_name(), &network.firewall_weaknesses()));
                }
                Err(error) => items.push(item("network-unreadable", "error", network::failure(&error).text)),
            },
            Err(failure) => items.push(item("network-unreadable", "error", failure.text)),
        }
        items
    }

    async fn tear_down(&mut self) -> Vec<String> {
        self.stop_engine().await;
        self.desired = None;
        self.connector = None;
        self.resolvers = None;
        self.applied = false;
        match self.network().await {
            Ok(network) => network
                .clean_up(Owned::Unexpected)
                .await
                .errors
                .iter()
                .map(|error| crate::machine::failure::chain(error))
                .collect(),
            Err(failure) => vec![format!("Looking for what an earlier run may have left: {}", failure.text)],
        }
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
        }
    }

    fn inspector(&self) -> impl Inspector + use<> {
        ProxyInspector::new(self.state_dir.clone(), self.engine.clone())
    }
}

/// What is not as applied. What others removed is put back.
async fn checked(network: &mut Network, desired: &Desired) -> Result<Vec<Finding>, net::Error> {
    let found = network.health(desired).await?;
    if !found.iter().any(|found| ["firewall-missing", "steering-changed"].contains(&found.code)) {
        return Ok(found);
    }
    for found in &found {
        tracing::warn!(code = found.code, "{}", found.text);
    }
    for stage in [Stage::Firewall, Stage::Routes] {
        if let Err(error) = network.apply(stage, desired).await {
            tracing::error!(error = &error as &dyn std::error::Error, "what others removed cannot be put back");
        }
    }
    let mut found = network.health(desired).await?;
    found.push(Finding {
        code: "put-back",
        severity: Severity::Warning,
        text: "Another program had removed rules or routes of proxyvpn; they were put back.".to_owned(),
    });
    Ok(found)
}

/// What the way to the firewall does not promise; nothing for the best one.
fn fallback(name: &str, weaknesses: &[&str]) -> Option<HealthItem> {
    let (code, severity) = if name == "nftnl" { ("firewall-weak", "info") } else { ("firewall-fallback", "warning") };
    let text = || format!("The firewall is applied through {name}: {}", weaknesses.join("; "));
    (!name.is_empty() && !weaknesses.is_empty()).then(|| item(code, severity, text()))
}

pub(super) fn item(code: impl Into<String>, severity: &str, text: impl Into<String>) -> HealthItem {
    HealthItem { code: code.into(), severity: severity.to_owned(), text: text.into() }
}

fn internal(what: &str) -> Failure {
    Failure::new(ReasonCode::EngineFailed, format!("The daemon failed ({what}). Please report this"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_fallback_is_warned_of() {
        assert_eq!(fallback("nftnl", &[]), None);
        assert_eq!(fallback("", &["it can be flushed"]), None);
        let weak = fallback("nftnl", &["it can be flushed"]).map(|found| (found.code, found.severity));
        assert_eq!(weak, Some(("firewall-weak".to_owned(), "info".to_owned())));
        let found = fallback("iptables", &["it can be flushed", "not atomic"]).map(|found| found.text);
        assert_eq!(found.as_deref(), Some("The firewall is applied through iptables: it can be flushed; not atomic"));
    }
}
