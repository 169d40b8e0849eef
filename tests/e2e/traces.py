"""The traces of the model (traces.txt) with the real daemon on the real kernel: each step ends in the state that the model says, and packets
leave where it says so."""

import json
import os
import time

from lab import PYTHON, ROOT, TINY, WEB, equal, expect, test, until

UDP = f'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x" * 40, ("{WEB}", 9999))'


def connect(lab):
    lab.alice("proxyctl", "connect", "--proxy-url", TINY, check=False, timeout=30)


def crash(lab):
    lab.daemon_stop("KILL")
    lab.daemon("--again")


def stop(lab):
    lab.app("kill", lab.daemon_pid())
    until(10, lambda: not lab.daemon_pid(), "the daemon does not end")


def upstream_gone(lab):
    lab.service("stop", "tinyproxy")
    for _ in range(4):  # three failures in a row make the daemon ask the proxy itself
        lab.fetch("http://web.lab.test/", timeout=3, check=False)


EVENTS = {
    "connect": connect,
    "disconnect": lambda lab: lab.disconnect(),
    "reconnect": lambda lab: lab.proxyctl("reconnect"),
    "crash": crash,
    "stop": stop,
    "start": lambda lab: lab.daemon("--again"),
    "upstream-gone": upstream_gone,
    "upstream-back": lambda lab: lab.service("start", "tinyproxy", 8888),
    "device-gone": lambda lab: lab.app("ip", "link", "delete", "pvpn0"),
    "rules-gone": lambda lab: lab.app("bash", "-c", "for f in -4 -6; do while ip $f rule del protocol 112 2>/dev/null; do :; done; done"),
    "routes-gone": lambda lab: lab.app("bash", "-c", "for f in -4 -6; do ip $f route flush table 7376750; done"),
}


def state(lab):
    if not lab.daemon_pid():
        return "ended"
    done = lab.alice("proxyctl", "status", "--json", check=False)
    return json.loads(done.stdout)["state"] if done.returncode == 0 else None


def is_open(lab):
    """Whether packets leave by the uplink: TCP and UDP must agree."""
    seen = {}
    for kind in "udp", "tcp":
        before = len(lab.packets(f"src host 192.0.2.2 and dst host {WEB} and {kind}"))
        if kind == "udp":
            lab.app(PYTHON, "-c", UDP, check=False)
        else:
            lab.fetch(f"http://{WEB}/", timeout=3, check=False)
        time.sleep(0.1)
        seen[kind] = len(lab.packets(f"src host 192.0.2.2 and dst host {WEB} and {kind}")) > before
    expect(len(set(seen.values())) == 1, f"one leaves and the other does not: {seen}")
    return seen["udp"]


@test("the real daemon does what the model does", seconds=300)
def traces(lab):
    with open(os.path.join(ROOT, "tests/e2e/traces.txt"), encoding="utf-8") as file:
        lines = [line.split() for line in file if not line.startswith("#")]
    until(10, lambda: state(lab) == "disconnected", "not at rest")
    before = lab.state()
    for line in lines:
        for number, step in enumerate(line):
            name, _, expected = step.partition("=")
            wanted, way = expected.split(",")
            EVENTS[name](lab)
            where = f"{step}, number {number + 1} of '{' '.join(line)}'"
            until(30, lambda wanted=wanted: state(lab) == wanted, lambda where=where: f"{where}: the state is {state(lab)}")
            expect(is_open(lab) == (way == "open"), f"{where}: the network is not {way}")
        equal(before, lab.state(), f"after '{' '.join(line)}'")
