"""One repetition with one program: everything that the table shows, as a flat dictionary of figures."""

import json
import os
import subprocess
import time
from dataclasses import dataclass

from tools import Broken, alive


@dataclass(frozen=True)
class Plan:
    """How long things take, in seconds."""

    repetitions: int
    bulk: float
    warm_up: float
    short: float
    ping: float
    rest: float
    many: int = 10_000
    crowd: int = 0  # idle connections of the one large test; 0: none
    rare: int = 0  # repetitions with the slow tests; the others have only bulk and short connections


QUICK = Plan(repetitions=3, bulk=1, warm_up=0.3, short=1, ping=0.5, rest=3, rare=1)
FULL = Plan(repetitions=5, bulk=2, warm_up=0.5, short=2, ping=1, rest=4, rare=5, crowd=50_000)


def cpu(pids):
    """CPU seconds of processes, those of threads that have ended included."""
    total = 0.0
    for pid in pids:
        # the process's CPU clock (clock_getcpuclockid(3)): nanoseconds, where /proc/PID/stat has hundredths of a second
        total += time.clock_gettime(~pid << 3 | 2)
    return total


def memory(pids):
    """Resident bytes."""
    pages = 0
    for pid in pids:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def wake_ups(pids):
    """How often a thread of the processes was given a CPU."""
    count = 0
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat", encoding="ascii") as file:
                count += int(file.read().split()[2])
    return count


class Run:
    """The rows of one repetition."""

    def __init__(self, bench, tool, plan, rare):
        self.bench, self.tool, self.plan, self.rare = bench, tool, plan, rare
        self.pids = tool.pids()
        self.out = {}

    def all(self):
        steps = [self.rest] if self.rare else []
        steps += [self.bulk, self.short_connections]
        if self.rare:
            steps += [self.closed_port, self.correct, self.interactive]
            if self.tool.name != "direct":
                steps.append(self.many_idle)
        for step in steps:
            try:
                step()
            except Broken as error:
                if not self.tool.peer:
                    raise
                self.bench.skipped[f"{self.tool.title}, {step.__name__.replace('_', ' ')}"] = str(error)
            for pid in self.pids:
                if not alive(pid):
                    raise Broken(f"{self.tool.title} ended during {step.__name__}")
        return self.out

    def load(self, what, *args, **options):
        return self.bench.load(what, *self.tool.client, *args, **options)

    def rest(self):
        """Nothing is open."""
        if not self.pids:
            return
        time.sleep(1)
        self.out["rest_rss"] = memory(self.pids)
        cpu_before, wakes_before, begin = cpu(self.pids), wake_ups(self.pids), time.monotonic()
        time.sleep(self.plan.rest)
        seconds = time.monotonic() - begin
        self.out["rest_cpu"] = (cpu(self.pids) - cpu_before) / seconds * 100
        self.out["rest_wakes"] = (wake_ups(self.pids) - wakes_before) / seconds

    def one_bulk(self, mode, flows, name):
        before = cpu(self.pids)
        done = self.load("bulk", "-m", mode, "-n", str(flows), "-d", str(self.plan.bulk), "-w", str(self.plan.warm_up))
        self.out[f"{name}_gbps"] = done["gbps"]
        if self.pids:
            self.out[f"{name}_cpu"] = (cpu(self.pids) - before) / (done["bytes"] / 1e9)

    def bulk(self):
        for flows in 1, 8:
            for mode, direction in ("D", "down"), ("U", "up"):
                self.one_bulk(mode, flows, f"{direction}{flows}")

    def short_connections(self):
        for at_once in 32, 1:
            before = cpu(self.pids)
            done = self.load("conns", "-T", "200", "-n", str(at_once), "-d", str(self.plan.short), "-w", "0.2")
            if done["errors"]:
                raise Broken(f"{self.tool.title}: {done['errors']} of {done['total']} short connections were lost, {at_once} at once")
            for figure in "rate", "p50", "p99":
                self.out[f"conn{at_once}_{figure}"] = done[figure]
            if self.pids:
                self.out[f"conn{at_once}_cpu"] = (cpu(self.pids) - before) / done["total"] * 1e6

    def correct(self):
        """Every byte is compared; the uploads end by half-close and the server's answer to it."""
        compared = 0
        for mode in "DU":
            compared += self.load("bulk", "-v", "-m", mode, "-n", "8", "-d", "0.7")["bytes"]
        self.out["compared"] = compared / 1e6

    def closed_port(self):
        """A client that knows a proxy is told by that; the others must be refused by connect(2)."""
        if not self.tool.client:
            self.out["closed_port"] = self.bench.load("open", port=9)["result"]

    def interactive(self):
        self.out["wwr_p50"] = self.load("ping", "-s", "-d", str(self.plan.ping))["p50"]
        for mode, direction in ("D", "down"), ("U", "up"):
            seconds = self.plan.ping + 0.6
            bulk = self.bench.start_load("bulk", *self.tool.client, "-m", mode, "-n", "8", "-d", str(seconds))
            try:
                time.sleep(0.3)
                self.out[f"echo_{direction}_p99"] = self.load("ping", "-g", "2000", "-d", str(self.plan.ping))["p99"]
            finally:
                self.bench.finish_load(bulk, 30)

    def both_ways(self, name):
        for mode, direction in ("D", "down"), ("U", "up"):
            self.one_bulk(mode, 1, f"{name}_{direction}")

    def many_idle(self):
        """Bulk and memory beside many idle connections. The bulk without them is measured just before and just after."""
        self.both_ways("before")
        rss = memory(self.pids)
        with Idle(self, self.plan.many) as idle:
            if self.pids:
                self.out["idle_rss"] = memory(self.pids)
                self.out["idle_each"] = (self.out["idle_rss"] - rss) / self.plan.many
                time.sleep(1)
                before, begin = cpu(self.pids), time.monotonic()
                time.sleep(1)
                self.out["idle_cpu"] = (cpu(self.pids) - before) / (time.monotonic() - begin) * 100
            self.both_ways("idle")
        self.out["idle_held"] = idle.held
        self.both_ways("after")
        for direction in "down", "up":
            without = (self.out[f"before_{direction}_gbps"] + self.out[f"after_{direction}_gbps"]) / 2
            self.out[f"idle_{direction}_ratio"] = self.out[f"idle_{direction}_gbps"] / without


class Idle:
    """`count` idle connections, held for the time of the block and used once more at its end."""

    def __init__(self, run, count):
        self.run, self.count, self.held = run, count, 0

    def __enter__(self):
        run = self.run
        self.child = run.bench.start_load("idle", "-T", "200", "-n", str(self.count), *run.tool.client, stdin=subprocess.PIPE)
        opened = json.loads(self.child.stdout.readline() or '{"open": 0}')["open"]
        if opened != self.count:
            self.end()
            raise Broken(f"{run.tool.title}: only {opened} of {self.count} idle connections opened")
        time.sleep(0.5)
        return self

    def end(self):
        try:
            out, _ = self.child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.communicate()
            raise Broken(f"{self.run.tool.title}: the idle connections could not be used again within 60 s") from None
        return out

    def __exit__(self, kind, error, trace):
        out = self.end()
        if kind:
            return
        self.held = json.loads(out.splitlines()[0])["alive"]
        if self.held != self.count:
            raise Broken(f"{self.run.tool.title}: {self.count - self.held} of {self.count} idle connections were lost")
