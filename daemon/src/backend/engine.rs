//! The packet engine while it runs, shared between the backend and those who look at it.

use std::collections::HashMap;
use std::sync::Arc;

use proxyvpn_dbus::types::Flow;
use proxyvpn_engine::Engine;
use tokio::sync::RwLock;

/// The engine while it runs, shared with the [`CarrierInspector`].
#[derive(Debug, Clone, Default)]
pub(super) struct EngineSlot(Arc<RwLock<Option<Engine>>>);

impl EngineSlot {
    /// The connections in the tunnel.
    pub(super) async fn flows(&self) -> Vec<Flow> {
        let slot = self.0.read().await;
        let Some(engine) = slot.as_ref() else { return Vec::new() };
        let flows = engine.flows().await;
        flows
            .into_iter()
            .map(|flow| Flow {
                id: flow.id,
                source: flow.source.to_string(),
                destination: flow.destination.to_string(),
                state: flow.state.to_owned(),
                sent: flow.sent,
                received: flow.received,
                age: flow.age,
            })
            .collect()
    }

    /// Counters; empty when the engine does not run or is just being stopped.
    pub(super) fn counters(&self) -> HashMap<String, u64> {
        let Ok(slot) = self.0.try_read() else { return HashMap::new() };
        let counters = slot.as_ref().map(Engine::counters).unwrap_or_default();
        counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// The engine runs.
    pub(super) async fn put(&self, engine: Engine) {
        *self.0.write().await = Some(engine);
    }

    /// Stops it, if it runs.
    pub(super) async fn stop(&self) {
        let engine = self.0.write().await.take();
        if let Some(engine) = engine {
            engine.stop().await;
        }
    }
}
