//! A third namespace behind `app`, as a container or a virtual machine is: `app` forwards its packets to the TUN device.

use std::io::Read;
use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Lab, inside, ip, run};

const ADDRESSES: [&str; 2] = ["10.99.0.2", "fd99::2"];

pub struct Peer {
    name: String,
    app: String,
}

/// What came in at the peer's wire.
#[derive(Debug, Default)]
pub struct Seen {
    /// TCP segments with data.
    pub segments: u64,
    /// Bytes of data in the largest.
    pub largest: usize,
    /// Fragments of IPv4 packets.
    pub fragments: u64,
}

impl Lab {
    /// A peer on a wire of this MTU. Without `offload` the wire takes neither segments larger than its MTU nor packets whose
    /// checksum is yet to be computed, like most network cards of old, and like a virtual machine's when it is told so.
    pub fn peer(&self, mtu: u16, offload: bool) -> Peer {
        let peer = Peer { name: self.app.replace("-app", "-peer"), app: self.app.clone() };
        run("ip", &["netns", "add", &peer.name]);
        self.app(&format!("link add fa type veth peer name fb netns {}", peer.name));
        for (ns, device, v4, v6) in
            [(&peer.app, "fa", "10.99.0.1/24", "fd99::1/64"), (&peer.name, "fb", "10.99.0.2/24", "fd99::2/64")]
        {
            ip(ns, &format!("addr add {v4} dev {device}"));
            ip(ns, &format!("addr add {v6} dev {device} nodad"));
            ip(ns, &format!("link set {device} mtu {mtu} up"));
            if !offload {
                let switches = ["tx", "off", "tso", "off", "gso", "off", "gro", "off"];
                run("ip", &[&["netns", "exec", ns, "ethtool", "-K", device], &switches[..]].concat());
            }
        }
        for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            inside(&peer.app, move || std::fs::write(format!("/proc/sys/net/{name}"), "1").unwrap()).join().unwrap();
        }
        peer.ip("route add default via 10.99.0.1");
        peer.ip("-6 route add default via fd99::1");
        peer
    }
}

impl Peer {
    /// Runs `ip` in the peer.
    pub fn ip(&self, command: &str) {
        ip(&self.name, command);
    }

    /// Runs `f` on a thread of the peer's.
    pub fn program<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        inside(&self.name, f)
    }

    /// Sets `net.ipv4.NAME` for the peer.
    pub fn sysctl(&self, name: &'static str, value: &'static str) {
        self.program(move || std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap()).join().unwrap();
    }

    /// Damages about every 64th data packet of the peer's: a byte of the data, but not the checksum. It chooses by checksum,
    /// so that a packet that is sent again with a new timestamp passes.
    pub fn damage(&self) {
        let rule = "add rule inet damage forward iifname fa tcp checksum & 0x3f == 5 @th,256,8 set 0xa5 counter";
        let script = format!(
            "add table inet damage; add chain inet damage forward {{ type filter hook forward priority 0; }}; {rule}"
        );
        run("ip", &["netns", "exec", &self.app, "nft", &script]);
    }

    /// Packets that were damaged.
    pub fn damaged(&self) -> u64 {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.app, "nft", "list", "chain", "inet", "damage", "forward"])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (_, rest) = text.split_once("counter packets ").unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    }

    /// Runs `f` in the peer and watches what comes in on its wire meanwhile.
    pub fn watched<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> (T, Seen) {
        let (over, started) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let watcher = self.program({
            let (over, started) = (Arc::clone(&over), Arc::clone(&started));
            move || watch(&over, &started)
        });
        super::wait_until("the watcher listens", || started.load(Ordering::Relaxed));
        let result = self.program(f).join();
        over.store(true, Ordering::Relaxed);
        (result.unwrap(), watcher.join().unwrap())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn watch(over: &AtomicBool, started: &AtomicBool) -> Seen {
    let every = i32::from((libc::ETH_P_ALL as u16).to_be());
    // Cooked: packets begin with the IP header.
    let socket =
        socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::DGRAM, Some(socket2::Protocol::from(every)))
            .unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    started.store(true, Ordering::Relaxed);
    let (mut seen, mut packet) = (Seen::default(), vec![0; 70_000]);
    while !over.load(Ordering::Relaxed) {
        let Ok(length) = (&socket).read(&mut packet) else { continue };
        seen.take(&packet[..length]);
    }
    seen
}

impl Seen {
    fn take(&mut self, packet: &[u8]) {
        let (destination, protocol, header, length): (IpAddr, u8, usize, usize) = match packet[0] >> 4 {
            4 => {
                let destination: [u8; 4] = packet[16..20].try_into().unwrap();
                if u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0 {
                    self.fragments += 1;
                }
                let length = u16::from_be_bytes([packet[2], packet[3]]);
                (destination.into(), packet[9], usize::from(packet[0] & 15) * 4, length.into())
            }
            6 => {
                let destination: [u8; 16] = packet[24..40].try_into().unwrap();
                let length = u16::from_be_bytes([packet[4], packet[5]]);
                (destination.into(), packet[6], 40, 40 + usize::from(length))
            }
            // ARP
            _ => return,
        };
        if protocol != 6 || !ADDRESSES.iter().any(|address| address.parse() == Ok(destination)) {
            return;
        }
        let data = length - header - usize::from(packet[header + 12] >> 4) * 4;
        if data > 0 {
            self.segments += 1;
            self.largest = self.largest.max(data);
        }
    }
}
