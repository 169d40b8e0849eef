//! Whether what was applied is still there.

use std::net::IpAddr;

use ipnet::IpNet;

use super::desired::{Desired, Forward, RULE_PRIORITIES, RULE_PRIORITY, TABLE};
use super::observed::{Address, Hop, Link, MainRoute, Observed};
use super::plan;
use super::step::{Action, Family, Layer, Stage, Step};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Good to know.
    Info,
    /// Something is not as it should be.
    Warning,
    /// Protection or connection is missing.
    Error,
}

impl Severity {
    /// The name on the bus.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Stable code.
    pub code: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it means and what to do.
    pub text: String,
}

/// The firewall is not there.
pub(super) fn firewall_missing(desired: &Desired) -> Finding {
    let (severity, effect) = if desired.killswitch {
        (Severity::Error, "traffic can go around the tunnel")
    } else {
        (Severity::Warning, "connections from outside may not be answered")
    };
    Finding {
        code: "firewall-missing",
        severity,
        text: format!("The firewall rules were removed or changed by another program: {effect}."),
    }
}

/// Everything but the firewall.
pub(super) fn findings(observed: &Observed, desired: &Desired) -> Vec<Finding> {
    let mut findings = vec![];
    let mut find = |code, severity, text| findings.push(Finding { code, severity, text });
    let steps = plan::plan(observed, desired);
    if let Some(tunnel) = &desired.tunnel {
        match observed.link(&tunnel.name).filter(|link| link.ours) {
            None => find("tunnel-missing", Severity::Error, format!("The tunnel device {} is gone.", tunnel.name)),
            Some(link) if !link.up => {
                find("tunnel-down", Severity::Error, format!("The tunnel device {} was set down.", tunnel.name));
            }
            Some(_) => {
                let changed: Vec<&Step> = steps.iter().filter(|step| step.stage() == Stage::Tunnel).collect();
                if let Some(step) = changed.first() {
                    let text = format!("Another program changed the tunnel device; missing: {}.", step.line());
                    find("tunnel-changed", Severity::Warning, text);
                }
            }
        }
    }
    let missing = |step: &&Step| step.action() == Action::Add && matches!(step.layer(), Layer::Route | Layer::Rule);
    let lost: Vec<&Step> = steps.iter().filter(missing).collect();
    if let Some(step) = lost.first() {
        let text = format!(
            "Another program removed {} of the rules and routes that lead into the tunnel, such as: {}.",
            lost.len(),
            step.line()
        );
        find("steering-changed", Severity::Error, text);
    }
    if observed.foreign_routes > 0 {
        let text = format!(
            "Routing table {TABLE} holds {} routes that are not proxyvpn's; what they match goes around the tunnel.",
            observed.foreign_routes
        );
        find("foreign-routes", Severity::Error, text);
    }
    let ours = RULE_PRIORITY..RULE_PRIORITY + RULE_PRIORITIES;
    if let Some(priority) = observed.foreign_rules.iter().find(|priority| **priority > 0 && **priority < ours.end) {
        let text = format!(
            "A routing rule of another program (priority {priority}) is asked before those of proxyvpn; what it matches may not go through the tunnel (ip rule)."
        );
        find("earlier-rule", Severity::Warning, text);
    }
    if let Some(step) = steps.iter().find(|step| step.layer() == Layer::Sysctl) {
        let text = format!("Strict reverse-path filtering was switched on or changed; set {step}, or connect again.");
        find("reverse-path-filter", Severity::Warning, text);
    }
    let forwarding = |link: &&Link| link.forwarding && !link.loopback && !link.ours;
    if desired.killswitch && desired.forward == Forward::Block && observed.links.iter().any(|link| forwarding(&link)) {
        let text = "This machine forwards traffic, for example of containers or virtual machines; it is blocked while connected. forward = \"tunnel\" in the profile lets its TCP through the proxy.";
        find("forwarding-blocked", Severity::Info, text.to_owned());
    }
    findings
}

/// `RTPROT_KERNEL`, `RTPROT_STATIC` (linux/rtnetlink.h).
const BY_KERNEL: u8 = 2;
const BY_ADMINISTRATOR: u8 = 4;

