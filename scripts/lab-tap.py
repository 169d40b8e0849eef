#!/usr/bin/env python3
"""lab-tap.py DEVICE ANSWER TUN: a TAP device (10.10.10.2) with a router (10.10.10.1) behind it that answers every question for an
IPv4 address with ANSWER. Prints "ready", then each name that it is asked for. Opens the device node TUN. Ends with its input."""
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys

IFF_TAP, IFF_NO_PI, TUNSETIFF = 2, 0x1000, 0x400454CA
ROUTER, ROUTER_MAC, OWN_MAC = "10.10.10.1", bytes.fromhex("525400000001"), bytes.fromhex("525400000002")


def checksum(data):
    words = struct.unpack(f"!{len(data) // 2}H", data)
    total = sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def reply(frame, answer):
    """The answer to a frame with a question; None for what is none."""
    if len(frame) < 55 or frame[12:14] != b"\x08\x00" or frame[14] != 0x45 or frame[23] != 17 or frame[36:38] != b"\0\x35":
        return None
    ip, udp, dns = frame[14:34], frame[34:42], frame[42:]
    end, labels = 12, []
    while dns[end]:
        labels.append(dns[end + 1:end + 1 + dns[end]].decode("latin-1"))
        end += 1 + dns[end]
    kind, end = struct.unpack("!H", dns[end + 1:end + 3])[0], end + 5
    print(".".join(labels), flush=True)
    records = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(answer) if kind == 1 else b""
    dns = dns[:2] + struct.pack("!5H", 0x8180, 1, 1 if records else 0, 0, 0) + dns[12:end] + records
    udp = udp[2:4] + udp[0:2] + struct.pack("!HH", 8 + len(dns), 0) + dns
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + ip[16:20] + ip[12:16]
    return OWN_MAC + ROUTER_MAC + b"\x08\x00" + ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + udp


def main():
    device, answer, node = sys.argv[1:]
    tap = os.open(node, os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TAP | IFF_NO_PI))
    for command in (
        f"link set {device} address {OWN_MAC.hex(':')} arp off multicast off addrgenmode none up", f"addr add 10.10.10.2/30 dev {device} noprefixroute",
        f"neigh replace {ROUTER} lladdr {ROUTER_MAC.hex(':')} dev {device} nud permanent", f"route add {ROUTER} dev {device}",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([tap, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        frame = reply(os.read(tap, 2048), answer)
        if frame:
            os.write(tap, frame)


main()
