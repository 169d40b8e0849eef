//! From a profile to what the guest is told, and to whom its Tor may speak.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use ipnet::IpNet;
use proxyvpn_dbus::ReasonCode;
use proxyvpn_engine::upstream::{Connector, NOT_FOR_GUESTS};
use proxyvpn_torvm::config::{GuestConfig, HashedPassword, Host, Login, Proxy};

use super::upstream::{LOOKUP_TIMEOUT, stored};
use crate::config::profile::{TorProxySpec, TorVmSpec};
use crate::lookup;
use crate::machine::Failure;
use crate::net::desired::MARK;

/// Looks up what the guest can't: it has no resolver on its way out. `resolvers` are asked over marked sockets.
pub(super) async fn find(
    spec: &TorVmSpec,
    control_password: HashedPassword,
    resolvers: &[IpAddr],
) -> Result<GuestConfig, Failure> {
    let proxy = match &spec.proxy {
        Some(proxy) => Some(found(proxy, resolvers).await?),
        None => None,
    };
    let mut hosts = Vec::new();
    for name in spec.tor.names() {
        let address = address(name.as_ref(), resolvers).await?;
        hosts.push(Host { name: name.clone(), address });
    }
    let hosts = hosts.try_into().map_err(|error| Failure::from_error(ReasonCode::VmFailed, &error))?;
    Ok(GuestConfig { control_password, tor: spec.tor.clone(), proxy, hosts })
}

/// Lets the guest reach what its Tor has to, and nothing else: above all nobody near, whatever addresses the networks `on_link` have.
pub(super) fn restrict(connector: &mut Connector, config: &GuestConfig, on_link: Vec<IpNet>) {
    connector.only = config.contacts();
    if connector.only.is_none() {
        connector.refused.extend(NOT_FOR_GUESTS);
        connector.refused.extend(on_link);
    }
}

async fn found(spec: &TorProxySpec, resolvers: &[IpAddr]) -> Result<Proxy, Failure> {
    let address = SocketAddrV4::new(address(&spec.host, resolvers).await?, spec.port);
    let credential =
        |error: &(dyn std::error::Error + 'static)| Failure::from_error(ReasonCode::CredentialUnavailable, error);
    let login = match (&spec.username, &spec.password) {
        (Some(user), Some(source)) => {
            let password = stored(source).await?;
            let user = user.clone().try_into().map_err(|error| credential(&error))?;
            let password = password.expose().to_owned().try_into().map_err(|error| credential(&error))?;
            Some(Login { user, password })
        }
        _ => None,
    };
    Ok(Proxy { kind: spec.kind, address, login })
}

/// The guest's way out is IPv4.
async fn address(name: &str, resolvers: &[IpAddr]) -> Result<Ipv4Addr, Failure> {
    let found = lookup::resolve(name, resolvers, Some(MARK), LOOKUP_TIMEOUT).await;
    let found = found.map_err(|error| Failure::from_error(ReasonCode::UpstreamUnresolvable, &error))?;
    let v4 = found.into_iter().find_map(|address| match address.to_canonical() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    });
    v4.ok_or_else(|| {
        let text = format!("{name} has no IPv4 address, and Tor's way out of the virtual machine has no IPv6");
        Failure::new(ReasonCode::UpstreamUnresolvable, text)
    })
}
