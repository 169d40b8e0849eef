"""The probes: each tries to get one kind of packet out of the machine under test, and marks it as its own.

A probe that is refused has done its work: what the kernel says is noted. `agent.py` runs them; the matrix learns from `PROBES` which
there are.
"""

import contextlib
import errno
import socket
import struct
from collections import namedtuple

import frames
import plan

V4, V6 = socket.AF_INET, socket.AF_INET6
IP_PKTINFO, IP_NODEFRAG, IPV6_PKTINFO, IPPROTO_MPTCP, IPPROTO_UDPLITE = 8, 22, 50, 262, 136
IP_MTU_DISCOVER, IP_PMTUDISC_DONT, SOL_PACKET, PACKET_QDISC_BYPASS = 10, 0, 263, 20

# where: app (the machine under test), box (a container in it), lan (an attacker on its network); user: of the socket
Probe = namedtuple("Probe", "name number where user text run")
PROBES = []


def probe(name, text, where="app", user="alice"):
    def register(run):
        PROBES.append(Probe(name, len(PROBES) + 1, where, user, text, run))
        return run

    return register


def by_name(name):
    return next(one for one in PROBES if one.name == name)


def noted(action):
    """What the kernel refuses is noted, and the rest of the probe goes on."""

    def wrapped(shot, *args, **options):
        with shot.noting():
            action(shot, *args, **options)

    return wrapped


class Shot:
    """One firing of a probe: its marker and ports, the uplinks of now, and what must be closed afterwards."""

    def __init__(self, number, sequence, world):
        self.number, self.sequence = number, sequence
        self.uplinks, self.router = world.get("uplinks", []), world.get("router")
        self.open, self.errors = [], []

    @contextlib.contextmanager
    def noting(self):
        try:
            yield
        except BlockingIOError:
            pass
        except OSError as error:
            self.errors.append(errno.errorcode.get(error.errno, str(error)))

    @property
    def token(self):
        return frames.token(self.number, self.sequence)

    @property
    def port(self):
        return plan.destination_port(self.number)

    def socket(self, family, kind, protocol=0):
        one = socket.socket(family, kind, protocol)
        self.open.append(one)
        one.setblocking(False)
        return one

    @noted
    def tcp(self, family, address, port=None, *, device=None, source="", protocol=0, mark=0):
        one = self.socket(family, socket.SOCK_STREAM, protocol)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # ended by a reset: nothing of it lives on
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if mark:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if device:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        one.bind((source, plan.source_port(self.number, self.sequence)))
        one.connect((address, port or self.port))

    @noted
    def udp(self, family, address, port=None, data=None, *, device=None, source=None, options=()):
        one = self.socket(family, socket.SOCK_DGRAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for option in options:
            one.setsockopt(*option)
        if device:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        if source:
            one.bind((source, 0))
        one.sendto(self.token if data is None else data, (address, port or self.port))

    @noted
    def raw(self, family, protocol, address, data, options=()):
        one = self.socket(family, socket.SOCK_RAW, protocol)
        for option in options:
            one.setsockopt(*option)
        one.sendto(data, (address, 0))

    @noted
    def frame(self, link, kind, payload, bypass=False, to=None):
        one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.open.append(one)
        one.bind((link["name"], 0))
        if bypass:
            one.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        one.send(frames.ethernet(to or link["router_mac"], link["mac"], kind, payload))

    def each_uplink(self, action):
        for link in self.uplinks:
            with self.noting():
                action(link)

    def close(self):
        for one in self.open:
            one.close()


def header_included(*more):
    return [(socket.IPPROTO_IP, socket.IP_HDRINCL, 1), *more]


# ---- what programs do

@probe("tcp", "a TCP connection")
def _(shot):
    shot.tcp(V4, plan.SINK4)


@probe("tcp6", "a TCP connection, IPv6")
def _(shot):
    shot.tcp(V6, plan.SINK6)


@probe("mptcp", "a multipath TCP connection")
def _(shot):
    shot.tcp(V4, plan.SINK4, protocol=IPPROTO_MPTCP)


@probe("udp", "a UDP packet")
def _(shot):
    shot.udp(V4, plan.SINK4)


@probe("udp6", "a UDP packet, IPv6")
def _(shot):
    shot.udp(V6, plan.SINK6)


@probe("udplite", "a UDP-Lite packet")
def _(shot):
    shot.socket(V4, socket.SOCK_DGRAM, IPPROTO_UDPLITE).sendto(shot.token, (plan.SINK4, shot.port))


@probe("icmp", "ping by an unprivileged socket")
def _(shot):
    shot.socket(V4, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).sendto(frames.icmp(8, frames.echo(shot.token)), (plan.SINK4, 0))


@probe("icmp6", "ping by an unprivileged socket, IPv6")
def _(shot):
    one = shot.socket(V6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)
    one.sendto(struct.pack("!BBH", 128, 0, 0) + frames.echo(shot.token), (plan.SINK6, 0))


@probe("stun", "a STUN question: which address do I have?")
def _(shot):
    shot.udp(V4, plan.SINK4, 3478, frames.stun(shot.token))


@probe("quic", "the first packet of QUIC")
def _(shot):
    shot.udp(V4, plan.SINK4, 443, frames.quic(shot.token))


# ---- names

@probe("dns-udp", "DNS to the router, which is no resolver of the profile")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V4, link["router4"], 53, frames.dns(shot.token)))


