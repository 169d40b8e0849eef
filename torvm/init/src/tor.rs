//! Tor: its configuration, its process, its log.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::lchown;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};

use proxyvpn_torvm::channel::{MAX_TEXT, Status};
use proxyvpn_torvm::config::GuestConfig;
use proxyvpn_torvm::torrc::{self, GEOIP};
use rustix::process::{Pid, PidfdFlags, Signal, WaitStatus, kill_process_group, pidfd_open, pidfd_send_signal};

use crate::channel::Channel;
use crate::error::{Error, While as _};
use crate::lines::Lines;
use crate::program;

/// Tor's user and group.
pub(crate) const UID: u32 = 900;
/// Tor's folder on the state disk.
pub(crate) const STATE: &str = "/state/tor";
const TOR: &str = "/usr/bin/tor";
const XZ: &str = "/usr/bin/xz";
const TORRC: &str = "/run/torrc";
const HOSTS: &str = "/etc/hosts";
/// Bytes kept of a line of the log.
const LONGEST: usize = 2 * MAX_TEXT;
/// Least memory for cells that wait, in MiB; else a quarter of the machine's.
const QUEUES_MIN: u64 = 64;

/// Tor, running.
pub(crate) struct Tor {
    pid: Pid,
    pidfd: OwnedFd,
    stdout: Option<ChildStdout>,
    lines: Lines,
    /// The last warning or error: it explains the end.
    complaint: Option<String>,
}

/// Writes its configuration and starts it as its own user.
pub(crate) fn start(config: &GuestConfig, channel: &mut Channel) -> Result<Tor, Error> {
    let transports: BTreeSet<_> =
        config.tor.bridges().iter().filter_map(|bridge| bridge.transport().program()).collect();
    for program in transports {
        // Tor would only say that it can't start it, and wait for the bridges.
        if !Path::new(&packed(program)).exists() {
            return Err(Error::Wrong(format!("the image has no {program}, which the bridges need")));
        }
        unpack(program, channel)?;
    }
    let mut torrc = torrc::render(config, STATE);
    // Tor's own guess is never below 256 MB, more than the machine may have.
    torrc.push_str(&format!("MaxMemInQueues {} MB\n", queues(memory_mib())));
    fs::write(TORRC, &torrc).during(format!("write {TORRC}"))?;
    lchown(TORRC, Some(0), Some(UID)).during(format!("give {TORRC} to Tor"))?;
    fs::set_permissions(TORRC, std::os::unix::fs::PermissionsExt::from_mode(0o440))
        .during(format!("close {TORRC} for others"))?;
    fs::write(HOSTS, hosts(config)).during(format!("write {HOSTS}"))?;
    if torrc.contains(GEOIP) {
        unpack(GEOIP, channel)?;
    }
    let mut child = Command::new(TOR)
        .args(["-f", TORRC, "--defaults-torrc", "/nonexistent", "--ignore-missing-torrc"])
        .env_clear()
        .env("HOME", STATE)
        .current_dir(STATE)
        // Dropping to it clears the supplementary groups and all capabilities.
        .gid(UID)
        .uid(UID)
        // Its transports die with it.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .during("start Tor")?;
    let pid = Pid::from_child(&child);
    let stdout = child.stdout.take();
    if let Some(stdout) = &stdout {
        rustix::io::ioctl_fionbio(stdout, true).during("read Tor's log without waiting")?;
    }
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).during("watch Tor")?;
    Ok(Tor { pid, pidfd, stdout, lines: Lines::new(LONGEST), complaint: None })
}

/// What few need is packed in the image: it would lie in memory.
fn packed(path: &str) -> String {
    format!("{path}.xz")
}

fn unpack(path: &str, channel: &mut Channel) -> Result<(), Error> {
    program::run(XZ, &["-d", &packed(path)], "", || channel.send(&Status::Alive))?.successful(XZ)
}

/// The names that transports may look up.
fn hosts(config: &GuestConfig) -> String {
    let mut hosts = "127.0.0.1 localhost\n".to_owned();
    for host in config.hosts.iter() {
        hosts.push_str(&format!("{} {}\n", host.address, host.name));
    }
    hosts
}

