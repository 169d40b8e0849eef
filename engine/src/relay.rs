//! Carries bytes between a program's connection and the upstream's socket, without a copy in between, and translates each
//! side's end (FIN, RST, silence) into the same end on the other.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use rustix::net::Shutdown;
use smoltcp::iface::Interface;
use smoltcp::phy::Device;
use smoltcp::socket::tcp::State;
use smoltcp::time::Instant;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::counters::Counters;
use crate::packet::parse::Data;
use crate::sys::Connection;
use crate::upstream::{self, Tunnel};

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
/// Idle for so long, and a flow comes to rest: its rings give their memory back.
const IDLE: Duration = Duration::from_secs(5);
/// Flows come to rest at full seconds, so that many of them share a wake-up.
const REST_GRAIN: Duration = Duration::from_secs(1);

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
    /// The program finished before the upstream did.
    pub(crate) closed_first: bool,
    /// The upstream's socket failed. The program gets what came before, then a RST.
    upstream_broken: bool,
    program_reset: bool,
    aborted: bool,
    /// The last ACK of TIME-WAIT is out. Nothing more is sent: smoltcp's own timer would wipe what is not yet relayed.
    settled: bool,
    /// When something last happened that a silent side could have failed to do.
    progress: Instant,
    /// Nothing was moved since the flow came to rest.
    rests: bool,
    /// The upstream's socket is asked to find out about a peer that vanished.
    kept_alive: bool,
    /// The upstream's socket holds back no more than it should.
    unsent_limited: bool,
}

/// What [`Relay::pump`] leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
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
            closed_first: false,
            upstream_broken: false,
            program_reset: false,
            aborted: false,
            settled: false,
            progress: now,
            rests: false,
            kept_alive: false,
            unsent_limited: false,
        }
    }

    /// Takes in one of the program's packets; `reset` when its RST flag is set.
    pub(crate) fn ingress(
        &mut self,
        now: Instant,
        interface: &mut Interface,
        device: &mut impl Device,
        data: Data,
        reset: bool,
    ) {
        let before = self.connection.state();
        if reset && before == State::TimeWait {
            // RFC 1337: a reset of what is over. The upstream may still have to take what the program sent.
            return;
        }
        self.connection.ingress(now, interface, device, data);
        let after = self.connection.state();
        self.progress = now;
        // A RST in SYN-RECEIVED makes smoltcp listen again.
        if reset && before != after && matches!(after, State::Closed | State::Listen) {
            self.program_reset = true;
        }
    }

    /// True when a SYN of number `sequence` begins a new connection on this 4-tuple: it is no repetition of this one's.
    pub(crate) fn is_replaced_by(&self, sequence: u32) -> bool {
        self.has_left() || !self.connection.was_opened_by(sequence)
    }

    /// The program's system has begun a new connection on this 4-tuple. If it still had this one, the end of that was lost.
    pub(crate) fn replaced(&mut self) {
        self.program_reset |= !self.has_left();
    }

    /// True when this connection needs no more packets of the program's.
    fn has_left(&self) -> bool {
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
        // Both go on until there is nothing to move or no room for it; what changes that comes with a packet or a wake-up.
        let sent = self.feed_upstream();
        let received = self.feed_program();
        if sent + received > 0 {
            self.sent += sent;
            self.received += received;
            counters.bytes_sent.add(sent);
            counters.bytes_received.add(received);
            self.progress = now;
            self.rests = false;
        }
        if !self.unsent_limited && self.sent >= u64::from(upstream::UNSENT) {
            self.unsent_limited = true;
            // Fails only for a socket that is gone, which reading tells as well.
            let _ = upstream::limit_unsent(&self.upstream);
        }
        self.pass_on_ends(now);
        self.egress(now, interface, device);
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
        self.rest_if_idle(now);
        Pumped::Wait
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
        let idle = (!self.rests).then(|| round_up(self.progress + IDLE.into(), REST_GRAIN));
        let stack = if self.settled { None } else { self.connection.poll_at(now, interface) };
        [own, idle, stack].into_iter().flatten().min()
    }

    /// Program to upstream; the number of bytes taken. Asks to be woken if the upstream could not take all.
    fn feed_upstream(&mut self) -> u64 {
        let Self { connection, upstream, waker, .. } = self;
        let mut context = Context::from_waker(waker);
        let mut total = 0;
        while !self.upstream_broken {
            let written = connection.receive(|bytes| {
                let written = Pin::new(&mut *upstream).poll_write(&mut context, bytes);
                (if let Poll::Ready(Ok(n)) = written { n } else { 0 }, written)
            });
            match written {
                Some(Poll::Ready(Ok(n @ 1..))) => total += n as u64,
                Some(Poll::Ready(Err(error))) if error.kind() == io::ErrorKind::Interrupted => {}
                Some(Poll::Ready(_)) => self.upstream_broken = true,
                Some(Poll::Pending) | None => break,
            }
        }
        if self.upstream_broken {
            // Nobody takes it any more. With a closed window smoltcp would not see what the program acknowledges either.
            while self.connection.receive(|bytes| (bytes.len(), ())).is_some() {}
        }
        total
    }

    /// Upstream to program; the number of bytes put into the ring. Asks to be woken if there is room for more.
    fn feed_program(&mut self) -> u64 {
        let mut total = self.feed_early();
        if !self.early.is_empty() {
            return total;
        }
        let Self { connection, upstream, waker, .. } = self;
        let mut context = Context::from_waker(waker);
        while !self.upstream_finished {
            let read = connection.send(|room| {
                let mut room = ReadBuf::new(room);
                let read = Pin::new(&mut *upstream).poll_read(&mut context, &mut room);
                let n = room.filled().len();
                (n, read.map_ok(|()| n))
            });
            match read {
                Some(Poll::Ready(Ok(0))) => self.upstream_finished = true,
                Some(Poll::Ready(Ok(n))) => total += n as u64,
                Some(Poll::Ready(Err(error))) if error.kind() == io::ErrorKind::Interrupted => {}
                Some(Poll::Ready(Err(_))) => (self.upstream_finished, self.upstream_broken) = (true, true),
                Some(Poll::Pending) | None => break,
            }
        }
        total
    }

    /// What came with the proxy's answer, to the program; the number of bytes put into the ring.
    fn feed_early(&mut self) -> u64 {
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
        total
    }

    /// Tells each side that the other has ended.
    fn pass_on_ends(&mut self, now: Instant) {
        if !self.upstream_told && !self.upstream_broken && self.connection.finished() {
            self.upstream_told = true;
            self.closed_first = !self.upstream_finished;
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
        } else if !self.settled && self.connection.send_queue() == 0 {
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
            // The program is done, the upstream has yet to take the rest.
            State::TimeWait | State::Closed if !self.upstream_told => UNACKNOWLEDGED,
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

    fn rest_if_idle(&mut self, now: Instant) {
        if self.rests || now < self.progress + IDLE.into() {
            return;
        }
        self.rests = true;
        self.connection.discard_rings();
        // Not at the start: most flows end before a vanished peer could be noticed, and four system calls each are saved.
        if !self.kept_alive {
            self.kept_alive = true;
            // Fails only for a socket that is no longer connected.
            let _ = upstream::keep_alive(&self.upstream);
        }
    }
}

fn round_up(time: Instant, grain: Duration) -> Instant {
    let grain = i64::try_from(grain.as_micros()).unwrap_or(i64::MAX);
    let micros = time.total_micros();
    Instant::from_micros(micros.saturating_add((grain - micros.rem_euclid(grain)) % grain))
}
