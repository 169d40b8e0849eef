//! What this machine forwards for containers and virtual machines, with `forward = "tunnel"` and without.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use proxyvpnd::net::{
    Devices,
    desired::{Desired, Forward, Locked},
    firewall::{Backend, compile},
};
use socket2::Socket;

use crate::{
    probes::{connect, datagram, read},
    state::{NFTNL, backends},
    wire::neighbours,
    world::{Namespace, PEER, RESOLVER, TUN, World, desired, opted_in, sh},
};

/// Behind the tunnel device.
const FAR: &str = "203.0.113.80";
const FAR6: &str = "2001:db8:80::1";
/// The host on the containers' bridge.
const GATEWAY: &str = "10.9.0.1";
/// Bytes of a bulk transfer.
const BULK: usize = 1 << 20;

/// The world with a bridge for the container and somebody behind the tunnel device.
struct Forwarding {
    world: World,
    far: Namespace,
    /// Whether the container's device is a port of a bridge, as usual, or stands alone.
    bridged: bool,
}

impl Forwarding {
    fn new(bridged: bool) -> Self {
        let (world, far) = (World::new(), Namespace::new());
        world.steer();
        world.steer_forwarded();
        let far_pid = far.pid();
        world.container.run(|| sh(&format!("ip link set sink0 netns {far_pid}")));
        let inner = if bridged { "in0" } else { "ct0" };
        world.host.run(|| {
            if bridged {
                sh("ip addr flush dev ct0; ip link add in0 type bridge; ip link set ct0 master in0; ip link set in0 up
                    ip addr add 10.9.0.1/24 dev in0")
            } else {
                String::new()
            };
            sh(&format!(
                "ip link set pvpn0 address 02:00:00:00:00:09; ip addr add fd09::1/64 dev {inner} nodad
                 for f in /proc/sys/net/ipv6/conf/*/forwarding; do echo 1 > $f; done
                 # the kernel sends six errors at once to a host, and then one in a second
                 echo 0 > /proc/sys/net/ipv4/icmp_ratelimit; echo 0 > /proc/sys/net/ipv6/icmp/ratelimit
                 ip -6 route add default via 2001:db8::2 2>/dev/null || true"
            ))
        });
        world.container.run(|| {
            sh("ip addr add fd09::2/64 dev eth0 nodad; ip -6 route add default via fd09::1
                echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range")
        });
        world.peer.run(|| {
            sh(&format!("ip addr add {RESOLVER}/32 dev lo; ip route add 10.9.0.0/24 via 192.0.2.1; ip -6 route add fd09::/64 via 2001:db8::1"))
        });
        // One address for both ends, and no questions for it: each frame is for the other end.
        far.run(|| {
            sh(&format!(
                "ip link set sink0 address 02:00:00:00:00:09 arp off; ip link set sink0 up
                 ip addr add {FAR}/32 dev sink0; ip route add default dev sink0
                 ip addr add {FAR6}/128 dev sink0 nodad; ip -6 route add default dev sink0"
            ))
        });
        world.seen();
        Self { world, far, bridged }
    }

    fn devices(&self) -> Devices {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        if self.bridged {
            Devices { uplinks: names(&["up0"]), inner: names(&["in0"]), routed: vec![] }
        } else {
            Devices { uplinks: names(&["up0", "ct0"]), inner: vec![], routed: vec![] }
        }
    }

    fn apply(&self, backend: &Backend, desired: &Desired) {
        self.world.host.run(|| backend.apply(&compile(desired, &[], &self.devices())).unwrap());
        self.world.seen();
    }

    /// A connection of the container to somebody behind the tunnel.
    fn dial(&self, address: &str) -> Option<(Socket, TcpStream)> {
        let listener = self.far.run(|| TcpListener::bind((address, 0)).unwrap());
        let to = listener.local_addr().unwrap().to_string();
        let client = self.world.container.run(|| connect(&to, |_| Ok(()))).ok()?;
        Some((client, listener.accept().unwrap().0))
    }

    fn reaches(&self, address: &str) -> bool {
        self.dial(address).is_some_and(|(client, mut server)| {
            server.write_all(b"hello").is_ok() && read(&client).is_ok_and(|got| got == b"hello")
        })
    }

    /// Whether the container gets an answer from the resolver.
    fn resolves(&self, tcp: bool) -> bool {
        if tcp {
            let listener = self.world.peer.run(|| TcpListener::bind((RESOLVER, 53)).unwrap());
            let client = self.world.container.run(|| connect(&format!("{RESOLVER}:53"), |_| Ok(())));
            return client.is_ok_and(|client| {
                listener.accept().unwrap().0.write_all(b"hello").unwrap();
                read(&client).is_ok_and(|got| got == b"hello")
            });
        }
        let server = self.world.peer.run(|| UdpSocket::bind((RESOLVER, 53)).unwrap());
        let client = self.world.container.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        }
        client.connect((RESOLVER, 53)).unwrap();
        let (mut buffer, _) = ([0; 9], client.send(b"question"));
        server.recv_from(&mut buffer).is_ok_and(|(_, from)| {
            server.send_to(b"answer", from).unwrap();
            client.recv(&mut buffer).is_ok()
        })
    }

    /// The error that a datagram of the container meets, and how soon.
    fn refused(&self, to: &str) -> (Option<ErrorKind>, Duration) {
        let to: SocketAddr = to.parse().unwrap();
        let start = Instant::now();
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = self.world.container.run(|| UdpSocket::bind(any).unwrap());
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket.send(b"probe").unwrap();
        (socket.recv(&mut [0; 9]).err().map(|error| error.kind()), start.elapsed())
    }

    /// What the host sent on the uplink, but for questions to the resolver.
    fn leaked(&self) -> Vec<String> {
        let fine = |line: &String| neighbours(line) || line.starts_with(&format!("udp {RESOLVER} 53"));
        self.world.seen().into_iter().filter(|line| !fine(line) && *line != format!("tcp {RESOLVER} 53")).collect()
    }
}

fn tunnel() -> Desired {
    Desired { forward: Forward::Tunnel, ..desired() }
}

/// As docker does it, in a table of its own.
const MASQUERADE: &str = "nft -f - <<'END'
table inet docker { chain post { type nat hook postrouting priority 100; ip saddr 10.9.0.0/24 masquerade
  ip6 saddr fd09::/64 masquerade
}
chain forward { type filter hook forward priority 0; policy accept; }
}
END";

#[test]
#[ignore = "needs root and makes network namespaces"]
fn forwarded_tcp_goes_into_the_tunnel_and_nothing_else_leaves() {
    opted_in();
    for bridged in [true, false] {
        let forwarding = Forwarding::new(bridged);
        let host = &forwarding.world.host;
        for masquerade in [false, true] {
            if masquerade {
                host.run(|| sh(MASQUERADE));
            }
            for backend in backends() {
                for rp_filter in [0, 1, 2] {
                    host.run(|| {
                        sh(&format!(
                            "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo {rp_filter} > $f; done
                             for f in up0 in0 ct0; do [ ! -e /proc/sys/net/ipv4/conf/$f ] || echo 1 > /proc/sys/net/ipv4/conf/$f/src_valid_mark; done"
                        ))
                    });
                    let context = format!(
                        "{}, bridged {bridged}, masquerade {masquerade}, rp_filter {rp_filter}",
                        backend.name()
                    );
                    forwarding.apply(&backend, &tunnel());
                    for far in [FAR, FAR6] {
                        assert!(forwarding.reaches(far), "{context}: {far}");
                    }
                    assert!(forwarding.resolves(false), "{context}: DNS");
                    assert!(forwarding.resolves(true), "{context}: DNS over TCP");
                    for to in [
                        format!("{FAR}:443"),
                        format!("[{FAR6}]:443"),
                        format!("{PEER}:443"),
                        "203.0.113.53:53".to_owned(),
                    ] {
                        let (error, took) = forwarding.refused(&to);
                        if bridged {
                            assert_eq!(error, Some(ErrorKind::ConnectionRefused), "{context}: {to}");
                            assert!(took < Duration::from_millis(100), "{context}: {to} after {took:?}");
                        }
                    }
                    // Another port of the resolver, a network that only this machine may reach directly, and ping.
                    let _ = forwarding.refused(&format!("{RESOLVER}:54"));
                    forwarding.world.container.run(|| {
                        drop(connect("198.51.100.129:80", |_| Ok(())));
                        drop(datagram("198.51.100.129:80", |_| Ok(())));
                        sh(&format!("ping -c1 -W0.2 {PEER} >/dev/null && exit 1 || true"))
                    });
                    let leaked = forwarding.leaked();
                    assert!(leaked.is_empty(), "{context}: {leaked:?}");
                    // Anti-test: as long as it is not allowed nothing goes into the tunnel, and no question leaves.
                    forwarding.apply(&backend, &desired());
                    assert!(!forwarding.reaches(FAR), "{context}: blocked");
                    assert!(!forwarding.resolves(false) && !forwarding.resolves(true), "{context}: blocked");
                    assert!(forwarding.world.seen().iter().all(|line| neighbours(line)), "{context}: blocked");
                }
                host.run(|| backend.remove().unwrap());
            }
        }
        // Anti-test: the sniffer sees what is forwarded.
        let _ = forwarding.refused(&format!("{FAR}:443"));
        assert!(forwarding.leaked().contains(&format!("udp {FAR} 443")));
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_lock_lets_through_what_our_table_forwards() {
    opted_in();
    let forwarding = Forwarding::new(true);
    let host = &forwarding.world.host;
    let locked = Desired { locked: Locked::Yes, ..tunnel() };
    crate::lock::close(&forwarding.world);
    assert!(!forwarding.reaches(FAR) && !forwarding.resolves(false), "the lock alone forwards");
    for masquerade in [false, true] {
        if masquerade {
            host.run(|| sh(MASQUERADE));
        }
        forwarding.apply(&NFTNL, &locked);
        for far in [FAR, FAR6] {
            assert!(forwarding.reaches(far), "masquerade {masquerade}: {far}");
        }
        assert!(forwarding.resolves(false) && forwarding.resolves(true), "masquerade {masquerade}: DNS");
        let (error, _) = forwarding.refused(&format!("{FAR}:443"));
        assert_eq!(error, Some(ErrorKind::ConnectionRefused));
        assert_eq!(forwarding.leaked(), Vec::<String>::new());
        // Anti-test: without being told so the lock lets nothing through.
        forwarding.apply(&NFTNL, &tunnel());
        assert!(!forwarding.reaches(FAR) && !forwarding.resolves(false), "masquerade {masquerade}");
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn without_a_tunnel_device_forwarded_tcp_has_no_way() {
    opted_in();
    let forwarding = Forwarding::new(true);
    for backend in backends() {
        forwarding.apply(&backend, &Desired { tunnel: None, ..tunnel() });
        forwarding.world.host.run(|| sh("ip link set pvpn0 down"));
        let start = Instant::now();
        assert!(!forwarding.reaches(FAR) && !forwarding.reaches(FAR6), "{}", backend.name());
        assert!(start.elapsed() < Duration::from_millis(250), "{}: {:?}", backend.name(), start.elapsed());
        assert_eq!(forwarding.leaked(), Vec::<String>::new(), "{}", backend.name());
        forwarding.world.host.run(|| {
            sh("ip link set pvpn0 up; for v in -4 -6; do ip $v route replace default dev pvpn0 table 7376750; done")
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_container_with_a_smaller_mtu_gets_bulk_both_ways() {
    opted_in();
    let forwarding = Forwarding::new(true);
    // The far end announces the largest segments, as the engine does, and the way into the tunnel is narrower than the
    // container's link.
    forwarding.far.run(|| sh("ip link set sink0 mtu 65535"));
    forwarding.world.host.run(|| sh("ip link set pvpn0 mtu 1280"));
    for backend in backends() {
        forwarding.apply(&backend, &tunnel());
        for far in [FAR, FAR6] {
            let (client, server) = forwarding.dial(far).unwrap();
            let client = TcpStream::from(client);
            for (mut from, mut to) in [(&client, &server), (&server, &client)] {
                for stream in [from, to] {
                    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
                }
                let start = Instant::now();
                thread::scope(|scope| {
                    scope.spawn(move || from.write_all(&vec![7; BULK]).unwrap());
                    let mut got = vec![0; BULK];
                    to.read_exact(&mut got).unwrap_or_else(|error| panic!("{}, {far}: {error}", backend.name()));
                });
                assert!(start.elapsed() < Duration::from_secs(5), "{}, {far}: {:?}", backend.name(), start.elapsed());
            }
        }
        forwarding.world.host.run(|| {
            backend.remove().unwrap();
            sh("ip route flush cache; ip -6 route flush cache")
        });
        forwarding.world.container.run(|| sh("ip route flush cache; ip -6 route flush cache"));
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_bridges_own_services_go_on() {
    opted_in();
    let forwarding = Forwarding::new(true);
    let Forwarding { world, .. } = &forwarding;
    let bind = |to: &str| {
        let socket = world.host.run(|| UdpSocket::bind(to).unwrap());
        socket.set_broadcast(true).unwrap();
        socket
    };
    let (dhcp, dns, other) =
        (bind(&format!("{GATEWAY}:67")), bind(&format!("{GATEWAY}:53")), bind(&format!("{GATEWAY}:5000")));
    let client = |port: u16| {
        let socket = world.container.run(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        socket
    };
    let (lease, asker) = (client(68), client(5353));
    let listener = world.host.run(|| TcpListener::bind(format!("{GATEWAY}:0")).unwrap());
    let to = listener.local_addr().unwrap().to_string();
    let mut buffer = [0; 9];
    for backend in backends() {
        for base in [desired(), tunnel(), Desired { tunnel: None, ..desired() }] {
            for inbound_replies in [true, false] {
                let state = Desired { inbound_replies, ..base.clone() };
                let context = format!("{}, {:?}, inbound replies {inbound_replies}", backend.name(), state.forward);
                forwarding.apply(&backend, &state);
                assert!(dhcp.send_to(b"lease", "10.9.0.255:68").is_ok(), "{context}");
                assert!(lease.recv(&mut buffer).is_ok(), "{context}: DHCP");
                assert!(dns.send_to(b"answer", "10.9.0.2:5353").is_ok(), "{context}");
                assert!(asker.recv(&mut buffer).is_ok(), "{context}: DNS");
                // Anti-test: other services get no answer out by UDP.
                assert!(other.send_to(b"other", "10.9.0.2:5353").is_err(), "{context}");
                let reached = world.container.run(|| connect(&to, |_| Ok(())));
                assert!(reached.is_ok(), "{context}: TCP to the host: {reached:?}");
                let (mut server, _) = listener.accept().unwrap();
                server.write_all(b"hello").unwrap();
                assert_eq!(read(&reached.unwrap()).unwrap(), b"hello", "{context}");
                // None of it on the uplink, and not for the tunnel's address.
                assert!(world.container.run(|| connect(&format!("{TUN}:1"), |_| Ok(()))).is_err());
                assert_eq!(forwarding.leaked(), Vec::<String>::new(), "{context}");
            }
        }
        // Anti-test: a device that is not known to be inner gets none of it.
        let unknown = Devices { inner: vec![], ..forwarding.devices() };
        world.host.run(|| backend.apply(&compile(&desired(), &[], &unknown)).unwrap());
        assert!(dhcp.send_to(b"lease", "10.9.0.255:68").is_err(), "{}", backend.name());
        assert!(dns.send_to(b"answer", "10.9.0.2:5353").is_err(), "{}", backend.name());
        world.host.run(|| backend.remove().unwrap());
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn containers_of_one_bridge_reach_each_other() {
    opted_in();
    let forwarding = Forwarding::new(true);
    let Forwarding { world, far, .. } = &forwarding;
    let pid = far.pid();
    world.host.run(|| {
        // With these the frames of a bridge come through the forward chain, as docker sets it.
        sh(&format!(
            "for f in /proc/sys/net/bridge/bridge-nf-call-ip*; do [ ! -e $f ] || echo 1 > $f; done
             ip link add ct1 type veth peer name eth0 netns {pid}; ip link set ct1 master in0 up"
        ))
    });
    far.run(|| sh("ip addr add 10.9.0.3/24 dev eth0; ip link set eth0 up"));
    for backend in backends() {
        for state in [desired(), tunnel()] {
            forwarding.apply(&backend, &state);
            let context = format!("{}, {:?}", backend.name(), state.forward);
            assert!(forwarding.reaches("10.9.0.3"), "{context}");
            let server = far.run(|| UdpSocket::bind("10.9.0.3:0").unwrap());
            server.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let to = server.local_addr().unwrap().to_string();
            world.container.run(|| datagram(&to, |_| Ok(())).unwrap());
            assert!(server.recv(&mut [0; 9]).is_ok(), "{context}");
        }
        world.host.run(|| backend.remove().unwrap());
    }
}
