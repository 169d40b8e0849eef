//! The guest's two network devices: one to the host (a TAP device there), one to the packet engine, which is its only way out.

use std::net::Ipv4Addr;

/// Prefix length of both networks.
pub const PREFIX: u8 = 30;

/// The guest, as the host sees it.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 10, 10, 1);
/// The host, as the guest sees it.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 10, 10, 2);
/// MAC address of the guest's device to the host.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x10, 0x10, 0x01];
/// MAC address of the host's TAP device.
pub const HOST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x10, 0x10, 0x02];
/// MTU between host and guest in bytes.
pub const HOST_MTU: u16 = 1500;

/// The guest on its way out.
pub const UPLINK_GUEST: Ipv4Addr = Ipv4Addr::new(10, 10, 11, 2);
/// The packet engine, the guest's gateway.
pub const UPLINK_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 10, 11, 1);
/// MAC address of the guest's device to the packet engine.
pub const UPLINK_GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x10, 0x11, 0x02];
/// MAC address by which the packet engine answers.
pub const UPLINK_GATEWAY_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x10, 0x11, 0x01];
/// MTU on the way out in bytes: the link has no segmentation offload, so large frames replace it.
pub const UPLINK_MTU: u16 = 65520;

/// Tor's transparent proxy.
pub const TRANS_PORT: u16 = 9095;
/// Tor's resolver, UDP.
pub const DNS_PORT: u16 = 9093;
/// Tor's SOCKS proxy.
pub const SOCKS_PORT: u16 = 9050;
/// Tor's control port: for the daemon alone.
pub const CONTROL_PORT: u16 = 9051;

/// Where Tor puts the addresses that stand for `.onion` names (`VirtualAddrNetworkIPv4`).
pub const ONION_NETWORK: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 192, 0, 0), 10);
