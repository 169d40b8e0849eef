//! Doubles for tests, all under a clock that the test sets. Devices are wrappers that compose.
//!
//! - [`packets`]: packets of a program
//! - [`queue`]: the plain device
//! - [`upstream`]: attempts that the test answers, and far ends of tunnels
//! - [`bench`]: a shard between such doubles

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's failure")]

mod bench;
mod packets;
mod queue;
mod upstream;

pub(crate) use bench::{Bench, LIMITS};
pub(crate) use packets::{Packets, Sent, fix_header, read_tcp};
pub(crate) use queue::Double;
pub(crate) use upstream::{Attempts, tunnel};
