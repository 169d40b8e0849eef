//! The message by which the daemon has QEMU started: one packet on a `SOCK_SEQPACKET` socket, with descriptors (`SCM_RIGHTS`). Nothing
//! in it is a path or a command line.

use serde::{Deserialize, Serialize};

/// Where the launcher listens.
pub const SOCKET: &str = "/run/proxyvpn-qemu.sock";
/// Bytes of the longest message, either way.
pub const MAX_MESSAGE: usize = 4096;

/// The guest's kernel command line. It is readable by all in the guest: nothing secret belongs there. A panic ends QEMU (`-no-reboot`).
pub const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=1 random.trust_cpu=off ipv6.disable=1";

/// What comes with a [`Request`], in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptor {
    /// Queue of the TAP device, with virtio headers.
    Tap,
    /// One end of a `SOCK_SEQPACKET` socket pair: Ethernet frames to the packet engine.
    Link,
    /// One end of a stream socket pair: QMP.
    Qmp,
    /// One end of a stream socket pair: the [`channel`](crate::channel).
    Channel,
    /// The kernel, read-only, readable by anybody.
    Kernel,
    /// The initramfs, read-only, readable by anybody.
    Initramfs,
    /// The state disk, read-write.
    State,
    /// The guest's configuration (a memfd): [`GuestConfig`](crate::config::GuestConfig) as JSON.
    Config,
}

impl Descriptor {
    /// All of them, in their order.
    pub const ALL: [Self; 8] =
        [Self::Tap, Self::Link, Self::Qmp, Self::Channel, Self::Kernel, Self::Initramfs, Self::State, Self::Config];
}

/// How the guest's instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By translation.
    Tcg,
}

/// Daemon to launcher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Request {
    /// How instructions are run.
    pub accelerator: Accelerator,
    /// The guest's memory in MiB, 128 to 4096.
    pub memory_mib: u32,
}

/// Launcher to daemon. When all copies of the daemon's end are closed, QEMU is ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// QEMU was started.
    Started {
        /// Its version, as in `7.2.22`.
        version: String,
    },
    /// It could not be.
    Failed {
        /// Why, for people.
        cause: String,
    },
    /// It ended.
    Ended {
        /// How, and its last words, for people.
        cause: String,
    },
}
