//! rtnetlink(7): our values to messages and back.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use ipnet::IpNet;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType, RouteVia,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange, RuleUidRange};
use rtnetlink::packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use rtnetlink::proto::Connection;
use rtnetlink::sys::AsyncSocket as _;

use super::desired::{Gateway, ROUTE_PROTOCOL, RULE_PRIORITIES, RULE_PRIORITY, TABLE, Tunnel};
use super::observed::{Address, Hop, Kind, Link, MainRoute, Neighbour, SourceValidation};
use super::plan::MAIN;
use super::step::{Family, LOOSE, Route, Rule, Target, Verdict};

/// Alias (`IFLA_IFALIAS`) that tells that a TUN device is ours.
pub(super) const ALIAS: &str = "proxyvpn";
/// `IFLA_INET_CONF` with `NLA_F_NESTED` (linux/if_link.h, linux/netlink.h).
const INET_CONF: u16 = 1 | 1 << 15;
/// `IPV4_DEVCONF_SRC_VMARK` (linux/ip.h).
const SRC_VMARK: u16 = 24;

/// Types of devices whose frames are no IP packets and never become any: CAN, monitors of netlink and of virtual sockets,
/// IEEE 802.15.4 (`ARPHRD_*`, linux/if_arp.h).
const WITHOUT_IP: [u16; 5] = [280, 804, 805, 824, 826];

/// How long the kernel may take for one request: it answers in microseconds, or waits for a driver.
const TIMEOUT: Duration = Duration::from_secs(20);

/// `IPV4_DEVCONF_RP_FILTER`.
const RP_FILTER: u16 = 8;

/// Opens the connection, to be driven by a task. An end of an answer must be seen: silence is not success.
#[allow(clippy::type_complexity, reason = "of the crate")]
pub(super) fn connect() -> io::Result<(Connection<RouteNetlinkMessage>, Handle)> {
    let (mut connection, handle, _) = rtnetlink::new_connection()?;
    // The kernel then lists the routes of one table alone. Before Linux 4.20 it lists all.
    let _ = connection.socket_mut().socket_mut().set_netlink_get_strict_chk(true);
    connection.set_forward_ack(true);
    connection.set_forward_done(true);
    Ok((connection, handle))
}

/// Sends a request and waits for the kernel's word on it.
pub(super) async fn request(handle: &Handle, message: RouteNetlinkMessage, create: bool) -> io::Result<()> {
    let flags = NLM_F_REQUEST | NLM_F_ACK | if create { NLM_F_CREATE } else { 0 };
    exchange(handle, message, flags, drop).await
}

/// Puts something there, in place of what may be.
pub(super) async fn replace(handle: &Handle, message: RouteNetlinkMessage) -> io::Result<()> {
    exchange(handle, message, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, drop).await
}

/// Reads a whole list.
pub(super) async fn dump(handle: &Handle, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut list = vec![];
    each(handle, message, |item| list.push(item)).await?;
    Ok(list)
}

/// Reads a list of any length, item by item.
pub(super) async fn each(
    handle: &Handle,
    message: RouteNetlinkMessage,
    item: impl FnMut(RouteNetlinkMessage),
) -> io::Result<()> {
    exchange(handle, message, NLM_F_REQUEST | NLM_F_DUMP, item).await
}

/// Asks how `to` is reached by a socket with `mark`; `None`: not at all.
pub(super) async fn look_up(handle: &Handle, to: IpAddr, mark: u32) -> io::Result<Option<RouteMessage>> {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(Family::of(&to.into()));
    message.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
    message.attributes = vec![RouteAttribute::Destination(to.into()), RouteAttribute::Mark(mark)];
    let mut found = None;
    let answer = |message| {
        if let RouteNetlinkMessage::NewRoute(route) = message {
            found = Some(route);
        }
    };
    match exchange(handle, RouteNetlinkMessage::GetRoute(message), NLM_F_REQUEST | NLM_F_ACK, answer).await {
        Ok(()) => Ok(found),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN | libc::ESRCH) => Ok(None),
            // Refused by a route or rule (prohibit, blackhole), or a kernel without IPv6.
            Some(libc::EACCES | libc::EINVAL | libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => Ok(None),
            _ => Err(error),
        },
    }
}

async fn exchange(
    handle: &Handle,
    message: RouteNetlinkMessage,
    flags: u16,
    mut item: impl FnMut(RouteNetlinkMessage),
) -> io::Result<()> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    let mut answers = handle.clone().request(message).map_err(|_| closed())?;
    let read = async {
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => item(inner),
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
        Err(closed())
    };
    tokio::time::timeout(TIMEOUT, read).await.map_err(io::Error::from)?
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the netlink connection has ended")
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn family(family: AddressFamily) -> Option<Family> {
    match family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

/// Dump requests.
pub(super) fn all_rules(family: Family) -> RouteNetlinkMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(family);
    RouteNetlinkMessage::GetRule(message)
}

