//! Bounds on flows, and their fair sharing.

use std::net::SocketAddr;

use super::v4;
use crate::config::Limits;
use crate::owner::Lookup;
use crate::packet::parse::{ACK, RST};
use crate::testing::{Bench, LIMITS, Packets};

/// A SYN of one of many hosts.
fn syn_of_host(host: u8) -> Vec<u8> {
    Packets { source: [10, 0, 0, host].into(), ..v4() }.syn(1)
}

#[tokio::test]
async fn a_flood_of_syns_is_bounded_and_refused() {
    let mut bench = Bench::new();
    for host in 1..=100 {
        bench.feed(&syn_of_host(host));
    }
    tokio::task::yield_now().await;
    assert_eq!(bench.attempts.len(), LIMITS.pending);
    let sent = bench.device.take_tcp();
    assert_eq!(sent.len(), 100 - LIMITS.pending);
    assert!(sent.iter().all(|sent| sent.flags == RST | ACK));
    assert_eq!(bench.counters.flows_refused_pending.get(), (100 - LIMITS.pending) as u64);
}

#[tokio::test]
async fn flows_beyond_the_limit_are_refused_until_one_ends() {
    let mut bench = Bench::new();
    for host in 1..=LIMITS.flows as u8 {
        bench.feed(&syn_of_host(host));
        bench.accept(b"").await;
    }
    bench.feed(&syn_of_host(99));
    assert_eq!(bench.one().flags, RST | ACK);
    assert_eq!(bench.counters.flows_refused_full.get(), 1);
    let first = Packets { source: [10, 0, 0, 1].into(), ..v4() };
    bench.feed(&first.tcp(RST, 2, 0, b""));
    bench.turn();
    bench.feed(&syn_of_host(99));
    bench.accept(b"").await;
}

/// User 1 of this machine, but for what comes from port 9: that is user 2's.
struct TwoUsers;

impl Lookup for TwoUsers {
    fn uid(&mut self, source: SocketAddr, _: SocketAddr) -> Option<u32> {
        Some(if source.port() == 9 { 2 } else { 1 })
    }
}

#[tokio::test]
async fn one_user_s_flood_leaves_room_for_another() {
    // Once the waiting flows are scarce, once all of them.
    for (limits, accepted) in
        [(Limits { flows: 1000, pending: 40, ..LIMITS }, false), (Limits { flows: 40, pending: 1000, ..LIMITS }, true)]
    {
        let mut bench = Bench::with_owners(limits, TwoUsers);
        for port in 1000..1200 {
            bench.feed(&Packets { source_port: port, ..v4() }.syn(1));
            if accepted && bench.counters.flows_refused_fair.get() == 0 {
                bench.accept(b"").await;
            }
        }
        tokio::task::yield_now().await;
        assert_eq!(bench.counters.flows_refused_fair.get(), 169);
        let sent = bench.device.take_tcp();
        assert_eq!(sent.iter().filter(|sent| sent.flags == RST | ACK).count(), 169);
        let before = bench.flows().len();
        assert_eq!(before, 31);
        bench.feed(&Packets { source_port: 9, ..v4() }.syn(1));
        assert_eq!(bench.device.take_tcp(), [], "the modest user was refused");
        assert_eq!(bench.flows().len(), before + 1);
    }
}
