//! Tor's configuration, from fields that each were checked. No text of the configuration reaches it by another way.

use std::fmt::Write as _;

use crate::config::GuestConfig;
use crate::link::{CONTROL_PORT, DNS_PORT, GUEST, ONION_NETWORK, SOCKS_PORT, TRANS_PORT};

/// Writes it. `state`: Tor's directory.
#[must_use]
pub fn render(config: &GuestConfig, state: &str) -> String {
    let (network, prefix) = ONION_NETWORK;
    let mut torrc = format!(
        "DataDirectory {state}\n\
         SocksPort {GUEST}:{SOCKS_PORT} IsolateSOCKSAuth IsolateDestAddr\n\
         TransPort {GUEST}:{TRANS_PORT}\n\
         DNSPort {GUEST}:{DNS_PORT}\n\
         ControlPort {GUEST}:{CONTROL_PORT}\n\
         AutomapHostsOnResolve 1\n\
         VirtualAddrNetworkIPv4 {network}/{prefix}\n\
         ClientRejectInternalAddresses 1\n\
         ClientOnly 1\n\
         Log notice stdout\n\
         AvoidDiskWrites 1\n"
    );
    // A String takes everything.
    let _ = writeln!(torrc, "HashedControlPassword {}", config.control_password.as_ref());
    torrc
}
