//! System calls of the TUN driver (linux/if_tun.h), which has no netlink interface to make a device.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `IFF_TUN_EXCL`: fail when the device exists, instead of joining it.
const EXCLUSIVE: libc::c_int = 0x8000;
/// What the engine's packets may leave to the kernel: checksums and TCP segmentation.
const OFFLOADS: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

/// Name and flags of the device that `fd` is a queue of.
pub(super) fn device(fd: BorrowedFd<'_>) -> io::Result<(Vec<u8>, libc::c_int)> {
    // SAFETY: ifreq is plain data, for which all zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq, which outlives the call; another kind of descriptor refuses it.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().map(|byte| byte.to_ne_bytes()[0]).take_while(|byte| *byte != 0).collect();
    // SAFETY: TUNGETIFF has written this field of the union; any value is one of its type.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name, libc::c_int::from(flags)))
}

/// Turns an open `/dev/net/tun` into a queue of the device `name` with these flags (`IFF_*`). `first`: make the device.
pub(super) fn attach(file: &File, name: &str, mut flags: libc::c_int, first: bool) -> io::Result<()> {
    if first {
        flags |= EXCLUSIVE;
    }
    // SAFETY: ifreq is plain data, for which all zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // The flags are 16 bits in struct ifreq; IFF_TUN_EXCL is the uppermost.
    request.ifr_ifru.ifru_flags = (flags & 0xffff) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call; the descriptor is open.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the kernel leave checksums and segmentation to who reads the queue.
pub(super) fn offload(file: &File) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value; the descriptor is open.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(OFFLOADS)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
