//! The daemon: control of the machine's network. Packets are the engine's (`proxyvpn-engine`).
//!
//! - [`app`]: the process: arguments, bus, signals, systemd
//! - [`authority`]: who may do what, by polkit
//! - [`backend`]: the effects behind the states
//! - [`config`]: files of the administrator: settings, profiles, secrets
//! - [`fdstore`]: descriptors that outlive the daemon
//! - `lines`: bounded lines from and to somebody who is not trusted
//! - [`log`]: the newest records, for callers on the bus
//! - `record`: small files of the daemon's own
//! - [`resolvers`]: which DNS servers the machine uses
//! - [`lookup`]: addresses of the upstream's name, over marked sockets
//! - [`net`]: mechanism: desired network state, plan, apply, undo; knows no profiles
//! - [`machine`]: policy: the states of the connection
//! - [`service`]: the objects on the bus
//! - [`tor`]: Tor's control port; knows no profiles
//! - [`vm`]: the virtual machine, from its image to its end; knows no profiles
//! - `systemd`: what systemd is told, and asked

pub mod app;
pub mod authority;
pub mod backend;
pub mod config;
pub mod fdstore;
mod lines;
pub mod log;
pub mod lookup;
pub mod machine;
pub mod net;
mod record;
pub mod resolvers;
pub mod service;
mod systemd;
#[cfg(test)]
mod test_dir;
pub mod tor;
pub mod vm;
