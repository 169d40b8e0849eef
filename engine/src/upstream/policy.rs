//! Who may not be connected to, or sent datagrams to, whatever the upstream.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4};

use ipnet::IpNet;

use super::http::excerpt;
use super::{ConnectError, Connector, Target};

const DNS: u16 = 53;

/// Networks that a guest has no business in: all that is not the public Internet, above all this machine and what is near it
/// (the special-purpose registries of IANA, RFC 6890), and IPv6 networks that stand for IPv4 addresses.
pub const NOT_FOR_GUESTS: [IpNet; 25] = [
    // This network; loopback
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    // Private (RFC 1918), shared by a provider's customers (RFC 6598), link-local (clouds' metadata services)
    v4([10, 0, 0, 0], 8),
    v4([172, 16, 0, 0], 12),
    v4([192, 168, 0, 0], 16),
    v4([100, 64, 0, 0], 10),
    v4([169, 254, 0, 0], 16),
    // Protocol assignments; benchmarks, where local programs like to put addresses of their own
    v4([192, 0, 0, 0], 24),
    v4([198, 18, 0, 0], 15),
    // Groups; reserved, with broadcast
    v4([224, 0, 0, 0], 4),
    v4([240, 0, 0, 0], 4),
    // IPv4 inside: compatible (with loopback and unspecified), mapped, translated (SIIT, NAT64 twice), Teredo, 6to4
    v6([0, 0, 0, 0, 0, 0, 0, 0], 96),
    v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96),
    v6([0, 0, 0, 0, 0xffff, 0, 0, 0], 96),
    v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96),
    v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48),
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32),
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),
    // To be discarded; benchmarks; segment routing inside a domain
    v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64),
    v6([0x2001, 2, 0, 0, 0, 0, 0, 0], 48),
    v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16),
    // Private (RFC 4193), link-local, site-local, groups
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix)
}

const fn v6([a, b, c, d, e, f, g, h]: [u16; 8], prefix: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h)), prefix)
}

impl Connector {
    /// May somebody be connected to `target`?
    ///
    /// # Errors
    /// [`ConnectError::Forbidden`], or [`ConnectError::Name`] for a name where only certain addresses may be reached.
    pub(super) fn permits(&self, target: &Target) -> Result<(), ConnectError> {
        let address = match target {
            Target::Address(address) => address,
            // What it stands for only the upstream knows.
            Target::Name(name, _) if self.only.is_some() => {
                let problem = "only certain addresses may be reached, and no names";
                return Err(ConnectError::Name { name: excerpt(name.as_bytes()), problem });
            }
            Target::Name(..) => return Ok(()),
        };
        let wanted = self.only.as_ref().is_none_or(|only| only.contains(address));
        if wanted && self.lets(address.ip()) { Ok(()) } else { Err(ConnectError::Forbidden(address.ip())) }
    }

    /// May somebody send datagrams to `peer`? Where connections may go, but [`only`](Self::only) says nothing here, so nobody near is
    /// reached even if [`refused`](Self::refused) leaves that to it. Not to a DNS port: names are the host's to look up, and who sees
    /// such a question learns whom the guest is about to meet.
    ///
    /// # Errors
    /// [`ConnectError::Forbidden`].
    pub(crate) fn permits_datagrams(&self, peer: SocketAddrV4) -> Result<(), ConnectError> {
        let ip = IpAddr::V4(*peer.ip());
        let near = NOT_FOR_GUESTS.iter().any(|net| net.contains(&ip));
        let wanted = !near && ![0, DNS].contains(&peer.port());
        if wanted && self.lets(ip) { Ok(()) } else { Err(ConnectError::Forbidden(ip)) }
    }

