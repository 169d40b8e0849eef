"""From figures to the tables and the JSON file."""

from dataclasses import dataclass
from statistics import median

MIB, KIB = 1 << 20, 1 << 10


def plain(value):
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


BOTH = ("down", "up")


def rows(crowd):
    """[(figure, its row in the table, what it is divided by)]"""

    def idle(name, count):
        return [
            (f"{name}_held", f"idle connections held, of {count:,}", 1),
            (f"{name}_each", "  RSS for each (KiB)", KIB),
            (f"{name}_rss", "  RSS with them (MiB)", MIB),
            (f"{name}_cpu", "  CPU with them (%)", 1),
            *((f"{name}_{d}_gbps", f"  bulk {d} beside them (Gbit/s)", 1) for d in BOTH),
            *((f"{name}_{d}_ratio", f"  bulk {d} beside them ÷ without", 1) for d in BOTH),
        ]

    return [
        *((f"{d}{n}_gbps", f"bulk {d}, {n} flow{'s' * (n > 1)} (Gbit/s)", 1) for n in (1, 8) for d in BOTH),
        *((f"{d}{n}_cpu", f"  CPU, {d}, {n} flow{'s' * (n > 1)} (s/GB)", 1) for n in (1, 8) for d in BOTH),
        ("conn32_rate", "short connections, 32 at once (per s)", 1),
        ("conn32_cpu", "  CPU each (µs)", 1),
        ("conn32_p50", "  p50 (µs)", 1),
        ("conn32_p99", "  p99 (µs)", 1),
        ("conn1_p50", "short connections, one at a time, p50 (µs)", 1),
        ("wwr_p50", "write-write-read, p50 (µs)", 1),
        ("echo_down_p99", "echo beside 8 flows down, p99 (µs)", 1),
        ("echo_up_p99", "echo beside 8 flows up, p99 (µs)", 1),
        ("rest_rss", "RSS at rest (MiB)", MIB),
        ("rest_cpu", "CPU at rest (%)", 1),
        ("rest_wakes", "wake-ups per second at rest", 1),
        *idle("idle", 10_000),
        *(idle("crowd", crowd) if crowd else []),
        ("closed_port", "closed port", None),
        ("compared", "compared byte by byte, half-closed (MB)", 1),
    ]


def summary(runs):
    """{figure: {"median", "min", "max", "n"}} of the repetitions of one program; texts as they are."""
    out = {}
    for name in {name for run in runs for name in run}:
        values = [run[name] for run in runs if name in run]
        if isinstance(values[0], str):
            out[name] = " or ".join(sorted(set(values)))
        else:
            out[name] = {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}
    return out


def aligned(lines):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def table(titles, summaries, crowd):
    """The figures: one column for each program."""

    def cell(values, name, unit):
        value = values.get(name)
        if value is None:
            return "-"
        if unit is None:
            return value
        middle, least, most = (plain(value[key] / unit) for key in ("median", "min", "max"))
        return f"{middle} [{least}..{most}]" if value["n"] > 1 else middle

    lines = [["", *titles]]
    lines += [[label, *(cell(values, name, unit) for values in summaries)] for name, label, unit in rows(crowd)]
    return aligned(lines)


FLOOR = "tuns"
COMPARE = {"<=": float.__le__, "<": float.__lt__, ">=": float.__ge__}
SIGNS = {"<=": "≤", "<": "<", ">=": "≥"}


@dataclass(frozen=True)
class Goal:
    """A figure of proxyvpn's, alone (in `unit`) or divided by the same figure of another program, and its limit.

    `floor`: two bare TUNs have the figure as well, so they show what any program behind a TUN can reach at most.
    """

    name: str
    figure: str
    relation: str
    limit: float
    against: str = ""
    unit: float = 1
    floor: bool = False

    def values(self, runs, program="proxyvpn"):
        """One value for each repetition that has both figures."""
        own = [run.get(self.figure) for run in runs.get(program, [])]
        if not self.against:
            return [value / self.unit for value in own if value is not None]
        other = [run.get(self.figure) for run in runs.get(self.against, [])]
        return [a / b for a, b in zip(own, other) if a is not None and b]  # noqa: B905 (a peer may have stopped early)

    def met(self, value):
        return None if value is None else COMPARE[self.relation](float(value), float(self.limit))

    def judge(self, runs, missing):
        """`missing`: why there is no figure of a program, or none of this goal at all ("")."""
        values = [] if missing.get("") else self.values(runs)
        value = median(values) if values else None
        floors = self.values(runs, FLOOR) if self.floor else []
        floor = median(floors) if floors else None
        why = None
        if value is None:
            reasons = (missing.get(name) for name in ("", "proxyvpn", self.against))
            why = next(filter(None, reasons), "no repetition has its figures")
        return {
            "name": self.name, "value": value, "limit": self.limit, "met": self.met(value), "why": why, "relation": self.relation,
            "floor": floor, "floor_met": self.met(floor), "min": min(values, default=None), "max": max(values, default=None), "n": len(values),
        }


