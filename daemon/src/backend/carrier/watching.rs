//! What others do to the network while a connection is wanted, and what is done about it.

use std::net::{IpAddr, SocketAddr};

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::types::HealthItem;
use proxyvpn_engine::upstream::{Shortage, Upstream};
use tokio::time::Instant;

use super::{Carrier, item};
use crate::backend::lookout::Disturbance;
use crate::backend::network::{self, texts};
use crate::config::profile::Backend;
use crate::machine::Failure;
use crate::net::desired::{Desired, Exceptions};
use crate::net::{self, Stage};
use crate::resolvers::{self, Origin, Resolvers};

impl Carrier {
    /// The resolvers that the present profile would let through now; `None` when it names its own, or when no file can be opened.
    pub(super) fn resolvers_now(&self) -> Option<Resolvers> {
        if self.shortages.shows(Shortage::Descriptors) {
            return None;
        }
        let named = self.resolvers.as_ref()?.origin == Origin::Given;
        (!named).then(|| resolvers::find(&[], &resolvers::Paths::default()))
    }

    /// Lets the DNS servers through that the machine uses now, and no others.
    pub(super) async fn follow_resolvers(&mut self) {
        let (Some(found), Some(in_force)) = (self.resolvers_now(), self.in_force.clone()) else { return };
        // With Tor they are only asked for the upstream's name, by marked sockets.
        if self.backend == Backend::TorVm || in_force.exceptions.resolvers == found.addresses {
            self.resolvers = Some(found);
            return;
        }
        let servers = if found.addresses.is_empty() { "none".to_owned() } else { texts(&found.addresses).join(", ") };
        tracing::info!("the DNS servers changed: {servers}");
        let changed = |desired: Desired| {
            let exceptions = Exceptions { resolvers: found.addresses.clone(), ..desired.exceptions };
            Desired { exceptions, ..desired }
        };
        let wanted = changed(in_force);
        // The firewall first: what is no exception any more is closed before its way is.
        for stage in [Stage::Firewall, Stage::Routes] {
            let applied = match self.network().await {
                Ok(network) => network.apply(stage, &wanted).await.map_err(|error| network::failure(&error)),
                Err(failure) => Err(failure),
            };
            if let Err(failure) = applied {
                tracing::error!("the DNS servers can't be followed: {}", failure.text);
                self.lookout.resolvers_changed();
                return;
            }
        }
        self.in_force = Some(wanted);
        self.desired = self.desired.take().map(changed);
        self.resolvers = Some(found);
        self.lookout.followed(servers);
        // A name that could not be looked up may be known to them.
        self.lookout.moved |= self.connector.is_none();
    }

    /// Begins to watch, before anything is changed.
    pub(super) async fn watch(&mut self) {
        let bus = self.bus.clone();
        let mut lookout = std::mem::take(&mut self.lookout);
        if let Ok(network) = self.network().await {
            lookout.start(network, &bus).await;
        }
        self.lookout = lookout;
    }

    /// Reacts to what happened around while something else is waited for.
    pub(super) async fn attend(&mut self, what: Disturbance) {
        match what {
            Disturbance::Network => drop(self.look().await),
            Disturbance::Resolvers => self.follow_resolvers().await,
            Disturbance::Resumed => {
                self.lookout.moved = true;
                if let Some(guest) = &mut self.guest {
                    guest.set_clock();
                }
            }
        }
    }

