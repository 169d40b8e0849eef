//! The contract of proxyvpn on the system D-Bus. No logic: what is here is what both sides must agree on.
//!
//! - [`names`]: bus name, object paths, interfaces, polkit actions
//! - [`options`]: keys of the `a{sv}` dictionaries
//! - [`types`]: structures that cross the bus
//! - [`reason`]: why a connection is not there, as stable codes
//! - [`error`](mod@error): `org.proxyvpn1.Error.*`
//! - [`client`]: typed client proxies
#![forbid(unsafe_code)]

pub mod client;
pub mod error;
pub mod names;
pub mod options;
pub mod reason;
pub mod types;

pub use error::Error;
pub use reason::ReasonCode;
