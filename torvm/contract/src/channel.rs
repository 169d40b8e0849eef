//! Lines between host and guest while it runs, over a virtio-serial port. Each is a JSON object and ends with a newline. The host does
//! not trust the guest: what is longer than [`MAX_LINE`] or not understood is dropped and counted.

use serde::{Deserialize, Serialize};

/// Name of the port in the guest (`/sys/class/virtio-ports/*/name`).
pub const PORT: &str = "org.proxyvpn.channel";
/// Bytes of the longest line, with its newline.
pub const MAX_LINE: usize = 1024;
/// How often the guest says [`Status::Alive`], in milliseconds.
pub const HEARTBEAT_MS: u64 = 2_000;

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum Status {
    /// PID 1 runs.
    Init,
    /// Firewall, devices and addresses are there: traffic of the host may come.
    Network,
    /// The state disk is mounted.
    State {
        /// What was done to it.
        disk: Disk,
    },
    /// Tor was started.
    Tor,
    /// All is as it should be.
    Alive,
    /// A line of Tor's log, notice and above.
    Log {
        /// `err`, `warn` or `notice`.
        level: String,
        /// Without time and level.
        text: String,
    },
    /// The guest powers off.
    Off {
        /// Why.
        cause: String,
    },
}

/// What became of the state disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disk {
    /// It was blank and got a file system.
    Made,
    /// It was checked and is good.
    Kept,
    /// It was repaired.
    Repaired,
    /// It could not be repaired and was made anew: Tor chooses other guards.
    Reset,
}

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub enum Order {
    /// Set the clock.
    Clock {
        /// Microseconds since 1970-01-01 UTC.
        unix_micros: u64,
    },
}
