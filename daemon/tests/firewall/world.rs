//! Network namespaces for one test: the host, a peer on its uplink with a sniffer, a container behind a bridge of the host.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use proxyvpnd::net::Devices;
use proxyvpnd::net::desired::{Desired, Exceptions, MARK, TABLE, Tunnel};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Protocol, Socket, Type};

pub(crate) const HOST: &str = "192.0.2.1";
pub(crate) const PEER: &str = "192.0.2.2";
pub(crate) const HOST6: &str = "2001:db8::1";
pub(crate) const PEER6: &str = "2001:db8::2";
pub(crate) const CONTAINER: &str = "10.9.0.2";
/// Address of the tunnel device.
pub(crate) const TUN: &str = "10.255.255.1";
/// A resolver that the desired state allows.
pub(crate) const RESOLVER: &str = "198.51.100.53";
/// A network that the desired state allows.
pub(crate) const LAN: &str = "198.51.100.128";
/// Address of the host's uplink.
pub(crate) const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Address of the container's device.
pub(crate) const CONTAINER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
/// A user who may go around the tunnel.
pub(crate) const BYPASS_USER: u32 = 13;

/// Stops a test that may not run; says so.
pub(crate) fn opted_in() {
    let yes = std::env::var("PROXYVPN_PRIVILEGED_TESTS").is_ok_and(|v| v == "1");
    assert!(yes, "set PROXYVPN_PRIVILEGED_TESTS=1: this test needs root and makes network namespaces");
}

/// A network namespace; it lives as long as its child process.
pub(crate) struct Namespace {
    holder: Child,
    file: File,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let mut holder = Command::new("unshare")
            .args(["-n", "sh", "-c", "echo ready; exec sleep 600"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        let file = File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
        let this = Self { holder, file };
        this.run(|| sh("ip link set lo up"));
        this
    }

    /// Does something inside, in a thread of its own.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.holder.id()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.holder.kill().unwrap();
        self.holder.wait().unwrap();
    }
}

/// Runs commands, in the namespace of the calling thread.
pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-euc", script]).output().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The three namespaces and the sniffer on the peer's end of the uplink.
pub(crate) struct World {
    pub(crate) host: Namespace,
    pub(crate) peer: Namespace,
    pub(crate) container: Namespace,
    sniffer: Socket,
}

