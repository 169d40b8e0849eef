//! The one place with unsafe code.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Signal, set_parent_process_death_signal};

/// Lets the child end when this process does, even by SIGKILL (PR_SET_PDEATHSIG).
pub(crate) fn die_with_parent(command: &mut Command) {
    let in_child = || set_parent_process_death_signal(Some(Signal::TERM)).map_err(io::Error::from);
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe; nothing is allocated or locked.
    unsafe { command.pre_exec(in_child) };
}
