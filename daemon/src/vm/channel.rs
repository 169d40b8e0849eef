//! What the guest tells, and is told (`proxyvpn_torvm::channel`). The guest is hostile.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use proxyvpn_torvm::channel::{MAX_LINE, Order, Status};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::lines::{Line, Lines, clean};

/// Characters of a text.
const MAX_TEXT: usize = 512;
/// Lines that may come at once: Tor's start makes some fifty.
const BURST: u32 = 256;
/// How often another one may come after that.
const PER_LINE: Duration = Duration::from_millis(31);
/// What is dropped is logged so often at most.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub(super) struct Channel {
    lines: Lines<UnixStream>,
    /// The first line may be the second half of one.
    anew: bool,
    over: bool,
    allowance: Allowance,
    dropped: Dropped,
}

impl Channel {
    /// Takes a connection over; `anew`: an earlier process had it, and may have left half a line either way.
    pub(super) fn new(stream: UnixStream, anew: bool) -> Self {
        let mut lines = Lines::new(stream, MAX_LINE);
        if anew {
            lines.send(b"\n");
        }
        let now = Instant::now();
        Self { lines, anew, over: false, allowance: Allowance { left: BURST, since: now }, dropped: Dropped::default() }
    }

    /// What the guest tells next; `None` once at the end, and nothing after it. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Status> {
        if self.over {
            return std::future::pending().await;
        }
        loop {
            let Ok(Some(line)) = self.lines.next().await else {
                self.over = true;
                return None;
            };
            let now = Instant::now();
            let first = std::mem::take(&mut self.anew);
            match understand(&line) {
                Some(status) if self.allowance.take(now) => return Some(status),
                None if first => {}
                _ => self.dropped.count(now),
            }
        }
    }

    /// Whether the end was told.
    pub(super) const fn over(&self) -> bool {
        self.over
    }

    /// Tells the guest. It is sent at the next [`next`](Self::next).
    ///
    /// # Errors
    /// When the guest has not read what it was told before.
    pub(super) fn order(&mut self, order: &Order) -> io::Result<()> {
        let line = format!("{}\n", serde_json::to_string(order)?);
        if self.lines.send(line.as_bytes()) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lines.stream().as_fd()
    }
}

fn understand(line: &Line) -> Option<Status> {
    let Line::Text(line) = line else { return None };
    Some(match serde_json::from_str(line).ok()? {
        Status::Log { level, text } => {
            let level = ["err", "warn", "info"].into_iter().find(|known| *known == level).unwrap_or("notice");
            Status::Log { level: level.to_owned(), text: clean(&text, MAX_TEXT) }
        }
        Status::Off { cause } => Status::Off { cause: clean(&cause, MAX_TEXT) },
        other => other,
    })
}

/// How many lines may come.
#[derive(Debug)]
struct Allowance {
    left: u32,
    since: Instant,
}

impl Allowance {
    fn take(&mut self, now: Instant) -> bool {
        let earned = u32::try_from(now.duration_since(self.since).as_millis() / PER_LINE.as_millis()).unwrap_or(BURST);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(BURST);
            self.since = now;
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

/// Lines that were not understood or too many.
#[derive(Debug, Default)]
struct Dropped {
    lines: u64,
    logged: Option<Instant>,
}

impl Dropped {
    fn count(&mut self, now: Instant) {
        self.lines += 1;
        if self.logged.is_none_or(|logged| now.duration_since(logged) >= LOG_INTERVAL) {
            self.logged = Some(now);
            tracing::warn!(
                lines = self.lines,
                "the virtual machine says what can't be understood, or too much; it is dropped"
            );
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn text(line: &str) -> Option<Status> {
        understand(&Line::Text(line.to_owned()))
    }

    #[test]
    fn text_of_the_guest_is_bounded_and_harmless() {
        let told = text(r#"{"status":"log","level":"root\u0007","text":"a\u001b[0m\nb"}"#);
        assert_eq!(told, Some(Status::Log { level: "notice".into(), text: "a [0m b".into() }));
        let Some(Status::Off { cause }) = text(&format!(r#"{{"status":"off","cause":"{}"}}"#, "x".repeat(900))) else {
            unreachable!("it is one")
        };
        assert_eq!(cause.chars().count(), MAX_TEXT + 1);
        assert_eq!(text(r#"{"status":"reboot"}"#), None);
    }

    #[tokio::test]
    async fn garbage_is_dropped_and_what_is_good_still_comes() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(ours, false);
        let long = [vec![b'x'; 10 * MAX_LINE], b"\n".to_vec()].concat();
        for part in [&b"{\"status\":\"init\"}\n\0\xff\n{}\n"[..], &long, b"{\"status\":\"alive\"}\n"] {
            guest.write_all(part).await.unwrap();
        }
        assert_eq!(channel.next().await, Some(Status::Init));
        assert_eq!(channel.next().await, Some(Status::Alive));
        assert_eq!(channel.dropped.lines, 3);
        channel.order(&Order::Clock { unix_micros: 7 }).unwrap();
        drop(tokio::time::timeout(Duration::from_millis(20), channel.next()).await);
        let mut told = [0; 64];
        let length = guest.read(&mut told).await.unwrap();
        assert_eq!(told[..length], *b"{\"order\":\"clock\",\"unix_micros\":7}\n");
        drop(guest);
        assert_eq!(channel.next().await, None);
    }

    #[tokio::test]
    async fn half_a_line_of_before_is_no_garbage() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(ours, true);
        guest.write_all(b"us\":\"init\"}\n{\"status\":\"alive\"}\n").await.unwrap();
        assert_eq!(channel.next().await, Some(Status::Alive));
        assert_eq!(channel.dropped.lines, 0);
        let mut told = [0; 8];
        assert_eq!(guest.read(&mut told).await.unwrap(), 1);
        assert_eq!(told[0], b'\n');
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_cut() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(ours, false);
        let flood =
            tokio::spawn(async move { guest.write_all(&b"{\"status\":\"alive\"}\n".repeat(10_000)).await.unwrap() });
        let mut told = 0;
        while channel.next().await.is_some() {
            told += 1;
        }
        flood.await.unwrap();
        assert_eq!((told, channel.dropped.lines), (u64::from(BURST), 10_000 - u64::from(BURST)));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(channel.allowance.take(Instant::now()), "after a while there may be more");
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(line in ".{0,200}") {
            let _ = text(&line);
        }
    }
}
