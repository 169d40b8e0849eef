//! What was counted. Every packet or flow that is dropped, refused or cut short has a name here.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::packet::parse::Drop as Reason;

/// A number that one thread adds to and any thread reads.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning shard's thread may call it: there is one writer, so that no locked instruction is needed.
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Adds one, as [`add`](Self::add).
    pub(crate) fn increment(&self) {
        self.add(1);
    }

    /// The number.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])+ $field:ident: $name:literal,)+) => {
        /// The counters of one shard.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $($(#[$doc])+ pub(crate) $field: Counter,)+
        }

        impl Counters {
            /// Name and sum over `shards`.
            pub(crate) fn sum<'a>(shards: impl Iterator<Item = &'a Counters> + Clone) -> Vec<(&'static str, u64)> {
                vec![$(($name, shards.clone().map(|shard| shard.$field.get()).fold(0, u64::wrapping_add)),)+]
            }
        }
    };
}

counters! {
    /// Packets (or super-segments) read from the device.
    packets_in: "packets-in",
    /// Bytes of those, headers included.
    bytes_in: "bytes-in",
    /// Packets (or super-segments) written to the device.
    packets_out: "packets-out",
    /// Bytes of those, headers included.
    bytes_out: "bytes-out",
    /// Payload bytes from programs that the upstream took.
    bytes_sent: "bytes-sent",
    /// Payload bytes from the upstream.
    bytes_received: "bytes-received",
    /// Flows that the upstream accepted.
    flows_opened: "flows-opened",
    /// Opened flows that are over, whatever the way.
    flows_closed: "flows-closed",
    /// SYNs answered with a RST because the upstream or the destination did not want or could not.
    flows_refused: "flows-refused",
    /// SYNs answered with a RST because too many flows are open.
    flows_refused_full: "flows-refused-full",
    /// SYNs answered with a RST because too many wait for the upstream.
    flows_refused_pending: "flows-refused-pending",
    /// SYNs answered with a RST because the open flows hold all memory for rings.
    flows_refused_memory: "flows-refused-memory",
    /// SYNs answered with a RST because one of the two bounds is more than half used and who asks has the share that is left.
    flows_refused_fair: "flows-refused-fair",
    /// SYNs answered with a RST because nobody may be connected to that destination: see
    /// [`Connector`](crate::upstream::Connector). The upstream was not asked.
    flows_refused_forbidden: "flows-refused-forbidden",
    /// SYNs answered with a RST because no local port towards the upstream was free.
    flows_refused_no_port: "flows-refused-no-port",
    /// SYNs answered with a RST because this process could not open a socket for another reason.
    flows_refused_no_socket: "flows-refused-no-socket",
    /// Attempts given up because the program no longer waits.
    flows_cancelled: "flows-cancelled",
    /// Opened flows whose socket towards the upstream was closed by this side first: its port waits in TIME-WAIT.
    flows_closed_first: "flows-closed-first",
    /// Opened flows that the program reset.
    flows_reset_by_program: "flows-reset-by-program",
    /// Opened flows that the upstream reset.
    flows_reset_by_upstream: "flows-reset-by-upstream",
    /// Opened flows ended because a side that should have gone on stayed silent.
    flows_timed_out: "flows-timed-out",
    /// Segments of no known flow, answered with a RST.
    unknown_flow: "unknown-flow",
    /// Segments that came to another queue than their flow's, and reached it nevertheless.
    segments_handed_over: "segments-handed-over",
    /// Repeated SYNs of a flow that still waits for the upstream.
    syn_repeated: "syn-repeated",
    /// ARP requests of a guest for its gateway, answered.
    arp_answered: "arp-answered",
    /// Ports of a guest's that got a socket.
    udp_mappings: "udp-mappings",
    /// Of those the ones that are over: idle, broken, or at the engine's end.
    udp_mappings_ended: "udp-mappings-ended",
    /// Datagrams of a guest's that were sent.
    udp_out: "udp-out",
    /// Datagrams that were handed to a guest.
    udp_in: "udp-in",
    /// A guest's UDP packets refused because this machine has no way there.
    udp_refused: "udp-refused",
    /// A guest's UDP packets refused because nobody may send there: see [`Connector`](crate::upstream::Connector).
    udp_refused_forbidden: "udp-refused-forbidden",
    /// A guest's UDP packets refused because too many of its ports have a socket.
    udp_refused_full: "udp-refused-full",
    /// A guest's UDP packets refused because their port has sent to too many others.
    udp_refused_peers: "udp-refused-peers",
    /// A guest's UDP packets refused because this process could not open a socket.
    udp_refused_no_socket: "udp-refused-no-socket",
    /// UDP packets answered with port-unreachable.
    udp_unreachable: "udp-unreachable",
    /// UDP packets dropped without an answer because of the rate limit.
    drop_udp_limit: "drop-udp-limit",
    /// Datagrams of a guest's that the system did not take: no room, no route, or the firewall says no.
    drop_udp_send: "drop-udp-send",
    /// Datagrams for a guest from somebody that its port has not sent to within two minutes.
    drop_udp_stranger: "drop-udp-stranger",
    /// Datagrams for a guest that are longer than its MTU.
    drop_udp_long: "drop-udp-long",
    /// Packets with impossible headers or lengths.
    drop_malformed: "drop-malformed",
    /// Packets with a wrong checksum.
    drop_checksum: "drop-checksum",
    /// Frames of a guest's link that are not from its MAC address to its gateway's.
    drop_mac: "drop-mac",
    /// Frames of a guest's link that are neither IP nor ARP.
    drop_ethertype: "drop-ethertype",
    /// ARP of a guest that does not ask for its gateway on its own behalf.
    drop_arp: "drop-arp",
    /// IPv6 of a guest, whose link carries none.
    drop_ipv6: "drop-ipv6",
    /// Packets of a guest from another address than its own.
    drop_source: "drop-source",
    /// Fragments.
    drop_fragment: "drop-fragment",
    /// Packets to groups or to everyone.
    drop_multicast: "drop-multicast",
    /// Packets from or to an address that no host can have.
    drop_address: "drop-address",
    /// Packets that are neither TCP nor UDP.
    drop_not_tcp: "drop-not-tcp",
    /// Segments of no flow of their queue's, while too many of them waited for the other queues.
    drop_handover: "drop-handover",
    /// Segments with data for a slow upstream, while the flows hold all memory; they come again.
    drop_memory: "drop-memory",
    /// Packets that the device refused to take (it is down, or the packet was not to its liking).
    drop_device: "drop-device",
}

impl Counters {
    /// What counts packets that are dropped for `reason`.
    pub(crate) fn dropped(&self, reason: Reason) -> &Counter {
        match reason {
            Reason::Malformed => &self.drop_malformed,
            Reason::Checksum => &self.drop_checksum,
            Reason::Fragment => &self.drop_fragment,
            Reason::Multicast => &self.drop_multicast,
            Reason::Address => &self.drop_address,
            Reason::NotTcp => &self.drop_not_tcp,
            Reason::Mac => &self.drop_mac,
            Reason::EtherType => &self.drop_ethertype,
            Reason::Arp => &self.drop_arp,
            Reason::Ipv6 => &self.drop_ipv6,
            Reason::Source => &self.drop_source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_summed_under_unique_kebab_names() {
        let (a, b) = (Counters::default(), Counters::default());
        a.drop_fragment.add(2);
        b.drop_fragment.increment();
        let sum = Counters::sum([&a, &b].into_iter());
        assert!(sum.contains(&("drop-fragment", 3)));
        assert!(sum.iter().all(|(name, _)| name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))));
        let names: std::collections::BTreeSet<_> = sum.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), sum.len());
    }
}
