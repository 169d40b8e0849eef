//! Who may open a flow. The bounds are those of the whole engine, and what is left of a scarce one is shared fairly.
//!
//! Dynamic thresholds (Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998): once more
//! than half of a bound is in use, an owner gets more only while it holds less than what is still free, counting what it got
//! in that time. So one owner takes at most half of what is left, the next one half of the rest, and nobody gets nothing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::Limits;
use crate::memory::Memory;
use crate::owner::{Lookup, Owner};
use crate::packet::parse::Tuple;

/// What is in use, all shards together. Touched when a flow opens, is accepted and closes.
#[derive(Debug)]
pub(crate) struct Totals {
    limits: Limits,
    flows: AtomicUsize,
    pending: AtomicUsize,
    memory: Arc<Memory>,
    /// Flows that began while a bound was scarce. The lock is held for one access, and only for such flows.
    counted: Mutex<HashMap<Owner, Counts>>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    flows: usize,
    pending: usize,
}

/// Why there is no place for a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Too many flows.
    Full,
    /// Too many that the upstream has not answered.
    Pending,
    /// The rings of the flows that are open hold all memory.
    Memory,
    /// The owner has its share.
    Unfair,
}

impl Totals {
    /// Nothing in use.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            flows: AtomicUsize::new(0),
            pending: AtomicUsize::new(0),
            memory: Arc::new(Memory::new(limits.memory)),
            counted: Mutex::default(),
        }
    }

    fn counted(&self) -> MutexGuard<'_, HashMap<Owner, Counts>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more for `owner`. Per bound: how many are free, if it is scarce.
    fn claim(&self, owner: Owner, flows: Option<usize>, pending: Option<usize>) -> Result<(), Refused> {
        let mut counted = self.counted();
        let held = counted.get(&owner).copied().unwrap_or_default();
        if flows.is_some_and(|free| held.flows >= free) || pending.is_some_and(|free| held.pending >= free) {
            return Err(Refused::Unfair);
        }
        let more = |count: usize, scarce: Option<usize>| count + usize::from(scarce.is_some());
        counted.insert(owner, Counts { flows: more(held.flows, flows), pending: more(held.pending, pending) });
        Ok(())
    }

    fn unclaim(&self, owner: Owner, flows: bool, pending: bool) {
        let mut counted = self.counted();
        if let Some(held) = counted.get_mut(&owner) {
            held.flows -= usize::from(flows);
            held.pending -= usize::from(pending);
            if *held == Counts::default() {
                counted.remove(&owner);
            }
        }
    }
}

/// One shard's door.
pub(crate) struct Admission {
    totals: Arc<Totals>,
    lookup: Option<Box<dyn Lookup>>,
}

impl Admission {
    /// Without `lookup` all that this machine's users open counts as one host's.
    pub(crate) fn new(totals: Arc<Totals>, lookup: Option<Box<dyn Lookup>>) -> Self {
        Self { totals, lookup }
    }

    /// What the rings of all shards' flows hold.
    pub(super) fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.totals.memory)
    }

    /// A place for the new flow `tuple`.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn admit(&mut self, tuple: &Tuple) -> Result<Place, Refused> {
        let totals = &self.totals;
        if totals.memory.is_exhausted() {
            return Err(Refused::Memory);
        }
        let flows = take(&totals.flows, totals.limits.flows).ok_or(Refused::Full)?;
        let mut place = Place { totals: Arc::clone(totals), pending: false, claim: None };
        let pending = take(&totals.pending, totals.limits.pending).ok_or(Refused::Pending)?;
        place.pending = true;
        let (flows, pending) = (scarce(flows, totals.limits.flows), scarce(pending, totals.limits.pending));
        if flows.is_some() || pending.is_some() {
            let owner = Owner::of(tuple, self.lookup.as_deref_mut());
            totals.claim(owner, flows, pending)?;
            place.claim = Some(Box::new(Claim { owner, flows: flows.is_some(), pending: pending.is_some() }));
        }
        Ok(place)
    }
}

#[cfg(any(test, feature = "harness"))]
impl Admission {
    /// Flows, and those that wait.
    pub(super) fn in_use(&self) -> (usize, usize) {
        (self.totals.flows.load(Ordering::Relaxed), self.totals.pending.load(Ordering::Relaxed))
    }
}

/// One more, if that is not over `limit`; how many there were.
fn take(count: &AtomicUsize, limit: usize) -> Option<usize> {
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < limit).then_some(count + 1)).ok()
}

/// How many are free, when more than half are in use.
fn scarce(used: usize, limit: usize) -> Option<usize> {
    (used > limit / 2).then_some(limit - used)
}

/// A flow's place; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Place {
    totals: Arc<Totals>,
    pending: bool,
    claim: Option<Box<Claim>>,
}

#[derive(Debug)]
struct Claim {
    owner: Owner,
    flows: bool,
    pending: bool,
}

