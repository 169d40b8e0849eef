//! Two network namespaces: `app` with the TUN device, the engine and the programs; `net` with the servers. Programs reach
//! 10.88.0.0/16 and fd88::/64 through the device only, the engine's marked sockets through the wire only.

#![allow(unreachable_pub, dead_code, reason = "a module of each test program, not all of which use all of it")]

mod link;
mod peer;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use proxyvpn_engine::Engine;
use proxyvpn_engine::config::{Config, Limits};
use proxyvpn_engine::event::Event;
use proxyvpn_engine::upstream::{Connector, Upstream};
use tokio::sync::mpsc::Receiver;

/// An IPv4 address of every server.
pub const V4: &str = "10.88.0.1";
/// An IPv6 address of every server.
pub const V6: &str = "fd88::1";

const MARK: u32 = 0x77;

pub struct Lab {
    app: String,
    net: String,
}

/// An engine on a device of the lab, and the runtime that its controller lives on.
pub struct Running {
    pub runtime: tokio::runtime::Runtime,
    pub engine: Engine,
    pub events: Receiver<Event>,
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Lab {
    pub fn new() -> Self {
        assert_eq!(
            std::env::var("PROXYVPN_PRIVILEGED_TESTS").as_deref(),
            Ok("1"),
            "refused: run by scripts/test-privileged.sh, or set PROXYVPN_PRIVILEGED_TESTS=1"
        );
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("pv-engine-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let lab = Self { app: format!("{name}-app"), net: format!("{name}-net") };
        run("ip", &["netns", "add", &lab.app]);
        run("ip", &["netns", "add", &lab.net]);
        lab.net("link add va type veth peer name vb netns PEER");
        for (ns, device, v4, v6) in
            [(&lab.net, "va", "10.77.0.2/24", "fd77::2/64"), (&lab.app, "vb", "10.77.0.1/24", "fd77::1/64")]
        {
            run(
                "ip",
                &[
                    "netns",
                    "exec",
                    ns,
                    "sysctl",
                    "-qw",
                    "net.ipv4.conf.all.rp_filter=0",
                    "net.ipv4.conf.default.rp_filter=0",
                ],
            );
            ip(ns, "link set lo up");
            ip(ns, &format!("addr add {v4} dev {device}"));
            ip(ns, &format!("addr add {v6} dev {device} nodad"));
            ip(ns, &format!("link set {device} up"));
        }
        lab.net("route add local 10.88.0.0/16 dev lo");
        lab.net("-6 route add local fd88::/64 dev lo");
        for (family, destination, via) in [("-4", "10.88.0.0/16", "10.77.0.2"), ("-6", "fd88::/64", "fd77::2")] {
            ip(&lab.app, &format!("{family} rule add pref 10 fwmark {MARK} lookup 100"));
            ip(&lab.app, &format!("{family} route add {destination} via {via} table 100"));
        }
        lab
    }

    fn net(&self, command: &str) {
        ip(&self.net, &command.replace("PEER", &self.app));
    }

    /// Runs `ip` among the programs.
    pub fn app(&self, command: &str) {
        ip(&self.app, command);
    }

    /// Sets `net.ipv4.NAME` for programs and servers.
    pub fn sysctl(&self, name: &'static str, value: &'static str) {
        for ns in [&self.app, &self.net] {
            // Which namespace's value a file under /proc/sys/net is depends on the thread that opens it.
            inside(ns, move || std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap()).join().unwrap();
        }
    }

    /// Runs `f` on a thread among the programs.
    pub fn program<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        inside(&self.app, f)
    }

    /// Runs `serve` for each connection to `port` in `net`, on the addresses [`V4`] and [`V6`].
    pub fn serve(&self, port: u16, serve: impl Fn(TcpStream) + Send + Sync + 'static) {
        let listener = inside(&self.net, move || TcpListener::bind(("::", port)).unwrap()).join().unwrap();
        let serve = Arc::new(serve);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let serve = Arc::clone(&serve);
                let stream = stream.unwrap();
                std::thread::spawn(move || serve(stream));
            }
        });
    }

    /// Starts an engine that connects directly.
    pub fn start(&self, mtu: u16) -> Running {
        self.start_with(mtu, true, Limits::default())
    }

    /// Starts an engine on a device with or without offloads.
    pub fn start_with(&self, mtu: u16, offload: bool, limits: Limits) -> Running {
        self.launch(mtu, limits, move || vec![builder(mtu).offload(offload).build_sync().unwrap()])
    }

    /// Starts an engine on several queues of a device.
    pub fn start_queues(&self, mtu: u16, queues: usize) -> Running {
        self.start_queues_with(mtu, queues, Limits::default(), |_| {})
    }

    /// The same, after `look` at the queues.
    pub fn start_queues_with(
        &self,
        mtu: u16,
        queues: usize,
        limits: Limits,
        look: impl FnOnce(&[tun_rs::SyncDevice]) + Send + 'static,
    ) -> Running {
        self.launch(mtu, limits, move || {
            let build = |_| builder(mtu).offload(true).multi_queue(true).build_sync().unwrap();
            let queues: Vec<_> = (0..queues).map(build).collect();
            look(&queues);
            queues
        })
    }

    fn launch(
        &self,
        mtu: u16,
        limits: Limits,
        open: impl FnOnce() -> Vec<tun_rs::SyncDevice> + Send + 'static,
    ) -> Running {
        let running = inside(&self.app, move || {
            let queues = open().into_iter().map(owned).collect();
            let connector = Connector {
                upstream: Upstream::Direct,
                mark: Some(MARK),
                timeout: Duration::from_secs(10),
                refused: Vec::new(),
                only: None,
            };
            let config = Config { mtu, limits, connector: Arc::new(connector), owners: None };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (sender, events) = tokio::sync::mpsc::channel(8);
            let engine = Engine::start(queues, config, sender).unwrap();
            Running { runtime, engine, events }
        });
        let running = running.join().unwrap();
        self.app("link set pvpn0 up txqueuelen 10000");
        self.app("addr add 10.66.0.1/30 dev pvpn0");
        self.app("addr add fd66::1/64 dev pvpn0 nodad");
        self.app("route add 10.88.0.0/16 dev pvpn0");
        self.app("-6 route add fd88::/64 dev pvpn0");
        running
    }
}

