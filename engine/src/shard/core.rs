//! What happens to a packet, an answer of the upstream, a timer.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::Waker;
use std::time::Duration;

use smoltcp::iface::{Interface, SocketSet};
use smoltcp::phy::DeviceCapabilities;
use smoltcp::time::Instant;
use smoltcp::wire::HardwareAddress;
use tokio::sync::mpsc::UnboundedSender;

use super::admission::{Admission, Refused};
use super::bucket::Bucket;
use super::peers::{HandedOver, Peers, Stray};
use super::ready::{Ready, Waking};
use super::udp::Udp;
use crate::config::Limits;
use crate::counters::Counters;
use crate::device::{Content, Port, Queue, Sender};
use crate::event::FlowInfo;
use crate::flow::{Flow, Pending, Stage, state_name};
use crate::health::Health;
use crate::packet::parse::{self, Packet, RST, SYN, Segment};
use crate::relay::{End, Pumped, Relay};
use crate::sys::{Connection, Slab};
use crate::table::{FlowId, Table};
use crate::timer::{Armed, Timers};
use crate::upstream::{ConnectError, Shortage, Sockets, Target, Tunnel};

/// A deadline is never closer than this, so that no state of a socket can spin the loop.
const TICK: smoltcp::time::Duration = smoltcp::time::Duration::from_millis(1);
/// RFC 9293 section 3.7.1: what a SYN without the option means. smoltcp takes it for IPv6 too.
const DEFAULT_MSS: u16 = 536;
/// What smoltcp (like Linux) raises a smaller MSS to.
const MIN_MSS: u16 = 48;

/// Flows that are looked at in one turn.
const FLOWS: usize = 64;
/// Refusals told to the log per second.
const LOG_RATE: u32 = 5;

/// The way to an upstream: the seam between flows and [`Connector`](crate::upstream::Connector).
pub(crate) type Dial = Arc<dyn Fn(Target) -> Attempt + Send + Sync>;
/// One attempt; dropping it gives it up.
pub(crate) type Attempt = Pin<Box<dyn Future<Output = Outcome> + Send>>;
/// How an attempt ended.
pub(crate) type Outcome = Result<Tunnel, ConnectError>;

/// What a shard is made of.
pub(crate) struct Parts<Q> {
    /// The device.
    pub(crate) sender: Sender<Q>,
    /// MTU of the device.
    pub(crate) mtu: u16,
    /// Bounds of the whole engine.
    pub(crate) limits: Limits,
    /// Who may open a flow.
    pub(crate) admission: Admission,
    /// What initial sequence numbers come from, for IPv4 and IPv6. They must not repeat between runs.
    pub(crate) seeds: [u64; 2],
    /// The way out.
    pub(crate) dial: Dial,
    /// The way out for datagrams of a guest's, if it has one.
    pub(crate) sockets: Option<Box<dyn Sockets>>,
    /// Where outcomes of attempts go; they come back through [`Shard::connected`].
    pub(crate) outcomes: UnboundedSender<(FlowId, Outcome)>,
    /// What the upstream's state is told by.
    pub(crate) health: Arc<Health>,
    /// The other shards.
    pub(crate) peers: Peers,
    /// This shard's counters.
    pub(crate) counters: Arc<Counters>,
}

/// The flows of one queue.
pub(crate) struct Shard<Q> {
    /// The device.
    pub(crate) sender: Sender<Q>,
    ready: Arc<Ready<FlowId>>,
    table: Table<Flow>,
    admission: Admission,
    dirty: VecDeque<FlowId>,
    woken: Vec<FlowId>,
    /// Flows that could not send because the device would block.
    stalled: Vec<FlowId>,
    timers: Timers,
    slab: Slab,
    v4: Stack,
    v6: Stack,
    nobody: SocketSet<'static>,
    udp: Udp,
    log: Bucket,
    dial: Dial,
    outcomes: UnboundedSender<(FlowId, Outcome)>,
    health: Arc<Health>,
    peers: Peers,
    counters: Arc<Counters>,
}

struct Stack {
    interface: Interface,
    capabilities: DeviceCapabilities,
}

impl Stack {
    fn new<Q: Queue>(sender: &mut Sender<Q>, mtu: u16, seed: u64, v6: bool, now: Instant) -> Self {
        let capabilities = sender.framing().capabilities(mtu, v6);
        let mut config = smoltcp::iface::Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut port = Port { packet: None, sender, capabilities: &capabilities, mss6: 0 };
        let mut interface = Interface::new(config, &mut port, now);
        // Takes packets for every address, without routes or addresses of its own.
        interface.set_any_ip(true);
        Self { interface, capabilities }
    }

