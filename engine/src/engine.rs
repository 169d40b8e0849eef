//! The engine as its controller sees it: threads, one per queue of a TUN device, or one for a virtual machine's link.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use smoltcp::time::Instant;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};

use crate::config::{Config, Limits, Link};
use crate::counters::Counters;
use crate::device::{Framing, Sender, Watched};
use crate::event::{Event, FlowInfo};
use crate::health::Health;
use crate::owner::Owners;
use crate::shard::admission::{Admission, Totals};
use crate::shard::core::{Dial, Parts, Shard};
use crate::shard::peers::{Peers, Stray};
use crate::shard::run::{Inputs, Request, run};
use crate::sys::{LinkQueue, TunQueue};
use crate::upstream::{Connector, Sockets, Upstream};

/// The most flows that [`Engine::flows`] tells.
const MAX_LISTED: usize = 10_000;
/// IPv6 needs this (RFC 8200 section 5).
const MIN_MTU: u16 = 1280;

/// A running engine. Dropping it stops it too, without waiting for the end and without giving the queues back.
#[derive(Debug)]
pub struct Engine {
    shards: Vec<Handle>,
}

#[derive(Debug)]
struct Handle {
    queue: Arc<OwnedFd>,
    counters: Arc<Counters>,
    requests: mpsc::Sender<Request>,
    ended: oneshot::Receiver<()>,
    thread: JoinHandle<()>,
}

/// Why an engine did not start. The queues are closed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An empty list of queues.
    #[error("the packet engine needs at least one queue of a TUN device")]
    NoQueue,
    /// The MTU is too small.
    #[error("an MTU of {0} bytes is too small; the least is {MIN_MTU}")]
    Mtu(u16),
    /// A descriptor is something else than a TUN queue.
    #[error("not a queue of a TUN device")]
    NotTun(#[source] io::Error),
    /// The descriptor is something else than one end of a link.
    #[error("not a link to a virtual machine")]
    NotLink(#[source] io::Error),
    /// No event loop for a queue (out of descriptors).
    #[error("cannot watch the packet engine's device")]
    Watch(#[source] io::Error),
    /// No thread for a queue.
    #[error("cannot start a thread for the packet engine")]
    Thread(#[source] io::Error),
    /// No address space for the flows' rings.
    #[error("cannot reserve memory for {flows} connections; lower the limit")]
    Memory {
        /// How many were asked for.
        flows: usize,
        /// mmap(2)'s answer.
        source: io::Error,
    },
}

impl Engine {
    /// Starts the engine: per queue one thread with flows, timers and upstream sockets of its own.
    ///
    /// `queues` are descriptors of one TUN device: `IFF_TUN | IFF_NO_PI | IFF_VNET_HDR`, with `IFF_MULTI_QUEUE` if there are
    /// several, and `TUNSETOFFLOAD` with `TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6` (linux/if_tun.h). A device without
    /// `IFF_VNET_HDR` works too, at several times the CPU time. They are made non-blocking. `events` is never waited for
    /// while packets are to be handled; with a full channel the news is told later.
    ///
    /// Blocks for the moment that the threads take to start.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(queues: Vec<OwnedFd>, config: Config, events: mpsc::Sender<Event>) -> Result<Self, StartError> {
        let opened = |fd| {
            let fd = Arc::new(fd);
            let queue = TunQueue::new(Arc::clone(&fd));
            let framing = queue.framing().map_err(StartError::NotTun)?;
            Ok((fd, queue, framing))
        };
        let queues = queues.into_iter().map(opened).collect::<Result<Vec<_>, _>>()?;
        if queues.is_empty() {
            return Err(StartError::NoQueue);
        }
        Self::launch(queues, config, None, &events)
    }

    /// Starts the engine as a virtual machine's only way out: one thread behind its link.
    ///
    /// `link` is one end of a `socketpair(AF_UNIX, SOCK_SEQPACKET)`, whose other end is QEMU's `-netdev dgram`: a packet is an Ethernet
    /// frame, whole and with its checksums. It is made non-blocking. The guest is taken for hostile: only IPv4 from `ends.guest` is
    /// taken in, and only ARP's question for `ends.gateway` answered. What it may connect or send to is what `config.connector` allows:
    /// see [`Connector::refused`](crate::upstream::Connector::refused). Connections that another engine had on this link get a RST.
    ///
    /// [`Event::DeviceLost`] tells that the other end was closed.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start_link(
        link: OwnedFd,
        ends: Link,
        config: Config,
        events: mpsc::Sender<Event>,
    ) -> Result<Self, StartError> {
        let fd = Arc::new(link);
        let queue = LinkQueue::new(Arc::clone(&fd)).map_err(StartError::NotLink)?;
        let carried = ends.udp && matches!(config.connector.upstream, Upstream::Direct);
        let datagrams = carried.then(|| Arc::clone(&config.connector));
        Self::launch(vec![(fd, queue, Framing::Ethernet(ends))], config, datagrams, &events)
    }

    fn launch<Q: Watched>(
        queues: Vec<(Arc<OwnedFd>, Q, Framing)>,
        config: Config,
        datagrams: Option<Arc<Connector>>,
        events: &mpsc::Sender<Event>,
    ) -> Result<Self, StartError> {
        let connector = Arc::clone(&config.connector);
        let dial: Dial = Arc::new(move |target| {
            let connector = Arc::clone(&connector);
            Box::pin(async move { connector.connect(&target).await })
        });
        if config.mtu < MIN_MTU {
            return Err(StartError::Mtu(config.mtu));
        }
        let count = queues.len();
        let totals = Arc::new(Totals::new(config.limits));
        let health = Arc::new(Health::new(events.clone()));
        let mut shards = Vec::with_capacity(count);
        for (number, (queue, (peers, strays))) in queues.into_iter().zip(Peers::ring(count)).enumerate() {
            let setup = Setup {
                number: (number as u64, count as u64),
                peers,
                strays,
                mtu: config.mtu,
                limits: config.limits,
                totals: Arc::clone(&totals),
                owners: config.owners.clone(),
                datagrams: datagrams.clone(),
                dial: Arc::clone(&dial),
                health: Arc::clone(&health),
                events: events.clone(),
            };
            // On an error the shards that run already see their channel closed and end.
            shards.push(setup.spawn(queue)?);
        }
        Ok(Self { shards })
    }

    /// Everything that was counted, summed over the queues, by name (kebab-case).
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        Counters::sum(self.shards.iter().map(|shard| &*shard.counters))
    }

    /// The flows, at most 10,000 of them.
    pub async fn flows(&self) -> Vec<FlowInfo> {
        let mut flows = Vec::new();
        for shard in &self.shards {
            let (reply, answer) = oneshot::channel();
            // A shard that failed has no flows.
            if shard.requests.send(Request::Flows(MAX_LISTED - flows.len(), reply)).await.is_ok() {
                flows.extend(answer.await.unwrap_or_default());
            }
        }
        flows
    }

    /// Ends every flow with a RST to its program and to its upstream, waits for the threads, and gives the queues back.
    pub async fn stop(self) -> Vec<OwnedFd> {
        for shard in &self.shards {
            // A shard that failed has ended already.
            let _ = shard.requests.send(Request::Stop).await;
        }
        let mut queues = Vec::with_capacity(self.shards.len());
        for shard in self.shards {
            // An error says the same: the thread is at its end.
            let _ = shard.ended.await;
            let _ = shard.thread.join();
            queues.extend(Arc::into_inner(shard.queue));
        }
        queues
    }
}

