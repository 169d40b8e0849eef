"""Tests of the TorVM's guest without the daemon: boot.py [--image DIR] [--only TEXT] [--list]. Needs QEMU and e2fsprogs, no root and no network. Ends with
'N passed, N failed, N skipped'."""

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import traceback

sys.dont_write_bytecode = True
os.environ["PATH"] += ":/usr/sbin:/sbin"
import guest  # noqa: E402
from guest import ACK, CONFIG, GUEST, HOST, ICMP, RST, SYN, TCP, UDP, UPLINK_GATEWAY, UPLINK_GUEST, Failed, Machine  # noqa: E402

TESTS = []
ALONE = 120  # seconds to Tor's start on a busy machine
# Asks for the address of example.onion.
ONION = b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x05onion\x00\x00\x01\x00\x01"
SCRIPT = stat.S_IFREG | 0o755
FRONT, STUN, VOLUNTEER = "203.0.113.80", "203.0.113.78", "203.0.113.9"
SNOWFLAKE = "snowflake 192.0.2.3:80 url=https://broker.example/ fronts=front.example,other.example ice=stun:stun.example:3478"


def test(promise):
    def add(function):
        TESTS.append((function, promise))
        return function

    return add


class Place:
    """A folder for one test."""

    def __init__(self, image, folder):
        self.image, self.folder = image, folder
        self.state = self.file("state.img")

    def file(self, name):
        return os.path.join(self.folder, name)

    def machine(self, **options):
        return Machine(self.image, self.folder, self.state, **options)

    def blank(self):
        guest.blank(self.state)

    def debugfs(self, *commands, write=False):
        text = "\n".join(commands) + "\n"
        return subprocess.run(["debugfs", *["-w"] * write, "-f", "-", self.state], input=text, capture_output=True, text=True, check=True).stdout

    def is_clean(self):
        done = subprocess.run(["e2fsck", "-fn", self.state], capture_output=True, text=True)
        said = done.stdout + done.stderr
        # It passes over a journal that must be played back, and only says so.
        expect(done.returncode == 0 and "recovery" not in said, f"e2fsck: {said}")


def expect(holds, otherwise):
    if not holds:
        raise Failed(otherwise() if callable(otherwise) else str(otherwise))


def config(hosts=(), **tor):
    hosts = [{"name": name, "address": address} for name, address in hosts]
    return json.dumps({**CONFIG, "tor": tor, "hosts": hosts}).encode()


def with_transports(place):
    initramfs = os.path.join(place.image, "initramfs-transports")
    if not os.path.exists(initramfs):
        raise Failed("the image has no transports (build it with --transports)")
    return initramfs


@test("a blank disk is made, Tor runs, the power button ends it within 5 s, the file system is clean, and the next boot keeps it")
def life(place):
    place.blank()
    with place.machine() as machine:
        init, _ = machine.wait("init", ALONE)
        network, _ = machine.wait("network", ALONE)
        _, state = machine.wait("state", ALONE)
        tor, _ = machine.wait("tor", ALONE)
        cpu = machine.cpu()
        expect(state["disk"] == "made", state)
        machine.wait("alive", 10)
        machine.wait("log", 20, lambda said: "Bootstrapped 5%" in said["text"])
        seconds = machine.power_down()
        expect(machine.wait("off", 1)[1]["cause"] == "the host asked for it", machine.said[-1])
    place.is_clean()
    print(f"  made: init {init:.2f} s, network {network:.2f} s, tor {tor:.2f} s after QEMU's start ({cpu:.2f} s of processor); down in {seconds:.2f} s")
    with open(place.file("marker"), "w") as file:
        file.write("mine")
    place.debugfs(f"write {place.file('marker')} tor/marker", write=True)
    with place.machine() as machine:
        init, _ = machine.wait("init", ALONE)
        _, state = machine.wait("state", ALONE)
        tor, _ = machine.wait("tor", ALONE)
        expect(state["disk"] == "kept", state)
        print(f"  kept: init {init:.2f} s, tor {tor:.2f} s ({machine.cpu():.2f} s of processor)")
        machine.wait("log", 20, lambda said: "Bootstrapped 5%" in said["text"])
        machine.power_down()
    files = place.debugfs("ls -p tor")
    expect("/marker/" in files and "/state/" in files, files)


