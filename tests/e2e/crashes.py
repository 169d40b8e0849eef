"""The daemon is killed before every single step of Connect, of going on after a crash, and of Disconnect. Each time it gets to what was
wanted, or to what was before; and from the moment that the block is in force until somebody disconnects nothing leaves."""

import json
import os
import subprocess
import time

from lab import APP4, APP6, PYTHON, ROOT, SCRIPT, TINY, WEB, WEB6, equal, expect, test, until

# Every step, or only those that change the kernel or put a record in place.
FULL = os.environ.get("PROXYVPN_FULL") == "1"
CHANGES = {"rtnetlink", "nftables", "tun", "rename", "unlink", "descriptors"}
# A shorter transaction makes no firewall: it removes a table, or makes an empty one.
FIREWALL = 1000
# A packet that has passed the firewall may be captured a little later.
SKID = 0.03

# UDP and ICMP a hundred times a second, TCP ten times: IPv4 and IPv6, to the outside.
STREAM = f"""
import itertools, socket, struct, time
v4, v6 = socket.AF_INET, socket.AF_INET6
def tcp(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setblocking(False)
        s.connect_ex((address, 80))
def udp(family, address):
    with socket.socket(family, socket.SOCK_DGRAM) as s: s.sendto(b"x" * 40, (address, 9999))
def icmp(family, address):
    with socket.socket(v4, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s: s.sendto(struct.pack("!BBHHH", 8, 0, 0xf7ff, 0, 0), (address, 0))
for turn in itertools.count():
    for attempt, family, address in (udp, v4, "{WEB}"), (udp, v6, "{WEB6}"), (icmp, v4, "{WEB}"), (tcp, v4, "{WEB}"), (tcp, v6, "{WEB6}"):
        if attempt is not tcp or turn % 10 == 0:
            try: attempt(family, address)
            except OSError: pass
    time.sleep(0.01)
"""


