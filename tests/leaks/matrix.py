"""Rows of probes, columns of states and faults: what held, and how it is shown."""

import collections
import subprocess

import probes
import wire
from scenarios import STEERED, UNSTEERED

# What is known and documented as a limit, by (probe, column); "*" is any. It is shown and counted apart, never silent.
FRAMES = "under lockdown without a daemon nothing stands at the exit of the uplinks"
NEW_DEVICE = "a new or renamed device has its chain for frames some milliseconds later"
FRAME_PROBES = ("packet", "packet-bypass", "packet6", "packet-vlan", "packet-other", "macvlan")
DOCUMENTED = {
    **{(name, "lockdown-alone"): FRAMES for name in FRAME_PROBES},
    **{(name, column): NEW_DEVICE for name in FRAME_PROBES for column in ("uplink-renamed", "uplink-new", "uplink-gone")},
    ("dhcp-shaped", "*"): "DHCP's ports, which need root, may be used towards any address",
}
HELD, LEAK, LIMIT, FIRED, MUTE, NONE, VOID = "·", "L", "d", "!", "X", "-", "?"
MEANING = {
    HELD: "tried, nothing left", LEAK: "LEAK", LIMIT: "leaks, a documented limit", FIRED: "left, as it must with the protection off",
    MUTE: "not seen though it must be: the probe is broken", NONE: "not tried here", VOID: "held, but worth nothing: the probe is broken",
}


def progress(column):
    if column.skipped:
        return f"skipped  {column.name}: {column.skipped}"
    bad = "FAILED  " if column.failures or any(not limit(name, column.name) for name in column.leaks) else "ok      "
    leaks = f": packets of {', '.join(sorted(column.leaks))}" if column.leaks else ""
    leaks += f"; stood still in {', '.join(sorted(column.phases))}" if column.phases else ""
    return f"{bad} {column.name} ({column.seconds:.1f} s, {sum(sum(c.values()) for c in column.tried.values())} tries){leaks}"


