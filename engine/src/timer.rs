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
    /// Entries, stale ones too.
    #[cfg(any(test, feature = "harness"))]
    pub(crate) fn len(&self) -> usize {
        self.heap.len()
    }

    /// Makes sure that `id` comes up at `deadline` or earlier.
    pub(crate) fn arm(&mut self, armed: &mut Armed, id: FlowId, deadline: Instant) {
        if armed.0.is_none_or(|earliest| deadline < earliest) {
            armed.0 = Some(deadline);
            self.heap.push(Reverse((deadline, id)));
        }
    }

    /// The earliest entry that still counts: `armed` gives a flow's, or `None` for a flow that is gone. Stale ones before it are
    /// thrown away, so that nobody wakes up for them.
    pub(crate) fn next(&mut self, mut armed: impl FnMut(FlowId) -> Option<Armed>) -> Option<Instant> {
        while let Some(&Reverse((deadline, id))) = self.heap.peek() {
            if armed(id) == Some(Armed(Some(deadline))) {
                return Some(deadline);
            }
            self.heap.pop();
        }
        None
    }

    /// A flow whose entry came up, with that entry's time; the flow then calls [`Armed::fired`].
    pub(crate) fn expired(&mut self, now: Instant) -> Option<(Instant, FlowId)> {
        let Reverse((deadline, _)) = self.heap.peek()?;
        if *deadline > now {
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
        assert_eq!(timers.next(|_| Some(armed)), Some(at(20)));
        assert_eq!(timers.expired(at(19)), None);

        assert_eq!(timers.expired(at(20)), Some((at(20), id)));
        assert!(armed.fired(at(20)));
        assert_eq!(timers.expired(at(50)), Some((at(50), id)));
        assert!(!armed.fired(at(50)), "a stale entry must not fire");
        assert_eq!(timers.next(|_| Some(armed)), None);
    }

    #[test]
    fn nobody_wakes_up_for_stale_entries() {
        let mut timers = Timers::default();
        let (gone, alive) = (FlowId { index: 1, generation: 1 }, FlowId { index: 2, generation: 2 });
        let (mut first, mut second) = (Armed::default(), Armed::default());
        timers.arm(&mut first, gone, at(10));
        timers.arm(&mut second, alive, at(30));
        assert_eq!(timers.next(|id| (id == alive).then_some(second)), Some(at(30)));
        assert_eq!(timers.heap.len(), 1);
    }
}
