//! Plan, diagnosis, flows and counters: questions that never hold up the states and change nothing.

use std::collections::HashMap;

use proxyvpn_dbus::types::{Check, Circuit, Flow, PlanStep};

use super::carrier::Paths;
use super::engine::EngineSlot;
use super::guest::TorSlot;
use super::{checks, network};
use crate::machine::world::Inspector;
use crate::machine::{Failure, Request};
use crate::net::{Keeping, Network};

/// Looks with a netlink socket of its own.
#[derive(Debug, Clone)]
pub struct CarrierInspector {
    paths: Paths,
    engine: EngineSlot,
    tor: TorSlot,
}

impl CarrierInspector {
    pub(super) fn new(paths: Paths, engine: EngineSlot, tor: TorSlot) -> Self {
        Self { paths, engine, tor }
    }
}

impl Inspector for CarrierInspector {
    async fn plan(&self, request: &Request) -> Result<Vec<PlanStep>, Failure> {
        let (desired, _) = network::desired(&request.profile);
        let network =
            Network::open(&self.paths.state, Keeping::default()).await.map_err(|error| network::failure(&error))?;
        let steps = network.plan(&desired).await.map_err(|error| network::failure(&error))?;
        Ok(steps
            .iter()
            .map(|step| PlanStep {
                layer: step.layer().as_str().to_owned(),
                action: step.action().as_str().to_owned(),
                text: step.to_string(),
            })
            .collect())
    }

    async fn diagnose(&self, request: Option<&Request>) -> Vec<Check> {
        checks::run(&self.paths, request).await
    }

    async fn flows(&self) -> Vec<Flow> {
        self.engine.flows().await
    }

    fn statistics(&self) -> HashMap<String, u64> {
        self.engine.counters()
    }

    async fn new_identity(&self) -> Result<(), Failure> {
        self.tor.new_identity().await
    }

    async fn circuits(&self) -> Result<Vec<Circuit>, Failure> {
        self.tor.circuits().await
    }
}
