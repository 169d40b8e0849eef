//! The message by which the daemon has QEMU started: one packet on a `SOCK_SEQPACKET` socket, with descriptors (`SCM_RIGHTS`). Nothing
//! in it is a path or a command line.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// Where the launcher listens.
pub const SOCKET: &str = "/run/proxyvpn-qemu.sock";
/// Bytes of the longest message, either way.
pub const MAX_MESSAGE: usize = 4096;
/// How long the launcher waits for the [`Request`], in milliseconds.
pub const REQUEST_MS: u64 = 5_000;
/// The guest's memory in MiB.
pub const MEMORY_MIB: RangeInclusive<u32> = 128..=4096;
/// Bytes of the state disk, exactly.
pub const STATE_SIZE: u64 = 64 << 20;
/// Bytes of the largest kernel.
pub const MAX_KERNEL: u64 = 64 << 20;
/// Bytes of the largest initramfs.
pub const MAX_INITRAMFS: u64 = 256 << 20;
/// Bytes of the longest configuration.
pub const MAX_CONFIG: u64 = 64 << 10;

/// The guest's kernel command line. It is readable by all in the guest: nothing secret belongs there. A panic ends QEMU (`-no-reboot`).
/// The image lies in a ramfs, since a tmpfs takes half of the memory at most and a small machine would get half an image. That its
/// cryptography works the kernel does not test at every start: without KVM that takes a tenth of it.
pub const CMDLINE: &str =
    "console=ttyS0 quiet loglevel=3 panic=1 random.trust_cpu=off ipv6.disable=1 rootfstype=ramfs cryptomgr.notests";

/// What comes with a [`Request`], in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptor {
    /// Queue of the TAP device, with virtio headers.
    Tap,
    /// One end of a `SOCK_SEQPACKET` socket pair: Ethernet frames to the packet engine, without virtio headers.
    Link,
    /// One end of a stream socket pair: QMP. The greeting comes once, at the start; who takes the other end over later gets none and is
    /// still in command mode.
    Qmp,
    /// One end of a stream socket pair: the [`channel`](crate::channel).
    Channel,
    /// The kernel, a file that is opened read-only and readable by anybody.
    Kernel,
    /// The initramfs, likewise.
    Initramfs,
    /// The state disk, a file of [`STATE_SIZE`] bytes that is opened read-write.
    State,
    /// The guest's configuration, a memfd that is readable by anybody: [`GuestConfig`](crate::config::GuestConfig) as JSON.
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
    /// The guest's memory in MiB, in [`MEMORY_MIB`].
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
