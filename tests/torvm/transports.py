"""Pluggable transports that contact others than the bridge: meek and snowflake, against servers of the lab (front.py, snowflake/main.go)."""

import contextlib
import hashlib
import os
import re
import subprocess
import tempfile

from faults import STREAM
from image import BUSYBOX, altered, content
from lab import APP4, DNS, PYTHON, Skipped, expect, test, until
from torlab import HOST, NEIGHBOUR, OWN, PROFILE, PUBLIC_NEIGHBOUR, native, profile

HERE = os.path.dirname(os.path.abspath(__file__))
FRONT, STUN, VOLUNTEER = "17.0.0.1", "18.0.0.1", "19.0.0.1"
NAMES = {"front.lab.test": FRONT, "stun.lab.test": STUN}
# what volunteers talk to
BROKER, SERVER = "19.0.0.2:8480", "19.0.0.2:8481"
# The volunteers have a machine of their own behind net's.
PLACES = f"""
for address in {FRONT} {STUN}; do ip addr replace $address/32 dev lo; done
if ! ip link show volunteer >/dev/null 2>&1; then
  ip netns add volunteer
  ip link add volunteer type veth peer name eth0 netns volunteer
  ip addr add 19.0.0.2/30 dev volunteer
  ip link set volunteer up
  ip -n volunteer addr add {VOLUNTEER}/30 dev eth0
  ip -n volunteer link set lo up
  ip -n volunteer link set eth0 up
  ip -n volunteer route add default via 19.0.0.2
  for device in wan0 volunteer; do sysctl -qw net.ipv4.conf.$device.forwarding=1; done
  echo 127.0.0.1 snowflake-broker.torproject.net >>/etc/hosts # asked for its kind of NAT by every volunteer; here there is no such server
  for name in {" ".join(f"{name}={address}" for name, address in NAMES.items())}; do echo "${{name#*=}} ${{name%=*}}"; done >>$LAB/hosts
  kill -HUP $(cat $LAB/services/dnsmasq.pid)
fi
"""
GOPATH = "/usr/share/gocode"
LIBRARY = f"{GOPATH}/src/git.torproject.org/pluggable-transports/snowflake.git"
CACHE = os.path.join(os.path.dirname(os.environ.get("PROXYVPN_TOR_CACHE", "/var/cache/proxyvpn-test/tornet")), "snowflake")


def listens(lab, address):
    until(10, lambda: f" {address} " in lab.net("ss", "-Htln").stdout, f"nothing listens on {address}")


def log_of(lab, name):
    return open(f"{lab.dir}/logs/{name}.log", "ab")


@contextlib.contextmanager
def front(lab):
    """The front with meek and snowflake's broker behind it, the STUN server, and the volunteers' place."""
    lab.net("sh", "-ec", PLACES)
    bridge, fingerprint = lab.tor["plain_bridge_line"].split()
    command = [PYTHON, "-B", f"{HERE}/front.py", f"{lab.dir}/web.pem", f"{lab.dir}/web.key", FRONT, STUN, BROKER, bridge, fingerprint]
    with log_of(lab, "front") as log, lab.background("net", None, *command, stdout=log, stderr=log):
        listens(lab, f"{FRONT}:443")
        yield


