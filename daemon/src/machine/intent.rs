//! What is wanted, so that a daemon that was killed goes on with it instead of opening the network.

use std::fs;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::profile::Profile;

const VERSION: u32 = 1;

/// The record on disk, in the runtime directory: it does not outlive a reboot or `systemctl stop`.
#[derive(Debug)]
pub struct IntentFile(PathBuf);

/// What the record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intent {
    /// Nothing is wanted.
    Nothing,
    /// This profile, as it was when it was connected.
    Profile(Box<Profile>),
    /// There is a record that cannot be understood: something may be wanted.
    Unreadable(String),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    profile: Box<Profile>,
}

impl IntentFile {
    /// The record in `directory`.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self(directory.join("intent.json"))
    }

    /// Reads the record.
    #[must_use]
    pub fn read(&self) -> Intent {
        let text = match fs::read_to_string(&self.0) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Intent::Nothing,
            Err(error) => return Intent::Unreadable(format!("{}: {error}", self.0.display())),
        };
        match serde_json::from_str::<Record>(&text) {
            Ok(Record { version: VERSION, profile }) => Intent::Profile(profile),
            Ok(Record { version, .. }) => {
                Intent::Unreadable(format!("{}: version {version} is not known", self.0.display()))
            }
            Err(error) => Intent::Unreadable(format!("{}: {error}", self.0.display())),
        }
    }

    /// Records that `profile` is wanted, so that the record survives a power cut.
    ///
    /// # Errors
    /// Those of writing, syncing and renaming.
    pub fn write(&self, profile: &Profile) -> std::io::Result<()> {
        let record = serde_json::to_vec(&Record { version: VERSION, profile: Box::new(profile.clone()) })?;
        let temporary = self.0.with_extension("new");
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&record)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.0)?;
        self.0.parent().map_or(Ok(()), |directory| fs::File::open(directory)?.sync_all())
    }

    /// Records that nothing is wanted.
    ///
    /// # Errors
    /// Those of unlinking, except that the record is gone already.
    pub fn clear(&self) -> std::io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed set-up is a failed test")]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("proxyvpn-intent-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        path
    }

    #[test]
    fn round_trip() {
        let directory = directory("round-trip");
        let file = IntentFile::new(&directory);
        assert_eq!(file.read(), Intent::Nothing);
        file.clear().unwrap();
        let profile = crate::machine::tests::profile();
        file.write(&Profile { name: "old".to_owned(), ..profile.clone() }).unwrap();
        file.write(&profile).unwrap();
        assert_eq!(file.read(), Intent::Profile(Box::new(profile)));
        file.clear().unwrap();
        assert_eq!(file.read(), Intent::Nothing);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn what_cannot_be_understood_is_not_taken_for_nothing() {
        let directory = directory("unreadable");
        for text in ["", "{", "{\"version\":2,\"profile\":{}}", "{\"version\":1}"] {
            fs::write(directory.join("intent.json"), text).unwrap();
            assert!(matches!(IntentFile::new(&directory).read(), Intent::Unreadable(_)), "{text}");
        }
        fs::remove_dir_all(directory).unwrap();
    }
}
