//! A shard among models: programs and upstreams that do what a script says, a device that may block, a clock. Whatever the
//! script, nothing is lost, invented or left behind, and the shard comes to rest.

use std::cell::Cell;
use std::rc::Rc;

use smoltcp::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::yield_now;

use super::pcap::{Pcap, TestClock};
use super::program::{MSS, Program};
use super::script::Script;
use super::upstream::{Far, pair};
use super::{Bench, Double, Packets, complete, fix_header, read_tcp};
use crate::config::Limits;
use crate::counters::Counters;
use crate::device::{Content, Framing, Queue};
use crate::packet::parse::{self, Packet};
use crate::shard::core::Outcome;
use crate::upstream::{ConnectError, Target};

const LIMITS: Limits = Limits { flows: 3, pending: 2, ring: 16 * 1024, memory: MEMORY };
/// What three flows can hold at the most: with more than half of it memory counts as short.
const MEMORY: usize = 3 * 2 * 16 * 1024;
/// Programs; one more than there may be flows.
const PROGRAMS: usize = 4;
/// Bytes that one side of one connection sends at most.
const MOST: usize = 100_000;
/// Turns in a row that may change nothing although the shard says that it has work.
const IDLE_TURNS: usize = 8;
/// Turns that the shard may take to come to rest.
const TURNS: usize = 5000;

/// What the shard is among.
pub(crate) struct World {
    bench: Bench<Pcap<Double>>,
    queue: Pcap<Double>,
    clock: TestClock,
    framing: Framing,
    /// Everybody behaves: all that was sent must arrive.
    polite: bool,
    blocked: bool,
    places: Vec<Place>,
    seen: Seen,
}

/// One program's port: the connection that has it, and who answers for it.
#[derive(Debug)]
struct Place {
    program: Program,
    attempt: Option<oneshot::Sender<Outcome>>,
    far: Option<Far>,
    connections: u8,
}

/// What the counters must come to.
#[derive(Default)]
struct Seen {
    frames: u64,
    short: u64,
    tcp: u64,
    sent: u64,
    to_programs: u64,
    to_upstreams: u64,
}

/// Runs a script to its end, lets everybody finish, and then passes every deadline.
///
/// # Errors
/// The promise that was broken, and where its packets are.
pub(crate) async fn run(script: &[u8], name: &str) -> Result<(), String> {
    let mut script = Script::new(script);
    let mut world = World::new(&mut script);
    let result = world.all(&mut script).await;
    result.map_err(|error| {
        let saved = world.queue.save(name).map_or_else(|error| error.to_string(), |path| path.display().to_string());
        format!("{error}\npackets: {saved}\nflows: {:?}", world.bench.shard.flows(world.bench.now, 10, 0, 1))
    })
}

impl World {
    fn new(script: &mut Script<'_>) -> Self {
        let mode = script.byte();
        let framing = if mode & 1 == 0 { Framing::Bare } else { Framing::Vnet };
        let clock: TestClock = Rc::new(Cell::new(Instant::from_secs(1)));
        let mut queue = None;
        let bench = Bench::wrapped(framing, LIMITS, |device| {
            let pcap = Pcap::new(device, framing, Rc::clone(&clock));
            queue.insert(pcap).clone()
        });
        let places = (0..PROGRAMS)
            .map(|number| Place { program: program(number, 0, 0), attempt: None, far: None, connections: 0 })
            .collect();
        Self {
            queue: queue.unwrap(),
            bench,
            clock,
            framing,
            polite: mode & 2 == 0,
            blocked: false,
            places,
            seen: Seen::default(),
        }
    }

    async fn all(&mut self, script: &mut Script<'_>) -> Result<(), String> {
        while !script.is_over() {
            self.step(script)?;
            if script.byte() & 3 != 0 {
                self.rest().await?;
            }
        }
        self.finish().await?;
        self.pass_deadlines().await?;
        self.check_counters()
    }