@test("a machine that is switched off boots again with its disk")
def switched_off(place):
    place.blank()
    with place.machine() as machine:
        machine.wait("log", ALONE, lambda said: "Bootstrapped 5%" in said["text"])
    with place.machine() as machine:
        _, state = machine.wait("state", ALONE)
        expect(state["disk"] in ("kept", "repaired"), state)
        machine.wait("tor", ALONE)


@test("QEMU's own firmware, which KVM gets, starts it as well")
def own_firmware(place):
    place.blank()
    with place.machine(firmware=None) as machine:
        machine.wait("tor", ALONE)
        expect("SeaBIOS" in machine.text(), f"another firmware: {machine.text()[:200]}")
        machine.power_down()
    place.is_clean()


def make_disk(place, content):
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", content, place.state, "64M"], stdout=subprocess.DEVNULL, check=True)


@test("a damaged file system is repaired")
def repaired(place):
    os.makedirs(place.file("content/tor"))
    make_disk(place, place.file("content"))
    place.debugfs("ssv free_blocks_count 1", "ssv state 0", write=True)
    with place.machine() as machine:
        _, state = machine.wait("state", ALONE)
        expect(state["disk"] == "repaired", state)
        machine.wait("tor", ALONE)
        machine.power_down()
    place.is_clean()


