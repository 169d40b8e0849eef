//! Which processes hold the socket that the firewall's table belongs to. Nobody else can remove the table, so that a clean-up
//! has to know.

use std::fmt;
use std::fs;
use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::error::Error;
use super::netlink::Netlink;

/// `NETLINK_NETFILTER` (linux/netlink.h).
const NETFILTER: &str = "12";
/// How long a process may take to end after each signal.
const PATIENCE: Duration = Duration::from_secs(3);

/// A process that holds the table's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pid: i32,
    name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

impl Holder {
    /// Whether it is systemd, which keeps the socket for the daemon's unit.
    #[must_use]
    pub const fn is_init(&self) -> bool {
        self.pid == 1
    }

    /// Whether it is a process of proxyvpn's: the daemon, or one that keeps descriptors for it where systemd does not run.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        !self.is_init() && self.pid.unsigned_abs() != std::process::id() && self.name.starts_with("proxyvpn")
    }

    /// Ends it: SIGTERM, then SIGKILL.
    ///
    /// # Errors
    /// [`io::ErrorKind::PermissionDenied`] if it is not [ours](Self::is_ours); those of signalling it;
    /// [`io::ErrorKind::TimedOut`] if it does not end.
    pub fn end(&self) -> io::Result<()> {
        let pid = Pid::from_raw(self.pid).filter(|_| self.is_ours()).ok_or(io::ErrorKind::PermissionDenied)?;
        // The descriptor comes first: what is then found out holds for the process that gets the signal.
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(()),
            process => process?,
        };
        if name(self.pid).as_ref() != Some(&self.name) {
            return Ok(());
        }
        for signal in [Signal::TERM, Signal::KILL] {
            match pidfd_send_signal(&process, signal) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
            let limit = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
            if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit))? > 0 {
                return Ok(());
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

/// The processes that hold the socket that the table belongs to, in the calling thread's network namespace. Empty also where
/// none can be seen: a process of another user, without privileges, or of another PID namespace.
///
/// # Errors
/// When the kernel does not say whether there is a table.
pub fn holders() -> Result<Vec<Holder>, Error> {
    let Some(port) = Netlink::open()?.owner_of_table()?.filter(|port| *port != 0) else { return Ok(vec![]) };
    let sockets = fs::read_to_string("/proc/thread-self/net/netlink").unwrap_or_default();
    let Some(inode) = inode(&sockets, port) else { return Ok(vec![]) };
    let link = format!("socket:[{inode}]");
    let Ok(processes) = fs::read_dir("/proc") else { return Ok(vec![]) };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(pids.filter(|pid| holds(*pid, &link)).filter_map(|pid| Some(Holder { pid, name: name(pid)? })).collect())
}

/// The inode of a socket of nf_tables (proc_pid_net(5): `sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode`).
fn inode(sockets: &str, port: u32) -> Option<&str> {
    sockets.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let found = *fields.get(1)? == NETFILTER && fields.get(2)?.parse() == Ok(port);
        fields.get(9).copied().filter(|_| found)
    })
}

fn holds(pid: i32, link: &str) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == link))
}

/// The name of a process, in one line (proc_pid_comm(5)).
fn name(pid: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_found_by_protocol_and_port() {
        let sockets = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
                       0000000000000000 0   7          00000000 0        0        0     2        0        111\n\
                       0000000000000000 12  8          00000000 0        0        0     2        0        222\n\
                       0000000000000000 12  7          00000000 0        0        0     2        0        333\n\
                       0000000000000000 12\n";
        assert_eq!(inode(sockets, 7), Some("333"));
        assert_eq!(inode(sockets, 9), None);
        assert_eq!(inode("", 7), None);
    }

    #[test]
    fn only_what_is_ours_is_ended() {
        let holder = |pid, name: &str| Holder { pid, name: name.to_owned() };
        assert!(holder(77, "proxyvpn-hold").is_ours() && holder(77, "proxyvpnd").is_ours());
        for other in [holder(1, "proxyvpnd"), holder(77, "systemd"), holder(77, "nft")] {
            assert_eq!(other.end().map_err(|error| error.kind()), Err(io::ErrorKind::PermissionDenied), "{other}");
        }
    }
}
