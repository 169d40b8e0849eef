//! Small files of the daemon's own that survive a power cut, and are believed only where nobody else can have written them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use zeroize::Zeroizing;

use crate::config::file::{self, FileError, Rules};

/// A record is far smaller; what is larger is not ours.
const MAX_BYTES: usize = 1 << 18;

/// Reads the record at `path`; `None` when there is none. Never waits, whatever lies there.
pub(crate) fn read(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, FileError> {
    let mut owners = vec![rustix::process::geteuid().as_raw(), 0];
    // Whoever owns the directory could put another file there. A clean-up by root reads what the daemon's user wrote.
    owners.extend(path.parent().and_then(|directory| directory.metadata().ok()).map(|directory| directory.uid()));
    match file::read(path, Rules { owners: &owners, max: MAX_BYTES, secret: false }) {
        Err(FileError::Missing { .. }) => Ok(None),
        read => read.map(Some),
    }
}

/// Writes the record: beside it, synced, renamed, and the directory synced. If that fails the old one is still there. An
/// empty directory in its place goes.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let written = write_new(&temporary, bytes).and_then(|()| match fs::rename(&temporary, path) {
        Err(error) if error.kind() == ErrorKind::IsADirectory => {
            fs::remove_dir(path).and_then(|()| fs::rename(&temporary, path))
        }
        renamed => renamed,
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.and_then(|()| sync_directory(path))
}

fn write_new(temporary: &Path, bytes: &[u8]) -> io::Result<()> {
    // One that a crash left, or something else: it is never written to.
    remove(temporary)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Removes the record; none is success. An empty directory in its place goes too.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::IsADirectory => fs::remove_dir(path),
        removed => removed,
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| sync_directory(path)),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed set-up is a failed test")]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::process::Command;

    use super::*;
    use crate::test_dir::TestDir;

    fn text(path: &Path) -> String {
        String::from_utf8(read(path).unwrap().unwrap().to_vec()).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = TestDir::new("record");
        let path = dir.path("record");
        assert!(read(&path).unwrap().is_none());
        remove(&path).unwrap();
        write(&path, b"old").unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(text(&path), "new");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        remove(&path).unwrap();
        assert!(read(&path).unwrap().is_none());
    }

    #[test]
    fn a_failure_leaves_the_old_one() {
        let dir = TestDir::new("record-failure");
        let path = dir.path("record");
        write(&path, b"old").unwrap();
        // Something that is not removed stands in the way.
        fs::create_dir_all(dir.path("record.new/full")).unwrap();
        assert!(write(&path, b"new").is_err());
        assert_eq!(text(&path), "old");
    }

    #[test]
    fn what_a_crash_left_is_not_in_the_way() {
        let dir = TestDir::new("record-crash");
        let path = dir.path("record");
        for leave in ["echo half > record.new", "ln -s elsewhere record.new", "mkfifo record.new", "mkdir record.new"] {
            assert!(Command::new("sh").args(["-c", leave]).current_dir(dir.path("")).status().unwrap().success());
            write(&path, b"new").unwrap();
            assert_eq!(text(&path), "new", "{leave}");
            assert!(!dir.path("elsewhere").exists(), "{leave}");
            assert!(!dir.path("record.new").exists(), "{leave}");
        }
        remove(&path).unwrap();
        fs::create_dir(&path).unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(text(&path), "new");
    }

    #[test]
    fn what_others_can_have_written_is_refused_and_nothing_waits() {
        let dir = TestDir::new("record-refused");
        let path = dir.path("record");
        type Make = fn(&Path);
        let cases: [(Make, &str); 6] = [
            (|path| symlink("/etc/passwd", path).unwrap(), "symbolic link"),
            (|path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success()), "not a regular file"),
            (|path| fs::create_dir(path).unwrap(), "not a regular file"),
            (|path| File::create(path).unwrap().set_len(MAX_BYTES as u64 + 1).unwrap(), "larger than"),
            (|path| writable(path, 0o620), "can be written by others"),
            (|path| writable(path, 0o602), "can be written by others"),
        ];
        for (make, words) in cases {
            make(&path);
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("record"), "{error}");
            remove(&path).unwrap();
        }
    }

    fn writable(path: &Path, mode: u32) {
        fs::write(path, "{}").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}
