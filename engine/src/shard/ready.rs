//! Wake-ups of flows and sockets: each one's waker puts its key on a list and wakes the shard's loop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

/// The list. Filled and emptied by one thread in practice, so the lock is never waited for.
#[derive(Debug)]
pub(super) struct Ready<K>(Mutex<Inner<K>>);

#[derive(Debug)]
struct Inner<K> {
    keys: Vec<K>,
    shard: Option<Waker>,
}

impl<K> Default for Ready<K> {
    fn default() -> Self {
        Self(Mutex::new(Inner { keys: Vec::new(), shard: None }))
    }
}

impl<K> Ready<K> {
    fn lock(&self) -> MutexGuard<'_, Inner<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes `shard` from now on.
    pub(super) fn register(&self, shard: &Waker) {
        let mut inner = self.lock();
        if !inner.shard.as_ref().is_some_and(|known| known.will_wake(shard)) {
            inner.shard = Some(shard.clone());
        }
    }

    /// Moves the keys that were woken to `into`; one may be there more than once.
    pub(super) fn take(&self, into: &mut Vec<K>) {
        into.append(&mut self.lock().keys);
    }
}

/// Waker of one flow or socket.
#[derive(Debug)]
pub(super) struct Waking<K> {
    pub(super) key: K,
    pub(super) ready: Arc<Ready<K>>,
}

impl<K: Copy + Send + Sync + 'static> Wake for Waking<K> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let shard = {
            let mut inner = self.ready.lock();
            inner.keys.push(self.key);
            inner.shard.clone()
        };
        if let Some(shard) = shard {
            shard.wake();
        }
    }
}
