//! Addresses of the upstream for which no port is left.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So long nobody asks the kernel again.
const PAUSE: Duration = Duration::from_millis(100);

/// Addresses towards which this machine had no free port a moment ago. Clones share them.
///
/// The kernel looks through its whole range of ports before it says so, which takes milliseconds. A flood of connections must
/// not make a shard do nothing else.
#[derive(Debug, Clone, Default)]
pub struct Exhausted(Arc<Mutex<Vec<(SocketAddr, Instant)>>>);

impl Exhausted {
    /// True when `address` is not worth a try at `now`.
    pub(super) fn holds(&self, address: SocketAddr, now: Instant) -> bool {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|(_, until)| *until > now);
        list.iter().any(|(held, _)| *held == address)
    }

    /// At `now` there was no port towards `address`.
    pub(super) fn note(&self, address: SocketAddr, now: Instant) {
        if !self.holds(address, now) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push((address, now + PAUSE));
        }
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
        assert_eq!(exhausted.0.lock().unwrap().len(), 1);
        assert!(!exhausted.holds(one, now + PAUSE));
        assert!(exhausted.0.lock().unwrap().is_empty(), "what is over is forgotten");
    }
}
