//! Deadlines of flows in one lazy heap: an entry is never searched for or removed, only found stale when it comes up.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use smoltcp::time::Instant;

use crate::table::FlowId;

/// The heap. A flow remembers the earliest entry that it has here ([`Armed`]) and adds another only for an earlier time.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, FlowId)>>,
}

/// The earliest entry of one flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Armed(Option<Instant>);

impl Timers {
    /// Makes sure that `id` comes up at `deadline` or earlier.
    pub(crate) fn arm(&mut self, armed: &mut Armed, id: FlowId, deadline: Instant) {
        if armed.0.is_none_or(|earliest| deadline < earliest) {
            armed.0 = Some(deadline);
            self.heap.push(Reverse((deadline, id)));
        }
    }

    /// The next time at which [`expired`](Self::expired) has something.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((deadline, _))| *deadline)
    }

    /// A flow whose entry came up, with that entry's time; the flow then calls [`Armed::fired`].
    pub(crate) fn expired(&mut self, now: Instant) -> Option<(Instant, FlowId)> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry)
    }
}

impl Armed {
    /// True when the entry of time `deadline` is the one that counts; it is then used up.
    pub(crate) fn fired(&mut self, deadline: Instant) -> bool {
        let current = self.0 == Some(deadline);
        if current {
            self.0 = None;
        }
        current
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Instant {
        Instant::from_millis(ms)
    }

    #[test]
    fn only_an_earlier_deadline_adds_an_entry() {
        let (mut timers, mut armed, id) = (Timers::default(), Armed::default(), FlowId { index: 1, generation: 7 });
        timers.arm(&mut armed, id, at(50));
        timers.arm(&mut armed, id, at(60));
        timers.arm(&mut armed, id, at(20));
        assert_eq!(timers.heap.len(), 2);
        assert_eq!(timers.next(), Some(at(20)));
        assert_eq!(timers.expired(at(19)), None);

        assert_eq!(timers.expired(at(20)), Some((at(20), id)));
        assert!(armed.fired(at(20)));
        assert_eq!(timers.expired(at(50)), Some((at(50), id)));
        assert!(!armed.fired(at(50)), "a stale entry must not fire");
        assert_eq!(timers.next(), None);
    }
}
