//! Wake-ups of flows: each flow's waker puts its identity on a list and wakes the shard's loop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

use crate::table::FlowId;

/// The list. Filled and emptied by one thread in practice, so the lock is never waited for.
#[derive(Debug, Default)]
pub(super) struct Ready(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    flows: Vec<FlowId>,
    shard: Option<Waker>,
}

impl Ready {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes `shard` from now on.
    pub(super) fn register(&self, shard: &Waker) {
        let mut inner = self.lock();
        if !inner.shard.as_ref().is_some_and(|known| known.will_wake(shard)) {
            inner.shard = Some(shard.clone());
        }
    }

    /// Moves the flows that were woken to `into`; a flow may be there more than once.
    pub(super) fn take(&self, into: &mut Vec<FlowId>) {
        into.append(&mut self.lock().flows);
    }
}

/// Waker of one flow.
#[derive(Debug)]
pub(super) struct FlowWaker {
    pub(super) flow: FlowId,
    pub(super) ready: Arc<Ready>,
}

impl Wake for FlowWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let shard = {
            let mut inner = self.ready.lock();
            inner.flows.push(self.flow);
            inner.shard.clone()
        };
        if let Some(shard) = shard {
            shard.wake();
        }
    }
}
