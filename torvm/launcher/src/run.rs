//! One QEMU, from the request to its end.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use proxyvpn_torvm::launch::{Accelerator, Reply, Request, STATE_SIZE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{
    DumpableBehavior, Pid, PidfdFlags, Resource, Signal, geteuid, pidfd_open, pidfd_send_signal, set_dumpable_behavior,
};
use rustix::thread::{capabilities, set_no_new_privs};

use crate::console::Console;
use crate::program::{self, Program};
use crate::{check, command, filter, receive, sys};

/// From SIGTERM to SIGKILL.
const PATIENCE: Duration = Duration::from_secs(2);
/// Address space beside the guest's memory, in MiB: QEMU with its libraries, threads and translated instructions.
const OVERHEAD_MIB: u64 = 3072;
/// Descriptors of a QEMU.
const MAX_FDS: u64 = 256;
/// Characters of the longest cause: with JSON's escapes it fits into a message.
const MAX_CAUSE: usize = 1800;

/// Why no QEMU runs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the launcher runs as root or with capabilities: it must not start QEMU so")]
    Privileged,
    #[error("the launcher cannot give up what it does not need")]
    Harden(#[source] Errno),
    #[error("there is no filter of system calls")]
    Filter(#[from] filter::Error),
    #[error("the request is refused")]
    Request(#[from] receive::Error),
    #[error("a descriptor is refused")]
    Descriptor(#[from] check::Error),
    #[error("there is no usable QEMU")]
    Program(#[from] program::Error),
    #[error("/dev/kvm cannot be opened")]
    Kvm(#[source] io::Error),
    #[error("QEMU cannot be started")]
    Start(#[source] io::Error),
}

/// Serves the daemon at the other end of `connection` until QEMU has ended. Says whether it had started.
pub(crate) fn serve(connection: OwnedFd, qemu: Option<&Path>) -> bool {
    let running = match start(&connection, qemu) {
        Ok(running) => running,
        Err(error) => {
            refuse(&connection, chain(&error));
            return false;
        }
    };
    reply(&connection, &Reply::Started { version: running.version.clone() });
    match running.supervise(&connection) {
        Ok(cause) => {
            eprintln!("{cause}");
            reply(&connection, &Reply::Ended { cause });
        }
        // The process group and the parent's death take QEMU along.
        Err(error) => eprintln!("QEMU cannot be watched, so it is ended: {error}"),
    }
    true
}

fn start(connection: &OwnedFd, qemu: Option<&Path>) -> Result<Running, Error> {
    harden()?;
    let (request, fds) = receive::receive(connection)?;
    check::all(&fds)?;
    filter::apply()?;
    if request.accelerator == Accelerator::Kvm {
        std::fs::File::options().read(true).write(true).open("/dev/kvm").map_err(Error::Kvm)?;
    }
    let program = Program::find(qemu)?;
    let (arguments, numbers) = command::arguments(&request, &fds);
    let mut command = Command::new(&program.path);
    command.args(arguments).env_clear().current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    sys::confine(&mut command, numbers, limits(&request));
    let child = command.spawn().map_err(Error::Start)?;
    // Only QEMU has them from here on, so its end is seen at their other ends.
    drop(fds);
    Running::new(child, program.version).map_err(Error::Start)
}

/// Neither this process nor QEMU may get more than it has, and QEMU may not look into this process.
fn harden() -> Result<(), Error> {
    let sets = capabilities(None).map_err(Error::Harden)?;
    if geteuid().is_root() || !sets.effective.is_empty() || !sets.permitted.is_empty() {
        return Err(Error::Privileged);
    }
    set_no_new_privs(true).map_err(Error::Harden)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::Harden)
}

fn limits(request: &Request) -> Vec<(Resource, u64)> {
    vec![
        (Resource::Core, 0),
        (Resource::Nofile, MAX_FDS),
        (Resource::As, (u64::from(request.memory_mib) + OVERHEAD_MIB) << 20),
        // A guest that broke out cannot fill the disk by its state.
        (Resource::Fsize, STATE_SIZE),
    ]
}

/// Tells the daemon and the log why no QEMU was started.
pub(crate) fn refuse(connection: &OwnedFd, cause: String) {
    eprintln!("{cause}");
    reply(connection, &Reply::Failed { cause });
}

fn reply(connection: &OwnedFd, reply: &Reply) {
    let sent = serde_json::to_vec(reply)
        .map_err(io::Error::from)
        .and_then(|text| Ok(send(connection, &text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?));
    // Who has closed its end does not want to know.
    if let Err(error) = sent
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        eprintln!("the daemon cannot be told: {error}");
    }
}

/// A QEMU that was started, and what it says.
#[derive(Debug)]
struct Running {
    version: String,
    child: Child,
    pidfd: OwnedFd,
    serial: Stream<ChildStdout>,
    errors: Stream<ChildStderr>,
}

impl Running {
    fn new(mut child: Child, version: String) -> io::Result<Self> {
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Self { version, child, pidfd, serial: Stream::new("guest", stdout)?, errors: Stream::new("qemu", stderr)? })
    }

    /// Waits for the end of QEMU, which comes soon when `connection` is closed. Says how it ended.
    fn supervise(mut self, connection: &OwnedFd) -> io::Result<String> {
        let mut wanted = true;
        let mut kill_at: Option<Instant> = None;
        loop {
            let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
            let streams = [
                self.serial.pipe.as_ref().map(|pipe| pipe.as_fd()),
                self.errors.pipe.as_ref().map(|pipe| pipe.as_fd()),
            ];
            fds.extend(streams.iter().flatten().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            if wanted {
                fds.push(PollFd::new(connection, PollFlags::IN));
            }
            let left = kill_at.map(|at| at.saturating_duration_since(Instant::now()));
            let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
            match poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.serial.read();
            self.errors.read();
            if wanted && !is_wanted(connection) {
                wanted = false;
                kill_at = Some(Instant::now() + PATIENCE);
                // It may have ended by itself just now.
                let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
            }
            if kill_at.is_some_and(|at| at <= Instant::now()) {
                kill_at = None;
                self.child.kill()?;
            }
            if let Some(status) = self.child.try_wait()? {
                self.serial.read();
                self.errors.read();
                return Ok(ended(status, self.errors, self.serial));
            }
        }
    }
}

/// Whether somebody still has the other end. Nothing more comes on it: whatever does is as its end.
fn is_wanted(connection: &OwnedFd) -> bool {
    let mut byte = [0u8];
    matches!(recv(connection, &mut byte, RecvFlags::DONTWAIT), Err(Errno::AGAIN | Errno::INTR))
}

fn ended(status: ExitStatus, errors: Stream<ChildStderr>, serial: Stream<ChildStdout>) -> String {
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("QEMU ended with status {code}"),
        (None, Some(signal)) => format!("QEMU was ended by signal {signal}"),
        (None, None) => "QEMU ended".to_owned(),
    };
    let now = Instant::now();
    let mut text = how;
    // Of the guest's console only why it ends: the rest is its firmware's and its boot's.
    for line in errors.console.last_words(now).into_iter().chain(serial.console.end(now)) {
        text.push_str("; ");
        text.push_str(&line);
    }
    // Printable ASCII alone, see `Console`.
    text.truncate(MAX_CAUSE);
    text
}

/// A pipe of QEMU's.
#[derive(Debug)]
struct Stream<P> {
    name: &'static str,
    pipe: Option<P>,
    console: Console,
}

impl<P: io::Read + std::os::fd::AsFd> Stream<P> {
    fn new(name: &'static str, pipe: Option<P>) -> io::Result<Self> {
        if let Some(pipe) = &pipe {
            fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?;
        }
        Ok(Self { name, pipe, console: Console::new(Instant::now()) })
    }

    /// Takes what is there, at most a pipe full, and prints it.
    fn read(&mut self) {
        let mut buffer = [0; 4096];
        for _ in 0..16 {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    for line in self.console.feed(&buffer[..count], Instant::now()) {
                        eprintln!("{}: {line}", self.name);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.pipe = None,
            }
        }
    }
}

/// An error with its causes, for people; bounded.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text.chars().filter(|char| !char.is_control()).take(MAX_CAUSE / 4).collect()
}
