//! What this machine runs out of: told while it happens, and for ports before it happens.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proxyvpn_dbus::types::HealthItem;
use proxyvpn_engine::upstream::Shortage;
use tokio::time::Instant;

use super::carrier::item;

/// How long after the last refusal a shortage is shown.
const SHOWN: Duration = Duration::from_secs(30);
/// TCP_TIMEWAIT_LEN of Linux: for so long the port of an ended connection is not free.
const TIME_WAIT: Duration = Duration::from_secs(60);
/// From this share of the ports on they are scarce, in percent.
const SCARCE: u64 = 80;

const REMEDY: &str = "Set net.ipv4.tcp_tw_reuse=1, widen net.ipv4.ip_local_port_range, or give the proxy several addresses \
                      (--proxy-ip, `addresses` in the profile)";

/// See the module. Begins anew with each connection.
#[derive(Debug)]
pub(super) struct Shortages {
    /// Until when each is shown.
    shown: Vec<(Shortage, Instant)>,
    /// How many sockets the engine had closed first, and when that was.
    closed: VecDeque<(Instant, u64)>,
    /// `/proc/sys/net/ipv4`.
    settings: PathBuf,
}

impl Default for Shortages {
    fn default() -> Self {
        Self { shown: Vec::new(), closed: VecDeque::new(), settings: PathBuf::from("/proc/sys/net/ipv4") }
    }
}

impl Shortages {
    /// A connection was refused for `shortage`; true when that is news.
    pub(super) fn note(&mut self, shortage: Shortage, now: Instant) -> bool {
        let news = !self.shows(shortage);
        self.shown.retain(|(shown, _)| *shown != shortage);
        self.shown.push((shortage, now + SHOWN));
        news
    }

    /// Whether `shortage` is shown.
    pub(super) fn shows(&self, shortage: Shortage) -> bool {
        self.shown.iter().any(|(shown, _)| *shown == shortage)
    }

    /// Waits until one of them is over, and forgets it. Never returns while there is none.
    pub(super) async fn over(&mut self) {
        let Some(end) = self.shown.iter().map(|(_, end)| *end).min() else { return std::future::pending().await };
        tokio::time::sleep_until(end).await;
        self.shown.retain(|(_, shown_until)| *shown_until > end);
    }

    /// What there is to tell. `counters` are the engine's, `addresses` is how many the proxy has. To be asked every half minute.
    pub(super) fn items(&mut self, counters: &HashMap<String, u64>, addresses: usize, now: Instant) -> Vec<HealthItem> {
        let used = self.used(counters, now);
        let mut items: Vec<_> = self.shown.iter().map(|(shortage, _)| refused(*shortage)).collect();
        if !self.shows(Shortage::Ports)
            && let Some(ports) = ports(&self.settings)
            && let all = ports.saturating_mul(addresses as u64)
            && used.saturating_mul(100) >= all.saturating_mul(SCARCE)
        {
            let text = format!(
                "Of {all} local ports towards the proxy, about {used} are in use or not free again yet. With none left, \
                 connections are refused. {REMEDY}"
            );
            items.push(item("ports-scarce", "warning", text));
        }
        items
    }

    /// Ports towards the upstream that are not free: of open connections, and of those that this side closed first a short time ago.
    fn used(&mut self, counters: &HashMap<String, u64>, now: Instant) -> u64 {
        let count = |name: &str| counters.get(name).copied().unwrap_or(0);
        // A proxy that refuses mostly waits for us to close.
        let closed = count("flows-closed-first") + count("flows-refused");
        // The newest of those that are old enough stays, to be compared with.
        while self.closed.get(1).is_some_and(|(then, _)| now - *then >= TIME_WAIT) {
            self.closed.pop_front();
        }
        let old = self.closed.front().filter(|(then, _)| now - *then >= TIME_WAIT).map_or(0, |(_, closed)| *closed);
        self.closed.push_back((now, closed));
        // With 1 they are free after a second; 2, the default, is about the loopback alone.
        let reused = matches!(setting(&self.settings.join("tcp_tw_reuse")).as_deref(), Some([1]));
        let waiting = if reused { 0 } else { closed.saturating_sub(old) };
        count("flows-opened").saturating_sub(count("flows-closed")) + waiting
    }
}

