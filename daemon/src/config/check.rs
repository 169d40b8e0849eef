//! The rules of single values, the same for files and for callers on the bus.

use std::ffi::CString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::error::Rejected;
use super::{sys, url};

/// Most entries of `upstream.addresses`.
pub const MAX_ADDRESSES: usize = 16;
/// Most entries of `dns.servers`.
pub const MAX_RESOLVERS: usize = 8;
/// Most entries of `protect.lan`.
pub const MAX_LAN: usize = 64;
/// Most entries of `bypass.users`.
pub const MAX_USERS: usize = 64;

/// Where a "LAN" may lie. A prefix that covers public addresses would send their traffic past the tunnel, which a hostile
/// network could bring about by handing out such a range (TunnelCrack, CVE-2023-36672).
const LAN: [IpNet; 7] = [
    v4(10, 0, 0, 0, 8),
    v4(172, 16, 0, 0, 12),
    v4(192, 168, 0, 0, 16),
    v4(169, 254, 0, 0, 16),
    v4(100, 64, 0, 0, 10),
    v6(0xfc00, 7),
    v6(0xfe80, 10),
];

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix))
}

const fn v6(first: u16, prefix: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), prefix))
}

/// A profile's name: 1 to 64 of `[A-Za-z0-9._-]`, not starting with `.` or `-`, and not `adhoc`.
///
/// # Errors
/// Which rule it breaks.
pub fn profile_name(name: &str) -> Result<(), Rejected> {
    if name == "adhoc" {
        return Err(Rejected::new("\"adhoc\" stands for connections without a profile; choose another name"));
    }
    let fits = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with(['.', '-']);
    if fits {
        return Ok(());
    }
    Err(Rejected::new(format!(
        "\"{name}\" cannot be a profile's name: use 1 to 64 letters, digits and . _ -, with no . or - in front"
    )))
}

/// A host name (RFC 1123, with `_`) or an IPv4 address.
///
/// # Errors
/// Which rule it breaks.
pub fn host(host: &str) -> Result<String, Rejected> {
    if host.is_empty() {
        return Err(Rejected::new("the host name is empty"));
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return proxy_address(address).map(|address| address.to_string());
    }
    if !host.is_ascii() {
        return Err(Rejected::new(format!("\"{host}\" has letters outside ASCII; write it in its xn-- form")));
    }
    if url::is_odd_number(host) {
        return Err(Rejected::new(format!(
            "\"{host}\" is not an IPv4 address; write all four parts as decimal numbers"
        )));
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if host.len() > 254 || !host.strip_suffix('.').unwrap_or(host).split('.').all(label) {
        return Err(Rejected::new(format!("\"{host}\" is not a host name")));
    }
    Ok(host.to_owned())
}

/// A TCP port, decimal.
///
/// # Errors
/// Outside 1 to 65535 or no number.
pub fn port(port: &str) -> Result<u16, Rejected> {
    Some(port)
        .filter(|port| port.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|port| port.parse().ok())
        .filter(|&port| port != 0)
        .ok_or_else(|| Rejected::new(format!("\"{port}\" is not a port; use a number from 1 to 65535")))
}

/// An address that one can connect to.
///
/// # Errors
/// Unspecified, multicast and broadcast addresses.
pub fn proxy_address(address: IpAddr) -> Result<IpAddr, Rejected> {
    unicast(address).map_err(|()| Rejected::new(format!("{address} cannot be a proxy's address")))
}

/// An address of a resolver.
///
/// # Errors
/// Unspecified, multicast and broadcast addresses.
pub fn resolver(address: IpAddr) -> Result<IpAddr, Rejected> {
    unicast(address).map_err(|()| Rejected::new(format!("{address} cannot be a resolver's address")))
}

fn unicast(address: IpAddr) -> Result<IpAddr, ()> {
    let address = address.to_canonical();
    let bad = address.is_unspecified() || address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST);
    if bad { Err(()) } else { Ok(address) }
}

/// A user name for the proxy (RFC 7617 section 2).
///
/// # Errors
/// Empty, longer than 255 bytes, with a colon or a control character.
pub fn username(name: &str) -> Result<String, Rejected> {
    let problem = if name.is_empty() {
        "the user name is empty; leave it out instead"
    } else if name.len() > 255 {
        "the user name is longer than 255 bytes"
    } else if name.contains(':') {
        "a user name with a colon cannot be sent to a proxy (RFC 7617)"
    } else if name.chars().any(char::is_control) {
        "the user name has a control character"
    } else {
        return Ok(name.to_owned());
    };
    Err(Rejected::new(problem))
}

