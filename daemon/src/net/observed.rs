//! The kernel's network state, as far as it matters to us.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::step::{Family, Route, Rule};

/// What was read from the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Observed {
    pub(super) links: Vec<Link>,
    pub(super) addresses: Vec<Address>,
    /// Permanent neighbours on devices of ours.
    pub(super) neighbours: Vec<Neighbour>,
    /// Routes that are ours: in our table, with our protocol number.
    pub(super) routes: Vec<Route>,
    /// Routes in our table that are not ours.
    pub(super) foreign_routes: usize,
    /// Rules that are ours: in our range of priorities, with our protocol number.
    pub(super) rules: Vec<Rule>,
    /// Priorities of the rules of others.
    pub(super) foreign_rules: Vec<u32>,
    /// `net.ipv4.conf.all`.
    pub(super) all: SourceValidation,
    /// A new device would have IPv6.
    pub(super) ipv6_for_new: bool,
    /// The kernel has IPv6.
    pub(super) ipv6: bool,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// A TUN or TAP device that carries our alias.
    pub(super) ours: bool,
    pub(super) kind: Kind,
    /// Index of the bridge or bond that it belongs to.
    pub(super) master: Option<u32>,
    /// Frames of its type can carry IP.
    pub(super) carries_ip: bool,
    pub(super) loopback: bool,
    pub(super) up: bool,
    /// Has a cable, a base station or the like.
    pub(super) carrier: bool,
    /// Bytes.
    pub(super) mtu: u32,
    /// Packets.
    pub(super) queue: u32,
    /// Takes multicast.
    pub(super) multicast: bool,
    /// Asks for the addresses of neighbours, and answers.
    pub(super) arp: bool,
    /// A TUN device has none.
    pub(super) mac: Option<[u8; 6]>,
    /// Makes no IPv6 link-local address of its own.
    pub(super) address_generation_off: bool,
    /// `None`: the device has no IPv4.
    pub(super) source_validation: Option<SourceValidation>,
    /// IPv6 is there.
    pub(super) has_ipv6: bool,
    /// IPv6 is there and not disabled.
    pub(super) ipv6: bool,
    /// Forwards IPv4.
    pub(super) forwarding: bool,
}

/// What a device is, as far as it matters to us (`IFLA_INFO_KIND`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Kind {
    Bridge,
    Veth,
    /// TUN or TAP.
    Tun,
    #[default]
    Other,
}

/// Reverse-path filtering (RFC 3704) as in the kernel's ip-sysctl documentation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct SourceValidation {
    pub(super) rp_filter: u32,
    pub(super) src_valid_mark: u32,
}

/// An address of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) address: IpNet,
}

/// Who has an address behind a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub(super) index: u32,
    pub(super) address: Ipv4Addr,
    pub(super) mac: [u8; 6],
}

/// A route of the main table that leads somewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MainRoute {
    pub(super) family: Family,
    /// `None`: default.
    pub(super) to: Option<IpNet>,
    pub(super) hop: Hop,
    /// Who made it (`rtm_protocol`, rtnetlink(7)).
    pub(super) protocol: u8,
}

/// Where a packet goes next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Hop {
    /// Index of the device.
    pub(super) device: u32,
    /// `None`: the destination is on the link.
    pub(super) gateway: Option<IpAddr>,
    /// The address that is written as its source.
    pub(super) source: Option<IpAddr>,
}

impl Observed {
    /// The device of that name.
    pub(super) fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Every address of this machine.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().map(|address| address.address.addr())
    }

    /// The addresses that are not those of a tunnel device of ours.
    pub(super) fn outside_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses_by_tunnel(false)
    }

    /// Those of tunnel devices of ours.
    pub(super) fn tunnel_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses_by_tunnel(true)
    }

    fn addresses_by_tunnel(&self, wanted: bool) -> impl Iterator<Item = IpAddr> {
        let tunnel = |index| self.links.iter().any(|link| link.ours && link.index == index);
        self.addresses
            .iter()
            .filter(move |address| tunnel(address.index) == wanted)
            .map(|address| address.address.addr())
    }
}
