//! What is wanted, so that a daemon that was killed goes on with it instead of opening the network.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::failure::chain;
use crate::config::profile::Profile;
use crate::record;

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
        let bytes = match record::read(&self.0) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Intent::Nothing,
            Err(error) => return Intent::Unreadable(chain(&error)),
        };
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(Record { version: VERSION, profile }) => Intent::Profile(profile),
            Ok(Record { version, .. }) => {
                Intent::Unreadable(format!("{}: version {version} is not known", self.0.display()))
            }
            Err(error) => Intent::Unreadable(format!("{}: {error}", self.0.display())),
        }
    }

    /// Records that `profile` is wanted. After a failure the last record is still there.
    ///
    /// # Errors
    /// Those of writing, syncing and renaming.
    pub fn write(&self, profile: &Profile) -> std::io::Result<()> {
        record::write(&self.0, &serde_json::to_vec(&Record { version: VERSION, profile: Box::new(profile.clone()) })?)
    }

    /// Records that nothing is wanted.
    ///
    /// # Errors
    /// Those of removing, except that the record is gone already.
    pub fn clear(&self) -> std::io::Result<()> {
        record::remove(&self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed set-up is a failed test")]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn round_trip() {
        let dir = TestDir::new("intent");
        let file = IntentFile::new(&dir.path(""));
        assert_eq!(file.read(), Intent::Nothing);
        file.clear().unwrap();
        let profile = crate::machine::tests::profile();
        file.write(&Profile { name: "old".to_owned(), ..profile.clone() }).unwrap();
        file.write(&profile).unwrap();
        assert_eq!(file.read(), Intent::Profile(Box::new(profile)));
        file.clear().unwrap();
        assert_eq!(file.read(), Intent::Nothing);
    }

    #[test]
    fn a_record_of_an_older_version_is_read_and_torvm_comes_back_without_a_secret() {
        let dir = TestDir::new("intent-torvm");
        let (path, file) = (dir.path("intent.json"), IntentFile::new(&dir.path("")));
        let profile = crate::machine::tests::profile();
        file.write(&profile).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(",\"torvm\":null"), "{text}");
        fs::write(&path, text.replace(",\"torvm\":null", "")).unwrap();
        assert_eq!(file.read(), Intent::Profile(Box::new(profile)));
        let text = "backend = \"torvm\"\n[torvm]\nbridges = [\"obfs4 192.0.2.1:443 cert=a\"]\nexit-country = \"de\"\n\
                    https-proxy = \"proxy.example:3128\"\nproxy-username = \"u\"\nproxy-password-file = \"/etc/proxyvpn/p\"\n";
        let profile = crate::config::parse::profile("tor", "tor.toml", text).unwrap();
        file.write(&profile).unwrap();
        assert_eq!(file.read(), Intent::Profile(Box::new(profile)));
    }

    #[test]
    fn what_cannot_be_understood_is_not_taken_for_nothing() {
        let dir = TestDir::new("intent-unreadable");
        let (path, file) = (dir.path("intent.json"), IntentFile::new(&dir.path("")));
        file.write(&crate::machine::tests::profile()).unwrap();
        let whole = fs::read_to_string(&path).unwrap();
        let edited = |from: &str, to: &str| {
            assert!(whole.contains(from), "{whole}");
            whole.replacen(from, to, 1)
        };
        let mut texts = vec![
            edited("\"version\":1", "\"version\":2"),
            edited("{\"version\"", "{\"also\":0,\"version\""),
            edited("\"autoconnect\"", "\"also\":0,\"autoconnect\""),
            edited("\"killswitch\"", "\"also\":0,\"killswitch\""),
            edited("\"killswitch\":true,", ""),
            format!("{whole}{whole}"),
            "\u{0}".repeat(whole.len()),
        ];
        texts.extend((0..whole.len()).map(|length| whole[..length].to_owned()));
        for text in texts {
            fs::write(&path, &text).unwrap();
            assert!(matches!(file.read(), Intent::Unreadable(_)), "{text}");
        }
        fs::write(&path, &whole).unwrap();
        assert!(matches!(file.read(), Intent::Profile(_)), "anti-test: the whole record is read");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(file.read(), Intent::Unreadable(cause) if cause.contains("chmod go-w")));
        // Whatever it is, it can be decided that nothing is wanted.
        file.clear().unwrap();
        assert_eq!(file.read(), Intent::Nothing);
    }
}