/// Those of one table; others may come too.
pub(super) fn routes_of(table: u32, family: Family) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message.attributes.push(RouteAttribute::Table(table));
    RouteNetlinkMessage::GetRoute(message)
}

/// A rule as a message.
pub(super) fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    message.header.action = match rule.verdict {
        Verdict::Lookup(table) => {
            attributes.push(RuleAttribute::Table(table));
            RuleAction::ToTable
        }
        Verdict::Unreachable => RuleAction::Unreachable,
    };
    attributes.push(RuleAttribute::Protocol(RouteProtocol::from(ROUTE_PROTOCOL)));
    if let Some((mark, mask)) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
        attributes.push(RuleAttribute::FwMask(mask));
    }
    if let Some(device) = &rule.device {
        attributes.push(RuleAttribute::Iifname(device.clone()));
    }
    if let Some(net) = rule.to {
        message.header.dst_len = net.prefix_len();
        attributes.push(RuleAttribute::Destination(net.addr()));
    }
    if let Some((start, end)) = rule.users {
        attributes.push(RuleAttribute::UidRange(RuleUidRange { start, end }));
    }
    if let Some(protocol) = rule.protocol {
        attributes.push(RuleAttribute::IpProtocol(IpProtocol::from(i32::from(protocol))));
    }
    if let Some((start, end)) = rule.ports {
        attributes.push(RuleAttribute::DestinationPortRange(RulePortRange { start, end }));
    }
    message
}

/// A rule as read: its priority, and the rule if it is ours.
pub(super) fn parse_rule(message: &RuleMessage) -> Option<(u32, Option<Rule>)> {
    let mut rule = Rule {
        family: family(message.header.family)?,
        priority: 0,
        mark: None,
        device: None,
        to: None,
        users: None,
        protocol: None,
        ports: None,
        verdict: Verdict::Lookup(u32::from(message.header.table)),
    };
    let mut owner = None;
    let (mut mark, mut mask) = (None, u32::MAX);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => rule.priority = *value,
            RuleAttribute::Table(value) => rule.verdict = Verdict::Lookup(*value),
            RuleAttribute::Protocol(value) => owner = Some(u8::from(*value)),
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = *value,
            RuleAttribute::Iifname(name) => rule.device = Some(name.clone()),
            RuleAttribute::Destination(value) => rule.to = IpNet::new(*value, message.header.dst_len).ok(),
            RuleAttribute::UidRange(range) => rule.users = Some((range.start, range.end)),
            RuleAttribute::IpProtocol(value) => rule.protocol = u8::try_from(i32::from(*value)).ok(),
            RuleAttribute::DestinationPortRange(range) => rule.ports = Some((range.start, range.end)),
            _ => {}
        }
    }
    rule.mark = mark.map(|mark| (mark, mask));
    if message.header.action == RuleAction::Unreachable {
        rule.verdict = Verdict::Unreachable;
    }
    let range = RULE_PRIORITY..RULE_PRIORITY + RULE_PRIORITIES;
    let ours = owner == Some(ROUTE_PROTOCOL) && range.contains(&rule.priority);
    Some((rule.priority, ours.then_some(rule)))
}

/// A route as a message; `device`: index of the device of a [`Target::Device`].
pub(super) fn route_message(route: &Route, device: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = address_family(route.family);
    header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    (header.kind, header.scope) = match (&route.target, route.family) {
        (Target::Device(_), Family::V4) => (RouteType::Unicast, RouteScope::Link),
        (Target::Device(_), Family::V6) => (RouteType::Unicast, RouteScope::Universe),
        (Target::Gateway(..), _) => (RouteType::Unicast, RouteScope::Universe),
        (Target::Unreachable, _) => (RouteType::Unreachable, RouteScope::Universe),
    };
    if let Some(net) = route.to {
        header.destination_prefix_length = net.prefix_len();
        message.attributes.push(RouteAttribute::Destination(net.addr().into()));
    }
    message.attributes.push(RouteAttribute::Table(TABLE));
    message.attributes.push(RouteAttribute::Priority(route.metric));
    message.attributes.extend(device.map(RouteAttribute::Oif));
    if let Target::Gateway(address, _) = &route.target {
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(*address)));
        message.header.flags = RouteFlags::Onlink;
    }
    message
}

