//! Asking the upstream whether it is there, beside everything else.

use std::time::Duration;

use proxyvpn_engine::upstream::{ConnectError, Connector};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// The upstream is asked no oftener.
const SPACING: Duration = Duration::from_millis(500);

/// A question that is under way, or none.
#[derive(Debug, Default)]
pub(super) struct Question {
    asked: Option<JoinHandle<Result<(), ConnectError>>>,
    /// When the newest was asked, or will be.
    when: Option<Instant>,
    /// What goes on after the answer: the question was asked before the network changed.
    next: Option<Connector>,
}

impl Question {
    /// Asks. One that is under way goes on, unless it is to be asked `anew`.
    pub(super) fn ask(&mut self, connector: Connector, anew: bool) {
        let now = Instant::now();
        let earliest = self.when.map_or(now, |when| (when + SPACING).max(now));
        match &self.asked {
            Some(_) if !anew => return,
            // Too young to be given up: with a network that changes all the time nothing would ever be answered.
            Some(_) if earliest > now => {
                self.next = Some(connector);
                return;
            }
            Some(old) => old.abort(),
            None => {}
        }
        self.begin(connector, earliest);
    }

    fn begin(&mut self, connector: Connector, earliest: Instant) {
        self.when = Some(earliest);
        self.asked = Some(tokio::spawn(async move {
            sleep_until(earliest).await;
            connector.probe().await
        }));
    }

    /// Waits for the answer, without end when nothing was asked. May be dropped while it waits.
    pub(super) async fn answer(&mut self) -> Result<(), ConnectError> {
        loop {
            let Some(asked) = &mut self.asked else { return std::future::pending().await };
            let answer = asked.await;
            self.asked = None;
            match (answer, self.next.take()) {
                (Ok(Ok(())), _) => return Ok(()),
                (_, Some(connector)) => {
                    let earliest = self.when.map_or_else(Instant::now, |when| when + SPACING);
                    self.begin(connector, earliest);
                }
                (Ok(answer), None) => return answer,
                // A panic in there is no answer.
                (Err(_), None) => {}
            }
        }
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        if let Some(asked) = &self.asked {
            asked.abort();
        }
    }
}
