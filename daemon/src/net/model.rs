//! The kernel as a model, for tests: takes the steps of [`plan`](super::plan), and says where a packet of any program goes.

use super::desired::{Desired, TABLE};
use super::observed::{Address, Link, Neighbour, Observed};
use super::plan;
use super::plan::tests::link;
use super::step::{Action, Change, Family, LOOSE, Rule, Stage, Step, Target, Verdict};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The kernel's network, as far as it is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Model {
    observed: Observed,
    /// The table is there, with the chains of the kill switch. It has an owner, so that no other program can remove it.
    firewall: bool,
}

/// Where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Uplink,
    Tunnel,
    Refused,
}

impl Model {
    /// A machine with an uplink that filters strictly by the way back. Without IPv6: its steps are those of IPv4 again.
    pub(crate) fn new() -> Self {
        let observed = Observed { links: vec![link(1, "lo", 0, 0), link(2, "eth0", 1, 0)], ..Observed::default() };
        Self { observed, firewall: false }
    }

    /// What a connection wants.
    pub(crate) fn desired() -> Desired {
        plan::tests::desired()
    }

    /// What is to be done now to get there.
    pub(crate) fn plan(&self, stage: Stage, desired: &Desired) -> Vec<Step> {
        match stage {
            Stage::Firewall if self.firewall => vec![],
            Stage::Firewall => vec![firewall(Action::Add)],
            Stage::Tunnel | Stage::Routes => {
                plan::plan(&self.observed, desired).into_iter().filter(|step| step.stage() == stage).collect()
            }
        }
    }

    /// What removes all that is ours, the firewall last.
    pub(crate) fn plan_removal(&self) -> Vec<Step> {
        plan::plan_removal(&self.observed).into_iter().chain(self.firewall.then(|| firewall(Action::Remove))).collect()
    }

    /// Does a step, or nothing if it is done already.
    pub(crate) fn run(&mut self, step: &Step) {
        match step.change {
            Change::Firewall(_) => self.firewall = step.action == Action::Add,
            _ => apply(&mut self.observed, step),
        }
    }

    /// The device of the tunnel goes with its last descriptor, or because somebody removes it.
    pub(crate) fn lose_device(&mut self) {
        for name in
            self.observed.links.iter().filter(|link| link.ours).map(|link| link.name.clone()).collect::<Vec<_>>()
        {
            apply(&mut self.observed, &Step { action: Action::Remove, change: Change::Device { name, tap: false } });
        }
    }

    /// Another program flushes the policy rules.
    pub(crate) fn lose_rules(&mut self) {
        self.observed.rules.clear();
    }

    /// Another program flushes all routing tables.
    pub(crate) fn lose_routes(&mut self) {
        self.observed.routes.clear();
    }

    /// Whether anything of ours is there.
    pub(crate) fn is_clean(&self) -> bool {
        self.plan_removal().is_empty()
    }

    /// What leaves by the uplink of what any program sends to the outside.
    pub(crate) fn open(&self) -> Option<&'static str> {
        let kinds = [("tcp", TCP, 443), ("udp", UDP, 443), ("dns", UDP, 53)];
        let open = |(_, protocol, port): &_| self.way(Family::V4, *protocol, *port) == Way::Uplink;
        kinds.into_iter().find(open).map(|(name, ..)| name)
    }

    /// The way of a packet without our mark to an address that is no exception.
    fn way(&self, family: Family, protocol: u8, port: u16) -> Way {
        let mut rules: Vec<&Rule> = self.observed.rules.iter().filter(|rule| rule.family == family).collect();
        rules.sort_by_key(|rule| rule.priority);
        let meets = |rule: &&Rule| {
            rule.mark.is_none()
                && rule.device.is_none()
                && rule.to.is_none()
                && rule.users.is_none()
                && rule.protocol.is_none_or(|p| p == protocol)
                && rule.ports.is_none_or(|(first, last)| (first..=last).contains(&port))
        };
        let verdict = |rule: &Rule| match rule.verdict {
            Verdict::Lookup(TABLE) => self.route(family),
            Verdict::Lookup(_) => Some(Way::Uplink),
            Verdict::Unreachable => Some(Way::Refused),
        };
        match rules.into_iter().filter(meets).find_map(verdict).unwrap_or(Way::Uplink) {
            Way::Uplink if self.firewall => Way::Refused,
            way => way,
        }
    }

    /// Where our table leads; `None`: the next rule is asked.
    fn route(&self, family: Family) -> Option<Way> {
        let routes = self.observed.routes.iter().filter(|route| route.family == family);
        routes.min_by_key(|route| route.metric).map(|route| match &route.target {
            Target::Device(_) | Target::Gateway(..) => Way::Tunnel,
            Target::Unreachable => Way::Refused,
        })
    }

    /// All that is ours, one line each.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.plan_removal().iter().map(Step::line).collect()
    }
}

