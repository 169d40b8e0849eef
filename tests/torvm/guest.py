"""The TorVM's guest alone: boots the built image in QEMU with the test as its host, its packet engine and its launcher. Nothing of the
machine's network is used: both network devices end in socket pairs of this process."""

import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "torvm", "image"))
import cpio  # noqa: E402


def constant(source, name):
    """What the programs' own source says, so that it is said once."""
    with open(os.path.join(ROOT, "torvm", source), encoding="ascii") as file:
        return re.search(rf'{name}: &str =\s*"(.*)";', file.read())[1]


CMDLINE = constant("contract/src/launch.rs", "CMDLINE")
QBOOT = constant("launcher/src/command.rs", "QBOOT")
CHANNEL = "org.proxyvpn.channel"
FW_CFG = "opt/org.proxyvpn/config"
GUEST, HOST, UPLINK_GUEST, UPLINK_GATEWAY = "10.10.10.1", "10.10.10.2", "10.10.11.2", "10.10.11.1"
GUEST_MAC, HOST_MAC = "52:54:00:10:10:01", "52:54:00:10:10:02"
UPLINK_GUEST_MAC, UPLINK_GATEWAY_MAC = "52:54:00:10:11:02", "52:54:00:10:11:01"
# A hash in the right form: no test here speaks to the control port.
CONFIG = {"control-password": "16:872860B76453A77D60CA2BB8C1A7042072093276A3D701AD684053EC4C"}


class Failed(Exception):
    """A promise was not kept."""


class Machine:
    """One run of QEMU. `folder`: for the serial log; `state`: the disk's file; `deaf`: the channel holds little that is not read; `firmware`:
    another than QEMU's own."""

    def __init__(self, image, folder, state, config=json.dumps(CONFIG).encode(), memory=256, initramfs=None, deaf=False, firmware=QBOOT):
        self.serial = os.path.join(folder, "serial.log")
        open(self.serial, "w").close()
        config_path = os.path.join(folder, "config")
        with open(config_path, "wb") as file:
            file.write(config)
        self.host, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.uplink, uplink = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel, channel = socket.socketpair()
        self.qmp, qmp = socket.socketpair()
        if deaf:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        ends = [host, uplink, channel, qmp]
        def link(name, end, mac, mtu):
            return ["-netdev", f"dgram,id={name},local.type=fd,local.str={end.fileno()}",
                    "-device", f"virtio-net-pci,netdev={name},mac={mac},romfile=,host_mtu={mtu}"]
        command = [
            "qemu-system-x86_64", "-name", "torvm-test", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", str(memory),
            "-machine", "q35,vmport=off,smm=off,hpet=off,usb=off,graphics=off,i8042=off,sata=off,smbus=off", "-nodefaults", "-no-user-config",
            "-display", "none", "-monitor", "none", "-no-reboot",
            "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-kernel", os.path.join(image, "vmlinuz"), "-initrd", initramfs or os.path.join(image, "initramfs"), "-append", CMDLINE,
            "-fw_cfg", f"name={FW_CFG},file={config_path}",
            *link("host", host, GUEST_MAC, 1500), *link("uplink", uplink, UPLINK_GUEST_MAC, 65520),
            "-drive", f"file={state},if=none,id=state,format=raw,cache=writeback", "-device", "virtio-blk-pci,drive=state",
            "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng,max-bytes=1024,period=1000",
            "-chardev", f"socket,id=channel,fd={channel.fileno()}", "-device", "virtio-serial-pci",
            "-device", f"virtserialport,chardev=channel,name={CHANNEL}",
            "-chardev", f"socket,id=qmp,fd={qmp.fileno()}", "-mon", "chardev=qmp,mode=control",
            "-serial", f"file:{self.serial}",
        ]
        if firmware and os.path.exists(firmware):
            command += ["-bios", firmware]
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, pass_fds=[end.fileno() for end in ends], stdin=subprocess.DEVNULL)
        for end in ends:
            end.close()
        self.said = []   # (seconds since the start, status)
        self.rest = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for end in (self.host, self.uplink, self.channel, self.qmp):
            end.close()

    def text(self):
        """What the guest wrote to its console."""
        with open(self.serial, errors="replace") as file:
            return file.read()

    def read(self, timeout):
        """Reads the channel once. False: nothing came in time, or QEMU ended."""
        if not select.select([self.channel], [], [], timeout)[0]:
            return False
        try:
            data = self.channel.recv(65536)
        except ConnectionError:
            data = b""
        at = time.monotonic() - self.started
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if len(line) >= 1024:
                raise Failed(f"a line of {len(line)} bytes")
            self.said.append((at, json.loads(line)))
        return bool(data)

    def wait(self, status, within, where=lambda _: True):
        """Waits for a status and gives when it came, and what it was."""
        end = time.monotonic() + within
        while True:
            for at, said in self.said:
                if said["status"] == status and where(said):
                    return at, said
            left = end - time.monotonic()
            if left <= 0 or not self.read(left):
                raise Failed(f"no {status} within {within} s or until QEMU's end; said: {[said for _, said in self.said][-12:]}; console: {self.text()[-1500:]}")

    def order(self, **order):
        self.channel.sendall(json.dumps(order).encode() + b"\n")

    def command(self, name):
        """One QMP command; its greeting and events are passed over."""
        for execute in ("qmp_capabilities", name):
            self.qmp.sendall(json.dumps({"execute": execute}).encode())
            time.sleep(0.02)

    def power_down(self):
        """By the power button. Gives the seconds to QEMU's end."""
        begin = time.monotonic()
        self.command("system_powerdown")
        self.ended(5)
        return time.monotonic() - begin

    def cpu(self):
        """Seconds of processor that QEMU has used: what its clock would say on a machine with nothing else to do."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            user, system = file.read().rsplit(") ", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def ended(self, within):
        """Waits for QEMU's end and gives how long it took."""
        begin = time.monotonic()
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise Failed(f"QEMU did not end within {within} s; console: {self.text()[-1500:]}") from None
        while self.read(0):
            pass
        return time.monotonic() - begin


