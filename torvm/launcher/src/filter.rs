//! System calls that neither the launcher nor QEMU needs once the request is there, and that would help a guest that broke out: new
//! sockets, namespaces, changes of the TAP device, and what many holes of kernels were found behind. QEMU's own filter (`-sandbox`)
//! comes on top; it keeps QEMU from starting programs.

use std::collections::BTreeMap;

use rustix::io::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the filter of system calls cannot be made")]
    Make(#[source] seccompiler::BackendError),
    #[error("the filter of system calls cannot be put in force")]
    Apply(#[source] seccompiler::Error),
}

/// Refused with EPERM whatever their arguments. Not socketpair(2): the standard library needs one to start QEMU, and it leads nowhere.
const REFUSED: [libc::c_long; 31] = [
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
];

/// Of a TAP device's queue: what changes the device. QEMU sets offloads and the header's size alone.
const CHANGES: [libc::Ioctl; 14] = [
    libc::TUNSETIFF,
    libc::TUNSETPERSIST,
    libc::TUNSETOWNER,
    libc::TUNSETGROUP,
    libc::TUNSETLINK,
    libc::TUNSETIFINDEX,
    libc::TUNSETQUEUE,
    libc::TUNSETTXFILTER,
    libc::TUNATTACHFILTER,
    libc::TUNDETACHFILTER,
    libc::TUNSETSTEERINGEBPF,
    libc::TUNSETFILTEREBPF,
    libc::TUNSETCARRIER,
    libc::SIOCSIFHWADDR,
];

/// New namespaces by clone(2).
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// From here on, for this process and what it starts.
pub(crate) fn apply() -> Result<(), Error> {
    apply_filter(&program().map_err(Error::Make)?).map_err(Error::Apply)
}

fn program() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.map(|call| (call, vec![])).into();
    let mut ioctls = vec![];
    for request in CHANGES {
        let is = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request)?;
        ioctls.push(SeccompRule::new(vec![is])?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    let mut clones = vec![];
    for flag in NAMESPACES {
        let flag = u64::from(flag.cast_unsigned());
        let has = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(flag), flag)?;
        clones.push(SeccompRule::new(vec![has])?);
    }
    rules.insert(libc::SYS_clone, clones);
    let refused = SeccompAction::Errno(Errno::PERM.raw_os_error().cast_unsigned());
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture)?.try_into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use nix::sched::{CloneFlags, unshare};
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, send, socket};

    use super::*;
    use crate::sys;

    #[test]
    fn what_a_guest_that_broke_out_could_use_is_refused() {
        let attempts = || {
            let local = socket(AddressFamily::UNIX, SocketType::STREAM, None).err();
            let internet = socket(AddressFamily::INET, SocketType::DGRAM, None).err();
            let user = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).err();
            let null = File::open("/dev/null").unwrap();
            let changes = CHANGES.map(|request| sys::refused(&null, request));
            (local, internet, user, changes)
        };
        // The filter is for its thread alone.
        let (found, goes_on) = std::thread::spawn(move || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            apply().unwrap();
            send(&ours, b"x", SendFlags::empty()).unwrap();
            let got = recv(&theirs, &mut [0u8; 9], RecvFlags::empty()).unwrap().1;
            // A thread can still be started.
            (attempts(), got == 1 && std::thread::spawn(|| true).join().unwrap())
        })
        .join()
        .unwrap();
        assert!(goes_on);
        let refused = Some(Errno::PERM);
        assert_eq!((found.0, found.1), (refused, refused));
        assert_eq!(found.2, Some(nix::errno::Errno::EPERM));
        assert_eq!(found.3, [Some(libc::EPERM); CHANGES.len()]);
        // Without it they reach the device, which is none.
        assert_eq!(sys::refused(&File::open("/dev/null").unwrap(), libc::TUNSETPERSIST), Some(libc::ENOTTY));
    }
}
