//! Addresses of the upstream for which no port is left.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So long nobody asks the kernel again.
const PAUSE: Duration = Duration::from_millis(100);

/// Addresses towards which this machine had no free port a moment ago. Clones share them.
///
/// The kernel looks through its whole range of ports before it says so, which takes milliseconds. A flood of connections must
/// not make a shard do nothing else.
#[derive(Debug, Clone, Default)]
pub struct Exhausted(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// The list has entries. Shards look at this first, so that they do not share a lock as long as there are ports.
    any: AtomicBool,
    list: Mutex<Vec<(SocketAddr, Instant)>>,
}

impl Exhausted {
    /// True when `address` is not worth a try at `now`.
    pub(super) fn holds(&self, address: SocketAddr, now: Instant) -> bool {
        self.0.any.load(Ordering::Acquire) && self.current(now).iter().any(|(held, _)| *held == address)
    }

    /// At `now` there was no port towards `address`.
    pub(super) fn note(&self, address: SocketAddr, now: Instant) {
        let mut list = self.current(now);
        if !list.iter().any(|(held, _)| *held == address) {
            list.push((address, now + PAUSE));
            self.0.any.store(true, Ordering::Release);
        }
    }

    /// The entries that count at `now`; the others are forgotten.
    fn current(&self, now: Instant) -> MutexGuard<'_, Vec<(SocketAddr, Instant)>> {
        let mut list = self.0.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|(_, until)| *until > now);
        self.0.any.store(!list.is_empty(), Ordering::Release);
        list
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_left_alone_for_a_while() {
        let (exhausted, now) = (Exhausted::default(), Instant::now());
        let [one, other] = ["192.0.2.1:1", "192.0.2.2:1"].map(|text| text.parse().unwrap());
        exhausted.note(one, now);
        exhausted.note(one, now);
        assert!(exhausted.holds(one, now) && !exhausted.holds(other, now));
        assert_eq!(exhausted.0.list.lock().unwrap().len(), 1);
        assert!(!exhausted.holds(one, now + PAUSE));
        assert!(exhausted.0.list.lock().unwrap().is_empty(), "what is over is forgotten");
    }
}
