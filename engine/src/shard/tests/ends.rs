//! Ends that come early, late, twice or not at all.

use std::io::ErrorKind;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{v4, v6};
use crate::packet::parse::{ACK, FIN, RST};
use crate::testing::{Bench, Far, Packets, pair};

/// A flow whose upstream takes about `room` bytes at once and has finished; the program has sent `length` bytes and finished.
async fn finished(packets: Packets, room: usize, length: usize) -> (Bench, Far) {
    let mut bench = Bench::new();
    bench.feed(&packets.syn(100));
    let (_, answer) = bench.attempt().await;
    let (tunnel, mut far) = pair(0, 0, room);
    answer.send(Ok(tunnel)).unwrap();
    bench.outcome().await;
    let ours = bench.one().seq.wrapping_add(1);
    bench.feed(&packets.tcp(ACK, 101, ours, &[]));
    far.finish();
    let fin = bench.sent().await.remove(0);
    assert_eq!(fin.flags, FIN | ACK);
    bench.feed(&packets.tcp(FIN | ACK, 101, ours.wrapping_add(1), &crate::testing::contents(0, 0, length)));
    bench.turn();
    assert_eq!(bench.flows(), ["TIME-WAIT"]);
    (bench, far)
}

/// Reads until the end, as far as the shard gives it.
async fn read_all(bench: &mut Bench, far: &mut Far) -> usize {
    for _ in 0..100 {
        tokio::task::yield_now().await;
        bench.turn();
        far.read(65_536).unwrap();
    }
    assert!(far.saw_end);
    far.read
}

#[tokio::test]
async fn a_fin_beyond_the_window_does_not_end_the_stream() {
    for packets in [v4(), v6()] {
        let mut bench = Bench::new();
        let (mut far, ours) = bench.establish(packets).await;
        // Together more than the ring holds; nothing is taken out in between.
        bench.feed(&packets.tcp(ACK, 101, ours, &[1; 40_000]));
        bench.feed(&packets.tcp(FIN | ACK, 40_101, ours, &[2; 40_000]));
        let taken = bench.sent().await.pop().unwrap().ack - 101;
        assert!((40_000..80_000).contains(&taken), "{taken} bytes acknowledged");
        assert_eq!(bench.flows(), ["ESTAB"]);
        bench.feed(&packets.tcp(FIN | ACK, 101 + taken, ours, &vec![2; 80_000 - taken as usize]));
        assert_eq!(bench.sent().await.pop().unwrap().ack, 101 + 80_001);
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes, [[1; 40_000], [2; 40_000]].concat());
    }
}

#[tokio::test]
async fn an_upstream_that_is_slow_at_the_end_still_gets_all() {
    let (mut bench, mut far) = finished(v4(), 4096, 50_000).await;
    bench.later(600);
    assert_eq!(bench.flows(), ["TIME-WAIT"]);
    assert_eq!(read_all(&mut bench, &mut far).await, 50_000);
    assert!(bench.flows().is_empty());
}

#[tokio::test]
async fn an_upstream_that_takes_nothing_at_the_end_does_not_keep_the_flow() {
    let (mut bench, _far) = finished(v4(), 4096, 50_000).await;
    bench.later(901);
    assert!(bench.flows().is_empty());
    assert_eq!(bench.counters.flows_timed_out.get(), 1);
}

#[tokio::test]
async fn an_upstream_that_breaks_at_the_end_ends_the_flow_at_once() {
    let (mut bench, mut far) = finished(v4(), 4096, 50_000).await;
    far.close();
    for _ in 0..100 {
        tokio::task::yield_now().await;
        bench.turn();
    }
    assert!(bench.flows().is_empty());
    assert_eq!(bench.counters.flows_reset_by_upstream.get(), 1);
}

#[tokio::test]
async fn a_reset_of_what_is_over_takes_nothing_from_the_upstream() {
    let (mut bench, mut far) = finished(v6(), 4096, 50_000).await;
    bench.feed(&v6().tcp(RST, 50_102, 0, &[]));
    assert_eq!(read_all(&mut bench, &mut far).await, 50_000);
    assert_eq!(bench.counters.flows_reset_by_program.get(), 0);
}

#[tokio::test]
async fn a_new_connection_takes_the_place_of_one_whose_end_was_lost() {
    let mut bench = Bench::new();
    let (mut old, _) = bench.establish(v4()).await;
    bench.feed(&v4().syn(100));
    bench.turn();
    assert_eq!(bench.flows(), ["ESTAB"], "a repetition of its own SYN is nothing new");
    bench.feed(&v4().syn(9000));
    bench.turn();
    assert_eq!(bench.flows(), ["SYN-SENT"]);
    assert_eq!(old.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (_far, syn_ack) = bench.accept(b"").await;
    assert_eq!(syn_ack.ack, 9001);
}

#[tokio::test]
async fn a_window_that_stays_closed_up_to_the_fin_keeps_nobody_busy() {
    let mut bench = Bench::new();
    let (mut far, ours) = bench.establish(v4()).await;
    let closed = |ack| Packets { window: 0, ..v4() }.tcp(ACK, 101, ack, &[]);
    bench.feed(&closed(ours));
    far.write_all(b"x").await.unwrap();
    far.shutdown().await.unwrap();
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        bench.turn();
    }
    bench.later(3);
    let probe = bench.device.take_tcp().pop().unwrap();
    assert_eq!((probe.flags, probe.payload.as_slice()), (FIN | ACK, &b"x"[..]));
    bench.feed(&closed(ours + 2));
    bench.turn();
    assert_eq!(bench.flows(), ["FIN-WAIT-2"]);
    bench.later(30);
    assert!(bench.device.take_tcp().len() <= 1);
    assert!(bench.shard.next_deadline().unwrap() > bench.now, "nothing is due again and again");
    bench.feed(&v4().tcp(FIN | ACK, 101, ours + 2, &[]));
    bench.turn();
    assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
}
