//! An engine with a guest on its link that the test makes by hand, a proxy and a server on loopback.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's failure")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant as Time};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair, sockopt};
use smoltcp::socket::tcp::State;
use smoltcp::time::Instant;
use tokio::sync::mpsc;

use super::{Engine, StartError};
use crate::config::{Config, Limits, Link};
use crate::device::Queue;
use crate::event::Event;
use crate::packet::parse::{ACK, RST};
use crate::testing::{Client, Double, LINK, Packets, contents, guest_ipv4, read_tcp, to_guest, who_has};
use crate::upstream::{Connector, Exhausted, HttpProxy, NOT_FOR_GUESTS, Upstream};

const BOUND: Duration = Duration::from_secs(20);

/// The guest's end of a link, and the engine behind the other one.
struct Guest {
    link: OwnedFd,
    engine: Engine,
    events: mpsc::Receiver<Event>,
    /// Which destinations the proxy was asked for.
    asked: Arc<Mutex<Vec<String>>>,
}

/// What everything may be reached through: a proxy on loopback that sends everything back.
fn proxy() -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<String>>>::default());
    let log = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, log) = (stream.unwrap(), Arc::clone(&log));
            std::thread::spawn(move || {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.push(byte[0]);
                }
                let target = String::from_utf8(request).unwrap().split(' ').nth(1).unwrap().to_owned();
                log.lock().unwrap().push(target);
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
                let mut bytes = vec![0; 65536];
                loop {
                    match stream.read(&mut bytes) {
                        Ok(n) if n > 0 => {
                            bytes[..n].iter_mut().for_each(|byte| *byte = !*byte);
                            if stream.write_all(&bytes[..n]).is_err() {
                                return;
                            }
                        }
                        _ => return,
                    }
                }
            });
        }
    });
    (address, asked)
}

fn link() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn connector(proxy: SocketAddr, only: Option<Vec<SocketAddr>>) -> Connector {
    let refused = if only.is_some() { Vec::new() } else { NOT_FOR_GUESTS.to_vec() };
    let proxy = HttpProxy {
        name: "proxy".to_owned(),
        addresses: vec![proxy],
        credentials: None,
        exhausted: Exhausted::default(),
    };
    let upstream = Upstream::HttpConnect(proxy);
    Connector { upstream, mark: None, timeout: Duration::from_secs(5), refused, only }
}

fn config(connector: Connector) -> Config {
    let limits = Limits { flows: 64, pending: 32, ring: 256 * 1024, memory: 64 << 20 };
    Config { mtu: 65520, limits, connector: Arc::new(connector), owners: None }
}

impl Guest {
    fn new() -> Self {
        Self::with(None)
    }

    fn with(only: Option<Vec<SocketAddr>>) -> Self {
        let (address, asked) = proxy();
        let (link, other) = link();
        let (sender, events) = mpsc::channel(8);
        let engine = Engine::start_link(other, LINK, config(connector(address, only)), sender).unwrap();
        sockopt::set_socket_timeout(&link, sockopt::Timeout::Recv, Some(Duration::from_secs(5))).unwrap();
        Self { link, engine, events, asked }
    }

    fn send(&self, frame: &[u8]) {
        send(&self.link, frame, SendFlags::NOSIGNAL).unwrap();
    }

    fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let (_, length) = recv(&self.link, &mut frame[..], RecvFlags::empty()).unwrap();
        frame.truncate(length);
        frame
    }

    /// The engine's answer to the SYN of a connection to `destination`: port 80.
    fn answer(&self, destination: &str) -> u8 {
        self.send(&guest_ipv4(&Packets::new("10.10.11.2", destination).syn(100)));
        read_tcp(to_guest(&self.receive()).unwrap()).flags
    }

    fn counter(&self, name: &str) -> u64 {
        self.engine.counters().iter().find(|(known, _)| *known == name).unwrap().1
    }

    fn wait_for(&self, name: &str, least: u64) {
        let end = Time::now() + BOUND;
        while self.counter(name) < least {
            assert!(Time::now() < end, "{name}: {}", self.counter(name));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The gateway answers, so the engine is well.
    fn is_served(&self) {
        self.send(&who_has(LINK.gateway));
        assert_eq!(self.receive().len(), 42);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn event(guest: &mut Guest) -> Event {
    let events = &mut guest.events;
    runtime().block_on(async { tokio::time::timeout(BOUND, events.recv()).await.unwrap().unwrap() })
}

#[test]
fn bytes_pass_unchanged_both_ways() {
    const LENGTH: usize = 8 * 1024 * 1024;
    let guest = Guest::new();
    rustix::io::ioctl_fionbio(&guest.link, true).unwrap();
    let device = Double::default();
    let start = Time::now();
    let now = || Instant::from_micros(i64::try_from(start.elapsed().as_micros()).unwrap());
    let (from, to) = (LINK.guest.into(), "93.184.216.34".parse().unwrap());
    let mut client = Client::new(device.clone(), from, to, 3, LENGTH, now());
    let (mut packet, mut frame, mut held) = (vec![0; 70_000], vec![0; 70_000], None);
    while !client.is_over() || client.read < LENGTH {
        assert!(start.elapsed() < 3 * BOUND, "{} of {LENGTH} bytes, {:?}", client.read, client.state());
        let mut idle = !client.turn(now()).unwrap();
        while let Some(next) = held.take().or_else(|| device.read(&mut packet).ok().map(|n| guest_ipv4(&packet[..n]))) {
            idle = false;
            if send(&guest.link, &next, SendFlags::NOSIGNAL).is_err() {
                held = Some(next);
                break;
            }
        }
        while let Ok((_, length)) = recv(&guest.link, &mut frame[..], RecvFlags::empty()) {
            idle = false;
            device.write(to_guest(&frame[..length]).unwrap()).unwrap();
        }
        if idle {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(matches!(client.state(), State::Closed | State::TimeWait));
    assert_eq!(guest.counter("bytes-sent"), LENGTH as u64);
    assert_eq!(*guest.asked.lock().unwrap(), ["93.184.216.34:80"]);
    for drop in ["drop-malformed", "drop-checksum", "drop-device"] {
        assert_eq!(guest.counter(drop), 0, "{drop}");
    }
}

#[test]
fn nothing_but_the_public_internet_is_reached_through_a_proxy_either() {
    let guest = Guest::new();
    for destination in [
        "127.0.0.1",
        "10.10.10.2",
        "10.10.11.1",
        "172.31.255.254",
        "192.168.1.1",
        "100.127.0.1",
        "169.254.169.254",
        "192.0.0.8",
        "198.19.0.1",
        "0.1.2.3",
        "240.0.0.1",
    ] {
        assert_eq!(guest.answer(destination), RST | ACK, "{destination}");
    }
    assert_eq!(guest.counter("flows-refused-forbidden"), 11);
    assert!(guest.asked.lock().unwrap().is_empty(), "the proxy was not even asked");
    assert_ne!(guest.answer("11.0.0.1"), RST | ACK);
}

#[test]
fn udp_does_not_go_around_a_proxy() {
    let (address, _) = proxy();
    let (guest, other) = link();
    let (sender, _events) = mpsc::channel(8);
    let ends = Link { udp: true, ..LINK };
    let engine = Engine::start_link(other, ends, config(connector(address, None)), sender).unwrap();
    sockopt::set_socket_timeout(&guest, sockopt::Timeout::Recv, Some(BOUND)).unwrap();
    send(&guest, &guest_ipv4(&Packets::new("10.10.11.2", "192.0.2.9").udp(b"x")), SendFlags::NOSIGNAL).unwrap();
    let mut frame = vec![0; 70_000];
    let (_, length) = recv(&guest, &mut frame[..], RecvFlags::empty()).unwrap();
    assert_eq!(to_guest(&frame[..length]).unwrap()[20..22], [3, 3], "port unreachable");
    assert!(engine.counters().contains(&("udp-unreachable", 1)) && engine.counters().contains(&("udp-mappings", 0)));
}

#[test]
fn with_bridges_only_they_are_reached() {
    let guest = Guest::with(Some(vec!["192.168.7.1:80".parse().unwrap(), "198.51.100.7:443".parse().unwrap()]));
    assert_ne!(guest.answer("192.168.7.1"), RST | ACK);
    for destination in ["198.51.100.7", "192.168.7.2", "93.184.216.34"] {
        assert_eq!(guest.answer(destination), RST | ACK, "{destination}: another address or port");
    }
    assert_eq!(*guest.asked.lock().unwrap(), ["192.168.7.1:80"]);
}

#[test]
fn the_end_of_the_other_end_is_told() {
    let mut guest = Guest::new();
    guest.is_served();
    guest.link = link().0;
    let told = event(&mut guest);
    let Event::DeviceLost(error) = told else { panic!("{told:?}") };
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    assert_eq!(runtime().block_on(guest.engine.flows()), []);
    assert_eq!(runtime().block_on(guest.engine.stop()).len(), 1);
}

#[test]
fn a_guest_that_shuts_its_end_half_is_lost_too() {
    for how in [rustix::net::Shutdown::Read, rustix::net::Shutdown::Write] {
        let mut guest = Guest::new();
        // Noticed when there is something to send.
        guest.send(&who_has(LINK.gateway));
        rustix::net::shutdown(&guest.link, how).unwrap();
        if how == rustix::net::Shutdown::Read {
            let _ = send(&guest.link, &who_has(LINK.gateway), SendFlags::NOSIGNAL);
        }
        assert!(matches!(event(&mut guest), Event::DeviceLost(_)), "{how:?}");
    }
}

#[test]
fn empty_and_giant_frames_are_dropped_and_are_no_end() {
    let guest = Guest::new();
    let mut giant = guest_ipv4(&Packets::new("10.10.11.2", "192.0.2.9").syn(1));
    giant.resize(100_000, 0);
    sockopt::set_socket_send_buffer_size(&guest.link, 200_000).unwrap();
    for frame in [&[][..], &giant] {
        guest.send(frame);
        guest.is_served();
    }
    assert_eq!((guest.counter("drop-malformed"), guest.counter("packets-in")), (2, 0));
}

#[test]
fn a_guest_that_does_not_read_stops_its_own_traffic_only() {
    const QUESTIONS: u64 = 5000;
    let guest = Guest::new();
    rustix::io::ioctl_fionbio(&guest.link, true).unwrap();
    let end = Time::now() + BOUND;
    // Until neither side takes more, for a while.
    let (mut sent, mut quiet) = (0, 0);
    while quiet < 200 && sent < QUESTIONS {
        assert!(Time::now() < end);
        match send(&guest.link, &who_has(LINK.gateway), SendFlags::NOSIGNAL) {
            Ok(_) => (sent, quiet) = (sent + 1, 0),
            Err(_) => {
                quiet += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    assert!(sent < QUESTIONS, "the engine took {sent} questions without an answer being read");
    rustix::io::ioctl_fionbio(&guest.link, false).unwrap();
    for _ in 0..sent {
        assert_eq!(guest.receive().len(), 42);
    }
    guest.is_served();
    assert_eq!((guest.counter("arp-answered"), guest.counter("drop-device")), (sent + 1, 0));
}

#[test]
fn the_next_engine_on_the_link_resets_the_connections_of_the_one_before() {
    let mut guest = Guest::new();
    let packets = Packets::new("10.10.11.2", "93.184.216.34");
    guest.send(&guest_ipv4(&packets.syn(100)));
    let syn_ack = read_tcp(to_guest(&guest.receive()).unwrap());
    guest.send(&guest_ipv4(&packets.tcp(ACK, 101, syn_ack.seq.wrapping_add(1), &contents(0, 0, 10))));
    guest.wait_for("bytes-sent", 10);
    let (address, asked) = proxy();
    let (sender, events) = mpsc::channel(8);
    let mut queues = runtime().block_on(guest.engine.stop());
    // As after kill -9, when nobody says farewell.
    while recv(&guest.link, &mut [0; 2000][..], RecvFlags::DONTWAIT).is_ok() {}
    let config = config(connector(address, None));
    guest.engine = Engine::start_link(queues.remove(0), LINK, config, sender).unwrap();
    (guest.events, guest.asked) = (events, asked);
    guest.send(&guest_ipv4(&packets.tcp(ACK, 111, syn_ack.seq.wrapping_add(1), b"more")));
    assert_eq!(read_tcp(to_guest(&guest.receive()).unwrap()).flags, RST);
    assert_ne!(guest.answer("93.184.216.34"), RST | ACK, "and a new one is well");
}

#[test]
fn what_is_no_link_is_refused() {
    let (stream, _other) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    for fd in [stream, null] {
        let is_link = sockopt::socket_type(fd.as_fd()).is_ok_and(|kind| kind == SocketType::SEQPACKET);
        let started =
            Engine::start_link(fd, LINK, config(connector(([127, 0, 0, 1], 1).into(), None)), mpsc::channel(1).0);
        assert!(!is_link && matches!(started, Err(StartError::NotLink(_))), "{started:?}");
    }
}