impl World {
    /// The host's uplink is `up0`, with the default routes; `pvpn0` swallows what is routed into it.
    pub(crate) fn new() -> Self {
        let (host, peer, container) = (Namespace::new(), Namespace::new(), Namespace::new());
        let (p, c) = (peer.pid(), container.pid());
        host.run(|| {
            sh(&format!(
                "for f in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 > $f; done
                 ip link add up0 address 02:00:00:00:00:01 type veth peer name peer0 netns {p}
                 ip link add ct0 type veth peer name eth0 address 02:00:00:00:00:03 netns {c}
                 ip link add pvpn0 arp off type veth peer name sink0 netns {c}
                 ip addr add {HOST}/24 dev up0; ip addr add {HOST6}/64 dev up0 nodad
                 ip addr add 10.9.0.1/24 dev ct0
                 ip addr add {TUN}/30 dev pvpn0; ip addr add fd70:7670:6e::1/64 dev pvpn0 nodad
                 ip link set up0 up; ip link set ct0 up; ip link set pvpn0 up
                 ip route add default via {PEER}; ip -6 route add default via {PEER6}
                 echo 1 > /proc/sys/net/ipv4/ip_forward
                 echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range"
            ))
        });
        container.run(|| {
            sh(&format!("ip addr add {CONTAINER}/24 dev eth0; ip link set eth0 up; ip link set sink0 up; ip route add default via 10.9.0.1"))
        });
        peer.run(|| {
            sh(&format!(
                "ip addr add {PEER}/24 dev peer0; ip addr add {PEER6}/64 dev peer0 nodad; ip link set peer0 up
                 ip route add default via {HOST}; ip -6 route add default via {HOST6}"
            ))
        });
        let sniffer = peer.run(|| {
            // ETH_P_ALL
            let socket =
                Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(0x0003u16.to_be())))).unwrap();
            socket.set_recv_buffer_size(8 << 20).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            socket
        });
        let world = Self { host, peer, container, sniffer };
        world.wait_until_up();
        world
    }

    /// Steers as the daemon does: marked traffic by the main table, all other TCP into the tunnel.
    pub(crate) fn steer(&self) {
        self.host.run(|| {
            sh(&format!(
                "for v in -4 -6; do
                   ip $v rule add fwmark {MARK:#x}/0xffffffff lookup main priority 3700
                   ip $v rule add uidrange {BYPASS_USER}-{BYPASS_USER} lookup main priority 3701
                   ip $v rule add ipproto tcp lookup {TABLE} priority 3702
                   ip $v route add default dev pvpn0 table {TABLE}
                   ip $v route add unreachable default metric 4294967295 table {TABLE}
                 done"
            ))
        });
    }

    /// Steers what is forwarded too, as the daemon does with `forward = "tunnel"`.
    pub(crate) fn steer_forwarded(&self) {
        self.host.run(|| {
            sh(&format!(
                "for v in -4 -6; do
                   ip $v rule add iif pvpn0 lookup main priority 3701
                 done
                 for p in tcp udp; do ip rule add to {RESOLVER} ipproto $p dport 53 lookup main priority 3701; done"
            ))
        });
    }

    /// Until neighbours know each other and no frame of the beginning is on its way any more.
    fn wait_until_up(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let ready = || {
            self.host.run(|| {
                let ping =
                    |a: &str| Command::new("ping").args(["-c1", "-W1", a]).output().is_ok_and(|o| o.status.success());
                ping(PEER) && ping(PEER6)
            })
        };
        while !ready() {
            assert!(Instant::now() < deadline, "the namespaces do not reach each other");
        }
        self.seen();
    }

    /// Those of the host since the last call; see [`seen_from`](Self::seen_from).
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen_from(HOST_MAC)
    }

    /// What came from this address on the uplink since the last call, one line per frame, such as `tcp 192.0.2.2 80`.
    pub(crate) fn seen_from(&self, mac: [u8; 6]) -> Vec<String> {
        let mut lines = vec![];
        let mut buffer = vec![0; 1 << 16];
        let mut reader = &self.sniffer;
        // Ends at the first 20 ms of silence.
        while let Ok(length) = std::io::Read::read(&mut reader, &mut buffer) {
            lines.extend(describe(&buffer[..length], mac));
        }
        lines
    }
}

/// A frame from this address as text; `None` for frames of others.
fn describe(frame: &[u8], mac: [u8; 6]) -> Option<String> {
    if frame.len() < 14 || frame[6..12] != mac {
        return None;
    }
    let port = |p: &[u8]| u16::from_be_bytes([p[2], p[3]]);
    let (protocol, to, rest) = match (u16::from_be_bytes([frame[12], frame[13]]), &frame[14..]) {
        (0x0806, _) => return Some("arp".to_owned()),
        (0x0800, ip) => {
            let to: [u8; 4] = ip[16..20].try_into().unwrap();
            (ip[9], Ipv4Addr::from(to).to_string(), &ip[usize::from(ip[0] & 15) * 4..])
        }
        (0x86dd, ip) => {
            let to: [u8; 16] = ip[24..40].try_into().unwrap();
            (ip[6], Ipv6Addr::from(to).to_string(), &ip[40..])
        }
        (other, _) => return Some(format!("ethertype {other:#06x}")),
    };
    Some(match protocol {
        1 => format!("icmp {to} {}", rest[0]),
        6 => format!("tcp {to} {}", port(rest)),
        17 => format!("udp {to} {}", port(rest)),
        58 => format!("icmp6 {to} {}", rest[0]),
        other => format!("protocol {to} {other}"),
    })
}

/// Killswitch on, everything else at its default.
pub(crate) fn desired() -> Desired {
    Desired {
        tunnel: Some(Tunnel {
            name: "pvpn0".to_owned(),
            v4: format!("{TUN}/30").parse().unwrap(),
            v6: Some("fd70:7670:6e::1/64".parse().unwrap()),
            mtu: 1500,
            gateway: None,
        }),
        guarded: vec![TUN.parse().unwrap(), "fd70:7670:6e::1".parse().unwrap()],
        exceptions: Exceptions {
            lan: vec![format!("{LAN}/26").parse().unwrap()],
            resolvers: vec![RESOLVER.parse().unwrap()],
            users: vec![BYPASS_USER],
            services: vec![],
        },
        ..Desired::closed()
    }
}

/// Those of the host that lead out.
pub(crate) fn devices() -> Devices {
    Devices { uplinks: vec!["up0".to_owned(), "ct0".to_owned()], inner: vec![], routed: vec![] }
}
