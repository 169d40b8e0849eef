//! The desired state and our names in the kernel.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// `SO_MARK` of sockets that may leave. Compared with the full mask: `ip rule`, nft and the engine all use this number.
pub const MARK: u32 = 0x7076_706e;
/// Mark of what leaves without [`MARK`] while there is a lock: by it the lock knows what our table let through. No rule leads
/// it anywhere, and our table does not ask for it.
pub const PASSED: u32 = MARK + 3;
/// Our routing table. Outside what distributions and wg-quick (51820) use.
pub const TABLE: u32 = 7_376_750;
/// First priority of our policy rules; they stand in front of main (32766) and of what wg-quick and tailscale add (5210 and up).
pub const RULE_PRIORITY: u32 = 3_700;
/// How many priorities from [`RULE_PRIORITY`] on are ours.
pub const RULE_PRIORITIES: u32 = 32;
/// `rtm_protocol` and `FRA_PROTOCOL` of our routes and rules (rtnetlink(7)); not in iproute2's rt_protos.
pub const ROUTE_PROTOCOL: u8 = 112;
/// Name of our nft tables.
pub const NFT_TABLE: &str = "proxyvpn";
/// Name of the nft table that locks the machine, with a daemon or without.
pub const LOCK_TABLE: &str = "proxyvpn-lock";
/// What `src_valid_mark` is set to where it was 0: any non-zero value means on (ip-sysctl), and this one tells that it is ours.
pub const SYSCTL_ON: u32 = 112;

/// The network while a connection is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// The device that takes the traffic. `None`: blocked, what would go into it is refused as unreachable.
    pub tunnel: Option<Tunnel>,
    /// Addresses that answer on the tunnel only, whether there is one or not.
    pub guarded: Vec<IpAddr>,
    /// What may go around the tunnel.
    pub exceptions: Exceptions,
    /// Port 53 of any address is steered, UDP and TCP, local networks too, and whether there is a tunnel or not.
    pub steer_dns: bool,
    /// Block everything else.
    pub killswitch: bool,
    /// Answer connections that began outside the way they came.
    pub inbound_replies: bool,
    /// Whether there is a lock beside our table.
    pub locked: Locked,
    /// What becomes of traffic that this machine forwards.
    pub forward: Forward,
    /// The firewall may be applied through iptables where the kernel has no nf_tables.
    pub iptables_fallback: bool,
}

impl Desired {
    /// Nothing leaves: no tunnel, no exception. What begins outside is answered.
    #[must_use]
    pub fn closed() -> Self {
        Self {
            tunnel: None,
            guarded: Vec::new(),
            exceptions: Exceptions::default(),
            steer_dns: false,
            killswitch: true,
            inbound_replies: true,
            locked: Locked::No,
            forward: Forward::Block,
            iptables_fallback: false,
        }
    }

    /// Whether forwarded TCP goes into the tunnel and comes back.
    #[must_use]
    pub fn forwards(&self) -> bool {
        self.tunnel.is_some() && (self.forward == Forward::Tunnel || !self.killswitch)
    }
}

/// What becomes of traffic that this machine forwards, as of containers and virtual machines, while the kill switch is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forward {
    /// Nothing is forwarded.
    Block,
    /// TCP goes into the tunnel, DNS to the listed resolvers; the rest is refused.
    Tunnel,
}

/// Whether there is a lock beside our table, by which nothing leaves that is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locked {
    /// There is none.
    No,
    /// What our table lets through carries [`PASSED`] for it.
    Yes,
    /// The same, and nothing is to be steered: where TCP has no route, connections from outside could not be answered.
    Idle,
}

/// The tunnel device: a TUN device, or with a gateway a TAP device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnel {
    /// Name, at most 15 bytes.
    pub name: String,
    /// IPv4 address with prefix.
    pub v4: Ipv4Net,
    /// IPv6 address with prefix. `None`: IPv6 is refused.
    pub v6: Option<Ipv6Net>,
    /// MTU in bytes.
    pub mtu: u16,
    /// The router behind the device. `None`: the device itself takes every packet.
    pub gateway: Option<Gateway>,
}

impl Tunnel {
    /// The addresses of the device.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        [IpAddr::V4(self.v4.addr())].into_iter().chain(self.v6.map(|v6| IpAddr::V6(v6.addr())))
    }
}

/// A router behind the tunnel device that is not trusted: nothing that it begins gets in. It takes TCP over IPv4, and DNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gateway {
    /// Its address, in the network of [`Tunnel::v4`].
    pub address: Ipv4Addr,
    /// Its MAC address. Neither side asks for the other's by ARP.
    pub mac: [u8; 6],
    /// The device's own MAC address.
    pub own_mac: [u8; 6],
    /// A service of the gateway that is not for everybody.
    pub control: Control,
}

/// A TCP service of the gateway for one user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// Its port.
    pub port: u16,
    /// The only local user who may connect, by id.
    pub user: u32,
}

/// What may go around the tunnel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exceptions {
    /// Destinations.
    pub lan: Vec<IpNet>,
    /// Resolvers: UDP and TCP port 53 only.
    pub resolvers: Vec<IpAddr>,
    /// Local users, by id.
    pub users: Vec<u32>,
    /// TCP services of this machine that sockets with our mark may reach: a proxy that runs here. Without a gateway they may
    /// reach all.
    pub services: Vec<SocketAddr>,
}
