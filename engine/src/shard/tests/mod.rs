//! The core of a shard, fed packet by packet at times that the test chooses.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's failure")]

mod bounds;
mod ends;
mod hostile;
mod link;
mod lossy;
mod memory;
mod models;
mod shards;
mod udp;

use std::time::Duration;

use smoltcp::wire::TcpPacket;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::device::Framing;
use crate::event::Event;
use crate::packet::parse::{ACK, FIN, RST, SYN};
use crate::packet::vnet;
use crate::testing::{Bench, Packets, tunnel};
use crate::upstream::{ConnectError, Target};

fn v4() -> Packets {
    Packets::new("10.0.0.1", "192.0.2.9")
}

fn v6() -> Packets {
    Packets::new("fd00::1", "2001:db8::9")
}

fn unreachable() -> ConnectError {
    ConnectError::Unreachable { upstream: "proxy:1".into(), source: std::io::ErrorKind::TimedOut.into() }
}

#[tokio::test]
async fn a_syn_is_answered_only_when_the_upstream_has_accepted() {
    for packets in [v4(), v6()] {
        let mut bench = Bench::new();
        bench.feed(&packets.syn(100));
        bench.turn();
        let (target, answer) = bench.attempt().await;
        let tuple = packets.tuple();
        assert_eq!(target, Target::Address((tuple.destination, 80).into()));
        assert_eq!(bench.device.take_tcp(), []);
        assert_eq!(bench.flows(), ["SYN-SENT"]);
        answer.send(Ok(tunnel(b"").await.0)).unwrap();
        bench.outcome().await;
        let sent = bench.one();
        assert_eq!((sent.flags, sent.ack), (SYN | ACK, 101));
        assert_eq!((sent.tuple.source, sent.tuple.destination), (tuple.destination, tuple.source));
        assert_eq!(bench.flows(), ["SYN-RECV"]);
    }
}

#[tokio::test]
async fn a_refusal_is_a_reset_that_the_program_takes_for_refused() {
    for packets in [v4(), v6()] {
        let mut bench = Bench::new();
        bench.feed(&packets.tcp(SYN, 100, 0, b"data in a SYN"));
        bench.refuse(unreachable()).await;
        let sent = bench.one();
        assert_eq!((sent.flags, sent.seq, sent.ack), (RST | ACK, 0, 101));
        assert!(bench.flows().is_empty());
        assert_eq!(bench.counters.flows_refused.get(), 1);
    }
}

#[tokio::test]
async fn without_a_socket_the_program_is_refused_and_the_reason_counted() {
    let mut bench = Bench::new();
    bench.feed(&v4().syn(100));
    let source = std::io::Error::from_raw_os_error(libc::EMFILE);
    bench.refuse(ConnectError::Local { upstream: "proxy:1".into(), source }).await;
    assert_eq!(bench.one().flags, RST | ACK);
    assert_eq!(bench.counters.flows_refused_no_socket.get(), 1);
}

#[tokio::test]
async fn a_repeated_syn_makes_no_second_attempt() {
    let mut bench = Bench::new();
    bench.feed(&v4().syn(100));
    bench.feed(&v4().syn(100));
    bench.later(1);
    bench.feed(&v4().syn(100));
    tokio::task::yield_now().await;
    assert_eq!(bench.attempts.len(), 1);
    assert_eq!(bench.counters.syn_repeated.get(), 2);
}

#[tokio::test]
async fn an_attempt_is_given_up_when_the_program_resets() {
    let mut bench = Bench::new();
    bench.feed(&v4().syn(100));
    let (_, mut answer) = bench.attempt().await;
    bench.feed(&v4().tcp(RST, 101, 0, b""));
    tokio::time::timeout(Duration::from_secs(5), answer.closed()).await.unwrap();
    assert!(bench.flows().is_empty());
    assert_eq!(bench.counters.flows_cancelled.get(), 1);
}

