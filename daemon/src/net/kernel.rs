//! Reading the kernel's state and doing single steps.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

use rtnetlink::Handle;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::packet_route::route::RouteMessage;

use super::desired::{MARK, TABLE, Tunnel};
use super::observed::{Hop, Link, MainRoute, Observed, SourceValidation};
use super::plan::MAIN;
use super::step::{Action, Change, Family, Route, Rule, Step, Target};
use super::{Error, rtnl, tun};

/// Routes of main that are looked at; a router may have a million.
const MAX_MAIN: usize = 1_000;

/// The connection to rtnetlink(7).
#[derive(Debug)]
pub(super) struct Kernel {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Kernel {
    pub(super) fn connect() -> Result<Self, Error> {
        let (connection, handle) = rtnl::connect().map_err(Error::Connect)?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }

    /// Every device.
    pub(super) async fn links(&self) -> Result<Vec<Link>, Error> {
        let list = self.dump("network devices", RouteNetlinkMessage::GetLink(LinkMessage::default())).await?;
        Ok(list.iter().filter_map(link).collect())
    }

    /// Everything that matters to us.
    pub(super) async fn observe(&self) -> Result<Observed, Error> {
        let links = self.links().await?;
        let mut observed = Observed {
            all: SourceValidation {
                rp_filter: read_parameter("ipv4/conf/all/rp_filter"),
                src_valid_mark: read_parameter("ipv4/conf/all/src_valid_mark"),
            },
            ipv6: links.iter().any(|link| link.has_ipv6),
            ..Observed::default()
        };
        observed.ipv6_for_new = observed.ipv6 && read_parameter("ipv6/conf/default/disable_ipv6") == 0;
        let list = self.dump("addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default())).await?;
        observed.addresses = list
            .iter()
            .filter_map(|m| if let RouteNetlinkMessage::NewAddress(m) = m { rtnl::parse_address(m) } else { None })
            .collect();
        for link in links.iter().filter(|link| link.ours && link.mac.is_some()) {
            let list = self.dump("neighbours", rtnl::neighbours_of(link.index)).await?;
            observed.neighbours.extend(list.iter().filter_map(|m| match m {
                RouteNetlinkMessage::NewNeighbour(m) => rtnl::parse_neighbour(m).filter(|n| n.index == link.index),
                _ => None,
            }));
        }
        for family in Family::ALL {
            // A kernel without IPv6 answers with everything of every family.
            if family == Family::V6 && !observed.ipv6 {
                continue;
            }
            for message in self.dump("policy rules", rtnl::all_rules(family)).await? {
                let RouteNetlinkMessage::NewRule(message) = message else { continue };
                match rtnl::parse_rule(&message) {
                    Some((_, Some(rule))) => observed.rules.push(rule),
                    Some((priority, None)) => observed.foreign_rules.push(priority),
                    None => {}
                }
            }
            self.routes(TABLE, family, |message| match rtnl::parse_route(message, &links) {
                Some(Ok(route)) => observed.routes.push(route),
                Some(Err(())) => observed.foreign_routes += 1,
                None => {}
            })
            .await?;
        }
        observed.links = links;
        Ok(observed)
    }

    /// Calls `each` with the routes of a table, and perhaps with those of others.
    async fn routes(&self, table: u32, family: Family, mut each: impl FnMut(&RouteMessage)) -> Result<(), Error> {
        let listed = rtnl::each(&self.handle, rtnl::routes_of(table, family), |message| {
            if let RouteNetlinkMessage::NewRoute(message) = message {
                each(&message);
            }
        });
        match listed.await {
            // A table without routes is not there.
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                Err(Error::Read { what: "routes", source: error })
            }
            _ => Ok(()),
        }
    }

    /// The routes of main, at most [`MAX_MAIN`] of each version beside the default ones.
    pub(super) async fn main_routes(&self) -> Result<Vec<MainRoute>, Error> {
        let mut routes = vec![];
        for family in Family::ALL {
            let mut count = 0;
            self.routes(MAIN, family, |message| {
                let Some(route) = rtnl::parse_main_route(message).filter(|route| route.family == family) else {
                    return;
                };
                count += usize::from(route.to.is_some());
                if route.to.is_none() || count <= MAX_MAIN {
                    routes.push(route);
                }
            })
            .await?;
        }
        Ok(routes)
    }

    /// Devices that a gateway is behind, by index.
    pub(super) async fn outward(&self) -> Result<HashSet<u32>, Error> {
        let routes = self.main_routes().await?;
        let leads = routes.iter().filter(|route| route.to.is_none() || route.hop.gateway.is_some());
        Ok(leads.map(|route| route.hop.device).collect())
    }

    /// Where a packet with our mark goes on its way to each of `targets`; `None`: nowhere.
    pub(super) async fn hops(&self, targets: &[IpAddr]) -> Result<Vec<(IpAddr, Option<Hop>)>, Error> {
        let mut hops = vec![];
        for target in targets {
            let found = rtnl::look_up(&self.handle, *target, MARK).await;
            let found = found.map_err(|source| Error::Read { what: "the way to the upstream", source })?;
            hops.push((*target, found.as_ref().and_then(rtnl::parse_hop)));
        }
        Ok(hops)
    }

