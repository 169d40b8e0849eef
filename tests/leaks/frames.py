"""Packets by hand: what the probes send below the socket API, and the marker by which the far end knows whose a packet is."""

import ipaddress
import re
import struct

TOKEN = re.compile(rb"pvlk-([0-9a-f]{4})-[0-9a-f]{8}")
ARP, IP4, IP6, VLAN = 0x0806, 0x0800, 0x86DD, 0x8100


def token(probe, sequence):
    """The marker of a packet: probe number and a running number, in letters that a host name may have."""
    return b"pvlk-%04x-%08x" % (probe, sequence & 0xFFFFFFFF)


def address(text):
    return ipaddress.ip_address(text).packed


def mac(text):
    return bytes.fromhex(text.replace(":", ""))


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(destination, source, kind, payload):
    return mac(destination) + mac(source) + struct.pack("!H", kind) + payload


def ip4(protocol, source, destination, payload, *, number=1, fragment=0, more=False, ttl=64, options=b""):
    """`fragment` is the offset in units of 8 bytes."""
    words = 5 + len(options) // 4
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x40 | words, 0, 4 * words + len(payload), number, (0x2000 if more else 0) | fragment, ttl, protocol, 0,
        address(source), address(destination),
    ) + options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def ip6(protocol, source, destination, payload, hops=64):
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, hops) + address(source) + address(destination) + payload


def fragment6(protocol, number, payload, *, offset=0, more=False):
    """The extension header (next header 44) with its part of the packet."""
    return struct.pack("!BBHI", protocol, 0, offset << 3 | more, number) + payload


def pseudo(protocol, source, destination, length):
    source, destination = address(source), address(destination)
    if len(source) == 4:
        return source + destination + struct.pack("!BBH", 0, protocol, length)
    return source + destination + struct.pack("!I3xB", length, protocol)


def udp(source, destination, ports, payload):
    header = struct.pack("!HHHH", *ports, 8 + len(payload), 0)
    total = checksum(pseudo(17, source, destination, len(header) + len(payload)) + header + payload) or 0xFFFF
    return header[:6] + struct.pack("!H", total) + payload


def tcp(source, destination, ports, flags, sequence=0, acknowledged=0):
    header = struct.pack("!HHIIBBHHH", *ports, sequence, acknowledged, 5 << 4, flags, 64240, 0, 0)
    total = checksum(pseudo(6, source, destination, len(header)) + header)
    return header[:16] + struct.pack("!H", total) + header[18:]


def icmp(kind, payload, code=0):
    header = struct.pack("!BBH", kind, code, 0)
    return header[:2] + struct.pack("!H", checksum(header + payload)) + payload


def icmp6(kind, source, destination, payload, code=0):
    header = struct.pack("!BBH", kind, code, 0)
    total = checksum(pseudo(58, source, destination, len(header) + len(payload)) + header + payload)
    return header[:2] + struct.pack("!H", total) + payload


def echo(text):
    """The rest of an echo request: identifier, number, text."""
    return struct.pack("!HH", 0x7076, 1) + text


def arp_request(source_mac, source, target):
    return struct.pack("!HHBBH", 1, IP4, 6, 4, 1) + mac(source_mac) + address(source) + bytes(6) + address(target)


def neighbour_solicitation(source_mac, source, target):
    """ICMPv6 packet with IPv6 header, to the target's solicited-node group."""
    group = str(ipaddress.ip_address(b"\xff\x02" + bytes(9) + b"\x01\xff" + address(target)[-3:]))
    body = bytes(4) + address(target) + b"\x01\x01" + mac(source_mac)
    return group, ip6(58, source, group, icmp6(135, source, group, body), hops=255)


def router_advertisement(source_mac, source, prefix, life):
    """With a route information option (RFC 4191) for `prefix` and no default route."""
    net = ipaddress.ip_network(prefix)
    route = struct.pack("!BBBBI", 24, 3, net.prefixlen, 0, life) + net.network_address.packed
    body = struct.pack("!BBHII", 64, 0, 0, 0, 0) + b"\x01\x01" + mac(source_mac) + route
    return ip6(58, source, "ff02::1", icmp6(134, source, "ff02::1", body), hops=255)


def dns(name, flags=0x0100):
    labels = b"".join(bytes([len(label)]) + label for label in [name, b"leak", b"test"])
    return struct.pack("!HHHHHH", 0x7076, flags, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", 1, 1)


def stun(name):
    text = name + bytes(-len(name) % 4)
    return struct.pack("!HHI12s", 1, 4 + len(text), 0x2112A442, b"proxyvpnleak") + struct.pack("!HH", 0x8022, len(name)) + text


def quic(name):
    """The outside of a version 1 Initial: long header, the marker as connection id, padded to what a client sends."""
    head = b"\xc3" + struct.pack("!I", 1) + bytes([len(name)]) + name + b"\0\0\x44\x9e"
    return head.ljust(1200, b"\x5a")