/// A name for the tunnel device. Narrower than the kernel's rule (`dev_valid_name`): `%`, `+` and `*` are patterns in other
/// tools, and `all` and `default` are names in `/proc/sys/net`.
///
/// # Errors
/// Which rule it breaks.
pub fn device_name(name: &str) -> Result<String, Rejected> {
    let fits = (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with(['.', '-']);
    if !fits {
        return Err(Rejected::new(format!(
            "\"{name}\" cannot be a device's name: use 1 to 15 letters, digits and . _ -, with no . or - in front"
        )));
    }
    if ["lo", "all", "default"].contains(&name) {
        return Err(Rejected::new(format!("\"{name}\" is taken by the system; choose another name, such as pvpn0")));
    }
    Ok(name.to_owned())
}

/// The device's IPv4 address with its prefix.
///
/// # Errors
/// Not of the form, a network or broadcast address, or wider than /8.
pub fn cidr(text: &str) -> Result<Ipv4Net, Rejected> {
    let net: Ipv4Net = text.parse().map_err(|_| {
        Rejected::new(format!("\"{text}\" is not an IPv4 address with its prefix, such as 10.255.255.1/30"))
    })?;
    let address = net.addr();
    if net.prefix_len() < 8 {
        return Err(Rejected::new(format!("/{} is too wide for a tunnel device; use /8 to /32", net.prefix_len())));
    }
    if net.prefix_len() < 31 && (address == net.network() || address == net.broadcast()) {
        return Err(Rejected::new(format!(
            "{address} is the network's or the broadcast address of {}; use one between them",
            net.trunc()
        )));
    }
    if unicast(IpAddr::V4(address)).is_err() || address.is_loopback() {
        return Err(Rejected::new(format!("{address} cannot be a device's address")));
    }
    Ok(net)
}

/// The device's IPv6 address with its prefix.
///
/// # Errors
/// Not of the form, the network's address, or wider than /32.
pub fn cidr6(text: &str) -> Result<Ipv6Net, Rejected> {
    let net: Ipv6Net = text.parse().map_err(|_| {
        Rejected::new(format!("\"{text}\" is not an IPv6 address with its prefix, such as fd70:7670:6e::1/64"))
    })?;
    let address = net.addr();
    if net.prefix_len() < 32 {
        return Err(Rejected::new(format!("/{} is too wide for a tunnel device; use /32 to /128", net.prefix_len())));
    }
    if net.prefix_len() < 127 && address == net.network() {
        return Err(Rejected::new(format!(
            "{address} is the network's own address; use a later one of {}",
            net.trunc()
        )));
    }
    if unicast(IpAddr::V6(address)).is_err() || address.is_loopback() || address.to_ipv4_mapped().is_some() {
        return Err(Rejected::new(format!("{address} cannot be a device's address")));
    }
    Ok(net)
}

/// The device's MTU in bytes; IPv6 needs 1280 (RFC 8200 section 5).
///
/// # Errors
/// Outside 1280 to 65535.
pub fn mtu(mtu: i64) -> Result<u16, Rejected> {
    u16::try_from(mtu)
        .ok()
        .filter(|&mtu| mtu >= 1280)
        .ok_or_else(|| Rejected::new(format!("an MTU of {mtu} is not possible; use 1280 to 65535 bytes")))
}

/// A prefix that goes around the tunnel; a lone address is its own prefix.
///
/// # Errors
/// Not a prefix, bits set behind it, or not within private, link-local, unique-local or carrier-grade NAT addresses.
pub fn lan(text: &str) -> Result<IpNet, Rejected> {
    let net = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse().map_err(|_| {
            Rejected::new(format!("\"{text}\" is not an address with its prefix, such as 192.168.1.0/24"))
        })?,
    };
    if net != net.trunc() {
        return Err(Rejected::new(format!("{net} has bits behind its prefix; write {}", net.trunc())));
    }
    if !LAN.iter().any(|range| range.contains(&net)) {
        return Err(Rejected::new(format!(
            "{net} is not a local network: traffic to public addresses would go past the tunnel; allowed are parts of \
             10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16, 100.64.0.0/10, fc00::/7 and fe80::/10"
        )));
    }
    Ok(net)
}

