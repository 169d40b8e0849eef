//! The loop: one future that polls the device, the upstream sockets' wake-ups, outcomes, timers and the controller, does a
//! bounded amount of work per turn, and sleeps when there is none.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use smoltcp::time::Instant;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{Receiver, Sender, UnboundedReceiver};
use tokio::sync::oneshot;

use super::core::{Outcome, Shard};
use super::peers::Stray;
use crate::device::{MAX_FRAME, Watched};
use crate::event::{Event, FlowInfo};
use crate::table::FlowId;

/// Packets, and outcomes of attempts, that are taken in before the flows get their turn.
const BATCH: usize = 64;

/// What the engine asks of a shard.
#[derive(Debug)]
pub(crate) enum Request {
    /// At most so many flows.
    Flows(usize, oneshot::Sender<Vec<FlowInfo>>),
    /// End.
    Stop,
}

/// What a shard listens to.
pub(crate) struct Inputs<Q: Watched> {
    /// The queue that the shard's sender writes to.
    pub(crate) queue: AsyncFd<Q>,
    /// The controller; closed means stop.
    pub(crate) requests: Receiver<Request>,
    /// Outcomes of the shard's attempts.
    pub(crate) outcomes: UnboundedReceiver<(FlowId, Outcome)>,
    /// Segments that other shards know nothing of.
    pub(crate) strays: Receiver<Stray>,
    /// Who is told about the end of the device.
    pub(crate) events: Sender<Event>,
    /// Number of this shard, and of all.
    pub(crate) number: (u64, u64),
}

/// Why the loop ended.
enum End {
    Stopped,
    DeviceLost(io::Error),
}

/// Runs `shard` until it is told to stop. A lost device is told once; then only requests are answered.
pub(crate) async fn run<Q: Watched>(mut shard: Shard<Q>, mut inputs: Inputs<Q>) {
    let clock = Clock::new();
    let end = tokio::task::coop::unconstrained(turns(&mut shard, &mut inputs, &clock)).await;
    shard.abort_all(clock.now());
    let End::DeviceLost(error) = end else { return };
    tracing::warn!(error = &error as &dyn std::error::Error, "the device of the packet engine is lost");
    let mut event = Some(Event::DeviceLost(error));
    loop {
        tokio::select! {
            permit = inputs.events.reserve(), if event.is_some() => {
                if let (Ok(permit), Some(event)) = (permit, event.take()) {
                    permit.send(event);
                }
            },
            request = inputs.requests.recv() => match request {
                // Dropping the sender would do as well; an empty list is the truth.
                Some(Request::Flows(_, reply)) => drop(reply.send(Vec::new())),
                Some(Request::Stop) | None => return,
            },
        }
    }
}

async fn turns<Q: Watched>(shard: &mut Shard<Q>, inputs: &mut Inputs<Q>, clock: &Clock) -> End {
    let mut frame = vec![0; MAX_FRAME];
    let mut alarm = Alarm::new(clock);
    let Inputs { queue, requests, outcomes, strays, number, .. } = inputs;
    let queue = &*queue;
    let mut gone = pin!(gone(queue));
    poll_fn(|context| {
        let now = clock.now();
        shard.register(context.waker());
        while let Poll::Ready(request) = requests.poll_recv(context) {
            match request {
                Some(Request::Flows(limit, reply)) => {
                    // The asker may have gone.
                    let _ = reply.send(shard.flows(now, limit, number.0, number.1));
                }
                Some(Request::Stop) | None => return Poll::Ready(End::Stopped),
            }
        }
        if let Poll::Ready(error) = gone.as_mut().poll(context) {
            return Poll::Ready(End::DeviceLost(error));
        }
        let mut busy = false;
        if unblocked(shard, queue, context) {
            match take_frames(shard, queue, context, now, &mut frame) {
                Ok(more) => busy = more,
                Err(error) => return Poll::Ready(End::DeviceLost(error)),
            }
            busy |= take_outcomes(shard, outcomes, context, now);
            busy |= take_strays(shard, strays, context, now);
        }
        shard.turn(now);
        if let Some(error) = shard.sender.take_lost() {
            return Poll::Ready(End::DeviceLost(error));
        }
        if shard.sender.is_blocked() {
            // Registers for the moment when the device takes frames again.
            busy |= unblocked(shard, queue, context);
        }
        if busy || shard.is_busy() || alarm.poll(context, now, shard.next_deadline()) {
            context.waker().wake_by_ref();
        }
        Poll::Pending
    })
    .await
}

