//! From a profile to a desired network.

use std::net::IpAddr;

use proxyvpn_dbus::ReasonCode;

use crate::config::profile::{Backend, Profile};
use crate::machine::Failure;
use crate::net::desired::{Desired, Exceptions, Tunnel};
use crate::net::{self, firewall};
use crate::resolvers::{self, Resolvers};

/// The network that `profile` wants, and where its resolvers come from.
pub(super) fn desired(profile: &Profile) -> Result<(Desired, Resolvers), Failure> {
    if profile.backend == Backend::TorVm {
        return Err(Failure::new(
            ReasonCode::NotSupported,
            "The torvm backend is not in this version. Set backend = \"proxy\" in the profile",
        ));
    }
    let resolvers = resolvers::find(&profile.dns.servers, &resolvers::Paths::default());
    let tunnel =
        Tunnel { name: profile.tun.name.clone(), v4: profile.tun.cidr, v6: profile.tun.cidr6, mtu: profile.tun.mtu };
    let exceptions = Exceptions {
        lan: profile.protect.lan.clone(),
        resolvers: resolvers.addresses.clone(),
        users: profile.bypass_users.clone(),
    };
    let desired = Desired {
        tunnel: Some(tunnel),
        exceptions,
        killswitch: profile.protect.killswitch,
        inbound_replies: profile.protect.inbound_replies,
    };
    Ok((desired, resolvers))
}

/// `desired` without a way for the traffic.
pub(super) fn blocked(desired: &Desired) -> Desired {
    Desired { tunnel: None, ..desired.clone() }
}

/// The network when it is not known what was wanted: nothing leaves.
pub(super) fn closed() -> Desired {
    Desired { tunnel: None, exceptions: Exceptions::default(), killswitch: true, inbound_replies: true }
}

/// An error of the network in the user's words.
pub(super) fn failure(error: &net::Error) -> Failure {
    let code = match error {
        net::Error::Privilege | net::Error::Firewall(firewall::Error::Privilege) => ReasonCode::MissingCapability,
        net::Error::TunUnavailable(_) => ReasonCode::TunUnavailable,
        net::Error::NameTaken(_) => ReasonCode::TunExists,
        net::Error::TunnelMissing(_) => ReasonCode::DeviceLost,
        net::Error::Firewall(_) => ReasonCode::FirewallFailed,
        _ => ReasonCode::NetworkFailed,
    };
    Failure::from_error(code, error)
}

/// Addresses as text.
pub(super) fn texts(addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}
