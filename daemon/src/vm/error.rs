//! Why there is no virtual machine.

use std::io;
use std::path::PathBuf;

use crate::config::file::FileError;

/// See the module. What QEMU or its launcher says is in the message, bounded and harmless.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no image.
    #[error("there is no image of the virtual machine in {}; make it with scripts/build-torvm-image.sh", directory.display())]
    NoImage {
        /// Where it is looked for.
        directory: PathBuf,
    },
    /// A file of the image can't be had, or somebody else could have written it.
    #[error("the image of the virtual machine can't be used; install it again")]
    Image(#[source] FileError),
    /// The manifest is not one.
    #[error("{} is not a manifest that this version knows: {problem}; install the image again", path.display())]
    Manifest {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of the image is another one than its manifest says.
    #[error("{} is not what the image's manifest says ({problem}): it was changed or is incomplete; install the image again", path.display())]
    Altered {
        /// Its path.
        path: PathBuf,
        /// In what they differ.
        problem: &'static str,
    },
    /// QEMU's user can't read a file of the image.
    #[error("{} can't be read by all, and so not by QEMU; mend it with: chmod a+r {}", path.display(), path.display())]
    Unreadable {
        /// Its path.
        path: PathBuf,
    },
    /// The bridges need a pluggable transport that is not there.
    #[error("the bridges need a pluggable transport, and the image has none; make it again with the transports")]
    NoTransports,
    /// The state disk can't be had.
    #[error("the virtual machine's state disk {} can't be opened", path.display())]
    Disk {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The state disk is not ours.
    #[error("{} can't be the virtual machine's state disk: {problem}; move it away, and a new one is made (Tor then chooses other guards)", path.display())]
    NotDisk {
        /// Its path.
        path: PathBuf,
        /// Why not.
        problem: &'static str,
    },
    /// Another virtual machine has the state disk.
    #[error("the virtual machine of before still runs: it has {}", path.display())]
    DiskBusy {
        /// The disk's path.
        path: PathBuf,
    },
    /// The kernel refuses what is needed for the start.
    #[error("cannot prepare the virtual machine: {operation}")]
    Prepare {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Nobody listens where QEMU is started.
    #[error("QEMU's launcher can't be reached at {}; is proxyvpn-qemu.socket running? (systemctl start proxyvpn-qemu.socket)", socket.display())]
    NoLauncher {
        /// Where it should listen.
        socket: PathBuf,
        /// Why it can't be reached.
        source: io::Error,
    },
    /// The connection to the launcher broke.
    #[error("the connection to QEMU's launcher broke")]
    Launcher(#[source] io::Error),
    /// The launcher ended or said what can't be understood.
    #[error("QEMU's launcher ended without a word; `journalctl -u 'proxyvpn-qemu@*'` has more")]
    LauncherGone,
    /// The launcher does not answer.
    #[error("QEMU's launcher did not answer within {seconds} s")]
    LauncherSilent {
        /// How long it had.
        seconds: u64,
    },
    /// QEMU could not be started.
    #[error("QEMU can't be started: {cause}")]
    Failed {
        /// The launcher's words.
        cause: String,
    },
    /// The guest does not run under KVM, and nothing else is allowed.
    #[error("the virtual machine does not start with KVM: {cause}; accel = \"auto\" falls back to emulation")]
    Kvm {
        /// What happened.
        cause: String,
    },
}
