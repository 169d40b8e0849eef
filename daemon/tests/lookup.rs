//! The upstream's name is looked up over marked sockets only: what is not marked would be blocked, or steered into the
//! tunnel.
//!
//! `PROXYVPN_PRIVILEGED_TESTS=1 cargo test -p proxyvpnd --features privileged-tests --test lookup -- --ignored`
#![cfg(feature = "privileged-tests")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "tests")]

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proxyvpnd::lookup::{LookupError, resolve};

const MARK: u32 = 0x7076_0001;
const SERVER: &str = "192.0.2.53";
/// Set in the copy of this program that runs in a namespace of its own.
const INSIDE: &str = "PROXYVPN_LOOKUP_INSIDE";

/// Runs the named test once more in a new network and mount namespace; true in there. The namespaces end with it.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let wanted = std::env::var_os("PROXYVPN_PRIVILEGED_TESTS").is_some_and(|value| value == "1");
    assert!(wanted, "set PROXYVPN_PRIVILEGED_TESTS=1: this test needs root and makes namespaces");
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed in its namespace");
    false
}

fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// dnsmasq on an address of the namespace's loopback device, and counters of marked and unmarked DNS packets.
struct Dns(Child);

impl Dns {
    fn start() -> Self {
        run("ip link set lo up && ip address add 192.0.2.53/32 dev lo");
        run(&format!(
            "nft -f - <<'END'
            table inet test {{
              counter udp-marked {{}}
              counter tcp-marked {{}}
              counter unmarked {{}}
              chain out {{
                type filter hook output priority 0
                udp dport 53 meta mark {MARK} counter name udp-marked
                tcp dport 53 meta mark {MARK} counter name tcp-marked
                th dport 53 meta mark != {MARK} counter name unmarked
              }}
            }}\nEND"
        ));
        // Answers larger than a datagram may be are cut, so that TCP is needed.
        let many = (1..=120).map(|n| format!("--host-record=many.test,198.51.100.{n}")).collect::<Vec<_>>();
        let child = Command::new("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces"])
            .args(["--listen-address=192.0.2.53", "--user=root", "--pid-file=", "--local=/test/"])
            .args(["--host-record=proxy.test,198.51.100.7,2001:db8::7", "--edns-packet-max=512"])
            .args(many)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // A connection would be counted, too: its last segment may come any time later.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !run("ss -Htln").contains(&format!("{SERVER}:53 ")) {
            assert!(Instant::now() < deadline, "dnsmasq does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self(child)
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Packets of a counter.
fn packets(counter: &str) -> u64 {
    let text = run(&format!("nft list counter inet test {counter}"));
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

async fn ask(host: &str, mark: Option<u32>) -> Result<Vec<IpAddr>, LookupError> {
    resolve(host, &[SERVER.parse().unwrap()], mark, Duration::from_secs(4)).await
}

#[tokio::test]
#[ignore = "needs root"]
async fn every_query_carries_the_mark() {
    if !inside("every_query_carries_the_mark") {
        return;
    }
    let _dns = Dns::start();
    let want: Vec<IpAddr> = vec!["198.51.100.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
    assert_eq!(ask("proxy.test", Some(MARK)).await.unwrap(), want);
    let error = ask("typo.test", Some(MARK)).await.unwrap_err();
    assert!(matches!(error, LookupError::NoSuchName { .. }), "{error}");
    assert!(packets("udp-marked") >= 4, "two names, two families");
    // A busy machine may have asked again over TCP already.
    let before = packets("tcp-marked");
    assert!(!ask("many.test", Some(MARK)).await.unwrap().is_empty());
    assert!(packets("tcp-marked") > before, "the cut answer was fetched over TCP");
    assert_eq!(packets("unmarked"), 0);
    // The detector must fire: without a mark the same look-up is seen as unmarked.
    assert_eq!(ask("proxy.test", None).await.unwrap(), want);
    assert!(packets("unmarked") > 0);
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_blocked_or_missing_network_is_one_clear_error() {
    if !inside("a_blocked_or_missing_network_is_one_clear_error") {
        return;
    }
    let chain = |error: LookupError| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", cause.unwrap_or_default())
    };
    let text = chain(ask("proxy.test", Some(MARK)).await.unwrap_err());
    assert!(text.contains("the DNS server (192.0.2.53) cannot be asked") && text.contains("unreachable"), "{text}");
    let _dns = Dns::start();
    run("nft add rule inet test out udp dport 53 drop");
    let text = chain(ask("proxy.test", Some(MARK)).await.unwrap_err());
    assert!(text.contains("the DNS server (192.0.2.53) cannot be asked") && text.contains("not permitted"), "{text}");
    run("nft flush chain inet test out");
    run("nft 'add chain inet test in { type filter hook input priority 0; }; add rule inet test in udp dport 53 drop'");
    let begin = Instant::now();
    let text = chain(ask("proxy.test", Some(MARK)).await.unwrap_err());
    assert!(text.contains("no answer from the DNS server (192.0.2.53) within 4 s"), "{text}");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

#[tokio::test]
#[ignore = "needs root"]
async fn hosts_and_the_search_list_are_honoured() {
    if !inside("hosts_and_the_search_list_are_honoured") {
        return;
    }
    let _dns = Dns::start();
    let dir = std::env::temp_dir().join(format!("proxyvpn-lookup-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("hosts"), "198.51.100.99 other.test other\n").unwrap();
    std::fs::write(dir.join("resolv.conf"), "nameserver 192.0.2.1\nsearch nowhere.test test\n").unwrap();
    let bind = |file: &str| run(&format!("mount --bind {0}/{file} $(readlink -f /etc/{file})", dir.display()));
    bind("hosts");
    bind("resolv.conf");
    let others = ask("other", Some(MARK)).await;
    let short = ask("proxy", Some(MARK)).await;
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(others.unwrap(), ["198.51.100.99".parse::<IpAddr>().unwrap()]);
    assert_eq!(short.unwrap()[0], "198.51.100.7".parse::<IpAddr>().unwrap());
}

#[tokio::test]
#[ignore = "needs root"]
async fn without_the_capability_the_error_says_so() {
    if !inside("without_the_capability_the_error_says_so") {
        return;
    }
    let caps = [rustix::thread::CapabilitySet::NET_ADMIN, rustix::thread::CapabilitySet::NET_RAW];
    let mut sets = rustix::thread::capabilities(None).unwrap();
    for cap in caps {
        sets.effective.remove(cap);
    }
    rustix::thread::set_capabilities(None, sets).unwrap();
    let error = ask("proxy.test", Some(MARK)).await.unwrap_err();
    assert!(matches!(error, LookupError::Socket(_)), "{error}");
}