    fn port<'a, Q: Queue>(
        &'a mut self,
        sender: &'a mut Sender<Q>,
        packet: Option<&'a [u8]>,
        mss6: u16,
    ) -> (&'a mut Interface, Port<'a, Q>) {
        (&mut self.interface, Port { packet, sender, capabilities: &self.capabilities, mss6 })
    }
}

impl<Q: Queue> Shard<Q> {
    /// A shard without flows.
    ///
    /// # Errors
    /// mmap(2)'s for the rings.
    pub(crate) fn new(mut parts: Parts<Q>, now: Instant) -> io::Result<Self> {
        let [seed4, seed6] = parts.seeds;
        let v4 = Stack::new(&mut parts.sender, parts.mtu, seed4, false, now);
        let v6 = Stack::new(&mut parts.sender, parts.mtu, seed6, true, now);
        Ok(Self {
            slab: Slab::new(parts.limits.ring.saturating_mul(2), parts.limits.flows, parts.admission.memory())?,
            sender: parts.sender,
            ready: Arc::default(),
            table: Table::default(),
            admission: parts.admission,
            dirty: VecDeque::new(),
            woken: Vec::new(),
            stalled: Vec::new(),
            timers: Timers::default(),
            v4,
            v6,
            nobody: SocketSet::new(Vec::new()),
            udp: Udp::new(parts.sockets, parts.mtu, Arc::clone(&parts.health), Arc::clone(&parts.counters), now),
            log: Bucket::new(LOG_RATE, now),
            dial: parts.dial,
            outcomes: parts.outcomes,
            health: parts.health,
            peers: parts.peers,
            counters: parts.counters,
        })
    }

    /// Takes in one frame of the device's.
    pub(crate) fn frame(&mut self, now: Instant, frame: &[u8]) {
        let (packet, vouched_for) = match self.sender.framing().split(frame) {
            Ok(Content::Packet(packet, vouched_for)) => (packet, vouched_for),
            Ok(Content::WhoHasGateway) => {
                self.counters.arp_answered.increment();
                self.sender.answer_who_has();
                return;
            }
            Err(reason) => {
                self.counters.dropped(reason).increment();
                return;
            }
        };
        self.counters.packets_in.increment();
        self.counters.bytes_in.add(packet.len() as u64);
        match parse::parse(packet, vouched_for) {
            Ok(Packet::Tcp(segment)) => self.segment(now, &segment),
            Ok(Packet::Udp { packet, source, destination }) => {
                self.udp.packet(now, packet, source, destination, &mut self.sender);
            }
            Err(reason) => self.counters.dropped(reason).increment(),
        }
    }

    fn segment(&mut self, now: Instant, segment: &Segment<'_>) {
        let Some(id) = self.table.find(&segment.tuple) else {
            if segment.opens() {
                self.open(now, segment);
            } else {
                self.unknown(now, segment, 0);
            }
            return;
        };
        let Some(flow) = self.table.get_mut(id) else { return };
        match &mut flow.stage {
            Stage::Pending(pending) if segment.opens() => {
                self.counters.syn_repeated.increment();
                pending.asked_again(now);
            }
            Stage::Pending(_) => {
                // Before a SYN-ACK nothing else than a RST makes sense.
                if segment.flags & RST != 0 {
                    self.counters.flows_cancelled.increment();
                    self.remove(id);
                }
            }
            Stage::Open(relay) if segment.opens() && relay.is_replaced_by(segment.sequence()) => {
                relay.replaced();
                self.table.detach(&segment.tuple);
                self.mark(id);
                self.open(now, segment);
            }
            Stage::Open(_) => self.ingress(now, id, segment),
        }
    }

    /// A segment of no flow of this shard's. `asked` shards looked at it before.
    fn unknown(&mut self, now: Instant, segment: &Segment<'_>, asked: usize) {
        match self.peers.hand_over(segment.packet, asked) {
            HandedOver::Yes => {}
            HandedOver::Full => self.counters.drop_handover.increment(),
            HandedOver::Nobody if segment.flags & RST != 0 => {}
            HandedOver::Nobody => {
                self.counters.unknown_flow.increment();
                self.refuse(now, segment.packet, segment.tuple.is_v6());
            }
        }
    }

    /// Takes in a segment that another shard knows nothing of.
    pub(crate) fn stray(&mut self, now: Instant, stray: &Stray) {
        // It was checked when it came.
        let Ok(Packet::Tcp(segment)) = parse::parse(&stray.packet, true) else { return };
        if self.table.find(&segment.tuple).is_some() {
            self.counters.segments_handed_over.increment();
            self.segment(now, &segment);
        } else {
            self.unknown(now, &segment, stray.asked);
        }
    }

