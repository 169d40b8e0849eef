//! The directories of profiles: the administrator's, and those that were imported over the bus.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use proxyvpn_torvm::config::{Bridge, Transport};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::error::{ConfigError, Rejected};
use super::file::{self, FileError, Rules};
use super::profile::{Backend, Profile};
use super::{check, edit, parse};

/// The administrator's profiles.
pub const SYSTEM_DIR: &str = "/etc/proxyvpn/profiles.d";
/// Imported profiles.
pub const IMPORTED_DIR: &str = "/var/lib/proxyvpn/profiles.d";
/// Most profiles in one directory.
pub const MAX_PROFILES: usize = 256;
/// Longest text of a profile in bytes.
pub const MAX_TEXT: usize = 64 * 1024;

const SUFFIX: &str = ".toml";

/// Who put a profile there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The administrator, in [`SYSTEM_DIR`]: read-only for the daemon.
    System,
    /// A caller on the bus, in [`IMPORTED_DIR`].
    Imported,
}

/// Who imports a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Importer {
    /// root.
    Root,
    /// Any other user, whom polkit allows to manage profiles. That is less than to read what the daemon can read.
    User,
}

/// A profile in a list.
#[derive(Debug)]
pub struct Entry {
    /// Name: of the file without its ending. May break the rules of names; then `result` says so.
    pub name: String,
    /// Who put it there.
    pub origin: Origin,
    /// The profile, or why it cannot be used.
    pub result: Result<Profile, ConfigError>,
}

