//! Packet engine: takes IP packets from a TUN device, terminates TCP in userspace and carries each connection through an
//! upstream. Needs no privilege, no D-Bus and no netlink: it is given devices, a configuration and a stop signal, and gives
//! back events and counters.
//!
//! - [`config`]: what the engine is told
//! - [`event`]: what the engine tells: events, counters, flows
//! - [`upstream`]: the way out: HTTP CONNECT or direct, marked sockets, probe
//! - [`secret`]: a password that cannot be printed

pub mod config;
pub mod event;
pub mod secret;
pub mod upstream;
