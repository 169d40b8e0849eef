//! From a profile to a desired network.

use std::net::IpAddr;

use proxyvpn_dbus::ReasonCode;

use crate::config::profile::{Backend, ForwardSpec, Profile, TunSpec};
use crate::machine::Failure;
use crate::net::desired::{Desired, Exceptions, Forward, Locked, Tunnel};
use crate::net::{self, Cut, firewall};
use crate::resolvers::{self, Resolvers};

/// The network that `profile` wants, and where its resolvers come from.
pub(super) fn desired(profile: &Profile) -> Result<(Desired, Resolvers), Failure> {
    if profile.backend == Backend::TorVm {
        return Err(Failure::new(
            ReasonCode::NotSupported,
            "The torvm backend is not in this version. Set backend = \"proxy\" in the profile",
        ));
    }
    Ok(wanted(profile))
}

fn wanted(profile: &Profile) -> (Desired, Resolvers) {
    let resolvers = resolvers::find(&profile.dns.servers, &resolvers::Paths::default());
    let guarded = guarded(&profile.tun);
    let exceptions = Exceptions {
        lan: profile.protect.lan.clone(),
        resolvers: resolvers.addresses.clone(),
        users: profile.bypass_users.clone(),
        services: vec![],
    };
    let desired = Desired {
        tunnel: Some(tunnel(&profile.tun)),
        guarded,
        exceptions,
        steer_dns: false,
        killswitch: profile.protect.killswitch,
        inbound_replies: profile.protect.inbound_replies,
        locked: Locked::No,
        forward: match profile.protect.forward {
            ForwardSpec::Block => Forward::Block,
            ForwardSpec::Tunnel => Forward::Tunnel,
        },
        iptables_fallback: profile.protect.iptables_fallback,
    };
    (desired, resolvers)
}

/// Addresses of the device, which may still be there, or come while this is in force.
fn guarded(tun: &TunSpec) -> Vec<IpAddr> {
    vec![IpAddr::V4(tun.cidr.addr()), IpAddr::V6(tun.cidr6.addr())]
}

/// The device that `tun` describes.
pub(super) fn tunnel(tun: &TunSpec) -> Tunnel {
    Tunnel { name: tun.name.clone(), v4: tun.cidr, v6: Some(tun.cidr6), mtu: tun.mtu, gateway: None }
}

/// The network of `profile` without a way for the traffic. Also for what cannot be connected: it may be wanted all the same.
pub(super) fn blocked(profile: &Profile) -> (Desired, Option<Resolvers>) {
    let (desired, resolvers) = wanted(profile);
    (Desired { tunnel: None, ..desired }, Some(resolvers))
}

/// The network when it is not known what was wanted: nothing leaves.
pub(super) fn closed() -> Desired {
    Desired {
        tunnel: None,
        guarded: guarded(&TunSpec::default()),
        exceptions: Exceptions::default(),
        steer_dns: false,
        killswitch: true,
        inbound_replies: true,
        forward: Forward::Block,
        iptables_fallback: true,
        locked: Locked::No,
    }
}

/// The same under lockdown, if it is.
pub(super) fn idle() -> Desired {
    Desired { locked: Locked::Idle, ..closed() }
}

/// An error of the network in the user's words.
pub(super) fn failure(error: &net::Error) -> Failure {
    let code = match error {
        net::Error::Privilege | net::Error::Firewall(firewall::Error::Privilege) => ReasonCode::MissingCapability,
        net::Error::TunUnavailable(_) => ReasonCode::TunUnavailable,
        net::Error::NameTaken(_) => ReasonCode::TunExists,
        net::Error::TunnelMissing(_) => ReasonCode::DeviceLost,
        net::Error::Firewall(error) if error.taken() => ReasonCode::FirewallTaken,
        net::Error::Firewall(_) => ReasonCode::FirewallFailed,
        net::Error::TableTaken { .. } | net::Error::Differs(_) => ReasonCode::RoutesTaken,
        _ => ReasonCode::NetworkFailed,
    };
    Failure::from_error(code, error)
}

/// Why nothing can reach the upstream, in the user's words.
pub(super) fn cut(cut: &Cut) -> Failure {
    let (code, text) = match cut {
        Cut::NoConnection => (
            ReasonCode::NoUplink,
            "The network is down: no network device of this machine has a connection. Plug in a cable or join a Wi-Fi; the rest \
             follows by itself"
                .to_owned(),
        ),
        Cut::NoCarrier(device) => (
            ReasonCode::NoUplink,
            format!("The network is down: the device {device} has no connection. Plug in its cable or join its network; the rest follows by itself"),
        ),
        Cut::NoDefaultRoute => (
            ReasonCode::NoUplink,
            "The network is down: this machine has no default route (`ip route`). Does the network give it an address? The rest \
             follows by itself"
                .to_owned(),
        ),
        Cut::NoRoute(addresses) => (
            ReasonCode::NoRoute,
            format!(
                "There is a network, but this machine has no route to the proxy ({}). Look at `ip route get {}`",
                texts(addresses).join(", "),
                addresses.first().map(ToString::to_string).unwrap_or_default()
            ),
        ),
    };
    Failure::new(code, text)
}

/// Addresses as text.
pub(super) fn texts(addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_connected_can_be_blocked() {
        let text = "backend = \"torvm\"\nautoconnect = true\n[protect]\nlan = [\"192.168.1.0/24\"]";
        let profile = crate::config::parse::profile("tor", "tor.toml", text).unwrap();
        assert_eq!(desired(&profile).unwrap_err().code, ReasonCode::NotSupported);
        let (blocked, _) = blocked(&profile);
        assert!(blocked.tunnel.is_none() && blocked.killswitch);
        assert_eq!(blocked.exceptions.lan, profile.protect.lan);
    }
}
