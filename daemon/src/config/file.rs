//! Files that only the right owner can have written. All checks are made on the open descriptor, so that nobody can swap
//! the file between check and use.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat, fstat, openat};
use rustix::io::Errno;
use zeroize::Zeroizing;

/// What `ProtectHome=yes` of the unit hides.
const HIDDEN: [&str; 3] = ["/home", "/root", "/run/user"];

/// Why a file cannot be had or must not be trusted. `Display` names the path and the command that mends it.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is not there.
    #[error("{} does not exist", path.display())]
    Missing {
        /// Path.
        path: PathBuf,
    },
    /// Its permissions keep the daemon from it.
    #[error(
        "the daemon, user proxyvpn, may not open {}; mend it with: chgrp proxyvpn {} && chmod g+r {}",
        path.display(), path.display(), path.display()
    )]
    Forbidden {
        /// Path.
        path: PathBuf,
    },
    /// Below a directory that the unit hides from the daemon (`ProtectHome=`, systemd.exec(5)).
    #[error("the daemon does not see {}: /home, /root and /run/user are hidden from it; keep the file in /etc/proxyvpn", path.display())]
    Hidden {
        /// Path.
        path: PathBuf,
    },
    /// `open` failed.
    #[error("cannot open {}", path.display())]
    Open {
        /// Path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `read` or `fstat` failed.
    #[error("cannot read {}", path.display())]
    Read {
        /// Path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A symbolic link could be pointed elsewhere by whoever owns its target.
    #[error("{} is a symbolic link; put the file itself there", path.display())]
    Link {
        /// Path.
        path: PathBuf,
    },
    /// A directory, FIFO, socket or device.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// Path.
        path: PathBuf,
    },
    /// Not a directory.
    #[error("{} is not a directory", path.display())]
    NotDirectory {
        /// Path.
        path: PathBuf,
    },
    /// Somebody else could have written it.
    #[error("{} belongs to user id {uid}, who could change it; mend it with: chown {wanted} {}", path.display(), path.display())]
    Owner {
        /// Path.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
        /// Whose it should be.
        wanted: u32,
    },
    /// Others than the owner may write it.
    #[error("{} can be written by others than its owner (mode {mode:04o}); mend it with: chmod go-w {}", path.display(), path.display())]
    Writable {
        /// Path.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// A secret that every local user can read.
    #[error("{} holds a secret and is open to every user (mode {mode:04o}); mend it with: chmod o= {}", path.display(), path.display())]
    Exposed {
        /// Path.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// Over the bound.
    #[error("{} is larger than {max} bytes", path.display())]
    TooLarge {
        /// Path.
        path: PathBuf,
        /// The bound.
        max: usize,
    },
    /// Not text.
    #[error("{} is not UTF-8 text", path.display())]
    NotText {
        /// Path.
        path: PathBuf,
    },
}

/// Who may have written a file or directory, and how large it may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules<'a> {
    /// User ids that may own it; the first is the one that an error proposes.
    pub(crate) owners: &'a [u32],
    /// Most bytes.
    pub(crate) max: usize,
    /// Nobody but owner and group may have any access.
    pub(crate) secret: bool,
}

/// Opens a directory without following a link. Its owner and mode are [`check_dir`]'s.
pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd, FileError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(|errno| match errno {
        // With O_DIRECTORY a link is ENOTDIR as well (open(2)).
        Errno::NOTDIR => FileError::NotDirectory { path: path.into() },
        other => open_error(path, other),
    })
}

/// Owner and mode of an open directory.
pub(crate) fn check_dir(dir: BorrowedFd<'_>, path: &Path, owners: &[u32]) -> Result<(), FileError> {
    check_owner(&stat(dir, path)?, path, owners)
}

/// Reads a regular file completely, by a path.
pub(crate) fn read(path: &Path, rules: Rules<'_>) -> Result<Zeroizing<Vec<u8>>, FileError> {
    read_at(CWD, path.as_os_str(), path, rules)
}

/// Reads a regular file completely, by its name in `dir`. `path` is for messages.
pub(crate) fn read_at(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    path: &Path,
    rules: Rules<'_>,
) -> Result<Zeroizing<Vec<u8>>, FileError> {
    read_bounded(open_at(dir, name, path, rules)?, rules.max)
        .map_err(|source| FileError::Read { path: path.into(), source })?
        .ok_or_else(|| FileError::TooLarge { path: path.into(), max: rules.max })
}

/// Opens a regular file by its name in `dir`, to be read. `path` is for messages.
pub(crate) fn open_at(dir: BorrowedFd<'_>, name: &OsStr, path: &Path, rules: Rules<'_>) -> Result<File, FileError> {
    // O_NONBLOCK: opening a FIFO must not wait for its writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = openat(dir, name, flags, Mode::empty()).map_err(|errno| open_error(path, errno))?;
    let stat = stat(fd.as_fd(), path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(FileError::NotRegular { path: path.into() });
    }
    check_owner(&stat, path, rules.owners)?;
    if rules.secret && stat.st_mode & 0o007 != 0 {
        return Err(FileError::Exposed { path: path.into(), mode: stat.st_mode & 0o7777 });
    }
    Ok(File::from(fd))
}

/// Reads to the end; `None` when there are more than `max` bytes. One buffer that never moves: it may hold a secret.
pub(super) fn read_bounded(from: impl io::Read, max: usize) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(max + 1));
    from.take(max as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= max).then_some(bytes))
}

/// The bytes as text.
pub(super) fn text(bytes: &[u8], path: &Path) -> Result<String, FileError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| FileError::NotText { path: path.into() })
}

fn stat(fd: BorrowedFd<'_>, path: &Path) -> Result<Stat, FileError> {
    fstat(fd).map_err(|errno| FileError::Read { path: path.into(), source: errno.into() })
}

fn check_owner(stat: &Stat, path: &Path, owners: &[u32]) -> Result<(), FileError> {
    if !owners.contains(&stat.st_uid) {
        let wanted = owners.first().copied().unwrap_or(0);
        return Err(FileError::Owner { path: path.into(), uid: stat.st_uid, wanted });
    }
    if stat.st_mode & 0o022 != 0 {
        return Err(FileError::Writable { path: path.into(), mode: stat.st_mode & 0o7777 });
    }
    Ok(())
}

fn open_error(path: &Path, errno: Errno) -> FileError {
    let path = PathBuf::from(path);
    match errno {
        Errno::NOENT => FileError::Missing { path },
        Errno::LOOP => FileError::Link { path },
        Errno::ACCESS if HIDDEN.iter().any(|dir| path.starts_with(dir)) => FileError::Hidden { path },
        Errno::ACCESS => FileError::Forbidden { path },
        // A socket cannot be opened at all.
        Errno::NXIO => FileError::NotRegular { path },
        other => FileError::Open { path, source: other.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_the_daemon_may_not_open_is_told_with_what_mends_it() {
        let told = |path| open_error(Path::new(path), Errno::ACCESS).to_string();
        assert!(told("/etc/proxyvpn/a.password").contains("chgrp proxyvpn /etc/proxyvpn/a.password && chmod g+r"));
        assert!(told("/home/ann/password").contains("hidden from it"));
    }
}
