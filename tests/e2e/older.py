"""Connections that cannot go on are ended at once, at Connect and at Disconnect: programs are told and connect again."""

import contextlib
import json
import subprocess
import time

from lab import PYTHON, SSH, TINY, WEB, WEB6, expect, test, until

# Opens a connection and waits for an answer that never comes; then tells when it was told, and how long it took to connect again.
# Lines of JSON; times are CLOCK_MONOTONIC, which is the same everywhere on this machine.
WAITER = """
import json, socket, sys, time
kind, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
def connect():
    s = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    s.settimeout(25)
    s.connect((host, port))
    return s
def say(**what): print(json.dumps({**what, "at": time.monotonic()}), flush=True)
s = connect()
say(local=s.getsockname()[0])
try:
    say(told="data" if s.recv(1) else "end")
except OSError as error:
    say(told=type(error).__name__)
for attempt in range(400):
    try:
        s = connect()
        say(again=attempt)
        break
    except OSError:
        time.sleep(0.005)
"""
# Seconds. Who is not told waits for 25 s, and a SYN that is lost is sent again after one.
TOLD, AGAIN = 5, 0.9
SLOW = "http://web.lab.test/slow/4000000"


class Waiter:
    def __init__(self, lab, kind, host, port):
        self.name = f"{kind} {host}"
        self.child = lab.popen("app", "alice", PYTHON, "-c", WAITER, kind, host, str(port), stdout=subprocess.PIPE, text=True)
        self.local = json.loads(self.child.stdout.readline())["local"]

    def told(self):
        return json.loads(self.child.stdout.readline())

    def again(self):
        return json.loads(self.child.stdout.readline() or "{}")


@contextlib.contextmanager
def waiting(lab, *wanted):
    waiters = []
    try:
        waiters += [Waiter(lab, *each) for each in wanted]
        yield waiters
    finally:
        for waiter in waiters:
            waiter.child.kill()
            waiter.child.wait()


def all_told(waiters, since, within, since_what):
    for waiter in waiters:
        said = waiter.told()
        took = said["at"] - since
        print(f"  {waiter.name}: {said['told']} {took * 1000:.0f} ms after {since_what}")
        expect(said["told"] == "ConnectionAbortedError" and took < within, f"{waiter.name}: {said['told']} {took:.3f} s after {since_what}")


IDLE = [("tcp", WEB, 7), ("tcp", WEB6, 7), ("udp", WEB, 9999), ("udp", WEB6, 9999)]


