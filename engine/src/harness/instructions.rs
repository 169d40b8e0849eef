//! Scenarios whose instructions are counted (scripts/instructions.sh): a shard between doubles, without a device and without a
//! network. Only what runs within [`counted_instructions`] counts: the shard, not the doubles.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hint::black_box;
use std::io;
use std::rc::Rc;

use smoltcp::time::Duration;
use tokio::task::yield_now;

use crate::config::Limits;
use crate::device::{Framing, Queue};
use crate::packet::parse::{self, ACK, FIN, SYN};
use crate::testing::{Bench, Far, Packets, contents, pair};

/// More than twice what is used, so that nobody is asked whose flows they are.
const LIMITS: Limits = Limits { flows: 4000, pending: 4000, ring: 256 * 1024, memory: 4 << 30 };
/// What a socket towards an upstream takes at once.
const ROOM: usize = 256 * 1024;
/// Bytes of a bulk transfer.
const BULK: usize = 4 * 1024 * 1024;
/// Payload of a super-segment.
const LARGE: usize = 60_000;
/// Connections, and idle flows.
const MANY: u16 = 1000;

/// The scenarios.
pub const SCENARIOS: [&str; 5] = ["download", "upload", "connections", "idle", "parse"];

/// Runs a scenario; false when there is none of this name.
#[must_use]
pub fn run(scenario: &str) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    runtime.block_on(async {
        match scenario {
            "download" => download().await,
            "upload" => upload().await,
            "connections" => connections().await,
            "idle" => idle().await,
            "parse" => packets(),
            _ => return false,
        }
        true
    })
}

/// The name by which callgrind begins and ends to collect.
#[inline(never)]
fn counted_instructions(work: &mut dyn FnMut()) {
    work();
    black_box(());
}

/// A device that keeps only how each frame begins.
#[derive(Clone, Default)]
struct Sink(Rc<RefCell<VecDeque<Kept>>>);

/// First bytes and length of a frame.
type Kept = ([u8; 64], usize);

impl Queue for Sink {
    fn read(&self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn write(&self, frame: &[u8]) -> io::Result<()> {
        let mut start = [0; 64];
        let kept = frame.len().min(64);
        start[..kept].copy_from_slice(&frame[..kept]);
        self.0.borrow_mut().push_back((start, frame.len()));
        Ok(())
    }
}

struct Shop {
    bench: Bench<Sink>,
    sink: Sink,
}

/// A program's connection, IPv4: what it sends next, and what it expects.
struct Program {
    packets: Packets,
    next: i32,
    expected: i32,
    far: Far,
}

impl Shop {
    fn new() -> Self {
        let sink = Sink::default();
        sink.0.borrow_mut().reserve(4096);
        let bench = Bench::wrapped(Framing::Vnet, LIMITS, |_| sink.clone());
        Self { bench, sink }
    }

    /// The shard takes in a packet.
    fn feed(&mut self, packet: &[u8]) {
        // The kernel vouches for it.
        let mut frame = vec![0; Framing::Vnet.prefix()];
        frame[0] = 1;
        frame.extend_from_slice(packet);
        counted_instructions(&mut || self.bench.feed(&frame));
    }

    /// The loop's turns until there is nothing to do.
    async fn turns(&mut self) {
        loop {
            yield_now().await;
            counted_instructions(&mut || self.bench.turn());
            if !self.bench.shard.is_busy() {
                return;
            }
        }
    }

    async fn open(&mut self, port: u16) -> Program {
        let packets = Packets { source_port: port, ..Packets::new("10.0.0.1", "192.0.2.9") };
        self.feed(&packets.syn(100));
        let (_, attempt) = self.bench.attempt().await;
        let (tunnel, far) = pair(0, 0, ROOM);
        attempt.send(Ok(tunnel)).unwrap();
        let (id, outcome) = self.bench.outcomes.recv().await.unwrap();
        let mut outcome = Some(outcome);
        counted_instructions(&mut || {
            if let Some(outcome) = outcome.take() {
                self.bench.shard.connected(self.bench.now, id, outcome);
            }
        });
        self.turns().await;
        let mut program = Program { packets, next: 101, expected: 0, far };
        self.taken(&mut program);
        self.feed(&program.segment(0, &[]));
        program
    }

