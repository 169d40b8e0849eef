//! One connection of a program, from its SYN until both sides are done with it.

use std::time::Duration;

use smoltcp::socket::tcp::State;
use smoltcp::time::Instant;
use tokio::task::AbortHandle;

use crate::packet::parse::Tuple;
use crate::relay::Relay;
use crate::shard::admission::Place;
use crate::timer::Armed;

/// A flow.
#[derive(Debug)]
pub(crate) struct Flow {
    /// Its two ends.
    pub(crate) tuple: Tuple,
    /// When the SYN came.
    pub(crate) since: Instant,
    /// Its entry among the timers.
    pub(crate) armed: Armed,
    /// True while it is on the list of flows to be looked at.
    pub(crate) dirty: bool,
    /// True while it is on the list of flows that wait for the device.
    pub(crate) stalled: bool,
    /// Its place among all flows.
    pub(crate) place: Place,
    /// How far it is.
    pub(crate) stage: Stage,
}

/// How far a flow is.
#[derive(Debug)]
pub(crate) enum Stage {
    /// The upstream has not answered, so the program has not been answered either.
    Pending(Pending),
    /// Bytes can pass.
    Open(Box<Relay>),
}

/// A SYN that waits for the upstream.
#[derive(Debug)]
pub(crate) struct Pending {
    /// The SYN: headers only.
    pub(crate) syn: Box<[u8]>,
    /// The attempt.
    pub(crate) attempt: AbortHandle,
    /// When the program asked last.
    asked: Instant,
    /// How long it waited between the last two times.
    gap: Duration,
}

/// The first repetition may take so long (older systems than Linux).
const FIRST_GAP: Duration = Duration::from_secs(3);

impl Pending {
    /// The program asked at `now`.
    pub(crate) fn new(syn: Box<[u8]>, attempt: AbortHandle, now: Instant) -> Self {
        Self { syn, attempt, asked: now, gap: FIRST_GAP / 2 }
    }

    /// The program asked again.
    pub(crate) fn asked_again(&mut self, now: Instant) {
        let gap = Duration::from((now - self.asked).max(smoltcp::time::Duration::ZERO));
        self.gap = gap.max(FIRST_GAP / 2);
        self.asked = now;
    }

    /// When the program has given up if it does not ask again before: a program that closes its socket tells nobody, its SYNs
    /// just stop. They come at intervals that at most double (RFC 6298 section 5.5); twice that is left.
    pub(crate) fn deadline(&self) -> Instant {
        self.asked + (self.gap * 4 + Duration::from_secs(1)).into()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Does nothing to an attempt that is over.
        self.attempt.abort();
    }
}

/// Name of a state as ss(8) prints it.
pub(crate) fn state_name(state: State) -> &'static str {
    match state {
        State::Closed => "UNCONN",
        State::Listen => "LISTEN",
        State::SynSent => "SYN-SENT",
        State::SynReceived => "SYN-RECV",
        State::Established => "ESTAB",
        State::FinWait1 => "FIN-WAIT-1",
        State::FinWait2 => "FIN-WAIT-2",
        State::CloseWait => "CLOSE-WAIT",
        State::Closing => "CLOSING",
        State::LastAck => "LAST-ACK",
        State::TimeWait => "TIME-WAIT",
    }
}