@test("programs that wait on a connection from before Connect are told at once, and nothing of it is seen outside", seconds=90)
def told_at_connect(lab):
    download = lab.popen("app", "alice", "curl", "-sS", "--max-time", "60", "-o", "part", SLOW, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ssh = lab.popen("app", "alice", "ssh", "-N", "-o", f"UserKnownHostsFile={lab.dir}/known_hosts", "-i", f"{lab.dir}/home/alice/key",
                    f"root@{SSH}", stderr=subprocess.PIPE, text=True)
    try:
        until(10, lambda: lab.alice("stat", "-c%s", "part", check=False).stdout.strip() not in ("", "0"), "the download did not begin")
        until(10, lambda: f"{SSH}:22" in lab.app("ss", "-Htn", "state", "established").stdout, "ssh is not connected")
        time.sleep(0.5)
        with waiting(lab, *IDLE) as waiters:
            start = time.monotonic()
            lab.connect(TINY)
            connected = time.monotonic()
            with lab.nothing_direct():
                all_told(waiters, start, connected - start + TOLD, "Connect was asked for")
                for name, child in ("curl", download), ("ssh", ssh):
                    child.wait(timeout=5)
                    print(f"  {name}: ended within {(time.monotonic() - start) * 1000:.0f} ms, exit code {child.returncode}: {child.stderr.read().strip()}")
                    expect(child.returncode != 0, f"{name} ended well")
                expect(time.monotonic() - connected < TOLD, "a program was told late")
                for waiter in waiters[:2]:
                    expect(waiter.again().get("again") == 0, f"{waiter.name} could not connect again at once")
                time.sleep(1)
            left = lab.app("ss", "-Htn", "src", "192.0.2.2", "dst", WEB).stdout
            expect(not left, f"a connection from before is left: {left}")
    finally:
        for child in download, ssh:
            child.kill()
            child.wait()


@test("anti-test: a connection that is ended while nothing protects it is seen outside", daemon=None)
def detector(lab):
    with waiting(lab, ("tcp", WEB, 7), ("tcp", WEB6, 7)) as waiters:
        before = len(lab.direct())
        since = time.monotonic()
        lab.app("ss", "-K", "dport", "=", ":7")
        all_told(waiters, since, TOLD, "ss -K")
        time.sleep(0.2)
        seen = "\n".join(lab.direct()[before:])
        expect(f"{WEB}.7: Flags [R" in seen and f"{WEB6}.7: Flags [R" in seen, f"the sniffer does not see the resets:\n{seen}")


@test("without the kill switch TCP from before is ended, UDP goes on", seconds=60)
def no_killswitch(lab):
    with waiting(lab, ("tcp", WEB, 7), ("udp", WEB, 9999)) as (tcp, udp):
        start = time.monotonic()
        lab.connect(TINY, "--no-killswitch")
        all_told([tcp], start, time.monotonic() - start + TOLD, "Connect was asked for")
        expect(udp.child.poll() is None and f"{WEB}:9999" in lab.app("ss", "-Hun").stdout, "the UDP socket is gone")


def tunnel_sources(lab):
    return lab.packets("src net 10.255.255.0/30 or src net fd70:7670:6e::/64")


@test("programs that wait on a connection through the tunnel are told at Disconnect, and connect again directly at once", seconds=90)
def told_at_disconnect(lab):
    for arguments in [], ["--no-killswitch"]:
        lab.connect(TINY, *arguments)
        with waiting(lab, ("tcp", WEB, 7), ("tcp", WEB6, 7)) as waiters:
            expect([waiter.local for waiter in waiters] == ["10.255.255.1", "fd70:7670:6e::1"], "not through the tunnel")
            start = time.monotonic()
            lab.disconnect()
            within = time.monotonic() - start + TOLD
            for waiter in waiters:
                told = waiter.told()
                expect(told["told"].startswith("Connection") and told["at"] - start < within, f"{waiter.name}: {told}")
                again = waiter.again()
                gap = again["at"] - told["at"]
                print(f"  {waiter.name}: {told['told']} after {(told['at'] - start) * 1000:.0f} ms, connected again {gap * 1000:.0f} ms later")
                expect(gap < AGAIN, f"{waiter.name} connected again only {gap:.3f} s later")
        time.sleep(0.5)
        expect(not tunnel_sources(lab), lambda: "packets with the tunnel's address left:\n" + "\n".join(tunnel_sources(lab)[:5]))


@test("kill -9 and reconnect: programs that wait on a connection of the old engine are told", seconds=120)
def told_when_going_on(lab):
    lab.connect(TINY)

    def reconnect():
        lab.proxyctl("reconnect")

    def kill():
        lab.daemon_stop("KILL")
        lab.daemon("--again")

    for what, action in ("reconnect", reconnect), ("kill -9 and a new start", kill):
        with waiting(lab, ("tcp", WEB, 7), ("tcp", WEB6, 7)) as waiters, lab.nothing_direct():
            start = time.monotonic()
            action()
            for waiter in waiters:
                told = waiter.told()
                print(f"  {waiter.name}: {told['told']} {(told['at'] - start) * 1000:.0f} ms after {what}")
                expect(told["told"].startswith("Connection") and told["at"] - start < 10, f"{what}: {waiter.name}: {told}")
        until(20, lambda: lab.status()["state"] == "connected", "not connected again")
    expect(not tunnel_sources(lab), lambda: "packets with the tunnel's address left:\n" + "\n".join(tunnel_sources(lab)[:5]))
