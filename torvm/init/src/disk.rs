//! The state disk: Tor's guards live on it. A blank one gets a file system, one beyond repair is made anew. Tor can fill it, and a Tor that
//! was taken over can leave anything on it.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown};
use std::path::Path;
use std::time::{Duration, Instant};

use proxyvpn_torvm::channel::{Disk, Status};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::channel::Channel;
use crate::error::{Error, While as _};
use crate::{program, tor};

const DEVICE: &str = "/dev/vda";
const MOUNT: &str = "/state";
const MKFS: &str = "/usr/bin/mke2fs";
const FSCK: &str = "/usr/bin/e2fsck";
/// Bytes at the beginning that are zero on a blank disk: they hold the superblock and the first group's descriptors.
const BEGINNING: usize = 64 * 1024;
/// With less than this part of the blocks free, all that Tor can get again is removed.
const FREE_PART: u64 = 8;
/// Tor's file with the guards is never longer.
const GUARDS_MAX: u64 = 1024 * 1024;

/// Checks and mounts it. Also: what was cleared to make room, for people.
pub(crate) fn mount(channel: &mut Channel) -> Result<(Disk, Option<String>), Error> {
    let mut found = if is_blank()? {
        make(channel)?;
        Disk::Made
    } else {
        check(channel)?
    };
    if mount_it().is_err() {
        make(channel)?;
        mount_it().during("mount the state disk")?;
        found = Disk::Reset;
    }
    let room = make_room(Path::new(MOUNT), free_part_is_small).during("make room on the state disk")?;
    let folder = Path::new(tor::STATE);
    match fs::symlink_metadata(folder) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => {
            fs::remove_file(folder).and_then(|()| fs::create_dir(folder)).during(format!("make {}", tor::STATE))?
        }
        Err(_) => fs::create_dir(folder).during(format!("make {}", tor::STATE))?,
    }
    lchown(folder, Some(tor::UID), Some(tor::UID)).during(format!("give {} to Tor", tor::STATE))?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
        .during(format!("close {} for others", tor::STATE))?;
    Ok((found, room.then(|| "the state disk was full: all was removed but Tor's guards".to_owned())))
}

fn is_blank() -> Result<bool, Error> {
    let mut beginning = vec![0; BEGINNING];
    File::open(DEVICE).and_then(|mut disk| disk.read_exact(&mut beginning)).during("read the state disk")?;
    Ok(beginning.iter().all(|byte| *byte == 0))
}

fn make(channel: &mut Channel) -> Result<(), Error> {
    let arguments = ["-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", DEVICE];
    program::run(MKFS, &arguments, "", || channel.send(&Status::Alive))?.successful(MKFS)
}

/// Repairs what can be repaired without a question, else makes it anew.
fn check(channel: &mut Channel) -> Result<Disk, Error> {
    let ended = program::run(FSCK, &["-p", DEVICE], "", || channel.send(&Status::Alive))?;
    match ended.status.code() {
        Some(0) => Ok(Disk::Kept),
        // e2fsck(8): 1 repaired, 2 the system should be rebooted (a mounted file system: not here).
        Some(1..=3) => Ok(Disk::Repaired),
        _ => {
            eprintln!("torvm-init: the state disk is beyond repair: {}: {}", ended.status, ended.words);
            make(channel)?;
            Ok(Disk::Reset)
        }
    }
}

fn mount_it() -> io::Result<()> {
    let flags = MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount(DEVICE, MOUNT, "ext4", flags, c"errors=remount-ro")?)
}

fn free_part_is_small(root: &Path) -> io::Result<bool> {
    let state = rustix::fs::statvfs(root)?;
    Ok(state.f_bavail < state.f_blocks / FREE_PART || state.f_favail < state.f_files / FREE_PART)
}

/// Is it nearly full? (While Tor runs.)
pub(crate) fn is_nearly_full() -> bool {
    free_part_is_small(Path::new(MOUNT)).unwrap_or(true)
}

/// Removes all but Tor's file with the guards when `is_full` says so. Symbolic links are not followed. Returns whether it did.
fn make_room(root: &Path, is_full: impl Fn(&Path) -> io::Result<bool>) -> io::Result<bool> {
    if !is_full(root)? {
        return Ok(false);
    }
    let tor = root.join("tor");
    let tor_is_folder = fs::symlink_metadata(&tor).is_ok_and(|metadata| metadata.is_dir());
    remove_all(root, |path, _| tor_is_folder && path == tor)?;
    if tor_is_folder {
        let guards = tor.join("state");
        remove_all(&tor, |path, metadata| path == guards && metadata.is_file() && metadata.size() <= GUARDS_MAX)?;
    }
    Ok(true)
}

fn remove_all(folder: &Path, keep: impl Fn(&Path, &fs::Metadata) -> bool) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        if keep(&path, &metadata) {
            continue;
        }
        if metadata.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    Ok(())
}

/// Takes it out of use, clean. When somebody still holds it, at least what was written is on it.
pub(crate) fn unmount() {
    let begin = Instant::now();
    loop {
        match rustix::mount::unmount(MOUNT, UnmountFlags::empty()).map_err(io::Error::from) {
            Ok(()) => return,
            Err(error) if error.kind() == ErrorKind::InvalidInput => return, // not mounted
            Err(error) if begin.elapsed() > Duration::from_secs(1) => {
                eprintln!("torvm-init: unmount the state disk: {error}");
                rustix::fs::sync();
                return;
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_without_the_guards_and_without_following_links() -> io::Result<()> {
        let root = std::env::temp_dir().join(format!("torvm-init-room-{}", std::process::id()));
        let outside = root.with_extension("outside");
        fs::create_dir_all(root.join("tor/keys/deep"))?;
        fs::create_dir_all(&outside)?;
        fs::write(outside.join("mine"), "x")?;
        for file in ["junk", "tor/state", "tor/cached-certs", "tor/keys/deep/file"] {
            fs::write(root.join(file), "x")?;
        }
        std::os::unix::fs::symlink(&outside, root.join("tor/link"))?;
        assert!(!make_room(&root, |_| Ok(false))?);
        assert!(root.join("junk").exists());
        assert!(make_room(&root, |_| Ok(true))?);
        let left: Vec<_> = fs::read_dir(root.join("tor"))?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<_>>()?;
        assert_eq!(left, ["state"]);
        assert!(outside.join("mine").exists() && !root.join("junk").exists());

        // A folder that is a link, and guards that are none.
        fs::remove_dir_all(root.join("tor"))?;
        std::os::unix::fs::symlink(&outside, root.join("tor"))?;
        assert!(make_room(&root, |_| Ok(true))?);
        assert!(outside.join("mine").exists() && !root.join("tor").exists());
        fs::remove_dir_all(&outside)?;
        fs::remove_dir_all(&root)
    }
}
