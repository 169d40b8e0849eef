//! A device that records what passes, and leaves a file for tcpdump or Wireshark when a test fails.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;

use smoltcp::time::Instant;

use crate::device::{Framing, Queue};

/// `LINKTYPE_RAW`: IP packets.
const RAW: u32 = 101;
/// A longer record is not kept; it is enough for what a test sends.
const MOST: usize = 16 * 1024 * 1024;

/// The time of the test, for every record.
pub(crate) type TestClock = Rc<Cell<Instant>>;

/// `Q`, recorded. Clones are the same device.
#[derive(Debug, Clone)]
pub(crate) struct Pcap<Q> {
    inner: Q,
    framing: Framing,
    clock: TestClock,
    record: Rc<RefCell<Vec<u8>>>,
}

impl<Q> Pcap<Q> {
    pub(crate) fn new(inner: Q, framing: Framing, clock: TestClock) -> Self {
        let mut record = Vec::new();
        // draft-ietf-opsawg-pcap section 4: magic of microseconds, version 2.4, time zone, accuracy, longest packet, link type.
        for field in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, RAW] {
            record.extend_from_slice(&field.to_ne_bytes());
        }
        Self { inner, framing, clock, record: Rc::new(RefCell::new(record)) }
    }

    fn keep(&self, frame: &[u8]) {
        let mut record = self.record.borrow_mut();
        let Some(packet) = frame.get(self.framing.prefix()..).filter(|_| record.len() < MOST) else { return };
        let now = self.clock.get();
        let length = packet.len() as u32;
        for field in [now.secs() as u32, now.micros() as u32, length, length] {
            record.extend_from_slice(&field.to_ne_bytes());
        }
        record.extend_from_slice(packet);
    }

    /// Writes the record to a file of that name among the temporary ones.
    pub(crate) fn save(&self, name: &str) -> io::Result<PathBuf> {
        let path = std::env::temp_dir().join(format!("proxyvpn-{name}-{}.pcap", std::process::id()));
        std::fs::write(&path, &*self.record.borrow())?;
        Ok(path)
    }
}

impl<Q: Queue> Queue for Pcap<Q> {
    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(frame)?;
        self.keep(&frame[..length]);
        Ok(length)
    }

    fn write(&self, frame: &[u8]) -> io::Result<()> {
        self.inner.write(frame)?;
        self.keep(frame);
        Ok(())
    }
}
