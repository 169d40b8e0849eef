"""From figures to the tables and the JSON file."""

from dataclasses import dataclass
from statistics import median

MIB, KIB = 1 << 20, 1 << 10


def plain(value):
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


# figure, its row in the table, what it is divided by
ROWS = [
    *((f"{d}{n}_gbps", f"bulk {d}, {n} flow{'s' * (n > 1)} (Gbit/s)", 1) for n in (1, 8) for d in ("down", "up")),
    *((f"{d}{n}_cpu", f"  CPU, {d}, {n} flow{'s' * (n > 1)} (s/GB)", 1) for n in (1, 8) for d in ("down", "up")),
    ("conn32_rate", "short connections, 32 at once (per s)", 1),
    ("conn32_cpu", "  CPU each (µs)", 1),
    ("conn32_p50", "  p50 (µs)", 1),
    ("conn32_p99", "  p99 (µs)", 1),
    ("conn1_p50", "short connections, one at a time, p50 (µs)", 1),
    ("wwr_p50", "write-write-read, p50 (µs)", 1),
    ("echo_down_p99", "echo beside 8 flows down, p99 (µs)", 1),
    ("echo_up_p99", "echo beside 8 flows up, p99 (µs)", 1),
    ("rest_rss", "RSS at rest (MiB)", MIB),
    ("idle_each", "RSS per idle connection (KiB)", KIB),
    ("idle_rss", "RSS with 10,000 idle (MiB)", MIB),
    ("idle_held", "idle connections held, of 10,000", 1),
    ("idle_cpu", "CPU with 10,000 idle (%)", 1),
    ("idle_down_gbps", "bulk down beside 10,000 idle (Gbit/s)", 1),
    ("idle_up_gbps", "bulk up beside 10,000 idle (Gbit/s)", 1),
    ("rest_cpu", "CPU at rest (%)", 1),
    ("rest_wakes", "wake-ups per second at rest", 1),
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


def table(titles, summaries):
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
    lines += [[label, *(cell(values, name, unit) for values in summaries)] for name, label, unit in ROWS]
    return aligned(lines)


@dataclass(frozen=True)
class Goal:
    """A figure of proxyvpn's, alone (in `unit`) or divided by the same figure of another program, and its limit."""

    name: str
    figure: str
    limit: float
    against: str = ""
    at_least: bool = False
    unit: float = 1

    def values(self, runs):
        """One value for each repetition that has both figures."""
        own = [run.get(self.figure) for run in runs.get("proxyvpn", [])]
        if not self.against:
            return [value / self.unit for value in own if value is not None]
        other = [run.get(self.figure) for run in runs.get(self.against, [])]
        return [a / b for a, b in zip(own, other) if a is not None and b]  # noqa: B905 (a peer may have stopped early)

    def judge(self, runs):
        values = self.values(runs)
        value = median(values) if values else None
        met = None if value is None else value >= self.limit if self.at_least else value <= self.limit
        return {
            "name": self.name, "value": value, "limit": self.limit, "met": met, "relation": ">=" if self.at_least else "<=",
            "min": min(values, default=None), "max": max(values, default=None), "n": len(values),
        }


def goals(crowd):
    both = ("down", "up")
    out = [Goal(f"CPU per GB, {d}, ÷ two bare TUNs", f"{d}1_cpu", limit, "tuns") for d, limit in zip(both, (1.15, 1.05), strict=True)]
    out += [Goal(f"CPU per GB, {d}, ÷ redsocks", f"{d}1_cpu", 1.2, "redsocks") for d in both]
    out += [Goal(f"CPU per GB, {d}, ÷ tun2proxy", f"{d}1_cpu", 0.2, "tun2proxy") for d in both]
    out += [Goal(f"bulk {d}, 1 flow, ÷ CONNECT client", f"{d}1_gbps", 0.8, "connect", at_least=True) for d in both]
    out += [
        Goal("short connections, 32 at once, ÷ CONNECT client", "conn32_rate", 0.85, "connect", at_least=True),
        Goal("CPU per short connection ÷ two bare TUNs", "conn32_cpu", 1.2, "tuns"),
        Goal("one connection at a time, p50, ÷ CONNECT client", "conn1_p50", 1.2, "connect"),
        Goal("RSS at rest (MiB)", "rest_rss", 8, unit=MIB),
        Goal("RSS per idle connection (KiB)", "idle_each", 5, unit=KIB),
        Goal("idle connections held, of 10,000", "idle_held", 10_000, at_least=True),
        Goal(f"idle connections held, of {crowd or 50_000:,}", "crowd_held", crowd or 50_000, at_least=True),
    ]
    out += [Goal(f"bulk {d} beside 10,000 idle ÷ without", f"idle_{d}_ratio", 0.95, at_least=True) for d in both]
    out += [
        # the clock shows nanoseconds: this is zero as top(1) shows it
        Goal("CPU at rest (%)", "rest_cpu", 0.05),
        Goal("wake-ups per second at rest", "rest_wakes", 1),
        Goal("write-write-read, p50, ÷ CONNECT client", "wwr_p50", 2, "connect"),
    ]
    out += [Goal(f"echo p99 beside 8 flows {d} ÷ CONNECT client", f"echo_{d}_p99", 1.5, "connect") for d in both]
    return out


def goal_table(judged):
    lines = [["goal", "figure", "min..max", "limit", ""]]
    for goal in judged:
        value, relation = goal["value"], "≥" if goal["relation"] == ">=" else "≤"
        verdict = "not measured" if goal["met"] is None else "reached" if goal["met"] else "NOT reached"
        span = f"{plain(goal['min'])}..{plain(goal['max'])}" if goal["n"] > 1 else "-"
        lines.append([goal["name"], "-" if value is None else plain(value), span, f"{relation} {goal['limit']:g}", verdict])
    return aligned(lines)