/// What the network around this machine does that the user should know. `upstream`: addresses of the upstream.
pub(super) fn surroundings(
    observed: &Observed,
    routes: &[MainRoute],
    desired: &Desired,
    upstream: &[IpAddr],
) -> Vec<Finding> {
    let mut findings = vec![];
    let mut find = |code, severity, text| findings.push(Finding { code, severity, text });
    let uplink = |index: u32| observed.links.iter().find(|link| link.index == index && !link.loopback && !link.ours);
    // What is on the same wire, by each address of an uplink.
    let on_link = || {
        let wide = |net: &IpNet| net.prefix_len() < net.max_prefix_len();
        observed
            .addresses
            .iter()
            .filter_map(move |own| Some((uplink(own.index)?, own.address.trunc())))
            .filter(move |(_, net)| wide(net))
    };

    let odd: Vec<(&MainRoute, IpNet)> =
        routes.iter().filter_map(|route| odd(route, routes, observed, upstream)).collect();
    let exempt = |net: &IpNet| {
        desired.exceptions.lan.iter().any(|lan| overlap(lan, net))
            || desired.exceptions.resolvers.iter().any(|resolver| net.contains(resolver))
    };
    let shadowing = |(route, net): &&(&MainRoute, IpNet)| route.protocol != BY_ADMINISTRATOR && exempt(net);
    if let Some((route, net)) = odd.iter().find(shadowing) {
        let text = format!(
            "A route that leads another way than the default one ({}) takes traffic that the profile lets around the tunnel. The network may have \
             set it (DHCP option 121). If you do not know it, leave this network, or take the exception out of the profile.",
            line(net, &route.hop, observed)
        );
        find("route-shadow", Severity::Warning, text);
    }
    let public: Vec<_> = odd.iter().filter(|(_, net)| !is_private(net) && !exempt(net)).collect();
    if let Some((route, net)) = public.first() {
        let text = format!(
            "{} routes of this machine to public addresses lead another way than the default one, such as {}. \
             They do not lead around the tunnel.",
            public.len(),
            line(net, &route.hop, observed)
        );
        find("route-specific", Severity::Info, text);
    }
    let lan_public =
        |(_, net): &(&Link, IpNet)| !is_private(net) && desired.exceptions.lan.iter().any(|lan| overlap(lan, net));
    if let Some((link, net)) = on_link().find(lan_public) {
        let text = format!(
            "The network at {} says that public addresses are on it ({net}), and an exception of the profile covers a part of them. \
             What goes there goes around the tunnel. Leave this network, or take the exception out ([protect] lan).",
            link.name
        );
        find("lan-public", Severity::Warning, text);
    }
    let near =
        |resolver: &IpAddr| on_link().find(|(_, net)| net.contains(resolver) && !is_private(&(*resolver).into()));
    if let Some((resolver, (link, net))) = desired.exceptions.resolvers.iter().find_map(|r| Some((r, near(r)?))) {
        let text = format!(
            "The DNS server {resolver} has a public address, but is asked directly at {} (which has {net}), not over the Internet. \
             Whoever runs that network may answer in its place.",
            link.name
        );
        find("resolver-on-link", Severity::Info, text);
    }
    let global = |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().octets()[0] & 0xe0 == 0x20);
    if let Some((link, _)) = on_link().find(|(_, net)| global(net)) {
        let tunnel = desired.tunnel.as_ref().and_then(|tunnel| observed.link(&tunnel.name)).filter(|link| link.ours);
        let default = routes.iter().any(|route| route.family == Family::V6 && route.to.is_none());
        if tunnel.is_some_and(|tunnel| !tunnel.ipv6) {
            let text = format!(
                "{} has IPv6, but it is disabled for new devices (net.ipv6.conf.default.disable_ipv6): IPv6 connections are refused \
                 at once, and programs take IPv4.",
                link.name
            );
            find("ipv6-refused", Severity::Info, text);
        } else if tunnel.is_some() && default && !upstream.is_empty() && upstream.iter().all(IpAddr::is_ipv4) {
            let text = "The proxy is reached over IPv4. IPv6 connections go through it too; if it has no IPv6 it refuses them, and programs take IPv4.";
            find("ipv6-no-upstream", Severity::Info, text.to_owned());
        }
    }
    findings
}

