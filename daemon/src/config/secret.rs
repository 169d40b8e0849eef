//! Passwords: from a file, a systemd credential or a descriptor that came over the bus. They are only ever held in buffers
//! that are wiped.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proxyvpn_engine::secret::Secret;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::process::geteuid;
use tokio::sync::{Semaphore, oneshot};

use super::error::Rejected;
use super::file::{self, FileError, Rules};
use super::profile::PasswordSource;

/// Longest password in bytes, with its newline.
pub const MAX_SECRET: usize = 4096;
/// How long a caller's descriptor may take to give it.
const FD_TIMEOUT: Duration = Duration::from_secs(2);
/// Threads that may wait for callers' descriptors. A file on a hostile file system can hold its thread for ever.
static READERS: Semaphore = Semaphore::const_new(8);

/// Why there is no password. No message has any part of it.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be had or must not be trusted.
    #[error(transparent)]
    File(#[from] FileError),
    /// The unit passes no credentials at all.
    #[error("systemd passed no credentials to the daemon; add LoadCredential={name}:/path to proxyvpnd.service")]
    NoCredentials {
        /// Name in the profile.
        name: String,
    },
    /// The name is not one that systemd allows.
    #[error(transparent)]
    Name(#[from] Rejected),
    /// Nothing in it.
    #[error("the password from {origin} is empty")]
    Empty {
        /// Where it came from.
        origin: String,
    },
    /// Over the bound.
    #[error("the password from {origin} is longer than {MAX_SECRET} bytes")]
    TooLong {
        /// Where it came from.
        origin: String,
    },
    /// Not what HTTP Basic authentication can send (RFC 7617 section 2).
    #[error("the password from {origin} is not one line of UTF-8 text")]
    NotText {
        /// Where it came from.
        origin: String,
    },
    /// The descriptor is a directory, device or terminal.
    #[error("the password must come from a file or a pipe")]
    Descriptor,
    /// The descriptor gave no end in time.
    #[error("the caller did not give the password within {} s", FD_TIMEOUT.as_secs())]
    Timeout,
    /// Too many callers' descriptors are being waited for.
    #[error("too many callers are giving passwords at the same time; try again")]
    Busy,
    /// The descriptor cannot be read.
    #[error("cannot read the password from the caller's descriptor")]
    Read(#[source] io::Error),
}

/// Reads the password anew from where the profile says. Blocks for a file's reading.
///
/// # Errors
/// See [`SecretError`].
pub fn read(source: &PasswordSource) -> Result<Secret, SecretError> {
    match source {
        PasswordSource::File(path) => read_file(path, &[0, geteuid().as_raw()]),
        PasswordSource::Credential(name) => {
            read_credential(name, std::env::var_os("CREDENTIALS_DIRECTORY"), &[0, geteuid().as_raw()])
        }
    }
}

/// The rules for a credential's name, as systemd has them (`credential_name_valid`: a file name, and no `:`).
pub(super) fn credential_name(name: &str) -> Result<(), Rejected> {
    let fits = (1..=255).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:".contains(&b))
        && ![".", ".."].contains(&name);
    if fits { Ok(()) } else { Err(Rejected::new(format!("\"{name}\" cannot be the name of a systemd credential"))) }
}

fn read_credential(name: &str, directory: Option<OsString>, owners: &[u32]) -> Result<Secret, SecretError> {
    credential_name(name)?;
    let directory = directory.ok_or_else(|| SecretError::NoCredentials { name: name.to_owned() })?;
    read_file(&PathBuf::from(directory).join(name), owners)
}

fn read_file(path: &Path, owners: &[u32]) -> Result<Secret, SecretError> {
    let bytes = file::read(path, Rules { owners, max: MAX_SECRET, secret: true })?;
    secret(&bytes, &path.to_string_lossy())
}

/// Reads a password from a descriptor of a bus caller, to its end, within two seconds. The caller is hostile: the reading
/// is done on a thread of its own that nobody waits for longer.
///
/// # Errors
/// See [`SecretError`].
pub async fn read_fd(fd: OwnedFd) -> Result<Secret, SecretError> {
    let permit = READERS.try_acquire().map_err(|_| SecretError::Busy)?;
    let (done, result) = oneshot::channel();
    // Not the runtime's blocking pool: that waits for its threads when the daemon ends.
    std::thread::Builder::new()
        .name("password".to_owned())
        .spawn(move || {
            // The receiver may have given up.
            let _ = done.send(read_fd_blocking(fd, FD_TIMEOUT));
            drop(permit);
        })
        .map_err(SecretError::Read)?;
    match tokio::time::timeout(FD_TIMEOUT + Duration::from_millis(200), result).await {
        Ok(Ok(secret)) => secret,
        Ok(Err(_)) => Err(SecretError::Read(io::ErrorKind::BrokenPipe.into())),
        Err(_) => Err(SecretError::Timeout),
    }
}

fn read_fd_blocking(fd: OwnedFd, timeout: Duration) -> Result<Secret, SecretError> {
    let stat = fstat(&fd).map_err(|errno| SecretError::Read(errno.into()))?;
    if !matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::Fifo) {
        return Err(SecretError::Descriptor);
    }
    let origin = "the caller";
    let reader = Patient { file: File::from(fd), deadline: Instant::now() + timeout };
    let bytes = file::read_bounded(reader, MAX_SECRET).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => SecretError::Timeout,
        _ => SecretError::Read(error),
    })?;
    secret(&bytes.ok_or(SecretError::TooLong { origin: origin.into() })?, origin)
}

/// Waits for each piece, up to a deadline.
struct Patient {
    file: File,
    deadline: Instant,
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::TimedOut)?;
            let mut fds = [PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => {}
                Err(errno) => return Err(errno.into()),
            }
            match self.file.read(buffer) {
                // Non-blocking, and somebody else took what was there.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }
}

/// One line of text; its newline is dropped.
fn secret(bytes: &[u8], origin: &str) -> Result<Secret, SecretError> {
    let origin = || origin.to_owned();
    let line = bytes.strip_suffix(b"\n").map_or(bytes, |line| line.strip_suffix(b"\r").unwrap_or(line));
    let text = std::str::from_utf8(line).map_err(|_| SecretError::NotText { origin: origin() })?;
    if text.is_empty() {
        return Err(SecretError::Empty { origin: origin() });
    }
    if text.chars().any(char::is_control) {
        return Err(SecretError::NotText { origin: origin() });
    }
    Ok(Secret::new(text.to_owned()))
}