    /// Makes the device with its mark of ownership.
    pub(super) async fn create(&self, tunnel: &Tunnel, queues: usize) -> Result<Vec<std::os::fd::OwnedFd>, Error> {
        let failed = |source| Error::Create { name: tunnel.name.clone(), source };
        let fds = tun::create(tunnel, queues).map_err(failed)?;
        let index = self.index(&tunnel.name).await?;
        let message = RouteNetlinkMessage::SetLink(rtnl::alias_message(index));
        rtnl::request(&self.handle, message, false).await.map_err(failed)?;
        Ok(fds)
    }

    /// Does one step. Steps of the firewall are not done here.
    pub(super) async fn run(&self, step: &Step) -> Result<(), Error> {
        let failed = |source: io::Error| {
            let hint = match (&step.change, source.raw_os_error()) {
                (_, Some(libc::EPERM)) => ": the daemon lacks CAP_NET_ADMIN",
                (Change::Rule(Rule { protocol: Some(_), .. }), Some(libc::EINVAL)) => {
                    ": rules by protocol need Linux 4.17 or newer with CONFIG_IP_MULTIPLE_TABLES"
                }
                _ => "",
            };
            Error::Step { step: step.line(), hint, source }
        };
        let add = step.action == Action::Add;
        match &step.change {
            // Only `create` makes it, because somebody must hold its descriptors.
            Change::Device { name, .. } if add => Err(Error::TunnelMissing(name.clone())),
            Change::Device { name, .. } => {
                let links = self.links().await?;
                let Some(link) = links.iter().find(|link| link.name == *name && link.ours) else { return Ok(()) };
                self.delete(link).await.map_err(failed)
            }
            Change::Settings(tunnel) => {
                let links = self.links().await?;
                let Some(link) = links.iter().find(|link| link.name == tunnel.name) else {
                    return Err(Error::TunnelMissing(tunnel.name.clone()));
                };
                for message in rtnl::settings_messages(link, tunnel, tun::QUEUE) {
                    let message = RouteNetlinkMessage::SetLink(message);
                    rtnl::request(&self.handle, message, false).await.map_err(failed)?;
                }
                Ok(())
            }
            Change::Neighbour { device, gateway } => {
                let message = rtnl::neighbour_message(self.index(device).await?, gateway);
                let message = RouteNetlinkMessage::NewNeighbour(message);
                rtnl::replace(&self.handle, message).await.map_err(failed)
            }
            Change::Address { device, address } => {
                let message = rtnl::address_message(self.index(device).await?, *address);
                let message = choose(add, message, RouteNetlinkMessage::NewAddress, RouteNetlinkMessage::DelAddress);
                rtnl::request(&self.handle, message, add).await.map_err(failed)
            }
            Change::Route(route) => self.route(route, add).await?.map_err(failed),
            Change::Rule(rule) => {
                let message = rtnl::rule_message(rule);
                let message = choose(add, message, RouteNetlinkMessage::NewRule, RouteNetlinkMessage::DelRule);
                rtnl::request(&self.handle, message, add).await.map_err(failed)
            }
            Change::SourceMark { device, value } => {
                let message = rtnl::source_mark_message(self.index(device).await?, *value);
                rtnl::request(&self.handle, RouteNetlinkMessage::SetLink(message), false).await.map_err(failed)
            }
            Change::Firewall(_) => Ok(()),
        }
    }

    /// Removes a device.
    pub(super) async fn delete(&self, link: &Link) -> io::Result<()> {
        let message = RouteNetlinkMessage::DelLink(rtnl::link_message(link.index));
        rtnl::request(&self.handle, message, false).await
    }

    async fn route(&self, route: &Route, add: bool) -> Result<io::Result<()>, Error> {
        let device = match &route.target {
            Target::Device(name) | Target::Gateway(_, name) => Some(self.index(name).await?),
            Target::Unreachable => None,
        };
        let message = rtnl::route_message(route, device);
        let message = choose(add, message, RouteNetlinkMessage::NewRoute, RouteNetlinkMessage::DelRoute);
        Ok(rtnl::request(&self.handle, message, add).await)
    }

    async fn index(&self, name: &str) -> Result<u32, Error> {
        let links = self.links().await?;
        links
            .iter()
            .find(|link| link.name == name)
            .map(|link| link.index)
            .ok_or_else(|| Error::TunnelMissing(name.to_owned()))
    }

    async fn dump(&self, what: &'static str, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Error> {
        rtnl::dump(&self.handle, message).await.map_err(|source| Error::Read { what, source })
    }
}

/// What was to be removed is not there any more, or what was to be added is.
pub(super) fn already(step: &Step, error: &Error) -> bool {
    let code = match error {
        Error::TunnelMissing(_) => Some(libc::ENODEV),
        Error::Step { source, .. } => source.raw_os_error(),
        _ => None,
    };
    match step.action {
        Action::Add => code == Some(libc::EEXIST),
        Action::Remove => {
            matches!(code, Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL))
        }
        Action::Set => code == Some(libc::ENODEV),
    }
}

fn choose<T>(
    add: bool,
    message: T,
    new: fn(T) -> RouteNetlinkMessage,
    del: fn(T) -> RouteNetlinkMessage,
) -> RouteNetlinkMessage {
    if add { new(message) } else { del(message) }
}

fn link(message: &RouteNetlinkMessage) -> Option<Link> {
    if let RouteNetlinkMessage::NewLink(message) = message { Some(rtnl::parse_link(message)) } else { None }
}

/// A parameter of this thread's network namespace; 0 where it is not there.
fn read_parameter(path: &str) -> u32 {
    let text = std::fs::read_to_string(format!("/proc/sys/net/{path}")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