fn builder(mtu: u16) -> tun_rs::DeviceBuilder {
    tun_rs::DeviceBuilder::new().name("pvpn0").mtu(mtu)
}

/// How often the thread `name` of this process was put on a processor.
pub fn switches_of(name: &str) -> u64 {
    let mut total = None;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        if status.lines().next() == Some(&format!("Name:\t{name}")) {
            let counts = status.lines().filter(|line| line.contains("ctxt_switches"));
            let sum: u64 = counts.map(|line| line.split_whitespace().last().unwrap().parse::<u64>().unwrap()).sum();
            *total.get_or_insert(0) += sum;
        }
    }
    total.unwrap_or_else(|| panic!("no thread {name}"))
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in [&self.app, &self.net] {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

impl Running {
    pub fn counter(&self, name: &str) -> u64 {
        self.engine.counters().into_iter().find(|(known, _)| *known == name).unwrap().1
    }

    pub fn counters(&self) -> String {
        let counters = self.engine.counters();
        counters.iter().filter(|(_, n)| *n > 0).map(|(name, n)| format!("{name}={n} ")).collect()
    }

    /// Waits until the engine has no flow left.
    pub fn wait_until_empty(&self) {
        wait_until("every flow is gone", || self.runtime.block_on(self.engine.flows()).is_empty());
        assert_eq!(self.counter("flows-opened"), self.counter("flows-closed"), "{}", self.counters());
    }

    /// Stops the engine and gives the queues back.
    pub fn stop(self) -> Vec<OwnedFd> {
        self.runtime.block_on(self.engine.stop())
    }
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < end, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn ip(ns: &str, command: &str) {
    let args: Vec<_> = ["-n", ns].into_iter().chain(command.split(' ')).collect();
    run("ip", &args);
}

fn inside<T: Send + 'static>(ns: &str, f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let ns = std::fs::File::open(format!("/run/netns/{ns}")).unwrap();
    std::thread::spawn(move || {
        rustix::thread::move_into_link_name_space(ns.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))
            .unwrap();
        f()
    })
}

