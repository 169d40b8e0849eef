//! How long the kernel's connection tracking keeps connections that have ended.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    thread,
    time::{Duration, Instant},
};

use proxyvpnd::net::{
    desired::{Desired, MARK},
    firewall::{Abilities, Backend, compile},
};
use socket2::Socket;

use crate::{
    probes::{connect, read},
    state::backends,
    world::{HOST, Namespace, PEER, PEER6, TUN, World, desired, devices, opted_in, sh},
};

const NO_TIMEOUTS: Abilities = Abilities { timeouts: false, ..Abilities::ALL };
/// Behind the tunnel device.
const FAR: &str = "203.0.113.80";
const FAR6: &str = "2001:db8:80::1";
/// A host of the local network that the desired state allows.
const LAN_HOST: &str = "198.51.100.129";

/// Limits of the kernel, in seconds: what `nf_conntrack_tcp_timeout_time_wait` is in a new namespace.
const KERNEL: std::ops::RangeInclusive<u32> = 60..=120;
const OURS: std::ops::RangeInclusive<u32> = 1..=10;

/// The world with somebody behind the tunnel device and somebody in the local network.
fn world() -> World {
    let world = World::new();
    world.steer();
    world.host.run(|| {
        sh(&format!("ip link set pvpn0 address 02:00:00:00:00:09; ip rule add to {LAN_HOST} lookup main priority 3701"))
    });
    // One address for both ends, and no questions for it: each frame is for the other end.
    world.container.run(|| {
        sh(&format!(
            "ip link set sink0 down; ip link set sink0 address 02:00:00:00:00:09 arp off; ip link set sink0 up
             ip addr add {FAR}/32 dev sink0; ip route add {TUN}/32 dev sink0
             ip addr add {FAR6}/128 dev sink0 nodad; ip -6 route add fd70:7670:6e::/64 dev sink0"
        ))
    });
    world.peer.run(|| sh(&format!("ip addr add {LAN_HOST}/32 dev lo")));
    world
}

/// A way to connect: where the listener is, its address, where the client is, its mark.
struct Way<'a> {
    name: &'static str,
    server: &'a Namespace,
    to: &'static str,
    client: &'a Namespace,
    mark: u32,
}

/// Connections in the tunnel, and of the daemon.
fn ours(world: &World) -> [Way<'_>; 4] {
    let World { host, peer, container, .. } = world;
    [
        ("tunnel", container, FAR, 0),
        ("tunnel, IPv6", container, FAR6, 0),
        ("marked", peer, PEER, MARK),
        ("marked, IPv6", peer, PEER6, MARK),
    ]
    .map(|(name, server, to, mark)| Way { name, server, to, client: host, mark })
}

/// Connections around the tunnel.
fn others(world: &World) -> [Way<'_>; 3] {
    let World { host, peer, .. } = world;
    [("local network", peer, LAN_HOST, host), ("loopback, IPv6", host, "::1", host), ("from outside", host, HOST, peer)]
        .map(|(name, server, to, client)| Way { name, server, to, client, mark: 0 })
}

impl Way<'_> {
    fn open(&self) -> (Socket, Socket) {
        let listener = self.server.run(|| TcpListener::bind((self.to, 0)).unwrap());
        let to = listener.local_addr().unwrap();
        let prepare = |s: &Socket| if self.mark == 0 { Ok(()) } else { s.set_mark(self.mark) };
        let client =
            self.client.run(|| connect(&to.to_string(), prepare).unwrap_or_else(|e| panic!("{}: {e}", self.name)));
        (client, listener.accept().unwrap().0.into())
    }

    /// Opens a connection, closes it at both ends and gives back for how many seconds its entry then stays.
    fn kept(&self, world: &World) -> u32 {
        close(self.open(), world)
    }
}

