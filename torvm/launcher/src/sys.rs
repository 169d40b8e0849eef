//! What has no safe interface: the TUN driver's ioctl, and what a child does between fork and exec.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Resource, Rlimit, Signal, getpid, getppid, set_parent_process_death_signal, setrlimit};

/// Name and flags of the device that `fd` is a queue of (`TUNGETIFF`, linux/if_tun.h).
pub(crate) fn tun_device(fd: BorrowedFd<'_>) -> io::Result<(Vec<u8>, libc::c_int)> {
    // SAFETY: ifreq is plain data, for which all zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq, which outlives the call; another kind of descriptor refuses it.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().map(|byte| byte.to_ne_bytes()[0]).take_while(|byte| *byte != 0).collect();
    // SAFETY: TUNGETIFF has written this field of the union; any value is one of its type.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name, libc::c_int::from(flags)))
}

/// Has the child die with this process, live within `limits`, and have only `keep` beside its standard streams.
pub(crate) fn confine(command: &mut Command, keep: Vec<RawFd>, limits: Vec<(Resource, u64)>) {
    let parent = getpid();
    let prepare = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // it may have died before
        if getppid() != Some(parent) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for (resource, limit) in &limits {
            setrlimit(*resource, Rlimit { current: Some(*limit), maximum: Some(*limit) })?;
        }
        // SAFETY: by number, since glibc has no close_range before 2.34; it only sets a flag of descriptors (Linux 5.11).
        if unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        for fd in &keep {
            // SAFETY: it only clears a flag; a number that is not open is refused.
            if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls on what it owns; it does not allocate and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// The error with which an ioctl is refused.
#[cfg(test)]
pub(crate) fn refused(file: &std::fs::File, request: libc::Ioctl) -> Option<i32> {
    let mut argument = [0u64; 8];
    // SAFETY: the requests of the tests read at most an int or an ifreq, for which there is room.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, &raw mut argument) };
    if result < 0 { io::Error::last_os_error().raw_os_error() } else { None }
}
