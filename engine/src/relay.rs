//! Carries bytes between a program's connection and the upstream's socket, without a copy in between, and translates each
//! side's end (FIN, RST, silence) into the same end on the other.

use std::io;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use rustix::net::Shutdown;
use smoltcp::iface::Interface;
use smoltcp::phy::Device;
use smoltcp::socket::tcp::State;
use smoltcp::time::Instant;
use tokio::net::TcpStream;

use crate::counters::Counters;
use crate::sys::Connection;
use crate::upstream::Tunnel;

/// Passes over both directions before another flow gets its turn.
const ROUNDS: usize = 4;
/// A program whose system has to answer (a SYN-ACK, a FIN) and does not is gone.
const UNANSWERED: Duration = Duration::from_secs(60);
/// Bytes towards the program that its system does not acknowledge: as long as Linux tries (tcp(7), `tcp_retries2`).
const UNACKNOWLEDGED: Duration = Duration::from_secs(900);
/// A quiet program's system is asked so often whether the program is still there: a RST may have been lost.
const KEEP_ALIVE: Duration = Duration::from_secs(900);
/// After a FIN of the upstream's: how long the program may say nothing.
const FIN_WAIT: Duration = Duration::from_secs(600);
/// After a FIN of the program's: how long the upstream may say nothing.
const CLOSE_WAIT: Duration = Duration::from_secs(7200);
/// Idle for so long, and the ring towards the program gives its memory back.
const IDLE: Duration = Duration::from_secs(5);
/// Not worth giving back.
const SMALL: u64 = 32 * 1024;

/// An open flow.
#[derive(Debug)]
pub(crate) struct Relay {
    /// Towards the program.
    pub(crate) connection: Connection,
    /// Bytes that the upstream took.
    pub(crate) sent: u64,
    /// Bytes from the upstream.
    pub(crate) received: u64,
    /// The program's maximum segment size.
    pub(crate) mss: u16,
    upstream: TcpStream,
    waker: Waker,
    early: Vec<u8>,
    early_taken: usize,
    /// The upstream will send no more.
    upstream_finished: bool,
    /// The upstream was told that the program will send no more.
    upstream_told: bool,
    /// The upstream's socket failed. The program gets what came before, then a RST.
    upstream_broken: bool,
    program_reset: bool,
    aborted: bool,
    /// The last ACK of TIME-WAIT is out. Nothing more is sent: smoltcp's own timer would wipe what is not yet relayed.
    settled: bool,
    /// When something last happened that a silent side could have failed to do.
    progress: Instant,
    /// `received` when the ring towards the program was last given back.
    discarded_at: u64,
}

/// What [`Relay::pump`] leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
    /// There is more to do at once.
    Again,
    /// A wake-up, a packet or [`Relay::deadline`] brings the next work.
    Wait,
    /// The flow is over.
    Over(End),
}

/// How a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Both sides finished.
    Finished,
    /// The program's RST; the upstream gets one too.
    ResetByProgram,
    /// The upstream's RST or failure; the program got one too.
    ResetByUpstream,
    /// A side stayed silent that had to speak; both got a RST.
    TimedOut,
}

impl Relay {
    /// Joins `connection`, which is about to be fed its SYN, and `tunnel`. `waker` is called when the upstream has news.
    pub(crate) fn new(
        mut connection: Connection,
        tunnel: Tunnel,
        mss: u16,
        waker: Arc<impl Wake + Send + Sync + 'static>,
        now: Instant,
    ) -> Self {
        connection.set_keep_alive(Some(KEEP_ALIVE.into()));
        Self {
            connection,
            sent: 0,
            received: 0,
            mss,
            upstream: tunnel.stream,
            waker: waker.into(),
            early: tunnel.early,
            early_taken: 0,
            upstream_finished: false,
            upstream_told: false,
            upstream_broken: false,
            program_reset: false,
            aborted: false,
            settled: false,
            progress: now,
            discarded_at: 0,
        }
    }