@probe("dns-udp6", "DNS to the router, IPv6")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V6, link["router6"], 53, frames.dns(shot.token)))


@probe("dns-tcp", "DNS over TCP to the router")
def _(shot):
    shot.each_uplink(lambda link: shot.tcp(V4, link["router4"], 53))


@probe("dns-far", "DNS to a resolver elsewhere")
def _(shot):
    shot.udp(V4, plan.SINK4, 53, frames.dns(shot.token))


@probe("dns-part", "a later fragment towards a resolver of the profile", user="root")
def _(shot):
    options = header_included((socket.IPPROTO_IP, IP_NODEFRAG, 1))
    shot.raw(V4, socket.IPPROTO_RAW, plan.DNS, frames.ip4(17, "0.0.0.0", plan.DNS, shot.token, fragment=9), options)


@probe("mdns", "multicast DNS")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V4, "224.0.0.251", 5353, frames.dns(shot.token, 0), options=[multicast4(link)]))


@probe("mdns6", "multicast DNS, IPv6")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V6, "ff02::fb", 5353, frames.dns(shot.token, 0), options=[multicast6(link)]))


@probe("llmnr", "link-local multicast name resolution")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V4, "224.0.0.252", 5355, frames.dns(shot.token, 0), options=[multicast4(link)]))


@probe("llmnr6", "the same, IPv6")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V6, "ff02::1:3", 5355, frames.dns(shot.token, 0), options=[multicast6(link)]))


# ---- the local network

def multicast4(link):
    return socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("4s4si", bytes(4), bytes(4), link["index"])


def multicast6(link):
    return socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, link["index"]


@probe("ssdp", "a search for UPnP devices")
def _(shot):
    text = b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: " + shot.token + b"\r\n\r\n"
    shot.each_uplink(lambda link: shot.udp(V4, "239.255.255.250", 1900, text, options=[multicast4(link)]))


@probe("broadcast", "a limited broadcast")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V4, "255.255.255.255", device=link["name"]))


@probe("broadcast-net", "a broadcast to the network")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V4, link["broadcast"]))


@probe("link-local", "UDP to the router's link-local address")
def _(shot):
    def send(link):
        one = shot.socket(V6, socket.SOCK_DGRAM)
        one.sendto(shot.token, (link["router_local"], shot.port, 0, link["index"]))

    shot.each_uplink(send)


@probe("igmp", "joining a multicast group")
def _(shot):
    def join(link):
        one = shot.socket(V4, socket.SOCK_DGRAM)
        group = frames.address(plan.GROUP4.format(shot.sequence % 250))
        one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, struct.pack("4s4si", group, bytes(4), link["index"]))

    shot.each_uplink(join)


@probe("mld", "joining a multicast group, IPv6")
def _(shot):
    def join(link):
        one = shot.socket(V6, socket.SOCK_DGRAM)
        group = frames.address(plan.GROUP6.format(shot.sequence % 250))
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, struct.pack("16si", group, link["index"]))

    shot.each_uplink(join)