@test("a disk full of noise is made anew, and the host is told")
def noise(place):
    with open(place.state, "wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(64 << 20)
    with place.machine() as machine:
        _, state = machine.wait("state", ALONE)
        expect(state["disk"] == "reset", state)
        machine.wait("tor", ALONE)
        machine.power_down()
    place.is_clean()


@test("a full disk loses all but the guards; Tor runs, and the host is told")
def full(place):
    content = place.file("content")
    os.makedirs(f"{content}/tor/diff-cache")
    with open(f"{content}/tor/state", "w") as file:
        file.write("# my guards\n")
    for junk in ("junk", "tor/cached-junk", "tor/diff-cache/junk"):
        with open(f"{content}/{junk}", "wb") as file:
            file.write(b"x" * (17 << 20))
    for folder, folders, files in os.walk(content):
        for name in folders + files:
            os.chmod(os.path.join(folder, name), 0o755)
    make_disk(place, content)
    # Not one block is left.
    with open(place.file("rest"), "wb") as file:
        file.write(b"x" * (64 << 20))
    place.debugfs(f"write {place.file('rest')} rest", write=True)
    subprocess.run(["e2fsck", "-fy", place.state], capture_output=True)
    free = place.debugfs("stats")
    expect("\nFree blocks:              0\n" in free, free)
    with place.machine() as machine:
        machine.wait("state", ALONE)
        machine.wait("log", 5, lambda said: said["level"] == "warn" and "was full" in said["text"])
        machine.wait("log", 20, lambda said: "Bootstrapped 5%" in said["text"])
        machine.power_down()
    files = place.debugfs("ls -p /", "ls -p tor")
    expect("junk" not in files and "/rest/" not in files and "/state/" in files, files)
    place.is_clean()


@test("a wrong configuration powers the guest off, with the cause")
def wrong_config(place):
    place.blank()
    for wrong in (b"{}", b"\0" * 100, b" " * 70_000, json.dumps({**CONFIG, "torrc": "SocksPort 0"}).encode()):
        with place.machine(config=wrong) as machine:
            _, off = machine.wait("off", ALONE)
            expect("configuration" in off["cause"], off)
            machine.ended(5)
            expect(not any(said["status"] in ("network", "tor") for _, said in machine.said), machine.said)


@test("a Tor that ends powers the guest off, with its own words")
def tor_ends(place):
    place.blank()
    with place.machine(config=config(entry={"bridges": []})) as machine:
        _, off = machine.wait("off", ALONE)
        expect("Tor ended with exit status 1" in off["cause"] and "bridge" in off["cause"].lower(), off)
        machine.ended(5)
    place.is_clean()


@test("a firewall that fails powers the guest off before anything is up")
def broken_firewall(place):
    place.blank()
    for broken in (b"#!/bin/sh\n", b"\x7fELF no program", b""):
        initramfs = guest.changed(place.image, place.file("changed"), [("usr/bin/nft", SCRIPT, broken)])
        with place.machine(initramfs=initramfs) as machine:
            _, off = machine.wait("off", ALONE)
            expect("nft" in off["cause"], off)
            machine.ended(5)
            expect(not any(said["status"] == "network" for _, said in machine.said), machine.said)
            sent = guest.packets(machine.host, 0.2) + guest.packets(machine.uplink, 0.2)
            expect(not sent, sent)


@test("a module that is not the kernel's powers the guest off")
def broken_module(place):
    place.blank()
    initramfs = guest.changed(place.image, place.file("changed"), [("modules/99-x.ko", SCRIPT, b"\x7fELF no module")])
    with place.machine(initramfs=initramfs) as machine:
        machine.ended(ALONE)
        expect("powers off: load /modules/99-x.ko" in machine.text(), machine.text)


@test("a panic ends QEMU")
def panic(place):
    place.blank()
    initramfs = guest.changed(place.image, place.file("changed"), [("init", SCRIPT, b"no program")])
    with place.machine(initramfs=initramfs) as machine:
        machine.ended(ALONE)
        expect(not machine.said and "panic" in machine.text(), machine.text)


@test("from the host: TCP gets to Tor, TCP port 53 is reset, other UDP is refused, nothing else is answered")
def from_host(place):
    place.blank()
    with place.machine() as machine:
        machine.wait("log", ALONE, lambda said: "Bootstrapped 0%" in said["text"])
        quiet = guest.packets(machine.host, 1)
        expect(not quiet, f"sent unasked: {quiet}")
        for address, port in (("203.0.113.9", 80), ("203.0.113.9", 853), (GUEST, 9050), (GUEST, 9051), (GUEST, 9095), (GUEST, 22)):
            got = guest.answer(machine.host, guest.syn(HOST, address, port, from_port=41000 + port % 10000))
            expect(got and got.protocol == TCP and got.flags == SYN | ACK and (got.source, got.from_port) == (address, port), f"{address}:{port}: {got}")
            expect(got.to_mac == guest.HOST_MAC, got.to_mac)
        for address in ("203.0.113.53", GUEST):
            got = guest.answer(machine.host, guest.syn(HOST, address, 53))
            expect(got and got.protocol == TCP and got.flags & RST and got.source == address, f"{address}:53: {got}")
        for count in range(40):  # not limited in rate
            got = guest.answer(machine.host, guest.datagram(HOST, "203.0.113.9", 443, from_port=42000 + count))
            expect(got and got.protocol == ICMP and (got.type, got.code) == (3, 3), f"UDP {count}: {got}")
        got = guest.answer(machine.host, guest.datagram(HOST, GUEST, 9051))
        expect(got and (got.type, got.code) == (3, 3), f"UDP to the guest: {got}")
        got = guest.answer(machine.host, guest.frame(ICMP, b"\x08\x00\xf7\xff\x00\x00\x00\x00", HOST, GUEST))
        expect(got and (got.type, got.code) == (3, 3), f"a ping: {got}")
        for name, question in {
            "another's address": guest.syn("192.0.2.1", GUEST, 9050),
            "the uplink's network": guest.syn(UPLINK_GATEWAY, GUEST, 9050),
            "another's MAC address": guest.syn(HOST, GUEST, 9050, to_mac="52:54:00:99:99:99"),
            "IPv6": guest.mac("33:33:00:00:00:01") + guest.mac(guest.HOST_MAC) + b"\x86\xdd" + b"\x60" + bytes(7) + bytes(32),
        }.items():
            machine.host.send(question)
            # What it sends again, for it got no answer, is for the ports of before.
            got = [packet for packet in guest.packets(machine.host, 0.5) if not (packet.protocol == TCP and packet.port >= 41000)]
            expect(not got, f"{name}: {got}")
        for address, port in (("203.0.113.53", 53), (GUEST, 53), (GUEST, 9093)):
            got = guest.answer(machine.host, guest.datagram(HOST, address, port, data=ONION, from_port=43000 + port), 10)
            expect(got and got.protocol == UDP and (got.source, got.from_port) == (address, port), f"DNS at {address}:{port}: {got}")


@test("on its way out the guest begins TCP only, to the gateway's MAC address, and takes nothing that begins there")
def way_out(place):
    place.blank()
    with place.machine() as machine:
        machine.wait("log", ALONE, lambda said: "Bootstrapped 5%" in said["text"])
        sent = guest.packets(machine.uplink, 5)
        expect(sent, "Tor sent nothing")
        for packet in sent:
            right = packet.protocol == TCP and packet.source == UPLINK_GUEST and packet.to_mac == guest.UPLINK_GATEWAY_MAC
            expect(right and packet.flags == SYN, packet)
        macs = {"from_mac": guest.UPLINK_GATEWAY_MAC, "to_mac": guest.UPLINK_GUEST_MAC}
        tried = [
            *(guest.syn(UPLINK_GATEWAY, UPLINK_GUEST, port, **macs) for port in (22, 53, 9050, 9051, 9095)),
            *(guest.syn(UPLINK_GATEWAY, GUEST, port, **macs) for port in (9050, 9051, 9095)),
            guest.syn(HOST, GUEST, 9050, **macs),
            *(guest.datagram("203.0.113.1", UPLINK_GUEST, port, **macs) for port in (53, 9093, 9999)),
            guest.syn("203.0.113.1", HOST, 80, **macs),
            # "I am the gateway, at another address": an unasked answer of ARP
            guest.mac(guest.UPLINK_GUEST_MAC) + guest.mac("52:54:00:66:66:66") + bytes.fromhex("08060001080006040002525400666666")
            + bytes((10, 10, 11, 1)) + guest.mac(guest.UPLINK_GUEST_MAC) + bytes((10, 10, 11, 2)),
        ]
        for frame in tried:
            machine.uplink.send(frame)
        later = guest.packets(machine.uplink, 3) + guest.packets(machine.host, 0.5)
        for packet in later:
            expect(packet.protocol == TCP and packet.flags == SYN and packet.to_mac == guest.UPLINK_GATEWAY_MAC, f"answered: {packet}")


@test("with a bridge behind obfs4 and 128 MiB, only the bridge is contacted")
def bridge(place):
    place.blank()
    cert = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    line = f"obfs4 203.0.113.77:4433 0123456789ABCDEF0123456789ABCDEF01234567 cert={cert} iat-mode=0"
    with place.machine(config=config(entry={"bridges": [line]}), initramfs=with_transports(place), memory=128) as machine:
        machine.wait("tor", ALONE)
        first = guest.packets(machine.uplink, 0.1)
        end = time.monotonic() + 30
        while not first and time.monotonic() < end:
            machine.read(0.1)
            first = guest.packets(machine.uplink, 0.5)
        sent = first + guest.packets(machine.uplink, 3)
        expect(sent and all((packet.destination, packet.port) == ("203.0.113.77", 4433) for packet in sent), f"{sent} {machine.said[-5:]}")
        machine.power_down()
    place.is_clean()


@test("with snowflake and 128 MiB, the front is contacted by TCP and the STUN server by UDP, and nobody else")
def snowflake(place):
    place.blank()
    told = config(hosts=[("front.example", FRONT), ("stun.example", STUN)], entry={"bridges": [SNOWFLAKE]})
    with place.machine(config=told, initramfs=with_transports(place), memory=128) as machine:
        machine.wait("tor", ALONE)
        sent, end = [], time.monotonic() + 60
        while len({packet.protocol for packet in sent}) < 2 and time.monotonic() < end:
            machine.read(0.1)
            sent += guest.packets(machine.uplink, 0.5)
        sent += guest.packets(machine.uplink, 3)
        kinds = {(packet.protocol, packet.source, packet.destination, packet.port) for packet in sent}
        expect(kinds == {(TCP, UPLINK_GUEST, FRONT, 443), (UDP, UPLINK_GUEST, STUN, 3478)}, f"{kinds} {machine.said[-5:]}")
        quiet = guest.packets(machine.host, 0.1)
        expect(not quiet, quiet)
        machine.power_down()
    place.is_clean()


# In Tor's place, and in e2fsck's, which init runs as root when there are addresses.
SENDER = r"""
#include <arpa/inet.h>
#include <stdio.h>
#include <unistd.h>
int main(void) {
  struct { const char *to; int port; const char *from; } all[] = {TARGETS};
  int on = 1, sent = 0;
  for (unsigned i = 0; i < sizeof all / sizeof *all; i++) {
    struct sockaddr_in to = {AF_INET, htons(all[i].port), {inet_addr(all[i].to)}}, from = {AF_INET, 0, {inet_addr(all[i].from)}};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &on, sizeof on);
    if (!bind(fd, (void *)&from, sizeof from) && sendto(fd, "x", 1, 0, (void *)&to, sizeof to) == 1) sent++;
  }
  printf("Jan 01 00:00:00.000 [notice] %d left\n", sent);
  fflush(stdout);
  sleep(SECONDS);
}
"""
AS_TOR = [(VOLUNTEER, 3478, "0.0.0.0"), (VOLUNTEER, 53, "0.0.0.0"), ("224.0.0.251", 5353, UPLINK_GUEST), ("255.255.255.255", 67, UPLINK_GUEST),
          (HOST, 9999, "0.0.0.0"), (VOLUNTEER, 4000, GUEST)]


def sender(place, targets, seconds):
    """A program for the guest that sends to these."""
    table = ",".join(f'{{"{to}",{port},"{source}"}}' for to, port, source in targets)
    out = place.file("sender")
    subprocess.run(["cc", "-static", "-x", "c", f"-DTARGETS={table}", f"-DSECONDS={seconds}", "-o", out, "-"], input=SENDER, text=True, check=True)
    with open(out, "rb") as file:
        return file.read()


def sends(place, **tor):
    """What Tor's user and root get out by UDP with this configuration."""
    os.makedirs(place.file("content/tor"), exist_ok=True)
    make_disk(place, place.file("content"))
    members = [("usr/bin/tor", SCRIPT, sender(place, AS_TOR, 1000)), ("usr/bin/e2fsck", SCRIPT, sender(place, [(VOLUNTEER, 5000, "0.0.0.0")], 0))]
    with_transports(place)
    initramfs = guest.changed(place.image, place.file("changed"), members, "initramfs-transports")
    with place.machine(config=config(**tor), initramfs=initramfs) as machine:
        _, said = machine.wait("log", ALONE, lambda said: said["text"].endswith(" left"))
        # Nobody asked them.
        for _ in range(3):
            machine.uplink.send(guest.datagram(VOLUNTEER, UPLINK_GUEST, 9999, from_mac=guest.UPLINK_GATEWAY_MAC, to_mac=guest.UPLINK_GUEST_MAC))
        sent = guest.packets(machine.uplink, 5) + guest.packets(machine.host, 0.5)
        return said["text"], {(packet.protocol, packet.source, packet.destination, getattr(packet, "port", None)) for packet in sent}


@test("UDP of Tor's user leaves with snowflake only, to no port 53, no group and not to the host; root's does not")
def udp(place):
    got = sends(place, entry={"bridges": [SNOWFLAKE]})
    expect(got == ("1 left", {(UDP, UPLINK_GUEST, VOLUNTEER, 3478)}), f"with snowflake: {got}")
    for entry in ("any", {"bridges": ["192.0.2.1:443", "obfs4 192.0.2.2:443 cert=a"]}):
        got = sends(place, entry=entry)
        expect(got == ("0 left", set()), f"with {entry}: {got}")


@test("an image without the program that the bridges need powers the guest off, with the cause")
def no_transport(place):
    place.blank()
    with place.machine(config=config(entry={"bridges": [SNOWFLAKE]})) as machine:
        _, off = machine.wait("off", ALONE)
        expect("the image has no /usr/bin/snowflake-client" in off["cause"], off)
        machine.ended(5)


@test("countries of relays are known when a profile names one")
def countries(place):
    place.blank()
    with place.machine(config=config(**{"exit-nodes": ["{de}"]})) as machine:
        machine.wait("log", ALONE, lambda said: "Parsing GEOIP IPv4 file /usr/share/torvm/geoip" in said["text"])
        machine.wait("log", ALONE, lambda said: "Bootstrapped 5%" in said["text"])


@test("a host that does not read holds nothing up, and learns what it missed")
def deaf(place):
    place.blank()
    with place.machine(deaf=True, config=config(log="info")) as machine:
        end = time.monotonic() + ALONE
        while not guest.packets(machine.uplink, 0.2):  # Tor runs
            expect(time.monotonic() < end, "Tor did not start")
        # At this level it has a word for each question.
        for number in range(400):
            machine.host.send(guest.datagram(HOST, GUEST, 53, data=ONION, from_port=20_000 + number))
        time.sleep(3)
        machine.wait("log", 20, lambda said: "since the host did not read" in said["text"])
        machine.wait("alive", 20)
        time.sleep(3)
        machine.power_down()
    place.is_clean()


@test("the host sets the clock; what is no order is passed over")
def orders(place):
    place.blank()
    with place.machine() as machine:
        machine.wait("log", ALONE, lambda said: "Bootstrapped 5%" in said["text"])
        machine.channel.sendall(b"\n" * 1000)  # as of daemons that go on with it
        machine.channel.sendall(b"{}\n[[[[\n" + b"x" * 50_000 + b"\n" + bytes(range(128)) + b"\n")
        machine.order(order="clock", unix_micros=2_000_000_000_000_000)
        machine.wait("log", 10, lambda said: "clock just jumped" in said["text"])
        strange = machine.text().count("an order was not understood")
        expect(strange == 5, f"{strange} lines were taken for orders: {machine.text()[-1500:]}")
        machine.said.clear()
        machine.wait("alive", 10)
        machine.power_down()


def main():
    parser = argparse.ArgumentParser()
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(guest.ROOT, "target"))
    parser.add_argument("--image", default=os.path.join(target, "torvm-image"), help="of scripts/build-torvm-image.sh --transports")
    parser.add_argument("--only", default="", help="run tests whose guest.NAME holds this text")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [(f"guest.{function.__name__}", function, promise) for function, promise in TESTS if options.only in f"guest.{function.__name__}"]
    if options.list:
        for name, _, promise in chosen:
            print(f"{name}: {promise}")
        return 0
    needed = ["qemu-system-x86_64", "mke2fs", "e2fsck", "debugfs", "zstd", "cc"]
    missing = [tool for tool in needed if not shutil.which(tool)]
    passed = failed = 0
    if missing:
        print(f"skipped  the guest alone: {', '.join(missing)} not installed (scripts/setup.sh)")
        print("0 passed, 0 failed, 1 skipped")
        return 0
    for name, function, promise in chosen:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torvm-guest-") as folder:
            try:
                function(Place(os.path.abspath(options.image), folder))
                passed += 1
                print(f"ok       {name}: {promise} ({time.monotonic() - begin:.1f} s)", flush=True)
            except Exception as error:  # a defect of the test is a failure like any other
                failed += 1
                print(f"FAILED   {name}: {promise}", flush=True)
                print("  | " + (str(error) if isinstance(error, Failed) else traceback.format_exc()).replace("\n", "\n  | "), flush=True)
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return failed > 0 or not passed


if __name__ == "__main__":
    sys.exit(main())
