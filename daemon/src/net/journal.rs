//! The record that changes are under way. What is ours is found by ownership, so the record holds only what people want
//! to read after a crash, and its presence says that there may be something to clean up.

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::record;

const VERSION: u32 = 1;

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
                tracing::warn!(path = %path.display(), error, "the journal can't be read: assuming that there are changes");
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
        record::remove(&self.path).map_err(|source| self.error(source))
    }

    fn write(&self) -> Result<(), Error> {
        let bytes = serde_json::to_vec(&Content { version: VERSION, undo: self.undo.clone() });
        bytes
            .map_err(io::Error::from)
            .and_then(|bytes| record::write(&self.path, &bytes))
            .map_err(|source| self.error(source))
    }

    fn error(&self, source: io::Error) -> Error {
        Error::Journal { path: self.path.clone(), source }
    }
}

fn read(path: &Path) -> Result<Option<BTreeSet<String>>, Box<dyn StdError>> {
    let Some(bytes) = record::read(path)? else { return Ok(None) };
    let content: Content = serde_json::from_slice(&bytes)?;
    if content.version == VERSION { Ok(Some(content.undo)) } else { Err("unknown version".into()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn tells_an_interrupted_run() {
        let dir = TestDir::new("journal");
        let dir = dir.path("");
        let mut journal = Journal::open(&dir);
        assert!(!journal.interrupted());
        let before = journal.begin(["rule remove x".to_owned()]).unwrap();
        assert!(before.is_empty());
        let mut next = Journal::open(&dir);
        assert!(next.interrupted());
        next.clear().unwrap();
        next.clear().unwrap();
        assert!(!Journal::open(&dir).interrupted());
    }

    #[test]
    fn roll_back_forgets_only_the_last_batch() {
        let dir = TestDir::new("journal-rollback");
        let mut journal = Journal::open(&dir.path(""));
        journal.begin(["a".to_owned()]).unwrap();
        let before = journal.begin(["b".to_owned()]).unwrap();
        journal.roll_back(before).unwrap();
        assert_eq!(read(&dir.path("journal.json")).unwrap().unwrap(), BTreeSet::from(["a".to_owned()]));
    }

    #[test]
    fn what_cannot_be_read_counts_as_changes() {
        let dir = TestDir::new("journal-unreadable");
        let path = dir.path("journal.json");
        let texts = [
            "",
            "{",
            r#"{"version":2,"undo":[]}"#,
            r#"{"version":1}"#,
            r#"{"version":1,"undo":[],"also":0}"#,
            "\u{0}\u{0}",
        ];
        for text in texts {
            std::fs::write(&path, text).unwrap();
            assert!(Journal::open(&dir.path("")).interrupted(), "{text:?}");
        }
        for make in [
            "mkfifo journal.json",
            "mkdir journal.json",
            "ln -s /dev/zero journal.json",
            "touch journal.json; chmod 666 journal.json",
        ] {
            let script = format!("rm -rf journal.json; {make}");
            let made = std::process::Command::new("sh").args(["-c", &script]).current_dir(dir.path("")).status();
            assert!(made.unwrap().success());
            let mut journal = Journal::open(&dir.path(""));
            assert!(journal.interrupted(), "{make}");
            journal.clear().unwrap();
            assert!(!path.exists(), "{make}");
        }
    }
}
