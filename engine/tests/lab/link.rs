//! A third namespace with nothing but a TAP device, whose frames go to the engine by a socket pair: to the engine it is a virtual machine.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use proxyvpn_engine::Engine;
use proxyvpn_engine::config::{Config, Limits, Link};
use proxyvpn_engine::upstream::{Connector, Upstream};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::{Lab, MARK, Running, inside, ip, owned, run};

const LINK: Link = Link {
    guest: Ipv4Addr::new(10, 10, 11, 2),
    gateway: Ipv4Addr::new(10, 10, 11, 1),
    guest_mac: [0x52, 0x54, 0, 0x10, 0x11, 2],
    gateway_mac: [0x52, 0x54, 0, 0x10, 0x11, 1],
    udp: false,
};

/// The guest. Its device lives until the engine's end of the link is closed.
pub struct Guest {
    name: String,
    pumps: Vec<JoinHandle<()>>,
}

impl Lab {
    /// A guest, and the engine's end of its link.
    pub fn guest(&self, mtu: u16) -> (Guest, OwnedFd) {
        let name = self.app.replace("-app", "-guest");
        run("ip", &["netns", "add", &name]);
        let (link, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let tap = inside(&name, move || {
            let builder = tun_rs::DeviceBuilder::new().name("up0").layer(tun_rs::Layer::L2).mtu(mtu);
            owned(builder.mac_addr(LINK.guest_mac).build_sync().unwrap())
        });
        let (tap, link) = (Arc::new(tap.join().unwrap()), Arc::new(link));
        ip(&name, "addr add 10.10.11.2/30 dev up0");
        ip(&name, "link set up0 up txqueuelen 10000");
        ip(&name, "route add default via 10.10.11.1");
        let out = {
            let (tap, link) = (Arc::clone(&tap), Arc::clone(&link));
            std::thread::spawn(move || {
                let mut frame = vec![0; 70_000];
                while wait(&tap, &link) {
                    let Ok(length) = rustix::io::read(&tap, &mut frame[..]) else { return };
                    if send(&link, &frame[..length], SendFlags::NOSIGNAL).is_err() {
                        return;
                    }
                }
            })
        };
        let back = std::thread::spawn(move || {
            let mut frame = vec![0; 70_000];
            while let Ok((_, length @ 1..)) = recv(&link, &mut frame[..], RecvFlags::empty()) {
                assert_eq!(rustix::io::write(&tap, &frame[..length]), Ok(length));
            }
        });
        (Guest { name, pumps: vec![out, back] }, other)
    }

    /// Gives servers the addresses 192.0.2.0/24, which are no guest's to be kept from; only marked sockets have a way there.
    pub fn public(&self) {
        self.net("route add local 192.0.2.0/24 dev lo");
        ip(&self.app, "route add 192.0.2.0/24 via 10.77.0.2 table 100");
    }

    /// Changes the firewall of the engine's namespace.
    pub fn nft(&self, script: &str) {
        run("ip", &["netns", "exec", &self.app, "nft", script]);
    }

    /// What the counter `name` of the table `inet seen` there has seen.
    pub fn seen(&self, name: &str) -> u64 {
        let args = ["netns", "exec", &self.app, "nft", "list", "counter", "inet", "seen", name];
        let text = String::from_utf8(Command::new("ip").args(args).output().unwrap().stdout).unwrap();
        let packets = text.split("packets ").nth(1).unwrap();
        packets.split(' ').next().unwrap().parse().unwrap()
    }

    /// A socket for datagrams among the servers.
    pub fn udp(&self, address: &'static str) -> UdpSocket {
        inside(&self.net, move || {
            let socket = UdpSocket::bind(address).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            socket
        })
        .join()
        .unwrap()
    }

    /// Starts an engine behind `link` that connects directly, but not to `refused`.
    pub fn start_link(&self, link: OwnedFd, mtu: u16, refused: &[&str]) -> Running {
        self.start_ends(link, LINK, mtu, refused)
    }

    /// The same, but UDP leaves too.
    pub fn start_link_with_udp(&self, link: OwnedFd, mtu: u16, refused: &[&str]) -> Running {
        self.start_ends(link, Link { udp: true, ..LINK }, mtu, refused)
    }

    fn start_ends(&self, link: OwnedFd, ends: Link, mtu: u16, refused: &[&str]) -> Running {
        let refused = refused.iter().map(|net| net.parse().unwrap()).collect();
        let running = inside(&self.app, move || {
            let connector = Connector {
                upstream: Upstream::Direct,
                mark: Some(MARK),
                timeout: Duration::from_secs(10),
                refused,
                only: None,
            };
            let config = Config { mtu, limits: Limits::default(), connector: Arc::new(connector), owners: None };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (sender, events) = tokio::sync::mpsc::channel(8);
            let engine = Engine::start_link(link, ends, config, sender).unwrap();
            Running { runtime, engine, events }
        });
        running.join().unwrap()
    }
}

/// True when `tap` has a frame; false when the other end of `link` is closed.
fn wait(tap: &OwnedFd, link: &OwnedFd) -> bool {
    let mut both = [PollFd::new(tap, PollFlags::IN), PollFd::new(link, PollFlags::empty())];
    poll(&mut both, None).is_ok() && !both[1].revents().contains(PollFlags::HUP)
}

impl Guest {
    /// Runs `f` on a thread of the guest's.
    pub fn program<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        inside(&self.name, f)
    }

    /// Changes the guest's firewall.
    pub fn nft(&self, script: &str) {
        run("ip", &["netns", "exec", &self.name, "nft", script]);
    }

    /// Waits until the link is closed.
    pub fn end(mut self) {
        for pump in std::mem::take(&mut self.pumps) {
            pump.join().unwrap();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}
