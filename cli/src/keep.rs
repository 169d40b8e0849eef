//! `--keep-logs`: stores the daemon's log of one connection attempt.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use proxyvpn_dbus::types::LogRecord;
use rustix::fs::OFlags;
use rustix::process::geteuid;

use crate::bus::{AUTHENTICATED, Bus, bounded};
use crate::{logs, text};

/// Stores the records since `begin` (microseconds). That it cannot be done is said, and fails nothing.
pub(crate) async fn store(bus: &Bus, directory: Option<&Path>, begin: u64) {
    let stored = match bounded(AUTHENTICATED, bus.manager.get_log(0)).await {
        Err(failure) => Err(failure.cause),
        Ok(records) => match directory.map(Path::to_owned).or_else(default_directory) {
            None => Err("XDG_RUNTIME_DIR is not set: give a --state-dir".to_owned()),
            Some(directory) => {
                write(&directory, begin, &records).map_err(|(path, error)| format!("{}: {error}", path.display()))
            }
        },
    };
    match stored {
        Ok(path) => text::note(&format!("log kept in {}", text::line(&path.to_string_lossy()))),
        Err(why) => text::note(&format!("proxyctl: the log is not kept: {}", text::indented(&why, 2))),
    }
}

fn default_directory() -> Option<PathBuf> {
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .map(|path| path.join("proxyvpn"))
}

fn write(directory: &Path, begin: u64, records: &[LogRecord]) -> Result<PathBuf, (PathBuf, io::Error)> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |error| (path, error)
    };
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(fail(directory))?;
    let metadata = directory.symlink_metadata().map_err(fail(directory))?;
    if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        let error = io::Error::new(io::ErrorKind::PermissionDenied, "not a directory that is yours alone to write");
        return Err((directory.to_owned(), error));
    }
    let path = directory.join(format!("connect-{}.log", text::time(begin).replace(':', "")));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&path)
        .map_err(fail(&path))?;
    let content: String = records.iter().filter(|record| record.time >= begin).map(logs::line).collect();
    file.write_all(content.as_bytes()).map_err(fail(&path))?;
    Ok(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_private_and_holds_this_attempt_alone() {
        let base = std::env::temp_dir().join(format!("proxyctl-keep-{}", std::process::id()));
        let directory = base.join("a");
        let record = |time, message: &str| LogRecord {
            time,
            level: "info".to_owned(),
            target: "t".to_owned(),
            message: message.to_owned(),
        };
        let path = write(&directory, 2_000_000, &[record(1_999_999, "old"), record(2_000_000, "new\x1b")]).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1970-01-01T00:00:02.000Z info  t: new\\x1b\n");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(directory.metadata().unwrap().mode() & 0o777, 0o700);
        assert_eq!(write(&directory, 2_000_000, &[]).unwrap_err().1.kind(), io::ErrorKind::AlreadyExists);
        std::os::unix::fs::symlink(&directory, base.join("link")).unwrap();
        assert!(write(&base.join("link"), 3_000_000, &[]).is_err());
        std::fs::remove_dir_all(base).unwrap();
    }
}
