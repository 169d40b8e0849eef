"""The oracle's own tests: what may leave passes, everything else is a leak and is given to its probe. No root, no network."""

import os
import socket
import struct
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import frames  # noqa: E402
import plan  # noqa: E402
import probes  # noqa: E402
import wire  # noqa: E402

ROUTER, APP = "02:00:00:00:00:01", "02:00:00:00:00:02"
HERE, HERE6 = "192.0.2.2", "2001:db8:1::2"


def number(name):
    return probes.by_name(name).number


def out(kind, payload, source=APP):
    return wire.Seen(1, frames.ethernet(ROUTER if source == APP else APP, source, kind, payload), "wan0")


def tcp(source, destination, ports, flags=2, sender=APP):
    return out(frames.IP4, frames.ip4(6, source, destination, frames.tcp(source, destination, ports, flags)), sender)


def udp(destination, ports, data):
    return out(frames.IP4, frames.ip4(17, HERE, destination, frames.udp(HERE, destination, ports, data)))


class Verdicts(unittest.TestCase):
    def setUp(self):
        self.oracle = wire.Oracle([ROUTER], {8888})

    def verdict(self, seen):
        return self.oracle.verdict(seen)

    def test_what_may_leave(self):
        solicitation = frames.neighbour_solicitation(APP, "fe80::2", "fe80::1")[1]
        for seen in (
            out(frames.ARP, frames.arp_request(APP, HERE, "192.0.2.1")), out(frames.IP6, solicitation),
            tcp(HERE, plan.PROXY, (40000, 8888)), tcp(HERE, plan.DNS, (40000, 53)), udp(plan.DNS, (40000, 53), b"a question"),
            tcp("203.0.113.80", HERE, (5, 6), sender=ROUTER), udp_in(),
        ):
            self.assertIsNone(self.verdict(seen), wire.parse(seen.data))

    def test_answers_only_to_connections_from_outside(self):
        answer = tcp(HERE, "203.0.113.22", (22, 50000), flags=0x12)
        self.assertEqual(self.verdict(answer), wire.OTHER)
        self.assertIsNone(self.verdict(tcp("203.0.113.22", HERE, (50000, 22), flags=0x10, sender=ROUTER)))
        self.assertEqual(self.verdict(answer), wire.OTHER, "no SYN was seen")
        self.assertIsNone(self.verdict(tcp("203.0.113.22", HERE, (50000, 22), sender=ROUTER)))
        self.assertIsNone(self.verdict(answer))

    def test_unmarked_connections_to_the_proxy_are_told_by_their_port(self):
        for name in "proxy-tcp", "proxy-other", "proxy-root", "proxy-daemon", "proxy-device", "box-proxy":
            for sequence in range(40):
                port = plan.source_port(number(name), sequence)
                self.assertEqual(self.verdict(tcp(HERE, plan.PROXY, (port, 8888))), name)
        self.assertEqual(self.verdict(tcp(HERE, plan.PROXY, (40000, 8889))), wire.OTHER)

    def test_a_marker_names_its_probe_wherever_it_stands(self):
        for probe in probes.PROBES:
            token = frames.token(probe.number, 77)
            for data in token, b"x" * 100 + token, frames.dns(token), frames.stun(token), frames.quic(token):
                self.assertEqual(self.verdict(udp(plan.SINK4, (40000, 9), data)), probe.name)
        self.assertEqual(self.verdict(udp(plan.SINK4, (40000, 9), frames.token(0, 1))), wire.BEACON)
        self.assertEqual(self.verdict(udp(plan.SINK4, (40000, 9), b"no marker")), wire.OTHER)

    def test_ports_name_a_connection_also_behind_a_nat(self):
        for name in "tcp", "box-tcp", "old-device":
            self.assertEqual(self.verdict(tcp(HERE, plan.SINK4, (1025, plan.destination_port(number(name))))), name)
            self.assertEqual(self.verdict(tcp(HERE, plan.SINK4, (plan.source_port(number(name), 3), 7))), name)

    def test_the_tunnels_address_is_never_seen(self):
        self.assertEqual(self.verdict(out(frames.ARP, frames.arp_request(APP, plan.TUNNEL4, "192.0.2.1"))), "arp-tunnel")
        self.assertEqual(self.verdict(tcp(plan.TUNNEL4, "192.0.2.1", (21000, 443), flags=4)), "synack")
        self.assertEqual(self.verdict(tcp(plan.TUNNEL4, plan.PROXY, (40000, 8888))), wire.OTHER)
        body = frames.icmp6(136, "fe80::2", "fe80::1", b"\x60\0\0\0" + frames.address(plan.TUNNEL6))
        self.assertEqual(self.verdict(out(frames.IP6, frames.ip6(58, "fe80::2", "fe80::1", body, hops=255))), "nd-tunnel")

    def test_neighbour_discovery_is_what_the_rfc_says(self):
        def packet(kind, hops=255, body=b"\0\0\0\0" + frames.address("fe80::1"), code=0):
            return out(frames.IP6, frames.ip6(58, HERE6, plan.SINK6, frames.icmp6(kind, HERE6, plan.SINK6, body, code), hops=hops))

        for kind in 133, 135, 136:
            self.assertIsNone(self.verdict(packet(kind)))
            self.assertIsNotNone(self.verdict(packet(kind, hops=64)))
            self.assertIsNotNone(self.verdict(packet(kind, code=1)))
        self.assertEqual(self.verdict(packet(135, body=b"\0\0\0\0" + frames.address("fe80::1") + frames.token(number("nd-shaped"), 1))), "nd-shaped")
        self.assertIsNotNone(self.verdict(packet(135, body=b"\0")))
        self.assertEqual(self.verdict(packet(128)), wire.OTHER)
        self.assertEqual(self.verdict(packet(143)), "mld")

    def test_later_fragments_have_no_ports(self):
        part = frames.ip4(17, HERE, plan.DNS, struct.pack("!HHHH", 40000, 53, 20, 0) + bytes(12), fragment=9)
        self.assertEqual(self.verdict(out(frames.IP4, part)), wire.OTHER)
        inner = frames.fragment6(17, 5, frames.token(number("fragment6-raw"), 5), offset=3)
        self.assertEqual(self.verdict(out(frames.IP6, frames.ip6(44, HERE6, plan.SINK6, inner))), "fragment6-raw")

    def test_other_kinds_are_leaks(self):
        self.assertEqual(self.verdict(out(0x88B5, bytes(46))), wire.OTHER)
        self.assertEqual(self.verdict(out(frames.VLAN, bytes(46))), wire.OTHER)
        igmp = frames.ip4(2, HERE, "224.0.0.22", struct.pack("!BBHHH", 0x22, 0, 0, 0, 1) + b"\4\0\0\0" + frames.address(plan.STANDING4))
        self.assertEqual(self.verdict(out(frames.IP4, igmp)), "igmp-query")
        self.assertEqual(self.verdict(out(frames.IP4, igmp[:-4] + bytes(4))), "igmp")

    def test_nothing_that_is_cut_short_breaks_it(self):
        whole = [
            tcp(HERE, plan.SINK4, (1, 2)).data, udp(plan.SINK4, (1, 2), b"x").data, out(frames.ARP, frames.arp_request(APP, HERE, HERE)).data,
            out(frames.IP6, frames.neighbour_solicitation(APP, "fe80::2", "fe80::1")[1]).data,
        ]
        for data in whole:
            for length in range(len(data)):
                self.oracle.verdict(wire.Seen(1, data[:length], "wan0"))