def goals():
    """The list that the project is held to."""
    out = [Goal(f"CPU per GB, {d}, ÷ two bare TUNs", f"{d}1_cpu", "<=", limit, "tuns") for d, limit in zip(BOTH, (1.15, 1.05), strict=True)]
    out += [Goal(f"CPU per GB, {d}, ÷ redsocks", f"{d}1_cpu", "<=", 1.2, "redsocks", floor=True) for d in BOTH]
    out += [Goal(f"CPU per GB, {d}, ÷ tun2proxy", f"{d}1_cpu", "<=", 0.2, "tun2proxy", floor=True) for d in BOTH]
    out += [Goal(f"bulk {d}, 1 flow, ÷ CONNECT client", f"{d}1_gbps", ">=", 0.8, "connect", floor=True) for d in BOTH]
    out += [
        Goal("short connections, 32 at once, ÷ CONNECT client", "conn32_rate", ">=", 0.85, "connect", floor=True),
        Goal("CPU per short connection ÷ two bare TUNs", "conn32_cpu", "<=", 1.2, "tuns"),
        Goal("one connection at a time, p50, ÷ CONNECT client", "conn1_p50", "<=", 1.2, "connect", floor=True),
        Goal("RSS at rest (MiB)", "rest_rss", "<=", 8, unit=MIB),
        Goal("RSS per idle connection (KiB)", "idle_each", "<=", 5, unit=KIB),
    ]
    for name, count in ("idle", 10_000), ("crowd", 50_000):
        out.append(Goal(f"idle connections held, of {count:,}", f"{name}_held", ">=", count))
        out += [Goal(f"bulk {d} beside {count:,} idle ÷ without", f"{name}_{d}_ratio", ">=", 0.95, floor=True) for d in BOTH]
    out += [
        # the clock shows nanoseconds: this is zero as top(1) shows it
        Goal("CPU at rest (%)", "rest_cpu", "<=", 0.05),
        Goal("wake-ups per second at rest", "rest_wakes", "<", 1),
        Goal("write-write-read, p50, ÷ CONNECT client", "wwr_p50", "<=", 2, "connect", floor=True),
    ]
    out += [Goal(f"echo p99 beside 8 flows {d} ÷ CONNECT client", f"echo_{d}_p99", "<=", 1.5, "connect", floor=True) for d in BOTH]
    return out


def judge(runs, skipped, titles, crowd):
    """The goals with what was measured. `skipped`: what was left out, with the reason; `crowd`: idle connections of the large test."""
    missing = {}
    for name, title in titles.items():
        reasons = [reason for what, reason in skipped.items() if what in (name, title) or what.startswith(f"{title},")]
        if reasons:
            missing[name] = f"{title}: {'; '.join(reasons)}"
        elif name not in runs:
            missing[name] = f"{title} was not asked for"
    few = skipped.get("10,000 idle connections", "")
    many = "" if crowd == 50_000 else skipped.get("50,000 idle connections", "they were not opened")
    reasons = {"idle": few, "crowd": many}
    return [goal.judge(runs, {**missing, "": reasons.get(goal.figure.split("_")[0], "")}) for goal in goals()]


def verdict(goal):
    if goal["met"] is None:
        return f"not measured: {goal['why']}"
    if goal["met"]:
        return "reached"
    return "not reached, nor by two bare TUNs" if goal["floor_met"] is False else "NOT reached"


def goal_table(judged):
    lines = [["goal", "figure", "min..max", "two bare TUNs", "limit", ""]]
    for goal in judged:
        value, floor = ("-" if goal[name] is None else plain(goal[name]) for name in ("value", "floor"))
        span = f"{plain(goal['min'])}..{plain(goal['max'])}" if goal["n"] > 1 else "-"
        lines.append([goal["name"], value, span, floor, f"{SIGNS[goal['relation']]} {goal['limit']:g}", verdict(goal)])
    return aligned(lines)
