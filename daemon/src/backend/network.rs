//! From a profile to a desired network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::Ipv4Net;
use proxyvpn_dbus::ReasonCode;
use proxyvpn_torvm::link;

use crate::config::profile::{Backend, ForwardSpec, Profile, TunSpec, UpstreamSpec};
use crate::machine::Failure;
use crate::net::desired::{Control, Desired, Exceptions, Forward, Gateway, Locked, Tunnel};
use crate::net::{self, Cut, firewall};
use crate::resolvers::{self, Resolvers};

/// The network that `profile` wants, and where its resolvers come from.
pub(super) fn desired(profile: &Profile) -> (Desired, Resolvers) {
    let resolvers = resolvers::find(&profile.dns.servers, &resolvers::Paths::default());
    let tunnel = tunnel(profile);
    let tor = profile.backend == Backend::TorVm;
    let exceptions = Exceptions {
        lan: profile.protect.lan.clone(),
        // Every name is Tor's to look up.
        resolvers: if tor { vec![] } else { resolvers.addresses.clone() },
        users: profile.bypass_users.clone(),
        services: services(&profile.upstream),
    };
    let desired = Desired {
        guarded: tunnel.addresses().collect(),
        tunnel: Some(tunnel),
        exceptions,
        steer_dns: tor,
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

/// Where the upstream is if it runs on this machine, as far as the profile tells.
fn services(upstream: &UpstreamSpec) -> Vec<SocketAddr> {
    let local: &[IpAddr] = &[IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let named = if upstream.host == "localhost" { local } else { &[] };
    let given = upstream.host.parse().ok().into_iter().chain(upstream.addresses.iter().copied());
    given.chain(named.iter().copied()).map(|address| SocketAddr::new(address, upstream.port)).collect()
}

/// The device that `profile` describes.
pub(super) fn tunnel(profile: &Profile) -> Tunnel {
    match profile.backend {
        Backend::Proxy => tun(&profile.tun),
        Backend::TorVm => tap(profile.tun.name.clone()),
    }
}

/// The device into the engine.
pub(super) fn tun(tun: &TunSpec) -> Tunnel {
    Tunnel { name: tun.name.clone(), v4: tun.cidr, v6: Some(tun.cidr6), mtu: tun.mtu, gateway: None }
}

/// The device into the virtual machine, whose addresses are what its image knows.
fn tap(name: String) -> Tunnel {
    let control = Control { port: link::CONTROL_PORT, user: rustix::process::geteuid().as_raw() };
    let (mac, own_mac) = (link::GUEST_MAC, link::HOST_MAC);
    Tunnel {
        name,
        v4: Ipv4Net::new_assert(link::HOST, link::PREFIX),
        v6: None,
        mtu: link::HOST_MTU,
        gateway: Some(Gateway { address: link::GUEST, mac, own_mac, control }),
    }
}

/// The network of `profile` without a way for the traffic. Also for what cannot be connected: it may be wanted all the same.
pub(super) fn blocked(profile: &Profile) -> (Desired, Option<Resolvers>) {
    let (desired, resolvers) = desired(profile);
    (Desired { tunnel: None, ..desired }, Some(resolvers))
}

/// The network when it is not known what was wanted: nothing leaves.
pub(super) fn closed() -> Desired {
    let guarded = tun(&TunSpec::default()).addresses().collect();
    Desired { guarded, iptables_fallback: true, ..Desired::closed() }
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
        let (blocked, _) = blocked(&profile);
        assert!(blocked.tunnel.is_none() && blocked.killswitch);
        assert_eq!(blocked.exceptions.lan, profile.protect.lan);
    }

    #[test]
    fn an_upstream_that_may_run_here_can_be_reached() {
        let services = |upstream: &str| {
            let text = format!("backend = \"torvm\"\n[upstream]\n{upstream}");
            let profile = crate::config::parse::profile("tor", "tor.toml", &text).unwrap();
            desired(&profile).0.exceptions.services.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(services(r#"url = "direct://""#), "");
        assert_eq!(services(r#"url = "http://127.0.0.1:3128""#), "127.0.0.1:3128");
        assert_eq!(services(r#"url = "http://[::1]:3128""#), "[::1]:3128");
        assert_eq!(services(r#"url = "http://localhost:3128""#), "127.0.0.1:3128 [::1]:3128");
        assert_eq!(services("url = \"http://proxy.example:3128\"\naddresses = [\"192.0.2.1\"]"), "192.0.2.1:3128");
    }
}
