//! Backends: the effects behind the states.
//!
//! - [`carrier`]: what carries a profile's traffic: device, packet engine, virtual machine
//! - [`inspect`]: plan, diagnosis, flows and counters, beside the states
//! - `engine`: the engine while it runs, shared by the two
//! - `guest`: the virtual machine with Tor in it, while it runs
//! - `told`: what the guest is told
//! - `upstream`: from a profile to a connector: look-up, password, the loop that a local proxy would make
//! - `lookout`: what happens around while a connection is wanted
//! - `question`: asking the upstream beside everything else
//! - [`resolved`]: the tunnel's DNS server, told to systemd-resolved
//! - `shortage`: what this machine runs out of
//! - `network`: from a profile to a desired network
//! - `lock`: the lock, kept by systemd or without it
//! - [`flush_caches`]: flushing DNS caches
//! - `checks`: the checks of the diagnosis

mod caches;
pub mod carrier;
mod checks;
mod engine;
mod guest;
pub mod inspect;
mod lock;
mod lookout;
mod network;
mod question;
pub mod resolved;
mod shortage;
mod told;
mod upstream;

pub use caches::flush_alone as flush_caches;
