//! Status lines to the host and orders from it, over a virtio-serial port. It never waits for a host that does not read: log lines are
//! then dropped and counted.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proxyvpn_torvm::channel::{MAX_LINE, Order, PORT, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use crate::error::{Error, While as _};
use crate::lines::Lines;

/// How long the host may take to name the port, once the driver is there.
const NAMED_WITHIN: Duration = Duration::from_secs(5);
/// Lines that wait for the host before log lines are dropped.
const WAITING: usize = 64;

/// See the module.
pub(crate) struct Channel {
    port: Option<File>,
    out: Outbox,
    orders: Lines,
}

impl Channel {
    /// Keeps lines until it is open.
    pub(crate) fn closed() -> Self {
        Self { port: None, out: Outbox::default(), orders: Lines::new(MAX_LINE) }
    }

    /// Opens the port of that name.
    pub(crate) fn open(&mut self) -> Result<(), Error> {
        let begin = Instant::now();
        let path = loop {
            if let Some(path) = find() {
                break path;
            }
            if begin.elapsed() > NAMED_WITHIN {
                return Err(Error::Wrong(format!("the machine has no port named {PORT}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        self.port = Some(
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open(&path)
                .during(format!("open {}", path.display()))?,
        );
        Ok(())
    }

    /// Says `status` as soon as the host reads.
    pub(crate) fn send(&mut self, status: &Status) {
        self.out.push(status);
        self.write();
    }

    /// Writes what the host takes now.
    pub(crate) fn write(&mut self) {
        let Some(mut port) = self.port.as_ref() else { return };
        while let Some(bytes) = self.out.next() {
            match port.write(bytes) {
                Ok(0) => return,
                Ok(count) => self.out.sent(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Full, or nobody is there: later.
                Err(_) => return,
            }
        }
    }

    /// Writes what waits, for at most `limit`.
    pub(crate) fn flush(&mut self, limit: Duration) {
        let begin = Instant::now();
        self.write();
        while self.waits() && begin.elapsed() < limit {
            if let Some(port) = &self.port {
                let _ =
                    poll(&mut [PollFd::new(port, PollFlags::OUT)], Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
            }
            self.write();
        }
    }

    /// Is there something left to write?
    pub(crate) fn waits(&mut self) -> bool {
        self.out.next().is_some()
    }

    /// To wait for the host.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.port.as_ref().map(|port| port.as_fd())
    }

    /// Reads once, and calls `each` for every order that is understood.
    pub(crate) fn read(&mut self, mut each: impl FnMut(Order)) {
        let Some(mut port) = self.port.as_ref() else { return };
        let mut buffer = [0; MAX_LINE];
        if let Ok(count) = port.read(&mut buffer) {
            self.orders.take(&buffer[..count], |line| match understand(line) {
                Some(Ok(order)) => each(order),
                Some(Err(error)) => eprintln!("torvm-init: an order was not understood: {error}"),
                None => {}
            });
        }
    }
}

/// The order in a line. An empty one has none: a daemon that goes on with the machine begins with it, to end what may be half a line.
fn understand(line: &[u8]) -> Option<Result<Order, serde_json::Error>> {
    (!line.is_empty()).then(|| serde_json::from_slice(line))
}

/// The port's device.
fn find() -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()? {
        let path = entry.ok()?.path();
        if fs::read_to_string(path.join("name")).is_ok_and(|name| name.trim_end() == PORT) {
            return Some(PathBuf::from("/dev").join(path.file_name()?));
        }
    }
    None
}

/// Lines on their way to the host.
#[derive(Default)]
struct Outbox {
    lines: VecDeque<Vec<u8>>,
    /// Bytes of the first line that are written.
    written: usize,
    /// Log lines dropped, of which the host does not know yet.
    dropped: u64,
}

impl Outbox {
    /// Bounded: there are few states, a heartbeat is not kept behind other lines, and log lines are dropped.
    fn push(&mut self, status: &Status) {
        match status {
            Status::Alive if !self.lines.is_empty() => return,
            Status::Log { .. } if self.lines.len() >= WAITING => {
                self.dropped += 1;
                return;
            }
            _ => {}
        }
        if self.dropped > 0 && self.lines.len() < WAITING {
            let text = format!("{} lines of the log were lost, since the host did not read", self.dropped);
            self.dropped = 0;
            self.push_line(&Status::log("warn", &text));
        }
        self.push_line(status);
    }

    fn push_line(&mut self, status: &Status) {
        match serde_json::to_vec(status) {
            Ok(mut line) => {
                line.push(b'\n');
                self.lines.push_back(line);
            }
            Err(error) => eprintln!("torvm-init: a status was not written: {error}"),
        }
    }

    fn next(&self) -> Option<&[u8]> {
        self.lines.front().and_then(|line| line.get(self.written..))
    }

    fn sent(&mut self, count: usize) {
        self.written += count;
        if self.lines.front().is_some_and(|line| self.written >= line.len()) {
            self.lines.pop_front();
            self.written = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(out: &mut Outbox, piece: usize) -> Vec<Status> {
        let mut stream = Vec::new();
        while let Some(bytes) = out.next() {
            let count = bytes.len().min(piece);
            stream.extend_from_slice(&bytes[..count]);
            out.sent(count);
        }
        String::from_utf8_lossy(&stream).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    #[test]
    fn an_empty_line_is_no_order() {
        assert!(understand(b"").is_none());
        assert!(matches!(
            understand(br#"{"order":"clock","unix_micros":7}"#),
            Some(Ok(Order::Clock { unix_micros: 7 }))
        ));
        for line in ["{}", " ", "{\"order\":\"clo"] {
            assert!(matches!(understand(line.as_bytes()), Some(Err(_))), "{line}");
        }
    }

    #[test]
    fn lines_arrive_whole_and_in_order_however_little_the_host_takes() {
        let said = [Status::Init, Status::Network, Status::log("notice", "x"), Status::Tor];
        let mut out = Outbox::default();
        said.iter().for_each(|status| out.push(status));
        assert_eq!(drain(&mut out, 3), said);
    }

    #[test]
    fn a_host_that_does_not_read_loses_log_lines_and_learns_how_many() {
        let mut out = Outbox::default();
        for number in 0..1000 {
            out.push(&Status::log("notice", &number.to_string()));
            out.push(&Status::Alive);
        }
        assert_eq!(out.lines.len(), WAITING);
        out.push(&Status::off("told in spite of it"));
        assert_eq!(drain(&mut out, 1000).last(), Some(&Status::off("told in spite of it")));
        out.push(&Status::Alive);
        let lost = format!("{} lines of the log were lost, since the host did not read", 1000 - WAITING);
        assert_eq!(drain(&mut out, 1000), [Status::log("warn", &lost), Status::Alive]);
    }
}