#[tokio::test]
async fn an_attempt_is_given_up_when_the_program_stops_asking() {
    let mut bench = Bench::new();
    bench.feed(&v4().syn(100));
    let (_, mut answer) = bench.attempt().await;
    // Linux asks again after 1, 3 and 7 seconds.
    for pause in [1, 2, 4] {
        bench.later(pause);
        assert_eq!(bench.flows(), ["SYN-SENT"]);
        bench.feed(&v4().syn(100));
    }
    bench.later(16);
    assert_eq!(bench.flows(), ["SYN-SENT"]);
    bench.later(2);
    assert!(bench.flows().is_empty());
    tokio::time::timeout(Duration::from_secs(5), answer.closed()).await.unwrap();
}

#[tokio::test]
async fn segments_of_no_flow_are_reset_and_resets_are_not() {
    let mut bench = Bench::new();
    bench.feed(&v4().tcp(ACK, 5, 77, b"x"));
    let sent = bench.one();
    assert_eq!((sent.flags, sent.seq), (RST, 77));
    bench.feed(&v4().tcp(RST, 5, 0, b""));
    bench.feed(&v4().tcp(RST | ACK, 5, 77, b""));
    assert_eq!(bench.device.take_tcp(), []);
    assert_eq!(bench.counters.unknown_flow.get(), 1);
}

#[tokio::test]
async fn what_the_upstream_sent_early_comes_first() {
    let mut bench = Bench::new();
    bench.feed(&v4().syn(100));
    let (mut far, syn_ack) = bench.accept(b"early ").await;
    far.write_all(b"late").await.unwrap();
    bench.feed(&v4().tcp(ACK, 101, syn_ack.seq.wrapping_add(1), b""));
    let mut bytes = Vec::new();
    while bytes.len() < 10 {
        bytes.extend(bench.sent().await.into_iter().flat_map(|sent| sent.payload));
    }
    assert_eq!(bytes, b"early late");
    assert_eq!(bench.counters.bytes_received.get(), 10);
}