/// A route with its destination that leads another way than the default one, and is not what every machine has.
fn odd<'a>(
    route: &'a MainRoute,
    routes: &[MainRoute],
    observed: &Observed,
    upstream: &[IpAddr],
) -> Option<(&'a MainRoute, IpNet)> {
    let net = route.to.filter(|net| net.prefix_len() > 0)?;
    let link = observed.links.iter().find(|link| link.index == route.hop.device)?;
    if route.protocol == BY_KERNEL || link.loopback || link.ours {
        return None;
    }
    let same = |other: &&MainRoute| other.family == route.family && other.to.is_none_or(|net| net.prefix_len() == 0);
    let way = |hop: &Hop| (hop.device, hop.gateway);
    if routes.iter().filter(same).any(|default| way(&default.hop) == way(&route.hop)) {
        return None;
    }
    let near =
        |a: &Address| a.index == link.index && (net.contains(&a.address.addr()) || a.address.trunc().contains(&net));
    if route.hop.gateway.is_none() && observed.addresses.iter().any(near) {
        return None;
    }
    let host = net.prefix_len() == net.max_prefix_len();
    (!(host && upstream.contains(&net.addr()))).then_some((route, net))
}

fn line(net: &IpNet, hop: &Hop, observed: &Observed) -> String {
    let device = observed.links.iter().find(|link| link.index == hop.device).map_or("", |link| link.name.as_str());
    match hop.gateway {
        Some(gateway) => format!("{net} via {gateway} dev {device}"),
        None => format!("{net} dev {device}"),
    }
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

/// Wholly in a range that is not of the Internet: private (RFC 1918), of carriers (RFC 6598), of the machine or the link,
/// multicast, unique local (RFC 4193).
fn is_private(net: &IpNet) -> bool {
    const RANGES: [&str; 13] = [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
        "::/127",
        "::ffff:0:0/96",
        "fc00::/7",
        "fe80::/10",
        "ff00::/8",
    ];
    RANGES.iter().filter_map(|range| range.parse::<IpNet>().ok()).any(|range| range.contains(net))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::desired::Exceptions;
    use super::super::plan::tests::{desired, link, machine};
    use super::*;

    const DHCP: u8 = 16;

    fn route(to: &str, gateway: &str, device: u32, protocol: u8) -> MainRoute {
        let to: Option<IpNet> = (to != "default").then(|| to.parse().unwrap());
        let gateway: Option<IpAddr> = (!gateway.is_empty()).then(|| gateway.parse().unwrap());
        let v6 = to.is_some_and(|net| net.addr().is_ipv6()) || gateway.is_some_and(|address| address.is_ipv6());
        let family = if v6 { Family::V6 } else { Family::V4 };
        MainRoute { family, to, hop: Hop { device, gateway, source: None }, protocol }
    }

    fn address(index: u32, address: &str) -> Address {
        Address { index, address: address.parse().unwrap() }
    }

    /// A laptop at home, with containers, virtual machines and a company's VPN.
    fn laptop() -> (Observed, Vec<MainRoute>, Desired) {
        let mut observed = machine();
        observed.links.push(link(3, "docker0", 0, 0));
        observed.links.push(link(4, "wg0", 0, 0));
        observed.links.push(Link { ours: true, ..link(5, "pvpn0", 0, 0) });
        observed.addresses = vec![
            address(1, "127.0.0.1/8"),
            address(2, "192.168.1.23/24"),
            address(2, "fe80::1234/64"),
            address(3, "172.17.0.1/16"),
            address(4, "10.8.0.5/24"),
            address(5, "10.255.255.1/30"),
        ];
        let routes = vec![
            route("default", "192.168.1.1", 2, DHCP),
            route("192.168.1.0/24", "", 2, BY_KERNEL),
            route("169.254.0.0/16", "", 2, 3),
            route("172.17.0.0/16", "", 3, BY_KERNEL),
            route("10.8.0.0/24", "", 4, 3),
            route("10.20.0.0/16", "", 4, 3),
            // systemd-networkd sets one to each DNS server.
            route("192.168.1.1/32", "", 2, DHCP),
            route("9.9.9.9/32", "192.168.1.1", 2, DHCP),
            route("fe80::/64", "", 2, BY_KERNEL),
        ];
        let exceptions = Exceptions {
            lan: vec!["192.168.0.0/16".parse().unwrap(), "fe80::/10".parse().unwrap()],
            resolvers: vec!["192.168.1.1".parse().unwrap(), "9.9.9.9".parse().unwrap()],
            ..Exceptions::default()
        };
        (observed, routes, Desired { exceptions, ..desired() })
    }

    fn upstream() -> Vec<IpAddr> {
        vec!["203.0.113.10".parse().unwrap()]
    }

    #[test]
    fn a_usual_laptop_has_no_findings() {
        let (observed, mut routes, desired) = laptop();
        let codes = |routes: &[MainRoute]| -> Vec<&str> {
            surroundings(&observed, routes, &desired, &upstream()).iter().map(|finding| finding.code).collect()
        };
        assert_eq!(codes(&routes), [""; 0]);
        routes.push(route("203.0.113.10/32", "192.168.1.254", 2, 3));
        assert_eq!(codes(&routes), [""; 0], "a route to the proxy itself");
    }

    #[test]
    fn each_finding_comes_when_it_should() {
        type Edit = fn(&mut Observed, &mut Vec<MainRoute>, &mut Desired);
        type Case = (&'static str, Edit, &'static [(&'static str, Severity)]);
        let cases: [Case; 12] = [
            (
                "option 121 for the Internet",
                |_, routes, _| {
                    routes.extend([
                        route("0.0.0.0/1", "192.168.1.66", 2, DHCP),
                        route("128.0.0.0/1", "192.168.1.66", 2, DHCP),
                    ])
                },
                &[("route-shadow", Severity::Warning)],
            ),
            (
                "option 121 for a public network that is no exception",
                |_, routes, _| routes.push(route("198.51.100.0/24", "192.168.1.66", 2, DHCP)),
                &[("route-specific", Severity::Info)],
            ),
            (
                "option 121 for a DNS server",
                |_, routes, _| routes.push(route("9.9.9.9/32", "192.168.1.66", 2, DHCP)),
                &[("route-shadow", Severity::Warning)],
            ),
            (
                "a part of the LAN to another gateway",
                |_, routes, _| routes.push(route("192.168.7.0/24", "192.168.1.66", 2, 3)),
                &[("route-shadow", Severity::Warning)],
            ),
            (
                "the same by the administrator",
                |_, routes, _| routes.push(route("192.168.7.0/24", "192.168.1.66", 2, BY_ADMINISTRATOR)),
                &[],
            ),
            (
                "a hostile network prefix that the LAN lies in",
                |observed, _, _| observed.addresses.push(address(2, "192.1.2.3/8")),
                &[("lan-public", Severity::Warning)],
            ),
            (
                "the same without an exception",
                |observed, _, desired| {
                    observed.addresses.push(address(2, "192.1.2.3/8"));
                    desired.exceptions = Exceptions::default();
                },
                &[],
            ),
            (
                "a public DNS server on the link",
                |observed, _, _| observed.addresses.push(address(2, "9.9.9.23/24")),
                &[("resolver-on-link", Severity::Info)],
            ),
            (
                "IPv6 from a router advertisement",
                |observed, routes, _| {
                    observed.addresses.push(address(2, "2001:db8::5/64"));
                    routes.extend([route("default", "fe80::1", 2, 9), route("2001:db8::/64", "", 2, 9)]);
                },
                &[("ipv6-no-upstream", Severity::Info)],
            ),
            ("IPv6 without a way out", |observed, _, _| observed.addresses.push(address(2, "2001:db8::5/64")), &[]),
            (
                "IPv6 that new devices do not have",
                |observed, _, _| {
                    observed.addresses.push(address(2, "2001:db8::5/64"));
                    observed.links.last_mut().unwrap().ipv6 = false;
                },
                &[("ipv6-refused", Severity::Info)],
            ),
            (
                "IPv6 while blocked",
                |observed, routes, desired| {
                    observed.addresses.push(address(2, "2001:db8::5/64"));
                    routes.push(route("default", "fe80::1", 2, 9));
                    desired.tunnel = None;
                },
                &[],
            ),
        ];
        for (name, edit, expected) in cases {
            let (mut observed, mut routes, mut desired) = laptop();
            edit(&mut observed, &mut routes, &mut desired);
            let found = surroundings(&observed, &routes, &desired, &upstream());
            let found: Vec<_> = found.iter().map(|finding| (finding.code, finding.severity)).collect();
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn with_an_ipv6_proxy_nothing_is_said_of_ipv6() {
        let (mut observed, mut routes, desired) = laptop();
        observed.addresses.push(address(2, "2001:db8::5/64"));
        routes.push(route("default", "fe80::1", 2, 9));
        let upstream = ["203.0.113.10".parse().unwrap(), "2001:db8:2::10".parse().unwrap()];
        assert_eq!(surroundings(&observed, &routes, &desired, &upstream), []);
    }
}
