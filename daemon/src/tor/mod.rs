//! Tor's control port (control-spec): progress, circuits, new identity. Mechanism: knows no profiles and no states. The other end is
//! not trusted: what comes from it is bounded, and text is free of control characters.
//!
//! - `password`: what opens the port, and its hash for Tor's configuration
//! - `control`: the connection
//! - `event`: what Tor tells by itself
//! - `reply`: from lines to replies
//! - `circuit`: circuits and their relays
//! - [`hint`]: what a person can do when the start stalls

mod circuit;
mod control;
mod event;
pub mod hint;
mod password;
mod reply;

pub use circuit::{Circuit, Relay};
pub use control::{Control, Error, NEWNYM_INTERVAL, NewIdentity};
pub use event::{Bootstrap, Event};
pub use password::Password;
