"""Short connections through proxyvpnd for long: soak.py --bin DIR --stage DIR [--connections N | --rate R --seconds S [--kernel-ports]]
[--congestion NAME] [--every SECONDS] [--csv FILE]   scripts/soak.sh builds everything and calls this.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True  # root leaves nothing among the sources
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "e2e")]
from lab import Failed, expect, until  # noqa: E402
from measure import cpu, memory  # noqa: E402
from rig import KERNEL_PORTS, Rig, busy_share, end_on_signals, expect_nothing_left, machine, today  # noqa: E402
from tools import ProxyVpn, alive  # noqa: E402

LAB = "soak"
MIB = 1 << 20
AT_ONCE = 32
PACED = 4096  # connections that may be open at once when they come at a fixed rate
REST = 6  # seconds after the last flow ended: what an engine keeps for a while is given back by then
# What is no leak: the allocator's and the kernel's grain, a descriptor of a timer or a log.
RSS_MARGIN, FDS_MARGIN = 2 * MIB, 8
NETFILTER = "/proc/sys/net/netfilter"
PORTS_WARNING = "ports-exhausted"


class Load:
    """The load generator, with its latest word."""

    def __init__(self, rig, *args):
        self.child = rig.start_load("conns", "-T", "200", "-p", *args)
        self.latest = {"seconds": 0, "total": 0, "errors": 0, "refused": 0, "silent": 0}
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.child.stdout:
            self.latest = json.loads(line)

    def running(self):
        return self.child.poll() is None

    def end(self):
        self.reader.join()
        expect(self.child.returncode == 0, lambda: f"the load generator ended with {self.child.returncode}: {self.child.stderr.read().strip()}")
        return self.latest


class Soak:
    def __init__(self, rig, options):
        self.rig, self.options = rig, options
        self.vpn = ProxyVpn(rig)
        self.begin = time.monotonic()
        self.before = {"total": 0, "errors": 0, "refused": 0, "silent": 0}  # of loads that have ended
        self.rows = []
        self.warnings = {}  # code: text
        self.conntrack_max = int(rig.lab.app("cat", f"{NETFILTER}/nf_conntrack_max").stdout)

    def sample(self, note, load=None):
        """One row: what the daemon holds now."""
        expect(alive(self.vpn.pid), "proxyvpnd ended")
        pids = self.vpn.pids()
        status = self.rig.lab.status()
        for code, severity, text in ((item["code"], item["severity"], item["text"]) for item in status["health"]):
            if severity != "info":
                self.warnings.setdefault(code, text)
        counters = status["statistics"]
        done = {name: count + (load.latest[name] if load else 0) for name, count in self.before.items()}
        row = {
            "seconds": round(time.monotonic() - self.begin, 1), "note": note, "connections": done["total"], "lost": done["errors"],
            "refused": done["refused"], "silent": done["silent"], "rss": memory(pids), "fds": len(os.listdir(f"/proc/{self.vpn.pid}/fd")),
            "flows": counters["flows-opened"] - counters["flows-closed"], "cpu_seconds": round(cpu(pids), 2),
            "conntrack": int(self.rig.lab.app("cat", f"{NETFILTER}/nf_conntrack_count").stdout),
            "conntrack_max": self.conntrack_max, "time_wait": self.rig.sockets("app")["tw"], "warnings": " ".join(sorted(item["code"] for item in status["health"] if item["severity"] != "info")),
            **dict(sorted(counters.items())),
        }
        self.rows.append(row)
        self.show(row)
        return row

    def show(self, row):
        if len(self.rows) == 1:
            print(f"{'time':>6}  {'connections':>11}  {'per s':>6}  {'lost':>6}  {'RSS (MiB)':>9}  {'fds':>6}  {'flows':>6}  {'conntrack':>9}  {'TIME-WAIT':>9}  ")
        last = self.rows[-2] if len(self.rows) > 1 else row
        rate = (row["connections"] - last["connections"]) / ((row["seconds"] - last["seconds"]) or 1)
        print(
            f"{row['seconds']:6.0f}  {row['connections']:11}  {rate:6.0f}  {row['lost']:6}  {row['rss'] / MIB:9.2f}  {row['fds']:6}  {row['flows']:6}"
            f"  {row['conntrack']:9}  {row['time_wait']:9}  {row['note']} {row['warnings']}".rstrip(), flush=True,
        )

    def load(self, note, *args):
        """Runs the load generator to its end with a sample every so often, then waits until the daemon is at rest again."""
        load = Load(self.rig, *args)
        try:
            last = time.monotonic()
            while load.running():
                time.sleep(0.2)
                if time.monotonic() - last >= self.options.every:
                    last = time.monotonic()
                    self.sample("", load)
            done = load.end()
        finally:
            load.child.kill()
            load.child.wait()
        for name in self.before:
            self.before[name] += done[name]
        until(60, lambda: self.flows() == 0, lambda: f"{self.flows()} flows are left 60 s after the last connection was closed")
        time.sleep(REST)
        return self.sample(note)

    def flows(self):
        counters = self.rig.lab.status()["statistics"]
        return counters["flows-opened"] - counters["flows-closed"]

    def count(self, total):
        """So many connections; the daemon is to hold no more after them than after the first 2 %."""
        first = max(total // 50, 1)
        start = self.load("rest, after 2 %", "-n", str(AT_ONCE), "-c", str(first))
        end = self.load("rest, at the end", "-n", str(AT_ONCE), "-c", str(total - first))
        expect(not end["lost"], lambda: f"{end['lost']} connections were lost: {end['refused']} refused, {end['silent']} without an answer")
        expect(end["connections"] == total, lambda: f"only {end['connections']} of {total} connections")
        grown = end["rss"] - start["rss"]
        expect(grown <= RSS_MARGIN, lambda: f"RSS grew by {grown / MIB:.1f} MiB, more than {RSS_MARGIN / MIB:.0f}, after the first 2 % of the connections")
        more = end["fds"] - start["fds"]
        expect(more <= FDS_MARGIN, lambda: f"{more} descriptors more than after the first 2 % of the connections")

    def rate(self, rate, seconds):
        """New connections at a fixed rate. With the kernel's own range of ports they may be refused, but then the daemon must say why."""
        end = self.load("rest, at the end", "-n", str(PACED), "-r", str(rate), "-d", str(seconds))
        wanted, started = rate * seconds, end["connections"] + end["lost"]
        other = end["lost"] - end["refused"]
        print(
            f"{end['lost']} of {started} connections were lost: {end['refused']} refused, {end['silent']} without an answer in time,"
            f" {other - end['silent']} otherwise"
        )
        if self.options.kernel_ports:
            expect(not other, "with no port left, a connection is to be refused at once, not lost otherwise")
            expect(not end["refused"] or PORTS_WARNING in self.warnings, f"connections were refused, but no health warning '{PORTS_WARNING}' came")
        else:
            expect(not end["lost"], "connections were lost")
        expect(started >= 0.99 * wanted, f"only {started} of {wanted} connections could be started in time")

    def all(self):
        options = self.options
        self.vpn.start()
        try:
            self.vpn.check()
            self.begin = time.monotonic()
            self.sample("rest, before")
            if options.rate:
                self.rate(options.rate, options.seconds)
            else:
                self.count(options.connections)
            self.vpn.check()
        finally:
            self.tell()
            self.vpn.stop()

    def tell(self):
        if full := [row for row in self.rows if row["conntrack"] > 0.98 * row["conntrack_max"]]:
            print(f"the connection tracking table was full after {full[0]['connections']} connections ({full[0]['conntrack_max']} entries): the kernel drops packets then")
        for code, text in self.warnings.items():
            print(f"health warning {code}: {text}")
        if len(self.rows) > 1:
            first, last = self.rows[0], self.rows[-1]
            changed = {name: last[name] - first[name] for name in last if "-" in name and last[name] != first[name]}
            print("counters:", ", ".join(f"{name} {value}" for name, value in changed.items()))
            print(f"{(last['cpu_seconds'] - first['cpu_seconds']) / max(last['connections'] + last['lost'], 1) * 1e6:.1f} µs of the daemon's CPU for each connection")
        if self.options.csv and self.rows:
            with open(self.options.csv, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--congestion", default="reno")
    parser.add_argument("--connections", type=int, default=10_000_000)
    parser.add_argument("--rate", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--kernel-ports", action="store_true")
    parser.add_argument("--every", type=float, default=10)
    parser.add_argument("--csv")
    options = parser.parse_args()
    end_on_signals()
    ports = KERNEL_PORTS if options.kernel_ports else {}
    try:
        expect_nothing_left(LAB, options.bin)
        what = f"{options.rate} per second for {options.seconds} s" if options.rate else f"{options.connections} connections, {AT_ONCE} at once"
        print(f"{today()}, {machine()}; congestion control {options.congestion}; other load before: {busy_share():.0%}")
        print(f"soak: {what}; {'the kernel default' if ports else 'a wide'} range of ports in the machine under test", flush=True)
        rig = Rig(LAB, options, ports)
        try:
            rig.up()
            Soak(rig, options).all()
        finally:
            rig.lab.down()
    except (Failed, subprocess.SubprocessError) as error:
        sys.exit(f"soak: FAILED: {error}")
    print("soak: ok")


if __name__ == "__main__":
    main()
