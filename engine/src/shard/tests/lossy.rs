//! Two TCP stacks over a device that loses, repeats, swaps, damages and cuts packets.

use std::cell::Cell;
use std::rc::Rc;

use proptest::prelude::*;
use smoltcp::socket::tcp::State;
use smoltcp::time::{Duration, Instant};
use tokio::task::yield_now;

use super::models::cases;
use super::{v4, v6};
use crate::counters::Counters;
use crate::device::{Framing, Queue};
use crate::testing::{Bench, Client, Faults, LIMITS, Pcap, Rates, TestClock, pair};

/// Some of every kind, at most a tenth of all packets each.
fn rates() -> impl Strategy<Value = Rates> {
    proptest::array::uniform5(0..100_u16).prop_map(|[lost, repeated, swapped, damaged, cut]| Rates {
        lost,
        repeated,
        swapped,
        damaged,
        cut,
    })
}

/// Sends `up` and `down` bytes; true when all arrived.
async fn transfer(six: bool, rates: Rates, seed: u64, up: usize, down: usize) -> Result<bool, String> {
    let clock: TestClock = Rc::new(Cell::new(Instant::from_secs(1)));
    let mut queue = None;
    let mut bench = Bench::wrapped(Framing::Bare, LIMITS, |device| {
        let pcap = Pcap::new(Faults::new(device, rates, seed), Framing::Bare, Rc::clone(&clock));
        queue.insert(pcap).clone()
    });
    let queue = queue.unwrap();
    let packets = if six { v6() } else { v4() };
    let (source, destination) = (packets.source, packets.destination);
    let mut client = Client::new(bench.device.clone(), source, destination, 5, up, bench.now);
    let mut far = None;
    let mut frame = [0; 2000];
    for _ in 0..20_000 {
        let counted = Counters::sum([&*bench.counters].into_iter());
        let mut news = client.turn(bench.now)?;
        while let Ok(length) = queue.read(&mut frame) {
            bench.feed(&frame[..length]);
        }
        yield_now().await;
        if let Some((_, attempt)) = bench.attempts.next() {
            let (tunnel, end) = pair(5, 0, 8192);
            // The program may have given up.
            if attempt.send(Ok(tunnel)).is_ok() && far.is_none() {
                far = Some(end);
            }
            yield_now().await;
        }
        while let Ok((id, outcome)) = bench.outcomes.try_recv() {
            bench.shard.connected(bench.now, id, outcome);
        }
        bench.turn();
        if let Some(far) = &mut far {
            let before = (far.written, far.read, far.saw_end);
            far.write(down - far.written);
            far.read(3000)?;
            if far.written == down && !far.finished {
                far.finish();
            }
            news |= before != (far.written, far.read, far.saw_end);
        }
        news |= counted != Counters::sum([&*bench.counters].into_iter());
        if client.is_over() && bench.flows().is_empty() {
            break;
        }
        if !news && !bench.shard.is_busy() {
            let next = [client.deadline(bench.now), bench.shard.next_deadline()].into_iter().flatten().min();
            bench.now = next.unwrap_or(bench.now).max(bench.now + Duration::from_millis(1));
            clock.set(bench.now);
        }
    }
    // What the upstream's socket still holds.
    while let Some(far) = far.as_mut()
        && let before = (far.read, far.saw_end)
        && far.read(65_536).is_ok()
        && before != (far.read, far.saw_end)
    {}
    let broken = |what: &str| {
        let saved = queue.save("lossy").map_or_else(|error| error.to_string(), |path| path.display().to_string());
        Err(format!("{what}; {:?} {far:?}; packets: {saved}", client.state()))
    };
    let arrived = far.as_ref().is_some_and(|far| far.read == up && far.saw_end && client.read == down);
    let given_up = bench.counters.flows_timed_out.get() + bench.counters.flows_cancelled.get() > 0;
    if !bench.flows().is_empty() || client.state() == State::SynSent {
        return broken("it does not end");
    }
    if !arrived && !given_up && bench.counters.unknown_flow.get() == 0 {
        return broken("not all arrived");
    }
    Ok(arrived)
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn over_a_device_with_faults_the_bytes_arrive(
        six in any::<bool>(),
        rates in rates(),
        seed in any::<u64>(),
        up in 0..60_000_usize,
        down in 0..60_000_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let result = runtime.block_on(transfer(six, rates, seed, up, down));
        prop_assert!(result.is_ok(), "{}", result.unwrap_err());
    }
}

#[tokio::test]
async fn without_faults_all_arrives() {
    for six in [false, true] {
        assert_eq!(transfer(six, Rates::default(), 1, 100_000, 100_000).await, Ok(true));
    }
}