class Steps:
    """The log of `steps`: what was done, and before what the daemon was killed."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.tracer, *lines = file.read().splitlines()
        self.lines = [line.split() for line in lines]
        self.killed = next((" ".join(line[1:-1]) for line in self.lines if line[-1] == "killed"), None)

    def closed(self):
        """Since when the block is in force."""
        made = (float(at) for at, _, kind, detail, result in self.lines if kind == "nftables" and int(detail) >= FIREWALL and result == "done")
        return next(made, None)

    def did(self, kind, name):
        return any(line[2] == kind and line[3].endswith(name) and line[-1] == "done" for line in self.lines)

    def numbers(self):
        return [int(line[1]) for line in self.lines if FULL or line[2] in CHANGES]


class Crashes:
    """A daemon that is killed before chosen steps."""

    def __init__(self, lab):
        self.lab = lab
        self.program, self.log = f"{lab.dir}/steps", f"{lab.dir}/steps.log"
        self.windows = []  # since when, until when, what was done
        subprocess.run(["cc", "-std=gnu11", "-O2", "-o", self.program, f"{ROOT}/tests/e2e/steps.c"], check=True)

    def at_rest(self):
        """The state, once it is one that stays."""
        done = self.lab.alice("proxyctl", "status", "--json", check=False)
        state = json.loads(done.stdout)["state"] if done.returncode == 0 else None
        return state if state in ("connected", "disconnected") else None

    def rest(self):
        return until(20, self.at_rest, lambda: f"not at rest: {self.lab.alice('proxyctl', 'status', check=False).stdout}")

    def asked(self, number, *command):
        """proxyctl, with the daemon killed before that step (0: before none)."""
        with self.lab.background("app", None, self.program, str(number), self.log, "-p", self.lab.daemon_pid()) as tracer:
            until(5, self.traced, "the daemon cannot be traced")
            done = self.lab.alice("proxyctl", *command, check=False, timeout=30)
            steps = Steps(self.log)
            if steps.killed:
                tracer.wait(5)
            else:
                expect(done.returncode == 0, lambda: f"proxyctl {' '.join(command)}: {done.stdout}")
                self.untrace(steps)
            return steps

    def again(self, number):
        """Starts the daemon after a crash, and kills it before that step (0: before none)."""
        command = [SCRIPT, "daemon", "--again", "--under", f"{self.program} {number} {self.log}"]
        done = subprocess.run(command, env=self.lab.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        expect(done.returncode == 0 or Steps(self.log).killed, lambda: f"the daemon does not start: {done.stderr}")
        until(20, lambda: Steps(self.log).killed or self.at_rest(), "neither at rest nor killed")
        return Steps(self.log)

    def traced(self):
        return os.path.exists(self.log) and os.path.getsize(self.log)

    def untrace(self, steps):
        """The daemon goes on alone."""
        self.lab.app("kill", steps.tracer, check=False)
        until(5, lambda: self.lab.app("kill", "-0", steps.tracer, check=False).returncode, "the tracer does not end")
        os.unlink(self.log)

    def leaks(self):
        """No packet went around the tunnel while none might."""
        lines = self.lab.script("wire", "-tt", f"(src host {APP4} or src host {APP6}) and (dst host {WEB} or dst host {WEB6})").splitlines()
        packets = [(float(line.split()[0]), line) for line in lines]
        for since, till, what in self.windows:
            expect(any(since - 2 < at < since for at, _ in packets), f"{what}: the sniffer saw nothing before the block: it could not fail")
            seen = [line for at, line in packets if since + SKID < at < till]
            expect(not seen, lambda what=what, seen=seen: f"{what}: {len(seen)} packets went around the tunnel:\n" + "\n".join(seen[:4]))


def once(crashes, before, connect=0, on=0, off=0):
    """Connect, going on and Disconnect, each killed before the step with that number (0: before none). Whether going on was."""
    lab = crashes.lab
    first = crashes.asked(connect, "connect", "--proxy-url", TINY)
    since, wanted = first.closed(), first.did("rename", "/intent.json")
    if not first.killed:
        lab.daemon_stop("KILL")
    second = crashes.again(on)
    since = since or second.closed()
    what = f"Connect killed before step {first.killed}, going on before {second.killed}"
    if second.killed:
        second = crashes.again(0)
        since = since or second.closed()
    state = crashes.rest()
    expect((state == "connected") == wanted, f"{what}: the daemon is {state}, and a connection was {'' if wanted else 'not '}wanted")
    crashes.untrace(second)
    if wanted:
        lab.fetch_through("http://web.lab.test/")
        till = time.time()
        third = crashes.asked(off, "disconnect")
        what += f", Disconnect before {third.killed}"
        if third.killed:
            last = crashes.again(0)
            state = crashes.rest()
            crashes.untrace(last)
            if state == "connected":
                expect(not third.did("unlink", "/intent.json"), f"{what}: the daemon connects again")
                till = time.time()
                lab.disconnect()
        crashes.windows.append((since, till, what))
    equal(before, lab.state(), f"{what}: the network is not what it was")
    return on and "going on before None" not in what


@test("kill -9 before every step of Connect, of going on after that, of Disconnect", seconds=3000 if FULL else 600)
def every_step(lab):
    crashes = Crashes(lab)
    crashes.rest()
    before = lab.state()
    with lab.background("app", None, PYTHON, "-c", STREAM):
        # which steps there are, going on with a network that is as before
        connect = crashes.asked(0, "connect", "--proxy-url", TINY)
        off = crashes.asked(0, "disconnect")
        equal(before, lab.state(), "without a crash")
        wanted = next(int(line[1]) + 1 for line in connect.lines if line[2] == "rename")
        crashes.asked(wanted, "connect", "--proxy-url", TINY)
        on = crashes.again(0)
        crashes.untrace(on)
        crashes.asked(0, "disconnect")
        connect, on, off = (steps.numbers() for steps in (connect, on, off))
        for numbers in connect, on, off:
            expect(len(numbers) > 5, f"too few steps: {numbers}")
        print(f"         {len(connect)}, {len(on)}, {len(off)} steps of Connect, of going on, of Disconnect", flush=True)
        # The later Connect is killed, the less is left to do for going on: so its steps come from the last to the first.
        missed = []
        for number in connect:
            late = on.pop() if on and number > wanted else 0
            if not once(crashes, before, number, late, off.pop(0) if off else 0):
                missed += [late] if late else []
        for number in missed + on:
            expect(once(crashes, before, wanted, number, off.pop(0) if off else 0), f"going on has no step {number}")
        for number in off:
            once(crashes, before, off=number)
    crashes.leaks()
