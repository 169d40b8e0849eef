//! How the upstream is reached now: whether it can be, and whether that is another way than before.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::observed::{Hop, Link};

/// Most targets that are asked for.
const MAX_TARGETS: usize = 24;
/// Addresses for documentation (RFC 5737, RFC 3849): they go by the default routes.
const FAR: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0xffff, 0, 0, 0, 1))];

/// What a packet with our mark would do. Two that are equal lead the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// The upstream's addresses.
    targets: Vec<Course>,
    /// Anywhere.
    far: Vec<Course>,
    /// Some device outside this machine has a connection.
    connected: bool,
}

/// The way to one address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Course {
    to: IpAddr,
    /// Where it goes, by which device, and whether that has a carrier.
    hop: Option<(Hop, String, bool)>,
}

/// Why nothing can leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// No device has a cable, a base station or the like.
    NoConnection,
    /// The device that leads to the upstream has none.
    NoCarrier(String),
    /// There is a connection, but no route.
    NoDefaultRoute,
    /// There is a default route, but none to the upstream.
    NoRoute(Vec<IpAddr>),
}

/// The addresses whose ways are asked for.
pub(super) fn questions(targets: &[IpAddr]) -> Vec<IpAddr> {
    targets.iter().copied().take(MAX_TARGETS).chain(FAR).collect()
}

impl Way {
    /// From the answers to [`questions`].
    pub(super) fn new(hops: Vec<(IpAddr, Option<Hop>)>, links: &[Link]) -> Self {
        let course = |(to, hop): (IpAddr, Option<Hop>)| {
            let hop = hop.map(|hop| {
                let link = links.iter().find(|link| link.index == hop.device);
                (hop, link.map(|link| link.name.clone()).unwrap_or_default(), link.is_none_or(|link| link.carrier))
            });
            Course { to, hop }
        };
        let mut targets: Vec<Course> = hops.into_iter().map(course).collect();
        let far = targets.split_off(targets.len().saturating_sub(FAR.len()));
        let connected = links.iter().any(|link| !link.loopback && !link.ours && link.up && link.carrier);
        Self { targets, far, connected }
    }

    /// Why nothing can reach the upstream; `None`: something may.
    #[must_use]
    pub fn cut(&self) -> Option<Cut> {
        let asked = if self.targets.is_empty() { &self.far } else { &self.targets };
        // A default route of the other version is none to the upstream.
        let like = |far: &&Course| asked.iter().any(|course| course.to.is_ipv4() == far.to.is_ipv4());
        let mut dead = None;
        for course in asked {
            match &course.hop {
                Some((_, _, true)) => return None,
                Some((_, device, false)) => dead = Some(device.clone()),
                None => {}
            }
        }
        Some(match dead {
            _ if !self.connected => Cut::NoConnection,
            Some(device) => Cut::NoCarrier(device),
            None if self.far.iter().filter(like).all(|far| far.hop.is_none()) => Cut::NoDefaultRoute,
            None => Cut::NoRoute(self.targets.iter().map(|course| course.to).collect()),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::net::plan::tests::link;

    fn way(targets: &[(&str, Option<u32>)], far: Option<u32>, links: &[Link]) -> Way {
        way_of(targets, [far, None], links)
    }

    fn way_of(targets: &[(&str, Option<u32>)], far: [Option<u32>; 2], links: &[Link]) -> Way {
        let hop = |device: Option<u32>| device.map(|device| Hop { device, ..Hop::default() });
        let targets = targets.iter().map(|(to, device)| (to.parse().unwrap(), hop(*device)));
        Way::new(targets.chain([(FAR[0], hop(far[0])), (FAR[1], hop(far[1]))]).collect(), links)
    }

    #[test]
    fn the_cause_is_the_nearest_one() {
        let up = || vec![Link { loopback: true, ..link(1, "lo", 0, 0) }, link(2, "eth0", 0, 0)];
        let down = || vec![up().remove(0), Link { carrier: false, ..link(2, "eth0", 0, 0) }];
        let proxy = "203.0.113.1";
        let cases = [
            (way(&[(proxy, Some(2))], Some(2), &up()), None),
            (way(&[], Some(2), &up()), None),
            (way(&[(proxy, Some(2))], None, &up()), None),
            (way(&[(proxy, Some(1))], None, &down()), None),
            (way(&[(proxy, None), ("2001:db8::5", Some(2))], None, &up()), None),
            (way(&[(proxy, Some(2))], Some(2), &down()), Some(Cut::NoConnection)),
            (way(&[(proxy, None)], None, &down()), Some(Cut::NoConnection)),
            (way(&[(proxy, None)], None, &up()), Some(Cut::NoDefaultRoute)),
            (way(&[], None, &up()), Some(Cut::NoDefaultRoute)),
            (way_of(&[(proxy, None)], [None, Some(2)], &up()), Some(Cut::NoDefaultRoute)),
            (way(&[(proxy, None)], Some(2), &up()), Some(Cut::NoRoute(vec![proxy.parse().unwrap()]))),
        ];
        for (number, (way, expected)) in cases.into_iter().enumerate() {
            assert_eq!(way.cut(), expected, "{number}");
        }
        let mut two = down();
        two.push(link(3, "wlan0", 0, 0));
        assert_eq!(way(&[(proxy, Some(2))], Some(2), &two).cut(), Some(Cut::NoCarrier("eth0".to_owned())));
    }

    #[test]
    fn another_gateway_source_or_carrier_is_another_way() {
        let links = [link(2, "eth0", 0, 0)];
        let hop = Hop { device: 2, gateway: Some("192.0.2.1".parse().unwrap()), source: None };
        let way = |hop: Hop, links: &[Link]| Way::new(vec![(FAR[0], Some(hop)), (FAR[1], None)], links);
        let first = way(hop, &links);
        assert_eq!(first, way(hop, &links));
        assert_ne!(first, way(Hop { gateway: Some("192.0.2.9".parse().unwrap()), ..hop }, &links));
        assert_ne!(first, way(Hop { source: Some("192.0.2.7".parse().unwrap()), ..hop }, &links));
        assert_ne!(first, way(hop, &[Link { carrier: false, ..link(2, "eth0", 0, 0) }]));
        assert_ne!(first, way(hop, &[link(2, "wan", 0, 0)]));
    }
}
