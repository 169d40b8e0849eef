//! The socket, where there is no systemd to listen on it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::unistd::User;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, recv, socket_with,
};
use rustix::process::geteuid;

use crate::isolate::Identity;
use crate::{Stage, run};

/// QEMUs at a time.
const MOST: usize = 4;
/// How often ended children are looked for while there are some.
const REAP: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// How long a caller who is refused may take to send its request.
const HEAR_OUT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// After an error that comes again at once, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Why it does not listen.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("--listen needs root")]
    NotRoot,
    #[error("there is no user {0:?}")]
    NoUser(String, #[source] Option<nix::Error>),
    #[error("QEMU cannot run as {0:?}: that is root, or the owner of the socket")]
    BadUser(String),
    #[error("--qemu must lie below /usr: QEMU sees nothing else of the machine")]
    Outside,
    #[error("{0:?} cannot be listened on")]
    Listen(PathBuf, #[source] io::Error),
    #[error("the socket has failed")]
    Socket(#[source] Errno),
}

/// Serves until it is killed. QEMUs that run then go on.
pub(crate) fn forever(path: &Path, owner: &str, user: &str, qemu: Option<&Path>) -> Result<(), Error> {
    if !geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    if qemu.is_some_and(|qemu| !qemu.starts_with("/usr")) {
        return Err(Error::Outside);
    }
    let owner = look_up(owner)?;
    let identity = look_up(user).map(|user| Identity { user: user.uid.as_raw(), group: user.gid.as_raw() })?;
    if identity.user == 0 || identity.group == 0 || identity.user == owner.uid.as_raw() {
        return Err(Error::BadUser(user.to_owned()));
    }
    let socket = open(path, &owner).map_err(|error| Error::Listen(path.to_owned(), error))?;
    let mut children: Vec<Child> = vec![];
    loop {
        let wait = if children.is_empty() { None } else { Some(&REAP) };
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], wait) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::Socket(error)),
        }
        children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        match accept_with(&socket, SocketFlags::CLOEXEC) {
            Ok(connection) => {
                if let Err(cause) = admit(&connection, owner.uid.as_raw(), children.len())
                    .and_then(|()| spawn(&connection, identity, qemu).map(|child| children.push(child)))
                {
                    run::refuse(&connection, cause);
                    hear_out(&connection);
                }
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                eprintln!("a connection cannot be accepted: {error}");
                std::thread::sleep(PAUSE);
            }
        }
    }
}

fn look_up(name: &str) -> Result<User, Error> {
    match User::from_name(name) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(Error::NoUser(name.to_owned(), None)),
        Err(error) => Err(Error::NoUser(name.to_owned(), Some(error))),
    }
}

/// Only `owner`, and root, can connect.
fn open(path: &Path, owner: &User) -> io::Result<OwnedFd> {
    match path.symlink_metadata() {
        // of one that ran before
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // Nobody can connect before it listens, and then it has its mode.
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    chown(path, Some(owner.uid.as_raw()), Some(0))?;
    listen(&socket, 16)?;
    Ok(socket)
}

/// The mode of the socket keeps others out; so does this.
fn admit(connection: &OwnedFd, owner: u32, running: usize) -> Result<(), String> {
    let peer = socket_peercred(connection).map_err(|error| format!("the caller cannot be asked for: {error}"))?;
    let user = peer.uid.as_raw();
    if user != 0 && user != owner {
        return Err(format!("user {user} may not start QEMU"));
    }
    if running >= MOST {
        return Err(format!("{MOST} QEMUs run already"));
    }
    Ok(())
}

fn spawn(connection: &OwnedFd, identity: Identity, qemu: Option<&Path>) -> Result<Child, String> {
    let connection = connection.try_clone().map_err(|error| format!("no descriptor is left: {error}"))?;
    staged(Stage::Separate, identity, qemu)
        .stdin(Stdio::from(connection))
        .spawn()
        .map_err(|error| format!("the launcher cannot start itself: {error}"))
}

/// This program again, for one connection, which is its standard input.
pub(crate) fn staged(stage: Stage, identity: Identity, qemu: Option<&Path>) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.env_clear().arg("--stage").arg(stage.name());
    command.arg("--uid").arg(identity.user.to_string()).arg("--gid").arg(identity.group.to_string());
    if let Some(qemu) = qemu {
        command.arg("--qemu").arg(qemu);
    }
    command
}

/// Waits shortly for the request that is not wanted: who closes without having read it resets the connection, and the answer is lost.
fn hear_out(connection: &OwnedFd) {
    if poll(&mut [PollFd::new(connection, PollFlags::IN)], Some(&HEAR_OUT)).is_ok() {
        let _ = recv(connection, &mut [0u8; 1], RecvFlags::DONTWAIT);
    }
}