/// The words for connections that are being refused.
fn refused(shortage: Shortage) -> HealthItem {
    match shortage {
        Shortage::Ports => item(
            "ports-exhausted",
            "warning",
            format!(
                "Connections are refused: no local port towards the proxy is free. The port of an ended connection is free \
                 again after {} s. {REMEDY}",
                TIME_WAIT.as_secs()
            ),
        ),
        Shortage::Descriptors => item(
            "descriptors-exhausted",
            "warning",
            "Connections are refused: the daemon has no file descriptor left. Raise LimitNOFILE of proxyvpnd.service (if the \
             whole machine has none left, fs.file-max), or find the program that holds so many connections: `proxyctl flows`",
        ),
    }
}

/// How many ports connect(2) chooses from.
fn ports(settings: &Path) -> Option<u64> {
    match setting(&settings.join("ip_local_port_range"))?[..] {
        [first, last] if first <= last => Some(last - first + 1),
        _ => None,
    }
}

/// The numbers in a file of `/proc/sys`; `None` when it cannot be read.
fn setting(path: &Path) -> Option<Vec<u64>> {
    std::fs::read_to_string(path).ok()?.split_ascii_whitespace().map(|word| word.parse().ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::test_dir::TestDir;

    fn counters(opened: u64, closed: u64, first: u64) -> HashMap<String, u64> {
        [("flows-opened", opened), ("flows-closed", closed), ("flows-closed-first", first), ("flows-refused", 0)]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }

    fn codes(items: &[HealthItem]) -> Vec<&str> {
        items.iter().map(|item| item.code.as_str()).collect()
    }

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn ports_are_scarce_before_they_are_gone() {
        let dir = TestDir::new("shortage");
        std::fs::write(dir.path("ip_local_port_range"), "32768\t32867\n").unwrap();
        std::fs::write(dir.path("tcp_tw_reuse"), "2\n").unwrap();
        let mut shortages = Shortages { settings: dir.path(""), ..Shortages::default() };
        let start = Instant::now();
        assert_eq!(codes(&shortages.items(&counters(79, 0, 0), 1, start)), [""; 0]);
        assert_eq!(codes(&shortages.items(&counters(100, 79, 60), 1, at(start, 30))), ["ports-scarce"]);
        let items = shortages.items(&counters(100, 99, 79), 1, at(start, 60));
        assert!(items[0].text.contains("Of 100 ") && items[0].text.contains("about 80 "), "{}", items[0].text);
        assert_eq!(codes(&shortages.items(&counters(100, 99, 79), 2, at(start, 60))), [""; 0], "twice the ports");
        assert_eq!(codes(&shortages.items(&counters(100, 99, 79), 1, at(start, 90))), [""; 0], "60 are free again");
        assert_eq!(codes(&shortages.items(&counters(160, 160, 139), 1, at(start, 120))), [""; 0]);
        assert_eq!(codes(&shortages.items(&counters(180, 180, 160), 1, at(start, 150))), ["ports-scarce"]);
        std::fs::write(dir.path("tcp_tw_reuse"), "1\n").unwrap();
        assert_eq!(codes(&shortages.items(&counters(180, 180, 160), 1, at(start, 151))), [""; 0], "the remedy");
    }

    #[tokio::test(start_paused = true)]
    async fn a_shortage_is_news_once_and_goes_away() {
        let (mut shortages, none) = (Shortages::default(), counters(0, 0, 0));
        let start = Instant::now();
        assert!(shortages.note(Shortage::Ports, start));
        assert!(!shortages.note(Shortage::Ports, at(start, 10)));
        assert!(shortages.note(Shortage::Descriptors, at(start, 15)));
        let items = shortages.items(&none, 1, at(start, 15));
        assert_eq!(codes(&items), ["ports-exhausted", "descriptors-exhausted"]);
        assert!(items[0].text.contains("net.ipv4.tcp_tw_reuse=1") && items[1].text.contains("LimitNOFILE"));
        shortages.over().await;
        assert_eq!((Instant::now() - start).as_secs(), 40, "half a minute after the last refusal");
        assert_eq!(codes(&shortages.items(&none, 1, at(start, 40))), ["descriptors-exhausted"]);
        assert!(shortages.note(Shortage::Ports, at(start, 50)), "it is news again");
    }
}