def udp_in():
    return out(frames.IP4, frames.ip4(17, plan.SINK4, HERE, b""), ROUTER)


class Files(unittest.TestCase):
    def test_a_capture_that_grows_gives_each_packet_once(self):
        packets = [wire.Seen(1_700_000_000_123_456_789 + i, bytes([i]) * (20 + i), "wan0") for i in range(5)]
        whole = wire.pcap(packets)
        with tempfile.NamedTemporaryFile() as file:
            capture, got = wire.Capture(file.name, "wan0"), []
            self.assertFalse(capture.started())
            for end in list(range(24, len(whole), 7)) + [len(whole)]:
                file.seek(0)
                file.write(whole[:end])
                file.flush()
                got += capture.new()
        self.assertEqual(got, packets)


class Probes(unittest.TestCase):
    def test_ports_do_not_overlap(self):
        last = max(one.number for one in probes.PROBES)
        self.assertLess(plan.destination_port(last), plan.FIRST_SOURCE)
        self.assertLess(plan.source_port(last, plan.SOURCE_PORTS - 1), 32768)
        self.assertEqual(len({one.name for one in probes.PROBES}), last)

    def test_checksums(self):
        for packet in frames.ip4(1, HERE, HERE, b"abc")[:20], frames.icmp(8, b"odd"):
            self.assertEqual(frames.checksum(packet), 0)
        segment = frames.udp(HERE, plan.SINK4, (1, 2), b"data!")
        self.assertEqual(frames.checksum(frames.pseudo(socket.IPPROTO_UDP, HERE, plan.SINK4, len(segment)) + segment), 0)


if __name__ == "__main__":
    unittest.main()