/// Why a profile cannot be had, stored or removed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is none of that name.
    #[error("there is no profile \"{name}\"")]
    NotFound {
        /// Name.
        name: String,
    },
    /// It has an error.
    #[error(transparent)]
    Invalid(#[from] ConfigError),
    /// No profile can have that name.
    #[error(transparent)]
    Name(Rejected),
    /// There is one of that name already.
    #[error("there is a profile \"{name}\" already; replace it, or choose another name")]
    Exists {
        /// Name.
        name: String,
    },
    /// The administrator's profiles are neither changed nor hidden.
    #[error("the profile \"{name}\" belongs to the administrator; it can only be changed in {}", path.display())]
    Protected {
        /// Name.
        name: String,
        /// File.
        path: PathBuf,
    },
    /// It names a stored password, which whoever wrote it would get to see at a proxy of their choice.
    #[error(
        "only root can import a profile with password-file or password-credential, because the profile says which proxy gets \
         the password; run the import with sudo, or leave the line out and give the password when you connect"
    )]
    Secret,
    /// It has bridges for no Tor.
    #[error("the profile \"{name}\" has another backend than torvm, so it has no bridges")]
    WithoutTor {
        /// Name.
        name: String,
    },
    /// Over the bound.
    #[error("there are {MAX_PROFILES} profiles already; remove one first")]
    Full,
    /// The text is over the bound.
    #[error("the profile is longer than {MAX_TEXT} bytes")]
    TooLong,
    /// The directory cannot be changed.
    #[error("cannot write {}", path.display())]
    Write {
        /// Path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The profiles on disk. Nothing is cached: each call sees the files as they are. Every call does file I/O.
#[derive(Debug)]
pub struct ProfileStore {
    system: Place,
    imported: Place,
    /// Held while a file is written or removed.
    change: Mutex<()>,
}

#[derive(Debug)]
struct Place {
    origin: Origin,
    path: PathBuf,
    owners: Vec<u32>,
}

impl ProfileStore {
    /// A store over two directories, usually [`SYSTEM_DIR`] (root's) and [`IMPORTED_DIR`] (root's or this user's). Either
    /// may be missing.
    pub fn open(system: impl Into<PathBuf>, imported: impl Into<PathBuf>) -> Self {
        Self::owned(system.into(), imported.into(), 0)
    }

    fn owned(system: PathBuf, imported: PathBuf, root: u32) -> Self {
        let own = geteuid().as_raw();
        Self {
            system: Place { origin: Origin::System, path: system, owners: vec![root] },
            imported: Place { origin: Origin::Imported, path: imported, owners: vec![own, root] },
            change: Mutex::new(()),
        }
    }

    /// All profiles by name, with those that cannot be used. The administrator's hides an imported one of the same name. A
    /// directory that cannot be opened is logged and counts as empty.
    pub fn list(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = Vec::new();
        for place in [&self.system, &self.imported] {
            let found = place.open().and_then(|dir| dir.map_or(Ok(Vec::new()), |dir| place.list(&dir)));
            match found {
                Ok(found) => entries.extend(found),
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "profiles are left out"),
            }
        }
        // Stable: the administrator's comes first.
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries.dedup_by(|later, first| later.name == first.name);
        entries
    }

    /// The profile of that name.
    ///
    /// # Errors
    /// There is none, or it has an error.
    pub fn get(&self, name: &str) -> Result<Profile, StoreError> {
        Ok(self.load(name)?.0)
    }

    /// The text of a profile that can be used. No secret is in it: a text with a password in it is refused.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn text(&self, name: &str) -> Result<String, StoreError> {
        Ok(self.load(name)?.1)
    }

    fn load(&self, name: &str) -> Result<(Profile, String), StoreError> {
        let missing = || StoreError::NotFound { name: Rejected::new(name).to_string() };
        check::profile_name(name).map_err(|_| missing())?;
        for place in [&self.system, &self.imported] {
            let Some(dir) = place.open().map_err(ConfigError::from)? else { continue };
            match place.load(&dir, name) {
                Err(ConfigError::File(FileError::Missing { .. })) => {}
                other => return Ok(other?),
            }
        }
        Err(missing())
    }

    /// Checks a text and stores it under `name`; whole or not at all.
    ///
    /// # Errors
    /// It has an error, it names a stored password and `by` is not root, the name is taken (unless `replace`) or the administrator's, or the disk refuses.
    pub fn import(&self, name: &str, text: &str, replace: bool, by: Importer) -> Result<Profile, StoreError> {
        check::profile_name(name).map_err(StoreError::Name)?;
        if text.len() > MAX_TEXT {
            return Err(StoreError::TooLong);
        }
        let profile = parse::profile(name, &format!("{name}{SUFFIX}"), text)?;
        if profile.stored_password() && by != Importer::Root {
            return Err(StoreError::Secret);
        }
        let _guard = self.lock();
        self.refuse_system(name)?;
        let place = &self.imported;
        let failed = |source| StoreError::Write { path: place.file(name), source };
        let dir = place.open_or_create()?;
        place.check(&dir).map_err(ConfigError::from)?;
        let file = format!("{name}{SUFFIX}");
        let exists = place.has(&dir, &file).map_err(failed)?;
        if exists && !replace {
            return Err(StoreError::Exists { name: name.to_owned() });
        }
        if !exists && place.names(&dir).map_err(ConfigError::from)?.len() >= MAX_PROFILES {
            return Err(StoreError::Full);
        }
        write(&dir, &file, text, replace).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => StoreError::Exists { name: name.to_owned() },
            _ => failed(error),
        })?;
        Ok(profile)
    }

    /// Sets transport and bridges in the text of an imported profile; the rest of the text stays as it is.
    ///
    /// # Errors
    /// There is none, it has an error or another backend, it is the administrator's, the bridges are not allowed, or the disk refuses.
    pub fn set_bridges(&self, name: &str, bridges: &[Bridge], transport: Transport) -> Result<(), StoreError> {
        let missing = || StoreError::NotFound { name: Rejected::new(name).to_string() };
        check::profile_name(name).map_err(|_| missing())?;
        let _guard = self.lock();
        self.refuse_system(name)?;
        let place = &self.imported;
        let dir = place.open().map_err(ConfigError::from)?.ok_or_else(missing)?;
        let (profile, text) = place.load(&dir, name).map_err(|error| match error {
            ConfigError::File(FileError::Missing { .. }) => missing(),
            error => error.into(),
        })?;
        if profile.backend != Backend::TorVm {
            return Err(StoreError::WithoutTor { name: name.to_owned() });
        }
        let file = format!("{name}{SUFFIX}");
        let text = edit::bridges(&file, &text, bridges, transport)?;
        if text.len() > MAX_TEXT {
            return Err(StoreError::TooLong);
        }
        parse::profile(name, &file, &text)?;
        write(&dir, &file, &text, true).map_err(|source| StoreError::Write { path: place.file(name), source })
    }

    /// Removes an imported profile, also one with an error.
    ///
    /// # Errors
    /// There is none, it is the administrator's, or the disk refuses.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let missing = || StoreError::NotFound { name: Rejected::new(name).to_string() };
        check::profile_name(name).map_err(|_| missing())?;
        let _guard = self.lock();
        self.refuse_system(name)?;
        let place = &self.imported;
        let dir = place.open().map_err(ConfigError::from)?.ok_or_else(missing)?;
        place.check(&dir).map_err(ConfigError::from)?;
        let failed = |errno: Errno| StoreError::Write { path: place.file(name), source: errno.into() };
        match rustix::fs::unlinkat(&dir, format!("{name}{SUFFIX}"), AtFlags::empty()) {
            Err(Errno::NOENT) => return Err(missing()),
            other => other.map_err(failed)?,
        }
        rustix::fs::fsync(&dir).map_err(failed)
    }

    fn refuse_system(&self, name: &str) -> Result<(), StoreError> {
        let path = self.system.file(name);
        let Some(dir) = self.system.open().map_err(ConfigError::from)? else { return Ok(()) };
        match self.system.has(&dir, &format!("{name}{SUFFIX}")) {
            Ok(false) => Ok(()),
            Ok(true) => Err(StoreError::Protected { name: name.to_owned(), path }),
            Err(source) => Err(ConfigError::from(FileError::Open { path, source }).into()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // The guarded files are whole at any time, so a panic elsewhere did no harm.
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{SUFFIX}"))
    }

    fn open(&self) -> Result<Option<OwnedFd>, FileError> {
        match file::open_dir(&self.path) {
            Ok(dir) => Ok(Some(dir)),
            Err(FileError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open_or_create(&self) -> Result<OwnedFd, StoreError> {
        if let Some(dir) = self.open().map_err(ConfigError::from)? {
            return Ok(dir);
        }
        let failed = |source| StoreError::Write { path: self.path.clone(), source };
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
            .create(&self.path)
            .map_err(failed)?;
        let dir = file::open_dir(&self.path).map_err(ConfigError::from)?;
        Ok(dir)
    }

    fn check(&self, dir: &OwnedFd) -> Result<(), FileError> {
        file::check_dir(dir.as_fd(), &self.path, &self.owners)
    }

    fn has(&self, dir: &OwnedFd, file: &str) -> io::Result<bool> {
        match rustix::fs::statat(dir, file, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Names of the files that end in `.toml`, without that; hidden ones are not profiles.
    fn names(&self, dir: &OwnedFd) -> Result<Vec<String>, FileError> {
        let failed = |errno: Errno| FileError::Read { path: self.path.clone(), source: errno.into() };
        let mut names = Vec::new();
        for entry in Dir::read_from(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let file = entry.file_name().to_string_lossy();
            let Some(name) = file.strip_suffix(SUFFIX).filter(|_| !file.starts_with('.')) else { continue };
            if names.len() == MAX_PROFILES {
                tracing::warn!(directory = %self.path.display(), "more than {MAX_PROFILES} profiles; some are left out");
                break;
            }
            names.push(name.to_owned());
        }
        Ok(names)
    }

    fn list(&self, dir: &OwnedFd) -> Result<Vec<Entry>, FileError> {
        let entry = |name: String| {
            let result = self.load(dir, &name).map(|(profile, _)| profile);
            Entry { name, origin: self.origin, result }
        };
        Ok(self.names(dir)?.into_iter().map(entry).collect())
    }

    fn load(&self, dir: &OwnedFd, name: &str) -> Result<(Profile, String), ConfigError> {
        self.check(dir)?;
        let path = self.file(name);
        let file = format!("{name}{SUFFIX}");
        let rules = Rules { owners: &self.owners, max: MAX_TEXT, secret: false };
        let text = file::text(&file::read_at(dir.as_fd(), OsStr::new(&file), &path, rules)?, &path)?;
        Ok((parse::profile(name, &path.to_string_lossy(), &text)?, text))
    }
}

/// Temporary file, fsync, rename, fsync of the directory: after a power cut the old or the new text is there.
fn write(dir: &OwnedFd, file: &str, text: &str, replace: bool) -> io::Result<()> {
    let temporary = format!(".{file}.new");
    // A crash can have left one behind.
    match rustix::fs::unlinkat(dir, &temporary, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut new = File::from(rustix::fs::openat(dir, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
    let flag = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
    let moved = new
        .write_all(text.as_bytes())
        .and_then(|()| new.sync_all())
        .and_then(|()| Ok(rustix::fs::renameat_with(dir, &temporary, dir, file, flag)?));
    if moved.is_err() {
        // The first error is the one to tell.
        let _ = rustix::fs::unlinkat(dir, &temporary, AtFlags::empty());
    }
    moved?;
    Ok(rustix::fs::fsync(dir)?)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