# ---- another device, another address, another route

@probe("device-tcp", "TCP, bound to the uplink (SO_BINDTODEVICE)")
def _(shot):
    shot.each_uplink(lambda link: shot.tcp(V4, plan.SINK4, device=link["name"]))


@probe("device-tcp6", "TCP, bound to the uplink, IPv6")
def _(shot):
    shot.each_uplink(lambda link: shot.tcp(V6, plan.SINK6, device=link["name"]))


@probe("device-udp", "UDP, bound to the uplink")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V4, plan.SINK4, device=link["name"]))


@probe("device-udp6", "UDP, bound to the uplink, IPv6")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V6, plan.SINK6, device=link["name"]))


@probe("source-tcp", "TCP from the uplink's own address")
def _(shot):
    shot.each_uplink(lambda link: shot.tcp(V4, plan.SINK4, source=link["address4"]))


@probe("source-tcp6", "TCP from the uplink's own address, IPv6")
def _(shot):
    shot.each_uplink(lambda link: shot.tcp(V6, plan.SINK6, source=link["address6"]))


@probe("source-udp", "UDP from the uplink's own address")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V4, plan.SINK4, source=link["address4"]))


@probe("source-udp6", "the same, IPv6")
def _(shot):
    shot.each_uplink(lambda link: shot.udp(V6, plan.SINK6, source=link["address6"]))


@probe("pktinfo", "UDP with device and source told for the packet (IP_PKTINFO)")
def _(shot):
    def send(link):
        info = struct.pack("i4s4s", link["index"], frames.address(link["address4"]), bytes(4))
        shot.socket(V4, socket.SOCK_DGRAM).sendmsg([shot.token], [(socket.IPPROTO_IP, IP_PKTINFO, info)], 0, (plan.SINK4, shot.port))

    shot.each_uplink(send)


@probe("pktinfo6", "the same, IPv6")
def _(shot):
    def send(link):
        info = struct.pack("16si", frames.address(link["address6"]), link["index"])
        one = shot.socket(V6, socket.SOCK_DGRAM)
        one.sendmsg([shot.token], [(socket.IPPROTO_IPV6, IPV6_PKTINFO, info)], 0, (plan.SINK6, shot.port))

    shot.each_uplink(send)


@probe("pushed-tcp", "TCP behind a route as DHCP option 121 pushes it (TunnelVision)")
def _(shot):
    shot.tcp(V4, plan.PUSHED)


@probe("pushed-udp", "UDP behind such a route")
def _(shot):
    shot.udp(V4, plan.PUSHED)


@probe("lan-tcp", "TCP to a local network with public addresses (TunnelCrack)")
def _(shot):
    shot.tcp(V4, plan.FALSE_LAN4)


@probe("lan-udp", "UDP to such a network")
def _(shot):
    shot.udp(V4, plan.FALSE_LAN4)


@probe("lan-udp6", "the same, IPv6")
def _(shot):
    shot.udp(V6, plan.FALSE_LAN6)


@probe("ra-tcp", "TCP behind a route of a router advertisement")
def _(shot):
    shot.tcp(V6, plan.ADVERTISED)


@probe("ra-udp", "UDP behind such a route")
def _(shot):
    shot.udp(V6, plan.ADVERTISED)


# ---- the proxy's own address

def proxy_probe(name, user, text):
    @probe(name, text, user=user)
    def _(shot):
        shot.tcp(V4, plan.PROXY, 8888)


proxy_probe("proxy-tcp", "alice", "TCP to the proxy's address and port, without the mark")
proxy_probe("proxy-other", "mallory", "the same from another user")
proxy_probe("proxy-root", "root", "the same from root")
proxy_probe("proxy-daemon", "proxyvpn", "the same from the daemon's own user")


@probe("proxy-device", "the same, bound to the uplink")
def _(shot):
    shot.each_uplink(lambda link: shot.tcp(V4, plan.PROXY, 8888, device=link["name"]))


@probe("proxy-udp", "UDP to the proxy's address and port")
def _(shot):
    shot.udp(V4, plan.PROXY, 8888)