    /// One thing that happens.
    fn step(&mut self, script: &mut Script<'_>) -> Result<(), String> {
        let choice = script.byte();
        let number = usize::from(choice >> 5) % PROGRAMS;
        let place = &mut self.places[number];
        let rude = !self.polite;
        match choice & 31 {
            0 | 1 if place.is_done() && !place.program.wild => return self.connect(number, script),
            0 | 1 if !place.program.was_answered() && !place.program.is_over() => {
                let syn = place.program.syn();
                self.feed(&syn);
            }
            2..=9 if place.program.is_open() => {
                let program = &mut place.program;
                // New bytes, old ones again, or some before those that the engine waits for.
                let from = match script.below(4) {
                    0 => program.acknowledged + script.below(3 * MSS),
                    1 => program.acknowledged.saturating_sub(script.below(2 * MSS)),
                    _ => program.sent,
                };
                // Nobody sends far beyond the window; a little beyond is cut off.
                let room = (program.acknowledged + program.offered + MSS).min(MOST).saturating_sub(from);
                let most = if script.byte() & 7 == 0 { script.below(16_000) } else { script.below(MSS) };
                let finish = script.byte() & 1 == 0;
                let segment = program.segment(from, most.min(room), finish);
                self.feed(&segment);
            }
            10..=12 if place.program.is_open() => {
                let window = [0, 1, 500, 1400, 5000, 60_000, 65_535][script.below(7)];
                if let Some(ack) = place.program.acknowledge(window) {
                    self.feed(&ack);
                }
            }
            13 if place.program.is_open() => {
                let program = &mut place.program;
                program.length.get_or_insert(program.sent.saturating_sub(1));
                let fin = program.segment(program.acknowledged, MOST, true);
                self.feed(&fin);
            }
            14 if rude => {
                let reset = place.program.reset();
                self.feed(&reset);
            }
            15 if rude => {
                let (flags, at, ack) = (script.byte(), script.byte(), script.byte());
                let length = script.below(64);
                let packet = place.program.nonsense(flags, i32::from(at as i8), i32::from(ack as i8), length);
                self.feed(&packet);
            }
            16 | 17 => {
                let (early, room) = (script.below(3).saturating_sub(1) * script.below(4096), script.below(20_000));
                self.accept(number, early, 4096 + room);
            }
            18 => {
                let error = match script.below(3) {
                    0 => ConnectError::Unreachable {
                        upstream: String::new(),
                        source: std::io::ErrorKind::TimedOut.into(),
                    },
                    1 => ConnectError::Local { upstream: String::new(), source: std::io::ErrorKind::Other.into() },
                    _ => ConnectError::Forbidden([127, 0, 0, 1].into()),
                };
                // The attempt may have been given up.
                let _ = place.attempt.take().map(|attempt| attempt.send(Err(error)));
            }
            19..=21 => {
                let most = script.below(20_000);
                if let Some(far) = &mut place.far {
                    far.write(most.min(MOST.saturating_sub(far.written)));
                }
            }
            22..=24 => {
                let most = script.below(20_000);
                return place.read(most);
            }
            25 => place.far.iter_mut().for_each(Far::finish),
            26 if rude => place.far.iter_mut().for_each(Far::close),
            27 => self.pass(Duration::from_millis(script.below(64) as u64)),
            28 if rude => self.pass(Duration::from_secs(script.below(2000) as u64)),
            29 => {
                self.blocked = script.byte() & 1 == 0;
                self.bench.device.fail(self.blocked.then_some(libc::EAGAIN));
            }
            30 => {
                let (length, kind) = (script.byte(), script.byte());
                let junk = script.take(usize::from(length % 64));
                let mut datagram = packets(number).udp(junk);
                match kind & 3 {
                    0 => self.feed(&datagram),
                    1 => self.put(junk.to_vec()),
                    _ => {
                        // A fragment, another protocol, a group, too long.
                        let (at, byte) = if number.is_multiple_of(2) {
                            [(6, 0x20), (9, 1), (16, 224), (2, 0xff)]
                        } else {
                            [(6, 44), (6, 58), (24, 0xff), (4, 0xff)]
                        }[usize::from(kind >> 2 & 3)];
                        datagram[at] = byte;
                        fix_header(&mut datagram);
                        self.feed(&datagram);
                    }
                }
            }
            31 if rude => place.program.deaf = !place.program.deaf,
            _ => {}
        }
        Ok(())
    }

