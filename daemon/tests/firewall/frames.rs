//! Frames that meet no chain of the IP layer: packet sockets, bridges, devices on top of the uplink.

use proxyvpnd::net::{
    Devices,
    desired::{Desired, MARK},
    firewall::{Abilities, Backend, compile},
};

use crate::{
    probes::{connect, datagram},
    state::backends,
    wire::neighbours,
    world::{CONTAINER_MAC, HOST, HOST_MAC, PEER, TUN, World, desired, devices, opted_in, sh},
};

const NO_EGRESS: Abilities = Abilities { egress: false, ..Abilities::ALL };

/// Frames with their EtherType, as hexadecimal bytes behind both addresses, and the line of the sniffer.
const FORBIDDEN: [(&str, &str, &str); 4] = [
    ("IPv4", "0800 4500001c0000000040110000c0000201cb007101 1e611e6100080000", "udp 203.0.113.1 7777"),
    (
        "IPv6",
        "86dd 60000000 0008 11 40 20010db8000000000000000000000001 20010db8000100000000000000000001 1e611e6100080000",
        "udp 2001:db8:1::1 7777",
    ),
    // The sniffer's kernel takes the tag off.
    ("a VLAN", "8100 0007 0800 4500001c0000000040110000c0000201cb007102 1e611e6100080000", "udp 203.0.113.2 7777"),
    ("a protocol of one's own", "88b5 00", "ethertype 0x88b5"),
];
const ALLOWED: [(&str, &str, &str); 4] = [
    ("ARP", "0806 0001080006040001 020000000001 c0000201 000000000000 c000024d", "arp"),
    ("DHCP", "0800 4500001c000000004011 0000 00000000 ffffffff 0044004300080000", "udp 255.255.255.255 67"),
    ("802.1X", "888e 0201 0000", "ethertype 0x888e"),
    ("link aggregation", "8809 01 01", "ethertype 0x8809"),
];

/// Sends a frame by a packet socket of the host on `device`.
fn send(world: &World, device: &str, frame: &str, options: &str) {
    let script = format!(
        "import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(('{device}', 0))
frame = bytes.fromhex('ffffffffffff 020000000001 {frame}')
{options}
try: s.send(frame.ljust(60, b'\\0'))
except OSError: pass"
    );
    world.host.run(|| sh(&format!("python3 -c \"{script}\"")));
}

/// Makes a device of the host; says so where the kernel has no such devices.
fn made(world: &World, command: &str) -> bool {
    let refused = world.host.run(|| sh(&format!("{command} 2>&1 || true")));
    if refused.contains("Unknown device type") {
        println!("skipped: this kernel does not know the device of `{command}`");
        return false;
    }
    assert_eq!(refused, "", "{command}");
    true
}

/// Past the queue of the device (`PACKET_QDISC_BYPASS`, packet(7)).
const BYPASS: &str = "s.setsockopt(263, 20, 1)";

fn apply(world: &World, backend: &Backend, desired: &Desired, devices: &Devices) {
    world.host.run(|| backend.apply(&compile(desired, &[], devices)).unwrap());
    world.seen();
}