# another program's marks, and those that differ from the daemon's in a bit
FOREIGN_MARKS = 1, plan.MARK ^ 1, plan.MARK | 1 << 27, plan.MARK & 0xFFFF


@probe("mark-udp", "UDP with another program's mark", user="root")
def _(shot):
    for mark in FOREIGN_MARKS:
        shot.udp(V4, plan.SINK4, options=[(socket.SOL_SOCKET, socket.SO_MARK, mark)])


@probe("mark-tcp", "TCP to the proxy with another program's mark, bound to the uplink", user="root")
def _(shot):
    mark = FOREIGN_MARKS[shot.sequence % len(FOREIGN_MARKS)]
    shot.each_uplink(lambda link: shot.tcp(V4, plan.PROXY, 8888, device=link["name"], mark=mark))


# ---- raw packets

@probe("ping", "ping by a raw socket", user="root")
def _(shot):
    shot.raw(V4, socket.IPPROTO_ICMP, plan.SINK4, frames.icmp(8, frames.echo(shot.token)))


@probe("ping6", "ping by a raw socket, IPv6", user="root")
def _(shot):
    shot.raw(V6, socket.IPPROTO_ICMPV6, plan.SINK6, struct.pack("!BBH", 128, 0, 0) + frames.echo(shot.token))


@probe("gre", "GRE", user="root")
def _(shot):
    shot.raw(V4, socket.IPPROTO_GRE, plan.SINK4, b"\0\0\x08\0" + shot.token)


@probe("esp", "ESP", user="root")
def _(shot):
    shot.raw(V4, socket.IPPROTO_ESP, plan.SINK4, struct.pack("!II", 0x70767076, 1) + shot.token)


@probe("esp6", "ESP, IPv6", user="root")
def _(shot):
    shot.raw(V6, socket.IPPROTO_ESP, plan.SINK6, struct.pack("!II", 0x70767076, 1) + shot.token)


@probe("sctp", "SCTP", user="root")
def _(shot):
    shot.raw(V4, 132, plan.SINK4, struct.pack("!HHII", shot.port, shot.port, 0, 0) + shot.token)


@probe("forged", "a raw packet with another source address", user="root")
def _(shot):
    packet = frames.ip4(17, "192.0.2.77", plan.SINK4, frames.udp("192.0.2.77", plan.SINK4, (shot.port, shot.port), shot.token))
    shot.raw(V4, socket.IPPROTO_RAW, plan.SINK4, packet, header_included())


@probe("fragment", "a UDP packet that the kernel must cut")
def _(shot):
    shot.udp(V4, plan.SINK4, data=shot.token * 170, options=[(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)])


@probe("fragment6", "the same, IPv6")
def _(shot):
    shot.udp(V6, plan.SINK6, data=shot.token * 170)


@probe("fragment-raw", "fragments by hand", user="root")
def _(shot):
    for offset, more in (0, True), (64, False):
        part = struct.pack("!HHHH", shot.port, shot.port, 1024, 0) if not offset else b""
        packet = frames.ip4(17, "0.0.0.0", plan.SINK4, (part + shot.token * 30)[:512], number=shot.sequence & 0xFFFF, fragment=offset, more=more)
        shot.raw(V4, socket.IPPROTO_RAW, plan.SINK4, packet, header_included((socket.IPPROTO_IP, IP_NODEFRAG, 1)))


@probe("fragment6-raw", "fragments by hand, IPv6", user="root")
def _(shot):
    def send(link):
        for offset, more in (0, True), (64, False):
            part = struct.pack("!HHHH", shot.port, shot.port, 1024, 0) if not offset else b""
            body = frames.fragment6(17, shot.sequence, (part + shot.token * 30)[:512], offset=offset, more=more)
            shot.raw(V6, socket.IPPROTO_RAW, plan.SINK6, frames.ip6(44, link["address6"], plan.SINK6, body))

    shot.each_uplink(send)


@probe("nd-shaped", "neighbour discovery's packet type, routed to somewhere", user="root")
def _(shot):
    shot.raw(V6, socket.IPPROTO_ICMPV6, plan.SINK6, struct.pack("!BBHI", 135, 0, 0, 0) + frames.address(plan.SINK6) + shot.token)