# what the kernel says to a protocol that it was built without
UNKNOWN = {"EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "ENOPROTOOPT", "EAFNOSUPPORT"}


def absent(columns):
    """Probes whose protocol this kernel does not have."""
    for column in columns:
        if column.scenario.kind == "anti":
            for name, tries in column.tried.items():
                if name not in column.seen and set(tries) <= UNKNOWN:
                    yield name, f"this kernel does not have it ({', '.join(tries)})"


class Matrix:
    def __init__(self, columns, broken, lost):
        self.columns = [one for one in columns if not one.skipped]
        self.absent = [one for one in columns if one.skipped]
        self.broken, self.lost = broken | dict(absent(self.columns)), lost
        self.rows = [one.name for one in probes.PROBES] + [wire.OTHER]
        self.mute = {one.name for one in probes.PROBES if not self.proved(one.name)}
        self.cells = {(name, one.name): self.cell(name, one) for name in self.rows for one in self.columns}
        counts = collections.Counter(self.cells.values())
        self.passed = counts[HELD] + counts[FIRED]
        self.limits = counts[LIMIT]
        # a leak, a mute probe, and what made a column worthless
        self.failed = counts[LEAK] + counts[MUTE] + sum(len(one.failures) for one in columns) + bool(lost)
        self.skipped = len(self.absent) + len(self.broken)

    def judge(self, name, column):
        if name in self.broken:
            return NONE
        if name in column.leaks:
            return LIMIT if limit(name, column.name) else LEAK
        tried = name in column.tried
        if column.opened and name != wire.OTHER:
            steered = column.scenario.kind == "anti-steered"
            if name in column.seen:
                return LEAK if steered and name in STEERED else FIRED
            if not steered or name in UNSTEERED:
                return MUTE
        return HELD if tried or (name == wire.OTHER and (column.windows or column.without_tunnel)) else NONE

    def proved(self, name):
        """Whether the probe was seen wherever the protection was off."""
        signs = {(one.scenario.kind, self.judge(name, one)) for one in self.columns}
        return ("anti", FIRED) in signs and not any(sign == MUTE for _, sign in signs)

    def cell(self, name, column):
        found = self.judge(name, column)
        return VOID if found == HELD and name in self.mute else found

    def show(self, logs):
        print()
        width = max(map(len, self.rows)) + 1
        for line in range(2):
            print(" " * width + " ".join(str(number).rjust(2)[line] for number in range(1, len(self.columns) + 1)))
        for name in self.rows:
            print(name.ljust(width) + " ".join(self.cells[name, one.name] for one in self.columns))
        print()
        for number, one in enumerate(self.columns, 1):
            print(f"{number:3} {one.name}: {one.scenario.text}")
        print("\n" + ", ".join(f"{sign} {text}" for sign, text in MEANING.items()))
        self.findings(logs)

    def findings(self, logs):
        for name, why in self.broken.items():
            print(f"skipped  probe {name}: {why}")
        for one in self.absent:
            print(f"skipped  {one.name}: {one.skipped}")
        for name in self.rows:
            text = next((one.text for one in probes.PROBES if one.name == name), "a packet that is no probe's")
            if (where := self.with_sign(name, LEAK)):
                packets = where[0].leaks.get(name, [])
                print(f"LEAK     {name} ({text}) in {self.named(name, where)}")
                print(f"           {logs}/{where[0].name}-{name}.pcap: {len(packets)} packets, the first {shown(packets)}")
            if (where := self.with_sign(name, LIMIT)):
                print(f"LEAKS    {name} in {self.named(name, where)} (documented: {limit(name, where[0].name)})")
            for one in self.with_sign(name, MUTE):
                print(f"FAILED   {name} ({text}) in {one.name}: not seen at the far end; tries: {dict(one.tried.get(name, {}))}")
        for one in self.columns + self.absent:
            for failure in one.failures:
                print(f"FAILED   {one.name}: {failure}")
        if self.lost:
            print(f"FAILED   the captures missed packets: {self.lost}")
        if self.limits:
            print(f"{self.limits} documented limits, not counted as passed")

    def with_sign(self, name, sign):
        return [one for one in self.columns if self.cells[name, one.name] == sign]

    def named(self, name, where):
        tried = [one for one in self.columns if one.windows and name in one.tried]
        return "all columns" if len(where) == len(tried) > 3 else ", ".join(one.name for one in where)

    def data(self):
        cells = {name: {one.name: self.describe(name, one) for one in self.columns} for name in self.rows}
        return {
            "version": 1, "passed": self.passed, "failed": self.failed, "skipped": self.skipped, "documented": self.limits,
            "columns": [{"name": one.name, "text": one.scenario.text, "seconds": round(one.seconds, 2), "phases": sorted(one.phases), "failures": one.failures} for one in self.columns],
            "skips": {one.name: one.skipped for one in self.absent} | self.broken, "cells": cells, "lost": self.lost,
        }

    def describe(self, name, column):
        return {
            "result": {HELD: "held", LEAK: "leak", LIMIT: "documented", FIRED: "seen", MUTE: "mute", NONE: "untried", VOID: "void"}[self.cells[name, column.name]],
            "tries": dict(column.tried.get(name, {})), "leaked": len(column.leaks.get(name, [])), "seen": column.seen.get(name, 0),
        }


def limit(name, column):
    return DOCUMENTED.get((name, column)) or DOCUMENTED.get((name, "*"))


def shown(packets):
    """The first packet, as tcpdump shows it."""
    if not packets:
        return "none"
    done = subprocess.run(["tcpdump", "-nn", "-t", "-r", "-"], input=wire.pcap(packets[:1]), capture_output=True)
    return f"on {packets[0].device} {done.stdout.decode(errors='replace').strip()[:200]}"