/// True when nothing waits to be sent; else the loop is woken when that may have changed.
fn unblocked<Q: Watched>(shard: &mut Shard<Q>, queue: &AsyncFd<Q>, context: &mut Context<'_>) -> bool {
    if !shard.sender.is_blocked() {
        return true;
    }
    // On an error of the runtime's there is no wake-up; the next turn tries again.
    while let Poll::Ready(Ok(mut guard)) = queue.poll_write_ready(context) {
        if shard.sender.flush() {
            shard.unblocked();
            return true;
        }
        guard.clear_ready();
    }
    false
}

/// Takes in a batch; true when there may be more.
fn take_frames<Q: Watched>(
    shard: &mut Shard<Q>,
    queue: &AsyncFd<Q>,
    context: &mut Context<'_>,
    now: Instant,
    frame: &mut [u8],
) -> io::Result<bool> {
    let mut left = BATCH;
    while let Poll::Ready(guard) = queue.poll_read_ready(context) {
        let mut guard = guard?;
        loop {
            if left == 0 || shard.sender.is_blocked() {
                return Ok(true);
            }
            match guard.get_inner().read(frame) {
                Ok(length) => shard.frame(now, &frame[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            left -= 1;
        }
        guard.clear_ready();
    }
    Ok(false)
}

/// Takes in a batch; true when there may be more.
fn take_outcomes<Q: Watched>(
    shard: &mut Shard<Q>,
    outcomes: &mut UnboundedReceiver<(FlowId, Outcome)>,
    context: &mut Context<'_>,
    now: Instant,
) -> bool {
    for _ in 0..BATCH {
        let Poll::Ready(Some((id, outcome))) = outcomes.poll_recv(context) else { return false };
        shard.connected(now, id, outcome);
    }
    true
}

/// Takes in a batch; true when there may be more.
fn take_strays<Q: Watched>(
    shard: &mut Shard<Q>,
    strays: &mut Receiver<Stray>,
    context: &mut Context<'_>,
    now: Instant,
) -> bool {
    for _ in 0..BATCH {
        let Poll::Ready(Some(stray)) = strays.poll_recv(context) else { return false };
        shard.stray(now, &stray);
    }
    true
}

/// Waits until the device is gone. The kernel says so with an error condition that read readiness does not show.
async fn gone<Q: Watched>(queue: &AsyncFd<Q>) -> io::Error {
    loop {
        let mut guard = match queue.ready(Interest::ERROR).await {
            Ok(guard) => guard,
            Err(error) => return error,
        };
        match queue.get_ref().lost() {
            Some(error) => return error,
            None => guard.clear_ready(),
        }
    }
}

/// smoltcp's time, from a monotonic clock.
struct Clock(std::time::Instant);

impl Clock {
    fn new() -> Self {
        Self(std::time::Instant::now())
    }

    fn now(&self) -> Instant {
        Instant::from_micros(i64::try_from(self.0.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    fn at(&self, time: Instant) -> tokio::time::Instant {
        let micros = u64::try_from(time.total_micros()).unwrap_or(0);
        tokio::time::Instant::from_std(self.0 + Duration::from_micros(micros))
    }
}

/// One timer for all deadlines, moved only for an earlier one.
struct Alarm<'c> {
    clock: &'c Clock,
    sleep: std::pin::Pin<Box<tokio::time::Sleep>>,
    set: Option<Instant>,
}

impl<'c> Alarm<'c> {
    fn new(clock: &'c Clock) -> Self {
        Self { clock, sleep: Box::pin(tokio::time::sleep(Duration::ZERO)), set: None }
    }

    /// True when a deadline has passed; else wakes the loop when it does.
    fn poll(&mut self, context: &mut Context<'_>, now: Instant, deadline: Option<Instant>) -> bool {
        let Some(deadline) = deadline else { return false };
        if self.set.is_none_or(|set| deadline < set || set <= now) {
            self.sleep.as_mut().reset(self.clock.at(deadline));
            self.set = Some(deadline);
        }
        let passed = self.sleep.as_mut().poll(context).is_ready();
        if passed {
            self.set = None;
        }
        passed
    }
}
