//! The loop that runs until the guest powers off: Tor's log and end, the host's orders, the power button, heartbeats, zombies.

use std::fs::File;
use std::time::{Duration, Instant};

use proxyvpn_torvm::channel::{HEARTBEAT_MS, Order, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitOptions, WaitStatus};
use rustix::time::{ClockId, clock_settime};

use crate::channel::Channel;
use crate::tor::Tor;
use crate::{button, disk};

const HEARTBEAT: Duration = Duration::from_millis(HEARTBEAT_MS);
/// How long Tor may take to end.
const GRACE: Duration = Duration::from_secs(3);
/// Heartbeats from one look at the state disk to the next.
const DISK_EVERY: u32 = 15;

/// See the module.
pub(crate) struct Watch {
    tor: Tor,
    button: File,
    /// Set once the button was pressed: when Tor is killed.
    kill_at: Option<Instant>,
    disk_is_full: bool,
    beats: u32,
}

/// Which descriptors have something.
struct Ready {
    tor: bool,
    button: bool,
    channel: bool,
}

impl Watch {
    /// `button`: the power button, open and not waiting.
    pub(crate) fn new(tor: Tor, button: File) -> Self {
        Self { tor, button, kill_at: None, disk_is_full: false, beats: 0 }
    }

    /// Returns when Tor has ended, with the cause.
    pub(crate) fn run(mut self, channel: &mut Channel) -> String {
        let mut beat_at = Instant::now() + HEARTBEAT;
        // A host that closed its end shows as a hang-up at every look: then the channel waits for the next heartbeat.
        let mut hung_up = false;
        loop {
            let until = self.kill_at.map_or(beat_at, |kill_at| kill_at.min(beat_at));
            let ready = self.wait(channel, until, &mut hung_up);
            if ready.tor {
                self.tor.read(|status| channel.send(&status));
            }
            if ready.channel {
                channel.read(obey);
                channel.write();
            }
            if ready.button && button::is_pressed(&mut self.button) && self.kill_at.is_none() {
                self.tor.interrupt();
                self.kill_at = Some(Instant::now() + GRACE);
            }
            if let Some(status) = self.reap() {
                return self.end(channel, status);
            }
            if self.kill_at.is_some_and(|kill_at| Instant::now() >= kill_at) {
                self.tor.kill();
                self.kill_at = Some(Instant::now() + GRACE);
            }
            if Instant::now() >= beat_at {
                beat_at = Instant::now() + HEARTBEAT;
                hung_up = false;
                self.beat(channel);
            }
        }
    }

    /// Waits until something happens, or `until`.
    fn wait(&self, channel: &mut Channel, until: Instant, hung_up: &mut bool) -> Ready {
        let out = if channel.waits() { PollFlags::OUT } else { PollFlags::empty() };
        let mut fds =
            vec![PollFd::from_borrowed_fd(self.tor.end(), PollFlags::IN), PollFd::new(&self.button, PollFlags::IN)];
        let log_at = self.tor.log().map(|log| {
            fds.push(PollFd::from_borrowed_fd(log, PollFlags::IN));
            fds.len() - 1
        });
        let channel_at = channel.fd().filter(|_| !*hung_up).map(|port| {
            fds.push(PollFd::from_borrowed_fd(port, PollFlags::IN | out));
            fds.len() - 1
        });
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        // An error shows nothing as ready; the heartbeat's time passes as always.
        if poll(&mut fds, Some(&timeout)).is_err() {
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
        let events = |at: Option<usize>| at.and_then(|at| fds.get(at)).map_or(PollFlags::empty(), PollFd::revents);
        let of_channel = events(channel_at);
        *hung_up |= of_channel.contains(PollFlags::HUP);
        Ready { tor: !events(log_at).is_empty(), button: !events(Some(1)).is_empty(), channel: !of_channel.is_empty() }
    }

    /// Takes all that ended. Returns Tor's status when it is among them.
    fn reap(&self) -> Option<WaitStatus> {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if self.tor.is(pid) {
                return Some(status);
            }
        }
        None
    }

    fn beat(&mut self, channel: &mut Channel) {
        channel.send(&Status::Alive);
        self.beats = self.beats.wrapping_add(1);
        if self.beats.is_multiple_of(DISK_EVERY) {
            let full = disk::is_nearly_full();
            if full && !self.disk_is_full {
                channel.send(&Status::log(
                    "warn",
                    "the state disk is nearly full: Tor goes on, but may not keep its guards",
                ));
            }
            self.disk_is_full = full;
        }
    }

    /// Tor has ended: the rest of its log, the end of its transports, the cause.
    fn end(mut self, channel: &mut Channel, status: WaitStatus) -> String {
        while self.tor.read(|status| channel.send(&status)) {}
        self.tor.kill();
        let _ = self.reap();
        if self.kill_at.is_some() { "the host asked for it".to_owned() } else { self.tor.cause(status) }
    }
}

fn obey(order: Order) {
    match order {
        Order::Clock { unix_micros } => {
            if let Err(error) = clock_settime(ClockId::Realtime, time(unix_micros)) {
                eprintln!("torvm-init: set the clock: {error}");
            }
        }
    }
}

fn time(unix_micros: u64) -> Timespec {
    // Both fit: a u64 of microseconds is less than an i64 of seconds.
    Timespec {
        tv_sec: (unix_micros / 1_000_000).cast_signed(),
        tv_nsec: (unix_micros % 1_000_000 * 1_000).cast_signed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microseconds_become_seconds_and_nanoseconds() {
        let at = time(1_700_000_000_123_456);
        assert_eq!((at.tv_sec, at.tv_nsec), (1_700_000_000, 123_456_000));
        assert!(time(u64::MAX).tv_sec > 0);
    }
}
