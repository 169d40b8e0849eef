//! Errors of the network.

use std::io;
use std::path::PathBuf;

use super::firewall;

/// Error of the network: what was tried and what helps; the cause is the source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The netlink socket could not be opened.
    #[error("connecting to the kernel's network configuration (rtnetlink) failed")]
    Connect(#[source] io::Error),
    /// A part of the network could not be read.
    #[error("reading {what} from the kernel failed")]
    Read {
        /// What was read.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The capability is missing.
    #[error(
        "not allowed to change the network: the daemon lacks CAP_NET_ADMIN; start proxyvpnd with its systemd unit, or as root"
    )]
    Privilege,
    /// `/dev/net/tun` is missing or closed to us.
    #[error(
        "no tunnel device can be made: /dev/net/tun can't be opened; load the kernel module tun (modprobe tun) and let the daemon open the file"
    )]
    TunUnavailable(#[source] io::Error),
    /// A device of that name is there and not ours.
    #[error(
        "a network device {0} exists and is not proxyvpn's; give the profile another name (tun.name) or remove the device"
    )]
    NameTaken(String),
    /// Another program has routes in our table.
    #[error(
        "routing table {table} holds {count} routes that are not proxyvpn's, and what they match would go around the tunnel; remove them (ip route show table {table})"
    )]
    TableTaken {
        /// Number of the table.
        table: u32,
        /// How many routes.
        count: usize,
    },
    /// The tunnel device could not be made.
    #[error("making the tunnel device {name} failed")]
    Create {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tunnel device has gone.
    #[error("the tunnel device {0} is not there")]
    TunnelMissing(String),
    /// The kernel refused a step. What was done before it was taken back.
    #[error("the kernel refused `{step}`{hint}")]
    Step {
        /// Layer, action and object.
        step: String,
        /// What to do, or empty.
        hint: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was set is not there. What was done was taken back.
    #[error("the network was set, but reads back differently ({0}); does another program change it?")]
    Differs(String),
    /// Something was removed and is there again.
    #[error("`{0}` was done, but it is still to be done; does another program put it back?")]
    StillThere(String),
    /// The record of changes could not be written.
    #[error("writing the journal {path} failed")]
    Journal {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The firewall.
    #[error(transparent)]
    Firewall(#[from] firewall::Error),
}
