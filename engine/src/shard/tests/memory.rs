//! Memory of rings: what is counted is what is held, and a flow that may hold no more loses nothing.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::v4;
use crate::config::Limits;
use crate::device::Framing;
use crate::packet::parse::ACK;
use crate::testing::{Bench, LIMITS, Packets};

const PAGE: usize = 4096;
const LENGTH: usize = 600_000;

/// Eight pages for all flows: less than one ring.
fn short() -> Bench {
    Bench::wrapped(Framing::Bare, Limits { memory: 8 * PAGE, ..LIMITS }, |device| device)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// What other flows have, as far as this test pretends.
const OTHERS: usize = 7 * PAGE;

/// What is counted for this shard, which has not less.
fn memory(bench: &Bench, others: usize) -> usize {
    let (backed, counted) = bench.shard.memory();
    let counted = counted - others;
    assert!(backed <= counted, "{backed} bytes of rings, {counted} counted");
    counted
}

/// All that the program gets of `LENGTH` bytes, which acknowledges each segment.
async fn receive(bench: &mut Bench, packets: Packets, mut far: TcpStream, seq: i32) -> Vec<u8> {
    let writing = tokio::spawn(async move {
        far.write_all(&pattern(LENGTH)).await.unwrap();
        far
    });
    let mut got = Vec::new();
    // `sent` gives up when nothing comes for a second.
    while got.len() < LENGTH {
        for sent in bench.sent().await {
            assert_eq!(sent.seq, seq.wrapping_add(got.len() as i32), "out of order");
            got.extend(sent.payload);
        }
        memory(bench, OTHERS);
        bench.feed(&packets.tcp(ACK, 101, seq.wrapping_add(got.len() as i32), b""));
    }
    drop(writing.await.unwrap());
    got
}

#[tokio::test]
async fn a_program_that_does_not_read_gets_less_memory_when_it_is_short() {
    for (mut bench, least, most) in [(Bench::new(), 15, 16), (short(), 1, 7)] {
        let (mut far, _) = bench.establish(v4()).await;
        let writing = tokio::spawn(async move { far.write_all(&pattern(LENGTH)).await });
        // The program's window is closed after 60 kB, and it acknowledges nothing.
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            bench.turn();
        }
        let counted = memory(&bench, 0);
        assert!((least..=most).contains(&(counted / PAGE)), "{counted} bytes");
        writing.abort();
    }
}

#[tokio::test]
async fn bytes_to_the_program_pass_unharmed_while_memory_is_short() {
    let mut bench = short();
    let (far, seq) = bench.establish(v4()).await;
    // Another flow has the memory.
    bench.shard.short_of_memory(OTHERS);
    let got = receive(&mut bench, v4(), far, seq).await;
    assert!(got == pattern(LENGTH), "wrong bytes");
    let counted = memory(&bench, OTHERS);
    assert!(counted <= 2 * PAGE, "{counted}");
}

#[tokio::test]
async fn bytes_of_the_program_pass_unharmed_while_memory_is_short() {
    let mut bench = short();
    let (mut far, seq) = bench.establish(v4()).await;
    bench.shard.short_of_memory(OTHERS);
    let all = pattern(3_000_000);
    let mut sent = 0;
    // Nobody reads at the other end.
    let mut tries = 0;
    while bench.counters.drop_memory.get() == 0 {
        tries += 1;
        assert!(tries < all.len() / 1000, "nothing was left out");
        bench.feed(&v4().tcp(ACK, 101 + sent as i32, seq, &all[sent..sent + 1000]));
        bench.turn();
        memory(&bench, OTHERS);
        // As the program's system would: what is not acknowledged is not known to be there.
        sent = bench.device.take_tcp().iter().map(|sent| (sent.ack - 101) as usize).fold(sent, usize::max);
    }
    let all = all[..300_000.max(sent + 50_000)].to_vec();
    let length = all.len();
    let reading = tokio::spawn(async move {
        let mut got = vec![0; length];
        far.read_exact(&mut got).await.unwrap();
        got
    });
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while sent < length {
        assert!(std::time::Instant::now() < end, "stuck at {sent}");
        let end = length.min(sent + 1000);
        bench.feed(&v4().tcp(ACK, 101 + sent as i32, seq, &all[sent..end]));
        bench.turn();
        let counted = memory(&bench, OTHERS);
        assert!(counted <= 3 * PAGE, "{counted}");
        sent = bench.device.take_tcp().iter().map(|sent| (sent.ack - 101) as usize).fold(sent, usize::max);
        tokio::task::yield_now().await;
    }
    for _ in 0..100 {
        bench.turn();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(reading.await.unwrap() == all, "wrong bytes");
}
