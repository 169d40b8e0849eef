"""The oracle: what was seen at the far end of an uplink, and whose it is.

Allowed is a short list (`allowed`); every other packet of the machine under test is a leak, whether a probe's or not.
"""

import ipaddress
import os
import struct
from collections import namedtuple

import frames
import plan
import probes

BEACON, OTHER = "beacon", "other"
NAMES = {one.number: one.name for one in probes.PROBES} | {0: BEACON}

Seen = namedtuple("Seen", "time data device")  # nanoseconds since 1970; a frame from its Ethernet header on
Packet = namedtuple("Packet", "kind protocol source destination ports flags first icmp body frame")


class Capture:
    """A file that tcpdump goes on writing (pcap, nanoseconds); gives each packet once."""

    def __init__(self, path, device):
        self.path, self.device, self.offset = path, device, 24

    def started(self):
        return os.path.exists(self.path) and os.path.getsize(self.path) >= 24

    def new(self):
        with open(self.path, "rb") as file:
            magic = file.read(24)[:4]
            if magic != b"\x4d\x3c\xb2\xa1":
                raise ValueError(f"{self.path} is not a capture with nanoseconds")
            file.seek(self.offset)
            data = file.read()
        place = 0
        while place + 16 <= len(data):
            seconds, nanoseconds, kept, _ = struct.unpack_from("<IIII", data, place)
            if place + 16 + kept > len(data):
                break
            yield Seen(seconds * 10**9 + nanoseconds, data[place + 16 : place + 16 + kept], self.device)
            place += 16 + kept
        self.offset += place


def pcap(packets):
    """The text of a capture file with these packets."""
    out = [struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1)]
    for one in packets:
        out.append(struct.pack("<IIII", one.time // 10**9, one.time % 10**9, len(one.data), len(one.data)) + one.data)
    return b"".join(out)


def text(raw):
    return str(ipaddress.ip_address(raw))


def parse(data):
    """What the oracle looks at; fields that a frame does not have, or was cut before, are None or empty."""
    if len(data) < 14:
        return Packet(None, None, None, None, None, 0, True, None, b"", data)
    kind, body = struct.unpack_from("!H", data, 12)[0], data[14:]
    if kind == frames.IP4 and len(body) >= 20:
        fragment = struct.unpack_from("!H", body, 6)[0] & 0x1FFF
        return transport(kind, body[9], text(body[12:16]), text(body[16:20]), body[(body[0] & 15) * 4 :], fragment == 0, data)
    if kind == frames.IP6 and len(body) >= 40:
        protocol, rest, first = body[6], body[40:], True
        while protocol in (0, 43, 44, 60) and len(rest) >= 8:
            if protocol == 44:
                first = first and struct.unpack_from("!H", rest, 2)[0] >> 3 == 0
                protocol, rest = rest[0], rest[8:]
            else:
                protocol, rest = rest[0], rest[(rest[1] + 1) * 8 :]
        return transport(kind, protocol, text(body[8:24]), text(body[24:40]), rest, first, data)
    if kind == frames.ARP and len(body) >= 28:
        return Packet(kind, struct.unpack_from("!H", body, 6)[0], text(body[14:18]), text(body[24:28]), None, 0, True, None, b"", data)
    return Packet(kind, None, None, None, None, 0, True, None, body, data)


def transport(kind, protocol, source, destination, body, first, data):
    ports = flags = icmp = None
    if first and protocol in (6, 17, 132) and len(body) >= 4:
        ports = struct.unpack_from("!HH", body)
    if first and protocol == 6 and len(body) >= 14:
        flags = body[13]
    if first and protocol in (1, 58) and len(body) >= 2:
        icmp = body[0], body[1]
    return Packet(kind, protocol, source, destination, ports, flags or 0, first, icmp, body, data)


def is_syn(packet):
    return packet.protocol == 6 and packet.flags & 0x17 == 0x02


class Oracle:
    """Knows which packets may leave. `proxy_ports` are those of the proxies that the profiles of a run name."""

    def __init__(self, routers, proxy_ports):
        self.routers = {frames.mac(one) for one in routers}
        self.proxy_ports = proxy_ports
        self.inbound = set()

    def verdict(self, seen):
        """None: not of the machine, or allowed. Else the probe whose packet it is, BEACON, or OTHER."""
        packet = parse(seen.data)
        if seen.data[6:12] in self.routers:
            if is_syn(packet):
                self.inbound.add((packet.destination, packet.source, packet.ports[1], packet.ports[0]))
            return None
        return None if self.allowed(packet) else whose(packet)

    def allowed(self, packet):
        if plan.TUNNEL4 in (packet.source,) or packet.source == plan.TUNNEL6:
            return False
        if packet.kind == frames.ARP:
            return True
        if packet.protocol == 58:
            return allowed_neighbour_discovery(packet)
        if not packet.ports or probe_of_ports(packet):
            return False
        source, destination = packet.ports
        if packet.protocol == 6:
            to_proxy = packet.destination == plan.PROXY and destination in self.proxy_ports
            return to_proxy or (packet.source, packet.destination, source, destination) in self.inbound or to_resolver(packet)
        return packet.protocol == 17 and to_resolver(packet)


def to_resolver(packet):
    return packet.destination == plan.DNS and packet.ports[1] == 53


def allowed_neighbour_discovery(packet):
    """Router and neighbour solicitation, neighbour advertisement (RFC 4861): from here, on this link, not for the tunnel's address."""
    kind, code = packet.icmp or (None, None)
    if kind not in (133, 135, 136) or code != 0 or packet.frame[21] != 255:
        return False
    if kind != 133 and (len(packet.body) < 24 or text(packet.body[8:24]) == plan.TUNNEL6):
        return False
    return not frames.TOKEN.search(packet.frame)


def probe_of_ports(packet):
    """The probe that a port of a TCP packet belongs to."""
    if packet.protocol != 6 or not packet.ports:
        return None
    source, destination = packet.ports
    numbers = (source - plan.FIRST_SOURCE) // plan.SOURCE_PORTS, destination - plan.FIRST_DESTINATION
    return next((NAMES[number] for number in numbers if number > 0 and number in NAMES), None)


def whose(packet):
    marker = frames.TOKEN.search(packet.frame)
    if marker:
        return NAMES.get(int(marker[1], 16), OTHER)
    if packet.frame[6:12] == frames.mac(plan.OWN_MAC):
        return "macvlan"
    if packet.kind == frames.ARP:
        return "arp-tunnel"
    if packet.icmp and packet.icmp[0] == 136:
        return "nd-tunnel"
    if packet.protocol == 6 and packet.source in (plan.TUNNEL4, plan.TUNNEL6) and packet.ports[1] == 443:
        return "synack" if packet.source == plan.TUNNEL4 else "synack6"
    if (named := probe_of_ports(packet)):
        return named
    if packet.kind == frames.IP4 and packet.protocol == 2:
        return "igmp-query" if frames.address(plan.STANDING4) in packet.body else "igmp"
    if packet.icmp and packet.icmp[0] in (131, 132, 143) and packet.protocol == 58:
        return "mld-query" if frames.address(plan.STANDING6) in packet.body else "mld"
    return OTHER