/// A route of our table as read; `Err`: of somebody else. `None`: not of our table.
pub(super) fn parse_route(message: &RouteMessage, links: &[Link]) -> Option<Result<Route, ()>> {
    let family = family(message.header.address_family)?;
    let (mut table, mut metric, mut device, mut to) = (u32::from(message.header.table), 0, None, None);
    let mut gateway = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = Some(*address),
            RouteAttribute::Destination(value) => {
                to = route_address(value).and_then(|a| IpNet::new(a, message.header.destination_prefix_length).ok());
            }
            _ => {}
        }
    }
    if table != TABLE {
        return None;
    }
    if u8::from(message.header.protocol) != ROUTE_PROTOCOL {
        return Some(Err(()));
    }
    let name = |index| {
        links.iter().find(|link| link.index == index).map_or_else(|| format!("if{index}"), |link| link.name.clone())
    };
    let target = match (message.header.kind, device, gateway) {
        (RouteType::Unicast, Some(index), None) => Target::Device(name(index)),
        (RouteType::Unicast, Some(index), Some(gateway)) => Target::Gateway(gateway, name(index)),
        _ => Target::Unreachable,
    };
    Some(Ok(Route { family, to, target, metric }))
}

/// A route of the main table as read; what is not an ordinary route leads nowhere.
pub(super) fn parse_main_route(message: &RouteMessage) -> Option<MainRoute> {
    let family = family(message.header.address_family)?;
    let mut table = u32::from(message.header.table);
    let mut route = MainRoute { family, to: None, hop: Hop::default(), protocol: u8::from(message.header.protocol) };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(value) => {
                let net = |a| IpNet::new(a, message.header.destination_prefix_length).ok();
                route.to = route_address(value).and_then(net);
            }
            _ => {}
        }
    }
    route.hop = parse_hop(message)?;
    (table == MAIN).then_some(route)
}

/// Where an ordinary route leads. Of several ways the first.
pub(super) fn parse_hop(message: &RouteMessage) -> Option<Hop> {
    if !matches!(message.header.kind, RouteType::Unicast | RouteType::Local) {
        return None;
    }
    let mut hop = Hop::default();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => hop.device = *index,
            RouteAttribute::Gateway(gateway) => hop.gateway = route_address(gateway),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => hop.gateway = Some(IpAddr::V4(*gateway)),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => hop.gateway = Some(IpAddr::V6(*gateway)),
            RouteAttribute::PrefSource(source) => hop.source = route_address(source),
            RouteAttribute::MultiPath(hops) => {
                let Some(first) = hops.first() else { continue };
                hop.device = first.interface_index;
                hop.gateway = first.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Gateway(gateway) => route_address(gateway),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(hop)
}

fn route_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// An address as a message. Without a connected route: main stays as it is.
pub(super) fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = address_family(Family::of(&address));
    message.header.prefix_len = address.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    let mut flags = AddressFlags::Noprefixroute;
    if address.addr().is_ipv6() {
        // Nobody else is on this link.
        flags |= AddressFlags::Nodad;
    }
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
        AddressAttribute::Flags(flags),
    ];
    message
}

/// An address as read.
pub(super) fn parse_address(message: &AddressMessage) -> Option<Address> {
    let find = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) if local => Some(*address),
            AddressAttribute::Address(address) if !local => Some(*address),
            _ => None,
        })
    };
    // On point-to-point links IFA_ADDRESS is the peer's.
    let address = find(true).or_else(|| find(false))?;
    Some(Address { index: message.header.index, address: IpNet::new(address, message.header.prefix_len).ok()? })
}

/// The address of the router behind a device as a message.
pub(super) fn neighbour_message(index: u32, gateway: &Gateway) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(gateway.address)),
        NeighbourAttribute::LinkLayerAddress(gateway.mac.to_vec()),
    ];
    message
}

/// A dump request for the neighbours on one device; others may come too.
pub(super) fn neighbours_of(index: u32) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.attributes.push(NeighbourAttribute::IfIndex(index));
    RouteNetlinkMessage::GetNeighbour(message)
}

/// A neighbour as read, if it is a permanent one.
pub(super) fn parse_neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let find = |want: fn(&NeighbourAttribute) -> Option<&[u8]>| message.attributes.iter().find_map(want);
    let mac = find(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => Some(mac),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
        _ => None,
    });
    let permanent = message.header.state == NeighbourState::Permanent;
    let found = Neighbour { index: message.header.ifindex, address: address?, mac: mac?.try_into().ok()? };
    permanent.then_some(found)
}

