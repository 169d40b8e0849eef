//! Lockdown, on disk: no network without a connection, also after a reboot; and which profiles have connected, without one
//! of which nobody is locked out.

use std::io;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::config::file::{self, FileError, Rules};
use crate::config::profile::Profile;
use crate::record;

const VERSION: u32 = 1;
/// More than either record can hold.
const MAX_BYTES: usize = 32 * 1024;
/// Profiles that are remembered: the newest.
const MAX_PROFILES: usize = 64;

/// The records of lockdown in the state directory.
#[derive(Debug)]
pub struct LockdownFiles {
    /// Its presence is what counts, also for `ConditionPathExists=` of the unit that locks at boot.
    lockdown: PathBuf,
    connected: PathBuf,
}

/// What the record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lockdown {
    /// There is none.
    Off,
    /// There is one.
    On,
    /// There is something that cannot be understood or trusted, so lockdown is on.
    Unreadable(String),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockdownRecord {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectedRecord {
    version: u32,
    /// Newest last.
    profiles: Vec<Connected>,
}

/// A profile that has connected.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Connected {
    name: String,
    /// Of what decides whether it can connect.
    digest: String,
}

/// Why a record cannot be had.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is not understood: {cause}", path.display())]
    Content { path: PathBuf, cause: String },
}

impl LockdownFiles {
    /// The records in `directory`.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self { lockdown: directory.join("lockdown"), connected: directory.join("connected.json") }
    }

    /// Whether lockdown is on.
    #[must_use]
    pub fn read(&self) -> Lockdown {
        let version = |record: &LockdownRecord| record.version;
        match read(&self.lockdown, version) {
            Ok(_) => Lockdown::On,
            Err(ReadError::File(FileError::Missing { .. })) => Lockdown::Off,
            Err(error) => Lockdown::Unreadable(crate::machine::failure::chain(&error)),
        }
    }

    /// Records that lockdown is on, so that the record survives a power cut.
    ///
    /// # Errors
    /// Those of writing, syncing and renaming.
    pub fn write(&self) -> io::Result<()> {
        write(&self.lockdown, &LockdownRecord { version: VERSION })
    }

    /// Records that it is off. Says whether there was a record.
    ///
    /// # Errors
    /// Those of unlinking and syncing, except that the record is gone already.
    pub fn clear(&self) -> io::Result<bool> {
        let there = self.lockdown.symlink_metadata().is_ok();
        record::remove(&self.lockdown).map(|()| there)
    }

    /// Remembers that `profile` has connected.
    ///
    /// # Errors
    /// Those of writing, syncing and renaming.
    pub fn remember(&self, profile: &Profile) -> io::Result<()> {
        let new = Connected { name: profile.name.clone(), digest: digest(profile) };
        let mut profiles = self.remembered();
        if profiles.contains(&new) {
            return Ok(());
        }
        profiles.push(new);
        profiles.drain(..profiles.len().saturating_sub(MAX_PROFILES));
        write(&self.connected, &ConnectedRecord { version: VERSION, profiles })
    }

    /// Whether one of `profiles` has connected as it is now.
    #[must_use]
    pub fn has_connected(&self, profiles: &[Profile]) -> bool {
        let known = self.remembered();
        let is_known = |profile: &Profile| {
            let digest = digest(profile);
            known.iter().any(|known| known.name == profile.name && known.digest == digest)
        };
        profiles.iter().any(is_known)
    }

    /// What cannot be read is as nothing: then a profile has to connect once more.
    fn remembered(&self) -> Vec<Connected> {
        match read(&self.connected, |record: &ConnectedRecord| record.version) {
            Ok(record) => record.profiles,
            Err(ReadError::File(FileError::Missing { .. })) => Vec::new(),
            Err(error) => {
                tracing::warn!(
                    "which profiles have connected is not known: {}",
                    crate::machine::failure::chain(&error)
                );
                Vec::new()
            }
        }
    }
}

