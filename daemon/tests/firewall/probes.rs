//! Ways out of the machine, each with the line that the sniffer shows when it works.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::unix::process::CommandExt,
    process::Command,
    time::Duration,
};

use proxyvpnd::net::desired::MARK;
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{BYPASS_USER, HOST, HOST6, LAN, PEER, RESOLVER};

pub(crate) struct Probe {
    pub(crate) name: &'static str,
    /// Beginning of a line of [`World::seen`](crate::world::World::seen).
    pub(crate) line: String,
    pub(crate) send: Box<dyn Fn() -> io::Result<()> + Sync>,
    /// Whether the sender is told at once that it was refused.
    pub(crate) told: bool,
}

fn probe(name: &'static str, line: &str, send: impl Fn() -> io::Result<()> + Sync + 'static) -> Probe {
    Probe { name, line: line.to_owned(), send: Box::new(send), told: true }
}

/// How long a connection attempt waits that nobody answers.
const WAIT: Duration = Duration::from_millis(150);

/// Connects and reports what the kernel says; the time-out is the answer of a packet that was swallowed.
pub(crate) fn connect(to: &str, prepare: impl Fn(&Socket) -> io::Result<()>) -> io::Result<Socket> {
    let to: SocketAddr = to.parse().unwrap();
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    prepare(&socket)?;
    socket.connect_timeout(&to.into(), WAIT)?;
    Ok(socket)
}

/// A UDP datagram on a connected socket.
pub(crate) fn datagram(to: &str, prepare: impl Fn(&Socket) -> io::Result<()>) -> io::Result<()> {
    let to: SocketAddr = to.parse().unwrap();
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    prepare(&socket)?;
    socket.connect(&to.into())?;
    socket.send(b"probe").map(|_| ())
}

fn raw(to: &str, protocol: i32, payload: &[u8]) -> io::Result<()> {
    let to: SocketAddr = format!("{to}:0").parse().unwrap();
    let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::from(protocol)))?;
    socket.send_to(payload, &to.into()).map(|_| ())
}

fn address(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), 0)
}