/// Makes the kernel send every packet of the device to its first queue, as an administrator's BPF program may do.
#[allow(unsafe_code, reason = "no crate for one call of bpf(2)")]
pub fn steer_to_the_first_queue(queue: &OwnedFd) {
    // mov r0, 0; exit
    let program: [u64; 2] = [0xb7, 0x95];
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        program: u64,
        licence: u64,
        rest: [u64; 13],
    }
    let licence = c"MIT";
    // BPF_PROG_TYPE_SOCKET_FILTER
    let mut load = Load { kind: 1, count: 2, ..Load::default() };
    (load.program, load.licence) = (program.as_ptr() as u64, licence.as_ptr() as u64);
    // SAFETY: BPF_PROG_LOAD (5) reads the attributes, the program and the licence, which all outlive the call.
    let made = unsafe { libc::syscall(libc::SYS_bpf, 5, &raw const load, size_of::<Load>()) };
    assert!(made >= 0, "{}", io::Error::last_os_error());
    // SAFETY: a descriptor that was just made and is nobody else's.
    let made = unsafe { OwnedFd::from_raw_fd(made as i32) };
    let number = made.as_raw_fd();
    // SAFETY: TUNSETSTEERINGEBPF (linux/if_tun.h) reads one int; the device takes a reference of its own to the program.
    let set = unsafe { libc::ioctl(queue.as_raw_fd(), 0x8004_54e0, &raw const number) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}

#[allow(unsafe_code, reason = "tun-rs gives its descriptor away as a number only")]
fn owned(device: tun_rs::SyncDevice) -> OwnedFd {
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor.
    unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) }
}

pub fn connect(address: &str, port: u16) -> io::Result<TcpStream> {
    let address: IpAddr = address.parse().unwrap();
    let stream = TcpStream::connect_timeout(&SocketAddr::new(address, port), Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    Ok(stream)
}

/// Sends back what comes until it ends.
pub fn echo(mut stream: TcpStream) {
    let mut chunk = vec![0; 256 * 1024];
    while let Ok(n @ 1..) = stream.read(&mut chunk) {
        if stream.write_all(&chunk[..n]).is_err() {
            return;
        }
    }
}

/// `length` bytes there and back again, both ways at once, ended by half-close.
pub fn echo_through(address: &'static str, length: usize) -> usize {
    let stream = connect(address, 9000).unwrap();
    let writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        write_pattern(&writer, length).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let total = read_pattern(&stream).unwrap();
    writing.join().unwrap();
    total
}

/// Bytes that repeat only after a long time, so that lost, doubled or swapped ones show.
pub struct Pattern(u64);

impl Pattern {
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

const CHUNK: usize = 64 * 1024;

/// Writes `length` (a multiple of 64 KiB) bytes of the pattern.
pub fn write_pattern(mut stream: &TcpStream, length: usize) -> io::Result<()> {
    let (mut pattern, mut chunk) = (Pattern::new(), vec![0; CHUNK]);
    for _ in 0..length / CHUNK {
        pattern.fill(&mut chunk);
        stream.write_all(&chunk)?;
    }
    Ok(())
}

/// Reads until the end and compares; gives the number of bytes.
pub fn read_pattern(mut stream: &TcpStream) -> io::Result<usize> {
    let (mut pattern, mut chunk, mut expected, mut total) = (Pattern::new(), vec![0; CHUNK], vec![0; CHUNK], 0);
    loop {
        let mut filled = 0;
        while filled < CHUNK {
            match stream.read(&mut chunk[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        pattern.fill(&mut expected);
        assert!(chunk[..filled] == expected[..filled], "wrong bytes in the 64 KiB after {total}");
        total += filled;
        if filled < CHUNK {
            return Ok(total);
        }
    }
}