@probe("dhcp-shaped", "UDP from port 68 to port 67 of somewhere", user="root")
def _(shot):
    one = shot.socket(V4, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("", 68))
    one.sendto(shot.token, (plan.SINK4, 67))


def udp_frame(shot, link):
    ports = shot.port, shot.port
    return frames.ip4(17, link["address4"], plan.SINK4, frames.udp(link["address4"], plan.SINK4, ports, shot.token))


@probe("packet", "a packet socket (AF_PACKET)", user="root")
def _(shot):
    shot.each_uplink(lambda link: shot.frame(link, frames.IP4, udp_frame(shot, link)))


@probe("packet-bypass", "a packet socket with PACKET_QDISC_BYPASS", user="root")
def _(shot):
    shot.each_uplink(lambda link: shot.frame(link, frames.IP4, udp_frame(shot, link), bypass=True))


@probe("packet6", "a packet socket, IPv6", user="root")
def _(shot):
    def send(link):
        body = frames.udp(link["address6"], plan.SINK6, (shot.port, shot.port), shot.token)
        shot.frame(link, frames.IP6, frames.ip6(17, link["address6"], plan.SINK6, body))

    shot.each_uplink(send)


@probe("packet-vlan", "a packet socket with a VLAN tag", user="root")
def _(shot):
    shot.each_uplink(lambda link: shot.frame(link, frames.VLAN, struct.pack("!HH", 7, frames.IP4) + udp_frame(shot, link)))


@probe("packet-other", "a packet socket with a protocol that nobody knows", user="root")
def _(shot):
    shot.each_uplink(lambda link: shot.frame(link, 0x88B5, shot.token.ljust(46, b"\0"), to="ff:ff:ff:ff:ff:ff"))


# ---- opened before Connect; the agent keeps them (see agent.OLD)

@probe("old-tcp", "a TCP connection opened before Connect")
def _(shot):
    shot.keep.send(shot.token)


@probe("old-tcp6", "the same, IPv6")
def _(shot):
    shot.keep.send(shot.token)


@probe("old-device", "the same, bound to the uplink")
def _(shot):
    shot.keep.send(shot.token)


@probe("old-listener", "the same, from a port on which the machine listens")
def _(shot):
    shot.keep.send(shot.token)


@probe("old-udp", "a UDP socket connected before Connect")
def _(shot):
    shot.keep.send(shot.token)


# ---- a container behind a bridge

@probe("box-tcp", "a container's TCP", where="box", user="root")
def _(shot):
    shot.tcp(V4, plan.SINK4)


@probe("box-tcp6", "a container's TCP, IPv6", where="box", user="root")
def _(shot):
    shot.tcp(V6, plan.SINK6)


@probe("box-udp", "a container's UDP", where="box", user="root")
def _(shot):
    shot.udp(V4, plan.SINK4)


@probe("box-udp6", "a container's UDP, IPv6", where="box", user="root")
def _(shot):
    shot.udp(V6, plan.SINK6)


@probe("box-ping", "a container's ping", where="box", user="root")
def _(shot):
    shot.raw(V4, socket.IPPROTO_ICMP, plan.SINK4, frames.icmp(8, frames.echo(shot.token)))


@probe("box-dns", "a container's DNS to the router", where="box", user="root")
def _(shot):
    shot.udp(V4, shot.router, 53, frames.dns(shot.token))


@probe("box-dns-tcp", "a container's DNS over TCP to the router", where="box", user="root")
def _(shot):
    shot.tcp(V4, shot.router, 53)


@probe("box-proxy", "a container's TCP to the proxy's address and port", where="box", user="root")
def _(shot):
    shot.tcp(V4, plan.PROXY, 8888)


@probe("macvlan", "a container with a device of its own on the uplink (macvlan)", where="box", user="root")
def _(shot):
    shot.each_uplink(lambda link: shot.frame(link, frames.IP4, udp_frame(shot, link)))


# ---- an attacker on the local network; what counts is whether the machine answers

@probe("arp-tunnel", "who has the tunnel's address? (ARP from the local network)", where="lan", user="root")
def _(shot):
    def ask(link):
        shot.frame(link, frames.ARP, frames.arp_request(link["mac"], link["router4"], plan.TUNNEL4), to="ff:ff:ff:ff:ff:ff")

    shot.each_uplink(ask)