/// A datagram with `IP_PKTINFO` (ip(7)).
fn pktinfo() -> io::Result<()> {
    let script = format!(
        "import socket, struct
info = struct.pack('=i4s4s', socket.if_nametoindex('up0'), socket.inet_aton('{HOST}'), bytes(4))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendmsg([b'probe'], [(socket.IPPROTO_IP, 8, info)], 0, ('203.0.113.9', 443))"
    );
    let done = Command::new("python3").args(["-c", &script]).output()?;
    if done.status.success() { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

fn plain(_: &Socket) -> io::Result<()> {
    Ok(())
}

/// What must not leave.
pub(crate) fn forbidden() -> Vec<Probe> {
    let on_link = |port| format!("{PEER}:{port}");
    // ICMP echo request with its checksum.
    let echo = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
    let mut list = vec![
        probe("tcp", "tcp 203.0.113.1 80", || connect("203.0.113.1:80", plain).map(drop)),
        probe("tcp, on-link", "tcp 192.0.2.2 80", move || connect(&on_link(80), plain).map(drop)),
        probe("tcp, IPv6", "tcp 2001:db8:1::1 80", || connect("[2001:db8:1::1]:80", plain).map(drop)),
        probe("tcp, bound to the uplink", "tcp 203.0.113.2 80", || {
            connect("203.0.113.2:80", |s| s.bind_device(Some(b"up0"))).map(drop)
        }),
        probe("tcp with a similar mark", "tcp 203.0.113.3 80", || {
            connect("203.0.113.3:80", |s| s.set_mark(MARK + 1)).map(drop)
        }),
        probe("tcp with a part of the mark", "tcp 203.0.113.4 80", || {
            connect("203.0.113.4:80", |s| s.set_mark(MARK & 0xffff)).map(drop)
        }),
        probe("dns to another resolver", "udp 203.0.113.53 53", || datagram("203.0.113.53:53", plain)),
        probe("dns over tcp to another resolver", "tcp 203.0.113.53 53", || {
            connect("203.0.113.53:53", plain).map(drop)
        }),
        probe("another port of the resolver", "udp 198.51.100.53 54", || datagram(&format!("{RESOLVER}:54"), plain)),
        probe("udp", "udp 203.0.113.1 443", || datagram("203.0.113.1:443", plain)),
        probe("udp, on-link", "udp 192.0.2.2 443", move || datagram(&on_link(443), plain)),
        probe("udp, IPv6", "udp 2001:db8:1::1 443", || datagram("[2001:db8:1::1]:443", plain)),
        probe("udp, bound to the uplink", "udp 203.0.113.2 443", || {
            datagram("203.0.113.2:443", |s| s.bind_device(Some(b"up0")))
        }),
        probe("dhcp's port, from another one", "udp 203.0.113.1 67", || datagram("203.0.113.1:67", plain)),
        probe("multicast dns", "udp 224.0.0.251 5353", || datagram("224.0.0.251:5353", plain)),
        probe("multicast dns, IPv6", "udp ff02::fb 5353", || {
            datagram("[ff02::fb]:5353", |s| s.set_multicast_if_v6(index("up0")))
        }),
        probe("broadcast", "udp 192.0.2.255 9", || datagram("192.0.2.255:9", |s| s.set_broadcast(true))),
        probe("limited broadcast", "udp 255.255.255.255 9", || {
            datagram("255.255.255.255:9", |s| s.set_broadcast(true).and_then(|()| s.bind_device(Some(b"up0"))))
        }),
        probe("llmnr", "udp 224.0.0.252 5355", || datagram("224.0.0.252:5355", plain)),
        probe("llmnr, IPv6", "udp ff02::1:3 5355", || {
            datagram("[ff02::1:3]:5355", |s| s.set_multicast_if_v6(index("up0")))
        }),
        probe("ssdp", "udp 239.255.255.250 1900", || datagram("239.255.255.250:1900", plain)),
        probe("ssdp, IPv6", "udp ff02::c 1900", || datagram("[ff02::c]:1900", |s| s.set_multicast_if_v6(index("up0")))),
        probe("tcp, from the uplink's address", "tcp 203.0.113.7 80", || {
            connect("203.0.113.7:80", |s| s.bind(&address(HOST).into())).map(drop)
        }),
        probe("udp, from the uplink's address", "udp 203.0.113.7 443", || {
            datagram("203.0.113.7:443", |s| s.bind(&address(HOST).into()))
        }),
        probe("udp, from the uplink's address, IPv6", "udp 2001:db8:1::7 443", || {
            datagram("[2001:db8:1::7]:443", |s| s.bind(&address(HOST6).into()))
        }),
        // The kernel cuts it behind the firewall's chains.
        probe("a datagram in fragments", "udp 203.0.113.8 443", || {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
            socket.connect(&"203.0.113.8:443".parse::<SocketAddr>().unwrap().into())?;
            socket.send(&[7; 4000]).map(drop)
        }),
        probe("gre", "protocol 203.0.113.1 47", || raw("203.0.113.1", 47, &[0; 8])),
        probe("esp", "protocol 203.0.113.1 50", || raw("203.0.113.1", 50, &[1; 16])),
        probe("esp, IPv6", "protocol 2001:db8:1::1 50", || raw("[2001:db8:1::1]", 50, &[1; 16])),
        probe("sctp", "protocol 203.0.113.1 132", || raw("203.0.113.1", 132, &[0; 16])),
        probe("igmp", "protocol 203.0.113.1 2", || raw("203.0.113.1", 2, &[0x16, 0, 0, 0, 224, 0, 0, 9])),
        // Neighbour discovery that a router would pass on: the kernel's own has hop limit 255.
        probe("neighbour discovery to somewhere", "icmp6 2001:db8:1::1 135", || {
            raw("[2001:db8:1::1]", 58, &[&[135, 0, 0, 0, 0, 0, 0, 0][..], &[0xfe; 16]].concat())
        }),
        probe("ping", "icmp 203.0.113.1 8", move || raw("203.0.113.1", 1, &echo)),
        // The kernel fills in the checksum of ICMPv6.
        probe("ping, IPv6", "icmp6 2001:db8:1::1 128", || raw("[2001:db8:1::1]", 58, &[128, 0, 0, 0, 0, 0, 0, 0])),
        probe("another protocol", "protocol 203.0.113.1 253", || raw("203.0.113.1", 253, b"probe")),
        probe("a header of one's own", "udp 203.0.113.1 7777", || {
            let udp = [0x1e, 0x61, 0x1e, 0x61, 0, 8, 0, 0];
            let ip = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 203, 0, 113, 1];
            raw("203.0.113.1", 255, &[&ip[..], &udp].concat())
        }),
    ];
    // A fragment has no port to look at. Connection tracking waits for the rest of it.
    let fragment = probe("a fragment to the resolver", "udp 198.51.100.53", || {
        let ip = [0x45, 0, 0, 28, 0, 7, 0, 1, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 53];
        raw(RESOLVER, 255, &[&ip[..], &[0, 53, 0, 53, 0, 8, 0, 0]].concat())
    });
    list.push(Probe { told: false, ..fragment });
    // What the kernel itself sends for a program that joins a group, a moment later.
    let joined = probe("joining a group", "protocol 224.0.0.22 2", || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.join_multicast_v4(&Ipv4Addr::new(239, 1, 2, 3), &HOST.parse().unwrap())?;
        std::thread::sleep(Duration::from_millis(150));
        Ok(())
    });
    let joined6 = probe("joining a group, IPv6", "protocol ff02::16 0", || {
        let socket = UdpSocket::bind("[::]:0")?;
        socket.join_multicast_v6(&Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 1, 3), index("up0"))?;
        std::thread::sleep(Duration::from_millis(150));
        Ok(())
    });
    let told = probe("udp with device and source told for the packet", "udp 203.0.113.9 443", pktinfo);
    list.extend([joined, joined6, told].map(|probe| Probe { told: false, ..probe }));
    list
}

