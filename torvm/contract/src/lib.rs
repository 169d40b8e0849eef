//! What host, launcher and guest of the TorVM agree on. No effects: what is here crosses between them, and each side checks it.
//!
//! - [`link`]: addresses, ports and MACs of the guest's two network devices
//! - [`config`]: what the guest is told at its start; every field has a type that only takes what is allowed
//! - [`torrc`]: from that to Tor's configuration
//! - [`channel`]: lines between host and guest while it runs
//! - [`launch`]: the message by which the daemon has QEMU started
#![forbid(unsafe_code)]

pub mod channel;
pub mod config;
pub mod launch;
pub mod link;
pub mod torrc;
