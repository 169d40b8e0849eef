//! Network namespaces for one test: the host, and a peer on its uplink.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use proxyvpnd::net::desired::{Desired, Exceptions, Tunnel};
use proxyvpnd::net::{Keeping, Network, Stage, Step};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(crate) const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
pub(crate) const HOST6: &str = "2001:db8::1";
pub(crate) const PEER6: &str = "2001:db8::2";

/// A network namespace; it lives as long as its child process.
pub(crate) struct Namespace {
    holder: Child,
    file: File,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let mut holder = Command::new("unshare")
            .args(["-n", "sh", "-c", "ip link set lo up; echo ready; exec sleep 600"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        let file = File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
        Self { holder, file }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.holder.id()
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

    /// The same with a runtime.
    pub(crate) fn run_async<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work())
        })
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

/// Two namespaces and a state directory.
pub(crate) struct World {
    pub(crate) host: Namespace,
    pub(crate) peer: Namespace,
    pub(crate) state: PathBuf,
}

impl World {
    /// The host's uplink is `up0`, with the default routes.
    pub(crate) fn new() -> Self {
        let opted_in = std::env::var("PROXYVPN_PRIVILEGED_TESTS").is_ok_and(|value| value == "1");
        assert!(opted_in, "set PROXYVPN_PRIVILEGED_TESTS=1: this test needs root and makes network namespaces");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let state = std::env::temp_dir().join(format!("proxyvpn-net-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&state).unwrap();
        let (host, peer) = (Namespace::new(), Namespace::new());
        let pid = peer.holder.id();
        host.run(|| {
            sh(&format!(
                "for v in all default; do echo 0 > /proc/sys/net/ipv4/conf/$v/rp_filter; done
                 ip link add up0 type veth peer name peer0 netns {pid}
                 ip addr add {HOST}/24 dev up0; ip addr add {HOST6}/64 dev up0 nodad; ip link set up0 up"
            ))
        });
        peer.run(|| {
            sh(&format!(
                "ip addr add {PEER}/24 dev peer0; ip addr add {PEER6}/64 dev peer0 nodad; ip link set peer0 up
                 ip route add default via {HOST}; ip -6 route add default via {HOST6}"
            ))
        });
        host.run(|| {
            sh(&format!(
                "ip route add default via {PEER}; ip -6 route add default via {PEER6}
                 # the link-local address comes and settles in its own time, and would show up as a difference
                 until ip -6 addr show dev up0 scope link -tentative | grep -q inet6; do sleep 0.05; done"
            ))
        });
        Self { host, peer, state }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.state).unwrap();
    }
}

pub(crate) fn desired() -> Desired {
    Desired {
        tunnel: Some(Tunnel {
            name: "pvpn0".to_owned(),
            v4: "10.255.255.1/30".parse().unwrap(),
            v6: Some("fd70:7670:6e::1/64".parse().unwrap()),
            mtu: 65535,
            gateway: None,
        }),
        exceptions: Exceptions {
            lan: vec!["10.1.0.0/16".parse().unwrap(), "fd01::/16".parse().unwrap()],
            resolvers: vec!["198.51.100.53".parse().unwrap(), "2001:db8:53::53".parse().unwrap()],
            users: vec![13],
            services: vec![],
        },
        ..Desired::closed()
    }
}

/// Everything that can be seen of the namespace's network, as text.
pub(crate) fn snapshot() -> String {
    sh("for v in -4 -6; do echo \"rules $v\"; ip $v rule; echo \"routes $v\"; ip $v route show table all; done
        echo links; ip -d addr
        echo nft; nft list ruleset
        echo sysctl; cd /proc/sys/net; find ipv4/conf ipv6/conf -type f ! -name stable_secret | sort | xargs grep -s .")
}

/// Makes the device and applies both stages.
pub(crate) async fn connect(network: &mut Network, desired: &Desired) -> Vec<OwnedFd> {
    network.preflight(desired).await.unwrap();
    let fds = network.create_tunnel(desired.tunnel.as_ref().unwrap(), 1).await.unwrap();
    network.apply(Stage::Firewall, desired).await.unwrap();
    network.apply(Stage::Routes, desired).await.unwrap();
    fds
}

pub(crate) async fn open(state: &Path) -> Network {
    Network::open(state, Keeping::default()).await.unwrap()
}

pub(crate) fn text(steps: &[Step]) -> String {
    steps.iter().map(|step| format!("{} {} {step}\n", step.layer().as_str(), step.action().as_str())).collect()
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(|cause| format!(": {}", chain(cause)));
    format!("{error}{}", cause.unwrap_or_default())
}
