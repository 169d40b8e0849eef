//! The DNS server of the tunnel's device, told to systemd-resolved (org.freedesktop.resolve1(5)): it asks each link's servers out of
//! that link, so that without this its questions would be bound to an uplink and refused.

use std::net::IpAddr;
use std::time::Duration;

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use zbus::Connection;

const RESOLVED: &str = "org.freedesktop.resolve1";
/// The kernel's word for the family, as systemd-resolved wants it.
const INET: i32 = 2;
const INET6: i32 = 10;
/// For all calls together.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Why systemd-resolved did not take the settings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such device.
    #[error("the network device {0} is not there")]
    Device(String, #[source] std::io::Error),
    /// It refused, or the bus did.
    #[error("systemd-resolved refuses the DNS settings of the tunnel device")]
    Refused(#[source] zbus::Error),
    /// It did not answer.
    #[error("systemd-resolved does not answer")]
    Silent,
}

#[zbus::proxy(
    interface = "org.freedesktop.resolve1.Manager",
    default_service = "org.freedesktop.resolve1",
    default_path = "/org/freedesktop/resolve1"
)]
trait Manager {
    #[zbus(name = "SetLinkDNS", no_autostart)]
    fn set_link_dns(&self, index: i32, servers: &[(i32, Vec<u8>)]) -> zbus::Result<()>;
    #[zbus(no_autostart)]
    fn set_link_domains(&self, index: i32, domains: &[(&str, bool)]) -> zbus::Result<()>;
    #[zbus(no_autostart)]
    fn set_link_default_route(&self, index: i32, enable: bool) -> zbus::Result<()>;
    #[zbus(name = "SetLinkLLMNR", no_autostart)]
    fn set_link_llmnr(&self, index: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkMulticastDNS", no_autostart)]
    fn set_link_multicast_dns(&self, index: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkDNSOverTLS", no_autostart)]
    fn set_link_dns_over_tls(&self, index: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkDNSSEC", no_autostart)]
    fn set_link_dnssec(&self, index: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(no_autostart)]
    fn revert_link(&self, index: i32) -> zbus::Result<()>;
}

/// Has systemd-resolved ask `server` out of `device` for every name that no other link has a domain for. The device must be up
/// and have an address. `false`: it does not run. The settings go with the device, or by [`revert`].
///
/// # Errors
/// [`Error`]; nothing is set then.
pub async fn configure(bus: &Connection, device: &str, server: IpAddr) -> Result<bool, Error> {
    within(async {
        if !runs(bus).await? {
            return Ok(false);
        }
        let (index, manager) = (index(device)?, ManagerProxy::new(bus).await.map_err(Error::Refused)?);
        let set = set(&manager, index, server).await;
        if set.is_err()
            && let Err(error) = manager.revert_link(index).await
        {
            tracing::debug!(%error, "systemd-resolved does not take its settings back");
        }
        set.map(|()| true).map_err(Error::Refused)
    })
    .await
}

/// Has systemd-resolved forget what [`configure`] told it. That it does not run, or the device has gone, is fine.
///
/// # Errors
/// [`Error`].
pub async fn revert(bus: &Connection, device: &str) -> Result<(), Error> {
    within(async {
        let Ok(index) = index(device) else { return Ok(()) };
        if !runs(bus).await? {
            return Ok(());
        }
        let manager = ManagerProxy::new(bus).await.map_err(Error::Refused)?;
        manager.revert_link(index).await.map_err(Error::Refused)
    })
    .await
}

/// What keeps programs from getting answers while DNS goes to a server of the tunnel's that is reached over IPv4 alone.
/// `servers`: those of `/etc/resolv.conf`; `configured`: what [`configure`] said.
#[must_use]
pub fn warning(servers: &[IpAddr], configured: bool) -> Option<String> {
    const HERE: &str = "A program on this machine answers DNS";
    let here = |server: &&IpAddr| server.to_canonical().is_loopback() || server.is_unspecified();
    if servers.iter().any(|server| !here(&server) && server.to_canonical().is_ipv4()) {
        return None;
    }
    let local: Vec<String> = servers.iter().filter(here).map(ToString::to_string).collect();
    if servers.is_empty() {
        return Some("/etc/resolv.conf names no DNS server, so names cannot be looked up. Add a line such as `nameserver 9.9.9.9`: the \
                     tunnel answers in the place of any IPv4 address".to_owned());
    }
    if local.is_empty() {
        return Some("/etc/resolv.conf names DNS servers by IPv6 addresses only; the tunnel has no IPv6, so names cannot be looked up. Add \
                     a line such as `nameserver 9.9.9.9`: the tunnel answers in the place of any IPv4 address".to_owned());
    }
    (!configured).then(|| {
        format!(
            "{HERE} ({}) that is not systemd-resolved. Its questions go into the tunnel if it sends them over UDP to IPv4 addresses and \
             from no certain device; otherwise they are refused, and names cannot be looked up",
            local.join(", ")
        )
    })
}

async fn within<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(TIMEOUT, work).await.unwrap_or(Err(Error::Silent))
}

/// Whether it is there; nobody is started for this.
async fn runs(bus: &Connection) -> Result<bool, Error> {
    let asked = async {
        let bus = zbus::fdo::DBusProxy::new(bus).await?;
        Ok(bus.name_has_owner(RESOLVED.try_into()?).await?)
    };
    asked.await.map_err(Error::Refused)
}

fn index(device: &str) -> Result<i32, Error> {
    let found = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .and_then(|socket| name_to_index(&socket, device));
    let failed = |source| Error::Device(device.to_owned(), source);
    let index = found.map_err(|error| failed(error.into()))?;
    i32::try_from(index).map_err(|error| failed(std::io::Error::other(error)))
}

/// The servers come last: before them nothing is asked here.
async fn set(manager: &ManagerProxy<'_>, index: i32, server: IpAddr) -> zbus::Result<()> {
    // There is nobody who could be asked by multicast, and Tor's resolver has neither TLS nor signatures.
    manager.set_link_llmnr(index, "no").await?;
    manager.set_link_multicast_dns(index, "no").await?;
    manager.set_link_dns_over_tls(index, "no").await?;
    manager.set_link_dnssec(index, "no").await?;
    // Every name; not one to be appended.
    manager.set_link_domains(index, &[(".", true)]).await?;
    manager.set_link_default_route(index, true).await?;
    let server = match server {
        IpAddr::V4(address) => (INET, address.octets().to_vec()),
        IpAddr::V6(address) => (INET6, address.octets().to_vec()),
    };
    manager.set_link_dns(index, &[server]).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::{Arc, Mutex};

    use std::os::unix::net::UnixStream;
    use zbus::Guid;
    use zbus::connection::Builder;

    use super::*;

    /// Stands in for systemd-resolved: writes down what it is asked, and refuses one call.
    struct Resolved {
        calls: Arc<Mutex<Vec<String>>>,
        refused: &'static str,
    }

    impl Resolved {
        fn call(&self, name: &str, what: impl std::fmt::Debug) -> zbus::fdo::Result<()> {
            self.calls.lock().unwrap().push(format!("{name} {what:?}"));
            if name == self.refused {
                Err(zbus::fdo::Error::InteractiveAuthorizationRequired("no".into()))
            } else {
                Ok(())
            }
        }
    }

    #[zbus::interface(name = "org.freedesktop.resolve1.Manager")]
    impl Resolved {
        #[zbus(name = "SetLinkDNS")]
        fn dns(&self, index: i32, servers: Vec<(i32, Vec<u8>)>) -> zbus::fdo::Result<()> {
            self.call("dns", (index, servers))
        }
        #[zbus(name = "SetLinkDomains")]
        fn domains(&self, index: i32, domains: Vec<(String, bool)>) -> zbus::fdo::Result<()> {
            self.call("domains", (index, domains))
        }
        #[zbus(name = "SetLinkDefaultRoute")]
        fn default_route(&self, index: i32, enable: bool) -> zbus::fdo::Result<()> {
            self.call("default-route", (index, enable))
        }
        #[zbus(name = "SetLinkLLMNR")]
        fn llmnr(&self, index: i32, mode: String) -> zbus::fdo::Result<()> {
            self.call("llmnr", (index, mode))
        }
        #[zbus(name = "SetLinkMulticastDNS")]
        fn mdns(&self, index: i32, mode: String) -> zbus::fdo::Result<()> {
            self.call("mdns", (index, mode))
        }
        #[zbus(name = "SetLinkDNSOverTLS")]
        fn tls(&self, index: i32, mode: String) -> zbus::fdo::Result<()> {
            self.call("tls", (index, mode))
        }
        #[zbus(name = "SetLinkDNSSEC")]
        fn dnssec(&self, index: i32, mode: String) -> zbus::fdo::Result<()> {
            self.call("dnssec", (index, mode))
        }
        #[zbus(name = "RevertLink")]
        fn revert(&self, index: i32) -> zbus::fdo::Result<()> {
            self.call("revert", index)
        }
    }

    /// Stands in for the bus.
    struct Bus(bool);

    #[zbus::interface(name = "org.freedesktop.DBus")]
    impl Bus {
        fn name_has_owner(&self, name: &str) -> bool {
            name == RESOLVED && self.0
        }
    }

    async fn told(runs: bool, refused: &'static str) -> (Result<bool, Error>, Result<(), Error>, Vec<String>) {
        let (client, server) = UnixStream::pair().unwrap();
        let calls = Arc::new(Mutex::new(vec![]));
        let resolved = Resolved { calls: calls.clone(), refused };
        let server = Builder::unix_stream(server).server(Guid::generate()).p2p();
        let server = server.serve_at("/org/freedesktop/resolve1", resolved);
        let server = server.serve_at("/org/freedesktop/DBus", Bus(runs)).build();
        let client = Builder::unix_stream(client).p2p().build();
        let (_server, client) = tokio::try_join!(server, client).unwrap();
        let configured = configure(&client, "lo", "10.10.10.1".parse().unwrap()).await;
        let reverted = revert(&client, "lo").await;
        let calls = std::mem::take(&mut *calls.lock().unwrap());
        (configured, reverted, calls)
    }

    #[tokio::test]
    async fn a_link_gets_its_server_for_every_name() {
        let (configured, reverted, calls) = told(true, "").await;
        assert!(configured.unwrap() && reverted.is_ok());
        let want = [
            r#"llmnr (1, "no")"#,
            r#"mdns (1, "no")"#,
            r#"tls (1, "no")"#,
            r#"dnssec (1, "no")"#,
            r#"domains (1, [(".", true)])"#,
            "default-route (1, true)",
            "dns (1, [(2, [10, 10, 10, 1])])",
            "revert 1",
        ];
        assert_eq!(calls, want);
    }

    #[tokio::test]
    async fn what_is_refused_leaves_nothing() {
        let (configured, _, calls) = told(true, "domains").await;
        assert!(matches!(configured, Err(Error::Refused(_))));
        assert_eq!(calls[4..], [r#"domains (1, [(".", true)])"#, "revert 1", "revert 1"]);
        let (configured, reverted, calls) = told(false, "").await;
        assert!(!configured.unwrap() && reverted.is_ok() && calls.is_empty());
    }

    #[tokio::test]
    async fn a_device_that_is_gone_has_no_settings() {
        let (client, server) = UnixStream::pair().unwrap();
        let server = Builder::unix_stream(server).server(Guid::generate()).p2p();
        let server = server.serve_at("/org/freedesktop/DBus", Bus(true)).build();
        let (_server, client) = tokio::try_join!(server, Builder::unix_stream(client).p2p().build()).unwrap();
        let server = "10.10.10.1".parse().unwrap();
        assert!(matches!(configure(&client, "none-such", server).await, Err(Error::Device(..))));
        assert!(revert(&client, "none-such").await.is_ok());
    }

    #[test]
    fn who_gets_no_answers_is_told() {
        let told = |servers: &str, configured| {
            let servers: Vec<IpAddr> = servers.split_whitespace().map(|server| server.parse().unwrap()).collect();
            warning(&servers, configured).unwrap_or_default()
        };
        for configured in [true, false] {
            assert_eq!(told("192.168.1.1", configured), "");
            assert_eq!(told("2001:db8::1 192.168.1.1", configured), "");
            assert_eq!(told("::ffff:192.168.1.1", configured), "");
            assert!(told("", configured).contains("names no DNS server"));
            assert!(told("2001:db8::1 fe80::1", configured).contains("IPv6 addresses only"));
        }
        assert_eq!(told("127.0.0.53", true), "");
        for local in ["127.0.0.1", "::1", "0.0.0.0", "127.0.0.1 2001:db8::1"] {
            assert!(told(local, false).contains("not systemd-resolved"), "{local}");
        }
    }
}
