//! The difference between what is and what is wanted, as steps. Pure.

use std::net::IpAddr;

use ipnet::IpNet;

use super::desired::{Desired, Gateway, Locked, MARK, RULE_PRIORITIES, RULE_PRIORITY, SYSCTL_ON, TABLE, Tunnel};
use super::observed::{Link, Neighbour, Observed, SourceValidation};
use super::step::{Action, Change, Family, LOOSE, Route, Rule, Step, Target, Verdict};

/// `RT_TABLE_MAIN`.
pub(super) const MAIN: u32 = 254;
/// Metric of the route into the tunnel. Not 0, which IPv6 turns into 1024.
const METRIC: u32 = 1;
/// Metric of the last resort: behind everything.
const METRIC_LAST: u32 = u32::MAX;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Strict reverse-path filtering (RFC 3704).
const STRICT: u32 = 1;

/// Steps of the device, its addresses, routes, rules and kernel parameters from `observed` to `desired`. Everything that
/// is added comes before anything is taken away. A second plan after the first was applied is empty.
pub(super) fn plan(observed: &Observed, desired: &Desired) -> Vec<Step> {
    let mut steps = vec![];
    if let Some(tunnel) = &desired.tunnel {
        plan_tunnel(observed, tunnel, &mut steps);
    }
    let ours = desired.tunnel.as_ref().map(|tunnel| tunnel.name.as_str());
    let (routes, rules) = match desired.locked {
        Locked::Idle => (vec![], vec![]),
        Locked::No | Locked::Yes => (routes(observed, desired), rules(observed, desired)),
    };
    let marks = source_marks(observed, ours);

    // The table is full before a rule leads to it, and the exceptions stand before the rule that they are exceptions of.
    steps.extend(routes.iter().filter(|r| !observed.routes.contains(r)).map(|r| add(Change::Route(r.clone()))));
    steps.extend(marks);
    steps.extend(rules.iter().filter(|r| !observed.rules.contains(r)).map(|r| add(Change::Rule(r.clone()))));
    steps.extend(observed.rules.iter().filter(|r| !rules.contains(r)).map(|r| remove(Change::Rule(r.clone()))));
    steps.extend(observed.routes.iter().filter(|r| !routes.contains(r)).map(|r| remove(Change::Route(r.clone()))));
    steps
}

/// Steps that remove every rule, route, kernel parameter and device of ours.
pub(super) fn plan_removal(observed: &Observed) -> Vec<Step> {
    let rules = observed.rules.iter().cloned().map(Change::Rule);
    let routes = observed.routes.iter().cloned().map(Change::Route);
    let mut steps: Vec<Step> = rules.chain(routes).map(remove).collect();
    let marked = |link: &&Link| link.source_validation.is_some_and(|validation| validation.src_valid_mark == SYSCTL_ON);
    steps.extend(observed.links.iter().filter(marked).map(|link| source_mark(&link.name, 0)));
    let devices = observed.links.iter().filter(|link| link.ours);
    steps.extend(devices.map(|link| remove(Change::device(link))));
    steps
}

fn plan_tunnel(observed: &Observed, tunnel: &Tunnel, steps: &mut Vec<Step>) {
    let link = observed.links.iter().find(|link| is_device(link, tunnel));
    if link.is_none() {
        steps.push(add(Change::Device { name: tunnel.name.clone(), tap: tunnel.gateway.is_some() }));
    }
    let set = link.is_some_and(|link| {
        link.up
            && link.mtu == u32::from(tunnel.mtu)
            && link.queue == super::tun::QUEUE
            && !link.multicast
            && (link.address_generation_off || !link.ipv6)
            && tunnel.gateway.is_none_or(|gateway| is_closed(link, &gateway))
    });
    if !set {
        steps.push(Step { action: Action::Set, change: Change::Settings(tunnel.clone()) });
    }
    let mut wanted = vec![IpNet::V4(tunnel.v4)];
    if let Some(v6) = tunnel.v6.filter(|_| has_ipv6(observed, tunnel)) {
        wanted.push(IpNet::V6(v6));
    }
    for address in wanted {
        let there =
            link.is_some_and(|link| observed.addresses.iter().any(|a| a.index == link.index && a.address == address));
        if !there {
            steps.push(add(Change::Address { device: tunnel.name.clone(), address }));
        }
    }
    if let Some(gateway) = tunnel.gateway {
        let known = |neighbour: &Neighbour| neighbour.address == gateway.address && neighbour.mac == gateway.mac;
        let there = link.is_some_and(|l| observed.neighbours.iter().any(|n| n.index == l.index && known(n)));
        if !there {
            let change = Change::Neighbour { device: tunnel.name.clone(), gateway };
            steps.push(Step { action: Action::Set, change });
        }
    }
}

