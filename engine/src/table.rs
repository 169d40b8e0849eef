//! The flow table: from the 4-tuple of a packet, or from the identity that wakers and timers hold, to a flow.

use std::collections::HashMap;

use crate::packet::parse::Tuple;

/// A flow of this shard. The generation tells a new flow from an old one in the same slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FlowId {
    /// Slot.
    pub(crate) index: u32,
    /// How often any slot was filled before; unique in the shard's life.
    pub(crate) generation: u64,
}

/// Slots with a randomly keyed hash map (SipHash: programs choose their tuples) in front.
#[derive(Debug)]
pub(crate) struct Table<F> {
    by_tuple: HashMap<Tuple, FlowId>,
    slots: Vec<Option<(FlowId, Box<F>)>>,
    free: Vec<u32>,
    next_generation: u64,
}

impl<F> Default for Table<F> {
    fn default() -> Self {
        Self { by_tuple: HashMap::new(), slots: Vec::new(), free: Vec::new(), next_generation: 1 }
    }
}

impl<F> Table<F> {
    /// Number of flows.
    #[cfg(any(test, feature = "harness"))]
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds a flow under `tuple`; `make` is told its identity. The caller bounds the number of flows (far below 2^32).
    pub(crate) fn insert(&mut self, tuple: Tuple, make: impl FnOnce(FlowId) -> F) -> FlowId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        let id = FlowId { index, generation: self.next_generation };
        self.next_generation += 1;
        self.by_tuple.insert(tuple, id);
        self.slots[index as usize] = Some((id, Box::new(make(id))));
        id
    }

    /// The flow that packets of `tuple` belong to.
    pub(crate) fn find(&self, tuple: &Tuple) -> Option<FlowId> {
        self.by_tuple.get(tuple).copied()
    }

    /// The flow `id`, if it is still there.
    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut F> {
        match self.slots.get_mut(id.index as usize) {
            Some(Some((current, flow))) if *current == id => Some(flow),
            _ => None,
        }
    }

    /// Lets go of `tuple`, so that a new flow can have it, while the flow that had it finishes.
    pub(crate) fn detach(&mut self, tuple: &Tuple) {
        self.by_tuple.remove(tuple);
    }

    /// Takes the flow `id` out; `tuple` is the one that it was inserted under.
    pub(crate) fn remove(&mut self, id: FlowId, tuple: &Tuple) -> Option<Box<F>> {
        let slot = self.slots.get_mut(id.index as usize)?;
        if !matches!(slot, Some((current, _)) if *current == id) {
            return None;
        }
        // After `detach` the tuple may be a newer flow's.
        if self.by_tuple.get(tuple) == Some(&id) {
            self.by_tuple.remove(tuple);
        }
        self.free.push(id.index);
        slot.take().map(|(_, flow)| flow)
    }

    /// Every flow, in no order that means anything.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (FlowId, &mut F)> {
        self.slots.iter_mut().flatten().map(|(id, flow)| (*id, &mut **flow))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::*;

    fn tuple(port: u16) -> Tuple {
        Tuple {
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2".parse().unwrap(),
            source_port: port,
            destination_port: 80,
        }
    }

    #[test]
    fn an_old_identity_never_finds_the_new_flow_in_its_slot() {
        let mut table = Table::default();
        let old = table.insert(tuple(1), |_| "old");
        assert_eq!(table.remove(old, &tuple(1)).as_deref(), Some(&"old"));
        let new = table.insert(tuple(2), |_| "new");
        assert_eq!(old.index, new.index);
        assert_eq!(table.get_mut(old), None);
        assert_eq!(table.remove(old, &tuple(1)), None);
        assert_eq!((table.get_mut(new).copied(), table.len()), (Some("new"), 1));
    }

    #[test]
    fn a_detached_flow_leaves_its_tuple_to_a_new_one() {
        let mut table = Table::default();
        let old = table.insert(tuple(1), |_| "old");
        table.detach(&tuple(1));
        let new = table.insert(tuple(1), |_| "new");
        assert_eq!(table.find(&tuple(1)), Some(new));
        table.remove(old, &tuple(1));
        assert_eq!(table.find(&tuple(1)), Some(new), "removing the old flow must not unmap the new one");
    }
}
