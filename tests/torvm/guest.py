"""The TorVM's guest alone: boots the built image in QEMU with the test as its host, its packet engine and its launcher. Nothing of the
machine's network is used: both network devices end in socket pairs of this process."""

import json
import os
import select
import socket
import subprocess
import time

CHANNEL = "org.proxyvpn.channel"
FW_CFG = "opt/org.proxyvpn/config"
CMDLINE = "console=ttyS0 quiet loglevel=3 panic=1 random.trust_cpu=off ipv6.disable=1 rootfstype=ramfs"
GUEST_MAC, HOST_MAC = "52:54:00:10:10:01", "52:54:00:10:10:02"
UPLINK_GUEST_MAC, UPLINK_GATEWAY_MAC = "52:54:00:10:11:02", "52:54:00:10:11:01"
# The hash of "secret".
CONFIG = {"control-password": "16:872860B76453A77D60CA2BB8C1A7042072093276A3D701AD684053EC4C"}


class Failed(Exception):
    """A promise was not kept."""


class Machine:
    """One run of QEMU. `folder`: for the serial log; `state`: the disk's file."""

    def __init__(self, image, folder, state, config=json.dumps(CONFIG).encode(), memory=256, initramfs=None):
        self.serial = os.path.join(folder, "serial.log")
        open(self.serial, "w").close()
        config_path = os.path.join(folder, "config")
        with open(config_path, "wb") as file:
            file.write(config)
        self.host, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.uplink, uplink = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel, channel = socket.socketpair()
        self.qmp, qmp = socket.socketpair()
        ends = [host, uplink, channel, qmp]
        def link(name, end, mac, mtu):
            return ["-netdev", f"dgram,id={name},local.type=fd,local.str={end.fileno()}",
                    "-device", f"virtio-net-pci,netdev={name},mac={mac},romfile=,host_mtu={mtu}"]
        command = [
            "qemu-system-x86_64", "-name", "torvm-test", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", str(memory),
            "-machine", "q35,vmport=off,smm=off,hpet=off,usb=off,graphics=off,i8042=off", "-nodefaults", "-no-user-config",
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
                raise Failed(f"no {status} within {within} s; said: {[said for _, said in self.said][-12:]}; console: {self.text()[-1500:]}")

    def order(self, **order):
        self.channel.sendall(json.dumps(order).encode() + b"\n")

    def command(self, name):
        """One QMP command; its greeting and events are passed over."""
        for execute in ("qmp_capabilities", name):
            self.qmp.sendall(json.dumps({"execute": execute}).encode())
            time.sleep(0.02)

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
