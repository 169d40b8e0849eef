//! Passwords: read as the user, handed to the daemon as a descriptor, never printed.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::str::FromStr;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};
use zeroize::Zeroizing;

use crate::exit::{Exit, Failure};
use crate::text;

/// The daemon takes at most so many bytes.
const LIMIT: usize = 4096;

/// A secret; overwritten when dropped.
#[derive(Clone)]
pub(crate) struct Secret(Zeroizing<Vec<u8>>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(Zeroizing::new(text.as_bytes().to_vec())))
    }
}

impl Secret {
    /// Whether it is `-`, which stands for standard input.
    pub(crate) fn is_dash(&self) -> bool {
        self.0.as_slice() == b"-"
    }

    /// Reads one from a file, opened with the rights of the user.
    pub(crate) fn from_file(path: &Path) -> Result<Self, Failure> {
        let fail = |error: io::Error| {
            Failure::new(Exit::Failure, format!("cannot read the password file {}: {error}", path.display()))
        };
        Self::from_reader(File::open(path).map_err(fail)?)
    }

    /// Reads one from standard input, without echo when that is a terminal.
    pub(crate) async fn from_stdin() -> Result<Self, Failure> {
        if io::stdin().is_terminal() { prompt().await } else { Self::from_reader(io::stdin().lock()) }
    }

    /// Reads to the end, within [`LIMIT`]; one trailing newline is dropped.
    fn from_reader(reader: impl Read) -> Result<Self, Failure> {
        // The buffer has its final size at once, so that no copy is left behind by growing.
        let mut bytes = Zeroizing::new(Vec::with_capacity(LIMIT + 2));
        reader
            .take(LIMIT as u64 + 2)
            .read_to_end(&mut bytes)
            .map_err(|error| Failure::new(Exit::Failure, format!("cannot read the password: {error}")))?;
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        Self(bytes).checked()
    }

    /// Refuses what cannot be a password.
    pub(crate) fn checked(self) -> Result<Self, Failure> {
        match self.0.len() {
            0 => Err(Failure::new(Exit::Usage, "the password is empty")),
            1..=LIMIT => Ok(self),
            _ => Err(Failure::new(Exit::Usage, format!("the password is longer than {LIMIT} bytes"))),
        }
    }

    /// A sealed descriptor that gives the secret.
    pub(crate) fn into_fd(self) -> Result<OwnedFd, Failure> {
        sealed(&self.0).map_err(|error| Failure::new(Exit::Failure, format!("cannot hand over the password: {error}")))
    }
}

/// A sealed memory file with this content, at its start.
pub(crate) fn sealed(content: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create("proxyctl", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(content)?;
    file.rewind()?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// Puts the terminal's echo back when dropped.
struct Echo(Termios);

impl Echo {
    fn off() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        silent.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(io::stdin(), OptionalActions::Flush, &silent)?;
        Ok(Self(before))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Asks on the terminal. A signal must not leave the terminal without echo.
async fn prompt() -> Result<Secret, Failure> {
    let fail = |error: io::Error| Failure::new(Exit::Failure, format!("cannot ask for the password: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    let _echo = Echo::off().map_err(fail)?;
    let _ = write!(io::stderr().lock(), "Password for the proxy: ");
    let line = tokio::task::spawn_blocking(|| {
        let mut line = Zeroizing::new(Vec::with_capacity(LIMIT + 2));
        // A terminal gives at most one line a read, and at most 4095 bytes (termios(3)).
        line.resize(LIMIT + 1, 0);
        let length = rustix::io::read(io::stdin(), &mut line[..])?;
        line.truncate(length);
        Ok::<_, rustix::io::Errno>(line)
    });
    let line = tokio::select! {
        line = line => line.map_err(|error| fail(io::Error::other(error)))?.map_err(|error| fail(error.into()))?,
        _ = interrupt.recv() => { text::note(""); return Err(Failure::quiet(Exit::Interrupted)) }
        _ = terminate.recv() => { text::note(""); return Err(Failure::quiet(Exit::Interrupted)) }
    };
    Secret::from_reader(line.as_slice())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;

    #[test]
    fn one_newline_is_dropped_and_sizes_are_bounded() {
        let read = |bytes: &[u8]| Secret::from_reader(bytes).map(|secret| secret.0.to_vec());
        assert_eq!(read(b"pass\n\n").unwrap(), b"pass\n");
        assert_eq!(read(b"\n").unwrap_err().exit, Exit::Usage);
        assert!(read(&[b'x'; LIMIT]).is_ok());
        assert_eq!(read(&[b'x'; LIMIT + 1]).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn the_descriptor_gives_the_secret_and_cannot_be_changed() {
        let fd = "hunter2".parse::<Secret>().unwrap().into_fd().unwrap();
        let mut file = File::from(fd);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hunter2");
        assert!(file.write_all(b"x").is_err());
    }
}
