"""Containers behind the machine: with forward = "tunnel" their TCP goes through the proxy, and nothing else leaves."""

import contextlib
import time

from bad_input import profile
from lab import PYTHON, TINY, WEB, expect, settings, test

MIB = 1 << 20
PROFILE = f"""backend = "proxy"
[upstream]
url = "{TINY}"
[protect]
forward = "%s"
"""
# as docker does it
MASQUERADE = """table inet docker { chain post { type nat hook postrouting priority 100
  ip saddr 10.88.0.0/24 masquerade
  ip6 saddr fd88::/64 masquerade
}
}"""
UDP = f"""import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2); s.connect(("{WEB}", 9999)); start = time.monotonic()
s.send(b"x")
try: s.recv(9)
except OSError as error: print(type(error).__name__, "soon" if time.monotonic() - start < 0.5 else "late")"""
UPLOAD = """import hashlib, http.client, os
body = os.urandom(%d)
for host in "web.lab.test", "web6.lab.test":
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("PUT", "/", body)
    print(hashlib.sha256(body).hexdigest() in connection.getresponse().read().decode())"""


def inside(lab, *args, **options):
    return lab.app("nsenter", "--net=/run/netns/box", *args, **options)


@contextlib.contextmanager
def container(lab):
    """A network namespace behind a bridge, with the usual MTU."""
    with settings(lab, ip_forward=1):
        v6 = lab.app("sysctl", "-n", "net.ipv6.conf.all.forwarding").stdout.strip()
        lab.app("bash", "-ec", f"""
            sysctl -qw net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0
            ip netns add box; ip link add inner0 type bridge; ip link add port0 type veth peer name eth0 netns box
            ip link set port0 master inner0; ip link set port0 up; ip link set inner0 up
            ip addr add 10.88.0.1/24 dev inner0; ip addr add fd88::1/64 dev inner0 nodad
            nsenter --net=/run/netns/box sh -ec 'ip link set lo up; ip addr add 10.88.0.2/24 dev eth0; ip addr add fd88::2/64 dev eth0 nodad
              ip link set eth0 up; ip route add default via 10.88.0.1; ip -6 route add default via fd88::1'
            nft -f - <<<'{MASQUERADE}'""")
        try:
            yield
        finally:
            lab.app("bash", "-c", f"""
                nft delete table inet docker; ip netns del box; ip link del inner0; ip link del port0 2>/dev/null
                sysctl -qw net.ipv6.conf.all.forwarding={v6} net.ipv6.conf.default.accept_dad=1""")


def leaked(lab):
    return lab.packets("src net 10.88.0.0/24 or src net fd88::/64") + lab.direct()


def transfers(lab):
    length = 32 * MIB
    direct = lab.net("bash", "-c", f"curl -sS http://{WEB}/bytes/{length} | sha256sum").stdout
    for host, source in ("web.lab.test", WEB), ("web6.lab.test", "2001:db8:"):
        body = inside(lab, "curl", "-sS", "--max-time", "20", f"http://{host}/", timeout=25).stdout
        expect("hello from" in body and source in body, f"{host}: not through the proxy: {body}")
        got = inside(lab, "bash", "-c", f"curl -sS --max-time 60 http://{host}/bytes/{length} | sha256sum", timeout=65).stdout
        expect(got == direct, f"{host}: a download arrived otherwise: {got}")
    sent = inside(lab, PYTHON, "-c", UPLOAD % length, timeout=125).stdout
    expect(sent.split() == ["True", "True"], f"an upload arrived otherwise: {sent}")


@test("a container's TCP goes through the proxy, both ways in bulk, whatever the reverse-path filter; the rest is refused", seconds=240)
def tunnelled(lab):
    with container(lab), profile(lab, "boxes", PROFILE % "tunnel"):
        save = lab.app("bash", "-c", "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo $f $(cat $f); done").stdout
        try:
            for strict in 0, 1, 2:
                lab.app("bash", "-c", f"for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo {strict} >$f; done")
                lab.proxyctl("connect", "boxes")
                before = leaked(lab)
                transfers(lab)
                told = inside(lab, PYTHON, "-c", UDP).stdout.split()
                expect(told == ["ConnectionRefusedError", "soon"], f"rp_filter {strict}: UDP is not refused at once: {told}")
                inside(lab, "ping", "-c1", "-W1", WEB, check=False)
                time.sleep(0.2)
                seen = leaked(lab)[len(before):]
                expect(not seen, lambda: f"rp_filter {strict}: around the tunnel:\n" + "\n".join(seen[:8]))
                lab.disconnect()
        finally:
            lab.app("bash", "-c", f"while read -r f v; do [ ! -e $f ] || echo $v >$f; done <<'END'\n{save}END")


@test("forward = \"block\": a container reaches nothing; without a connection the sniffer sees it", seconds=120)
def blocked(lab):
    with container(lab), profile(lab, "boxes", PROFILE % "block"):
        before = len(leaked(lab))
        inside(lab, PYTHON, "-c", UDP)
        expect(len(leaked(lab)) > before, "the sniffer does not see what a container sends")
        plan = lab.proxyctl("plan", "boxes")
        expect("egress_eth0" in plan and "egress_port0" not in plan and "egress_inner0" not in plan, f"not for the uplink alone: {plan}")
        lab.proxyctl("connect", "boxes")
        before = leaked(lab)
        done = inside(lab, "curl", "-sS", "--max-time", "2", f"http://{WEB}/", check=False)
        expect(done.returncode != 0, f"a container was let through: {done.stdout}")
        inside(lab, PYTHON, "-c", UDP)
        time.sleep(0.2)
        seen = leaked(lab)[len(before):]
        expect(not seen, lambda: "around the tunnel:\n" + "\n".join(seen[:8]))
        lab.disconnect()