/// Whether this is the device: ours, and of the right kind.
pub(super) fn is_device(link: &Link, tunnel: &Tunnel) -> bool {
    link.ours && link.name == tunnel.name && link.mac.is_some() == tunnel.gateway.is_some()
}

/// Has its own address, tells nobody which addresses this machine has, and takes answers of anybody.
fn is_closed(link: &Link, gateway: &Gateway) -> bool {
    let loose = |validation: SourceValidation| validation.rp_filter == LOOSE;
    link.mac == Some(gateway.own_mac) && !link.arp && link.source_validation.is_none_or(loose)
}

/// Whether the tunnel carries IPv6. Where it has none, or the administrator disabled it for new devices, it is refused instead.
fn has_ipv6(observed: &Observed, tunnel: &Tunnel) -> bool {
    tunnel.v6.is_some()
        && observed.link(&tunnel.name).filter(|link| link.ours).map_or(observed.ipv6_for_new, |link| link.ipv6)
}

/// The routes of our table.
fn routes(observed: &Observed, desired: &Desired) -> Vec<Route> {
    let mut routes: Vec<Route> = families(observed)
        .map(|family| Route { family, to: None, target: Target::Unreachable, metric: METRIC_LAST })
        .collect();
    let through = |family, name: &str| {
        let target = Target::Device(name.to_owned());
        Route { family, to: None, target, metric: METRIC }
    };
    match (&desired.tunnel, held(observed, desired)) {
        (Some(tunnel), _) => {
            let mut route = through(Family::V4, &tunnel.name);
            if let Some(gateway) = tunnel.gateway {
                route.target = Target::Gateway(gateway.address, tunnel.name.clone());
            }
            routes.push(route);
            if has_ipv6(observed, tunnel) {
                routes.push(through(Family::V6, &tunnel.name));
            }
        }
        (None, Some(link)) => {
            routes.push(through(Family::V4, &link.name));
            if link.ipv6 {
                routes.push(through(Family::V6, &link.name));
            }
        }
        (None, None) => {}
    }
    routes
}

/// The device that takes what is blocked, behind a firewall that lets nothing into it: a packet without a route would not even
/// get to the rule by which an answer to outside gets another one. One with a gateway may wait for that, with its address.
fn held<'a>(observed: &'a Observed, desired: &Desired) -> Option<&'a Link> {
    let bare = |link: &Link| !observed.addresses.iter().any(|address| address.index == link.index);
    let held = |link: &&Link| link.ours && link.up && (link.mac.is_some() || bare(link));
    observed.links.iter().find(held).filter(|_| desired.tunnel.is_none() && desired.killswitch)
}

