//! UDP. A guest's leaves where its link says so: each of its ports gets a socket, whoever it sends to (RFC 4787 REQ-1), by which only
//! those get in that it has sent to (section 5, address and port-dependent filtering). All other UDP is refused.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use smoltcp::time::{Duration, Instant};

use super::bucket::Bucket;
use super::ready::{Ready, Waking};
use crate::counters::{Counter, Counters};
use crate::device::{Queue, Sender};
use crate::health::Health;
use crate::packet::icmp::port_unreachable;
use crate::packet::udp::{self, Datagram, HEADERS};
use crate::upstream::{ConnectError, Socket, Sockets};

/// Port-unreachable answers per second, and as many at once after a quiet time.
const UNREACHABLE_RATE: u32 = 1000;
/// Ports of the guest's that have a socket at a time. With [`PEERS`] this also bounds what the guest puts into the system's table of
/// connections, so no port has to make room for another one.
pub(super) const PORTS: usize = 256;
/// Others that one port has sent to within [`IDLE`].
pub(super) const PEERS: usize = 32;
/// Without a packet of the guest's for so long, a port and a peer are over (RFC 4787 REQ-5, REQ-6).
const IDLE: Duration = Duration::from_secs(120);
/// So long a peer may be sent to before the system is asked again whether it is still somebody else.
const TRUSTED: Duration = Duration::from_secs(10);
/// Datagrams that are taken in per turn, and of one socket before the next one has its turn.
const BATCH: usize = 64;
const SHARE: usize = 16;

/// What becomes of UDP.
pub(super) struct Udp {
    sockets: Option<Box<dyn Sockets>>,
    ports: HashMap<u16, Mapping>,
    /// When the next port may be over.
    look_at: Option<Instant>,
    ready: Arc<Ready<u16>>,
    woken: Vec<u16>,
    /// Ports that may have datagrams.
    waiting: VecDeque<u16>,
    /// A packet for the guest, and one byte more, which shows that one is too long.
    packet: Box<[u8]>,
    unreachable: Bucket,
    health: Arc<Health>,
    counters: Arc<Counters>,
}

/// One port of the guest's.
struct Mapping {
    socket: Box<dyn Socket>,
    guest: Ipv4Addr,
    peers: Vec<Peer>,
    ends: Instant,
    waker: Waker,
    /// It is among those that wait.
    waits: bool,
}

/// Whom a port has sent to.
struct Peer {
    address: SocketAddrV4,
    sent: Instant,
    permitted: Instant,
}

/// Why a packet is not sent.
enum Refused {
    Full,
    Peers,
    Connector(ConnectError),
}

impl Mapping {
    fn peer(&mut self, now: Instant, address: SocketAddrV4) -> Option<&mut Peer> {
        self.peers.iter_mut().find(|peer| peer.address == address && peer.sent + IDLE > now)
    }
}

impl Udp {
    /// Without `sockets` all is refused. `mtu` is the device's.
    pub(super) fn new(
        sockets: Option<Box<dyn Sockets>>,
        mtu: u16,
        health: Arc<Health>,
        counters: Arc<Counters>,
        now: Instant,
    ) -> Self {
        let room = if sockets.is_some() { usize::from(mtu) + 1 } else { 0 };
        Self {
            sockets,
            ports: HashMap::new(),
            look_at: None,
            ready: Arc::default(),
            woken: Vec::new(),
            waiting: VecDeque::new(),
            packet: vec![0; room].into(),
            unreachable: Bucket::new(UNREACHABLE_RATE, now),
            health,
            counters,
        }
    }

    /// Takes in a UDP packet of the device's: sends it, or says that nobody is there.
    pub(super) fn packet<Q: Queue>(
        &mut self,
        now: Instant,
        packet: &[u8],
        source: IpAddr,
        destination: IpAddr,
        sender: &mut Sender<Q>,
    ) {
        if self.sockets.is_some()
            && let (IpAddr::V4(source), IpAddr::V4(destination)) = (source, destination)
        {
            let sent = match udp::parse(packet, source, destination) {
                Ok(datagram) => self.send(now, source, &datagram),
                Err(reason) => return self.counters.dropped(reason).increment(),
            };
            match sent {
                Ok(()) => return,
                Err(refused) => self.refused(refused),
            }
        }
        if !self.unreachable.take(now) {
            self.counters.drop_udp_limit.increment();
        } else if let Some(answer) = port_unreachable(packet, source, destination) {
            self.counters.udp_unreachable.increment();
            sender.send_packet(&answer);
        }
    }

    fn refused(&self, refused: Refused) {
        let counter = match refused {
            Refused::Full => &self.counters.udp_refused_full,
            Refused::Peers => &self.counters.udp_refused_peers,
            Refused::Connector(error) => {
                let counter = self.failed(&error);
                self.health.record(Err(error));
                counter
            }
        };
        counter.increment();
    }

    fn failed(&self, error: &ConnectError) -> &Counter {
        match error {
            ConnectError::Forbidden(_) => &self.counters.udp_refused_forbidden,
            ConnectError::Local { .. } => &self.counters.udp_refused_no_socket,
            _ => &self.counters.udp_refused,
        }
    }

