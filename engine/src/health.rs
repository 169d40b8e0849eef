//! Tells the state of the upstream, and what this machine lacks, from the outcomes of attempts, whichever shard made them.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;

use crate::event::Event;
use crate::upstream::{ConnectError, Shortage, Tunnel};

/// Failures in a row before the upstream counts as failing. Told again at each multiple: who asked the upstream in between may
/// have found it well.
const THRESHOLD: u32 = 3;
/// The same shortage is told again after so long.
const REPEAT: Duration = Duration::from_secs(1);

/// Failures in a row, and whether the controller knows. Never waits: with the channel full, the next outcome tells it.
#[derive(Debug)]
pub(crate) struct Health {
    failures: AtomicU32,
    told_failing: AtomicBool,
    started: Instant,
    /// Of each [`Shortage`], the milliseconds after `started` from which on it is told again.
    tell_shortage_at: [AtomicU64; 2],
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
        Self {
            failures: AtomicU32::new(0),
            told_failing: AtomicBool::new(false),
            started: Instant::now(),
            tell_shortage_at: Default::default(),
            events,
        }
    }

    /// Takes note of an outcome.
    pub(crate) fn record(&self, outcome: Result<&Tunnel, ConnectError>) {
        if let Err(error) = &outcome
            && let Some(shortage) = error.shortage()
        {
            self.lacking(shortage);
        }
        let sign = match &outcome {
            Ok(_) => Sign::Good,
            Err(error) => sign(error),
        };
        match (sign, outcome) {
            (Sign::Good, _) => {
                self.failures.store(0, Ordering::Relaxed);
                self.tell(false, false, Event::UpstreamWorking);
            }
            (Sign::Bad, Err(error)) => {
                let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                if failures >= THRESHOLD {
                    self.tell(true, failures.is_multiple_of(THRESHOLD), Event::UpstreamFailing(error));
                }
            }
            _ => {}
        }
    }

    fn lacking(&self, shortage: Shortage) {
        let [ports, descriptors] = &self.tell_shortage_at;
        let due = match shortage {
            Shortage::Ports => ports,
            Shortage::Descriptors => descriptors,
        };
        let now = millis(self.started.elapsed());
        if now >= due.load(Ordering::Relaxed) && self.events.try_send(Event::Shortage(shortage)).is_ok() {
            due.store(now + millis(REPEAT), Ordering::Relaxed);
        }
    }

    /// Tells that the upstream is `failing` or not, if that is news or to be told `again`.
    fn tell(&self, failing: bool, again: bool, event: Event) {
        let news = self.told_failing.swap(failing, Ordering::Relaxed) != failing;
        let told = !(news || again) || self.events.try_send(event).is_ok();
        // A repeat that does not fit has an unread event before it.
        if news && !told {
            self.told_failing.store(!failing, Ordering::Relaxed);
        }
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Any answer about a destination shows that the upstream works; what never reached it shows nothing.
fn sign(error: &ConnectError) -> Sign {
    match error {
        error if error.is_upstream() => Sign::Bad,
        ConnectError::Refused { .. } | ConnectError::Destination { .. } => Sign::Good,
        _ => Sign::None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn failed() -> Result<&'static Tunnel, ConnectError> {
        Err(ConnectError::Silent { upstream: "proxy".to_owned(), seconds: 1 })
    }

    fn answered() -> Result<&'static Tunnel, ConnectError> {
        let (upstream, target) = ("proxy".to_owned(), "web:443".to_owned());
        Err(ConnectError::Refused { upstream, target, status: 403, reason: String::new() })
    }

    fn told(events: &mut mpsc::Receiver<Event>) -> String {
        let mut text = String::new();
        while let Ok(event) = events.try_recv() {
            text.push(match event {
                Event::UpstreamWorking => 'w',
                Event::UpstreamFailing(_) => 'f',
                Event::Shortage(Shortage::Ports) => 'p',
                Event::Shortage(Shortage::Descriptors) => 'd',
                _ => '?',
            });
        }
        text
    }

    #[test]
    fn a_failure_that_goes_on_is_told_again() {
        let (sender, mut events) = mpsc::channel(16);
        let health = Health::new(sender);
        let steps: Vec<String> = (0..7)
            .map(|_| {
                health.record(failed());
                told(&mut events)
            })
            .collect();
        assert_eq!(steps, ["", "", "f", "", "", "f", ""]);
        health.record(answered());
        health.record(answered());
        assert_eq!(told(&mut events), "w", "and only once that it works");
        health.record(failed());
        assert_eq!(told(&mut events), "", "counted from the last success");
    }

    #[test]
    fn a_shortage_is_told_once_and_again_while_it_lasts() {
        let (sender, mut events) = mpsc::channel(16);
        let mut health = Health::new(sender);
        let lacking = |code| {
            Err(ConnectError::Local { upstream: "proxy".to_owned(), source: std::io::Error::from_raw_os_error(code) })
        };
        for code in [libc::EADDRNOTAVAIL, libc::EADDRNOTAVAIL, libc::EMFILE, libc::ENFILE, libc::EPERM] {
            health.record(lacking(code));
        }
        assert_eq!(told(&mut events), "pd", "and nothing of the upstream");
        health.started -= REPEAT;
        health.record(lacking(libc::EADDRNOTAVAIL));
        assert_eq!(told(&mut events), "p");
    }

    #[test]
    fn a_full_channel_holds_nobody_up() {
        let (sender, mut events) = mpsc::channel(1);
        let health = Health::new(sender);
        for _ in 0..6 {
            health.record(failed());
        }
        assert_eq!(told(&mut events), "f", "the repeat did not fit");
        health.record(answered());
        assert_eq!(told(&mut events), "w", "the controller knows of the first failure");
        for _ in 0..3 {
            health.record(failed());
        }
        health.record(answered());
        assert_eq!(told(&mut events), "f", "the good news did not fit");
        health.record(answered());
        assert_eq!(told(&mut events), "w", "and comes with the next outcome");
    }
}
