//! The host's network as a mechanism: a desired state is compared with the kernel's, and the difference applied. Knows
//! nothing of profiles, backends or states.
//!
//! - [`desired`]: the desired state and our names in the kernel
//! - [`Network`]: applying a desired state, and taking it back
//! - `plan`: from the observed to the desired state, as steps; pure
//! - [`Step`]: one change, its undo and its text
//! - `kernel`, `rtnl`, `observed`: the kernel's state over rtnetlink(7)
//! - `tun`, `sys`: the tunnel device
//! - `journal`: the record that changes are under way
//! - [`Keep`]: what outlives the process
//! - `preflight`: checks that change nothing
//! - [`Watch`]: when somebody changes the network
//! - [`Look`]: what others changed, put back
//! - [`Way`]: how the upstream is reached
//! - [`Devices`]: which devices lead out of this machine
//! - [`Finding`]: whether what was applied is still there
//! - `diag`: the kernel's table of sockets over sock_diag(7)
//! - [`SocketOwners`]: whose a connection of this machine is
//! - [`sockets`]: TCP sockets of this machine, and which of them began outside
//! - `cut`: ending the connections that cannot go on
//! - [`lock`]: a table of its own by which nothing leaves, with a daemon or without
//! - [`firewall`]: the nft table: a small value, compiled purely to rules, sent as one transaction

mod cut;
pub mod desired;
mod devices;
mod diag;
mod error;
pub mod firewall;
mod health;
mod journal;
mod keep;
mod kernel;
pub mod lock;
mod look;
#[cfg(test)]
pub(crate) mod model;
mod network;
mod observed;
mod owners;
mod plan;
mod preflight;
mod rtnl;
pub mod sockets;
mod step;
mod sys;
mod tun;
mod watch;
mod way;

pub use devices::Devices;
pub use error::Error;
use firewall::Backend;
pub use health::{Finding, Severity};
pub use keep::{Keep, Keeping};
pub use look::Look;
pub use network::{CleanUp, Network, Owned};
pub use owners::SocketOwners;
pub use preflight::privilege;
pub use step::{Action, Layer, Stage, Step};
pub use watch::Watch;
pub use way::{Cut, Way};
