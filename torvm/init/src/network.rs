//! The two network devices, found by their MAC addresses: names, addresses, the route out and static neighbours.

use std::fs;
use std::net::Ipv4Addr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use proxyvpn_torvm::link::{
    GUEST, GUEST_MAC, HOST, HOST_MAC, HOST_MTU, PREFIX, UPLINK_GATEWAY, UPLINK_GATEWAY_MAC, UPLINK_GUEST,
    UPLINK_GUEST_MAC, UPLINK_MTU,
};

use crate::error::{Error, While as _};

/// Name of the device to the host.
pub(crate) const HOST_DEVICE: &str = "host";
/// Name of the device on the way out.
pub(crate) const UPLINK_DEVICE: &str = "uplink";

struct Side {
    name: &'static str,
    mac: [u8; 6],
    address: Ipv4Addr,
    neighbour: Ipv4Addr,
    neighbour_mac: [u8; 6],
    mtu: u16,
}

const SIDES: [Side; 2] = [
    Side { name: HOST_DEVICE, mac: GUEST_MAC, address: GUEST, neighbour: HOST, neighbour_mac: HOST_MAC, mtu: HOST_MTU },
    Side {
        name: UPLINK_DEVICE,
        mac: UPLINK_GUEST_MAC,
        address: UPLINK_GUEST,
        neighbour: UPLINK_GATEWAY,
        neighbour_mac: UPLINK_GATEWAY_MAC,
        mtu: UPLINK_MTU,
    },
];

/// Gives the devices their names, so that the firewall can stand before they are up.
pub(crate) fn name_devices() -> Result<(), Error> {
    let devices = devices()?;
    let mut netlink = Netlink::new()?;
    for side in &SIDES {
        let (_, index) = devices
            .iter()
            .find(|(mac, _)| *mac == side.mac)
            .ok_or_else(|| Error::Wrong(format!("no device to the {}", side.name)))?;
        netlink
            .link(*index, &[LinkAttribute::IfName(side.name.to_owned())], false)
            .during(format!("name the device to the {}", side.name))?;
    }
    Ok(())
}

/// Addresses, neighbours and the route out; the devices come up.
pub(crate) fn configure() -> Result<(), Error> {
    let mut netlink = Netlink::new()?;
    let index = |name: &str| index_of(name).during(format!("find the device {name}"));
    netlink.link(index("lo")?, &[], true).during("bring lo up")?;
    for side in &SIDES {
        let index = index(side.name)?;
        netlink.link(index, &[LinkAttribute::Mtu(side.mtu.into())], true).during(format!("bring {} up", side.name))?;
        netlink.address(index, side.address).during(format!("give {} to {}", side.address, side.name))?;
        netlink
            .neighbour(index, side.neighbour, side.neighbour_mac)
            .during(format!("set the neighbour of {}", side.name))?;
    }
    netlink.default_route(UPLINK_GATEWAY).during("set the default route")
}

fn index_of(name: &str) -> std::io::Result<u32> {
    let text = fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?;
    text.trim().parse().map_err(|_| std::io::ErrorKind::InvalidData.into())
}

/// MAC addresses and indexes of all devices.
fn devices() -> Result<Vec<([u8; 6], u32)>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/net").during("list the devices")? {
        let path = entry.during("list the devices")?.path();
        let mac = fs::read_to_string(path.join("address")).during("read a MAC address")?;
        let index = fs::read_to_string(path.join("ifindex")).during("read a device's index")?;
        if let (Some(mac), Ok(index)) = (parse_mac(mac.trim()), index.trim().parse()) {
            found.push((mac, index));
        }
    }
    Ok(found)
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+')))
        .collect();
    bytes?.try_into().ok()
}

/// rtnetlink, one request at a time.
struct Netlink(Socket);

impl Netlink {
    fn new() -> Result<Self, Error> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(Self(socket))
        };
        open().map_err(|source: std::io::Error| Error::Io { what: "open rtnetlink".to_owned(), source })
    }

    fn link(&mut self, index: u32, attributes: &[LinkAttribute], up: bool) -> std::io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        if up {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        }
        message.attributes = attributes.to_vec();
        self.ask(RouteNetlinkMessage::SetLink(message), 0)
    }

    fn address(&mut self, index: u32, address: Ipv4Addr) -> std::io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = PREFIX;
        message.header.index = index;
        message.attributes = vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
        self.ask(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    fn neighbour(&mut self, index: u32, address: Ipv4Addr, mac: [u8; 6]) -> std::io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        self.ask(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn default_route(&mut self, gateway: Ipv4Addr) -> std::io::Result<()> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: AddressFamily::Inet,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway))];
        self.ask(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Sends one request and waits for the kernel's answer.
    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> std::io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(std::io::Error::other)?;
        match answer.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            NetlinkPayload::Error(_) => Ok(()),
            _ => Err(std::io::ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_is_six_pairs_of_digits() {
        assert_eq!(parse_mac("52:54:00:10:10:01"), Some(GUEST_MAC));
        for wrong in
            ["", "52:54:00:10:10", "52:54:00:10:10:01:02", "52:54:00:10:10:1", "52:54:00:10:10:+1", "zz:54:00:10:10:01"]
        {
            assert_eq!(parse_mac(wrong), None, "{wrong}");
        }
    }
}
