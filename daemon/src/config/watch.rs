//! Tells when somebody changes files: profiles, so that what is listed on the bus is what is there, and the machine's DNS
//! servers (inotify(7)).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

use super::sys;

/// An editor's several steps are one change, and a flood of changes is a few looks.
const SETTLE: Duration = Duration::from_millis(200);

/// A watch on directories.
#[derive(Debug)]
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Watches those of `directories` that exist. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// inotify cannot be had at all.
    pub fn new(directories: &[impl AsRef<Path>]) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // ATTRIB: a chmod can make a profile good. CREATE: a link is not written.
        let events =
            WatchFlags::CLOSE_WRITE | WatchFlags::CREATE | WatchFlags::MOVE | WatchFlags::DELETE | WatchFlags::ATTRIB;
        for directory in directories {
            if let Err(error) = inotify::add_watch(&fd, directory.as_ref(), events | WatchFlags::ONLYDIR) {
                tracing::debug!("{} is not watched: {error}", directory.as_ref().display());
            }
        }
        sys::readable(fd).map(Self)
    }

    /// Waits for a change, and then a moment for those that come with it.
    ///
    /// # Errors
    /// inotify broke.
    pub async fn changed(&self) -> io::Result<()> {
        let _ready = self.0.readable().await?;
        tokio::time::sleep(SETTLE).await;
        let mut guard = self.0.readable().await?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        loop {
            match rustix::io::read(self.0.get_ref(), &mut buffer) {
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        guard.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;
    use crate::test_dir::TestDir;

    #[tokio::test]
    async fn each_kind_of_change_wakes_once() {
        let dir = TestDir::new("watch");
        let file = dir.path("a.toml");
        let watch = Watch::new(&[Path::new("/nonexistent"), &dir.path("")]).unwrap();
        let quiet =
            async |watch: &Watch| tokio::time::timeout(Duration::from_millis(400), watch.changed()).await.is_err();
        assert!(quiet(&watch).await, "nothing has changed");
        let changes: [&dyn Fn(); 5] = [
            &|| std::fs::write(&file, "x").unwrap(),
            &|| std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap(),
            &|| std::fs::rename(&file, dir.path("b.toml")).unwrap(),
            &|| std::fs::remove_file(dir.path("b.toml")).unwrap(),
            &|| std::os::unix::fs::symlink("elsewhere", &file).unwrap(),
        ];
        for change in changes {
            change();
            watch.changed().await.unwrap();
            assert!(quiet(&watch).await, "one change woke twice");
        }
    }
}
