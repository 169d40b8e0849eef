//! The firewall: a small value, compiled purely to rules, sent as one transaction, read back.
//!
//! - `compile`: desired state to rules, without side effects
//! - [`holders`]: which processes hold the socket that the table belongs to
//! - `lock`: the table that holds without a daemon
//! - `rules`: the rules as a value, in the terms of nftables
//! - `text`: the rules in nft notation
//! - `netlink`: sent by libnftnl over netlink; needs `CAP_NET_ADMIN` only
//! - `nft`, `iptables`: fall-backs through the administrator's programs, as root only
//! - `program`: running such a program with bounded time and output
//! - [`Backend`]: chooses one of the three

mod backend;
mod compile;
mod error;
mod holder;
mod iptables;
pub(super) mod lock;
mod netlink;
mod nft;
mod program;
mod rules;
mod text;

pub use backend::{Abilities, Backend, Owner};
pub use compile::{BYPASS_CT_MARK, MAX_SESSIONS, compile};
pub use error::Error;
pub use holder::{Holder, holders};
pub use iptables::Programs;
pub use rules::Ruleset;
