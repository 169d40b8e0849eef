"""What becomes of altered images: one that does not match its manifest is not started; one that the administrator approved, and that turns
against the machine, reaches nothing but Tor's way out."""

import os
import re
import shutil
import signal
import subprocess

from image import BUSYBOX, altered, content
from lab import APP4, FAILURE, PYTHON, WEB, equal, expect, test, until
from torlab import HOST, NEIGHBOUR, OWN, PROFILE, PUBLIC_NEIGHBOUR

ENGINE = "10.10.11.1"  # the guest's gateway
RESOLV_CONF = "/etc/resolv.conf"


def one_byte(folder):
    """Alters one byte of the initramfs; the file is another one then, as when it is replaced."""
    data = bytearray(content(f"{folder}/initramfs"))
    data[1000] ^= 1
    with open(f"{folder}/initramfs.new", "wb") as file:
        file.write(data)
    os.rename(f"{folder}/initramfs.new", f"{folder}/initramfs")


@test("an image that is missing or not what its manifest says is not started, and the network stays open", seconds=60, daemon=None)
def not_approved(lab):
    before = lab.state()
    for spoil in one_byte, lambda folder: os.unlink(f"{folder}/vmlinuz"), lambda folder: os.unlink(f"{folder}/manifest.json"):
        with altered(lab, spoil=spoil) as image:
            lab.daemon(image=image)
            text = lab.connect_tor(code=FAILURE)
            expect(image in text or "image" in text.lower(), f"the error does not speak of the image: {text}")
            equal(before, lab.state(), "a failed connect changed the network")
            expect(lab.qemu() is None, "QEMU was started")
            lab.daemon_stop()


@test("an image that was replaced since the last start is looked at anew: blocked while it is not approved, back when it is", seconds=180, daemon=None)
def replaced(lab):
    with altered(lab) as image:
        lab.daemon(image=image)
        lab.connect_tor()
        one_byte(image)
        os.kill(lab.qemu(), signal.SIGKILL)
        until(20, lambda: lab.status()["reason"]["code"] == "image-invalid", lambda: f"an altered image is not refused: {lab.status()}")
        expect(lab.qemu() is None, "QEMU was started")
        one_byte(image)
        lab.await_state("connected")
        lab.disconnect()


@test("a resolver on this machine is warned of while names go to it, not while all is blocked", seconds=180, daemon=None)
def local_resolver(lab):
    def warned():
        return [item["text"] for item in lab.status()["health"] if item["code"] == "resolvers"]

    before = lab.app("cat", RESOLV_CONF).stdout
    lab.app("tee", RESOLV_CONF, data="nameserver 127.0.0.1\n")
    with altered(lab) as image:
        lab.daemon(image=image)
        lab.connect_tor()
        until(5, lambda: any("127.0.0.1" in text for text in warned()), lambda: f"no warning of the resolver: {lab.status()}")
        one_byte(image)
        os.kill(lab.qemu(), signal.SIGKILL)
        until(20, lambda: lab.status()["reason"]["code"] == "image-invalid", lambda: f"an altered image is not refused: {lab.status()}")
        lab.app("ip", "addr", "add", "192.168.77.9/24", "dev", "eth0")  # the daemon looks at the network
        lab.app("ip", "addr", "del", "192.168.77.9/24", "dev", "eth0")
        until(10, lambda: not warned(), lambda: f"warned of the resolver of the connection before: {warned()}")
        lab.disconnect()
    lab.app("tee", RESOLV_CONF, data=before)


# Tor's place in the guest; what it prints is Tor's log. Its user has the firewall's leave, and here there is no firewall.
SCAN = """#!/usr/bin/busybox sh
B=/usr/bin/busybox
say() { echo "Jan 01 00:00:00.000 [notice] drill $*"; }
reach() { if $B nc -w 3 "$1" "$2" </dev/null >/dev/null 2>&1; then say "reached $1 $2"; else say "nothing $1 $2"; fi; }
until [ -e /run/root-drill ]; do $B sleep 1; done
$B cat /run/root-drill | while read -r line; do say "$line"; done
for target in TARGETS; do reach ${target%:*} ${target#*:} & done
wait
say over
exec $B sleep 1000
"""
# The place of nft, which init runs as root before there are addresses: no ruleset; later, ways through the machine under test, and its
# 127.0.0.1 by the packet engine's address.
OPEN = """#!/usr/bin/busybox sh
B=/usr/bin/busybox
$B cat >/dev/null
try() { if $B nc -w 3 $1 $2 </dev/null >/dev/null 2>&1; then echo "reached $1 $2 by root"; else echo "nothing $1 $2 by root"; fi; }
(
  $B sleep 4
  echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet
  $B ip route del local 127.0.0.0/8 dev lo table local; $B ip route del local 127.0.0.1 dev lo table local
  $B ip route add 127.0.0.1/32 via ENGINE
  $B ip route add NEIGHBOUR/32 via HOST
  $B ip route add WEB/32 via HOST
  for target in NEIGHBOUR:80 WEB:80 127.0.0.1:22 127.0.0.1:9999; do try ${target%:*} ${target#*:} & done
  wait
  if $B ping -c 2 -W 2 HOST >/dev/null 2>&1; then echo "reached HOST by ping"; else echo "nothing HOST by ping"; fi
  $B ip route del NEIGHBOUR/32; $B ip route del WEB/32
  $B mv /run/root-drill.new /run/root-drill
) >/run/root-drill.new 2>&1 &
exit 0
"""
LISTENER = """
import socket, sys
one = socket.socket()
one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
one.bind(("", 9999))
one.listen()
while True:
    print(one.accept()[1], flush=True)
"""