#[tokio::test]
async fn a_reset_in_syn_received_ends_the_flow_and_resets_the_upstream() {
    let mut bench = Bench::new();
    bench.feed(&v4().syn(100));
    let (mut far, syn_ack) = bench.accept(b"").await;
    bench.feed(&v4().tcp(RST | ACK, 101, syn_ack.seq.wrapping_add(1), b""));
    bench.turn();
    assert!(bench.flows().is_empty());
    assert_eq!(far.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(bench.counters.flows_reset_by_program.get(), 1);
}

#[tokio::test]
async fn an_unanswered_syn_ack_does_not_stay_for_ever() {
    let mut bench = Bench::new();
    bench.feed(&v4().syn(100));
    let (mut far, _) = bench.accept(b"").await;
    bench.later(59);
    assert_eq!(bench.flows(), ["SYN-RECV"]);
    bench.later(2);
    assert!(bench.flows().is_empty());
    assert_eq!(far.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(bench.counters.flows_timed_out.get(), 1);
}

#[tokio::test]
async fn a_program_whose_system_vanished_does_not_keep_its_flow() {
    for (bytes, limit) in [(&b"unacknowledged"[..], 900), (b"", 2700)] {
        let mut bench = Bench::new();
        let (mut far, _) = bench.establish(v4()).await;
        if !bytes.is_empty() {
            far.write_all(bytes).await.unwrap();
            bench.sent().await;
        }
        bench.later(limit - 1);
        assert_eq!(bench.flows(), ["ESTAB"]);
        bench.later(2);
        assert!(bench.flows().is_empty());
        assert_eq!(far.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!(bench.counters.flows_timed_out.get(), 1);
    }
}

#[tokio::test]
async fn a_quiet_program_whose_system_answers_keeps_its_flow() {
    let mut bench = Bench::new();
    let (_far, ours) = bench.establish(v4()).await;
    for _ in 0..20 {
        bench.later(901);
        let probe = bench.one();
        assert_eq!((probe.flags, probe.seq), (ACK, ours.wrapping_sub(1)));
        bench.feed(&v4().tcp(ACK, 101, ours, b""));
        bench.turn();
        assert_eq!(bench.flows(), ["ESTAB"]);
    }
}

#[tokio::test]
async fn a_flow_at_rest_holds_no_memory_and_goes_on_unharmed() {
    let mut bench = Bench::new();
    let (mut far, ack) = bench.establish(v4()).await;
    let (first, second) = ([1; 9000], [2; 9000]);
    bench.feed(&v4().tcp(ACK, 101, ack, &first));
    bench.turn();
    far.write_all(&first).await.unwrap();
    let mut received: Vec<u8> = Vec::new();
    while received.len() < first.len() {
        received.extend(bench.sent().await.into_iter().flat_map(|sent| sent.payload));
    }
    bench.feed(&v4().tcp(ACK, 9101, ack + 9000, b""));
    bench.turn();
    assert!(bench.shard.memory().0 > 0);
    bench.later(4);
    assert!(bench.shard.memory().0 > 0, "too early");
    bench.later(2);
    assert_eq!(bench.shard.memory().0, 0);

    bench.feed(&v4().tcp(ACK, 9101, ack + 9000, &second));
    bench.turn();
    far.write_all(&second).await.unwrap();
    while received.len() < 18_000 {
        received.extend(bench.sent().await.into_iter().flat_map(|sent| sent.payload));
    }
    assert!(received[..9000] == first && received[9000..] == second);
    let mut got = [0; 18_000];
    far.read_exact(&mut got).await.unwrap();
    assert!(got[..9000] == first && got[9000..] == second);
    bench.feed(&v4().tcp(ACK, 18_101, ack + 18_000, b""));
    bench.turn();
    bench.later(6);
    assert_eq!(bench.shard.memory().0, 0, "it rests again");
}

#[tokio::test]
async fn a_segment_that_came_out_of_order_survives_the_rest() {
    let mut bench = Bench::new();
    let (mut far, ack) = bench.establish(v4()).await;
    bench.feed(&v4().tcp(ACK, 106, ack, b"world"));
    bench.turn();
    bench.later(7);
    bench.feed(&v4().tcp(ACK, 101, ack, b"hello"));
    bench.turn();
    let mut got = [0; 10];
    far.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"helloworld");
    // A repetition holds nothing back.
    bench.feed(&v4().tcp(ACK, 106, ack, b"world"));
    bench.turn();
    bench.later(7);
    assert_eq!(bench.shard.memory().0, 0);
}

#[tokio::test]
async fn both_sides_finish_and_the_port_is_used_again_within_one_batch() {
    let mut bench = Bench::new();
    let (far, ours) = bench.establish(v4()).await;
    drop(far);
    let fin = bench.sent().await.remove(0);
    assert_eq!((fin.flags, fin.seq), (FIN | ACK, ours));
    // The last ACK, the program's FIN and its next SYN, before the flow is looked at.
    bench.feed(&v4().tcp(FIN | ACK, 101, ours.wrapping_add(1), b""));
    bench.feed(&v4().syn(9000));
    bench.turn();
    let ack = bench.one();
    assert_eq!((ack.flags, ack.ack), (ACK, 102));
    assert_eq!(bench.flows(), ["SYN-SENT"]);
    assert_eq!(bench.counters.flows_closed.get(), 1);
    let (_far, syn_ack) = bench.accept(b"").await;
    assert_eq!(syn_ack.ack, 9001);
}

#[tokio::test]
async fn a_program_that_finishes_gets_the_rest_of_the_answer() {
    let mut bench = Bench::new();
    let (mut far, ours) = bench.establish(v6()).await;
    bench.feed(&v6().tcp(FIN | ACK, 101, ours, b"question"));
    let ack = bench.sent().await.remove(0);
    assert_eq!(ack.ack, 110);
    assert_eq!(bench.flows(), ["CLOSE-WAIT"]);
    let mut question = Vec::new();
    far.read_to_end(&mut question).await.unwrap();
    assert_eq!(question, b"question");
    far.write_all(b"answer").await.unwrap();
    drop(far);
    let mut sent = bench.sent().await;
    while !sent.iter().any(|sent| sent.flags & FIN != 0) {
        sent.extend(bench.sent().await);
    }
    let answer: Vec<u8> = sent.iter().flat_map(|sent| sent.payload.clone()).collect();
    assert_eq!(answer, b"answer");
    bench.feed(&v6().tcp(ACK, 110, ours.wrapping_add(7), b""));
    bench.turn();
    assert!(bench.flows().is_empty());
    assert_eq!((bench.counters.flows_closed.get(), bench.counters.flows_timed_out.get()), (1, 0));
}

#[tokio::test]
async fn an_upstream_that_finishes_does_not_hold_a_silent_program_for_ever() {
    let mut bench = Bench::new();
    let (far, ours) = bench.establish(v4()).await;
    drop(far);
    bench.sent().await;
    bench.feed(&v4().tcp(ACK, 101, ours.wrapping_add(1), b""));
    bench.turn();
    assert_eq!(bench.flows(), ["FIN-WAIT-2"]);
    bench.later(599);
    assert_eq!(bench.flows(), ["FIN-WAIT-2"]);
    bench.later(2);
    assert!(bench.device.take_tcp().iter().any(|sent| sent.flags & RST != 0));
    assert!(bench.flows().is_empty());
}

#[tokio::test]
async fn a_reset_of_the_upstream_comes_after_what_it_sent_before() {
    let mut bench = Bench::new();
    let (mut far, ours) = bench.establish(v4()).await;
    far.write_all(b"last words").await.unwrap();
    let words = bench.sent().await.remove(0);
    assert_eq!(words.payload, b"last words");
    far.set_zero_linger().unwrap();
    drop(far);
    tokio::time::sleep(Duration::from_millis(20)).await;
    bench.turn();
    assert_eq!(bench.device.take_tcp(), [], "the program has not acknowledged the words yet");
    bench.feed(&v4().tcp(ACK, 101, ours.wrapping_add(10), b""));
    bench.turn();
    assert_eq!(bench.one().flags & RST, RST);
    assert!(bench.flows().is_empty());
    assert_eq!(bench.counters.flows_reset_by_upstream.get(), 1);
}

#[tokio::test]
async fn a_device_that_would_block_loses_nothing() {
    let mut bench = Bench::new();
    let (mut far, _) = bench.establish(v4()).await;
    bench.device.fail(Some(libc::EAGAIN));
    far.write_all(&[7; 40_000]).await.unwrap();
    for _ in 0..50 {
        bench.turn();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(bench.shard.sender.is_blocked());
    assert!(!bench.shard.sender.flush());
    bench.device.fail(None);
    assert!(bench.shard.sender.flush());
    bench.shard.unblocked();
    let mut bytes = 0;
    while bytes < 40_000 {
        bytes += bench.sent().await.iter().map(|sent| sent.payload.len()).sum::<usize>();
    }
    assert_eq!((bytes, bench.counters.drop_device.get()), (40_000, 0));
}

#[tokio::test]
async fn a_device_that_is_gone_is_told_and_one_that_is_down_is_not() {
    let mut bench = Bench::new();
    bench.device.fail(Some(libc::EIO));
    bench.feed(&v4().tcp(ACK, 5, 77, b""));
    assert!(bench.shard.sender.take_lost().is_none());
    bench.device.fail(Some(libc::EBADFD));
    bench.feed(&v4().tcp(ACK, 5, 77, b""));
    assert!(bench.shard.sender.take_lost().is_some());
    assert_eq!(bench.counters.drop_device.get(), 2);
}

#[tokio::test]
async fn udp_gets_port_unreachable_within_a_rate() {
    let mut bench = Bench::new();
    for _ in 0..1500 {
        bench.feed(&v4().udp(b"quic"));
    }
    let answer = bench.device.next().unwrap();
    // ICMP, type 3, code 3, quoting the packet.
    assert_eq!((answer[9], &answer[20..22], &answer[28..]), (1, &[3, 3][..], &v4().udp(b"quic")[..]));
    assert_eq!((bench.counters.udp_unreachable.get(), bench.counters.drop_udp_limit.get()), (1000, 500));
    bench.now += smoltcp::time::Duration::from_millis(10);
    bench.feed(&v6().udp(b"quic"));
    assert_eq!(bench.counters.udp_unreachable.get(), 1001);
}

#[tokio::test]
async fn with_offloads_each_packet_says_what_is_left_to_do() {
    for packets in [v4(), v6()] {
        let mut bench = Bench::framed(Framing::Vnet);
        let frame = |packet: Vec<u8>| [vec![0; vnet::LENGTH], packet].concat();
        bench.feed(&frame(packets.syn(100)));
        let (_, answer) = bench.attempt().await;
        let (tunnel, mut far) = tunnel(b"").await;
        answer.send(Ok(tunnel)).unwrap();
        bench.outcome().await;
        let syn_ack = bench.device.next().unwrap();
        let header = if packets.tuple().is_v6() { 40 } else { 20 };
        assert_eq!(syn_ack[..2], [1, 0], "checksum, no segmentation");
        let seq = i32::from_be_bytes(syn_ack[vnet::LENGTH + header + 4..][..4].try_into().unwrap());
        bench.feed(&frame(packets.tcp(ACK, 101, seq.wrapping_add(1), b"")));
        far.write_all(&[7; 20_000]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        bench.turn();
        let data = bench.device.next().unwrap();
        let (source, destination) = (packets.tuple().destination, packets.tuple().source);
        let tcp = TcpPacket::new_checked(&data[vnet::LENGTH + header..]).unwrap();
        assert!(tcp.verify_partial_checksum(&source.into(), &destination.into()), "the kernel adds up the rest");
        assert!(data.len() > 10_000, "{} bytes are no super-segment", data.len());
        let kind = if packets.tuple().is_v6() { 4 } else { 1 };
        assert_eq!(data[..2], [1, kind]);
        assert_eq!(u16::from_ne_bytes([data[2], data[3]]) as usize, header + 20);
        // The MSS of the SYN; this program uses no timestamps.
        assert_eq!(u16::from_ne_bytes([data[4], data[5]]), 1400);
    }
}

#[tokio::test]
async fn the_end_resets_everyone() {
    let mut bench = Bench::new();
    let (mut far, _) = bench.establish(v4()).await;
    bench.feed(&v6().syn(1));
    let (_, mut answer) = bench.attempt().await;
    bench.shard.abort_all(bench.now);
    let sent = bench.device.take_tcp();
    assert_eq!(sent.len(), 2);
    assert!(sent.iter().all(|sent| sent.flags & RST != 0));
    assert_eq!(far.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    tokio::time::timeout(Duration::from_secs(5), answer.closed()).await.unwrap();
    assert!(bench.flows().is_empty());
}

#[tokio::test]
async fn a_failing_upstream_is_told_once_and_so_is_its_return() {
    let mut bench = Bench::new();
    let mut port = 1;
    for (outcome, expected) in [
        (Some(unreachable()), None),
        (Some(unreachable()), None),
        // An answer about a destination shows that the upstream works.
        (Some(destination()), None),
        (Some(unreachable()), None),
        (Some(unreachable()), None),
        (Some(unreachable()), Some("failing")),
        (Some(unreachable()), None),
        (None, Some("working")),
        (None, None),
    ] {
        bench.feed(&Packets { source_port: port, ..v4() }.syn(1));
        port += 1;
        match outcome {
            Some(error) => bench.refuse(error).await,
            None => drop(bench.accept(b"").await),
        }
        bench.device.take_tcp();
        let told = bench.events.try_recv().ok().map(|event| match event {
            Event::UpstreamFailing(_) => "failing",
            Event::UpstreamWorking => "working",
            other => panic!("{other:?}"),
        });
        assert_eq!(told, expected, "attempt {}", port - 1);
    }
}

fn destination() -> ConnectError {
    ConnectError::Destination { upstream: "proxy:1".into(), target: "x:1".into(), status: 502, reason: String::new() }
}

#[tokio::test]
async fn news_that_the_full_channel_did_not_take_are_told_later() {
    let mut bench = Bench::new();
    for port in 1..=7 {
        bench.feed(&Packets { source_port: port, ..v4() }.syn(1));
        // Fails three times, works, fails three times: the channel holds one event only.
        if port == 4 { bench.refuse(destination()).await } else { bench.refuse(unreachable()).await }
    }
    assert!(matches!(bench.events.try_recv(), Ok(Event::UpstreamFailing(_))));
    assert!(bench.events.try_recv().is_err(), "failing was known already");
    bench.feed(&v4().syn(1));
    bench.refuse(destination()).await;
    assert!(matches!(bench.events.try_recv(), Ok(Event::UpstreamWorking)));
}
