"""A daemon that is killed before chosen steps (steps.c), and what it had done by then."""

import contextlib
import json
import os
import subprocess

from lab import APP4, APP6, ROOT, SCRIPT, WEB, WEB6, expect, until

# Longer tests: every step and more rounds.
FULL = os.environ.get("PROXYVPN_FULL") == "1"
# Otherwise only the steps that change the kernel or put a record in place.
CHANGES = {"rtnetlink", "nftables", "tun", "rename", "unlink", "descriptors"}
# A shorter transaction makes no firewall: it removes a table, or makes an empty one.
FIREWALL = 1000
# A packet that has passed the firewall may be captured a little later.
SKID = 0.03


def at_rest(lab):
    """The daemon's state, if it is one that stays."""
    done = lab.alice("proxyctl", "status", "--json", check=False)
    state = json.loads(done.stdout)["state"] if done.returncode == 0 else None
    return state if state in ("connected", "disconnected") else None


def rest(lab):
    return until(20, lambda: at_rest(lab), lambda: f"not at rest: {lab.alice('proxyctl', 'status', check=False).stdout}")


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

    def asked(self, number, *command):
        """proxyctl, with the daemon killed before that step (0: before none)."""
        self.forget()
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
        self.forget()
        command = [SCRIPT, "daemon", "--again", "--under", f"{self.program} {number} {self.log}"]
        done = subprocess.run(command, env=self.lab.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        expect(done.returncode == 0 or Steps(self.log).killed, lambda: f"the daemon does not start: {done.stderr}")
        until(20, lambda: Steps(self.log).killed or at_rest(self.lab), "neither at rest nor killed")
        return Steps(self.log)

    def forget(self):
        """The log of a daemon that was killed: its presence means that there is a tracer."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.log)

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