    fn send(&mut self, now: Instant, guest: Ipv4Addr, datagram: &Datagram<'_>) -> Result<(), Refused> {
        let (port, to) = (datagram.source_port, datagram.destination);
        let Some(sockets) = &self.sockets else { return Ok(()) };
        let known = self.ports.get_mut(&port).and_then(|mapping| mapping.peer(now, to));
        if known.is_none_or(|peer| peer.permitted + TRUSTED <= now) {
            sockets.permits(to).map_err(Refused::Connector)?;
            self.admit(now, guest, port, to)?;
        }
        let Some(mapping) = self.ports.get_mut(&port) else { return Ok(()) };
        if let Some(peer) = mapping.peer(now, to) {
            peer.sent = now;
        }
        mapping.ends = now + IDLE;
        self.look_at.get_or_insert(mapping.ends);
        // One that the system does not take is lost, as it would be on the way.
        match mapping.socket.send(datagram.payload, to) {
            Ok(()) => self.counters.udp_out.increment(),
            Err(_) => self.counters.drop_udp_send.increment(),
        }
        Ok(())
    }

    /// Lets `port` send to `peer`, which is permitted, and receive from it.
    fn admit(&mut self, now: Instant, guest: Ipv4Addr, port: u16, address: SocketAddrV4) -> Result<(), Refused> {
        let mapping = match self.ports.get_mut(&port) {
            Some(mapping) => mapping,
            None => self.open(now, guest, port, address)?,
        };
        if let Some(peer) = mapping.peer(now, address) {
            peer.permitted = now;
            return Ok(());
        }
        mapping.peers.retain(|peer| peer.sent + IDLE > now);
        if mapping.peers.len() >= PEERS {
            return Err(Refused::Peers);
        }
        mapping.peers.push(Peer { address, sent: now, permitted: now });
        Ok(())
    }

    fn open(&mut self, now: Instant, guest: Ipv4Addr, port: u16, peer: SocketAddrV4) -> Result<&mut Mapping, Refused> {
        if self.ports.len() >= PORTS {
            return Err(Refused::Full);
        }
        let Some(sockets) = &self.sockets else { return Err(Refused::Full) };
        let local = |source| Refused::Connector(ConnectError::Local { upstream: peer.to_string(), source });
        let socket = sockets.open().map_err(local)?;
        self.counters.udp_mappings.increment();
        let waker = Waker::from(Arc::new(Waking { key: port, ready: Arc::clone(&self.ready) }));
        // The first look at it asks to be woken.
        self.waiting.push_back(port);
        let mapping = Mapping { socket, guest, peers: Vec::new(), ends: now + IDLE, waker, waits: true };
        Ok(self.ports.entry(port).insert_entry(mapping).into_mut())
    }

    /// Wakes `shard` from now on when a socket has datagrams.
    pub(super) fn register(&self, shard: &Waker) {
        self.ready.register(shard);
    }

    /// True when [`turn`](Self::turn) has work at once, if the device takes packets.
    pub(super) fn is_busy(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// When [`turn`](Self::turn) must be called even if nothing happens.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.look_at
    }

    /// Ports that have a socket.
    #[cfg(any(test, feature = "harness"))]
    pub(super) fn len(&self) -> usize {
        self.ports.len()
    }

    /// Ends what is idle, and hands the guest what has come for it: first come, first served, as long as the device takes it.
    pub(super) fn turn<Q: Queue>(&mut self, now: Instant, sender: &mut Sender<Q>) {
        self.end_idle(now);
        let mut woken = std::mem::take(&mut self.woken);
        self.ready.take(&mut woken);
        for port in woken.drain(..) {
            if let Some(mapping) = self.ports.get_mut(&port)
                && !std::mem::replace(&mut mapping.waits, true)
            {
                self.waiting.push_back(port);
            }
        }
        self.woken = woken;
        let mut left = BATCH;
        while left > 0
            && !sender.is_blocked()
            && let Some(port) = self.waiting.pop_front()
        {
            left -= self.receive(now, port, left.min(SHARE), sender);
        }
    }

    fn end_idle(&mut self, now: Instant) {
        if self.look_at.is_none_or(|at| at > now) {
            return;
        }
        let before = self.ports.len();
        self.ports.retain(|_, mapping| mapping.ends > now);
        self.counters.udp_mappings_ended.add((before - self.ports.len()) as u64);
        // What is sent meanwhile only moves an end away.
        self.look_at = self.ports.values().map(|mapping| mapping.ends).min();
    }

    /// Receives at most `most` datagrams of one socket's; how many.
    fn receive<Q: Queue>(&mut self, now: Instant, port: u16, most: usize, sender: &mut Sender<Q>) -> usize {
        let Some(mapping) = self.ports.get_mut(&port) else { return 0 };
        let waker = mapping.waker.clone();
        let mut context = Context::from_waker(&waker);
        for taken in 0..most {
            if sender.is_blocked() {
                self.waiting.push_back(port);
                return taken;
            }
            let (length, from) = match mapping.socket.poll_receive(&mut context, &mut self.packet[HEADERS..]) {
                Poll::Ready(Ok(received)) => received,
                Poll::Ready(Err(_)) => {
                    self.ports.remove(&port);
                    self.counters.udp_mappings_ended.increment();
                    return taken;
                }
                Poll::Pending => {
                    mapping.waits = false;
                    return taken;
                }
            };
            let end = HEADERS + length;
            match from {
                SocketAddr::V4(from) if mapping.peer(now, from).is_some() => {
                    if end == self.packet.len() {
                        self.counters.drop_udp_long.increment();
                        continue;
                    }
                    self.counters.udp_in.increment();
                    udp::address(&mut self.packet[..end], from, SocketAddrV4::new(mapping.guest, port));
                    sender.send_packet(&self.packet[..end]);
                }
                _ => self.counters.drop_udp_stranger.increment(),
            }
        }
        self.waiting.push_back(port);
        most
    }

    /// Closes all sockets.
    pub(super) fn end(&mut self) {
        self.counters.udp_mappings_ended.add(self.ports.len() as u64);
        self.ports.clear();
        self.waiting.clear();
        self.look_at = None;
    }
}
