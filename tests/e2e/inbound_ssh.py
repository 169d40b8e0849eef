"""Who is on the machine by SSH stays on it, whatever happens to the connection; a new session can be opened meanwhile."""

import contextlib
import subprocess
import time

from lab import APP4, APP6, FAILURE, PROXY, PYTHON, TINY, expect, faulty, settings, ssh_session, test, until

# A second uplink of the machine under test.
SECOND, SECOND_GW = "198.18.7.2", "198.18.7.1"


@contextlib.contextmanager
def session(lab, address, *options):
    child, say = ssh_session(lab, "net", None, "-i", f"{lab.dir}/ssh_user", "-o", "HostKeyAlias=192.0.2.2", *options, f"root@{address}")
    try:
        yield say
    finally:
        child.kill()
        child.wait()


def both_ways(lab, *sessions, address=APP4):
    """Every session answers, and a new one can be opened."""
    for say in sessions:
        say(time.monotonic_ns() % 100_000)
    with session(lab, address) as say:
        say(7)


@test("sessions into the machine, IPv4 and IPv6, survive connect, kill -9, a dead proxy, reconnect and disconnect", seconds=180)
def survives(lab):
    with session(lab, APP4) as v4, session(lab, f"{APP6}") as v6:
        v4(1), v6(1)
        with faulty(lab, "tunnel", 9020) as url:
            lab.connect(url)
            both_ways(lab, v4, v6)
            # what the session's user does goes through the tunnel like everything else
            lab.fetch_through("http://web.lab.test/")
            lab.daemon_stop("KILL")
            lab.daemon("--again")
            until(20, lambda: lab.status()["state"] == "connected", "not connected again")
            both_ways(lab, v4, v6, address=APP6)

        # the proxy is gone
        def blocked():
            lab.fetch("http://web.lab.test/", timeout=3, check=False)
            return lab.status()["state"] == "blocked"

        until(30, blocked, "the proxy is gone, and the state is not blocked")
        both_ways(lab, v4, v6)
        # nothing answers, and the daemon that goes on has no tunnel either
        with lab.nothing_direct(" and not src port 22"):
            lab.daemon_stop("KILL")
            lab.daemon("--again")
            until(20, lambda: lab.status()["state"] == "blocked", "the new daemon does not block")
            expect("pvpn0" in lab.app("ip", "route", "show", "table", "7376750").stdout, "no device holds what is blocked")
            done = lab.fetch("http://web.lab.test/", timeout=3, check=False)
            expect(done.returncode == 7, f"what is blocked is not refused at once: {done.stdout}")
            both_ways(lab, v4, v6)
            both_ways(lab, v4, v6, address=APP6)
        with faulty(lab, "tunnel", 9020):
            lab.proxyctl("reconnect")
            until(20, lambda: lab.status()["state"] == "connected", "not connected again")
            both_ways(lab, v4, v6, address=APP6)
            lab.disconnect()
        both_ways(lab, v4, v6)


@contextlib.contextmanager
def second_uplink(lab):
    subprocess.run(["ip", "link", "add", "wan1", "netns", lab.pids["net"], "type", "veth", "peer", "name", "eth1", "netns", lab.pids["app"]], check=True)
    try:
        lab.net("sh", "-c", f"ip addr add {SECOND_GW}/24 dev wan1; ip link set wan1 up")
        lab.app("sh", "-c", f"ip addr add {SECOND}/24 dev eth1; ip link set eth1 up")
        yield
    finally:
        lab.app("ip", "link", "del", "eth1")


@test("a session over a second uplink is answered there, with reverse-path filtering off, strict and loose", seconds=180)
def two_uplinks(lab):
    with second_uplink(lab):
        # a client on the link, and one behind it that the main table sends there
        lab.net("ip", "addr", "add", "198.18.8.1/32", "dev", "wan1")
        lab.app("ip", "route", "add", "198.18.8.1/32", "via", SECOND_GW)
        for value in 0, 1, 2:
            with settings(lab, **{f"conf.{name}.rp_filter": value for name in ("all", "eth0", "eth1")}):
                with session(lab, SECOND, "-b", SECOND_GW) as near, session(lab, SECOND, "-b", "198.18.8.1") as far:
                    near(1), far(1)
                    lab.connect(TINY)
                    near(2), far(2)
                    lab.fetch_through("http://web.lab.test/")
                    with session(lab, SECOND, "-b", "198.18.8.1") as new, session(lab, APP4) as first:
                        new(3), first(3)
                    lab.disconnect()
                    near(4), far(4)
            astray = lab.packets(f"src host {SECOND}")
            expect(not astray, lambda: f"rp_filter {value}: answers left by the first uplink:\n" + "\n".join(astray[:3]))
        lab.net("ip", "addr", "del", "198.18.8.1/32", "dev", "wan1")