def blank(path, mib=64):
    """A blank state disk."""
    with open(path, "wb") as file:
        file.truncate(mib * 1024 * 1024)
    return path


# ---- the image, changed

def changed(image, path, members, name="initramfs"):
    """The image's initramfs with `members` (name, mode, data) over its own."""
    with open(os.path.join(image, name), "rb") as file:
        whole = file.read()
    packed = subprocess.run(["zstd", "-q", "-c"], input=cpio.archive(members), stdout=subprocess.PIPE, check=True).stdout
    with open(path, "wb") as file:
        file.write(whole + packed)
    return path


# ---- frames

TCP, UDP, ICMP = 6, 17, 1
SYN, ACK, RST = 2, 16, 4


def mac(text):
    return bytes.fromhex(text.replace(":", ""))


def checksum(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(protocol, payload, source, destination, from_mac=HOST_MAC, to_mac=GUEST_MAC):
    """IPv4 in Ethernet."""
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0, socket.inet_aton(source), socket.inet_aton(destination))
    head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
    return mac(to_mac) + mac(from_mac) + b"\x08\x00" + head + payload


def transport(protocol, payload, at, source, destination):
    """Fills in the checksum at this place."""
    pseudo = socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack(">BBH", 0, protocol, len(payload))
    return payload[:at] + struct.pack(">H", checksum(pseudo + payload)) + payload[at + 2 :]


def syn(source, destination, port, from_port=40000, **macs):
    segment = struct.pack(">HHIIBBHHH", from_port, port, 1, 0, 0x50, SYN, 64000, 0, 0)
    return frame(TCP, transport(TCP, segment, 16, source, destination), source, destination, **macs)


def datagram(source, destination, port, data=b"x", from_port=40000, **macs):
    payload = struct.pack(">HHHH", from_port, port, 8 + len(data), 0) + data
    return frame(UDP, transport(UDP, payload, 6, source, destination), source, destination, **macs)


class Packet:
    """What the guest sent."""

    def __init__(self, raw):
        self.raw = raw
        self.to_mac, self.from_mac, self.kind = raw[:6].hex(":"), raw[6:12].hex(":"), int.from_bytes(raw[12:14], "big")
        self.protocol = self.source = self.destination = None
        if self.kind == 0x0800:
            self.protocol = raw[23]
            self.source, self.destination = socket.inet_ntoa(raw[26:30]), socket.inet_ntoa(raw[30:34])
            self.payload = raw[14 + (raw[14] & 15) * 4 :]
            if self.protocol in (TCP, UDP):
                self.from_port, self.port = struct.unpack(">HH", self.payload[:4])
            if self.protocol == TCP:
                self.flags = self.payload[13] & (SYN | ACK | RST)
            if self.protocol == ICMP:
                self.type, self.code = self.payload[:2]

    def __repr__(self):
        detail = {TCP: lambda: f"tcp {self.from_port}>{self.port} flags {self.flags}", UDP: lambda: f"udp {self.from_port}>{self.port}",
                  ICMP: lambda: f"icmp {self.type}/{self.code}"}.get(self.protocol, lambda: f"kind {self.kind:#06x}")()
        return f"<{self.source} > {self.destination} {detail}>"


def stream(end, seconds):
    """What comes out of a link within this time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([end], [], [], left)[0]:
            raw = end.recv(1 << 17)
            if not raw:
                return
            yield Packet(raw)


def packets(end, seconds):
    """All of it."""
    return list(stream(end, seconds))


def answer(end, question, seconds=2.0):
    """The first packet that comes after this one was sent; None when there is none. What the guest sends again to another port, since it got
    no answer to it, does not count."""
    packets(end, 0.01)
    end.send(question)
    asked = Packet(question)
    for packet in stream(end, seconds):
        if packet.protocol == ICMP or asked.protocol not in (TCP, UDP) or packet.port == asked.from_port:
            return packet
    return None
