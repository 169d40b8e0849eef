//! Checks that change nothing.

use rustix::thread::{CapabilitySet, capabilities};

use super::desired::{Desired, TABLE};
use super::observed::Observed;
use super::{Error, tun};

/// `CAP_NET_ADMIN` is effective (capabilities(7)).
///
/// # Errors
/// [`Error::Privilege`], or [`Error::Read`] when the kernel does not tell.
pub fn privilege() -> Result<(), Error> {
    let held = capabilities(None).map_err(|e| Error::Read { what: "the daemon's capabilities", source: e.into() })?;
    if held.effective.contains(CapabilitySet::NET_ADMIN) { Ok(()) } else { Err(Error::Privilege) }
}

/// The driver can be opened.
pub(super) fn tun() -> Result<(), Error> {
    tun::open().map(drop).map_err(Error::TunUnavailable)
}

/// Nobody else uses our names.
pub(super) fn free(observed: &Observed, desired: &Desired) -> Result<(), Error> {
    if let Some(tunnel) = &desired.tunnel
        && observed.link(&tunnel.name).is_some_and(|link| !link.ours)
    {
        return Err(Error::NameTaken(tunnel.name.clone()));
    }
    table_free(observed)
}

/// A route of somebody else in our table would lead traffic around the tunnel.
pub(super) const fn table_free(observed: &Observed) -> Result<(), Error> {
    match observed.foreign_routes {
        0 => Ok(()),
        count => Err(Error::TableTaken { table: TABLE, count }),
    }
}