@test("a session over a second uplink with routing rules by source address goes on with a rule in front of ours", seconds=60)
def source_rules(lab):
    rules = f"priority 32000 from {SECOND} lookup 77", f"priority 3600 from {SECOND} fwmark 0x7076706e lookup 77"
    with second_uplink(lab):
        lab.net("ip", "addr", "add", "198.18.8.1/32", "dev", "wan1")
        try:
            for rule in rules:
                lab.app("ip", "rule", "add", *rule.split())
            lab.app("ip", "route", "add", "default", "via", SECOND_GW, "table", "77")
            with session(lab, SECOND, "-b", "198.18.8.1") as say:
                say(1)
                lab.connect(TINY)
                say(2)
                lab.disconnect()
                say(3)
            # the sniffer is on the first uplink, where the far end would take them too
            astray = lab.packets(f"src host {SECOND}")
            expect(not astray, lambda: "answers left by the first uplink:\n" + "\n".join(astray[:3]))
        finally:
            for rule in rules:
                lab.app("ip", "rule", "del", *rule.split(), check=False)


UDP_ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(("::", 9998))
print("ready", flush=True)
while True:
    data, to = s.recvfrom(100)
    try: s.sendto(data, to)
    except OSError as error: print(type(error).__name__, flush=True)
"""
UDP_ASK = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.7)
s.connect((sys.argv[1], 9998))
s.send(b"?")
try: print("answered" if s.recv(9) == b"?" else "odd")
except OSError as error: print(type(error).__name__)
"""


@test("a UDP service is not answered while connected; its program is refused at once, and nothing leaves", seconds=60)
def udp_service(lab):
    def ask(address):
        return lab.net(PYTHON, "-c", UDP_ASK, address).stdout.strip()

    with lab.background("app", "alice", PYTHON, "-c", UDP_ECHO, stdout=subprocess.PIPE, text=True) as server:
        expect(server.stdout.readline() == "ready\n", "the service does not start")
        expect([ask(APP4), ask(APP6)] == ["answered", "answered"], "not answered before Connect")
        lab.connect(TINY)
        with lab.nothing_direct():
            expect([ask(APP4), ask(APP6)] == ["TimeoutError", "TimeoutError"], "answered while connected")
        expect([server.stdout.readline().strip() for _ in range(2)] == ["PermissionError", "PermissionError"], "the service was not refused")
        lab.disconnect()
        expect([ask(APP4), ask(APP6)] == ["answered", "answered"], "not answered after Disconnect")


@contextlib.contextmanager
def closed_profile(lab):
    lab.app("bash", "-c", f"""cat >/etc/proxyvpn/profiles.d/closed.toml <<'END'
backend = "proxy"
[upstream]
url = "{TINY}"
[protect]
inbound-replies = false
END""")
    try:
        until(5, lambda: "closed" in lab.proxyctl("profile", "list"), "the profile is not listed")
        yield "closed"
    finally:
        lab.app("rm", "/etc/proxyvpn/profiles.d/closed.toml")


@test("without inbound replies sessions are cut at once, after a warning", seconds=90)
def without_replies(lab):
    def sessions():
        return lab.app("ss", "-Htn", "state", "established", "sport", "=", ":22").stdout

    with closed_profile(lab) as closed, session(lab, APP4) as say:
        say(1)
        over_ssh = {"SSH_CONNECTION": f"{PROXY} 50000 {APP4} 22"}
        text = lab.proxyctl("connect", closed, env=over_ssh, code=FAILURE)
        expect("came over SSH" in text and "--accept-risk=lose-ssh" in text, text)
        say(2)
        expect(sessions(), "no session is seen")
        with lab.nothing_direct():
            lab.proxyctl("connect", closed, "--accept-risk=lose-ssh", env=over_ssh)
            until(1, lambda: not sessions(), "the session's end here is still there")
            done = lab.net("nc", "-z", "-w", "2", APP4, "22", check=False)
            expect(done.returncode != 0, "a connection from outside was answered though inbound-replies is off")
        lab.disconnect()
    with session(lab, APP4) as say:
        say(3)