    /// A new connection of program `number`.
    fn connect(&mut self, number: usize, script: &mut Script<'_>) -> Result<(), String> {
        self.forget(number)?;
        let place = &mut self.places[number];
        place.connections = place.connections.wrapping_add(1);
        // Never that of the connection before, and often close to the end of all numbers.
        let iss = i32::from_be_bytes([script.byte(), 0xff, 0xff ^ place.connections, script.byte()]);
        place.program = program(number, place.connections, iss);
        let syn = place.program.syn();
        self.feed(&syn);
        Ok(())
    }

    /// The connection of program `number` is over: what arrived?
    fn forget(&mut self, number: usize) -> Result<(), String> {
        let place = &mut self.places[number];
        place.attempt = None;
        let (program, Some(mut far)) = (&place.program, place.far.take()) else { return Ok(()) };
        if program.wild {
            return Ok(());
        }
        far.read(MOST)?;
        self.seen.to_upstreams += far.read as u64;
        self.seen.to_programs += program.bytes() as u64;
        // One who was refused although the upstream had accepted is no concern here.
        if !program.was_answered() {
            return Ok(());
        }
        if program.sent <= far.read || program.bytes() > far.written {
            return Err(format!("program {number}: more arrived than was sent: {program:?} {far:?}"));
        }
        let whole = program.length == Some(far.read) && program.bytes() == far.written && far.saw_end;
        // A local socket tells no reset from an end.
        let timed_out = self.bench.counters.flows_timed_out.get() > 0;
        let cut = program.has_reset || program.was_reset || far.broken || timed_out;
        if !whole && (self.polite || !cut) {
            return Err(format!("program {number}: not all arrived: {program:?} {far:?}"));
        }
        Ok(())
    }

    fn accept(&mut self, number: usize, early: usize, room: usize) {
        let place = &mut self.places[number];
        let Some(attempt) = place.attempt.take() else { return };
        let (tunnel, far) = pair(salt(number, place.connections), early, room);
        if attempt.send(Ok(tunnel)).is_ok() {
            place.far = Some(far);
        }
    }

    /// A packet of a program, in whose header the kernel vouches for it or not.
    fn feed(&mut self, packet: &[u8]) {
        let vouched = u8::from(packet.len().is_multiple_of(2));
        let mut frame = vec![0; self.framing.prefix()];
        if let Some(flags) = frame.first_mut() {
            *flags = vouched;
        }
        frame.extend_from_slice(packet);
        self.put(frame);
    }

    fn put(&mut self, frame: Vec<u8>) {
        self.seen.frames += 1;
        match self.framing.split(&frame) {
            Err(_) | Ok(Content::WhoHasGateway) => self.seen.short += 1,
            Ok(Content::Packet(packet, vouched_for)) => {
                let is_tcp = matches!(parse::parse(packet, vouched_for), Ok(Packet::Tcp(_)));
                self.seen.tcp += u64::from(is_tcp);
            }
        }
        self.bench.device.put(frame);
    }

    fn pass(&mut self, time: Duration) {
        self.bench.now += time;
        self.clock.set(self.bench.now);
    }

    /// What the loop does until it would sleep.
    async fn rest(&mut self) -> Result<(), String> {
        let (mut idle, mut before) = (0, self.state());
        for _ in 0..TURNS {
            // Lets attempts begin, and the runtime see what the sockets have.
            yield_now().await;
            while let Some((target, answer)) = self.bench.attempts.next() {
                let Target::Address(address) = target else { return Err("a name as target".into()) };
                let number = (0..PROGRAMS).find(|number| packets(*number).destination == address.ip());
                self.places[number.ok_or("an attempt for nobody")?].attempt = Some(answer);
            }
            let sender = &mut self.bench.shard.sender;
            if sender.is_blocked() && sender.flush() {
                self.bench.shard.unblocked();
            }
            let mut frame = [0; 20_000];
            while !self.bench.shard.sender.is_blocked()
                && let Ok(length) = self.queue.read(&mut frame)
            {
                self.bench.shard.frame(self.bench.now, &frame[..length]);
            }
            while !self.bench.shard.sender.is_blocked()
                && let Ok((id, outcome)) = self.bench.outcomes.try_recv()
            {
                self.bench.shard.connected(self.bench.now, id, outcome);
            }
            self.bench.turn();
            self.deliver()?;
            let (busy, after) = (self.bench.shard.is_busy(), self.state());
            if after != before {
                idle = 0;
            } else if !busy {
                return Ok(());
            } else {
                idle += 1;
                if idle > IDLE_TURNS {
                    return Err("the shard says that it has work and does nothing".into());
                }
            }
            before = after;
        }
        Err(format!("the shard does not come to rest within {TURNS} turns"))
    }

