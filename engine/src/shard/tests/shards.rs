//! Several shards of one engine.

use tokio::io::AsyncReadExt;

use super::{v4, v6};
use crate::packet::parse::{ACK, RST};
use crate::testing::{Bench, Packets};

#[tokio::test]
async fn a_segment_on_the_wrong_queue_reaches_its_flow() {
    for (packets, wrong) in [(v4(), 0), (v6(), 1)] {
        let mut shards = Bench::shards(3);
        let (mut far, seq) = shards[2].establish(packets).await;
        shards[wrong].feed(&packets.tcp(ACK, 101, seq, b"astray"));
        let hops = (wrong..2).map(|at| shards[at + 1].take_strays()).sum::<usize>();
        assert_eq!(hops, 2 - wrong);
        let mut bytes = [0; 6];
        far.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"astray");
        assert_eq!(shards[2].counters.segments_handed_over.get(), 1);
        // The answer goes out where the flow lives, which brings the next segment there.
        let sent: Vec<_> = shards.iter().map(|shard| shard.device.take_tcp().len()).collect();
        assert_eq!((sent[0], sent[1]), (0, 0));
        // A RST counts as well.
        shards[wrong].feed(&packets.tcp(RST | ACK, 107, seq, b""));
        assert_eq!((wrong..2).map(|at| shards[at + 1].take_strays()).sum::<usize>(), 2 - wrong);
        assert!(shards[2].flows().is_empty());
        assert_eq!(shards[2].counters.flows_reset_by_program.get(), 1);
    }
}

#[tokio::test]
async fn a_segment_that_no_shard_knows_is_reset_by_the_queue_that_it_came_on() {
    let mut shards = Bench::shards(3);
    shards[1].feed(&v4().tcp(ACK, 5, 77, b"x"));
    for at in [2, 0, 1] {
        assert!(shards.iter().all(|shard| shard.device.take_tcp().is_empty()));
        assert_eq!(shards[at].take_strays(), 1);
    }
    let sent = shards[1].one();
    assert_eq!((sent.flags, sent.seq), (RST, 77));
    assert_eq!(shards.iter_mut().map(Bench::take_strays).sum::<usize>(), 0);
    let unknown: Vec<_> = shards.iter().map(|shard| shard.counters.unknown_flow.get()).collect();
    assert_eq!(unknown, [0, 1, 0]);
    assert!(shards.iter().all(|shard| shard.device.take_tcp().is_empty()));
}

#[tokio::test]
async fn a_flood_of_unknown_segments_waits_for_nobody() {
    let mut shards = Bench::shards(2);
    for port in 1..=1000 {
        shards[0].feed(&Packets { source_port: port, ..v4() }.tcp(ACK, 5, 77, b"x"));
    }
    let dropped = shards[0].counters.drop_handover.get();
    assert!(dropped > 900, "{dropped}");
    // The rest is answered.
    let rest = shards[1].take_strays();
    assert_eq!(rest as u64 + dropped, 1000);
    assert_eq!(shards[0].take_strays(), rest);
    assert_eq!(shards[0].device.take_tcp().len(), rest);
}
