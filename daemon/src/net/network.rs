//! Applying a desired state, and taking it back.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Instant;

use ipnet::IpNet;

use super::desired::{Desired, Tunnel};
use super::devices::Devices;
use super::firewall::{self, Backend, MAX_SESSIONS, Ruleset};
use super::health::{self, Finding};
use super::journal::Journal;
use super::keep::Queues;
use super::kernel::{self, Kernel};
use super::observed::{Kind, Link, Observed};
use super::step::{Action, Change, Stage, Step};
use super::{Error, Keeping, cut, plan, preflight, sockets};

/// No local network has a shorter prefix than the largest private one (RFC 1918).
const SHORTEST_ON_LINK: u8 = 8;

/// How often a plan is made and done before somebody else is at work.
pub(super) const ROUNDS: u32 = 3;

/// To read which devices lead to a gateway takes one part in so many of the time.
const OUTWARD_SHARE: u32 = 20;

/// The host's network: the connection to the kernel, the firewall and the journal.
#[derive(Debug)]
pub struct Network {
    pub(super) kernel: Kernel,
    pub(super) journal: Journal,
    pub(super) backend: Option<Backend>,
    /// For the backend when it is chosen.
    keeping: Keeping,
    queues: Queues,
    /// What this process installed.
    pub(super) installed: Option<Ruleset>,
    /// For what.
    filtered: Option<Desired>,
    /// The devices at the last look.
    pub(super) at_look: Option<Devices>,
    /// Indices of devices that led to a gateway.
    outward: HashSet<u32>,
    /// When that is worth to be read anew, though nothing asks for it.
    outward_stale: Instant,
    /// Connections from outside that were open before the first rules; later ones have a mark.
    sessions: Option<Vec<(SocketAddr, SocketAddr)>>,
    /// Addresses of the tunnels that this process made since the last clean-up.
    tunnelled: HashSet<IpAddr>,
    /// For the watch: index of the device with a gateway, or 0.
    pub(super) neighbours_on: Arc<AtomicU32>,
}

/// A firewall that belongs to another process's socket, which a clean-up can't remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owned {
    /// It will go by itself.
    Expected,
    /// An error.
    Unexpected,
}

/// What a clean-up did.
#[derive(Debug, Default)]
pub struct CleanUp {
    /// What was removed, one line each.
    pub removed: Vec<String>,
    /// What could not be removed.
    pub errors: Vec<Error>,
}

impl Network {
    /// Connects to the kernel and chooses the way to the firewall. Changes nothing. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Connect`]. A missing firewall is not an error here but in [`preflight`](Self::preflight).
    pub async fn open(state_dir: &Path, mut keeping: Keeping) -> Result<Self, Error> {
        let (kernel, journal) = (Kernel::connect()?, Journal::open(state_dir));
        let queues = Queues::new(keeping.store.clone(), std::mem::take(&mut keeping.tunnel));
        let (installed, at_look, sessions) = (None, None, None);
        let (outward, tunnelled) = (HashSet::new(), HashSet::new());
        let mut network = Self {
            kernel,
            journal,
            backend: None,
            keeping,
            queues,
            installed,
            filtered: None,
            at_look,
            outward,
            outward_stale: Instant::now(),
            sessions,
            tunnelled,
            neighbours_on: Arc::default(),
        };
        if let Err(error) = network.backend().await {
            tracing::warn!(error = &error as &dyn std::error::Error, "no firewall");
        }
        Ok(network)
    }

    /// The way to the firewall, chosen at the first time that one can be had.
    async fn backend(&mut self) -> Result<Backend, firewall::Error> {
        if let Some(backend) = &self.backend {
            return Ok(backend.clone());
        }
        let chosen = blocking(Backend::choose).await?;
        let keeping = std::mem::take(&mut self.keeping);
        let backend = blocking(|| Ok(chosen.owned(keeping))).await?;
        Ok(self.backend.insert(backend).clone())
    }

    /// Whether an earlier run ended with changes in place, or may have.
    #[must_use]
    pub const fn interrupted(&self) -> bool {
        self.journal.interrupted()
    }