    /// What changes when something is done.
    fn state(&self) -> (u64, [usize; 9]) {
        let counted = Counters::sum([&*self.bench.counters].into_iter()).iter().map(|(_, count)| count).sum();
        (counted, self.bench.shard.held())
    }

    /// Hands the programs what the engine sent.
    fn deliver(&mut self) -> Result<(), String> {
        while let Some(frame) = self.bench.device.next() {
            self.seen.sent += 1;
            let packet = complete(self.framing, &frame, MSS)?;
            if packet[0] >> 4 == 4 && packet[9] == 1 || packet[6] == 58 && packet[0] >> 4 == 6 {
                continue;
            }
            let sent = read_tcp(&packet);
            let number = (0..PROGRAMS).find(|number| packets(*number).destination == sent.tuple.source);
            let Some(number) = number.filter(|number| packets(*number).source_port == sent.tuple.destination_port)
            else {
                continue;
            };
            let place = &mut self.places[number];
            let open = place.program.is_open();
            let answer = place.program.take(&sent).map_err(|error| format!("program {number}: {error}"))?;
            let far_ended = place.far.as_ref().is_none_or(|far| far.broken);
            if self.polite && open && place.program.was_reset && !far_ended {
                return Err(format!("program {number} was reset for no reason"));
            }
            if let Some(answer) = answer {
                self.feed(&answer);
            }
        }
        Ok(())
    }

    /// Everybody does what is left to do.
    async fn finish(&mut self) -> Result<(), String> {
        self.bench.device.fail(None);
        self.blocked = false;
        self.rest().await?;
        for place in &mut self.places {
            place.program.deaf = false;
        }
        let mut quiet = 0;
        for _ in 0..4000 {
            let before = self.progress();
            for number in 0..PROGRAMS {
                self.go_on(number)?;
            }
            self.rest().await?;
            if self.places.iter().all(Place::is_done) {
                return Ok(());
            }
            quiet = if self.progress() == before { quiet + 1 } else { 0 };
            if quiet > 2 {
                let next = self.bench.shard.next_deadline().filter(|_| quiet < 100);
                let Some(next) = next else { break };
                self.pass((next - self.bench.now).min(Duration::from_secs(10)));
            }
        }
        // A RST that comes of a time limit is not sent while the device takes nothing.
        if self.bench.counters.flows_timed_out.get() > 0 && self.bench.shard.flows(self.bench.now, 1, 0, 1).is_empty() {
            return Ok(());
        }
        let stuck: Vec<_> = self.places.iter().filter(|place| !place.is_done()).collect();
        Err(format!("connections that do not go on: {stuck:?}"))
    }

    fn progress(&self) -> Vec<(usize, usize, usize, usize)> {
        let of = |place: &Place| {
            let program = &place.program;
            let (read, written) = place.far.as_ref().map_or((0, 0), |far| (far.read, far.written));
            (program.acknowledged, program.received, read, written)
        };
        self.places.iter().map(of).collect()
    }

