//! Which QEMU is started.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where distributions put it.
const PLACES: [&str; 2] = ["/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-x86_64"];
/// The first one with `-netdev dgram`.
const OLDEST: (u32, u32) = (7, 2);
/// Bits of the mode by which others than the owner may write.
const OTHERS_WRITE: u32 = 0o022;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("QEMU is not installed: there is no {}", PLACES.join(" and no "))]
    Missing,
    #[error("{0:?} is not an absolute path")]
    Relative(PathBuf),
    #[error("{0:?} cannot be examined")]
    Examine(PathBuf, #[source] io::Error),
    #[error("{0:?} is not trusted: it, or a folder of its path, does not belong to root or can be written by others")]
    Untrusted(PathBuf),
    #[error("{0:?} is not a program")]
    NoProgram(PathBuf),
    #[error("{0:?} cannot be run")]
    Run(PathBuf, #[source] io::Error),
    #[error("{0:?} --version does not answer as QEMU does")]
    NoQemu(PathBuf),
    #[error("QEMU {0} is too old: {major}.{minor} is needed", major = OLDEST.0, minor = OLDEST.1)]
    Old(String),
}

/// A QEMU that only root could have put there.
#[derive(Debug)]
pub(crate) struct Program {
    /// Without links.
    pub(crate) path: PathBuf,
    /// As in `7.2.22`.
    pub(crate) version: String,
}

impl Program {
    /// Takes `path`, or the first that there is, and asks it for its version.
    pub(crate) fn find(path: Option<&Path>) -> Result<Self, Error> {
        let path = match path {
            Some(path) if path.is_absolute() => path,
            Some(path) => return Err(Error::Relative(path.to_owned())),
            None => PLACES.iter().map(Path::new).find(|path| path.exists()).ok_or(Error::Missing)?,
        };
        let path = trusted(path)?;
        let output = Command::new(&path)
            .arg("--version")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .map_err(|error| Error::Run(path.clone(), error))?;
        let version =
            version_of(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| Error::NoQemu(path.clone()))?;
        if version.1 < OLDEST {
            return Err(Error::Old(version.0));
        }
        Ok(Self { path, version: version.0 })
    }
}

/// `path` without links, if nobody but root can change it or what it is reached by.
fn trusted(path: &Path) -> Result<PathBuf, Error> {
    let examine = |path: &Path| {
        let path = path.to_owned();
        move |error| Error::Examine(path, error)
    };
    let path = path.canonicalize().map_err(examine(path))?;
    for part in path.ancestors() {
        let metadata = part.symlink_metadata().map_err(examine(part))?;
        if metadata.uid() != 0 || metadata.mode() & OTHERS_WRITE != 0 {
            return Err(Error::Untrusted(path));
        }
        if part == path && !(metadata.is_file() && metadata.mode() & 0o111 != 0) {
            return Err(Error::NoProgram(path));
        }
    }
    Ok(path)
}

/// From `QEMU emulator version 7.2.22 (Debian …)`: the version as text, and its first two numbers.
fn version_of(output: &str) -> Option<(String, (u32, u32))> {
    let text = output.strip_prefix("QEMU emulator version ")?.split_ascii_whitespace().next()?;
    let text = text.split(|char: char| !char.is_ascii_digit() && char != '.').next()?;
    let mut numbers = text.split('.').map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else { return None };
    (text.len() <= 20).then(|| (text.to_owned(), (major, minor)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn the_version_is_read() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022\n";
        assert_eq!(version_of(debian), Some(("7.2.22".to_owned(), (7, 2))));
        assert_eq!(version_of("QEMU emulator version 10.0.2\n"), Some(("10.0.2".to_owned(), (10, 0))));
        assert_eq!(version_of("QEMU emulator version 9.1.0-rc2\n"), Some(("9.1.0".to_owned(), (9, 1))));
        for other in
            ["", "QEMU emulator version ", "QEMU emulator version 7", "bash, version 5", "QEMU emulator version x.y"]
        {
            assert_eq!(version_of(other), None, "{other}");
        }
    }

    #[test]
    fn only_what_root_alone_can_change_is_run() {
        assert!(trusted(Path::new("/usr/bin/env")).is_ok());
        let dir = std::env::temp_dir().join(format!("proxyvpn-qemu-{}-program", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let program = dir.join("qemu");
        fs::write(&program, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        // The folder for temporary files can be written by everybody.
        assert!(matches!(trusted(&program), Err(Error::Untrusted(_))));
        let link = dir.join("link");
        symlink("/usr/bin/env", &link).unwrap();
        // What a link leads to is what is run.
        assert_eq!(trusted(&link).unwrap(), Path::new("/usr/bin/env").canonicalize().unwrap());
        fs::remove_dir_all(&dir).unwrap();
        assert!(matches!(trusted(&program), Err(Error::Examine(..))));
        assert!(matches!(trusted(Path::new("/usr/bin")), Err(Error::NoProgram(_))));
    }

    #[test]
    fn another_program_is_not_taken_for_qemu() {
        assert!(matches!(Program::find(Some(Path::new("/usr/bin/env"))), Err(Error::NoQemu(_))));
        assert!(matches!(Program::find(Some(Path::new("qemu-system-x86_64"))), Err(Error::Relative(_))));
    }
}
