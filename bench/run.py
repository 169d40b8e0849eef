"""Measures proxyvpn against what is possible: run.py --bin DIR --stage DIR [--congestion NAME] [--quick]
[--json FILE] [--only NAME,...] [--peer NAME=PROGRAM]... [--skip NAME=REASON]...   scripts/bench.sh builds everything and calls this.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True  # root leaves nothing among the sources
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "e2e")]
import report  # noqa: E402
from lab import Failed, expect  # noqa: E402
from measure import FULL, QUICK, Broken, Run, affordable  # noqa: E402
from rig import Rig, busy_share, end_on_signals, expect_nothing_left, machine, today, workers_for  # noqa: E402
from tools import DESCRIPTORS, RELAY, TOOLS, alive  # noqa: E402

LAB = "bench"


class Bench(Rig):
    def __init__(self, options):
        super().__init__(LAB, options)
        self.peers = dict(peer.split("=", 1) for peer in options.peer)
        self.skipped = dict(skip.split("=", 1) for skip in options.skip)  # what is missing in the tables: why
        self.begin = time.monotonic()

    def say(self, text):
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        print(f"bench: {minutes}:{seconds:02} {text} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)

    def check_socks5(self):
        """The relay's other protocol: nothing else here speaks it."""
        way = "-x", f"socks5:{RELAY}"
        compared = sum(self.load("bulk", *way, "-v", "-m", mode, "-n", "4", "-d", "0.3")["bytes"] for mode in "DU")
        done = self.load("conns", *way, "-T", "200", "-n", "32", "-c", "1000")
        expect(not done["errors"], f"SOCKS5: {done['errors']} of 1000 short connections were lost")
        return compared / 1e6


def one(bench, tool, plan, rare):
    """One repetition with one program, from start to stop. What is left of it stops the bench."""
    tool.start()
    try:
        tool.check()
        figures = Run(bench, tool, plan, rare).all()
        tool.check()
    finally:
        pids = tool.pids()
        tool.stop()
    left = [str(pid) for pid in pids if alive(pid)]
    expect(not left, f"{tool.title} was stopped, but runs: {' '.join(left)}")
    TOOLS[0](bench).check()  # the direct way must be open again
    return figures


def measure(bench, tools, plan):
    runs = {tool.name: [] for tool in tools}
    for repetition in range(plan.repetitions):
        for tool in tools:
            if tool.name in bench.skipped:
                continue
            bench.say(f"{repetition + 1} of {plan.repetitions}: {tool.title}")
            try:
                runs[tool.name].append(one(bench, tool, plan, repetition < plan.rare))
            except Failed as error:
                if not tool.peer:
                    raise
                tool.stop()
                bench.skipped[tool.name] = f"failed: {' '.join(str(error).split())}"
                print(f"bench: {tool.title} failed: {error}", file=sys.stderr)
    return runs


def crowds(bench, tools, plan, runs):
    """Many more idle connections than usual, once. Returns how many."""
    count = min(plan.crowd, affordable())
    if count < plan.crowd:
        reason = f"this machine allows a process {DESCRIPTORS:,} descriptors; the table has figures with {count:,}"
        bench.skipped[f"{plan.crowd:,} idle connections"] = reason
    bench.serve(workers_for(count))
    for tool in tools:
        if tool.name not in ("tuns", "proxyvpn"):
            continue
        bench.say(f"{count:,} idle connections: {tool.title}")
        tool.start()
        try:
            run = Run(bench, tool, plan, True)
            run.beside_idle("crowd", count)
            runs[tool.name][0].update(run.out)
        finally:
            tool.stop()
    return count


def bench_all(options):
    plan = QUICK if options.quick else FULL
    expect_nothing_left(LAB, options.bin)
    busy = busy_share()
    if busy > 0.15:
        print(f"bench: something else uses {busy:.0%} of this machine's CPU time: trust the ratios, not the figures", file=sys.stderr)
    bench = Bench(options)
    tools = [tool(bench) for tool in TOOLS if (tool.name in bench.peers or not tool.peer) and (not options.only or tool.name in options.only.split(","))]
    crowd = 0
    try:
        bench.up()
        socks5 = bench.check_socks5()
        runs = measure(bench, tools, plan)
        if plan.crowd:
            crowd = crowds(bench, tools, plan, runs)
        else:
            bench.skipped["50,000 idle connections"] = "--quick leaves them out"
    finally:
        bench.lab.down()
    seconds = time.monotonic() - bench.begin
    summaries = {name: report.summary(figures) for name, figures in runs.items()}
    judged = report.judge(runs, bench.skipped, {tool.name: tool.title for tool in TOOLS}, crowd)
    date = today()
    print(
        f"\n{date}, {machine()}; congestion control {options.congestion}; {plan.repetitions} repetitions, {seconds:.0f} s; median [min..max];"
        f" other load before: {busy:.0%}"
    )
    print("The upstream proxy is bench/relay.c (splice): a real proxy's own cost would hide the differences.")
    print(f"Its SOCKS5 was checked apart: {socks5:.0f} MB compared byte by byte, 1000 short connections.\n")
    print(report.table([tool.title for tool in tools], [summaries[tool.name] for tool in tools], crowd))
    for name, reason in bench.skipped.items():
        print(f"skipped: {name}: {reason}")
    print(f"\n{report.goal_table(judged)}")
    if options.json:
        content = {
            "date": date, "machine": machine(), "congestion": options.congestion, "quick": options.quick, "seconds": seconds, "other_load": busy,
            "crowd": crowd, "goals": judged, "skipped": bench.skipped, "summary": summaries, "runs": runs,
        }
        Path(options.json).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--congestion", default="reno")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--only", help="names of programs, with commas between them")
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--skip", action="append", default=[])
    end_on_signals()
    try:
        bench_all(parser.parse_args())
    except (Failed, subprocess.SubprocessError) as error:
        sys.exit(f"bench: FAILED: {error}")
    print("bench: ok")


if __name__ == "__main__":
    main()