@probe("nd-tunnel", "who has the tunnel's address? (neighbour discovery)", where="lan", user="root")
def _(shot):
    def ask(link):
        group, packet = frames.neighbour_solicitation(link["mac"], link["router_local"], plan.TUNNEL6)
        shot.frame(link, frames.IP6, packet, to="33:33:" + ":".join(f"{byte:02x}" for byte in frames.address(group)[-4:]))

    shot.each_uplink(ask)


@probe("synack", "a SYN/ACK to the tunnel's address (CVE-2019-14899)", where="lan", user="root")
def _(shot):
    def ask(link):
        for number, flags in enumerate((0x12, 0x02, 0x10)):
            ports = 443, plan.source_port(shot.number, number)
            segment = frames.tcp(link["router4"], plan.TUNNEL4, ports, flags, 1, 1)
            shot.frame(link, frames.IP4, frames.ip4(6, link["router4"], plan.TUNNEL4, segment))

    shot.each_uplink(ask)


@probe("synack6", "the same, IPv6", where="lan", user="root")
def _(shot):
    def ask(link):
        segment = frames.tcp(link["router6"], plan.TUNNEL6, (443, plan.source_port(shot.number, 0)), 0x12, 1, 1)
        shot.frame(link, frames.IP6, frames.ip6(6, link["router6"], plan.TUNNEL6, segment))

    shot.each_uplink(ask)


@probe("through-udp", "UDP that somebody on the local network routes through the machine", where="lan", user="root")
def _(shot):
    def send(link):
        source = link["router4"][:-1] + "9"
        data = frames.udp(source, plan.SINK4, (shot.port, shot.port), shot.token)
        shot.frame(link, frames.IP4, frames.ip4(17, source, plan.SINK4, data))

    shot.each_uplink(send)


@probe("through-tcp", "TCP that somebody on the local network routes through the machine", where="lan", user="root")
def _(shot):
    def send(link):
        source, ports = link["router4"][:-1] + "9", (plan.source_port(shot.number, shot.sequence), shot.port)
        shot.frame(link, frames.IP4, frames.ip4(6, source, plan.SINK4, frames.tcp(source, plan.SINK4, ports, 2, shot.sequence)))

    shot.each_uplink(send)


@probe("answer-ping", "a ping from the local network", where="lan", user="root")
def _(shot):
    def ask(link):
        shot.frame(link, frames.IP4, frames.ip4(1, link["router4"], link["address4"], frames.icmp(8, frames.echo(shot.token))))

    shot.each_uplink(ask)


@probe("answer-udp", "UDP from the local network to a port that is closed", where="lan", user="root")
def _(shot):
    def ask(link):
        data = frames.udp(link["router4"], link["address4"], (shot.port, shot.port), shot.token)
        shot.frame(link, frames.IP4, frames.ip4(17, link["router4"], link["address4"], data))

    shot.each_uplink(ask)


@probe("igmp-query", "a question for multicast groups", where="lan", user="root")
def _(shot):
    body = struct.pack("!BBH4sBBH", 0x11, 1, 0, bytes(4), 2, 10, 0)
    body = body[:2] + struct.pack("!H", frames.checksum(body)) + body[4:]

    def ask(link):
        packet = frames.ip4(2, link["router4"], "224.0.0.1", body, ttl=1, options=b"\x94\x04\0\0")
        shot.frame(link, frames.IP4, packet, to="01:00:5e:00:00:01")

    shot.each_uplink(ask)


@probe("mld-query", "a question for multicast groups, IPv6", where="lan", user="root")
def _(shot):
    def ask(link):
        source = link["router_local"]
        body = struct.pack("!HH16sBBH", 100, 0, bytes(16), 2, 10, 0)
        # hop-by-hop header with the router alert that RFC 3810 asks for
        packet = frames.ip6(0, source, "ff02::1", b"\x3a\0\x05\x02\0\0\x01\0" + frames.icmp6(130, source, "ff02::1", body), hops=1)
        shot.frame(link, frames.IP6, packet, to="33:33:00:00:00:01")

    shot.each_uplink(ask)