    /// A program's first packet: asks the upstream, and answers when that has.
    fn open(&mut self, now: Instant, segment: &Segment<'_>) {
        let place = match self.admission.admit(&segment.tuple) {
            Ok(place) => place,
            Err(refused) => {
                self.refused(refused).increment();
                self.refuse(now, segment.packet, segment.tuple.is_v6());
                return;
            }
        };
        let tuple = segment.tuple;
        let (dial, outcomes) = (Arc::clone(&self.dial), self.outcomes.clone());
        let id = self.table.insert(tuple, |id| {
            let target = Target::Address(SocketAddr::new(tuple.destination, tuple.destination_port));
            let attempt = tokio::spawn(async move {
                let outcome = dial(target).await;
                // Fails only when the shard is gone.
                let _ = outcomes.send((id, outcome));
            });
            let pending = Pending::new(segment.without_payload(), attempt.abort_handle(), now);
            Flow {
                tuple,
                since: now,
                armed: Armed::default(),
                dirty: false,
                stalled: false,
                place,
                stage: Stage::Pending(pending),
            }
        });
        self.arm(now, id);
    }

    fn refused(&self, reason: Refused) -> &crate::counters::Counter {
        match reason {
            Refused::Full => &self.counters.flows_refused_full,
            Refused::Pending => &self.counters.flows_refused_pending,
            Refused::Memory => &self.counters.flows_refused_memory,
            Refused::Unfair => &self.counters.flows_refused_fair,
        }
    }

    /// The upstream answered the attempt of `id`.
    pub(crate) fn connected(&mut self, now: Instant, id: FlowId, outcome: Outcome) {
        let Some(flow) = self.table.get_mut(id) else {
            self.record(now, outcome);
            return;
        };
        let Stage::Pending(pending) = &mut flow.stage else { return };
        let (syn, tuple) = (std::mem::take(&mut pending.syn), flow.tuple);
        if let Err(error) = &outcome {
            self.failed(error).increment();
        }
        let Some(tunnel) = self.record(now, outcome) else {
            self.remove(id);
            self.refuse(now, &syn, tuple.is_v6());
            return;
        };
        let syn = Segment { tuple, flags: SYN, packet: &syn, headers: syn.len() };
        let (address, port) = (tuple.destination.into(), tuple.destination_port);
        let listening = Connection::listen(&self.slab, address, port, syn.sequence(), timestamp);
        let Some(connection) = listening else {
            self.counters.flows_refused_full.increment();
            self.remove(id);
            self.refuse(now, syn.packet, tuple.is_v6());
            return;
        };
        self.counters.flows_opened.increment();
        let waker = Arc::new(Waking { key: id, ready: Arc::clone(&self.ready) });
        let mss = syn.mss().unwrap_or(DEFAULT_MSS).max(MIN_MSS);
        if let Some(flow) = self.table.get_mut(id) {
            flow.place.answered();
            flow.stage = Stage::Open(Box::new(Relay::new(connection, tunnel, mss, waker, now)));
        }
        self.ingress(now, id, &syn);
    }

    fn failed(&self, error: &ConnectError) -> &crate::counters::Counter {
        match error {
            error if error.shortage() == Some(Shortage::Ports) => &self.counters.flows_refused_no_port,
            ConnectError::Local { .. } => &self.counters.flows_refused_no_socket,
            ConnectError::Forbidden(_) => &self.counters.flows_refused_forbidden,
            _ => &self.counters.flows_refused,
        }
    }

    fn record(&mut self, now: Instant, outcome: Outcome) -> Option<Tunnel> {
        match outcome {
            Ok(tunnel) => {
                self.health.record(Ok(&tunnel));
                Some(tunnel)
            }
            Err(error) => {
                if self.log.take(now) {
                    tracing::info!(error = &error as &dyn std::error::Error, "a connection was refused");
                }
                self.health.record(Err(error));
                None
            }
        }
    }

    /// Hands a segment to its flow. A FIN behind data goes alone, once all before it has come: smoltcp takes the FIN of a segment
    /// whose end exceeds the window for the end of what it takes.
    fn ingress(&mut self, now: Instant, id: FlowId, segment: &Segment<'_>) {
        let Some([data, fin]) = segment.split_fin() else { return self.hand_over(now, id, segment) };
        self.hand_over(now, id, &Segment { packet: &data, ..*segment });
        let fin = Segment { packet: &fin, ..*segment };
        if let Some(Flow { stage: Stage::Open(relay), .. }) = self.table.get_mut(id)
            && relay.connection.is_next(fin.sequence())
        {
            self.hand_over(now, id, &fin);
        }
    }

