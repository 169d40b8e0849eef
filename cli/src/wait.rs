//! Waiting for the daemon to get where it was told to go.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::time::Duration;

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{Bootstrap, Progress, Reason, State};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use crate::bus::{Bus, bounded, failure, silent, vanished};
use crate::events::{Event, Events};
use crate::exit::{Exit, Failure};
use crate::progress::Display;
use crate::status::Snapshot;

/// Signals may be merged on their way: so often the state is asked for.
const LOOK: Duration = Duration::from_secs(2);
/// How soon after the call it is asked for first.
const FIRST_LOOK: Duration = Duration::from_millis(250);
/// How long Ctrl-C waits for the daemon to take the disconnect.
const ABORT: Duration = Duration::from_secs(5);

/// Where the daemon is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Goal {
    /// A new connection; Ctrl-C gives it up.
    Connect,
    /// The present connection anew; Ctrl-C only stops waiting.
    Reconnect,
    /// No connection.
    Disconnect,
}

/// How long the goal is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// So long in all.
    Total(Duration),
    /// As long as there is progress: Tor's way into its network may take minutes.
    Progress,
}

impl Patience {
    /// How long without progress in `phase`.
    pub(crate) fn limit(self, phase: &str) -> Duration {
        match self {
            Self::Total(limit) => limit,
            Self::Progress if phase == "wait-bootstrap" => Duration::from_secs(180),
            Self::Progress => Duration::from_secs(60),
        }
    }
}

/// How long to wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// For the answer to the call.
    pub(crate) reply: Duration,
    /// For the goal after the answer; without it, nothing is waited for.
    pub(crate) goal: Option<Patience>,
}

/// Ctrl-C and SIGTERM.
struct Interrupts(Signal, Signal);

impl Interrupts {
    fn new() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?))
    }

    async fn next(&mut self) {
        tokio::select! { _ = self.0.recv() => {} _ = self.1.recv() => {} }
    }
}