impl Place {
    /// The upstream has answered.
    pub(super) fn answered(&mut self) {
        if !std::mem::take(&mut self.pending) {
            return;
        }
        self.totals.pending.fetch_sub(1, Ordering::Relaxed);
        if let Some(claim) = &mut self.claim
            && std::mem::take(&mut claim.pending)
        {
            self.totals.unclaim(claim.owner, false, true);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.answered();
        self.totals.flows.fetch_sub(1, Ordering::Relaxed);
        if let Some(claim) = &self.claim
            && claim.flows
        {
            self.totals.unclaim(claim.owner, true, false);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use std::net::SocketAddr;

    use super::*;
    use crate::testing::Packets;

    /// Users by the last byte of the destination; 0 is unknown.
    struct ByDestination;

    impl Lookup for ByDestination {
        fn uid(&mut self, _: SocketAddr, destination: SocketAddr) -> Option<u32> {
            match destination.ip() {
                std::net::IpAddr::V4(address) => Some(u32::from(address.octets()[3])).filter(|uid| *uid != 0),
                std::net::IpAddr::V6(_) => None,
            }
        }
    }

    fn limits(flows: usize, pending: usize) -> Limits {
        Limits { flows, pending, ..Limits::default() }
    }

    fn doors(limits: Limits, number: usize) -> Vec<Admission> {
        let totals = Arc::new(Totals::new(limits));
        (0..number).map(|_| Admission::new(Arc::clone(&totals), Some(Box::new(ByDestination)))).collect()
    }

    fn user(uid: u8) -> Tuple {
        Packets::new("10.0.0.1", &format!("192.0.2.{uid}")).tuple()
    }

    /// As many places as there are; the last answer.
    fn fill(doors: &mut [Admission], tuple: Tuple, answered: bool) -> (Vec<Place>, Refused) {
        let (mut places, count) = (Vec::new(), doors.len());
        loop {
            match doors[places.len() % count].admit(&tuple) {
                Ok(mut place) => {
                    if answered {
                        place.answered();
                    }
                    places.push(place);
                }
                Err(refused) => return (places, refused),
            }
        }
    }

    #[test]
    fn each_owner_gets_half_of_what_is_left() {
        // Once by waiting flows, once by accepted ones; it makes no difference how many shards there are.
        for (limits, answered, shards) in [(limits(5000, 400), false, 1), (limits(400, 9), true, 3)] {
            let mut doors = doors(limits, shards);
            let mut held = Vec::new();
            for (uid, expected) in [(1, 301), (2, 50), (3, 25), (4, 12), (5, 6), (6, 3), (7, 2)] {
                let (places, refused) = fill(&mut doors, user(uid), answered);
                assert_eq!((places.len(), refused), (expected, Refused::Unfair), "user {uid}");
                held.push(places);
            }
            let (last, refused) = fill(&mut doors, user(8), answered);
            assert_eq!((last.len(), refused), (1, if answered { Refused::Full } else { Refused::Pending }));
            held.push(last);
            held.clear();
            assert!(doors[0].totals.counted().is_empty());
            assert_eq!(fill(&mut doors, user(1), answered).0.len(), 301, "everything came back");
        }
    }

    #[test]
    fn below_the_half_nobody_is_asked() {
        struct Never;
        impl Lookup for Never {
            fn uid(&mut self, _: SocketAddr, _: SocketAddr) -> Option<u32> {
                unreachable!("asked without need")
            }
        }
        let totals = Arc::new(Totals::new(limits(20, 20)));
        let mut door = Admission::new(totals, Some(Box::new(Never)));
        let places: Vec<_> = (0..11).map(|_| door.admit(&user(1)).unwrap()).collect();
        assert!(door.totals.counted().is_empty());
        drop(places);
    }

    #[test]
    fn the_bounds_hold_and_are_told_apart() {
        let mut doors = doors(limits(3, 2), 2);
        let place = doors[0].admit(&user(1)).unwrap();
        let second = doors[1].admit(&user(2)).unwrap();
        assert_eq!(doors[0].admit(&user(3)).unwrap_err(), Refused::Pending);
        assert_eq!(doors[0].totals.flows.load(Ordering::Relaxed), 2, "a refusal keeps nothing");
        let mut held = vec![place, second];
        held.iter_mut().for_each(Place::answered);
        held.push(doors[1].admit(&user(3)).unwrap());
        assert_eq!(doors[1].admit(&user(4)).unwrap_err(), Refused::Full);
    }

    #[test]
    fn without_memory_for_rings_nobody_gets_in() {
        let mut doors = doors(limits(10, 10), 1);
        let (memory, limit) = (doors[0].memory(), Limits::default().memory);
        memory.change(0, limit - 1);
        assert!(doors[0].admit(&user(1)).is_ok());
        memory.change(0, 1);
        assert_eq!(doors[0].admit(&user(1)).unwrap_err(), Refused::Memory);
        assert_eq!(doors[0].in_use(), (0, 0));
    }

    #[test]
    fn other_hosts_are_told_by_address_and_ipv6_hosts_by_network() {
        let owner =
            |source, destination| Owner::of(&Packets::new(source, destination).tuple(), Some(&mut ByDestination));
        assert_eq!(owner("10.0.0.7", "192.0.2.5"), Owner::User(5));
        assert_eq!(owner("10.0.0.7", "192.0.2.0"), Owner::Host("10.0.0.7".parse().unwrap()));
        let network = Owner::Host("2001:db8:1:2::".parse().unwrap());
        assert_eq!(owner("2001:db8:1:2:3:4:5:6", "2001:db8::1"), network);
        assert_eq!(owner("2001:db8:1:2::9", "2001:db8::1"), network);
        assert_ne!(owner("2001:db8:1:3::9", "2001:db8::1"), network);
    }
}
