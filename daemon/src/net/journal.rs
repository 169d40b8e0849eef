//! The record that changes are under way. What is ours is found by ownership, so the record holds only what people want
//! to read after a crash, and its presence says that there may be something to clean up.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;

const VERSION: u32 = 1;
/// A record is far smaller; what is larger is not ours.
const MAX_BYTES: u64 = 1 << 20;

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    /// What takes the changes back, as text.
    undo: BTreeSet<String>,
}

/// The record in the state directory.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    undo: BTreeSet<String>,
    interrupted: bool,
}

impl Journal {
    /// Opens the record. One that can't be read counts as "there may be changes", never as an error.
    pub(super) fn open(state_dir: &Path) -> Self {
        let path = state_dir.join("journal.json");
        let (undo, interrupted) = match read(&path) {
            Ok(None) => (BTreeSet::new(), false),
            Ok(Some(undo)) => {
                let interrupted = !undo.is_empty();
                (undo, interrupted)
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the journal can't be read: assuming that there are changes");
                (BTreeSet::new(), true)
            }
        };
        Self { path, undo, interrupted }
    }

    /// Whether an earlier run left changes behind, or may have.
    pub(super) const fn interrupted(&self) -> bool {
        self.interrupted
    }

    /// Records what will take the next changes back, before they are done. Gives what was recorded before.
    pub(super) fn begin(&mut self, undo: impl IntoIterator<Item = String>) -> Result<BTreeSet<String>, Error> {
        let before = self.undo.clone();
        self.undo.extend(undo);
        if self.undo != before {
            self.write()?;
        }
        Ok(before)
    }

    /// Goes back to what [`begin`](Self::begin) gave, when the changes were taken back.
    pub(super) fn roll_back(&mut self, before: BTreeSet<String>) -> Result<(), Error> {
        self.undo = before;
        if self.undo.is_empty() { self.clear() } else { self.write() }
    }

    /// Everything was taken back.
    pub(super) fn clear(&mut self) -> Result<(), Error> {
        self.undo.clear();
        self.interrupted = false;
        match fs::remove_file(&self.path) {
            Ok(()) => self.sync_directory(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
        .map_err(|source| self.error(source))
    }

    fn write(&self) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let temporary = self.path.with_extension("tmp");
            let content = Content { version: VERSION, undo: self.undo.clone() };
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&serde_json::to_vec(&content)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)?;
            self.sync_directory()
        };
        write().map_err(|source| self.error(source))
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
    }

    fn error(&self, source: io::Error) -> Error {
        Error::Journal { path: self.path.clone(), source }
    }
}

fn read(path: &Path) -> io::Result<Option<BTreeSet<String>>> {
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
        Ok(metadata) if metadata.len() > MAX_BYTES => return Err(invalid("too large")),
        Ok(_) => {}
    }
    let content: Content = serde_json::from_slice(&fs::read(path)?)?;
    if content.version == VERSION { Ok(Some(content.undo)) } else { Err(invalid("unknown version")) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("proxyvpn-journal-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn tells_an_interrupted_run() {
        let dir = directory("interrupted");
        let mut journal = Journal::open(&dir);
        assert!(!journal.interrupted());
        let before = journal.begin(["rule remove x".to_owned()]).unwrap();
        assert!(before.is_empty());
        let mut next = Journal::open(&dir);
        assert!(next.interrupted());
        next.clear().unwrap();
        next.clear().unwrap();
        assert!(!Journal::open(&dir).interrupted());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn roll_back_forgets_only_the_last_batch() {
        let dir = directory("rollback");
        let mut journal = Journal::open(&dir);
        journal.begin(["a".to_owned()]).unwrap();
        let before = journal.begin(["b".to_owned()]).unwrap();
        journal.roll_back(before).unwrap();
        assert_eq!(read(&dir.join("journal.json")).unwrap().unwrap(), BTreeSet::from(["a".to_owned()]));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_cannot_be_read_counts_as_changes() {
        let dir = directory("unreadable");
        for text in ["", "{", r#"{"version":2,"undo":[]}"#, r#"{"version":1}"#, "\u{0}\u{0}"] {
            fs::write(dir.join("journal.json"), text).unwrap();
            let mut journal = Journal::open(&dir);
            assert!(journal.interrupted(), "{text:?}");
            journal.clear().unwrap();
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
