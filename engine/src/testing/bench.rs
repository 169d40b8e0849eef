//! A shard between doubles, fed packet by packet at times that the test chooses.

use std::sync::Arc;
use std::time::Duration;

use smoltcp::time::Instant;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::{Attempts, Double, Outside, Packets, Sent, tunnel};
use crate::config::Limits;
use crate::counters::Counters;
use crate::device::{Framing, Queue, Sender};
use crate::event::Event;
use crate::health::Health;
use crate::owner::Lookup;
use crate::packet::parse::{ACK, SYN};
use crate::shard::admission::{Admission, Totals};
use crate::shard::core::{Outcome, Parts, Shard};
use crate::shard::peers::{Peers, Stray};
use crate::table::FlowId;
use crate::upstream::{ConnectError, Sockets, Target};

/// Few flows, small rings.
pub(crate) const LIMITS: Limits = Limits { flows: 16, pending: 8, ring: 64 * 1024, memory: 64 << 20 };

/// A shard that is fed by hand. Its device is a [`Double`], maybe behind wrappers.
pub(crate) struct Bench<Q = Double> {
    pub(crate) shard: Shard<Q>,
    pub(crate) device: Double,
    pub(crate) attempts: Attempts,
    pub(crate) outside: Outside,
    pub(crate) outcomes: mpsc::UnboundedReceiver<(FlowId, Outcome)>,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) strays: mpsc::Receiver<Stray>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) now: Instant,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::framed(Framing::Bare)
    }

    pub(crate) fn framed(framing: Framing) -> Self {
        Self::wrapped(framing, LIMITS, |device| device)
    }

    /// The shards of one engine.
    pub(crate) fn shards(number: usize) -> Vec<Self> {
        let totals = Arc::new(Totals::new(LIMITS));
        let admission = || Admission::new(Arc::clone(&totals), None);
        let made = |ring| Self::made(Framing::Bare, LIMITS, admission(), |device| device, ring);
        Peers::ring(number).into_iter().map(made).collect()
    }

    /// With somebody who knows whose connections are.
    pub(crate) fn with_owners(limits: Limits, lookup: impl Lookup + 'static) -> Self {
        let admission = Admission::new(Arc::new(Totals::new(limits)), Some(Box::new(lookup)));
        Self::made(Framing::Bare, limits, admission, |device| device, Peers::ring(1).remove(0))
    }
}

impl<Q: Queue> Bench<Q> {
    /// With what `wrap` puts around the device.
    pub(crate) fn wrapped(framing: Framing, limits: Limits, wrap: impl FnOnce(Double) -> Q) -> Self {
        let admission = Admission::new(Arc::new(Totals::new(limits)), None);
        Self::made(framing, limits, admission, wrap, Peers::ring(1).remove(0))
    }

    fn made(
        framing: Framing,
        limits: Limits,
        admission: Admission,
        wrap: impl FnOnce(Double) -> Q,
        (peers, strays): (Peers, mpsc::Receiver<Stray>),
    ) -> Self {
        let (device, attempts, counters) = (Double::default(), Attempts::default(), Arc::<Counters>::default());
        let outside = Outside::default();
        let carried = matches!(framing, Framing::Ethernet(link) if link.udp);
        let (outcomes_in, outcomes) = mpsc::unbounded_channel();
        let (events_in, events) = mpsc::channel(1);
        let parts = Parts {
            sender: Sender::new(wrap(device.clone()), framing, Arc::clone(&counters)),
            mtu: 1500,
            limits,
            admission,
            seeds: [1, 2],
            dial: attempts.dial(),
            sockets: carried.then(|| Box::new(outside.clone()) as Box<dyn Sockets>),
            outcomes: outcomes_in,
            health: Arc::new(Health::new(events_in)),
            peers,
            counters: Arc::clone(&counters),
        };
        let now = Instant::from_secs(1);
        let shard = Shard::new(parts, now).unwrap();
        Self { shard, device, attempts, outside, outcomes, events, strays, counters, now }
    }

    pub(crate) fn feed(&mut self, packet: &[u8]) {
        self.shard.frame(self.now, packet);
    }

    pub(crate) fn turn(&mut self) {
        self.shard.turn(self.now);
    }

    pub(crate) fn later(&mut self, seconds: u64) {
        self.now += smoltcp::time::Duration::from_secs(seconds);
        self.turn();
    }

    /// Takes in what other shards handed over; the number of segments.
    pub(crate) fn take_strays(&mut self) -> usize {
        let mut number = 0;
        while let Ok(stray) = self.strays.try_recv() {
            self.shard.stray(self.now, &stray);
            number += 1;
        }
        self.turn();
        number
    }

    /// Hands the next outcome to the shard.
    pub(crate) async fn outcome(&mut self) {
        let (id, outcome) = self.outcomes.recv().await.unwrap();
        self.shard.connected(self.now, id, outcome);
        self.turn();
    }

    pub(crate) async fn refuse(&mut self, error: ConnectError) {
        let (_, answer) = self.attempt().await;
        answer.send(Err(error)).unwrap();
        self.outcome().await;
    }

    pub(crate) async fn attempt(&mut self) -> (Target, tokio::sync::oneshot::Sender<Outcome>) {
        loop {
            match self.attempts.next() {
                Some(attempt) => return attempt,
                None => tokio::task::yield_now().await,
            }
        }
    }

    /// Lets the upstream accept the next attempt; gives its far end and the SYN-ACK.
    pub(crate) async fn accept(&mut self, early: &[u8]) -> (TcpStream, Sent) {
        let (_, answer) = self.attempt().await;
        let (tunnel, far) = tunnel(early).await;
        answer.send(Ok(tunnel)).unwrap();
        self.outcome().await;
        let syn_ack = self.one();
        assert_eq!(syn_ack.flags, SYN | ACK);
        (far, syn_ack)
    }

    /// An established flow: what it takes to go on with it.
    pub(crate) async fn establish(&mut self, packets: Packets) -> (TcpStream, i32) {
        self.feed(&packets.syn(100));
        let (far, syn_ack) = self.accept(b"").await;
        self.feed(&packets.tcp(ACK, 101, syn_ack.seq.wrapping_add(1), b""));
        self.turn();
        (far, syn_ack.seq.wrapping_add(1))
    }

    /// The only segment that was sent.
    pub(crate) fn one(&self) -> Sent {
        let mut sent = self.device.take_tcp();
        assert_eq!(sent.len(), 1, "{sent:?}");
        sent.remove(0)
    }

    /// Turns until the device has something, as a woken loop would.
    pub(crate) async fn sent(&mut self) -> Vec<Sent> {
        for _ in 0..1000 {
            self.turn();
            let sent = self.device.take_tcp();
            if !sent.is_empty() {
                return sent;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("nothing was sent");
    }

    pub(crate) fn flows(&mut self) -> Vec<&'static str> {
        self.shard.flows(self.now, 100, 0, 1).iter().map(|flow| flow.state).collect()
    }
}