fn devices_with(more: &[&str]) -> Devices {
    let uplinks = more.iter().map(|name| (*name).to_owned()).chain(devices().uplinks);
    Devices { uplinks: uplinks.collect(), inner: vec![], routed: vec![] }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_packet_socket_sends_only_what_the_link_needs() {
    opted_in();
    let world = World::new();
    let [nftnl, nft, iptables] = backends();
    for options in ["", BYPASS] {
        let seen = |(_, frame, line): &(&str, &str, &str), more: &str| {
            send(&world, "up0", frame, &[options, more].join("\n"));
            world.seen().iter().any(|seen| seen == line)
        };
        // Anti-test: without a firewall, and with one that has no chain for frames.
        let weak = [None, Some(Backend::Nftnl(NO_EGRESS, None)), Some(iptables.clone())];
        for backend in weak {
            backend.iter().for_each(|backend| apply(&world, backend, &desired(), &devices()));
            for frame in FORBIDDEN.iter().chain(&ALLOWED) {
                assert!(seen(frame, ""), "{backend:?}, {options}: {}", frame.0);
            }
            backend.iter().for_each(|backend| world.host.run(|| backend.remove().unwrap()));
        }
        for backend in [&nftnl, &nft] {
            for state in [desired(), Desired { tunnel: None, ..desired() }] {
                apply(&world, backend, &state, &devices());
                for frame in &FORBIDDEN {
                    assert!(!seen(frame, ""), "{}, {options}: {}", backend.name(), frame.0);
                    // The daemon's own, whatever it sends.
                    let marked = format!("s.setsockopt(socket.SOL_SOCKET, 36, {MARK})");
                    assert!(seen(frame, &marked), "{}, {options}: {} with our mark", backend.name(), frame.0);
                }
                for frame in &ALLOWED {
                    assert!(seen(frame, ""), "{}, {options}: {}", backend.name(), frame.0);
                }
            }
            // Without the kill switch frames are nobody's business.
            apply(&world, backend, &Desired { killswitch: false, ..desired() }, &devices());
            assert!(FORBIDDEN.iter().all(|frame| seen(frame, "")), "{}, {options}", backend.name());
            world.host.run(|| backend.remove().unwrap());
        }
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_machine_that_is_bridged_with_the_uplink_sends_nothing() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        // Bridged frames are none of the IP layer's, as is usual without containers.
        sh(&format!(
            "for f in /proc/sys/net/bridge/bridge-nf-call-*; do echo 0 > $f || true; done
             ip link add br0 address 02:00:00:00:00:01 type bridge; ip link set up0 master br0; ip link set ct0 master br0
             ip addr flush dev up0; ip addr add {HOST}/24 dev br0; ip link set br0 up; ip route add default via {PEER}"
        ))
    });
    world.container.run(|| {
        sh(&format!("ip addr flush dev eth0; ip addr add 192.0.2.9/24 dev eth0; ip route add default via {PEER}"))
    });
    let devices = devices_with(&["br0"]);
    let send = || {
        world.container.run(|| {
            drop(datagram("203.0.113.1:443", |_| Ok(())));
            drop(connect("203.0.113.1:80", |_| Ok(())));
            drop(datagram("255.255.255.255:9", |s| s.set_broadcast(true)));
        });
        world.seen_from(CONTAINER_MAC).into_iter().filter(|line| !neighbours(line)).collect::<Vec<_>>()
    };
    let marked = || {
        world.host.run(|| drop(datagram("203.0.113.9:443", |s| s.set_mark(MARK))));
        world.seen().iter().any(|line| line == "udp 203.0.113.9 443")
    };
    let [nftnl, nft, _] = backends();
    for backend in [None, Some(Backend::Nftnl(NO_EGRESS, None))] {
        backend.iter().for_each(|backend| apply(&world, backend, &desired(), &devices));
        let seen = send();
        for line in ["udp 203.0.113.1 443", "tcp 203.0.113.1 80", "udp 255.255.255.255 9"] {
            assert!(seen.iter().any(|l| l == line), "{line}: {seen:?}");
        }
    }
    for backend in [nftnl, nft] {
        apply(&world, &backend, &desired(), &devices);
        let seen = send();
        assert!(seen.is_empty(), "{}: {seen:?}", backend.name());
        assert!(marked(), "{}: the daemon's own does not leave over the bridge", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_device_on_top_of_the_uplink_has_a_chain_of_its_own() {
    opted_in();
    let world = World::new();
    if !made(&world, "ip link add link up0 name up0.7 type vlan id 7") {
        return;
    }
    world.host.run(|| sh("ip addr add 192.0.7.1/24 dev up0.7; ip link set up0.7 up"));
    world.peer.run(|| {
        sh("ip link add link peer0 name peer0.7 type vlan id 7; ip addr add 192.0.7.2/24 dev peer0.7; ip link set peer0.7 up")
    });
    let arrives = |mark: bool| {
        let server = world.peer.run(|| std::net::UdpSocket::bind("192.0.7.2:0").unwrap());
        server.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        let to = server.local_addr().unwrap().to_string();
        world.host.run(|| drop(datagram(&to, |s| if mark { s.set_mark(MARK) } else { Ok(()) })));
        server.recv(&mut [0; 9]).is_ok()
    };
    let [nftnl, nft, _] = backends();
    assert!(arrives(false) && arrives(true));
    for backend in [nftnl, nft] {
        apply(&world, &backend, &desired(), &devices_with(&["up0.7"]));
        assert!(!arrives(false), "{}", backend.name());
        assert!(arrives(true), "{}: the daemon's own", backend.name());
        let (_, frame, line) = FORBIDDEN[0];
        send(&world, "up0.7", frame, BYPASS);
        send(&world, "up0.7", frame, "");
        let seen = world.seen();
        assert!(!seen.iter().any(|l| l == line || l.starts_with("ethertype")), "{}: {seen:?}", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_namespace_that_shares_the_uplink_sends_nothing() {
    opted_in();
    let world = World::new();
    let pid = world.container.pid();
    if !made(&world, "ip link add mv0 link up0 type macvlan mode bridge") {
        return;
    }
    world.host.run(|| sh(&format!("ip link set mv0 netns {pid}")));
    world.container.run(|| {
        sh(&format!(
            "ip link set mv0 address 02:00:00:00:00:03 up; ip addr add 192.0.2.9/24 dev mv0; ip route del default
             ip route add default via {PEER} dev mv0"
        ))
    });
    let send = || {
        world.container.run(|| {
            drop(datagram("203.0.113.1:443", |_| Ok(())));
            drop(connect("203.0.113.1:80", |_| Ok(())));
        });
        world.seen_from(CONTAINER_MAC).into_iter().filter(|line| !neighbours(line)).collect::<Vec<_>>()
    };
    for backend in [None, Some(Backend::Nftnl(NO_EGRESS, None))] {
        backend.iter().for_each(|backend| apply(&world, backend, &desired(), &devices()));
        let seen = send();
        assert!(seen.contains(&"udp 203.0.113.1 443".to_owned()), "{backend:?}: {seen:?}");
    }
    let [nftnl, nft, _] = backends();
    for backend in [nftnl, nft] {
        apply(&world, &backend, &desired(), &devices());
        assert_eq!(send(), Vec::<String>::new(), "{}", backend.name());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn nobody_on_the_link_learns_the_tunnels_address() {
    opted_in();
    let world = World::new();
    // The neighbour asks for the address itself, as it would for one of its own network.
    world.peer.run(|| sh("ip route add 10.255.255.0/30 dev peer0; ip -6 route add fd70:7670:6e::/64 dev peer0"));
    let known = |address: &str| {
        world.peer.run(|| {
            sh(&format!("ip neigh flush dev peer0; ping -c1 -W1 {address} >/dev/null || true"));
            sh(&format!("ip neigh show {address} dev peer0")).contains("lladdr")
        })
    };
    // An unasked one, as a program with the right could send.
    let advertisement = "86dd 60000000 0020 3a ff 20010db8000000000000000000000001 ff020000000000000000000000000001 \
                         88000000 a0000000 fd707670006e00000000000000000001 0201020000000001";
    let announced = |frame: &str, line: &str| {
        send(&world, "up0", frame, "");
        world.seen().iter().any(|seen| seen == line)
    };
    let arp = "0806 0001080006040002 020000000001 0affff01 020000000002 c0000202";
    let advertised = "icmp6 ff02::1 136";
    assert!(known(TUN), "the kernel does not answer for the address, so nothing is shown");
    assert!(announced(arp, "arp") && announced(advertisement, advertised));
    let [nftnl, nft, _] = backends();
    for backend in [nftnl, nft] {
        for state in [desired(), Desired { killswitch: false, ..desired() }] {
            let context = format!("{}, killswitch {}", backend.name(), state.killswitch);
            apply(&world, &backend, &state, &devices());
            assert!(!known(TUN), "{context}: ARP is answered");
            assert!(!announced(arp, "arp"), "{context}: ARP");
            assert!(!announced(advertisement, advertised), "{context}: a neighbour advertisement");
            assert!(known(HOST), "{context}: the host's own address is not answered");
        }
        // Anti-test: without chains for frames ARP is answered.
        apply(&world, &Backend::Nftnl(NO_EGRESS, None), &desired(), &devices());
        assert!(known(TUN));
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_syn_ack_for_the_tunnels_address_gets_no_answer() {
    opted_in();
    let world = World::new();
    // What tells an attacker on the link that a connection is there (CVE-2019-14899): a reset, or a challenge.
    let probe = || {
        let (peer, host) = ("020000000002", HOST_MAC.map(|byte| format!("{byte:02x}")).concat());
        let script = format!(
            "import socket, struct
def total(data):
    value = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while value >> 16: value = (value & 0xffff) + (value >> 16)
    return ~value & 0xffff
source, target = socket.inet_aton('203.0.113.80'), socket.inet_aton('{TUN}')
tcp = struct.pack('!HHIIBBHHH', 443, 40000, 1, 1, 0x50, 0x12, 1024, 0, 0)
tcp = tcp[:16] + struct.pack('!H', total(source + target + struct.pack('!HH', 6, len(tcp)) + tcp)) + tcp[18:]
ip = struct.pack('!BBHHHBBH', 0x45, 0, 40, 0, 0, 64, 6, 0) + source + target
ip = ip[:10] + struct.pack('!H', total(ip)) + ip[12:]
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(('peer0', 0))
s.send(bytes.fromhex('{host} {peer} 0800') + ip + tcp)"
        );
        world.peer.run(|| sh(&format!("python3 -c \"{script}\"")));
        std::thread::sleep(std::time::Duration::from_millis(50));
        world.seen().into_iter().filter(|line| !neighbours(line)).collect::<Vec<_>>()
    };
    world.host.run(|| sh("for d in all up0; do echo 0 > /proc/sys/net/ipv4/conf/$d/rp_filter; done"));
    assert_eq!(probe(), ["tcp 203.0.113.80 443"], "the kernel does not answer, so nothing is shown");
    for backend in backends() {
        for state in [desired(), Desired { killswitch: false, ..desired() }] {
            apply(&world, &backend, &state, &devices());
            assert_eq!(probe(), Vec::<String>::new(), "{}, killswitch {}", backend.name(), state.killswitch);
        }
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_the_kernel_says_of_forwarded_connections_is_no_answer() {
    opted_in();
    let world = World::new();
    world.steer();
    // No device any more, so the tunnel's address is one that would be forwarded, and has no route.
    world.host.run(|| sh("ip link del pvpn0"));
    world.peer.run(|| sh("ip route add 10.255.255.0/30 via 192.0.2.1"));
    let told = || {
        world.peer.run(|| drop(connect(&format!("{TUN}:443"), |_| Ok(()))));
        world.seen().into_iter().filter(|line| !neighbours(line)).collect::<Vec<_>>()
    };
    assert!(told().contains(&format!("icmp {PEER} 3")), "the kernel says nothing, so nothing is shown");
    for backend in backends() {
        apply(&world, &backend, &Desired { tunnel: None, ..desired() }, &devices());
        assert_eq!(told(), Vec::<String>::new(), "{}", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}