/// Closes both ends and gives back for how many seconds the host keeps the connection's entry.
fn close((client, server): (Socket, Socket), world: &World) -> u32 {
    let address = |a: io::Result<socket2::SockAddr>| -> SocketAddr { a.unwrap().as_socket().unwrap() };
    let (from, to) = (address(client.local_addr()), address(client.peer_addr()));
    drop(client);
    drop(server);
    let family = if from.is_ipv4() { "ipv4" } else { "ipv6" };
    let list = format!("conntrack -L -f {family} -p tcp --sport {} --dport {} 2>/dev/null", from.port(), to.port());
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let entries = world.host.run(|| sh(&list));
        let entry: Vec<&str> = entries.split_whitespace().collect();
        // tcp 6 SECONDS STATE src=…
        if let ["tcp", _, seconds, "TIME_WAIT", ..] = *entry {
            return seconds.parse().unwrap();
        }
        assert!(Instant::now() < deadline, "{from} to {to}: {entries:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn apply(world: &World, backend: &Backend, desired: &Desired) {
    world.host.run(|| backend.apply(&compile(desired, &[], &devices())).unwrap());
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn ended_connections_of_the_tunnel_are_soon_forgotten_and_no_others() {
    opted_in();
    let world = world();
    let [nftnl, nft, iptables] = backends();
    for killswitch in [true, false] {
        let desired = Desired { killswitch, ..desired() };
        let context = |backend: &Backend, way: &Way| format!("{backend:?}, killswitch {killswitch}, {}", way.name);
        for backend in [&nftnl, &nft] {
            apply(&world, backend, &desired);
            for way in ours(&world) {
                let kept = way.kept(&world);
                assert!(OURS.contains(&kept), "{}: {kept} s", context(backend, &way));
            }
            for way in others(&world) {
                let kept = way.kept(&world);
                assert!(KERNEL.contains(&kept), "{}: {kept} s", context(backend, &way));
            }
        }
        // Anti-test: without the rules they stay as long as all others.
        for backend in [&Backend::Nftnl(NO_TIMEOUTS, None), &iptables] {
            apply(&world, backend, &desired);
            for way in ours(&world) {
                let kept = way.kept(&world);
                assert!(KERNEL.contains(&kept), "{}: {kept} s", context(backend, &way));
            }
            world.host.run(|| backend.remove().unwrap());
        }
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn the_rules_are_replaced_while_connections_are_open() {
    opted_in();
    let world = world();
    let [nftnl, nft, _] = backends();
    for backend in [nftnl, nft] {
        apply(&world, &backend, &desired());
        let open: Vec<_> = ours(&world).iter().map(Way::open).collect();
        for killswitch in [false, true, true] {
            apply(&world, &backend, &Desired { killswitch, ..desired() });
            for (client, server) in &open {
                client.send(b"hello").unwrap();
                assert_eq!(read(server).unwrap(), b"hello");
            }
        }
        for (way, open) in ours(&world).iter().zip(open) {
            // The object that they were given is gone, so the kernel's own limit holds again.
            assert!(KERNEL.contains(&close(open, &world)), "{}", way.name);
            assert!(OURS.contains(&way.kept(&world)), "{}: a new one", way.name);
        }
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn what_others_change_at_the_timeouts_is_noticed() {
    opted_in();
    let world = World::new();
    let [nftnl, nft, iptables] = backends();
    let rules = "for h in $(nft -a list chain inet proxyvpn output | sed -n 's/.*ct timeout set.*handle //p')";
    let delete = "do nft delete rule inet proxyvpn output handle $h; done";
    let object = |seconds| {
        format!(
            "ct timeout inet proxyvpn tunnelled {{ protocol tcp; l3proto inet; policy = {{ time_wait : {seconds} }}; }}"
        )
    };
    let reset = format!(
        "nft delete ct timeout inet proxyvpn tunnelled; nft 'add {}'
         for m in 'meta mark 0x7076706e' 'oifname \"pvpn0\"'; do
           nft insert rule inet proxyvpn output meta l4proto tcp ct state new $m ct timeout set tunnelled
         done",
        object(120)
    );
    world.host.run(|| {
        let ruleset = compile(&desired(), &[], &devices());
        for (what, damage, noticed) in [
            ("a rule", format!("{rules}; do nft delete rule inet proxyvpn output handle $h; break; done"), [true; 2]),
            (
                "rules and object",
                format!("{rules}; {delete}; nft delete ct timeout inet proxyvpn tunnelled"),
                [true; 2],
            ),
            ("another object", "nft add ct timeout inet proxyvpn other '{ protocol tcp; }'".to_owned(), [true; 2]),
            // The text of a listing differs between versions of nft, so only the names are compared.
            ("another time", format!("{rules}; {delete}; {reset}"), [true, false]),
        ] {
            for (backend, noticed) in [&nftnl, &nft].into_iter().zip(noticed) {
                backend.apply(&ruleset).unwrap();
                assert!(backend.holds(&ruleset).unwrap(), "{}", backend.name());
                sh(&damage);
                assert_ne!(backend.holds(&ruleset).unwrap(), noticed, "{}: {what}", backend.name());
                backend.apply(&ruleset).unwrap();
                assert!(backend.holds(&ruleset).unwrap(), "{}: {what}", backend.name());
            }
        }
        // Where the kernel lacks timeouts, nothing of them is installed, and nothing is missed.
        for backend in [Backend::Nftnl(NO_TIMEOUTS, None), Backend::Nft("/usr/sbin/nft".into(), NO_TIMEOUTS), iptables]
        {
            backend.apply(&ruleset).unwrap();
            assert!(backend.holds(&ruleset).unwrap(), "{backend:?}");
            assert!(!sh("nft list ruleset 2>/dev/null").contains("ct timeout"), "{backend:?}");
            backend.remove().unwrap();
        }
    });
}