    /// Looks at the network, puts back what others changed, and gives what there is to tell.
    pub(super) async fn look(&mut self) -> Vec<HealthItem> {
        let Some(in_force) = self.in_force.clone() else { return vec![] };
        let (began, targets) = (Instant::now(), self.targets());
        let stale = self.lookout.surroundings_stale();
        let network = match self.network().await {
            Ok(network) => network,
            Err(failure) => return vec![item("network-unreadable", "error", failure.text)],
        };
        let look = match network.look(&in_force).await {
            Ok(look) => look,
            Err(error) => {
                self.lookout.looked(began, &[], true);
                return vec![item("network-unreadable", "error", network::failure(&error).text)];
            }
        };
        // The way is asked for last, because what was put back can be in it.
        let way = network.way(&targets).await;
        let since = Instant::now();
        let around = if stale { Some(network.surroundings(&in_force, &targets).await) } else { None };
        let weaknesses = fallback(network.firewall_name(), &network.firewall_weaknesses());
        if let Some(last) = look.put_back.last() {
            tracing::warn!(count = look.put_back.len(), "put back what another program had changed; the last: {last}");
        }
        for error in look.errors.iter().take(3) {
            tracing::error!(error = error as &dyn std::error::Error, "what another program changed can't be put back");
        }
        let fault = self.lookout.looked(began, &look.put_back, !look.errors.is_empty());
        // Without an engine the block is tried anew by itself.
        if let Some(error) = look.errors.first().filter(|_| self.events.is_some()) {
            let gone = |error: &net::Error| matches!(error, net::Error::TunnelMissing(_));
            if look.errors.iter().any(gone) {
                self.broken = Some(Failure::new(
                    ReasonCode::DeviceLost,
                    "The tunnel device is gone or has another name; it is made anew",
                ));
            } else if fault {
                self.broken = Some(network::failure(error));
            }
        }
        match way {
            Ok(way) => {
                // What began in another network waits for answers that can't come.
                if self.lookout.way(way)
                    && let Ok(network) = self.network().await
                {
                    network.end_stranded().await;
                }
            }
            Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "no way"),
        }
        match around {
            Some(Ok(found)) => self.lookout.surroundings(since, found),
            Some(Err(error)) => tracing::debug!(error = &error as &dyn std::error::Error, "no surroundings"),
            None => {}
        }
        let found = look.findings.into_iter().map(|found| item(found.code, found.severity.as_str(), found.text));
        found.chain(weaknesses).collect()
    }

    /// Addresses by which the upstream is reached; as long as they are not known, those of the resolvers.
    pub(super) fn targets(&self) -> Vec<IpAddr> {
        match self.connector.as_ref().map(|connector| &connector.upstream) {
            Some(Upstream::HttpConnect(proxy)) => proxy.addresses.iter().map(SocketAddr::ip).collect(),
            Some(Upstream::Direct) => vec![],
            None => self.resolvers.as_ref().map(|found| found.for_lookup().to_vec()).unwrap_or_default(),
        }
    }

    /// What is to be reached has other addresses from now on.
    pub(super) async fn another_upstream(&mut self) -> Result<(), Failure> {
        let targets = self.targets();
        let way = self.network().await?.way(&targets).await;
        self.lookout.another_upstream(way.ok());
        Ok(())
    }

    /// A failure to reach the upstream, with the nearest cause: where nothing can leave, the upstream is not to blame.
    pub(super) async fn explain(&mut self, failure: Failure) -> Failure {
        let about_upstream = [
            ReasonCode::UpstreamUnreachable,
            ReasonCode::UpstreamSilent,
            ReasonCode::UpstreamUnresolvable,
            ReasonCode::NetworkFailed,
        ];
        if !about_upstream.contains(&failure.code) {
            return failure;
        }
        let targets = self.targets();
        let way = match self.network().await {
            Ok(network) => network.way(&targets).await,
            Err(failure) => return failure,
        };
        way.ok().and_then(|way| way.cut()).map_or(failure, |cut| network::cut(&cut))
    }
}

/// What the way to the firewall does not promise; nothing for the best one.
fn fallback(name: &str, weaknesses: &[&str]) -> Option<HealthItem> {
    let (code, severity) = if name == "nftnl" { ("firewall-weak", "info") } else { ("firewall-fallback", "warning") };
    let text = || format!("The firewall is applied through {name}: {}", weaknesses.join("; "));
    (!name.is_empty() && !weaknesses.is_empty()).then(|| item(code, severity, text()))
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