    /// What the program learns from the frames that were sent, as far as numbers go.
    fn taken(&self, program: &mut Program) {
        const TCP: usize = 30;
        for (frame, length) in self.sink.0.borrow_mut().drain(..) {
            let number = i32::from_be_bytes(frame[TCP + 4..TCP + 8].try_into().unwrap());
            let headers = TCP + usize::from(frame[TCP + 12] >> 4) * 4;
            let flags = frame[TCP + 13];
            let marks = i32::from(flags & SYN != 0) + i32::from(flags & FIN != 0);
            program.expected = number.wrapping_add((length - headers) as i32 + marks);
        }
    }
}

impl Program {
    fn segment(&mut self, flags: u8, payload: &[u8]) -> Vec<u8> {
        let packet = self.packets.tcp(flags | ACK, self.next, self.expected, payload);
        self.next += payload.len() as i32 + i32::from(flags & FIN != 0);
        packet
    }
}

async fn download() {
    let mut shop = Shop::new();
    let mut program = shop.open(1).await;
    while program.far.written < BULK {
        program.far.write(LARGE);
        shop.turns().await;
        shop.taken(&mut program);
        shop.feed(&program.segment(0, &[]));
    }
    assert_eq!(shop.bench.counters.bytes_received.get(), program.far.written as u64);
}

async fn upload() {
    let mut shop = Shop::new();
    let mut program = shop.open(1).await;
    let mut at = 0;
    while at < BULK {
        let payload = contents(0, at, at + LARGE);
        at += LARGE;
        shop.feed(&program.segment(0, &payload));
        shop.turns().await;
        shop.taken(&mut program);
        program.far.read(LARGE).unwrap();
    }
    assert_eq!(program.far.read, at);
}

async fn connections() {
    let mut shop = Shop::new();
    for port in 1..=MANY {
        let mut program = shop.open(port).await;
        shop.feed(&program.segment(0, &contents(0, 0, 100)));
        shop.turns().await;
        program.far.read(100).unwrap();
        program.far.write(100);
        program.far.finish();
        shop.turns().await;
        shop.taken(&mut program);
        shop.feed(&program.segment(FIN, &[]));
        shop.turns().await;
        shop.taken(&mut program);
    }
    assert_eq!(shop.bench.counters.flows_closed.get(), u64::from(MANY));
}

async fn idle() {
    let mut shop = Shop::new();
    let mut programs = Vec::new();
    for port in 1..=MANY {
        programs.push(shop.open(port).await);
    }
    shop.turns().await;
    // Ten seconds of nothing, and a byte of one program after the other.
    for program in &mut programs {
        shop.bench.now += Duration::from_millis(10);
        shop.feed(&program.segment(0, &[0]));
        shop.turns().await;
        counted_instructions(&mut || {
            black_box(shop.bench.shard.next_deadline());
        });
        shop.sink.0.borrow_mut().clear();
    }
}

fn packets() {
    let (v4, v6) = (Packets::new("10.0.0.1", "192.0.2.9"), Packets::new("fd00::1", "2001:db8::9"));
    let all = [v4.syn(1), v6.syn(1), v4.tcp(ACK, 1, 1, &[7; 1400]), v6.tcp(ACK, 1, 1, &[7; 1400]), v4.udp(&[7; 100])];
    for _ in 0..MANY {
        for packet in &all {
            for vouched_for in [false, true] {
                counted_instructions(&mut || {
                    black_box(parse::parse(black_box(packet), vouched_for).is_ok());
                });
            }
        }
    }
}