    fn hand_over(&mut self, now: Instant, id: FlowId, segment: &Segment<'_>) {
        let Some(flow) = self.table.get_mut(id) else { return };
        if let Stage::Open(relay) = &mut flow.stage {
            let length = segment.data().length;
            if length > 0 && segment.flags & RST == 0 && !relay.connection.may_take_in(length) {
                self.counters.drop_memory.increment();
                return;
            }
            let stack = if flow.tuple.is_v6() { &mut self.v6 } else { &mut self.v4 };
            let (interface, mut port) = stack.port(&mut self.sender, Some(segment.packet), relay.mss);
            relay.ingress(now, interface, &mut port, segment.data(), segment.flags & RST != 0);
        }
        self.mark(id);
    }

    /// Answers `packet` with a RST: no socket wants it.
    fn refuse(&mut self, now: Instant, packet: &[u8], v6: bool) {
        let stack = if v6 { &mut self.v6 } else { &mut self.v4 };
        let (interface, mut port) = stack.port(&mut self.sender, Some(packet), 0);
        interface.poll_ingress_single(now, &mut port, &mut self.nobody);
    }

    /// Puts `id` on the list of flows to be looked at.
    fn mark(&mut self, id: FlowId) {
        if let Some(flow) = self.table.get_mut(id)
            && !flow.dirty
        {
            flow.dirty = true;
            self.dirty.push_back(id);
        }
    }

    /// Wakes `shard` from now on when a socket has news.
    pub(crate) fn register(&self, shard: &Waker) {
        self.ready.register(shard);
        self.udp.register(shard);
    }

    /// True when [`turn`](Self::turn) has work at once.
    pub(crate) fn is_busy(&self) -> bool {
        !self.dirty.is_empty() || self.udp.is_busy() && !self.sender.is_blocked()
    }

    /// The device takes packets again.
    pub(crate) fn unblocked(&mut self) {
        for id in std::mem::take(&mut self.stalled) {
            if let Some(flow) = self.table.get_mut(id) {
                flow.stalled = false;
            }
            self.mark(id);
        }
    }

    /// Looks at flows that have news: woken, expired, or fed. First come, first served, and at most [`FLOWS`] before the
    /// device gets its turn again.
    pub(crate) fn turn(&mut self, now: Instant) {
        let mut woken = std::mem::take(&mut self.woken);
        self.ready.take(&mut woken);
        for id in woken.drain(..) {
            self.mark(id);
        }
        self.woken = woken;
        while let Some((deadline, id)) = self.timers.expired(now) {
            if self.table.get_mut(id).is_some_and(|flow| flow.armed.fired(deadline)) {
                self.mark(id);
            }
        }
        for _ in 0..self.dirty.len().min(FLOWS) {
            let Some(id) = self.dirty.pop_front() else { break };
            self.look_at(now, id);
        }
        self.udp.turn(now, &mut self.sender);
    }

    fn look_at(&mut self, now: Instant, id: FlowId) {
        let Some(flow) = self.table.get_mut(id) else { return };
        flow.dirty = false;
        match &mut flow.stage {
            Stage::Pending(pending) if pending.deadline() <= now => {
                self.counters.flows_cancelled.increment();
                self.remove(id);
            }
            Stage::Pending(_) => self.arm(now, id),
            Stage::Open(relay) => {
                let stack = if flow.tuple.is_v6() { &mut self.v6 } else { &mut self.v4 };
                let (interface, mut port) = stack.port(&mut self.sender, None, relay.mss);
                match relay.pump(now, interface, &mut port, &self.counters) {
                    Pumped::Over(end) => {
                        if end == End::Finished && relay.closed_first {
                            self.counters.flows_closed_first.increment();
                        }
                        self.count_end(end);
                        self.remove(id);
                    }
                    Pumped::Wait if self.sender.is_blocked() => {
                        if !flow.stalled {
                            flow.stalled = true;
                            self.stalled.push(id);
                        }
                    }
                    Pumped::Wait => self.arm(now, id),
                }
            }
        }
    }

    fn count_end(&self, end: End) {
        match end {
            End::Finished => {}
            End::ResetByProgram => self.counters.flows_reset_by_program.increment(),
            End::ResetByUpstream => self.counters.flows_reset_by_upstream.increment(),
            End::TimedOut => self.counters.flows_timed_out.increment(),
        }
    }

