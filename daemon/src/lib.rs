//! The daemon: control of the machine's network. Packets are the engine's (`proxyvpn-engine`).
//!
//! - [`config`]: files of the administrator: settings, profiles, secrets
//! - [`resolvers`]: which DNS servers the machine uses
//! - [`net`]: mechanism: desired network state, plan, apply, undo; knows no profiles
//! - [`machine`]: policy: the states of the connection

pub mod config;
pub mod machine;
pub mod net;
pub mod resolvers;
