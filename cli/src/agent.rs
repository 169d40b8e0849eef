//! polkit's question on a terminal, as systemctl asks it: pkttyagent runs beside us for the time of the call.

use std::io::{IsTerminal as _, Read as _, stderr, stdin};
use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, geteuid, getpid, kill_process};

use crate::sys;

/// How long pkttyagent may take to register.
const START: Duration = Duration::from_secs(5);

/// A running pkttyagent; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Agent(Child);

/// Whether somebody can be asked here.
pub(crate) fn interactive() -> bool {
    stdin().is_terminal() && stderr().is_terminal()
}

/// Whether this is a login session, where a desktop's agent goes before ours. Outside of one (a container, `su`) polkit
/// does not look for a fall-back agent at all, so that ours must be a full one.
fn in_session() -> bool {
    ["XDG_SESSION_ID", "DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| std::env::var_os(name).is_some())
}

impl Agent {
    /// Starts one where it can be of use: on a terminal, not for root. Without pkttyagent things go on without it, and
    /// the daemon's answer says what is not allowed.
    pub(crate) fn start() -> Option<Self> {
        if !interactive() || geteuid().is_root() {
            return None;
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).ok()?;
        // pkttyagent must inherit this end; no other child is started meanwhile.
        fcntl_setfd(&write, FdFlags::empty()).ok()?;
        let mut command = Command::new("pkttyagent");
        if in_session() {
            command.arg("--fallback");
        }
        command
            .args(["--notify-fd", &write.as_raw_fd().to_string(), "--process"])
            // The agent is registered for the process that calls the daemon, which is this one.
            .arg(getpid().as_raw_nonzero().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        sys::die_with_parent(&mut command);
        let agent = Self(command.spawn().ok()?);
        drop(write);
        // It closes its end when it is registered, and when it fails.
        let deadline = Instant::now() + START;
        let mut read = std::fs::File::from(read);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left =
                Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(0), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&read, PollFlags::IN)], Some(&left)) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            if matches!(read.read(&mut [0; 16]), Ok(0) | Err(_)) {
                break;
            }
        }
        Some(agent)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // SIGTERM first, so that it puts the terminal's echo back.
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
