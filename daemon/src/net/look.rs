//! A look at the network while a connection is wanted: what others removed or changed is put back.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use super::desired::Desired;
use super::health::{self, Finding};
use super::network::{Network, ROUNDS, on};
use super::observed::Observed;
use super::step::{Action, Change, Stage, Step};
use super::way::{self, Way};
use super::{Backend, Error, kernel, plan};

/// What a look found and did.
#[derive(Debug, Default)]
pub struct Look {
    /// What others had removed or changed and is as it was again, one line each.
    pub put_back: Vec<String>,
    /// What can't be put back; the rest was, all the same.
    pub errors: Vec<Error>,
    /// What is still not as it should be, and what else an administrator should know.
    pub findings: Vec<Finding>,
}

impl Network {
    /// Opens a watch that tells when to [`look`](Self::look). Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn watch(&self) -> Result<super::Watch, Error> {
        super::Watch::open(self.firewall_name() == "iptables", self.neighbours_on.clone())
    }

    /// Compares what is there with what was applied and puts back what is missing: the firewall first, then the device, the
    /// routes and the rules. Goes on after errors. Devices that came and went since the last look get what they need.
    ///
    /// # Errors
    /// When the present state can't be read.
    pub async fn look(&mut self, desired: &Desired) -> Result<Look, Error> {
        let mut look = Look::default();
        let mut intact = self.firewall_intact().await?;
        if !intact {
            match self.refill(desired).await {
                Ok(()) => {
                    look.put_back.push("nft add table inet proxyvpn".to_owned());
                    intact = true;
                }
                Err(error) => look.errors.push(error),
            }
        }
        let observed = self.kernel.observe().await?;
        self.tell_watch(&observed, desired);
        let devices = self.devices(&observed, desired).await?;
        let moved = self.at_look.as_ref() != Some(&devices);
        self.at_look = Some(devices);
        if (moved || !intact)
            && let Err(error) = self.apply(Stage::Firewall, desired).await
        {
            look.errors.push(error);
        }
        let observed = self.mend(observed, desired, &mut look).await?;
        look.findings = health::findings(&observed, desired);
        if !intact {
            look.findings.insert(0, health::firewall_missing(desired));
        }
        Ok(look)
    }

    /// Does the steps that are missing, and gives what is there then.
    async fn mend(&mut self, mut observed: Observed, desired: &Desired, look: &mut Look) -> Result<Observed, Error> {
        for _ in 0..ROUNDS {
            let steps = plan::plan(&observed, desired);
            if steps.is_empty() {
                break;
            }
            if let Err(error) = self.journal.begin(steps.iter().filter_map(Step::inverse).map(|step| step.line())) {
                // A record for people: the network matters more.
                look.errors.push(error);
            }
            let mut failed = vec![];
            for step in steps {
                match self.kernel.run(&step).await {
                    Err(error) if !kernel::already(&step, &error) => failed.push(error),
                    // A new device is no damage.
                    _ if matches!(step.change, Change::SourceMark { .. }) => {
                        tracing::debug!(step = step.line(), "done");
                    }
                    _ if step.action == Action::Remove => {}
                    _ => look.put_back.push(step.line()),
                }
            }
            observed = self.kernel.observe().await?;
            if !failed.is_empty() {
                look.errors.extend(failed);
                break;
            }
        }
        Ok(observed)
    }

    /// Tells the watch whose neighbours matter.
    fn tell_watch(&self, observed: &Observed, desired: &Desired) {
        let tunnel = desired.tunnel.as_ref().filter(|tunnel| tunnel.gateway.is_some());
        let link = tunnel.and_then(|tunnel| observed.links.iter().find(|link| plan::is_device(link, tunnel)));
        self.neighbours_on.store(link.map_or(0, |link| link.index), Ordering::Relaxed);
    }

    /// Puts the rules back that were installed. They are not compiled anew, because until they are back the firewall is open.
    async fn refill(&mut self, desired: &Desired) -> Result<(), Error> {
        if let (Some(backend), Some(ruleset)) = (&self.backend, self.installed.clone()) {
            match on(backend, move |backend| backend.apply(&ruleset)).await {
                Ok(()) => return Ok(()),
                // A device may be gone that they name.
                Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "not as it was"),
            }
        }
        self.apply(Stage::Firewall, desired).await
    }

    /// Whether the firewall is what this process installed, as far as it can be read back.
    pub(super) async fn firewall_intact(&self) -> Result<bool, Error> {
        Ok(match (&self.backend, self.installed.clone()) {
            (Some(backend), Some(ruleset)) => on(backend, move |backend| backend.holds(&ruleset)).await?,
            (Some(backend), None) => on(backend, Backend::present).await?,
            (None, _) => false,
        })
    }

    /// How `targets` are reached by sockets with our mark.
    ///
    /// # Errors
    /// When it can't be read.
    pub async fn way(&self, targets: &[IpAddr]) -> Result<Way, Error> {
        let hops = self.kernel.hops(&way::questions(targets)).await?;
        Ok(Way::new(hops, &self.kernel.links().await?))
    }

    /// What of the network around this machine an administrator should know. `upstream`: addresses of the upstream.
    ///
    /// # Errors
    /// When it can't be read.
    pub async fn surroundings(&self, desired: &Desired, upstream: &[IpAddr]) -> Result<Vec<Finding>, Error> {
        let routes = self.kernel.main_routes().await?;
        Ok(health::surroundings(&self.kernel.observe().await?, &routes, desired, upstream))
    }
}