    fn arm(&mut self, now: Instant, id: FlowId) {
        let Some(flow) = self.table.get_mut(id) else { return };
        let deadline = match &flow.stage {
            Stage::Pending(pending) => Some(pending.deadline()),
            Stage::Open(relay) => {
                let stack = if flow.tuple.is_v6() { &mut self.v6 } else { &mut self.v4 };
                relay.deadline(now, &mut stack.interface)
            }
        };
        if let Some(deadline) = deadline {
            self.timers.arm(&mut flow.armed, id, deadline.max(now + TICK));
        }
    }

    /// When [`turn`](Self::turn) must be called even if nothing happens.
    pub(crate) fn next_deadline(&mut self) -> Option<Instant> {
        let flows = self.timers.next(|id| self.table.get_mut(id).map(|flow| flow.armed));
        [flows, self.udp.next_deadline()].into_iter().flatten().min()
    }

    fn remove(&mut self, id: FlowId) {
        let Some(tuple) = self.table.get_mut(id).map(|flow| flow.tuple) else { return };
        if let Some(Stage::Open(_)) = self.table.remove(id, &tuple).map(|flow| flow.stage) {
            self.counters.flows_closed.increment();
        }
    }

    /// What a shard without flows must not hold: flows, their places, waiting ones, memory, entries of lists, of timers, blocks of rings, frames,
    /// a guest's ports.
    #[cfg(any(test, feature = "harness"))]
    pub(crate) fn held(&self) -> [usize; 9] {
        let lists = self.dirty.len() + self.stalled.len();
        let (timers, blocks) = (self.timers.len(), self.slab.taken());
        let (places, pending) = self.admission.in_use();
        [
            self.table.len(),
            places,
            pending,
            self.admission.memory().held(),
            lists,
            timers,
            blocks,
            usize::from(self.sender.is_blocked()),
            self.udp.len(),
        ]
    }

    /// Bytes that are backed by memory, and that are counted.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> (usize, usize) {
        (self.slab.resident() * rustix::param::page_size(), self.admission.memory().held())
    }

    /// As if another shard's flows held so many bytes.
    #[cfg(test)]
    pub(crate) fn short_of_memory(&self, held: usize) {
        self.admission.memory().change(0, held);
    }

    /// Ends every flow with a RST to both sides, and closes a guest's ports.
    pub(crate) fn abort_all(&mut self, now: Instant) {
        let ids: Vec<_> = self.table.iter_mut().map(|(id, _)| id).collect();
        for id in ids {
            let Some(flow) = self.table.get_mut(id) else { continue };
            let v6 = flow.tuple.is_v6();
            match &mut flow.stage {
                Stage::Pending(pending) => {
                    let syn = std::mem::take(&mut pending.syn);
                    // A device that is stuck does not get thousands of frames queued at the very end.
                    if !self.sender.is_blocked() {
                        self.refuse(now, &syn, v6);
                    }
                }
                Stage::Open(relay) => {
                    let stack = if v6 { &mut self.v6 } else { &mut self.v4 };
                    let (interface, mut port) = stack.port(&mut self.sender, None, relay.mss);
                    relay.abort(now, interface, &mut port);
                }
            }
            self.remove(id);
        }
        self.udp.end();
    }

    /// At most `limit` flows, numbered so that they are unique among `shards` shards of which this is number `shard`.
    pub(crate) fn flows(&mut self, now: Instant, limit: usize, shard: u64, shards: u64) -> Vec<FlowInfo> {
        self.table
            .iter_mut()
            .take(limit)
            .map(|(id, flow)| {
                let (state, sent, received) = match &flow.stage {
                    Stage::Pending(_) => ("SYN-SENT", 0, 0),
                    Stage::Open(relay) => (state_name(relay.connection.state()), relay.sent, relay.received),
                };
                FlowInfo {
                    id: id.generation * shards + shard,
                    source: SocketAddr::new(flow.tuple.source, flow.tuple.source_port),
                    destination: SocketAddr::new(flow.tuple.destination, flow.tuple.destination_port),
                    state,
                    sent,
                    received,
                    age: (now - flow.since).total_millis(),
                }
            })
            .collect()
    }
}

/// Clock of TCP timestamps (RFC 7323 section 5.4), in milliseconds: one for all flows, so that it never runs backwards for a
/// port that is used again.
fn timestamp() -> u32 {
    static START: OnceLock<std::time::Instant> = OnceLock::new();
    let start = *START.get_or_init(std::time::Instant::now);
    // Starts above 0, and wraps as the RFC has it.
    (start.elapsed() + Duration::from_secs(1)).as_millis() as u32
}
