//! From a profile to what the guest is told, and to whom its Tor may speak.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use futures_util::FutureExt as _;
use futures_util::future::{join_all, try_join, try_join_all};
use ipnet::IpNet;
use proxyvpn_dbus::ReasonCode;
use proxyvpn_engine::upstream::{Connector, NOT_FOR_GUESTS};
use proxyvpn_torvm::config::{GuestConfig, HashedPassword, Host, HostName, Login, MAX_HOSTS, Proxy, TorSettings};

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
    let hosts = hosts(&spec.tor, resolvers).await?;
    let hosts = hosts.try_into().map_err(|error| Failure::from_error(ReasonCode::VmFailed, &error))?;
    Ok(GuestConfig { control_password, tor: spec.tor.clone(), proxy, hosts })
}

/// Every front, and of the STUN servers those that have an address, as many as there is room for. All are looked up at once.
async fn hosts(tor: &TorSettings, resolvers: &[IpAddr]) -> Result<Vec<Host>, Failure> {
    let host = |name: &HostName| {
        let name = name.clone();
        async move { Ok(Host { address: address(name.as_ref(), resolvers).await?, name }) }
    };
    let fronts: BTreeSet<_> = tor.names().collect();
    let mut stun: BTreeSet<_> = tor.stun().collect();
    stun.retain(|name| !fronts.contains(name));
    let stun = stun.into_iter().take(MAX_HOSTS - fronts.len().min(MAX_HOSTS)).map(host);
    let all = try_join(try_join_all(fronts.into_iter().map(host)), join_all(stun).map(Ok)).await;
    let (mut hosts, stun): (Vec<Host>, Vec<Result<Host, Failure>>) = all?;
    let asked = stun.len();
    let (found, failed): (Vec<_>, Vec<_>) = stun.into_iter().partition(Result::is_ok);
    if let Some(Err(failure)) = failed.first() {
        // A volunteer that can be reached from anywhere needs none of them.
        tracing::warn!("{} of {asked} STUN servers of snowflake have no address: {}", failed.len(), failure.text);
    }
    hosts.extend(found.into_iter().flatten());
    Ok(hosts)
}

/// Lets the guest reach what its Tor has to, and nothing else: above all nobody near, whatever addresses the networks `on_link` have.
/// A bridge that was named may be near; but what holds for UDP holds for TCP too.
pub(super) fn restrict(connector: &mut Connector, config: &GuestConfig, on_link: Vec<IpNet>) {
    connector.only = config.contacts();
    if connector.only.is_none() || config.tor.udp() {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::net::SocketAddr;
    use std::time::Duration;

    use proxyvpn_engine::upstream::Upstream;
    use proxyvpn_torvm::config::{Bridge, Entry};

    use super::*;

    fn tor(bridges: &[&str]) -> TorSettings {
        let bridges: Vec<Bridge> = bridges.iter().map(|line| line.parse().unwrap()).collect();
        TorSettings { entry: Entry::Bridges(bridges.try_into().unwrap()), ..TorSettings::default() }
    }

    fn restricted(tor: TorSettings) -> Connector {
        let control_password = format!("16:{}", "0".repeat(58)).try_into().unwrap();
        let host = Host { name: "front.example".parse().unwrap(), address: [203, 0, 113, 1].into() };
        let hosts = vec![host].try_into().unwrap();
        let config = GuestConfig { control_password, tor, proxy: None, hosts };
        let refused = vec!["198.51.100.7/32".parse().unwrap()];
        let mut connector =
            Connector { upstream: Upstream::Direct, mark: None, timeout: Duration::from_secs(1), refused, only: None };
        restrict(&mut connector, &config, vec!["203.0.113.128/25".parse().unwrap()]);
        connector
    }

    const SNOWFLAKE: &str = "snowflake 192.0.2.3:80 url=https://front.example/ ice=stun:stun.example";

    #[test]
    fn nobody_near_is_reached_where_whom_tor_contacts_is_not_known_before() {
        let near = |connector: &Connector| {
            let refuses = |ip: &str| connector.refused.iter().any(|net| net.contains(&ip.parse::<IpAddr>().unwrap()));
            assert!(refuses("198.51.100.7"), "this machine");
            assert!(!refuses("203.0.113.1"));
            let (private, on_link) = (refuses("192.168.0.1"), refuses("203.0.113.200"));
            assert_eq!(private, on_link);
            !private
        };
        let any = restricted(TorSettings::default());
        assert!(any.only.is_none() && !near(&any));
        let bridges = restricted(tor(&["192.168.0.1:443", "obfs4 192.0.2.1:443 cert=a"]));
        assert!(bridges.only.is_some_and(|only| only.len() == 2) && near(&restricted(tor(&["192.168.0.1:443"]))));
        let snowflake = restricted(tor(&["192.168.0.1:443", SNOWFLAKE]));
        assert!(!near(&snowflake), "UDP is judged by this list alone");
        let front: SocketAddr = "203.0.113.1:443".parse().unwrap();
        assert_eq!(snowflake.only, Some(vec!["192.168.0.1:443".parse().unwrap(), front]));
    }

    #[tokio::test]
    async fn without_a_front_there_is_no_way_and_without_a_stun_server_there_is() {
        // Without resolvers only what /etc/hosts has is known.
        let found = async |line: &str| hosts(&tor(&[line, SNOWFLAKE]), &[]).await;
        let line =
            "snowflake 192.0.2.3:80 url=https://localhost/ ice=stun:other.example,stun:stun.example,stun:192.0.2.9";
        assert!(found(line).await.is_err(), "the second bridge's front");
        let both = hosts(&tor(&[line, &SNOWFLAKE.replace("front.example", "localhost")]), &[]).await.unwrap();
        assert_eq!(both, [Host { name: "localhost".parse().unwrap(), address: Ipv4Addr::LOCALHOST }]);
        let line = "snowflake 192.0.2.3:80 url=https://other.example/ ice=stun:localhost";
        assert!(hosts(&tor(&[line]), &[]).await.is_err());
        let line = "snowflake 192.0.2.3:80 url=https://localhost/ ice=stun:localhost:1,stun:LOCALHOST:2";
        assert_eq!(hosts(&tor(&[line, line]), &[]).await.unwrap().len(), 1, "a name is looked up once");
    }
}
