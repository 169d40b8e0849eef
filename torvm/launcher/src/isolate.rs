//! What systemd does for the unit, for machines without it: a process that sees no network, no file but programs, no other process,
//! and has no rights.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_remount, unmount,
};
use rustix::process::{Gid, Signal, Uid, chdir, getgid, getuid, pivot_root, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

/// Where the new root is put together: a folder that every machine has.
const ROOT: &str = "/tmp";
/// What is left of the machine's files, read-only.
const PROGRAMS: &str = "usr";
/// Links into it, or folders with libraries where they are not.
const LIBRARIES: [&str; 4] = ["bin", "lib", "lib32", "lib64"];
/// Where the libraries are.
const LINKER_CACHE: &str = "etc/ld.so.cache";
const KVM: &str = "dev/kvm";

/// Why a process could not be isolated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("namespaces cannot be made")]
    Namespaces(#[source] Errno),
    #[error("{0} cannot be put into the new root")]
    Root(&'static str, #[source] io::Error),
    #[error("the new root cannot be entered")]
    Enter(#[source] io::Error),
    #[error("rights cannot be given up")]
    Rights(#[source] Errno),
    #[error("rights are left that should be gone")]
    Left,
}

/// Who a process becomes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) user: u32,
    pub(crate) group: u32,
}

/// New namespaces, with an empty network. This process stays in its process namespace: its first child is the first of the new one.
pub(crate) fn separate() -> Result<(), Error> {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces).map_err(|error| Error::Namespaces(Errno::from_raw_os_error(error as i32)))
}

/// In the namespaces of [`separate`]: the files, then the rights.
pub(crate) fn confine(identity: Identity) -> Result<(), Error> {
    build_root(identity)?;
    enter_root().map_err(Error::Enter)?;
    give_up(identity)?;
    // With this process the kernel ends all of its process namespace, QEMU too.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Error::Rights)
}

fn build_root(identity: Identity) -> Result<(), Error> {
    let at = |what: &'static str| move |error: io::Error| Error::Root(what, error);
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(io::Error::from)
        .and_then(|()| tmpfs(ROOT))
        .and_then(|()| Ok(chdir(ROOT)?))
        .map_err(at("/"))?;
    read_only(PROGRAMS).map_err(at(PROGRAMS))?;
    for name in LIBRARIES {
        let original = Path::new("/").join(name);
        match original.symlink_metadata() {
            Ok(metadata) if metadata.is_symlink() => {
                fs::read_link(&original).and_then(|target| symlink(target, name)).map_err(at(name))?;
            }
            Ok(_) => read_only(name).map_err(at(name))?,
            Err(_) => {}
        }
    }
    if Path::new("/").join(LINKER_CACHE).exists() {
        fs::create_dir("etc").and_then(|()| fs::write(LINKER_CACHE, "")).map_err(at(LINKER_CACHE))?;
        bind(LINKER_CACHE).map_err(at(LINKER_CACHE))?;
    }
    fs::create_dir("dev").and_then(|()| device("dev/null", (1, 3), 0o666)).map_err(at("dev/null"))?;
    if fs::metadata(Path::new("/").join(KVM)).is_ok_and(|metadata| metadata.file_type().is_char_device()) {
        device(KVM, (10, 232), 0o600).and_then(|()| chown(KVM, Some(identity.user), None)).map_err(at(KVM))?;
    }
    let hidden = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    fs::create_dir("proc").and_then(|()| Ok(mount("proc", "proc", "proc", hidden, c"hidepid=2")?)).map_err(at("proc"))
}

fn tmpfs(at: &str) -> io::Result<()> {
    Ok(mount("tmpfs", at, "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0755,size=64k,nr_inodes=64")?)
}

fn read_only(name: &str) -> io::Result<()> {
    fs::create_dir(name)?;
    bind(name)
}

fn bind(name: &str) -> io::Result<()> {
    mount_bind(Path::new("/").join(name), name)?;
    Ok(mount_remount(name, MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV, "")?)
}

/// A node of its own: a change of its mode never reaches the machine's.
fn device(name: &str, (major, minor): (u32, u32), mode: u32) -> io::Result<()> {
    mknodat(CWD, name, FileType::CharacterDevice, Mode::empty(), rustix::fs::makedev(major, minor))?;
    fs::set_permissions(name, fs::Permissions::from_mode(mode))
}

fn enter_root() -> io::Result<()> {
    // The old root is put over the new one and then taken away (pivot_root(2)).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(mount_remount("/", MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOEXEC, "")?)
}

fn give_up(identity: Identity) -> Result<(), Error> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    let (user, group) = (Uid::from_raw(identity.user), Gid::from_raw(identity.group));
    let drop_all = || {
        clear_ambient_capability_set()?;
        for number in 0..u64::BITS {
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
                // the first one that this kernel does not know
                Err(Errno::INVAL) => break,
                result => result?,
            }
        }
        set_thread_groups(&[])?;
        set_thread_res_gid(group, group, group)?;
        set_thread_res_uid(user, user, user)?;
        set_capabilities(None, none)?;
        set_no_new_privs(true)
    };
    drop_all().map_err(Error::Rights)?;
    let left = capabilities(None).map_err(Error::Rights)?;
    if getuid() != user || getgid() != group || left.permitted != none.permitted || user.is_root() || group.is_root() {
        return Err(Error::Left);
    }
    Ok(())
}
