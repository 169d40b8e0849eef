//! How much memory the rings of all flows hold, and who may hold more.
//!
//! Half of the bound is for whoever comes first. Above it a flow may grow only while its part of a full pair of rings is smaller than
//! what is free is of that half: a dynamic threshold, as in [`admission`](crate::shard::admission), but for each flow. The more flows want
//! much, the less each gets, and some is always free for those that have little.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What is held, all shards together. Touched when a ring reaches a page that it did not have, and when pages are given back.
#[derive(Debug)]
pub(crate) struct Memory {
    limit: usize,
    held: AtomicUsize,
}

impl Memory {
    /// Nothing is held, of `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, held: AtomicUsize::new(0) }
    }

    /// One flow holds `after` bytes instead of `before`.
    pub(crate) fn change(&self, before: usize, after: usize) {
        if after > before {
            self.held.fetch_add(after - before, Ordering::Relaxed);
        } else if after < before {
            self.held.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// How much a flow that holds `held` bytes may hold in all, up to `full`.
    pub(crate) fn share(&self, held: usize, full: usize) -> usize {
        // What would be free if this flow had nothing.
        let free = self.limit.saturating_sub(self.held.load(Ordering::Relaxed).saturating_sub(held));
        if free.saturating_sub(full) >= self.limit / 2 {
            return full;
        }
        // share / full = (free - share) / (limit / 2), in numbers wide enough for any product.
        let [limit, full, free] = [self.limit, full, free].map(|number| number as u128);
        let share = 2 * full * free / (limit + 2 * full).max(1);
        usize::try_from(share.min(full)).unwrap_or(usize::MAX)
    }

    /// Nothing is left.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.held.load(Ordering::Relaxed) >= self.limit
    }

    /// Bytes that are held.
    #[cfg(any(test, feature = "harness"))]
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_flows_want_much_the_less_each_gets() {
        const FULL: usize = 512;
        for (flows, least, most) in [(1_000, 512, 512), (3_000, 200, 300), (100_000, 8, 16)] {
            let (memory, mut held) = (Memory::new(1024 * 1024), vec![0; flows]);
            let mut grown = true;
            while std::mem::take(&mut grown) {
                for flow in &mut held {
                    if memory.share(*flow, FULL) > *flow {
                        memory.change(*flow, *flow + 1);
                        *flow += 1;
                        grown = true;
                    }
                }
            }
            assert!(held.iter().all(|held| (least..=most).contains(held)), "{flows}: {:?}", held.iter().max());
            assert!(!memory.is_exhausted(), "{flows}");
            assert!(memory.share(0, FULL) >= least.min(8), "a flow that has nothing gets something");
        }
    }
}
