//! Tells the state of the upstream from the outcomes of attempts, whichever shard made them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tokio::sync::mpsc::Sender;

use crate::event::Event;
use crate::upstream::{ConnectError, Tunnel};

/// Failures in a row before the upstream counts as failing.
const THRESHOLD: u32 = 3;

/// Failures in a row, and whether the controller knows. Never waits: with the channel full, the next outcome tells it.
#[derive(Debug)]
pub(crate) struct Health {
    failures: AtomicU32,
    told_failing: AtomicBool,
    events: Sender<Event>,
}

/// What an outcome says about the upstream itself.
enum Sign {
    Good,
    Bad,
    None,
}

impl Health {
    /// Tells through `events`.
    pub(crate) fn new(events: Sender<Event>) -> Self {
        Self { failures: AtomicU32::new(0), told_failing: AtomicBool::new(false), events }
    }

    /// Takes note of an outcome.
    pub(crate) fn record(&self, outcome: Result<&Tunnel, ConnectError>) {
        let sign = match &outcome {
            Ok(_) => Sign::Good,
            Err(error) => sign(error),
        };
        match (sign, outcome) {
            (Sign::Good, _) => {
                self.failures.store(0, Ordering::Relaxed);
                self.tell(false, Event::UpstreamWorking);
            }
            (Sign::Bad, Err(error)) => {
                let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                if failures >= THRESHOLD {
                    self.tell(true, Event::UpstreamFailing(error));
                }
            }
            _ => {}
        }
    }

    /// Tells that the upstream is `failing` or not, if that is news.
    fn tell(&self, failing: bool, event: Event) {
        if self.told_failing.swap(failing, Ordering::Relaxed) != failing && self.events.try_send(event).is_err() {
            self.told_failing.store(!failing, Ordering::Relaxed);
        }
    }
}

/// Any answer about a destination shows that the upstream works; what never reached it shows nothing.
fn sign(error: &ConnectError) -> Sign {
    match error {
        error if error.is_upstream() => Sign::Bad,
        ConnectError::Refused { .. } | ConnectError::Destination { .. } => Sign::Good,
        _ => Sign::None,
    }
}