/// What must leave.
pub(crate) fn allowed() -> Vec<Probe> {
    vec![
        probe("tcp with our mark", "tcp 203.0.113.5 80", || connect("203.0.113.5:80", |s| s.set_mark(MARK)).map(drop)),
        probe("tcp with our mark, IPv6", "tcp 2001:db8:1::5 80", || {
            connect("[2001:db8:1::5]:80", |s| s.set_mark(MARK)).map(drop)
        }),
        probe("udp with our mark", "udp 203.0.113.5 443", || datagram("203.0.113.5:443", |s| s.set_mark(MARK))),
        probe("dns", "udp 198.51.100.53 53", || datagram(&format!("{RESOLVER}:53"), plain)),
        probe("dns over tcp", "tcp 198.51.100.53 53", || connect(&format!("{RESOLVER}:53"), plain).map(drop)),
        probe("lan", "udp 198.51.100.128 9", || datagram(&format!("{LAN}:9"), plain)),
        probe("lan, tcp", "tcp 198.51.100.128 9", || connect(&format!("{LAN}:9"), plain).map(drop)),
        probe("a bypassing user", "tcp 203.0.113.6 80", || {
            // It fails as nobody answers; what counts is the wire.
            let run = |arguments: &[&str]| Command::new("nc").uid(BYPASS_USER).args(arguments).output().map(drop);
            run(&["-z", "-w", "1", "203.0.113.6", "80"])
        }),
        probe("dhcp", "udp 255.255.255.255 67", || {
            let socket = UdpSocket::bind("0.0.0.0:68")?;
            socket.set_broadcast(true)?;
            socket.send_to(b"probe", "255.255.255.255:67").map(|_| ())
        }),
        probe("dhcp, IPv6", "udp ff02::1:2 547", || {
            let socket = UdpSocket::bind("[::]:546")?;
            Socket::from(socket.try_clone()?).set_multicast_if_v6(index("up0"))?;
            socket.send_to(b"probe", "[ff02::1:2]:547").map(|_| ())
        }),
        probe("neighbour discovery", "icmp6 ff02::1:ff00:77 135", || {
            datagram("[2001:db8::77]:9", |s| s.set_mark(MARK))
        }),
        probe("arp", "arp", || datagram("192.0.2.77:9", |s| s.set_mark(MARK))),
    ]
}

/// The index of a device, in the namespace of the calling thread.
fn index(name: &str) -> u32 {
    std::fs::read_to_string("/proc/thread-self/net/dev_mcast")
        .unwrap()
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?))
        })
        .find(|(_, device)| *device == name)
        .map(|(index, _)| index.parse().unwrap())
        .unwrap()
}

/// Reads once, at most 300 ms.
pub(crate) fn read(socket: &Socket) -> io::Result<Vec<u8>> {
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    let mut bytes = vec![0; 2048];
    let length = io::Read::read(&mut &*socket, &mut bytes)?;
    bytes.truncate(length);
    Ok(bytes)
}