    /// May anything go to `ip`, whoever is wanted there?
    fn lets(&self, ip: IpAddr) -> bool {
        // ::ffff:127.0.0.1 is 127.0.0.1 to the kernel.
        let plain = ip.to_canonical();
        let nobody = plain.is_unspecified()
            || plain.is_loopback()
            || plain.is_multicast()
            || matches!(plain, IpAddr::V4(v4) if v4.is_broadcast());
        let refused = self.refused.iter().any(|net| net.contains(&plain) || net.contains(&ip));
        !nobody && !refused
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use std::net::SocketAddr;
    use std::time::Duration;

    use super::super::Upstream;
    use super::*;

    fn connector(refused: &[IpNet], only: Option<&[&str]>) -> Connector {
        Connector {
            upstream: Upstream::Direct,
            mark: None,
            timeout: Duration::from_secs(1),
            refused: refused.to_vec(),
            only: only.map(|only| only.iter().map(|address| address.parse().unwrap()).collect()),
        }
    }

    fn permits(connector: &Connector, ip: IpAddr) -> bool {
        connector.permits(&Target::Address(SocketAddr::new(ip, 443))).is_ok()
    }

    /// First and last addresses, or one where the others are no different.
    const INSIDE: &str = "0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.0 127.255.255.255 169.254.0.0 \
        169.254.255.255 172.16.0.0 172.31.255.255 192.0.0.0 192.0.0.255 192.168.0.0 192.168.255.255 198.18.0.0 198.19.255.255 224.0.0.0 \
        239.255.255.255 240.0.0.0 255.255.255.254 255.255.255.255 :: ::1 ::7f00:1 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 \
        64:ff9b:1::1 100::1 2001::1 2001:2::1 2002:7f00:1::1 5f00::1 fc00::1 fdff::1 fe80::1 febf::1 fec0::1 feff::1 ff02::1";
    /// What lies next to them.
    const OUTSIDE: &str = "1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 \
        169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 \
        223.255.255.255 2001:1::1 2001:db8::1 2003::1 2606:4700::1111";

    #[test]
    fn a_guest_has_the_public_internet_and_nothing_else() {
        let guests = connector(&NOT_FOR_GUESTS, None);
        for ip in INSIDE.split_whitespace() {
            let ip: IpAddr = ip.parse().unwrap();
            // Some of them nobody can have, whoever asks: the list is not to rely on that.
            assert!(NOT_FOR_GUESTS.iter().any(|net| net.contains(&ip)), "{ip}");
            assert!(!permits(&guests, ip), "{ip}");
            if let IpAddr::V4(v4) = ip {
                assert!(!permits(&guests, v4.to_ipv6_mapped().into()), "{ip}, mapped");
            }
        }
        for ip in OUTSIDE.split_whitespace() {
            assert!(permits(&guests, ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn datagrams_reach_nobody_near_whatever_is_refused_or_wanted() {
        let permits =
            |connector: &Connector, ip, port| connector.permits_datagrams(SocketAddrV4::new(ip, port)).is_ok();
        let v4 = |text: &str| text.split_whitespace().filter_map(|ip| ip.parse().ok()).collect::<Vec<Ipv4Addr>>();
        let guests = connector(&NOT_FOR_GUESTS, None);
        let bridges = connector(&["192.0.2.1/32".parse().unwrap()], Some(&["192.0.2.1:443", "10.0.0.1:443"]));
        for connector in [&guests, &bridges] {
            assert!(v4(INSIDE).into_iter().all(|ip| !permits(connector, ip, 443)), "{connector:?}");
            assert!(v4(OUTSIDE).into_iter().all(|ip| permits(connector, ip, 443)), "{connector:?}");
            for (port, may) in [(0, false), (53, false), (54, true), (3478, true), (u16::MAX, true)] {
                assert_eq!(permits(connector, Ipv4Addr::new(1, 0, 0, 1), port), may, "port {port}");
            }
        }
        assert!((v4(INSIDE).len(), v4(OUTSIDE).len()) > (20, 15));
        assert!(!permits(&bridges, Ipv4Addr::new(192, 0, 2, 1), 443), "this machine's own");
    }

    #[test]
    fn only_means_address_and_port_and_no_name() {
        let bridges = connector(&[], Some(&["192.168.7.1:443", "[2001:db8::1]:443", "127.0.0.1:443"]));
        for ip in ["192.168.7.1", "2001:db8::1"] {
            assert!(permits(&bridges, ip.parse().unwrap()), "{ip}");
            let other = Target::Address(SocketAddr::new(ip.parse().unwrap(), 80));
            assert!(bridges.permits(&other).is_err(), "{other:?}");
        }
        assert!(!permits(&bridges, [192, 168, 7, 2].into()));
        assert!(!permits(&bridges, [127, 0, 0, 1].into()), "this machine is nobody's bridge");
        let name = Target::Name("bridge.example".to_owned(), 443);
        assert!(matches!(bridges.permits(&name), Err(ConnectError::Name { .. })));
        let own = ["192.168.7.1/32".parse().unwrap()];
        assert!(!permits(&connector(&own, Some(&["192.168.7.1:443"])), [192, 168, 7, 1].into()));
    }
}