@test("a guest that turned against the machine reaches neither it, nor its network, nor its 127.0.0.1; only Tor's way out", seconds=180)
def drill(lab):
    relay = lab.tor["relays"][0]
    targets = [
        *(f"{HOST}:{port}" for port in (22, 53, 9999)), *(f"{address}:{port}" for address in (APP4, OWN) for port in (22, 9999)),  # the machine
        f"{ENGINE}:22", f"{ENGINE}:9999", "127.0.0.1:22", "127.0.0.1:9999",  # by the packet engine's address
        f"{NEIGHBOUR}:80", f"{NEIGHBOUR}:22", f"{PUBLIC_NEIGHBOUR}:80",  # its networks
        "169.254.169.254:80", "0.0.0.0:22",
        f"{relay}:9001",
    ]
    scan = SCAN.replace("TARGETS", " ".join(targets))
    opened = OPEN.replace("NEIGHBOUR", NEIGHBOUR).replace("HOST", HOST).replace("WEB", WEB).replace("ENGINE", ENGINE)
    files = {"usr/bin/busybox": (content(BUSYBOX), 0o755), "usr/bin/tor": (scan.encode(), 0o755), "usr/bin/nft": (opened.encode(), 0o755)}
    for neighbour in NEIGHBOUR, PUBLIC_NEIGHBOUR:
        body = lab.app("curl", "-sS", "--max-time", "5", f"http://{neighbour}/").stdout
        expect("hello from" in body, f"anti-test: the machine itself does not reach its neighbour {neighbour}: {body}")
    with altered(lab, files) as image, lab.background("app", None, PYTHON, "-c", LISTENER, stdout=subprocess.PIPE, text=True) as listener:
        lab.daemon_stop()
        lab.daemon(image=image)
        wire = len(lab.around(lab.relays))
        with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            until(120, lambda: "drill over" in lab.daemon_log(), lambda: f"no report of the drill: {drilled(lab)}")
        report = drilled(lab)
        lab.disconnect()
        listener.kill()
        connected = listener.communicate()[0]
    expect(f"reached {relay} 9001" in report, f"anti-test: the drill does not reach a relay, so it says nothing: {report}")
    reached = [line for line in report if line.startswith("reached") and not line.startswith(f"reached {relay}")]
    expect(not reached, f"the guest reached {reached}")
    expect(len([line for line in report if line.startswith("nothing")]) == len(targets) - 1 + 5, f"not all was tried: {report}")
    expect(not connected, f"a server on the machine was reached from {connected}")
    seen = [line for line in lab.around(lab.relays)[wire:] if NEIGHBOUR in line or PUBLIC_NEIGHBOUR in line]
    expect(not seen, f"on the wire: {seen[:5]}")


def drilled(lab):
    return re.findall(r"drill ((?:reached|nothing|over)[^\"\n]*)", lab.daemon_log())


# Tor, until it is at 100 % and some seconds more.
MORTAL = """#!/usr/bin/busybox sh
B=/usr/bin/busybox
/usr/bin/tor-itself "$@" | while read -r line; do
  echo "$line"
  case $line in *"Bootstrapped 100%"*) ($B sleep 6; $B killall -KILL tor-itself) & ;; esac
done
"""


@test("Tor is killed in the guest: blocked at once with the cause", seconds=180)
def tor_killed(lab):
    tor = shutil.which("tor", path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin")
    files = {"usr/bin/busybox": (content(BUSYBOX), 0o755), "usr/bin/tor-itself": (content(tor), 0o755), "usr/bin/tor": (MORTAL.encode(), 0o755)}
    with altered(lab, files) as image:
        lab.daemon_stop()
        lab.daemon(image=image)
        lab.connect_tor()
        with lab.only_to():
            status = lab.await_state("blocked", seconds=30)
            text = f"{status['reason']}"
            expect("Tor" in text, f"the reason does not speak of Tor: {text}")
            lab.fetch(f"http://{WEB}/", timeout=3, check=False)
        lab.disconnect()