def server_program():
    """Snowflake's server, compiled when its source has changed."""
    for needed in "/usr/bin/go", "/usr/bin/snowflake-client", "/usr/bin/snowflake-proxy", LIBRARY:
        if not os.path.exists(needed):
            raise Skipped(f"{needed} is not installed (scripts/setup.sh)")
    with open(f"{HERE}/snowflake/main.go", "rb") as file:
        program = f"{CACHE}/server-{hashlib.sha256(file.read()).hexdigest()[:16]}"
    if not os.path.exists(program):
        os.makedirs(CACHE, exist_ok=True)
        for old in os.listdir(CACHE):
            if old.startswith("server-"):
                os.unlink(f"{CACHE}/{old}")
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            env = {"PATH": "/usr/bin:/bin", "GO111MODULE": "off", "GOPATH": GOPATH, "GOCACHE": work, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"}
            done = subprocess.run(["go", "build", "-o", f"{work}/server", "."], cwd=f"{HERE}/snowflake", env=env, capture_output=True, text=True)
            expect(done.returncode == 0, f"go build: {done.stderr}")
            os.rename(f"{work}/server", program)
    return program


def volunteer(lab, log):
    """A volunteer's snowflake-proxy."""
    options = ["-broker", f"http://{BROKER}/", "-relay", f"ws://{SERVER}/", "-stun", f"stun:{STUN}:3478", "-nat-retest-interval", "0s",
               "-allow-non-tls-relay", "-verbose", "-unsafe-logging"]
    return lab.background("net", None, "ip", "netns", "exec", "volunteer", "snowflake-proxy", *options, stdout=log, stderr=log)


@contextlib.contextmanager
def snowflake(lab):
    """The front, snowflake's server, and one volunteer."""
    program = server_program()
    with front(lab), log_of(lab, "snowflake") as log:
        with lab.background("net", None, program, SERVER, lab.tor["plain_bridge_line"].split()[0], stdout=log, stderr=log), volunteer(lab, log) as child:
            listens(lab, SERVER)
            yield child


def snowflake_line(lab):
    fingerprint = lab.tor["plain_bridge_line"].split()[1]
    return (f"snowflake 192.0.2.33:80 {fingerprint} fingerprint={fingerprint} url=https://broker.lab.test/ front=front.lab.test"
            " ice=stun:stun.lab.test:3478 utls-imitate=hellorandomizedalpn")


def meek_line(lab):
    fingerprint = lab.tor["plain_bridge_line"].split()[1]
    return f"meek_lite 192.0.2.33:80 {fingerprint} url=https://meek.lab.test/ front=front.lab.test"


LOOKUPS = f"src host {APP4} and dst host {DNS} and udp dst port 53"
WEBRTC = f"src host {APP4} and udp and ((dst host {STUN} and dst port 3478) or dst host {VOLUNTEER})"
FRONTED = f"src host {APP4} and tcp and dst host {FRONT} and dst port 443"
# WebRTC tries every address that its machine has; when the client has ended, the kernel says so to the volunteer.
NATIVE = f"(src host {APP4} or src host {OWN}) and ((dst host {STUN} and udp dst port 3478) or (dst host {VOLUNTEER} and (udp or icmp)))"


@contextlib.contextmanager
def wire(lab, *filters, names):
    """Meanwhile nothing leaves but what these filters match, and look-ups of these names."""
    def asked():
        with open(f"{lab.dir}/logs/dnsmasq.log", encoding="ascii") as file:
            return re.findall(rf" query\[\w+\] (\S+) from {APP4}$", file.read(), re.MULTILINE)

    before = len(asked())
    with lab.only_to(but=" or ".join(f"({each})" for each in (LOOKUPS, *filters))):
        yield
    others = set(asked()[before:]) - set(names)
    expect(not others, f"looked up: {others}")


@test("a native client with meek talks to the front only", seconds=90, daemon=None)
def native_meek(lab):
    torrc = ["UseBridges 1", f"Bridge {meek_line(lab)}", "ClientTransportPlugin meek_lite exec /usr/bin/obfs4proxy"]
    with front(lab), wire(lab, FRONTED, names=["front.lab.test"]), native(lab, *torrc) as socks:
        lab.fetch_by_exit("http://web.lab.test/", *socks)


@test("a native client with snowflake talks to the front, the STUN server and the volunteer only", seconds=120, daemon=None)
def native_snowflake(lab):
    torrc = ["UseBridges 1", f"Bridge {snowflake_line(lab)}", "ClientTransportPlugin snowflake exec /usr/bin/snowflake-client"]
    with snowflake(lab), wire(lab, FRONTED, NATIVE, names=NAMES), native(lab, *torrc) as socks:
        lab.fetch_by_exit("http://web.lab.test/", *socks)


@contextlib.contextmanager
def trusting(lab):
    """The daemon, with an image whose guest trusts the lab's certificates and no others."""
    files = {"etc/ssl/certs/ca-certificates.crt": (content(f"{lab.dir}/ca.pem"), 0o644)}
    with altered(lab, files, part="transports") as image:
        lab.daemon(image=image)
        yield


@test("Tor by meek: a page by its name, and the wire carries TCP to the front and the look-up of its name, nothing else", seconds=180, daemon=None)
def meek(lab):
    with front(lab), profile(lab, transport="meek", bridges=[meek_line(lab)]), wire(lab, FRONTED, names=["front.lab.test"]), trusting(lab):
        lab.connect_tor()
        lab.fetch_by_exit("http://web.lab.test/")
        lab.disconnect()


@test("anti-test: a guest that does not trust the front's certificate gives it no request, and gets nowhere", seconds=120, daemon=None)
def not_trusted(lab):
    def said():
        with open(f"{lab.dir}/logs/front.log", encoding="utf-8") as file:
            return file.read()[before:]

    with front(lab), profile(lab, transport="meek", bridges=[meek_line(lab)]), wire(lab, FRONTED, names=["front.lab.test"]):
        before = 0
        before = len(said())
        lab.daemon()
        with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            until(60, lambda: re.search("ALERT_(UNKNOWN_CA|BAD_CERTIFICATE)", said()), lambda: f"the certificate is not refused: {said()}")
            lab.check_state("connecting")
            lab.disconnect()
        expect("POST" not in said(), f"a request for all that: {said()}")


@test("Tor by snowflake: a page by its name; when the volunteer is killed another one takes over, and the machine stays closed meanwhile. The wire"
      " carries TCP to the front, UDP to the STUN server and the volunteer, the look-ups of their names, nothing else", seconds=240, daemon=None)
def snowflakes(lab):
    def page(seconds):
        return "hello from" in lab.fetch("http://web.lab.test/", timeout=seconds, check=False).stdout

    bridge = {"transport": "snowflake", "bridges": [snowflake_line(lab)]}
    with snowflake(lab) as first, profile(lab, **bridge), trusting(lab), wire(lab, FRONTED, WEBRTC, names=NAMES):
        lab.connect_tor()
        lab.fetch_by_exit("http://web.lab.test/")
        expect(lab.packets(f"{WEBRTC} and dst host {VOLUNTEER}"), "Tor got there without a volunteer")
        with lab.background("app", None, PYTHON, "-c", STREAM, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), log_of(lab, "snowflake") as log:
            first.kill()
            first.wait()
            expect(not page(3), "a page without any volunteer")
            with volunteer(lab, log):
                until(90, lambda: page(10), "no other volunteer takes over")
                lab.fetch_by_exit("http://web.lab.test/")
        lab.check_state("connected")
        lab.disconnect()


# Tor's place in the guest, whose firewall is gone: UDP to anybody.
SENDER = """#!/usr/bin/busybox sh
B=/usr/bin/busybox
for target in TARGETS; do $B timeout 2 $B tftp -g -l /dev/null -r x ${target%:*} ${target#*:} >/dev/null 2>&1 & done
wait
echo "Jan 01 00:00:00.000 [notice] drill over"
exec $B sleep 1000
"""
OPEN = "#!/usr/bin/busybox sh\nexec /usr/bin/busybox cat >/dev/null\n"
LISTENER = """
import socket
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("", 9999))
while True:
    print(one.recvfrom(2048)[1], flush=True)
"""


def udp_of_guest(lab, part, **keys):
    """What is on the wire of the UDP of a guest that turned against the machine, and whom the machine heard."""
    targets = [
        f"{STUN}:3478", f"{HOST}:9999", f"{APP4}:9999", f"{OWN}:9999", "10.10.11.1:9999", "127.0.0.1:9999",
        f"{NEIGHBOUR}:9999", f"{PUBLIC_NEIGHBOUR}:9999", f"{DNS}:53", "169.254.169.254:80", "224.0.0.251:5353", "255.255.255.255:9999",
    ]
    files = {"usr/bin/busybox": (content(BUSYBOX), 0o755), "usr/bin/nft": (OPEN.encode(), 0o755),
             "usr/bin/tor": (SENDER.replace("TARGETS", " ".join(targets)).encode(), 0o755)}
    with altered(lab, files, part=part) as image, profile(lab, **keys), \
            lab.background("app", None, PYTHON, "-c", LISTENER, stdout=subprocess.PIPE, text=True) as listener:
        until(5, lambda: ":9999 " in lab.app("ss", "-Huln").stdout, "the listener does not listen")
        lab.net(PYTHON, "-c", f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{APP4}', 9999))")
        offset = len(lab.daemon_log())
        lab.daemon(image=image)
        everything = f"src host {APP4} or src host {OWN} or net 10.10.0.0/16"
        before = len(lab.packets(f"udp and ({everything})"))
        with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            until(60, lambda: "drill over" in lab.daemon_log()[offset:], "no report of the drill")
            seen = lab.packets(f"udp and ({everything})")[before:]
            lab.disconnect()
        lab.daemon_stop()
        listener.kill()
        first, *heard = listener.communicate()[0].splitlines() or [""]
        expect("192.0.2.1" in first, f"anti-test: the listener does not hear the neighbour, but {first!r}")
        return seen, heard


@test("a guest that turned against the machine sends UDP into the Internet with snowflake only, and even then to nobody near", seconds=180, daemon=None)
def udp(lab):
    with front(lab):
        seen, heard = udp_of_guest(lab, "transports", transport="snowflake", bridges=[snowflake_line(lab)])
        to_stun = [line for line in seen if f"> {STUN}.3478" in line]
        others = [line for line in seen if line not in to_stun and not re.search(rf" > {DNS}\.53: .* (A|AAAA)\? (front|stun)\.lab\.test", line)]
        expect(to_stun, f"anti-test: with snowflake the guest's UDP is not on the wire either: {seen}")
        expect(not others and not heard, f"with snowflake on the wire: {others[:5]}; heard from {heard}")
        seen, heard = udp_of_guest(lab, "initramfs")
        expect(not seen and not heard, f"without snowflake on the wire: {seen[:5]}; heard from {heard}")