    /// Takes in one of the program's packets; `reset` when its RST flag is set.
    pub(crate) fn ingress(&mut self, now: Instant, interface: &mut Interface, device: &mut impl Device, reset: bool) {
        let before = self.connection.state();
        self.connection.ingress(now, interface, device);
        let after = self.connection.state();
        self.progress = now;
        // A RST in SYN-RECEIVED makes smoltcp listen again.
        if reset && before != after && matches!(after, State::Closed | State::Listen) {
            self.program_reset = true;
        }
    }

    /// True when the program may use the 4-tuple for a new connection: this one needs no more packets of it.
    pub(crate) fn has_left(&self) -> bool {
        matches!(self.connection.state(), State::TimeWait | State::Closed | State::Listen)
    }

    /// Moves what can be moved, sends what can be sent.
    pub(crate) fn pump(
        &mut self,
        now: Instant,
        interface: &mut Interface,
        device: &mut impl Device,
        counters: &Counters,
    ) -> Pumped {
        if self.program_reset {
            return Pumped::Over(self.end(End::ResetByProgram));
        }
        let mut more = true;
        for _ in 0..ROUNDS {
            let sent = self.feed_upstream();
            let received = self.feed_program();
            self.sent += sent;
            self.received += received;
            counters.bytes_sent.add(sent);
            counters.bytes_received.add(received);
            more = sent + received > 0;
            if more {
                self.progress = now;
            }
            self.pass_on_ends(now);
            self.egress(now, interface, device);
            if !more {
                break;
            }
        }
        if let Some(end) = self.over() {
            return Pumped::Over(self.end(end));
        }
        if self.progress + self.limit().into() <= now {
            if self.aborted {
                // Even the RST could not be sent.
                return Pumped::Over(self.end(End::TimedOut));
            }
            self.connection.abort();
            self.aborted = true;
            self.egress(now, interface, device);
            return Pumped::Over(self.end(End::TimedOut));
        }
        self.discard_if_idle(now);
        if more || self.upstream_is_ready() { Pumped::Again } else { Pumped::Wait }
    }

    /// Resets both sides, for a flow that must go now.
    pub(crate) fn abort(&mut self, now: Instant, interface: &mut Interface, device: &mut impl Device) {
        self.connection.abort();
        self.aborted = true;
        self.egress(now, interface, device);
        self.reset_upstream();
    }

    /// When [`pump`](Self::pump) must be called even if nothing happens.
    pub(crate) fn deadline(&self, now: Instant, interface: &mut Interface) -> Option<Instant> {
        let own = Some(self.progress + self.limit().into());
        let idle = self.could_discard().then(|| self.progress + IDLE.into());
        let stack = if self.settled { None } else { self.connection.poll_at(now, interface) };
        [own, idle, stack].into_iter().flatten().min()
    }

    /// Program to upstream; the number of bytes taken.
    fn feed_upstream(&mut self) -> u64 {
        let (mut total, upstream) = (0, &self.upstream);
        while !self.upstream_broken {
            let written = self.connection.receive(|bytes| match upstream.try_write(bytes) {
                Ok(n) => (n, Ok(n)),
                Err(error) => (0, Err(error)),
            });
            match written {
                Some(Ok(n)) => total += n as u64,
                Some(Err(error)) if is_transient(&error) => break,
                Some(Err(_)) => self.upstream_broken = true,
                None => break,
            }
        }
        total
    }

