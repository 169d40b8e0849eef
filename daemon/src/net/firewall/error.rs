//! Errors of the firewall.

use std::{io, path::PathBuf};

/// Error of the firewall: what was tried and what helps; the cause is the source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A netlink socket could not be opened or used.
    #[error("talking to the kernel's firewall failed")]
    Socket(#[source] io::Error),
    /// The kernel did not answer a netlink message in time.
    #[error("the kernel's firewall did not answer within {0} seconds")]
    NoAnswer(u64),
    /// The capability is missing.
    #[error(
        "not allowed to change the firewall: the daemon lacks CAP_NET_ADMIN; start proxyvpnd with its systemd unit, or as root"
    )]
    Privilege,
    /// The kernel refused a part of the transaction; nothing was changed.
    #[error("the kernel refused the firewall at `{what}`{hint}")]
    Refused {
        /// What was refused, in nft notation.
        what: String,
        /// What to do, or empty.
        hint: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The table belongs to the socket of another process (nft's flag `owner`); nothing was changed.
    #[error("the firewall's table belongs to another process, and only that one can change it: end it, then try again")]
    Owned,
    /// What is installed is not what was sent: something else changes the table.
    #[error("the firewall was set, but reads back differently ({0}); does another program change the table?")]
    Differs(String),
    /// A device name that can't stand in a rule.
    #[error("{0:?} can't be used as a device name: use up to 15 letters, digits, '.', '_' and '-'")]
    Device(String),
    /// A program could not be run.
    #[error("running {program} failed")]
    Run {
        /// Its path.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program said no.
    #[error("{program} failed with {status}: {message}")]
    Program {
        /// Its path.
        program: PathBuf,
        /// Its exit status.
        status: String,
        /// The beginning of what it wrote to standard error.
        message: String,
    },
    /// A program did not end in time.
    #[error("{program} did not end within {seconds} seconds and was killed")]
    Slow {
        /// Its path.
        program: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// The kernel has no nf_tables, and the profile does not allow the fall-back.
    #[error(
        "nf_tables can't be used here, and iptables in its place would lose: {lost}. Load the kernel module nf_tables, or allow it: iptables-fallback = true in [protect] of the profile"
    )]
    FallbackNotAllowed {
        /// What iptables does not promise.
        lost: String,
    },
    /// Neither the kernel's own interface nor a program can be used.
    #[error("no firewall can be set, so nothing could be protected: {tried}. {advice}")]
    Unavailable {
        /// What was tried, with its error.
        tried: String,
        /// What to do.
        advice: &'static str,
    },
}

impl Error {
    /// Whether another program has the table, or changes it at the same time.
    pub fn taken(&self) -> bool {
        const CODES: [i32; 4] = [libc::EPERM, libc::EACCES, libc::EBUSY, libc::EEXIST];
        match self {
            Self::Owned | Self::Differs(_) => true,
            Self::Refused { source, .. } => source.raw_os_error().is_some_and(|code| CODES.contains(&code)),
            _ => false,
        }
    }
}