/// Makes the call and follows it to its goal.
///
/// # Errors
/// Whatever keeps it from the goal, with the exit code that says so.
pub(crate) async fn drive(
    bus: &Bus,
    goal: Goal,
    limits: Limits,
    call: impl Future<Output = Result<(), Error>>,
) -> Result<(), Failure> {
    let mut interrupts =
        Interrupts::new().map_err(|error| Failure::new(Exit::Failure, format!("cannot catch signals: {error}")))?;
    let mut events = Events::subscribe(bus).await?;
    let before = Snapshot::read(bus).await?;
    let mut tracker = Tracker { goal, begun: false, since: before.since, lockdown: before.lockdown };
    let mut call = pin!(call);
    let deadline = sleep_until(Instant::now() + limits.reply);
    let mut deadline = pin!(deadline);
    loop {
        tokio::select! {
            biased;
            () = interrupts.next() => return Err(interrupted("")),
            reply = &mut call => { reply.map_err(failure)?; break }
            // What ends before the call is accepted was begun by somebody else.
            event = events.next() => { let _ = tracker.event(&event); }
            () = &mut deadline => return Err(silent(limits.reply)),
        }
    }
    let Some(patience) = limits.goal else { return Ok(()) };
    let mut display = Display::new();
    let mut progress = Progress::default();
    let mut tor = Bootstrap::default();
    let mut shown = (String::new(), String::new());
    let mut best = Best::default();
    let now = Instant::now();
    let mut limit = patience.limit("");
    let deadline = sleep_until(now + limit);
    let mut deadline = pin!(deadline);
    let mut look = interval_at(now + FIRST_LOOK, LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tick = interval_at(now, Duration::from_secs(1));
    loop {
        let end = tokio::select! {
            biased;
            () = interrupts.next() => return Err(abort(bus, goal).await),
            event = events.next() => {
                match &event {
                    Event::State { state, phase, .. } => shown = (state.clone(), phase.clone()),
                    Event::Progress { phase, progress: new } => {
                        progress = new.clone();
                        // Comes before the `StateChanged` of the same step.
                        if let Some(phase) = phase {
                            shown.1.clone_from(phase);
                        }
                    }
                    Event::Bootstrap(bootstrap) => tor = bootstrap.clone(),
                    Event::Other | Event::Vanished => {}
                }
                if patience == Patience::Progress && best.beaten(&shown, progress.percent, tor.percent) {
                    limit = patience.limit(&shown.1);
                    deadline.as_mut().reset(Instant::now() + limit);
                }
                // A step without a phase is the end of one, which the result tells.
                if shown.1 == "wait-bootstrap" && !tor.tag.is_empty() {
                    display.tor(&tor);
                } else if matches!(shown.0.as_str(), "connecting" | "disconnecting") && !shown.1.is_empty() {
                    display.show(&shown.0, &shown.1, progress.percent, &progress.summary);
                }
                tracker.event(&event)
            }
            _ = look.tick() => match Snapshot::read(bus).await {
                Ok(snapshot) => tracker.look(&snapshot),
                // The event says it better.
                Err(_) => None,
            },
            _ = tick.tick(), if display.redraws() => { display.tick(); None }
            () = &mut deadline => return Err(timed_out(goal, patience, limit)),
        };
        if let Some(end) = end {
            return end;
        }
    }
}

/// How far it has ever been, so that what only goes back and forth is no progress.
#[derive(Debug, Default)]
struct Best {
    step: (String, String),
    percent: (u32, u32),
}

impl Best {
    /// Whether this is further.
    fn beaten(&mut self, step: &(String, String), percent: u32, tor: u32) -> bool {
        if self.step != *step {
            *self = Self { step: step.clone(), percent: (percent, tor) };
            return true;
        }
        let (old, new) = (self.percent, (self.percent.0.max(percent), self.percent.1.max(tor)));
        self.percent = new;
        new != old
    }
}

/// Judges what is seen.
#[derive(Debug)]
struct Tracker {
    goal: Goal,
    /// The attempt was seen under way, so that what follows is its end.
    begun: bool,
    /// When the state before the call began.
    since: u64,
    /// Nothing opens by disconnecting.
    lockdown: bool,
}

impl Tracker {
    fn event(&mut self, event: &Event) -> Option<Result<(), Failure>> {
        match event {
            Event::State { state, reason, .. } => {
                // A refusal before the network was touched may show nothing but its reason.
                let told = !matches!(reason.code.as_str(), "" | "requested");
                let state = State::from_name(state)?;
                self.judge(state, reason, told && state == State::Disconnected)
            }
            Event::Vanished => Some(Err(vanished())),
            Event::Progress { .. } | Event::Bootstrap(_) | Event::Other => None,
        }
    }

    fn look(&mut self, snapshot: &Snapshot) -> Option<Result<(), Failure>> {
        let state = State::from_name(&snapshot.state)?;
        self.judge(state, &snapshot.reason, snapshot.since != self.since)
    }

    /// `new`: the state is surely one after the call, even if the attempt was not seen.
    fn judge(&mut self, state: State, reason: &Reason, new: bool) -> Option<Result<(), Failure>> {
        let new = new || self.begun;
        match (self.goal, state) {
            (Goal::Disconnect, State::Disconnected) => Some(Ok(())),
            (Goal::Disconnect, _) => {
                self.begun |= state == State::Disconnecting;
                None
            }
            (_, State::Connecting) => {
                self.begun = true;
                None
            }
            (_, State::Disconnecting) => None,
            (_, State::Connected) => new.then_some(Ok(())),
            (_, State::Blocked) => new.then(|| Err(blocked(reason, self.lockdown))),
            (_, State::Disconnected) => new.then(|| Err(ended(reason, self.lockdown))),
        }
    }
}

fn why(reason: &Reason) -> String {
    match (reason.text.is_empty(), reason.code.is_empty()) {
        (false, _) => reason.text.clone(),
        (true, false) => reason.code.clone(),
        (true, true) => "the daemon gives no reason".to_owned(),
    }
}

fn ended(reason: &Reason, lockdown: bool) -> Failure {
    if reason.code == "requested" {
        return Failure::new(Exit::Failure, "the connection was ended meanwhile by a disconnect");
    }
    let effect = if lockdown { "Lockdown is on, so nothing leaves." } else { "The network is as it was." };
    Failure::new(Exit::Failure, format!("cannot connect: {}", why(reason)))
        .advise(format!("{effect} proxyctl doctor checks each step; proxyctl logs says more."))
}

/// The connection is wanted but broken.
fn blocked(reason: &Reason, lockdown: bool) -> Failure {
    let open =
        if lockdown { "proxyctl lockdown off and proxyctl disconnect open" } else { "proxyctl disconnect opens" };
    Failure::new(Exit::Blocked, format!("blocked: {}", why(reason))).advise(format!(
        "Traffic is stopped so that nothing goes around the tunnel; the daemon tries again. {open} \
         the network; sudo proxyctl rescue does it without the daemon."
    ))
}

fn timed_out(goal: Goal, patience: Patience, limit: Duration) -> Failure {
    let (what, next) = match goal {
        Goal::Disconnect => ("disconnected", "sudo proxyctl rescue gives the network back without it"),
        Goal::Connect | Goal::Reconnect => ("connected", "proxyctl disconnect gives it up"),
    };
    let how = match patience {
        Patience::Total(_) => "after",
        Patience::Progress => "and no progress for",
    };
    Failure::new(Exit::TimedOut, format!("not {what} {how} {} s", limit.as_secs()))
        .advise(format!("The daemon goes on: proxyctl status --watch shows it; {next}."))
}

fn interrupted(effect: &str) -> Failure {
    Failure::new(Exit::Interrupted, "interrupted").advise(effect)
}

/// Ctrl-C after the call was accepted.
async fn abort(bus: &Bus, goal: Goal) -> Failure {
    if goal != Goal::Connect {
        return interrupted("The daemon goes on: proxyctl status --watch shows it.");
    }
    match bounded(ABORT, bus.manager.disconnect(std::collections::HashMap::new())).await {
        Ok(()) => interrupted("The daemon was told to disconnect."),
        Err(failure) => interrupted(&format!(
            "The daemon was not told to disconnect: {}\nproxyctl disconnect tries it again.",
            failure.cause
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(state: State, code: &str) -> Event {
        let reason = Reason { code: code.to_owned(), text: String::new() };
        Event::State { state: state.as_str().to_owned(), phase: String::new(), reason }
    }

    fn run(goal: Goal, events: &[Event]) -> Option<Exit> {
        let mut tracker = Tracker { goal, begun: false, since: 1, lockdown: false };
        events
            .iter()
            .find_map(|event| tracker.event(event))
            .map(|end| end.map_or_else(|failure| failure.exit, |()| Exit::Ok))
    }

    #[test]
    fn an_attempt_ends_with_what_follows_its_beginning() {
        use State::{Blocked, Connected, Connecting, Disconnected};
        for (events, end) in [
            (vec![state(Connecting, ""), state(Connected, "")], Some(Exit::Ok)),
            (vec![state(Connecting, ""), state(Disconnected, "upstream-unreachable")], Some(Exit::Failure)),
            (vec![state(Connecting, ""), state(Disconnected, "requested")], Some(Exit::Failure)),
            (vec![state(Connecting, ""), state(Blocked, "device-lost")], Some(Exit::Blocked)),
            (vec![state(Disconnected, "tun-exists")], Some(Exit::Failure)),
            (vec![state(Disconnected, "requested")], None),
            (vec![state(Blocked, "device-lost")], None),
            (vec![state(Connected, "")], None),
            (vec![Event::Progress { phase: None, progress: Progress::default() }, Event::Other], None),
            (vec![state(Connecting, ""), Event::Vanished], Some(Exit::Unreachable)),
        ] {
            assert_eq!(run(Goal::Connect, &events), end, "{events:?}");
            assert_eq!(run(Goal::Reconnect, &events), end, "{events:?}");
        }
    }

    #[test]
    fn only_getting_further_is_progress() {
        let step = |phase: &str| ("connecting".to_owned(), phase.to_owned());
        let mut best = Best::default();
        assert!(best.beaten(&step("launch-vm"), 6, 0));
        assert!(!best.beaten(&step("launch-vm"), 6, 0));
        assert!(best.beaten(&step("wait-bootstrap"), 14, 0));
        assert!(best.beaten(&step("wait-bootstrap"), 14, 10));
        assert!(!best.beaten(&step("wait-bootstrap"), 14, 5), "Tor goes back and forth");
        assert!(!best.beaten(&step("wait-bootstrap"), 14, 10));
        assert!(best.beaten(&step("wait-bootstrap"), 14, 11));
        assert!(Patience::Progress.limit("wait-bootstrap") > Patience::Progress.limit("launch-vm"));
        let total = Patience::Total(Duration::from_secs(5));
        assert_eq!(total.limit("wait-bootstrap"), Duration::from_secs(5), "who gives a time means it");
    }

    #[test]
    fn a_look_sees_what_no_signal_told() {
        let mut tracker = Tracker { goal: Goal::Connect, begun: false, since: 1, lockdown: false };
        let mut snapshot = Snapshot { state: "connected".to_owned(), since: 1, ..Snapshot::default() };
        assert_eq!(tracker.look(&snapshot), None);
        snapshot.since = 2;
        assert_eq!(tracker.look(&snapshot), Some(Ok(())));
    }

    #[test]
    fn disconnecting_ends_when_disconnected() {
        assert_eq!(
            run(Goal::Disconnect, &[state(State::Disconnecting, ""), state(State::Disconnected, "")]),
            Some(Exit::Ok)
        );
        assert_eq!(run(Goal::Disconnect, &[state(State::Disconnecting, ""), state(State::Blocked, "")]), None);
        assert_eq!(run(Goal::Disconnect, &[state(State::Disconnecting, ""), Event::Vanished]), Some(Exit::Unreachable));
    }
}
