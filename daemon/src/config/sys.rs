//! The user database, and descriptors in the reactor.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A longer entry is an error.
const MAX_ENTRY: usize = 1 << 20;

/// The id of a user by name (getpwnam_r(3)); `None` when there is no such user.
pub(super) fn user_id(name: &CStr) -> io::Result<Option<u32>> {
    let mut strings: Vec<libc::c_char> = vec![0; 1024];
    loop {
        let mut entry = MaybeUninit::<libc::passwd>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: `name` is NUL-terminated, `entry` and `found` are writable, and `strings` is as long as it is said to be.
        let code = unsafe {
            libc::getpwnam_r(name.as_ptr(), entry.as_mut_ptr(), strings.as_mut_ptr(), strings.len(), &raw mut found)
        };
        match code {
            0 if found.is_null() => return Ok(None),
            // SAFETY: `found` is not null, so `entry` was filled in.
            0 => return Ok(Some(unsafe { entry.assume_init_ref() }.pw_uid)),
            libc::ERANGE if strings.len() < MAX_ENTRY => strings.resize(strings.len() * 2, 0),
            // Some modules of the name service say "not found" so (ERRORS in the manual page).
            libc::ENOENT | libc::ESRCH => return Ok(None),
            other => return Err(io::Error::from_raw_os_error(other)),
        }
    }
}

/// `fd` in tokio's reactor.
pub(super) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