    /// Upstream to program; the number of bytes put into the ring.
    fn feed_program(&mut self) -> u64 {
        let mut total = 0;
        while self.early_taken < self.early.len() {
            let rest = &self.early[self.early_taken..];
            let taken = self.connection.send(|room| {
                let n = rest.len().min(room.len());
                room[..n].copy_from_slice(&rest[..n]);
                (n, n)
            });
            let Some(n) = taken else { return total };
            self.early_taken += n;
            total += n as u64;
        }
        if self.early.capacity() > 0 {
            (self.early, self.early_taken) = (Vec::new(), 0);
        }
        let upstream = &self.upstream;
        while !self.upstream_finished {
            let read = self.connection.send(|room| match upstream.try_read(room) {
                Ok(n) => (n, Ok(n)),
                Err(error) => (0, Err(error)),
            });
            match read {
                Some(Ok(0)) => self.upstream_finished = true,
                Some(Ok(n)) => total += n as u64,
                Some(Err(error)) if is_transient(&error) => break,
                Some(Err(_)) => (self.upstream_finished, self.upstream_broken) = (true, true),
                None => break,
            }
        }
        total
    }

    /// Tells each side that the other has ended.
    fn pass_on_ends(&mut self, now: Instant) {
        if !self.upstream_told && !self.upstream_broken && self.connection.finished() {
            self.upstream_told = true;
            self.progress = now;
            // Fails only when the upstream is gone, which reading tells as well.
            let _ = rustix::net::shutdown(&self.upstream, Shutdown::Write);
        }
        if !self.upstream_finished || self.aborted {
            return;
        }
        if !self.upstream_broken {
            if self.connection.may_send() {
                self.connection.close();
                self.progress = now;
            }
        } else if self.connection.send_queue() == 0 {
            self.connection.abort();
            self.aborted = true;
        }
    }

    fn egress(&mut self, now: Instant, interface: &mut Interface, device: &mut impl Device) {
        if self.settled {
            return;
        }
        while self.connection.egress(now, interface, device) {}
        self.settled = self.connection.state() == State::TimeWait && device.transmit(now).is_some();
    }

    /// How the flow ended, if it is over.
    fn over(&mut self) -> Option<End> {
        let gone = match self.connection.state() {
            State::Closed => !self.connection.has_peer(),
            State::TimeWait => self.settled,
            _ => false,
        };
        if !gone {
            return None;
        }
        if self.upstream_broken {
            return Some(End::ResetByUpstream);
        }
        // What the program sent before its FIN may still be on its way to the upstream.
        (self.upstream_told && self.upstream_finished).then_some(End::Finished)
    }

    /// How long nothing may happen.
    fn limit(&self) -> Duration {
        if self.upstream_broken {
            return UNANSWERED;
        }
        match self.connection.state() {
            State::Established | State::CloseWait if self.connection.send_queue() > 0 => UNACKNOWLEDGED,
            // As long as the system answers, every answer counts as progress.
            State::Established => KEEP_ALIVE * 3,
            State::FinWait2 => FIN_WAIT,
            State::CloseWait => CLOSE_WAIT,
            _ => UNANSWERED,
        }
    }

    fn end(&mut self, end: End) -> End {
        if end != End::Finished {
            self.reset_upstream();
        }
        end
    }

    /// Makes the closing of the upstream's socket a RST.
    fn reset_upstream(&self) {
        // Fails only for a socket that is no longer connected.
        let _ = self.upstream.set_zero_linger();
    }

    /// Asks to be woken for what could not be done; true when it can be done already.
    fn upstream_is_ready(&self) -> bool {
        let mut context = Context::from_waker(&self.waker);
        let read = !self.upstream_finished
            && self.connection.can_send()
            && self.upstream.poll_read_ready(&mut context).is_ready();
        let write = !self.upstream_broken
            && self.connection.receive_queue() > 0
            && self.upstream.poll_write_ready(&mut context).is_ready();
        read || write
    }

    /// True when the ring towards the program is empty and was used a good deal.
    fn could_discard(&self) -> bool {
        self.received - self.discarded_at >= SMALL && self.connection.send_queue() == 0
    }

    fn discard_if_idle(&mut self, now: Instant) {
        if self.could_discard() && self.progress + IDLE.into() <= now {
            self.connection.discard_send_ring();
            self.discarded_at = self.received;
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
