//! Packet engine: takes IP packets from a TUN device, terminates TCP in userspace and carries each connection through an
//! upstream. Needs no privilege, no D-Bus and no netlink: it is given devices, a configuration and a stop signal, and gives
//! back events and counters.
//!
//! - [`Engine`]: start, counters, flows, stop
//! - [`config`]: what the engine is told
//! - [`event`]: what the engine tells: events, flows
//! - [`owner`]: whom the engine asks whose a connection is
//! - [`upstream`]: the way out: HTTP CONNECT or direct, marked sockets, probe
//! - [`secret`]: a password that cannot be printed
//!
//! The way of a packet: `device` (frames, offloads) → `packet` (parse) → `table` (4-tuple → flow) → `shard`
//! (what happens to it) → `relay` (smoltcp ↔ upstream socket), with `timer` and `sys` (ring memory, ioctls) below.

pub mod config;
mod counters;
mod device;
mod engine;
pub mod event;
mod flow;
#[cfg(feature = "harness")]
#[doc(hidden)]
pub mod harness;
mod health;
mod memory;
pub mod owner;
mod packet;
mod relay;
pub mod secret;
mod shard;
mod sys;
mod table;
#[cfg(any(test, feature = "harness"))]
mod testing;
mod timer;
pub mod upstream;

pub use engine::{Engine, StartError};
