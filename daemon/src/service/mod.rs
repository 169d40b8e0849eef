//! The objects on the bus. Every call passes `guard`, then ends as a command to the machine or in the profile store.
//!
//! - `guard`: the door of every interface: size, authorisation
//! - `manager`: `org.proxyvpn1.Manager`
//! - `profiles`: `org.proxyvpn1.Profile` objects
//! - `torvm`: `org.proxyvpn1.TorVm`
//! - `options`: the `a{sv}` arguments, checked
//! - `publish`: signals for what changes
//! - `followers`: `LogEntry` to those who read the log
//! - `start`: registers all of it and takes the name

mod followers;
mod guard;
mod manager;
mod options;
mod profiles;
mod publish;
mod start;
#[cfg(test)]
mod tests;
mod torvm;

pub use start::{Service, StartError};