    fn go_on(&mut self, number: usize) -> Result<(), String> {
        let place = &mut self.places[number];
        if place.is_done() {
            return Ok(());
        }
        if place.attempt.is_some() {
            self.accept(number, 0, 16_384);
            return Ok(());
        }
        if let Some(far) = &mut place.far {
            // Some finish by themselves, the others after the program has.
            if number.is_multiple_of(2) || far.saw_end {
                far.finish();
            }
            for _ in 0..8 {
                place.read(65_536)?;
            }
        }
        let program = &mut place.program;
        if program.is_over() {
            return Ok(());
        }
        if !program.is_open() {
            let syn = program.syn();
            self.feed(&syn);
            return Ok(());
        }
        let length = *program.length.get_or_insert(program.sent.saturating_sub(1));
        // A closed window is probed with a byte: that it has opened can have been lost (RFC 9293 section 3.8.6.1).
        let end = program.acknowledged + program.offered.max(1);
        let mut segments = Vec::from_iter(program.acknowledge(60_000));
        let mut from = program.acknowledged;
        while from < end.min(length + 1) {
            let most = (end - from).min(16_000);
            segments.push(program.segment(from, most, true));
            from += most;
        }
        if program.acknowledged == length + 1 {
            segments.push(program.segment(length + 1, 0, true));
        }
        segments.iter().for_each(|segment| self.feed(segment));
        Ok(())
    }

    /// However long it takes, a side that stays silent does not keep a flow.
    async fn pass_deadlines(&mut self) -> Result<(), String> {
        for _ in 0..2000 {
            self.rest().await?;
            let Some(next) = self.bench.shard.next_deadline() else {
                let held = self.bench.shard.held();
                return if held == [0; 9] { Ok(()) } else { Err(format!("left behind: {held:?}")) };
            };
            self.pass(next - self.bench.now);
        }
        Err("there is always another deadline".into())
    }

    fn check_counters(&mut self) -> Result<(), String> {
        let rude = self.places.iter().any(|place| place.program.wild) || !self.polite;
        for number in 0..PROGRAMS {
            self.forget(number)?;
        }
        let (seen, counters) = (&self.seen, &self.bench.counters);
        let dropped = [
            &counters.drop_malformed,
            &counters.drop_checksum,
            &counters.drop_fragment,
            &counters.drop_multicast,
            &counters.drop_address,
            &counters.drop_not_tcp,
            &counters.drop_udp_limit,
            &counters.udp_unreachable,
        ];
        let handled = seen.tcp + dropped.iter().map(|counter| counter.get()).sum::<u64>();
        for (what, counted, expected) in [
            ("packets in", counters.packets_in.get(), seen.frames - seen.short),
            ("packets in, by what became of them", handled, seen.frames),
            ("packets out", counters.packets_out.get() + counters.drop_device.get(), seen.sent),
            ("flows closed", counters.flows_closed.get(), counters.flows_opened.get()),
            ("flows reset by the upstream", 0, if rude { 0 } else { counters.flows_reset_by_upstream.get() }),
            ("flows timed out", 0, if rude { 0 } else { counters.flows_timed_out.get() }),
            ("bytes to upstreams", if rude { seen.to_upstreams } else { counters.bytes_sent.get() }, seen.to_upstreams),
            (
                "bytes to programs",
                if rude { seen.to_programs } else { counters.bytes_received.get() },
                seen.to_programs,
            ),
        ] {
            if counted != expected {
                return Err(format!("{what}: counted {counted}, not {expected}"));
            }
        }
        Ok(())
    }
}

impl Place {
    /// The far end reads. Whatever it gets from a program that talks nonsense is right.
    fn read(&mut self, most: usize) -> Result<(), String> {
        let result = self.far.as_mut().map_or(Ok(()), |far| far.read(most));
        if self.program.wild { Ok(()) } else { result }
    }

    /// True when this connection needs nothing more from its program and upstream.
    fn is_done(&self) -> bool {
        let program = &self.program;
        let told =
            self.far.as_ref().is_none_or(|far| far.saw_end || far.broken || program.was_reset || program.has_reset);
        self.connections == 0 || program.wild || program.is_over() && told
    }
}

fn salt(number: usize, connection: u8) -> u8 {
    (number as u8) << 6 ^ connection
}

/// Program `number` has a destination of its own, so that its attempts can be told apart.
fn packets(number: usize) -> Packets {
    let last = number + 1;
    let packets = if number.is_multiple_of(2) {
        Packets::new("10.0.0.1", &format!("192.0.2.{last}"))
    } else {
        Packets::new("fd00::1", &format!("2001:db8::{last}"))
    };
    Packets { source_port: 4000 + number as u16, ..packets }
}

fn program(number: usize, connection: u8, iss: i32) -> Program {
    Program::new(packets(number), salt(number, connection), iss)
}