    /// Name of the way to the firewall: `nftnl`, `nft`, `iptables`, or empty when there is none.
    #[must_use]
    pub fn firewall_name(&self) -> &'static str {
        self.backend.as_ref().map_or("", Backend::name)
    }

    /// What the way to the firewall can't promise, one sentence each.
    #[must_use]
    pub fn firewall_weaknesses(&self) -> Vec<&'static str> {
        self.backend.as_ref().map_or(vec![], Backend::weaknesses)
    }

    /// Checks everything that can be checked without changing anything.
    ///
    /// # Errors
    /// [`Error::Privilege`], [`Error::TunUnavailable`], [`Error::NameTaken`], [`Error::TableTaken`], [`Error::Firewall`].
    pub async fn preflight(&self, desired: &Desired) -> Result<(), Error> {
        preflight::privilege()?;
        preflight::tun()?;
        preflight::free(&self.kernel.observe().await?, desired)?;
        match &self.backend {
            Some(backend) => backend.permitted(desired)?,
            None => blocking(Backend::choose).await?.permitted(desired)?,
        }
        Ok(())
    }

    /// Makes sure that changes can be journaled, before the first one.
    ///
    /// # Errors
    /// [`Error::Journal`]: the disk is full, or the directory is missing or closed to us.
    pub fn save(&mut self) -> Result<(), Error> {
        let before = self.journal.begin(["a change of the network begins".to_owned()])?;
        self.journal.roll_back(before)
    }

    /// What [`create_tunnel`](Self::create_tunnel) and [`apply`](Self::apply) would change now.
    ///
    /// # Errors
    /// When the present state can't be read.
    pub async fn plan(&self, desired: &Desired) -> Result<Vec<Step>, Error> {
        let observed = self.kernel.observe().await?;
        let steps = plan::plan(&observed, desired);
        let (tunnel, routes): (Vec<_>, Vec<_>) = steps.into_iter().partition(|step| step.stage() == Stage::Tunnel);
        let outward = self.kernel.outward().await?.union(&self.outward).copied().collect();
        let name = desired.tunnel.as_ref().map(|tunnel| tunnel.name.as_str());
        let ruleset = self.ruleset(&observed, desired, &Devices::of(&observed, name, &outward)).await;
        let mut firewall = vec![];
        if !self.is_installed(&ruleset).await? {
            let line = |line| Step { action: Action::Add, change: Change::Firewall(line) };
            let lines = self.backend.as_ref().map_or_else(|| ruleset.lines(), |backend| backend.fit(&ruleset).lines());
            firewall.extend(lines.into_iter().map(line));
        }
        Ok(tunnel.into_iter().chain(firewall).chain(routes).collect())
    }

    /// Whether an earlier process left this device with so many queues, so that [`create_tunnel`](Self::create_tunnel) goes on
    /// with it.
    ///
    /// # Errors
    /// When the present state can't be read.
    pub async fn has_tunnel(&self, tunnel: &Tunnel, queues: usize) -> Result<bool, Error> {
        let ours = |link: &&Link| plan::is_device(link, tunnel);
        Ok(self.queues.fit(tunnel, queues) && self.kernel.links().await?.iter().any(|link| ours(&link)))
    }

    /// Ends the connections that went through the device that an earlier process left: nobody knows them any more.
    pub async fn end_tunnelled(&self, tunnel: &Tunnel) {
        let addresses: Vec<IpAddr> = tunnel.addresses().collect();
        end("of the daemon before", move || cut::of_begun(&addresses)).await;
    }

    /// Removes the tunnel device, whoever holds it.
    ///
    /// # Errors
    /// When it is still there.
    pub async fn drop_tunnel(&mut self) -> Result<(), Error> {
        self.queues.forget();
        for link in self.kernel.links().await?.iter().filter(|link| link.ours) {
            let step = Step { action: Action::Remove, change: Change::device(link) };
            match self.kernel.run(&step).await {
                Err(error) if !kernel::already(&step, &error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes the tunnel device with its addresses and brings it up, or goes on with that of an earlier process. It goes when the
    /// descriptors are closed, here and where they are kept. They are non-blocking and carry virtio headers
    /// (`struct virtio_net_hdr`), with checksum and TCP segmentation offloads. More than one queue: `IFF_MULTI_QUEUE`.
    ///
    /// With a gateway the firewall keeps what is behind the device from this machine before the call returns: what is in force, or
    /// one that lets everything else through.
    ///
    /// # Errors
    /// [`Error::NameTaken`], [`Error::Create`], or the step that failed; nothing is left then.
    pub async fn create_tunnel(&mut self, tunnel: &Tunnel, queues: usize) -> Result<Vec<OwnedFd>, Error> {
        let kept = if self.has_tunnel(tunnel, queues).await? { self.queues.take(tunnel, queues) } else { None };
        if kept.is_none() {
            self.queues.forget();
            self.make_way(&tunnel.name).await?;
        }
        let before = self.journal.begin([made(tunnel).line()])?;
        let desired = Desired {
            tunnel: Some(tunnel.clone()),
            guarded: tunnel.addresses().collect(),
            killswitch: false,
            ..Desired::closed()
        };
        let is_new = kept.is_none();
        let fds = match kept {
            Some(fds) => Ok(fds),
            None => self.kernel.create(tunnel, queues).await,
        };
        let made = match fds {
            // When this fails the descriptors are closed, and the device goes with them.
            Ok(fds) => match self.apply_steps(Stage::Tunnel, &desired).await {
                Ok(()) => self.close_in(desired).await.map(|()| fds),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        match &made {
            Ok(fds) if is_new => self.queues.leave(fds),
            Ok(_) => {}
            Err(_) => self.queues.forget(),
        }
        match &made {
            Ok(_) => self.tunnelled.extend(tunnel.addresses()),
            Err(_) => self.journal.roll_back(before)?,
        }
        made
    }

    /// Keeps what is behind a device that was made for this from this machine.
    async fn close_in(&mut self, open: Desired) -> Result<(), Error> {
        if open.tunnel.iter().all(|tunnel| tunnel.gateway.is_none()) {
            return Ok(());
        }
        let desired = match self.filtered.clone() {
            Some(desired) => desired,
            // What an earlier process left may block more, and knows the device.
            None if self.firewall_intact().await? => return Ok(()),
            None => open,
        };
        self.apply_firewall(&desired).await
    }

    /// Makes the device that takes what is blocked while there is no tunnel, so that the firewall can tell answers to outside
    /// from the rest; see [`apply`](Self::apply). It has no address, and goes when the descriptor is closed.
    ///
    /// # Errors
    /// As [`create_tunnel`](Self::create_tunnel).
    pub async fn hold(&mut self, tunnel: &Tunnel) -> Result<Vec<OwnedFd>, Error> {
        self.make_way(&tunnel.name).await?;
        let before = self.journal.begin([made(tunnel).line()])?;
        let settings = Step { action: Action::Set, change: Change::Settings(tunnel.clone()) };
        let held = match self.kernel.create(tunnel, 1).await {
            Ok(fds) => self.kernel.run(&settings).await.map(|()| fds),
            Err(error) => Err(error),
        };
        if held.is_err() {
            self.journal.roll_back(before)?;
        }
        held
    }

    /// Brings one stage from what is to what is wanted, and reads it back. On failure everything that this call did is
    /// taken back, newest first.
    ///
    /// # Errors
    /// The step that failed, or [`Error::Differs`].
    pub async fn apply(&mut self, stage: Stage, desired: &Desired) -> Result<(), Error> {
        match stage {
            Stage::Firewall => self.apply_firewall(desired).await,
            Stage::Tunnel | Stage::Routes => self.apply_steps(stage, desired).await,
        }
    }

    /// Removes a device of ours that has the name.
    async fn make_way(&self, name: &str) -> Result<(), Error> {
        let links = self.kernel.links().await?;
        let Some(link) = links.iter().find(|link| link.name == name) else { return Ok(()) };
        if !link.ours {
            return Err(Error::NameTaken(name.to_owned()));
        }
        let failed = |source| Error::Create { name: name.to_owned(), source };
        self.kernel.delete(link).await.map_err(failed)
    }

    async fn apply_steps(&mut self, stage: Stage, desired: &Desired) -> Result<(), Error> {
        let before = self.journal.begin([])?;
        let mut begun = vec![];
        let Err(error) = self.converge(stage, desired, &mut begun).await else { return Ok(()) };
        if self.undo(&begun).await {
            self.journal.roll_back(before)?;
        }
        Err(error)
    }

    /// Plans and does until nothing is left to do, which reads back what was done. Devices can come meanwhile, so that a
    /// plan does not suffice at once. `begun` gets each step before it is done.
    async fn converge(&mut self, stage: Stage, desired: &Desired, begun: &mut Vec<Step>) -> Result<(), Error> {
        for round in 0.. {
            let observed = self.kernel.observe().await?;
            preflight::table_free(&observed)?;
            let steps = plan::plan(&observed, desired).into_iter().filter(|step| step.stage() == stage);
            let steps: Vec<Step> = steps.collect();
            match steps.first() {
                None => break,
                Some(step) if round == ROUNDS => return Err(Error::Differs(step.line())),
                Some(_) => {}
            }
            self.journal.begin(steps.iter().filter_map(Step::inverse).map(|step| step.line()))?;
            for step in steps {
                begun.push(step.clone());
                match self.kernel.run(&step).await {
                    Err(error) if !kernel::already(&step, &error) => return Err(error),
                    _ => tracing::debug!(step = step.line(), "done"),
                }
            }
        }
        Ok(())
    }

    /// Takes steps back, newest first, and goes on after a failure. Gives whether all is back.
    async fn undo(&self, steps: &[Step]) -> bool {
        let mut complete = true;
        for step in steps.iter().rev().filter_map(Step::inverse) {
            // A device is not made again: nobody would hold it.
            if step.action == Action::Add && matches!(step.change, Change::Device { .. }) {
                continue;
            }
            if let Err(error) = self.kernel.run(&step).await
                && !kernel::already(&step, &error)
            {
                tracing::error!(step = step.line(), error = &error as &dyn std::error::Error, "undo failed");
                complete = false;
            }
        }
        complete
    }

    /// The devices of this machine.
    pub(super) async fn devices(&mut self, observed: &Observed, desired: &Desired) -> Result<Devices, Error> {
        // Who leads to a gateway only matters where there is a bridge. It is learnt before one comes, but a router's million
        // routes are not read all the time for that.
        let began = Instant::now();
        let bridge = observed.links.iter().any(|link| link.kind == Kind::Bridge);
        if bridge || began >= self.outward_stale {
            self.outward.extend(self.kernel.outward().await?);
            self.outward_stale = Instant::now() + began.elapsed() * OUTWARD_SHARE;
        }
        Ok(Devices::of(observed, desired.tunnel.as_ref().map(|tunnel| tunnel.name.as_str()), &self.outward))
    }

    /// The rules for these devices.
    async fn ruleset(&self, observed: &Observed, desired: &Desired, devices: &Devices) -> Ruleset {
        match &self.sessions {
            Some(sessions) => firewall::compile(desired, sessions, devices),
            None => firewall::compile(desired, &sessions(observed, desired).await, devices),
        }
    }

    async fn apply_firewall(&mut self, desired: &Desired) -> Result<(), Error> {
        let mut failed: Option<(Ruleset, Error)> = None;
        for round in 0..=ROUNDS {
            let observed = self.kernel.observe().await?;
            if self.sessions.is_none() && desired.inbound_replies {
                self.sessions = Some(sessions(&observed, desired).await);
            }
            let mut devices = self.devices(&observed, desired).await?;
            if round == ROUNDS {
                // Devices come and go all the time, and the kernel takes no chain for one that is gone.
                devices.uplinks.clear();
            }
            let ruleset = self.ruleset(&observed, desired, &devices).await;
            match failed {
                Some((tried, error)) if tried == ruleset => return Err(error),
                _ => {}
            }
            if self.is_installed(&ruleset).await? {
                self.filtered = Some(desired.clone());
                return Ok(());
            }
            match self.install(&ruleset).await {
                Ok(()) => {
                    self.filtered = Some(desired.clone());
                    return Ok(());
                }
                Err(error) => failed = Some((ruleset, error)),
            }
        }
        failed.map_or(Ok(()), |(_, error)| Err(error))
    }

    async fn install(&mut self, ruleset: &Ruleset) -> Result<(), Error> {
        let backend = self.backend().await?;
        let there = on(&backend, Backend::present).await?;
        let before = self.journal.begin(["nft remove table inet proxyvpn".to_owned()])?;
        let wanted = ruleset.clone();
        let Err(error) = on(&backend, move |backend| backend.apply(&wanted)).await else {
            self.installed = Some(ruleset.clone());
            return Ok(());
        };
        // One that an earlier run left is better than none.
        let undone = match (self.installed.clone(), there) {
            (Some(previous), true) => {
                let put_back = move |backend: &Backend| match backend.holds(&previous) {
                    Ok(true) => Ok(()),
                    _ => backend.apply(&previous),
                };
                on(&backend, put_back).await
            }
            (_, true) => Ok(()),
            (_, false) => on(&backend, Backend::remove).await,
        };
        match undone {
            Ok(()) => self.journal.roll_back(before)?,
            Err(error) => tracing::error!(error = &error as &dyn std::error::Error, "undo of the firewall failed"),
        }
        Err(error.into())
    }

    /// Ends the connections from before that `desired` does not let go on, so that their programs are told at once instead of
    /// when they send next. To be called when both stages are in force: what the kernel sends for it must not leave. A
    /// failure is logged; nothing leaves because of it.
    pub async fn end_older(&self, desired: &Desired) {
        let observed = match self.kernel.observe().await {
            Ok(observed) => observed,
            Err(error) => return not_ended(&error),
        };
        let own = observed.addresses().map(|address| address.to_canonical()).collect();
        let outside = observed.outside_addresses().map(|address| address.to_canonical()).collect();
        let desired = desired.clone();
        end("from before", move || cut::older(&desired, &own, &outside)).await;
    }

    /// Ends connections with our mark from addresses that this machine has no more, as after a move into another network. A
    /// failure is logged.
    pub async fn end_stranded(&self) {
        match self.kernel.observe().await {
            Ok(observed) => {
                let own = observed.addresses().map(|address| address.to_canonical()).collect();
                end("from an address that is gone", move || cut::stranded(&own)).await;
            }
            Err(error) => not_ended(&error),
        }
    }

    /// Whether the kernel ends connections for us.
    ///
    /// # Errors
    /// When it does not say so.
    pub fn ends_connections(&self) -> io::Result<bool> {
        cut::possible()
    }

    /// Removes everything that is ours, found by ownership and without any memory of what was done. Goes on after errors.
    /// What is already gone is success. The firewall comes last, so that nothing leaves before the rest is back.
    pub async fn clean_up(&mut self, owned: Owned) -> CleanUp {
        let mut result = CleanUp::default();
        let mut tunnelled = std::mem::take(&mut self.tunnelled);
        let observed = self.kernel.observe().await;
        if let Ok(observed) = &observed {
            tunnelled.extend(observed.tunnel_addresses());
        }
        let (v4, v6): (Vec<_>, Vec<_>) = tunnelled.into_iter().partition(IpAddr::is_ipv4);
        // While our routes are in force: afterwards the resets of these would leave by an uplink.
        end_of(v6.clone(), cut::of).await;
        match observed {
            Ok(observed) => {
                for step in plan::plan_removal(&observed) {
                    match self.kernel.run(&step).await {
                        Ok(()) => result.removed.push(step.line()),
                        Err(error) if kernel::already(&step, &error) => {}
                        Err(error) => result.errors.push(error),
                    }
                }
            }
            Err(error) => result.errors.push(error),
        }
        self.queues.forget();
        if result.errors.is_empty() {
            match self.kernel.observe().await {
                Ok(observed) => result
                    .errors
                    .extend(plan::plan_removal(&observed).into_iter().map(|step| Error::StillThere(step.line()))),
                Err(error) => result.errors.push(error),
            }
        }
        // Programs that were told have connected again at once. What they sent would leave when it is sent again.
        end_of(v6, cut::of_beginning).await;
        self.remove_firewall(owned, &mut result).await;
        // Now that their programs can connect again. The kernel sends nothing from an IPv4 address that is gone.
        end_of(v4, cut::of).await;
        if result.errors.is_empty()
            && let Err(error) = self.journal.clear()
        {
            result.errors.push(error);
        }
        result
    }

    async fn remove_firewall(&mut self, owned: Owned, result: &mut CleanUp) {
        let backend = match self.backend().await {
            Ok(backend) => backend,
            Err(error) => return result.errors.push(error.into()),
        };
        let there = on(&backend, Backend::present).await.unwrap_or(true);
        match on(&backend, Backend::remove).await {
            Ok(()) => {
                if there {
                    result.removed.push("nft remove table inet proxyvpn".to_owned());
                }
                self.installed = None;
                self.filtered = None;
                self.sessions = None;
            }
            Err(firewall::Error::Owned) if owned == Owned::Expected => {}
            Err(error) => result.errors.push(error.into()),
        }
    }

    /// Every address of this machine.
    ///
    /// # Errors
    /// When they can't be read.
    pub async fn own_addresses(&self) -> Result<Vec<IpAddr>, Error> {
        Ok(self.kernel.observe().await?.addresses().collect())
    }

    /// The networks that this machine is on, but for prefixes so short that they stand for the whole Internet.
    ///
    /// # Errors
    /// When they can't be read.
    pub async fn on_link(&self) -> Result<Vec<IpNet>, Error> {
        let observed = self.kernel.observe().await?;
        let networks = observed.addresses.iter().map(|address| address.address.trunc());
        Ok(networks.filter(|net| net.prefix_len() >= SHORTEST_ON_LINK).collect())
    }

    /// Whether what was applied is still there, and what else an administrator should know.
    ///
    /// # Errors
    /// When the present state can't be read.
    pub async fn health(&self, desired: &Desired) -> Result<Vec<Finding>, Error> {
        let mut findings = health::findings(&self.kernel.observe().await?, desired);
        let intact = self.firewall_intact().await?;
        if !intact {
            findings.insert(0, health::firewall_missing(desired));
        }
        Ok(findings)
    }

    async fn is_installed(&self, ruleset: &Ruleset) -> Result<bool, Error> {
        match &self.backend {
            Some(backend) if self.installed.as_ref() == Some(ruleset) => {
                let ruleset = ruleset.clone();
                Ok(on(backend, move |backend| backend.holds(&ruleset)).await?)
            }
            _ => Ok(false),
        }
    }
}

/// Runs what waits for the kernel or a program on a thread for such: a program may take seconds, and the bus and the watchdog
/// are served meanwhile.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, firewall::Error> + Send + 'static,
) -> Result<T, firewall::Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(firewall::Error::Socket(io::Error::other(error))))
}

/// [`blocking`] with the way to the firewall.
pub(super) async fn on<T: Send + 'static>(
    backend: &Backend,
    work: impl FnOnce(&Backend) -> Result<T, firewall::Error> + Send + 'static,
) -> Result<T, firewall::Error> {
    let backend = backend.clone();
    blocking(move || work(&backend)).await
}

/// Ends the connections of the tunnel's addresses: no engine knows them any more.
async fn end_of(addresses: Vec<IpAddr>, which: fn(&[IpAddr]) -> io::Result<usize>) {
    if !addresses.is_empty() {
        end("of the tunnel", move || which(&addresses)).await;
    }
}

async fn end(which: &'static str, work: impl FnOnce() -> io::Result<usize> + Send + 'static) {
    match tokio::task::spawn_blocking(work).await.map_err(io::Error::other).and_then(|ended| ended) {
        Ok(0) => {}
        Ok(count) => tracing::info!("{count} connections {which} were ended; their programs can connect again"),
        Err(error) => not_ended(&error),
    }
}

fn not_ended(error: &(dyn std::error::Error + 'static)) {
    tracing::warn!(error, "connections from before cannot be ended; each is cut when its program sends next");
}

async fn sessions(observed: &Observed, desired: &Desired) -> Vec<(SocketAddr, SocketAddr)> {
    if desired.inbound_replies { inbound_sessions(observed).await } else { vec![] }
}

/// The undo of a device.
fn made(tunnel: &Tunnel) -> Step {
    let change = Change::Device { name: tunnel.name.clone(), tap: tunnel.gateway.is_some() };
    Step { action: Action::Remove, change }
}

/// Connections from outside that are open already. They can only be kept if they are known, so an error means none.
pub(super) async fn inbound_sessions(observed: &Observed) -> Vec<(SocketAddr, SocketAddr)> {
    let outside: HashSet<IpAddr> = observed.outside_addresses().map(|address| address.to_canonical()).collect();
    let read = tokio::task::spawn_blocking(move || sockets::inbound_sessions(&outside)).await.map_err(io::Error::other);
    let sessions = read.and_then(|sessions| sessions).unwrap_or_else(|error| {
        tracing::warn!(%error, "the table of sockets can't be read: open connections from outside will end");
        vec![]
    });
    if sessions.len() > MAX_SESSIONS {
        tracing::warn!("more than {MAX_SESSIONS} connections from outside are open: the others will end");
    }
    sessions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_firewall_does_not_stop_the_loop() {
        let backend = Backend::Nft("/usr/sbin/nft".into(), firewall::Abilities::ALL);
        let (release, wait) = std::sync::mpsc::channel();
        // Ends only when the loop goes on meanwhile.
        let slow = on(&backend, move |_| {
            let told = wait.recv_timeout(std::time::Duration::from_secs(10));
            told.map_err(|_| firewall::Error::NoAnswer(10))
        });
        let (slow, _) = tokio::join!(slow, async { release.send(()) });
        assert!(slow.is_ok());
    }

    /// Questions are answered from other tasks than the one that applies.
    #[test]
    fn reading_can_be_done_from_any_task() {
        fn send<T: Send>(_: impl Fn(&'static Network, &'static Desired) -> T) {}
        fn shared<T: Send + Sync>() {}
        shared::<Network>();
        send(Network::plan);
        send(Network::preflight);
        send(Network::health);
    }
}
