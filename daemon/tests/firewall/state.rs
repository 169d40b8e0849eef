//! What the firewall leaves in the kernel, as text.

use std::{
    io::Write,
    net::SocketAddr,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use proxyvpnd::net::{
    Devices,
    desired::{Control, Desired, Forward, Gateway, Locked},
    firewall::{Abilities, Backend, Error, Programs, compile},
};

use crate::world::{self, World, desired, opted_in, sh};

pub(crate) const NFTNL: Backend = Backend::Nftnl(Abilities::ALL, None);

/// All three, as they are installed here.
pub(crate) fn backends() -> [Backend; 3] {
    let nft = Backend::Nft("/usr/sbin/nft".into(), Abilities::ALL);
    [NFTNL, nft, Backend::Iptables(Programs::find().expect("iptables is installed"))]
}

fn sessions() -> Vec<(SocketAddr, SocketAddr)> {
    ["192.0.2.1:22 198.51.100.7:40000", "[2001:db8::1]:22 [2001:db8::2]:40000"]
        .map(|line| line.split_once(' ').unwrap())
        .map(|(local, remote)| (local.parse().unwrap(), remote.parse().unwrap()))
        .to_vec()
}

/// With a bridge to containers.
fn devices() -> Devices {
    Devices { inner: vec!["in0".to_owned()], routed: vec!["tap1".to_owned()], ..world::devices() }
}

/// Each kind of state.
fn states() -> Vec<Desired> {
    let full = desired();
    let (mac, own_mac, control) = ([2; 6], [4; 6], Control { port: 9051, user: 990 });
    let mut routed = Desired { steer_dns: true, forward: Forward::Tunnel, ..full.clone() };
    routed.exceptions.services = vec!["127.0.0.1:3128".parse().unwrap(), "[::1]:3128".parse().unwrap()];
    let gateway = Gateway { address: [10, 255, 255, 2].into(), mac, own_mac, control };
    routed.tunnel.iter_mut().for_each(|tunnel| (tunnel.v6, tunnel.gateway) = (None, Some(gateway)));
    vec![
        routed.clone(),
        Desired { killswitch: false, ..routed.clone() },
        Desired { locked: Locked::Yes, ..routed },
        full.clone(),
        Desired { killswitch: false, ..full.clone() },
        Desired { tunnel: None, ..full.clone() },
        Desired { inbound_replies: false, ..full.clone() },
        Desired { locked: Locked::Yes, ..full.clone() },
        Desired { forward: Forward::Tunnel, ..full.clone() },
        Desired { forward: Forward::Tunnel, locked: Locked::Yes, inbound_replies: false, ..full },
    ]
}

/// Without counters, which count.
fn ruleset() -> String {
    let text = sh("nft list ruleset 2>/dev/null");
    let line = |line: &str| {
        let mut number = false;
        let word = |word| if std::mem::replace(&mut number, ["packets", "bytes"].contains(&word)) { "N" } else { word };
        line.split(' ').map(word).collect::<Vec<_>>().join(" ")
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// Tables that another program has made, as nft and as iptables would.
const OTHERS: &str = "nft -f - <<'END'
table inet firewalld { chain in { type filter hook input priority 10; policy accept; tcp dport 81 drop; }; }
table inet proxyvpn-other { set s { type ipv4_addr; elements = { 192.0.2.77 }; }; chain c { }; }
END
for p in iptables ip6tables; do for t in mangle filter; do
  $p -t $t -A FORWARD -p tcp --dport 82 -j ACCEPT; $p -t $t -A OUTPUT -p tcp --dport 83 -j ACCEPT
  $p -t $t -A INPUT -p tcp --dport 84 -j ACCEPT
done; $p -t mangle -A PREROUTING -p tcp --dport 85 -j ACCEPT; $p -t mangle -A POSTROUTING -p tcp --dport 86 -j ACCEPT
done";

#[test]
#[ignore = "needs root and makes network namespaces"]
fn libnftnl_and_nft_make_the_same_table() {
    opted_in();
    let world = World::new();
    let [nftnl, nft, _] = backends();
    world.host.run(|| {
        for desired in states() {
            let rules = compile(&desired, &sessions(), &devices());
            nft.apply(&rules).unwrap();
            let by_nft = ruleset();
            nftnl.apply(&rules).unwrap();
            assert_eq!(ruleset(), by_nft);
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn removing_leaves_what_was_there_before() {
    opted_in();
    for backend in backends() {
        let world = World::new();
        world.host.run(|| {
            sh(OTHERS);
            let before = ruleset();
            for desired in states() {
                assert!(!backend.present().unwrap());
                backend.apply(&compile(&desired, &sessions(), &devices())).unwrap();
                let once = ruleset();
                assert_ne!(once, before);
                assert!(backend.present().unwrap());
                backend.apply(&compile(&desired, &sessions(), &devices())).unwrap();
                assert_eq!(ruleset(), once, "{} is idempotent", backend.name());
                backend.remove().unwrap();
                assert_eq!(ruleset(), before, "{}", backend.name());
                backend.remove().unwrap();
                assert_eq!(ruleset(), before, "{}: a second removal", backend.name());
            }
        });
    }
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn nft_accepts_the_script_of_each_state() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        let before = ruleset();
        for desired in states() {
            let script = compile(&desired, &sessions(), &devices()).script();
            sh(&format!("nft -c -f - <<'END'\n{script}\nEND"));
            // Anti-test: the check does check.
            let broken = script.replace("ct state new", "ct state never");
            if broken != script {
                sh(&format!("! nft -c -f - 2>/dev/null <<'END'\n{broken}\nEND"));
            }
        }
        assert_eq!(ruleset(), before);
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn each_backend_removes_what_another_made() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        sh(OTHERS);
        let before = ruleset();
        for maker in backends() {
            for remover in backends() {
                maker.apply(&compile(&desired(), &sessions(), &devices())).unwrap();
                remover.remove().unwrap();
                assert_eq!(ruleset(), before, "made by {}, removed by {}", maker.name(), remover.name());
            }
        }
    });
}

#[test]
#[ignore = "needs root and makes network namespaces"]
fn a_table_that_another_process_owns_is_told() {
    opted_in();
    let world = World::new();
    world.host.run(|| {
        let mut owner = Command::new("nft").arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut stdin = owner.stdin.take().unwrap();
        stdin.write_all(b"add table inet proxyvpn { flags owner; }\n").unwrap();
        for _ in 0..100 {
            if NFTNL.present().unwrap() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let error = NFTNL.apply(&compile(&desired(), &[], &devices())).unwrap_err();
        assert!(matches!(&error, Error::Owned), "{error}");
        assert!(matches!(NFTNL.remove(), Err(Error::Owned)));
        drop(stdin);
        owner.wait().unwrap();
        NFTNL.apply(&compile(&desired(), &[], &devices())).unwrap();
    });
}