fn firewall(action: Action) -> Step {
    Step { action, change: Change::Firewall("table inet proxyvpn".to_owned()) }
}

/// Does a step to the observed state, as the kernel would.
fn apply(observed: &mut Observed, step: &Step) {
    let add = step.action == Action::Add;
    match step.change.clone() {
        Change::Device { name, tap } if add => {
            let ipv6 = observed.ipv6_for_new;
            let mac = tap.then_some([2; 6]);
            observed.links.push(Link { ours: true, ipv6, mac, up: false, ..link(9, &name, 0, 0) });
        }
        Change::Device { name, .. } => {
            // Its addresses and routes go with it.
            observed
                .addresses
                .retain(|address| observed.links.iter().any(|l| l.index == address.index && l.name != name));
            let through = |target: &_| matches!(target, Target::Device(d) | Target::Gateway(_, d) if *d == name);
            observed.routes.retain(|route| !through(&route.target));
            observed.links.retain(|link| link.name != name);
        }
        Change::Settings(tunnel) => {
            if let Some(link) = observed.links.iter_mut().find(|link| link.name == tunnel.name) {
                (link.up, link.mtu, link.queue) = (true, u32::from(tunnel.mtu), super::tun::QUEUE);
                (link.address_generation_off, link.multicast) = (true, false);
                if let Some(gateway) = tunnel.gateway {
                    (link.mac, link.arp) = (Some(gateway.own_mac), false);
                    link.source_validation.iter_mut().for_each(|validation| validation.rp_filter = LOOSE);
                }
            }
        }
        Change::Neighbour { device, gateway } => {
            if let Some(index) = observed.link(&device).map(|link| link.index) {
                let (address, mac) = (gateway.address, gateway.mac);
                observed.neighbours.retain(|neighbour| neighbour.index != index);
                observed.neighbours.push(Neighbour { index, address, mac });
            }
        }
        Change::Address { device, address } => {
            if let Some(index) = observed.link(&device).map(|link| link.index) {
                observed.addresses.retain(|a| *a != Address { index, address });
                observed.addresses.extend(add.then_some(Address { index, address }));
            }
        }
        Change::Route(route) => {
            observed.routes.retain(|r| *r != route);
            let possible = match &route.target {
                Target::Device(name) | Target::Gateway(_, name) => observed.link(name).is_some_and(|link| link.up),
                Target::Unreachable => true,
            };
            observed.routes.extend((add && possible).then_some(route));
        }
        Change::Rule(rule) => {
            observed.rules.retain(|r| *r != rule);
            observed.rules.extend(add.then_some(rule));
        }
        Change::SourceMark { device, value } => {
            let link = observed.links.iter_mut().find(|link| link.name == device);
            if let Some(validation) = link.and_then(|link| link.source_validation.as_mut()) {
                validation.src_valid_mark = value;
            }
        }
        Change::Firewall(_) => {}
    }
}
