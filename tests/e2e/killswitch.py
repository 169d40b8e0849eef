"""While a connection is wanted nothing goes around it. Each promise has its anti-test: without protection the sniffer sees packets."""

import subprocess
import time

from lab import PYTHON, SQUID, TINY, WEB, WEB6, expect, test, until

# What programs try: TCP and UDP by name and address, IPv4 and IPv6, a foreign resolver, and as root: a bound device, ping, a raw packet.
ATTEMPTS = f"""
import socket, struct
def tcp(family, address, device=None):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(1)
        if device: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        s.connect((address, 80))
def udp(family, address, port, device=None):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        if device: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        s.sendto(b"x" * 40, (address, port))
def icmp():
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s:
        s.sendto(struct.pack("!BBHHH", 8, 0, 0xf7ff, 0, 0), ("{WEB}", 0))
v4, v6 = socket.AF_INET, socket.AF_INET6
for attempt in [
    lambda: tcp(v4, "{WEB}"), lambda: tcp(v6, "{WEB6}"), lambda: udp(v4, "{WEB}", 9999), lambda: udp(v6, "{WEB6}", 9999),
    lambda: udp(v4, "{WEB}", 443), lambda: udp(v4, "{WEB}", 53), lambda: tcp(v4, "{WEB}", b"eth0"), lambda: udp(v4, "{WEB}", 9999, b"eth0"), icmp,
]:
    try: attempt()
    except OSError: pass
"""


def attempts(lab):
    lab.app(PYTHON, "-c", ATTEMPTS, timeout=40)
    time.sleep(0.2)


def to_web(lab):
    """Packets of the machine that are meant for the web servers themselves, DNS included."""
    return lab.packets(f"(src host 192.0.2.2 or src host 2001:db8:1::2) and (dst host {WEB} or dst host {WEB6})")


def nothing_new(lab, before, when):
    seen = to_web(lab)
    expect(len(seen) == len(before), lambda: f"{when}, packets went around the tunnel:\n" + "\n".join(seen[len(before) : len(before) + 8]))


@test("anti-test: without a connection the sniffer sees TCP, UDP and ICMP, IPv4 and IPv6", daemon=None)
def detector(lab):
    attempts(lab)
    seen = "\n".join(to_web(lab))
    for what in f"{WEB}.80: Flags [S]", f"{WEB6}.80: Flags [S]", f"{WEB}.9999: UDP", f"{WEB6}.9999: UDP", f"{WEB}.53", "ICMP echo request":
        expect(what in seen, f"the sniffer does not see '{what}':\n{seen}")


@test("connected, and with the proxy stopped: no packet around the tunnel", seconds=120)
def proxy_stopped(lab):
    lab.connect()
    before = to_web(lab)
    attempts(lab)
    nothing_new(lab, before, "connected")
    lab.service("stop", "squid")
    try:
        attempts(lab)
        nothing_new(lab, before, "with the proxy stopped")
    finally:
        lab.service("start", "squid", 3128)


@test("anti-test: with --no-killswitch UDP does go around the tunnel", seconds=90)
def no_killswitch(lab):
    lab.connect(SQUID, "--no-killswitch")
    before = to_web(lab)
    attempts(lab)
    seen = "\n".join(to_web(lab)[len(before) :])
    expect(f"{WEB}.9999: UDP" in seen, f"the sniffer does not see UDP:\n{seen}")
    # TCP is steered all the same
    lab.fetch_through("http://web.lab.test/")


@test("kill -9 of the daemon: no packet around the tunnel before, while and after it is started again", seconds=120)
def killed(lab):
    lab.connect()
    before = to_web(lab)
    with lab.background("app", None, PYTHON, "-c", f"import time\nwhile True:\n exec({ATTEMPTS!r})\n time.sleep(0.01)",
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        time.sleep(1)
        lab.daemon_stop("KILL")
        time.sleep(2)
        nothing_new(lab, before, "after kill -9")
        lab.daemon("--again")
        time.sleep(2)
        nothing_new(lab, before, "after kill -9 and a new start")
    state = lab.status()["state"]
    expect(state in ("blocked", "connecting", "connected"), f"the new daemon forgot what was wanted: {state}")
    lab.disconnect()
    before = to_web(lab)
    attempts(lab)
    expect(len(to_web(lab)) > len(before), "after disconnect nothing goes out (the detector must fire)")


@test("who connects while there is no daemon waits for the next one, on the same device", seconds=60)
def waited(lab):
    def device():
        return lab.app("sh", "-c", "ip -o link show pvpn0 2>/dev/null | cut -d: -f1").stdout

    lab.connect(TINY)
    before = device()
    lab.daemon_stop("KILL")
    with lab.background("app", "alice", "curl", "-sS", "--max-time", "20", f"http://{WEB}/", stdout=subprocess.PIPE, text=True) as curl:
        time.sleep(0.5)
        expect(curl.poll() is None, "it was refused")
        with lab.nothing_direct():
            lab.daemon("--again")
            body = curl.communicate(timeout=25)[0]
    expect("hello from" in body, f"it did not get through: {body!r}")
    expect(before and device() == before, f"another device: {before!r}, then {device()!r}")
    lab.disconnect()
    expect(not device(), "the device is left")


@test("a connection opened before Connect does not go on in clear", seconds=90)
def opened_before(lab):
    transfer = lab.popen("app", "alice", "curl", "-sS", "--max-time", "30", "-o", "part", "http://web.lab.test/slow/400000",
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(10, lambda: lab.alice("stat", "-c%s", "part", check=False).stdout.strip() not in ("", "0"), "the transfer did not begin")
        lab.connect()
        before = to_web(lab)
        time.sleep(3)
        nothing_new(lab, before, "3 s after Connect")
    finally:
        transfer.kill()
        transfer.wait()


@test("the firewall flushed by somebody else: TCP still does not go around the tunnel", seconds=60)
def steered_without_firewall(lab):
    lab.connect()
    before = [line for line in to_web(lab) if "Flags [S]" in line]
    lab.app("nft", "flush", "ruleset")
    lab.fetch_through("http://web.lab.test/")
    lab.app("ip", "link", "delete", lab.status()["device"])
    done = lab.fetch("http://web.lab.test/", timeout=5, check=False)
    after = [line for line in to_web(lab) if "Flags [S]" in line]
    expect(len(after) == len(before), lambda: f"a SYN went out directly (curl ended with {done.returncode}):\n" + "\n".join(after[-3:]))