/// A local user by name or number, as an id. A number need not have an entry in the user database.
///
/// # Errors
/// An unknown user, root, or a user database that does not answer.
pub fn bypass_user(user: &str) -> Result<u32, Rejected> {
    let id = match user.parse::<u32>() {
        Ok(id) => id,
        Err(_) => {
            let unknown = || Rejected::new(format!("there is no user \"{user}\" on this machine"));
            let name = CString::new(user).ok().filter(|_| (1..=256).contains(&user.len())).ok_or_else(unknown)?;
            sys::user_id(&name)
                .map_err(|error| Rejected::new(format!("cannot look up the user \"{user}\": {error}")))?
                .ok_or_else(unknown)?
        }
    };
    match id {
        0 => Err(Rejected::new(
            "root cannot go around the tunnel: much that serves every user runs as root; let the program run as a user of \
             its own",
        )),
        // (uid_t)-1 means "no user" to the kernel.
        u32::MAX => Err(Rejected::new(format!("{id} is not a user's id"))),
        id => Ok(id),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Each value with `None` when it is accepted, or a part of what the user reads.
    fn table<T: std::fmt::Debug>(check: impl Fn(&str) -> Result<T, Rejected>, rows: &[(&str, Option<&str>)]) {
        for (value, says) in rows {
            match (check(value), says) {
                (Ok(_), None) => {}
                (Err(error), Some(says)) => assert!(error.to_string().contains(says), "{value:?}: {error}"),
                (got, want) => assert_eq!(format!("{got:?}"), format!("{want:?}"), "{value:?}"),
            }
        }
    }

    #[test]
    fn profile_names() {
        let (most, over) = ("a".repeat(64), "a".repeat(65));
        let bad = Some("cannot be a profile's name");
        let rows = [("work", None), ("a.b_c-9", None), (most.as_str(), None), (over.as_str(), bad), ("", bad)];
        table(profile_name, &rows);
        table(profile_name, &[(".a", bad), ("-a", bad), ("a/b", bad), ("a b", bad), ("ä", bad), ("..", bad)]);
        table(profile_name, &[("adhoc", Some("choose another name"))]);
    }

    #[test]
    fn device_names() {
        let bad = Some("cannot be a device's name");
        table(device_name, &[("pvpn0", None), ("a-very-long.one", None), ("a-very-long.name", bad), ("", bad)]);
        table(device_name, &[("a/b", bad), ("a b", bad), (".", bad), ("..", bad), ("tun%d", bad), ("a:b", bad)]);
        table(device_name, &[("pvpn+", bad), ("\"; drop", bad), ("lo", Some("taken")), ("all", Some("taken"))]);
    }

    #[test]
    fn device_addresses() {
        table(cidr, &[("10.255.255.1/30", None), ("10.0.0.1/32", None), ("10.0.0.0/31", None), ("10.0.0.1/8", None)]);
        table(
            cidr,
            &[
                ("10.0.0.0/30", Some("use one between them")),
                ("10.0.0.3/30", Some("use one between them")),
                ("10.0.0.1", Some("with its prefix")),
                ("10.0.0.1/33", Some("with its prefix")),
                ("10.0.0.1/7", Some("too wide")),
                ("127.0.0.1/32", Some("cannot be a device's address")),
                ("224.0.0.1/32", Some("cannot be a device's address")),
                ("0.0.0.0/32", Some("cannot be a device's address")),
            ],
        );
        table(cidr6, &[("fd70:7670:6e::1/64", None), ("fd00::1/128", None)]);
        table(
            cidr6,
            &[
                ("fd00::/64", Some("the network's own address")),
                ("fd00::1/16", Some("too wide")),
                ("::1/128", Some("cannot be a device's address")),
                ("ff02::1/128", Some("cannot be a device's address")),
                ("10.0.0.1/32", Some("with its prefix")),
            ],
        );
    }

    #[test]
    fn mtus() {
        for (value, ok) in [(1280, true), (65535, true), (1279, false), (65536, false), (-1, false), (i64::MAX, false)]
        {
            assert_eq!(mtu(value).is_ok(), ok, "{value}");
        }
    }

    #[test]
    fn a_lan_cannot_cover_public_addresses() {
        let public = Some("not a local network");
        table(lan, &[("192.168.1.0/24", None), ("10.0.0.0/8", None), ("172.16.0.0/12", None), ("100.64.0.0/10", None)]);
        table(lan, &[("169.254.0.0/16", None), ("fd00::/8", None), ("fe80::/10", None), ("192.168.1.7", None)]);
        table(lan, &[("0.0.0.0/0", public), ("::/0", public), ("0.0.0.0/1", public), ("8.8.8.8", public)]);
        table(lan, &[("10.0.0.0/7", Some("not a local network")), ("172.0.0.0/8", public), ("192.0.0.0/8", public)]);
        table(lan, &[("2000::/3", public), ("ff02::/16", public), ("::ffff:0:0/96", public), ("127.0.0.0/8", public)]);
        table(lan, &[("192.168.1.5/24", Some("write 192.168.1.0/24")), ("lan", Some("not an address"))]);
        assert_eq!(lan("192.168.1.7").unwrap().to_string(), "192.168.1.7/32");
    }

    #[test]
    fn users() {
        table(
            bypass_user,
            &[
                ("daemon", None),
                ("54321", None),
                ("root", Some("root cannot")),
                ("0", Some("root cannot")),
                ("no-such-user-here", Some("there is no user \"no-such-user-here\"")),
                ("", Some("there is no user")),
                ("a\0b", Some("there is no user")),
                ("4294967295", Some("not a user's id")),
            ],
        );
        assert_eq!(bypass_user("54321"), Ok(54321));
    }
}
