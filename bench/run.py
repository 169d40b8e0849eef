"""Measures proxyvpn against what is possible: run.py --bin DIR --stage DIR [--quick] [--json FILE] [--only NAME,...]
[--peer NAME=PROGRAM]... [--skip NAME=REASON]...   scripts/bench.sh builds everything and calls this.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True  # root leaves nothing among the sources
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "e2e")]
import report  # noqa: E402
from lab import Failed, Lab, expect, until  # noqa: E402
from measure import FULL, QUICK, Broken, Idle, Run  # noqa: E402
from tools import DESCRIPTORS, PORT, RELAY_PORT, SERVER, SERVERS, TOOLS, alive, numbers  # noqa: E402

LAB = "bench"
WORKERS = 2
SYSCTLS = {  # the same for every program: no run is to end because a client has no port left
    "net.ipv4.ip_local_port_range": "2000 65000", "net.ipv4.tcp_tw_reuse": "1", "net.core.somaxconn": "65535",
    "net.ipv4.tcp_max_syn_backlog": "65535", "net.ipv4.conf.all.rp_filter": "0", "net.ipv4.conf.default.rp_filter": "0",
}


class Bench:
    def __init__(self, options):
        self.bin = options.bin
        self.peers = dict(peer.split("=", 1) for peer in options.peer)
        self.skipped = dict(skip.split("=", 1) for skip in options.skip)  # what is missing in the tables: why
        self.lab = Lab(LAB, options.stage)

    def up(self):
        lab = self.lab
        lab.up()
        lab.script("service", "stop", "tcpdump")  # it would cost every program something, and not each the same
        for machine in "app", "net":
            lab.run(machine, None, "sysctl", "-qw", *(f"{name}={value}" for name, value in SYSCTLS.items()))
        lab.net("ip", "route", "add", "local", SERVERS, "dev", "lo")
        for name, port in ("relay", RELAY_PORT), ("server", PORT):
            # the machine's end is theirs: they are never stopped one by one
            lab.popen("net", None, f"{self.bin}/{name}", str(port), str(WORKERS), stdin=subprocess.DEVNULL)
            until(5, lambda port=port: f":{port} " in lab.net("ss", "-Htln").stdout, f"{name} does not listen")

    def start_load(self, what, *args, stdin=subprocess.DEVNULL, port=PORT):
        command = [f"{self.bin}/load", what, "-t", f"{SERVER}:{port}", *args]
        child = self.lab.popen("app", None, *command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        child.what = " ".join(command[1:])
        return child

    def finish_load(self, child, seconds):
        try:
            out, error = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise Broken(f"load {child.what}: not done after {seconds} s") from None
        if child.returncode:
            what = "wrong bytes" if child.returncode == 3 else "a connection failed"
            raise Broken(f"load {child.what}: {what}: {error.strip() or out.strip()}")
        return json.loads(out)

    def load(self, what, *args, port=PORT):
        return self.finish_load(self.start_load(what, *args, port=port), 120)


def left_over(own):
    """Processes of an earlier run: of programs that were put where only the bench puts them, or of its lab."""
    found = []
    for pid in numbers():
        try:
            program = os.readlink(f"/proc/{pid}/exe")
            with open(f"/proc/{pid}/environ", "rb") as file:
                lab = f"PVLAB_ID={LAB}".encode() in file.read().split(b"\0")
        except OSError:
            continue
        if pid != os.getpid() and pid != os.getppid() and alive(pid) and (lab or program.startswith("/tmp/proxyvpn-bench.")) and own not in program:
            found.append(f"{pid} ({program})")
    return found


def busy_share():
    """Share of the machine's CPU time that is in use now, by whatever else runs."""

    def times():
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    all_before, idle_before = times()
    time.sleep(1)
    all_after, idle_after = times()
    return 1 - (idle_after - idle_before) / (all_after - all_before)


def machine():
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")), "")
    return f"{os.cpu_count()} CPUs{f' ({model})' if model else ''}, Linux {platform.release()}"


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
            print(f"bench: {repetition + 1} of {plan.repetitions}: {tool.title} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)
            try:
                runs[tool.name].append(one(bench, tool, plan, repetition < plan.rare))
            except Failed as error:
                if not tool.peer:
                    raise
                tool.stop()
                bench.skipped[tool.name] = f"failed: {' '.join(str(error).split())}"
                print(f"bench: {tool.title} failed: {error}", file=sys.stderr)
    return runs


def crowd(bench, tool, plan):
    """Many more idle connections than usual, once."""
    print(f"bench: {plan.crowd} idle connections", file=sys.stderr, flush=True)
    tool.start()
    try:
        run = Run(bench, tool, plan, True)
        with Idle(run, plan.crowd) as idle:
            run.one_bulk("D", 1, "crowd_down")
            run.one_bulk("U", 1, "crowd_up")
        return {**run.out, "crowd_held": idle.held}
    finally:
        tool.stop()


def bench_all(options):
    plan = QUICK if options.quick else FULL
    left = left_over(options.bin)
    expect(not left, f"processes of an earlier run are still there: {', '.join(left)}. End them with 'PVLAB_ID={LAB} scripts/lab.sh down'")
    busy = busy_share()
    if busy > 0.15:
        print(f"bench: something else uses {busy:.0%} of this machine's CPU time: trust the ratios, not the figures", file=sys.stderr)
    bench = Bench(options)
    tools = [tool(bench) for tool in TOOLS if (tool.name in bench.peers or not tool.peer) and (not options.only or tool.name in options.only.split(","))]
    begin = time.monotonic()
    try:
        bench.up()
        runs = measure(bench, tools, plan)
        vpn = next((tool for tool in tools if tool.name == "proxyvpn"), None)
        if plan.crowd and vpn:
            if plan.crowd + 1000 > DESCRIPTORS:
                bench.skipped[f"{plan.crowd} idle connections"] = f"this machine allows a process {DESCRIPTORS} descriptors"
            else:
                runs["proxyvpn"][0].update(crowd(bench, vpn, plan))
    finally:
        bench.lab.down()
    summaries = {name: report.summary(figures) for name, figures in runs.items()}
    judged = [goal.judge(runs) for goal in report.goals(plan.crowd)]
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"\n{date}, {machine()}; {plan.repetitions} repetitions, {time.monotonic() - begin:.0f} s; median [min..max]; other load before: {busy:.0%}")
    print("The upstream proxy is bench/relay.c (splice): a real proxy's own cost would hide the differences.\n")
    print(report.table([tool.title for tool in tools], [summaries[tool.name] for tool in tools]))
    for name, reason in bench.skipped.items():
        print(f"skipped: {name}: {reason}")
    print(f"\n{report.goal_table(judged)}")
    if options.json:
        content = {
            "date": date, "machine": machine(), "quick": options.quick, "other_load": busy, "goals": judged, "skipped": bench.skipped,
            "summary": summaries, "runs": runs,
        }
        Path(options.json).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--only", help="names of programs, with commas between them")
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--skip", action="append", default=[])
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # through the clean-up
    try:
        bench_all(parser.parse_args())
    except Failed as error:
        sys.exit(f"bench: FAILED: {error}")
    print("bench: ok")


if __name__ == "__main__":
    main()
