//! Which devices lead out of this machine, and which only to containers and virtual machines on it.

use std::collections::HashSet;

use super::observed::{Kind, Link, Observed};

/// How many uplinks get a chain; further ones go without.
const MAX_UPLINKS: usize = 256;

/// The devices that the firewall tells apart, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    /// All that may lead out of this machine: neither loopback nor a tunnel of ours nor inner.
    pub uplinks: Vec<String>,
    /// Bridges that lead to this machine's containers and virtual machines only: all of their ports are virtual (veth, tun,
    /// tap), or they have none, and no gateway is or was behind them.
    pub inner: Vec<String>,
    /// TAP devices of ours: what is behind them is not trusted, whether one of them is the tunnel or not.
    pub routed: Vec<String>,
}

impl Devices {
    /// The devices of this machine; `tunnel`: the name of ours, `outward`: indices of those that lead or led to a gateway.
    /// In a container the uplink is a veth too.
    pub(super) fn of(observed: &Observed, tunnel: Option<&str>, outward: &HashSet<u32>) -> Self {
        let links = &observed.links;
        let is_virtual = |port: &Link| matches!(port.kind, Kind::Veth | Kind::Tun) && !outward.contains(&port.index);
        let is_inner = |bridge: &Link| {
            let mut ports = links.iter().filter(|link| link.master == Some(bridge.index));
            bridge.kind == Kind::Bridge && !outward.contains(&bridge.index) && ports.all(is_virtual)
        };
        let inner: Vec<&Link> = links.iter().filter(|link| is_inner(link)).collect();
        let leads_out = |link: &&Link| {
            let within = |bridge: &&Link| link.index == bridge.index || link.master == Some(bridge.index);
            let ours = link.ours || Some(link.name.as_str()) == tunnel;
            link.carries_ip && !link.loopback && !ours && !inner.iter().any(within)
        };
        let mut uplinks = names(links.iter().filter(leads_out));
        if uplinks.len() > MAX_UPLINKS {
            tracing::warn!(
                "more than {MAX_UPLINKS} devices: frames that bypass the IP layer are not stopped on the others"
            );
            uplinks.truncate(MAX_UPLINKS);
        }
        let routed = names(links.iter().filter(|link| link.ours && link.mac.is_some()));
        Self { uplinks, inner: names(inner), routed }
    }
}

/// Their names, without those that can't stand in a rule.
fn names<'a>(links: impl IntoIterator<Item = &'a Link>) -> Vec<String> {
    let known = |link: &&Link| {
        let known = is_plain(&link.name);
        if !known {
            tracing::warn!(device = ?link.name, "a name that can't stand in a firewall rule");
        }
        known
    };
    links.into_iter().filter(known).map(|link| link.name.clone()).collect()
}

/// Whether neither nft nor iptables would read the name as a pattern or as syntax. The kernel allows more names
/// (netdevice(7)) than letters, digits, `.`, `_` and `-`.
pub(super) fn is_plain(name: &str) -> bool {
    let known = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    (1..=15).contains(&name.len()) && !name.starts_with('-') && known
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::plan;

    fn link(index: u32, name: &str, kind: Kind, master: u32) -> Link {
        let master = Some(master).filter(|master| *master > 0);
        Link {
            ours: name == "pvpn0" || name == "tap0",
            kind,
            master,
            carries_ip: name != "can0",
            ..plan::tests::link(index, name, 0, 0)
        }
    }

    fn devices(links: Vec<Link>) -> (String, String) {
        devices_with(links, &[])
    }

    fn devices_with(links: Vec<Link>, outward: &[u32]) -> (String, String) {
        let outward = outward.iter().copied().collect();
        let devices = Devices::of(&Observed { links, ..Observed::default() }, Some("tun7"), &outward);
        (devices.uplinks.join(" "), devices.inner.join(" "))
    }

    #[test]
    fn uplinks_and_inner_bridges_are_told_apart() {
        use Kind::{Bridge, Other, Tun, Veth};
        let machine = || {
            vec![
                link(1, "lo", Other, 0),
                link(2, "eth0", Other, 0),
                link(3, "pvpn0", Tun, 0),
                link(4, "tun7", Tun, 0),
                link(5, "docker0", Bridge, 0),
                link(6, "veth1", Veth, 5),
                link(7, "vnet0", Tun, 5),
                link(8, "virbr0", Bridge, 0),
                link(9, "can0", Other, 0),
                link(10, "eth0.7", Other, 0),
                link(11, "veth2", Veth, 0),
                link(12, "wg0", Other, 0),
            ]
        };
        assert_eq!(devices(machine()), ("eth0 eth0.7 veth2 wg0".into(), "docker0 virbr0".into()));
        // One port that is not virtual makes the bridge and all of its ports lead out.
        let mut bridged = machine();
        bridged[1].master = Some(5);
        assert_eq!(devices(bridged), ("eth0 docker0 veth1 vnet0 eth0.7 veth2 wg0".into(), "virbr0".into()));
        // So does a gateway behind it, also one that was behind a port of it before.
        for outward in [5, 6] {
            let want = ("eth0 docker0 veth1 vnet0 eth0.7 veth2 wg0".into(), "virbr0".into());
            assert_eq!(devices_with(machine(), &[2, outward]), want);
        }
        let mut vlan = machine();
        vlan[9].master = Some(8);
        assert_eq!(devices(vlan), ("eth0 virbr0 eth0.7 veth2 wg0".into(), "docker0".into()));
    }

    #[test]
    fn our_tap_devices_are_known_by_their_mac_address() {
        let tun = Link { mac: None, ..link(3, "pvpn0", Kind::Tun, 0) };
        let links = vec![link(2, "tap1", Kind::Tun, 0), tun, link(4, "tap0", Kind::Tun, 0)];
        let devices = Devices::of(&Observed { links, ..Observed::default() }, None, &HashSet::new());
        assert_eq!((devices.uplinks, devices.routed), (vec!["tap1".to_owned()], vec!["tap0".to_owned()]));
    }

    #[test]
    fn odd_names_and_too_many_are_left_out() {
        let odd = ["a b", "x*", "-j", "tün", "\"; drop"].map(|name| link(2, name, Kind::Other, 0)).to_vec();
        assert_eq!(devices(odd).0, "");
        let many: Vec<_> = (0..400).map(|i| link(i + 2, &format!("eth{i}"), Kind::Other, 0)).collect();
        assert_eq!(devices(many).0.split(' ').count(), MAX_UPLINKS);
    }
}
