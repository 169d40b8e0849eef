//! The state disk: what the guest keeps between its runs, such as Tor's guards. The guest makes and checks the file system in it.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use proxyvpn_torvm::launch::STATE_SIZE;
use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, flock, fstat, openat};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::Error;

/// The disk's name in the state directory.
const NAME: &str = "state.img";
/// How long a QEMU that is told to end may need to let go of it.
const BUSY_TIME: Duration = Duration::from_secs(5);

/// Opens the disk in `directory`, which is made when it is not there, like the disk. The lock that comes with the descriptor lasts
/// until its last copy is closed, QEMU's too: so no two virtual machines write it. Blocks up to 5 s.
pub(super) fn open(directory: &Path) -> Result<File, Error> {
    let path = directory.join(NAME);
    let failed = |source: io::Error| Error::Disk { path: path.clone(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = match openat(CWD, &path, flags, Mode::empty()) {
        Err(Errno::NOENT) => openat(CWD, &path, flags | OFlags::CREATE | OFlags::EXCL, mode),
        opened => opened,
    };
    let file = file.map(File::from).map_err(|errno| failed(errno.into()))?;
    let stat = fstat(&file).map_err(|errno| failed(errno.into()))?;
    let problem = if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        Some("it is not a regular file")
    } else if ![0, geteuid().as_raw()].contains(&stat.st_uid) {
        Some("it belongs to another user")
    } else if stat.st_mode & 0o077 != 0 {
        Some("others may open it")
    } else if stat.st_nlink != 1 {
        Some("it has more than one name")
    } else if ![0, STATE_SIZE].contains(&stat.st_size.unsigned_abs()) {
        Some("its size is not 64 MiB")
    } else {
        None
    };
    if let Some(problem) = problem {
        return Err(Error::NotDisk { path, problem });
    }
    lock(&file, &path)?;
    // New, or a crash came between its making and this. Blank: no block is taken yet.
    if stat.st_size == 0 {
        file.set_len(STATE_SIZE).and_then(|()| file.sync_all()).map_err(failed)?;
    }
    Ok(file)
}

fn lock(file: &File, path: &Path) -> Result<(), Error> {
    let deadline = Instant::now() + BUSY_TIME;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
            Err(Errno::WOULDBLOCK) => return Err(Error::DiskBusy { path: path.into() }),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::Disk { path: path.into(), source: errno.into() }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn it_is_made_once_and_kept() {
        let dir = TestDir::new("disk");
        let state = dir.path("torvm");
        drop(open(&state).unwrap());
        let path = state.join(NAME);
        let metadata = path.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks(), metadata.mode() & 0o7777), (STATE_SIZE, 0, 0o600));
        fs::write(&path, "guards").unwrap();
        assert!(matches!(open(&state), Err(Error::NotDisk { .. })), "a short one is not overwritten");
        File::options().write(true).open(&path).unwrap().set_len(STATE_SIZE).unwrap();
        drop(open(&state).unwrap());
        assert!(fs::read(&path).unwrap().starts_with(b"guards"));
        File::create(&path).unwrap();
        drop(open(&state).unwrap());
        assert_eq!(path.metadata().unwrap().len(), STATE_SIZE, "what a crash left is completed");
    }

    #[test]
    fn only_one_has_it_until_the_last_copy_is_closed() {
        let dir = TestDir::new("disk-busy");
        let first = open(&dir.path("")).unwrap();
        let copy = first.try_clone().unwrap();
        drop(first);
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(copy);
        });
        let start = Instant::now();
        drop(open(&dir.path("")).unwrap());
        assert!(start.elapsed() >= Duration::from_millis(200));
        release.join().unwrap();
        let file = File::open(dir.path(NAME)).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        assert!(matches!(open(&dir.path("")), Err(Error::DiskBusy { .. })));
    }

    #[test]
    fn what_others_could_use_is_refused() {
        type Make = fn(&Path);
        let cases: [(Make, &str); 4] = [
            (|path| symlink("/etc/hostname", path).unwrap(), "can't be opened"),
            (|path| fs::create_dir(path).unwrap(), "can't be opened"),
            (
                |path| {
                    fs::write(path, "").unwrap();
                    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
                },
                "others may open it",
            ),
            (
                |path| {
                    drop(File::options().write(true).create_new(true).open(path).unwrap());
                    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
                    fs::hard_link(path, path.with_extension("second")).unwrap();
                },
                "more than one name",
            ),
        ];
        for (make, words) in cases {
            let dir = TestDir::new("disk-refused");
            make(&dir.path(NAME));
            let told = open(&dir.path("")).unwrap_err().to_string();
            assert!(told.contains(words), "{told}");
        }
    }
}