/// What a shard's thread is given.
struct Setup {
    number: (u64, u64),
    peers: Peers,
    strays: mpsc::Receiver<Stray>,
    mtu: u16,
    limits: Limits,
    totals: Arc<Totals>,
    owners: Option<Arc<dyn Owners>>,
    datagrams: Option<Arc<Connector>>,
    dial: Dial,
    health: Arc<Health>,
    events: mpsc::Sender<Event>,
}

impl Setup {
    fn spawn<Q: Watched>(self, (fd, queue, framing): (Arc<OwnedFd>, Q, Framing)) -> Result<Handle, StartError> {
        let runtime = Builder::new_current_thread().enable_all().build().map_err(StartError::Watch)?;
        let watched = {
            let _context = runtime.enter();
            queue.watch().map_err(StartError::Watch)?
        };
        let counters = Arc::<Counters>::default();
        let (requests, requested) = mpsc::channel(4);
        let (ending, ended) = oneshot::channel();
        let (starting, started) = std::sync::mpsc::sync_channel(1);
        let sender = Sender::new(queue, framing, Arc::clone(&counters));
        let shard_counters = Arc::clone(&counters);
        let name = format!("engine-{}", self.number.0);
        let main = move || {
            let events = self.events.clone();
            let caught = catch_unwind(AssertUnwindSafe(|| {
                self.main(&runtime, sender, shard_counters, watched, requested, &starting);
                drop(runtime);
            }));
            if caught.is_err() {
                tracing::error!("the packet engine failed; this is a bug");
                // Nobody may wait here for a controller that waits for this thread; `stop` shows the end as well.
                let _ = events.try_send(Event::Failed("the packet engine failed; this is a bug".into()));
            }
            let _ = ending.send(());
        };
        let thread = std::thread::Builder::new().name(name).spawn(main).map_err(StartError::Thread)?;
        match started.recv() {
            Ok(Ok(())) => Ok(Handle { queue: fd, counters, requests, ended, thread }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(StartError::Thread(io::Error::other("the thread ended at once"))),
        }
    }

    fn main<Q: Watched>(
        self,
        runtime: &Runtime,
        sender: Sender<Q>,
        counters: Arc<Counters>,
        queue: AsyncFd<Q>,
        requests: mpsc::Receiver<Request>,
        starting: &std::sync::mpsc::SyncSender<Result<(), StartError>>,
    ) {
        let (outcomes_in, outcomes) = mpsc::unbounded_channel();
        let parts = Parts {
            sender,
            mtu: self.mtu,
            limits: self.limits,
            admission: Admission::new(self.totals, self.owners.map(|owners| owners.lookup())),
            // The hash of anything under a fresh random key.
            seeds: [RandomState::new().hash_one(4), RandomState::new().hash_one(6)],
            dial: self.dial,
            sockets: self.datagrams.map(|connector| Box::new(connector) as Box<dyn Sockets>),
            outcomes: outcomes_in,
            health: self.health,
            peers: self.peers,
            counters,
        };
        let shard = match Shard::new(parts, Instant::ZERO) {
            Ok(shard) => shard,
            Err(source) => {
                // The starter waits for this.
                let _ = starting.send(Err(StartError::Memory { flows: self.limits.flows, source }));
                return;
            }
        };
        let _ = starting.send(Ok(()));
        let inputs =
            Inputs { queue, requests, outcomes, strays: self.strays, events: self.events, number: self.number };
        runtime.block_on(run(shard, inputs));
    }
}

#[cfg(test)]
mod tests;