/// A device as read.
pub(super) fn parse_link(message: &LinkMessage) -> Link {
    let flag = |flag| message.header.flags.contains(flag);
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        ours: false,
        kind: Kind::Other,
        master: None,
        carries_ip: !WITHOUT_IP.contains(&u16::from(message.header.link_layer_type)),
        loopback: flag(LinkFlags::Loopback),
        up: flag(LinkFlags::Up),
        carrier: flag(LinkFlags::LowerUp),
        mtu: 0,
        queue: 0,
        multicast: flag(LinkFlags::Multicast),
        arp: !flag(LinkFlags::Noarp),
        mac: None,
        address_generation_off: false,
        source_validation: None,
        has_ipv6: false,
        ipv6: false,
        forwarding: false,
    };
    let mut alias = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(text) => alias = text == ALIAS,
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::TxQueueLen(length) => link.queue = *length,
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index > 0),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().map(kind).find(|k| *k != Kind::Other).unwrap_or_default()
            }
            LinkAttribute::AfSpecUnspec(specs) => specs.iter().for_each(|spec| parse_spec(spec, &mut link)),
            _ => {}
        }
    }
    link.ours = link.kind == Kind::Tun && alias;
    link
}

fn kind(info: &LinkInfo) -> Kind {
    match info {
        LinkInfo::Kind(InfoKind::Bridge) => Kind::Bridge,
        LinkInfo::Kind(InfoKind::Veth) => Kind::Veth,
        LinkInfo::Kind(InfoKind::Tun) => Kind::Tun,
        _ => Kind::Other,
    }
}

fn parse_spec(spec: &AfSpecUnspec, link: &mut Link) {
    match spec {
        AfSpecUnspec::Inet(list) => {
            for item in list {
                if let AfSpecInet::DevConf(conf) = item {
                    let (rp_filter, src_valid_mark) = (conf.rp_filter.cast_unsigned(), conf.src_vmark.cast_unsigned());
                    link.source_validation = Some(SourceValidation { rp_filter, src_valid_mark });
                    link.forwarding = conf.forwarding != 0;
                }
            }
        }
        AfSpecUnspec::Inet6(list) => {
            link.has_ipv6 = true;
            for item in list {
                match item {
                    AfSpecInet6::DevConf(conf) => link.ipv6 = conf.disable_ipv6 == 0,
                    AfSpecInet6::AddrGenMode(mode) => link.address_generation_off = *mode == In6AddrGenMode::None,
                    _ => {}
                }
            }
        }
        _ => {}
    }
}

/// Messages that give the tunnel its settings. The kernel looks at flags before anything of IPv6, so up comes last.
pub(super) fn settings_messages(link: &Link, tunnel: &Tunnel, queue: u32) -> Vec<LinkMessage> {
    let mut settings = link_message(link.index);
    settings.attributes = vec![LinkAttribute::Mtu(u32::from(tunnel.mtu)), LinkAttribute::TxQueueLen(queue)];
    let mut specs = vec![];
    if let Some(gateway) = &tunnel.gateway {
        settings.attributes.push(LinkAttribute::Address(gateway.own_mac.to_vec()));
        specs.push(parameter(RP_FILTER, LOOSE));
        settings.header.flags = LinkFlags::Noarp;
        settings.header.change_mask = LinkFlags::Noarp;
    }
    if link.ipv6 {
        specs.push(AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]));
    }
    if !specs.is_empty() {
        settings.attributes.push(LinkAttribute::AfSpecUnspec(specs));
    }
    let mut up = link_message(link.index);
    up.header.flags = LinkFlags::Up;
    // What would be asked by multicast is not in the tunnel: resolvers would only wait for it.
    up.header.change_mask = LinkFlags::Up | LinkFlags::Multicast;
    vec![settings, up]
}

/// A message that says whose the device is.
pub(super) fn alias_message(index: u32) -> LinkMessage {
    let mut message = link_message(index);
    message.attributes = vec![LinkAttribute::IfAlias(ALIAS.to_owned())];
    message
}

/// A message that sets `src_valid_mark` of a device; /proc/sys is read-only under `ProtectKernelTunables=`.
pub(super) fn source_mark_message(index: u32, value: u32) -> LinkMessage {
    let mut message = link_message(index);
    message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![parameter(SRC_VMARK, value)])];
    message
}

/// A kernel parameter of a device (`IPV4_DEVCONF_*`).
fn parameter(number: u16, value: u32) -> AfSpecUnspec {
    // struct nlattr, then the value; the crate can't send a 0.
    let mut nested = vec![];
    nested.extend(8_u16.to_ne_bytes());
    nested.extend(number.to_ne_bytes());
    nested.extend(value.to_ne_bytes());
    AfSpecUnspec::Inet(vec![AfSpecInet::Other(DefaultNla::new(INET_CONF, nested))])
}

/// A message about one device.
pub(super) fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}
