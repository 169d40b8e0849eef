//! Files of the administrator.
//!
//! - [`profile`]: one profile, checked
//! - [`parse`]: TOML text to a checked profile
//! - [`check`]: the rules of single values, the same for files and for callers on the bus
//! - `torvm`: `[torvm]`
//! - `edit`: changes of single keys in a text
//! - [`url`]: the upstream's URL
//! - [`store`]: the directories of profiles
//! - [`watch`]: tells when they change
//! - [`daemon`]: settings of the daemon
//! - [`secret`](mod@secret): passwords
//! - [`file`](mod@file): files that only the right owner can have written
//! - [`error`](mod@error): what is wrong in a text, with its place

pub mod check;
pub mod daemon;
pub mod descriptor;
mod edit;
pub mod error;
pub mod file;
pub mod parse;
pub mod profile;
mod raw;
pub mod secret;
pub mod store;
mod sys;
mod torvm;
pub mod url;
pub mod watch;