/// What decides whether the profile can connect, in short. Not against forgery: whoever writes profiles decides about them.
fn digest(profile: &Profile) -> String {
    let way = &profile.upstream;
    // Not where the password comes from: one that the caller types is as good.
    let content = (profile.backend, way.scheme, &way.host, way.port, &way.addresses, &way.username, &profile.dns);
    let content = serde_json::to_vec(&content).unwrap_or_default();
    // FNV-1a: the same in every version of the daemon.
    let hash = content
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

fn read<T: DeserializeOwned>(path: &Path, version: impl Fn(&T) -> u32) -> Result<T, ReadError> {
    // root: a daemon without a user of its own.
    let owners = [geteuid().as_raw(), 0];
    let bytes = file::read(path, Rules { owners: &owners, max: MAX_BYTES, secret: false })?;
    let bad = |cause: String| ReadError::Content { path: path.to_owned(), cause };
    let record: T = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
    match version(&record) {
        VERSION => Ok(record),
        other => Err(bad(format!("version {other} is not known"))),
    }
}

fn write(path: &Path, record: &impl Serialize) -> io::Result<()> {
    record::write(path, &serde_json::to_vec(record)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed set-up is a failed test")]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::machine::tests::profile;
    use crate::test_dir::TestDir;

    #[test]
    fn round_trip() {
        let dir = TestDir::new("lockdown");
        let files = LockdownFiles::new(&dir.path(""));
        assert_eq!(files.read(), Lockdown::Off);
        assert!(!files.clear().unwrap());
        files.write().unwrap();
        files.write().unwrap();
        assert_eq!(files.read(), Lockdown::On);
        assert!(files.clear().unwrap());
        assert_eq!(files.read(), Lockdown::Off);
    }

    #[test]
    fn whatever_lies_there_is_on_unless_it_is_nothing() {
        let dir = TestDir::new("lockdown-hostile");
        let (files, path) = (LockdownFiles::new(&dir.path("")), dir.path("lockdown"));
        let unreadable = |what: &str| {
            assert!(matches!(files.read(), Lockdown::Unreadable(_)), "{what}");
        };
        for text in ["", "{", "{}", "null", "{\"version\":2}", "{\"version\":1,\"off\":true}"] {
            fs::write(&path, text).unwrap();
            unreadable(text);
        }
        fs::write(&path, vec![b' '; MAX_BYTES + 1]).unwrap();
        unreadable("too large");
        files.write().unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        unreadable("others can write it");
        fs::remove_file(&path).unwrap();
        symlink(dir.path("nowhere"), &path).unwrap();
        unreadable("a link");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        unreadable("a directory");
        assert!(files.clear().unwrap());
        assert_eq!(files.read(), Lockdown::Off);
    }

    #[test]
    fn a_profile_counts_as_it_was_when_it_connected() {
        let dir = TestDir::new("proven");
        let files = LockdownFiles::new(&dir.path(""));
        let one = profile();
        assert!(!files.has_connected(std::slice::from_ref(&one)));
        files.remember(&one).unwrap();
        assert!(files.has_connected(std::slice::from_ref(&one)));
        assert!(files.has_connected(&[Profile { autoconnect: true, bypass_users: vec![7], ..one.clone() }]));
        let mut other = one.clone();
        other.upstream.port = 1;
        assert!(!files.has_connected(&[other.clone(), Profile { name: "else".to_owned(), ..one.clone() }]));
        files.remember(&other).unwrap();
        assert!(files.has_connected(&[other]) && files.has_connected(&[one]), "also as it was before");
    }

    #[test]
    fn the_memory_is_bounded_and_what_is_broken_is_made_anew() {
        let dir = TestDir::new("proven-bounds");
        let files = LockdownFiles::new(&dir.path(""));
        let named = |number: usize| Profile { name: format!("{number:064}"), ..profile() };
        for number in 0..=MAX_PROFILES {
            files.remember(&named(number)).unwrap();
        }
        assert!(!files.has_connected(&[named(0)]) && files.has_connected(&[named(1)]));
        assert!(fs::metadata(dir.path("connected.json")).unwrap().len() < MAX_BYTES as u64);
        fs::write(dir.path("connected.json"), "{").unwrap();
        assert!(!files.has_connected(&[named(1)]));
        files.remember(&named(1)).unwrap();
        assert!(files.has_connected(&[named(1)]));
    }

    #[test]
    fn the_digest_does_not_change_with_the_daemon() {
        // A change here asks everybody to connect once more before they can turn lockdown on.
        assert_eq!(digest(&profile()), "7a539f3bc7ff9b6e");
    }
}