/// The policy rules, in the order in which they are asked. Each kind has its own priority, so that a change of one list
/// moves no other rule.
fn rules(observed: &Observed, desired: &Desired) -> Vec<Rule> {
    let exceptions = &desired.exceptions;
    let mut rules = vec![];
    let any = |family, priority| Rule {
        family,
        priority: RULE_PRIORITY + priority,
        mark: None,
        device: None,
        to: None,
        users: None,
        protocol: None,
        ports: None,
        verdict: Verdict::Lookup(MAIN),
    };
    for family in families(observed) {
        rules.push(Rule { mark: Some((MARK, u32::MAX)), ..any(family, 0) });
        if let Some(gateway) = desired.tunnel.as_ref().and_then(|t| t.gateway).filter(|_| family == Family::V4) {
            // Before the exceptions: local networks may hold its address.
            let to = Some(IpAddr::V4(gateway.address).into());
            rules.push(Rule { to, verdict: Verdict::Lookup(TABLE), ..any(family, 0) });
        }
        for user in &exceptions.users {
            rules.push(Rule { users: Some((*user, *user)), ..any(family, 1) });
        }
        if desired.steer_dns {
            // A local network often has the resolver that would be told every name. While all is blocked a firewall that lets local
            // networks through would let it into the device that holds the tunnel's place.
            let verdict = if desired.tunnel.is_some() { Verdict::Lookup(TABLE) } else { Verdict::Unreachable };
            let port = |protocol| Rule { protocol: Some(protocol), ports: Some((53, 53)), verdict, ..any(family, 2) };
            rules.extend([UDP, TCP].map(port));
        }
        for net in exceptions.lan.iter().filter(|net| Family::of(net) == family) {
            // The kernel drops a prefix that matches everything.
            let to = Some(net.trunc()).filter(|net| net.prefix_len() > 0);
            rules.push(Rule { to, ..any(family, if desired.steer_dns { 3 } else { 2 }) });
        }
        for resolver in exceptions.resolvers.iter().map(IpAddr::to_canonical).map(IpNet::from) {
            if Family::of(&resolver) == family {
                for protocol in [UDP, TCP] {
                    let (to, protocol) = (Some(resolver), Some(protocol));
                    rules.push(Rule { to, protocol, ports: Some((53, 53)), ..any(family, 3) });
                }
            }
        }
        if let Some(tunnel) = desired.tunnel.as_ref().filter(|_| desired.forwards()) {
            // What comes back for those behind this machine. Strict reverse-path filtering asks for the way to them from
            // here too (fib_validate_source).
            rules.push(Rule { device: Some(tunnel.name.clone()), ..any(family, 4) });
        }
        // Where the main table has no way for the daemon's own connections, the tunnel is none: they would come back to it.
        let marked = Some((MARK, u32::MAX));
        rules.push(Rule { mark: marked, verdict: Verdict::Unreachable, ..any(family, RULE_PRIORITIES - 2) });
        let verdict = Verdict::Lookup(TABLE);
        rules.push(Rule { protocol: Some(TCP), verdict, ..any(family, RULE_PRIORITIES - 1) });
    }
    // The kernel would take a rule twice and give it back twice.
    let mut unique: Vec<Rule> = Vec::with_capacity(rules.len());
    for rule in rules {
        if !unique.contains(&rule) {
            unique.push(rule);
        }
    }
    unique
}

/// Strict reverse-path filtering must know the mark to find the way back of marked packets. Devices without it stay as
/// they are, and so do those where the administrator switched it on.
fn source_marks(observed: &Observed, tunnel: Option<&str>) -> Vec<Step> {
    let mut steps = vec![];
    for link in observed.links.iter().filter(|link| !link.loopback && !link.ours) {
        let Some(own) = link.source_validation else { continue };
        if Some(link.name.as_str()) == tunnel {
            continue;
        }
        // net.ipv4.conf.all counts too: the higher rp_filter, and either src_valid_mark (linux/inetdevice.h).
        let SourceValidation { rp_filter, src_valid_mark } = observed.all;
        let needed = own.rp_filter.max(rp_filter) == STRICT && src_valid_mark == 0;
        match own.src_valid_mark {
            0 if needed => steps.push(source_mark(&link.name, SYSCTL_ON)),
            SYSCTL_ON if !needed => steps.push(source_mark(&link.name, 0)),
            _ => {}
        }
    }
    steps
}

fn families(observed: &Observed) -> impl Iterator<Item = Family> + use<> {
    let ipv6 = observed.ipv6;
    Family::ALL.into_iter().filter(move |family| *family == Family::V4 || ipv6)
}

fn source_mark(device: &str, value: u32) -> Step {
    Step { action: Action::Set, change: Change::SourceMark { device: device.to_owned(), value } }
}

const fn add(change: Change) -> Step {
    Step { action: Action::Add, change }
}

const fn remove(change: Change) -> Step {
    Step { action: Action::Remove, change }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(super) mod tests;
