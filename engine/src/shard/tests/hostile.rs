//! Programs that keep to no protocol.

use std::time::Duration;

use proptest::prelude::*;
use tokio::net::TcpStream;

use super::{v4, v6};
use crate::testing::{Bench, Packets, read_tcp, tunnel};

/// Memory of blocks that are kept for the next flows, two pages each.
const KEPT_ASIDE: usize = 32 * 2 * 4096;

/// A program that sends anything at all.
#[derive(Debug, Clone)]
enum Move {
    Segment {
        six: bool,
        port: u16,
        flags: u8,
        seq: i32,
        ack: i32,
        length: usize,
    },
    Bytes(Vec<u8>),
    Accept,
    /// The newest upstream sends so many bytes.
    Send(u16),
    /// The oldest upstream closes, or resets.
    Close(bool),
    Later(u8),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let near = prop_oneof![Just(100), Just(101), 90..120_i32, any::<i32>()];
    let segment = (any::<bool>(), 1..3_u16, 0..32_u8, near.clone(), near, 0..100_usize)
        .prop_map(|(six, port, flags, seq, ack, length)| Move::Segment { six, port, flags, seq, ack, length });
    let one = prop_oneof![
        6 => segment,
        1 => proptest::collection::vec(any::<u8>(), 0..120).prop_map(Move::Bytes),
        2 => Just(Move::Accept),
        2 => any::<u16>().prop_map(Move::Send),
        1 => any::<bool>().prop_map(Move::Close),
        1 => any::<u8>().prop_map(Move::Later),
    ];
    proptest::collection::vec(one, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_packets_panics_or_leaks(moves in moves()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut bench = Bench::new();
            let mut far = Vec::new();
            let mut acknowledged = 0_i32;
            for step in moves {
                match step {
                    Move::Segment { six, port, flags, seq, ack, length } => {
                        let packets = Packets { source_port: port, ..if six { v6() } else { v4() } };
                        // Often the number that the engine waits for, else the state machine is never entered deeply.
                        let ack = if ack % 2 == 0 { acknowledged } else { ack };
                        bench.feed(&packets.tcp(flags, seq, ack, &vec![1; length]));
                    }
                    Move::Bytes(bytes) => bench.feed(&bytes),
                    Move::Accept => {
                        tokio::task::yield_now().await;
                        if let Some((_, answer)) = bench.attempts.next() {
                            let (tunnel, end) = tunnel(b"early").await;
                            if answer.send(Ok(tunnel)).is_ok() {
                                bench.outcome().await;
                                far.push(end);
                            }
                        }
                    }
                    Move::Send(length) => {
                        if let Some(end) = far.last() {
                            let end: &TcpStream = end;
                            // A full or closed socket is as good.
                            let _ = end.try_write(&vec![3; usize::from(length)]);
                        }
                    }
                    Move::Close(reset) if !far.is_empty() => {
                        let end: TcpStream = far.remove(0);
                        if reset {
                            end.set_zero_linger().unwrap();
                        }
                    }
                    Move::Close(_) => {}
                    Move::Later(seconds) => bench.later(u64::from(seconds)),
                }
                // Lets the runtime see what the sockets have.
                tokio::task::yield_now().await;
                bench.turn();
                let (backed, counted) = bench.shard.memory();
                prop_assert!(backed <= counted + KEPT_ASIDE, "{backed} bytes of rings, {counted} counted");
                while let Some(frame) = bench.device.next() {
                    if frame[0] >> 4 == 6 || frame[9] == 6 {
                        let sent = read_tcp(&frame);
                        acknowledged = sent.seq.wrapping_add(1);
                    }
                }
            }
            drop(far);
            for _ in 0..10 {
                bench.later(4000);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            bench.later(8000);
            let left = bench.flows();
            prop_assert!(left.is_empty(), "left over: {left:?}");
            prop_assert_eq!((bench.shard.next_deadline(), bench.shard.held()), (None, [0; 9]));
            prop_assert_eq!(bench.counters.flows_opened.get(), bench.counters.flows_closed.get());
            Ok(())
        })?;
    }
}
