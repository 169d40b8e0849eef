"""One repetition with one program: everything that the table shows, as a flat dictionary of figures."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from statistics import median

from lab import until
from tools import DESCRIPTORS, Broken, alive


@dataclass(frozen=True)
class Plan:
    """How long things take, in seconds."""

    repetitions: int
    bulk: float
    warm_up: float
    short: float
    ping: float
    rest: float
    rounds: int  # of bulk beside idle connections
    many: int = 10_000
    settle: float = 8  # after the last connection was opened: an engine may give memory back only when its flows are idle for some seconds
    beside: float = 0.7  # one bulk beside idle connections, or without them: short, so that more of them can alternate
    crowd: int = 0  # idle connections of the one large test; 0: none
    rare: int = 0  # repetitions with the slow tests; the others have only bulk and short connections


QUICK = Plan(repetitions=3, bulk=0.8, warm_up=0.2, short=0.8, ping=0.5, rest=3, rounds=2, rare=1)
FULL = Plan(repetitions=5, bulk=1.5, warm_up=0.5, short=2, ping=1, rest=3, rounds=3, rare=5, crowd=50_000)


def affordable():
    """Idle connections that a program with one descriptor for each can hold here, with some left for its own; whole thousands."""
    return (DESCRIPTORS - 2000) // 1000 * 1000


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

    def many_idle(self):
        if affordable() < self.plan.many:
            self.bench.skipped[f"{self.plan.many:,} idle connections"] = f"this machine allows a process {DESCRIPTORS:,} descriptors"
            return
        self.beside_idle("idle", self.plan.many)

    def rounds(self, count):
        """[(Gbit/s down, Gbit/s up), …]: one flow at a time, short, down and up in turn."""
        args = "-n", "1", "-d", str(self.plan.beside), "-w", str(self.plan.warm_up)
        return [tuple(self.load("bulk", "-m", mode, *args)["gbps"] for mode in "DU") for _ in range(count)]

    def beside_idle(self, name, count):
        """Bulk and memory beside many idle connections. The bulk without them is measured before and after."""
        around = (self.plan.rounds + 1) // 2
        # not what is kept for a while after other work: idle connections may use that again
        rss = self.out.get("rest_rss", memory(self.pids))
        without = self.rounds(around)
        with Idle(self, count) as idle:
            if self.pids:
                time.sleep(self.plan.settle)
                self.out[f"{name}_rss"] = memory(self.pids)
                self.out[f"{name}_each"] = (self.out[f"{name}_rss"] - rss) / count
                before, begin = cpu(self.pids), time.monotonic()
                time.sleep(1)
                self.out[f"{name}_cpu"] = (cpu(self.pids) - before) / (time.monotonic() - begin) * 100
            beside = self.rounds(self.plan.rounds)
        self.out[f"{name}_held"] = idle.held
        idle.await_closed()
        without += self.rounds(around)
        for direction, figures, others in zip(("down", "up"), zip(*beside, strict=True), zip(*without, strict=True), strict=True):
            self.out[f"{name}_{direction}_gbps"] = median(figures)
            self.out[f"{name}_{direction}_ratio"] = median(figures) / median(others)


class Idle:
    """`count` idle connections, held for the time of the block and used once more at its end. As many clients as their descriptors need."""

    def __init__(self, run, count):
        self.run, self.count, self.held = run, count, 0
        self.children = []
        share = DESCRIPTORS - 100
        self.shares = [min(share, count - begin) for begin in range(0, count, share)]

    def __enter__(self):
        run = self.run
        opened = 0
        for share in self.shares:
            child = run.bench.start_load("idle", "-T", "200", "-n", str(share), *run.tool.client, stdin=subprocess.PIPE)
            self.children.append(child)
            opened += json.loads(child.stdout.readline() or '{"open": 0}')["open"]
        if opened != self.count:
            self.end()
            raise Broken(f"{run.tool.title}: only {opened} of {self.count} idle connections opened")
        return self

    def end(self):
        """What the clients say in the end."""
        try:
            return [child.communicate(timeout=60)[0] for child in self.children]
        except subprocess.TimeoutExpired:
            for child in self.children:
                child.kill()
                child.communicate()
            raise Broken(f"{self.run.tool.title}: the idle connections could not be used again within 60 s") from None

    def __exit__(self, kind, error, trace):
        lines = self.end()
        if kind:
            return
        self.held = sum(json.loads(line or '{"alive": 0}')["alive"] for line in lines)
        if self.held != self.count:
            raise Broken(f"{self.run.tool.title}: {self.count - self.held} of {self.count} idle connections were lost")

    def await_closed(self):
        """Until the server has seen the end of them: closing costs time, too."""
        until(30, lambda: self.run.bench.sockets("net")["inuse"] < self.count / 20, f"{self.run.tool.title}: closed connections stay open")