fn memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(info.mem_unit.into()) / (1024 * 1024)
}

/// Memory for cells that wait, in MiB.
fn queues(memory_mib: u64) -> u64 {
    (memory_mib / 4).max(QUEUES_MIN)
}

impl Tor {
    /// Readable when it ended.
    pub(crate) fn end(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Readable when it says something.
    pub(crate) fn log(&self) -> Option<BorrowedFd<'_>> {
        self.stdout.as_ref().map(|stdout| stdout.as_fd())
    }

    /// Is `pid` its?
    pub(crate) fn is(&self, pid: Pid) -> bool {
        self.pid == pid
    }

    /// Reads what it said, at most one buffer, and calls `each` for every line.
    pub(crate) fn read(&mut self, mut each: impl FnMut(Status)) -> bool {
        let Some(stdout) = &mut self.stdout else { return false };
        let mut buffer = [0; 4096];
        match stdout.read(&mut buffer) {
            Ok(0) => self.stdout = None,
            Ok(count) => {
                let complaint = &mut self.complaint;
                self.lines.take(&buffer[..count], |line| {
                    let line = String::from_utf8_lossy(line);
                    if let Some((level, text)) = parse(&line) {
                        if matches!(level, "warn" | "err") && !text.contains("see warnings above") {
                            *complaint = Some(text.to_owned());
                        }
                        each(Status::log(level, text));
                    }
                });
                return true;
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.stdout = None,
        }
        false
    }

    /// Asks it to end.
    pub(crate) fn interrupt(&self) {
        if let Err(error) = pidfd_send_signal(&self.pidfd, Signal::INT) {
            eprintln!("torvm-init: interrupt Tor: {error}");
        }
    }

    /// Ends it and its transports, at once.
    pub(crate) fn kill(&self) {
        // Nobody left: good.
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    /// How it ended, for people.
    pub(crate) fn cause(&self, status: WaitStatus) -> String {
        let how = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("with exit status {code}"),
            (_, Some(signal)) => format!("by signal {signal}"),
            _ => "somehow".to_owned(),
        };
        match &self.complaint {
            Some(complaint) => format!("Tor ended {how}: {complaint}"),
            None => format!("Tor ended {how}"),
        }
    }
}

/// Level and text of a line of Tor's log (`Nov 21 12:00:00.000 [notice] text`). None: debugging, or nothing. A line without a level comes from
/// another than Tor's log, as from the dynamic linker, and is a warning.
fn parse(line: &str) -> Option<(&'static str, &str)> {
    let levelled = line.split_once(" [").and_then(|(_, rest)| rest.split_once("] "));
    match levelled {
        Some(("notice", text)) => Some(("notice", text)),
        Some(("warn", text)) => Some(("warn", text)),
        Some(("err", text)) => Some(("err", text)),
        Some(("info", text)) => Some(("info", text)),
        Some(("debug", _)) => None,
        _ if line.trim().is_empty() => None,
        _ => Some(("warn", line)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_taken_apart() {
        for (line, parsed) in [
            (
                "Nov 21 12:00:00.000 [notice] Bootstrapped 5% (conn): Connecting",
                Some(("notice", "Bootstrapped 5% (conn): Connecting")),
            ),
            ("Nov 21 12:00:00.000 [warn] a [notice] b", Some(("warn", "a [notice] b"))),
            ("Nov 21 12:00:00.000 [err] Reading config failed", Some(("err", "Reading config failed"))),
            ("Nov 21 12:00:00.000 [info] x", Some(("info", "x"))),
            ("Nov 21 12:00:00.000 [debug] x", None),
            ("tor: error while loading shared libraries", Some(("warn", "tor: error while loading shared libraries"))),
            ("x [loud] y", Some(("warn", "x [loud] y"))),
            ("", None),
        ] {
            assert_eq!(parse(line), parsed, "{line}");
        }
    }

    #[test]
    fn queues_fit_the_machine() {
        assert_eq!((queues(100), queues(240), queues(4096)), (64, 64, 1024));
    }

    proptest::proptest! {
        #[test]
        fn any_line_can_be_taken_apart(line in "\\PC*") {
            let _ = parse(&line);
        }
    }
}
