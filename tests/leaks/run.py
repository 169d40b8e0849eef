"""Nothing leaks: probes × states and faults, judged at the far end of the wire.

run.py [--full] [--only TEXT] [--list] [--json FILE] [--logs DIR] [--bin-dir DIR]. Needs root; the programs must be built. Everything happens
in network namespaces. Ends with 'N passed, N failed, N skipped'; one is a probe in a column.
"""

import argparse
import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

sys.dont_write_bytecode = True  # root leaves nothing among the sources
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "e2e")]
import matrix  # noqa: E402
import probes  # noqa: E402
import scenarios  # noqa: E402
import wire  # noqa: E402
from lab import ROOT, Failed, Lab, Skipped  # noqa: E402
from world import World  # noqa: E402


class Column:
    """What happened in one column."""

    def __init__(self, scenario):
        self.scenario, self.name = scenario, scenario.name
        self.probes = [one.name for one in probes.PROBES]
        self.windows, self.opened, self.without_tunnel, self.failures = [], [], [], []
        self.tried, self.leaks, self.seen = {}, {}, {}
        self.phases = set()  # of connecting, in which the daemon stood still
        self.skipped, self.seconds = "", 0.0

    def count(self, answer):
        for name, counts in answer.items():
            mine = self.tried.setdefault(name, collections.Counter())
            mine.update(counts)


class Timed(World):
    """The world of a run: how often things are done depends on --full."""

    def __init__(self, lab, keep, full):
        super().__init__(lab, keep)
        self.full = full

    def times(self, quick, full):
        return full if self.full else quick

    @staticmethod
    def has(tool):
        return shutil.which(tool) is not None


OFTEN = ("kill", "segv", "replaced")  # columns that do it often by themselves


class OverTime(Exception):
    """The column's time is over."""


def alarm(_signal, _frame):
    raise OverTime


def one(world, scenario, limit):
    column = world.column = Column(scenario)
    start = time.monotonic()
    signal.alarm(limit)
    try:
        for _ in range(1 if scenario.name in OFTEN or scenario.kind != "guard" else world.times(1, 5)):
            scenario.run(world)
    except Skipped as why:
        column.skipped = str(why)
    except OverTime:
        column.failures.append(f"not done after {limit} s")
    except Failed as error:
        column.failures.append(str(error))
    except Exception:  # a defect of the test is a failure like any other
        column.failures.append(traceback.format_exc())
    finally:
        signal.alarm(0)
    if not column.skipped:
        try:
            world.judge(column)
        except Failed as error:
            column.failures.append(str(error))
    column.seconds = time.monotonic() - start
    return column


def chosen_columns(columns, text):
    """With the anti-tests, without which no row counts."""
    return [one for one in columns if text in one.name or one.kind == "anti"]


def keep(column, logs, lab):
    """The packets of each leak, as a capture."""
    for name, packets in column.leaks.items():
        path = os.path.join(logs, f"{column.name}-{name}.pcap")
        with open(path, "wb") as file:
            file.write(wire.pcap(packets[:100]))
    if column.failures:
        shutil.copy(f"{lab.dir}/logs/proxyvpnd.log", os.path.join(logs, f"{column.name}-proxyvpnd.log"))


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="every fault as often as it takes to be sure")
    parser.add_argument("--only", default="", help="columns whose name holds this text, and the anti-tests")
    parser.add_argument("--list", action="store_true", help="list probes and columns")
    parser.add_argument("--json", metavar="FILE", help="write the results to a file, too")
    parser.add_argument("--logs", default="/tmp/proxyvpn-leaks-logs")
    parser.add_argument("--bin-dir", default=os.path.join(os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target"), "release"))
    return parser


def measure(options, columns, make):
    """Runs the columns in the world that `make` makes of a stage; prints the matrix; the exit status."""
    if options.list:
        for probe in probes.PROBES:
            print(f"probe   {probe.name}: {probe.text}")
        for scenario in columns:
            print(f"column  {scenario.name}: {scenario.text}")
        return 0
    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shutil.rmtree(options.logs, ignore_errors=True)
    os.makedirs(options.logs)
    done, lost = [], ""
    with tempfile.TemporaryDirectory(prefix="proxyvpn-leaks-") as stage:
        os.chmod(stage, 0o755)
        subprocess.run([f"{ROOT}/scripts/install.sh", "--quiet", "--bin-dir", options.bin_dir, "--destdir", stage], check=True)
        world = make(stage)
        try:
            world.up()
            world.start()
            for scenario in chosen_columns(columns, options.only):
                column = one(world, scenario, 1800 if options.full else 120)
                done.append(column)
                keep(column, options.logs, world.lab)
                print(matrix.progress(column), flush=True)
                if column.failures:
                    recover(world)
            lost = world.lost_packets()
        except Failed as error:
            lost = f"the lab: {error}"
        finally:
            world.down()
    result = matrix.Matrix(done, world.broken, lost)
    result.show(options.logs)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result.data(), file, indent=1)
    print(f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped")
    return 1 if result.failed or not result.passed else 0


def main():
    options = arguments().parse_args()
    return measure(options, scenarios.COLUMNS, lambda stage: Timed(Lab(f"leaks-{os.getpid()}", stage), options.logs, options.full))


def recover(world):
    """After a column that broke off half-way: a world as at the start."""
    world.down()
    world.__init__(world.lab, world.keep, world.full)
    world.up()
    world.start()


if __name__ == "__main__":
    sys.exit(main())
