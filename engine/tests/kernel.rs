//! The engine between the real kernel's TCP on both sides: programs → TUN → engine → servers.

#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a failure here is the test's failure")]

mod lab;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use lab::{Lab, V4, V6, connect, echo, echo_through, read_pattern, wait_until, write_pattern};
use proxyvpn_engine::config::Limits;
use proxyvpn_engine::event::Event;

const MIB: usize = 1024 * 1024;

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn bytes_pass_unchanged_in_both_families_at_small_and_large_mtu() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    for mtu in [1500, 65535] {
        let running = lab.start(mtu);
        for address in [V4, V6] {
            assert_eq!(lab.program(move || echo_through(address, 64 * MIB)).join().unwrap(), 64 * MIB, "mtu {mtu}");
        }
        running.wait_until_empty();
        assert_eq!(running.counter("bytes-sent"), 128 * MIB as u64);
        assert_eq!(running.counter("bytes-received"), 128 * MIB as u64);
        for drop in ["drop-malformed", "drop-checksum", "drop-device"] {
            assert_eq!(running.counter(drop), 0, "{drop}");
        }
        println!("mtu {mtu}: {}", running.counters());
        assert_eq!(running.stop().len(), 1);
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_device_without_offloads_works_too() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let running = lab.start_with(1500, false, Limits::default());
    for address in [V4, V6] {
        assert_eq!(lab.program(move || echo_through(address, 8 * MIB)).join().unwrap(), 8 * MIB);
    }
    running.wait_until_empty();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_port_nobody_listens_on_is_a_refused_connect() {
    let lab = Lab::new();
    let running = lab.start(65535);
    for address in [V4, V6] {
        let error = lab.program(move || connect(address, 9).unwrap_err()).join().unwrap();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    running.wait_until_empty();
    assert_eq!(running.counter("flows-refused"), 2);
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn each_side_may_finish_first_and_go_on_reading() {
    let lab = Lab::new();
    // Finishes first, then counts what still comes and tells through the next connection's answer.
    let (counted, count) = std::sync::mpsc::channel();
    lab.serve(9001, move |stream| {
        write_pattern(&stream, 4 * MIB).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        counted.send(read_pattern(&stream).unwrap()).unwrap();
    });
    // Reads to the end, then answers.
    lab.serve(9002, |stream| {
        let total = read_pattern(&stream).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        write_pattern(&stream, total).unwrap();
    });
    let running = lab.start(1500);
    for address in [V4, V6] {
        let server_first = lab.program(move || {
            let stream = connect(address, 9001).unwrap();
            let got = read_pattern(&stream).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            write_pattern(&stream, 4 * MIB).unwrap();
            got
        });
        assert_eq!(server_first.join().unwrap(), 4 * MIB);
        assert_eq!(count.recv_timeout(Duration::from_secs(10)).unwrap(), 4 * MIB);
        let program_first = lab.program(move || {
            let stream = connect(address, 9002).unwrap();
            write_pattern(&stream, 4 * MIB).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            read_pattern(&stream).unwrap()
        });
        assert_eq!(program_first.join().unwrap(), 4 * MIB);
    }
    running.wait_until_empty();
    assert_eq!(running.counter("flows-timed-out"), 0);
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn what_the_program_sent_before_leaving_reaches_a_slow_server() {
    let lab = Lab::new();
    let (counted, count) = std::sync::mpsc::channel();
    lab.serve(9000, move |stream| {
        // The server is done first, so that the program's FIN ends the connection on its side at once.
        stream.shutdown(Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_secs(12));
        counted.send(read_pattern(&stream).unwrap()).unwrap();
    });
    // The server's and the upstream socket's buffers hold little, the engine's ring holds the rest.
    lab.sysctl("tcp_rmem", "4096 32768 65536");
    lab.sysctl("tcp_wmem", "4096 32768 65536");
    let running = lab.start_with(1500, true, Limits { ring: MIB, ..Limits::default() });
    lab.program(|| {
        let stream = connect(V4, 9000).unwrap();
        assert_eq!(read_pattern(&stream).unwrap(), 0);
        write_pattern(&stream, MIB).unwrap();
    })
    .join()
    .unwrap();
    wait_until("the program is gone", || {
        running.runtime.block_on(running.engine.flows()).iter().all(|flow| flow.state == "TIME-WAIT")
    });
    assert!(running.counter("bytes-sent") < MIB as u64 / 2, "the upstream took it all: {}", running.counters());
    // Longer than smoltcp's TIME-WAIT, whose end would wipe the ring.
    assert_eq!(count.recv_timeout(Duration::from_secs(30)).unwrap(), MIB);
    running.wait_until_empty();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_side_that_does_not_read_stops_the_other_and_loses_nothing() {
    const LENGTH: usize = 30 * MIB;
    let lab = Lab::new();
    let (counted, count) = std::sync::mpsc::channel();
    lab.serve(9001, move |stream| {
        std::thread::sleep(Duration::from_secs(3));
        counted.send(read_pattern(&stream).unwrap()).unwrap();
    });
    lab.serve(9002, |stream| write_pattern(&stream, LENGTH).unwrap());
    let running = lab.start(1500);
    for address in [V4, V6] {
        let up = lab.program(move || write_pattern(&connect(address, 9001).unwrap(), LENGTH).unwrap());
        let down = lab.program(move || {
            let stream = connect(address, 9002).unwrap();
            std::thread::sleep(Duration::from_secs(3));
            read_pattern(&stream).unwrap()
        });
        std::thread::sleep(Duration::from_secs(2));
        let (sent, received) = (running.counter("bytes-sent"), running.counter("bytes-received"));
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!((running.counter("bytes-sent"), running.counter("bytes-received")), (sent, received), "not stopped");
        up.join().unwrap();
        assert_eq!(down.join().unwrap(), LENGTH);
        assert_eq!(count.recv_timeout(Duration::from_secs(10)).unwrap(), LENGTH);
    }
    running.wait_until_empty();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_reset_on_one_side_is_a_reset_on_the_other() {
    let lab = Lab::new();
    let (told, end) = std::sync::mpsc::channel();
    lab.serve(9001, move |mut stream| {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        told.send(stream.read(&mut byte).map_err(|error| error.kind())).unwrap();
    });
    lab.serve(9002, |mut stream| {
        stream.write_all(b"last words").unwrap();
        std::thread::sleep(Duration::from_millis(200));
        linger_zero(&stream);
    });
    let running = lab.start(65535);
    for address in [V4, V6] {
        lab.program(move || {
            let mut stream = connect(address, 9001).unwrap();
            stream.write_all(b"x").unwrap();
            std::thread::sleep(Duration::from_millis(200));
            linger_zero(&stream);
        })
        .join()
        .unwrap();
        assert_eq!(end.recv_timeout(Duration::from_secs(5)).unwrap(), Err(ErrorKind::ConnectionReset));
        let (words, error) = lab
            .program(move || {
                let mut stream = connect(address, 9002).unwrap();
                std::thread::sleep(Duration::from_millis(500));
                let mut words = Vec::new();
                let error = stream.read_to_end(&mut words).unwrap_err().kind();
                (words, error)
            })
            .join()
            .unwrap();
        // Linux gives what is queued before the error.
        assert_eq!((&words[..], error), (&b"last words"[..], ErrorKind::ConnectionReset));
    }
    running.wait_until_empty();
    assert_eq!(running.counter("flows-reset-by-program"), 2);
    assert_eq!(running.counter("flows-reset-by-upstream"), 2);
}

fn linger_zero(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_port_can_be_used_again_at_once() {
    let lab = Lab::new();
    // The server closes first, which would leave TIME-WAIT on its side of the engine.
    lab.serve(9001, |mut stream| stream.write_all(b"x").unwrap());
    lab.serve(9002, echo);
    let running = lab.start(65535);
    for address in [V4, V6] {
        lab.program(move || {
            for round in 0..50 {
                let stream = from_port(address, 4001, 9001);
                let mut answer = Vec::new();
                (&stream).read_to_end(&mut answer).unwrap();
                assert_eq!(answer, b"x", "round {round}");
            }
        })
        .join()
        .unwrap();
        assert_eq!(lab.program(move || (0..50).map(|_| echo_once(address)).sum::<usize>()).join().unwrap(), 50);
    }
    running.wait_until_empty();
    assert_eq!(running.counter("flows-opened"), 200);
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_port_in_time_wait_can_be_used_again_thanks_to_timestamps() {
    let lab = Lab::new();
    lab.sysctl("tcp_tw_reuse", "1");
    lab.serve(9002, echo);
    let running = lab.start(65535);
    for address in [V4, V6] {
        lab.program(move || {
            for _ in 0..2 {
                let mut stream = from_port(address, 4001, 9002);
                // The program closes first: TIME-WAIT is on its side.
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!(stream.read(&mut [0]).unwrap(), 0);
                drop(stream);
                // The system's clock for this has a resolution of a second.
                std::thread::sleep(Duration::from_millis(2100));
            }
        })
        .join()
        .unwrap();
    }
    running.wait_until_empty();
}

fn echo_once(address: &str) -> usize {
    let mut stream = connect(address, 9002).unwrap();
    stream.write_all(b"y").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap()
}

/// A connection from a fixed port of the program's, as soon as its system lets go of the port: the last ACK of the connection
/// before may still be under way.
fn from_port(address: &str, from: u16, to: u16) -> TcpStream {
    let to: SocketAddr = (address.parse::<std::net::IpAddr>().unwrap(), to).into();
    let any: std::net::IpAddr = if to.is_ipv6() { [0; 16].into() } else { [0; 4].into() };
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::from((any, from)).into()).unwrap();
        match socket.connect_timeout(&to.into(), Duration::from_secs(5)) {
            Ok(()) => return socket.into(),
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("port {from} stays in use");
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn udp_is_refused_at_once() {
    let lab = Lab::new();
    let running = lab.start(1500);
    for (address, any) in [(V4, "0.0.0.0:0"), (V6, "[::]:0")] {
        let error = lab.program(move || {
            let socket = std::net::UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket.connect((address, 443)).unwrap();
            socket.send(&[0; 1200]).unwrap();
            socket.recv(&mut [0; 8]).unwrap_err().kind()
        });
        assert_eq!(error.join().unwrap(), ErrorKind::ConnectionRefused, "{address}");
    }
    assert_eq!(running.counter("udp-unreachable"), 2);
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_deleted_device_is_told_and_flows_are_reset() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let mut running = lab.start(1500);
    let stream = lab.program(|| connect(V4, 9000).unwrap()).join().unwrap();
    lab.app("link del pvpn0");
    let event = running
        .runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(5), running.events.recv()).await.unwrap() });
    assert!(matches!(event, Some(Event::DeviceLost(_))), "{event:?}");
    running.wait_until_empty();
    drop(stream);
    assert_eq!(running.stop().len(), 1);
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn stopping_resets_programs_and_servers_and_gives_the_queue_back() {
    let lab = Lab::new();
    let (told, end) = std::sync::mpsc::channel();
    lab.serve(9000, move |mut stream| told.send(stream.read(&mut [0]).map_err(|error| error.kind())).unwrap());
    let running = lab.start(1500);
    let mut stream = lab.program(|| connect(V4, 9000).unwrap()).join().unwrap();
    let waiting = lab.program(|| connect("10.88.99.99", 9000).map(drop));
    wait_until("the flow is open", || running.counter("flows-opened") >= 1);
    let queues = running.stop();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(end.recv_timeout(Duration::from_secs(5)).unwrap(), Err(ErrorKind::ConnectionReset));
    // Still the same device: what is given back can be handed on.
    assert_eq!(queues.len(), 1);
    drop(queues);
    let _ = waiting.join();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn more_flows_than_allowed_are_refused_and_counted() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let running = lab.start_with(1500, true, Limits { flows: 3, ..Limits::default() });
    let streams = lab.program(|| (0..5).map(|_| connect(V4, 9000)).collect::<Vec<_>>()).join().unwrap();
    let refused = streams.iter().filter(|stream| stream.is_err()).count();
    assert_eq!(refused, 2);
    assert_eq!(running.counter("flows-refused-full"), 2);
    drop(streams);
    running.wait_until_empty();
    assert!(lab.program(|| connect(V4, 9000).is_ok()).join().unwrap());
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn many_that_hold_much_leave_memory_for_others_and_lose_nothing() {
    const MANY: usize = 24;
    let lab = Lab::new();
    lab.serve(9000, echo);
    lab.serve(9002, |stream| write_pattern(&stream, 8 * MIB).unwrap());
    // The systems' buffers hold little, so that the engine's rings fill.
    lab.sysctl("tcp_rmem", "4096 32768 65536");
    lab.sysctl("tcp_wmem", "4096 32768 65536");
    // Enough for the rings of twelve.
    let running = lab.start_with(1500, true, Limits { memory: 3 * MIB, ..Limits::default() });
    let streams =
        lab.program(|| (0..MANY).map(|number| connect([V4, V6][number % 2], 9002).unwrap()).collect::<Vec<_>>());
    let streams = streams.join().unwrap();
    let mut last = 0;
    wait_until("all are stuck", || {
        std::thread::sleep(Duration::from_millis(300));
        let moved = running.counter("bytes-received");
        std::mem::replace(&mut last, moved) == moved
    });
    let mut stream = lab.program(|| connect(V4, 9000)).join().unwrap().unwrap();
    stream.write_all(b"a modest program").unwrap();
    stream.read_exact(&mut [0; 16]).unwrap();
    for stream in streams {
        assert_eq!(read_pattern(&stream).unwrap(), 8 * MIB);
    }
    assert_eq!(running.counter("flows-refused-memory"), 0);
    drop(stream);
    running.wait_until_empty();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn several_queues_share_the_work() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let running = lab.start_queues(1500, 2);
    let programs: Vec<_> = (0..32).map(|_| lab.program(|| echo_through(V4, MIB))).collect();
    for program in programs {
        assert_eq!(program.join().unwrap(), MIB);
    }
    running.wait_until_empty();
    assert_eq!(running.counter("flows-opened"), 32);
    assert_eq!(running.stop().len(), 2);
}

/// `count` connections, IPv4 and IPv6 by turns, that have carried a few bytes both ways.
fn connections(lab: &Lab, count: usize) -> Vec<TcpStream> {
    let streams = lab.program(move || {
        (0..count).map(|number| connect([V4, V6][number % 2], 9000).unwrap()).inspect(exchange).collect::<Vec<_>>()
    });
    streams.join().unwrap()
}

fn exchange(mut stream: &TcpStream) {
    stream.write_all(&[7; 3000]).unwrap();
    stream.read_exact(&mut [0; 3000]).unwrap();
}

/// Which of two shards each flow is on, by the program's address.
fn shards(running: &lab::Running) -> HashMap<SocketAddr, u64> {
    running.runtime.block_on(running.engine.flows()).iter().map(|flow| (flow.source, flow.id % 2)).collect()
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_flow_stays_on_its_shard_in_both_directions_and_after_a_pause() {
    const COUNT: usize = 400;
    let lab = Lab::new();
    lab.serve(9000, echo);
    let running = lab.start_queues(1500, 2);
    let streams = connections(&lab, COUNT);
    let before = shards(&running);
    assert_eq!(before.len(), COUNT);
    for version in [SocketAddr::is_ipv4, SocketAddr::is_ipv6] {
        let first = before.iter().filter(|(source, shard)| version(source) && **shard == 0).count();
        // Even if the hash were a coin, fewer than 50 of 200 would not be seen in the life of this test.
        assert!((COUNT / 8..COUNT * 3 / 8).contains(&first), "{first} of {} on the first shard", COUNT / 2);
    }
    for _ in 0..2 {
        // Longer than the device remembers which queue a flow was answered on.
        std::thread::sleep(Duration::from_secs(4));
        streams.iter().for_each(exchange);
    }
    assert_eq!(shards(&running), before);
    // Each segment that the engine read was of a flow of its own shard.
    for counter in ["segments-handed-over", "unknown-flow", "drop-handover", "flows-closed"] {
        assert_eq!(running.counter(counter), 0, "{}", running.counters());
    }
    drop(streams);
    running.wait_until_empty();
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn a_segment_on_the_wrong_queue_does_not_end_its_flow() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let (keep, kept) = std::sync::mpsc::channel();
    let running = lab.start_queues_with(1500, 2, Limits::default(), move |queues| {
        keep.send(queues[0].as_fd().try_clone_to_owned().unwrap()).unwrap();
    });
    let streams = connections(&lab, 50);
    let before = shards(&running);
    lab::steer_to_the_first_queue(&kept.recv().unwrap());
    streams.iter().for_each(exchange);
    assert_eq!(shards(&running), before);
    assert!(running.counter("segments-handed-over") > 0, "{}", running.counters());
    assert_eq!(running.counter("flows-closed"), 0, "{}", running.counters());
    drop(streams);
    running.wait_until_empty();
    assert_eq!(running.counter("flows-reset-by-program") + running.counter("flows-reset-by-upstream"), 0);
}

#[test]
#[ignore = "needs root and network namespaces; run by scripts/test-privileged.sh"]
fn an_engine_with_idle_flows_sleeps() {
    let lab = Lab::new();
    lab.serve(9000, echo);
    let running = lab.start(65535);
    let streams = lab
        .program(|| {
            (0..50)
                .map(|_| {
                    let mut stream = connect(V4, 9000).unwrap();
                    stream.write_all(&[1; 1000]).unwrap();
                    stream.read_exact(&mut [0; 1000]).unwrap();
                    stream
                })
                .collect::<Vec<_>>()
        })
        .join()
        .unwrap();
    // Timers that were armed for bytes on their way run out unneeded, and the flows come to rest, at a full second after 5 s.
    std::thread::sleep(Duration::from_secs(8));
    let before = lab::switches_of("engine-0");
    std::thread::sleep(Duration::from_secs(2));
    let woken = lab::switches_of("engine-0") - before;
    assert!(woken <= 2, "woken {woken} times in 2 s with nothing to do");
    drop(streams);
    running.wait_until_empty();
}
