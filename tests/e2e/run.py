"""Runs the end-to-end tests: run.py [--only TEXT] [--list] [--logs DIR] [--bin-dir DIR]. Needs root; the programs must be built.

Each file next to this one is a set of promises with a lab of its own. After each test the network of the machine under test must be
what it was before it, whatever the test is about. Ends with 'N passed, N failed, N skipped'.
"""

import argparse
import importlib
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
sys.path.insert(0, HERE)
import lab as lab_module  # noqa: E402
from lab import ROOT, Failed, Lab, Skipped, equal  # noqa: E402

HELPERS = {"lab", "run", "messages", "page", "proxy", "rawbus", "steps"}


class OverTime(Exception):
    """The test's time is over."""


def alarm(_signal, _frame):
    raise OverTime


def one(lab, function, seconds, daemon):
    """One test with its daemon, from a clean machine to a clean machine. Returns the failure's text or None."""
    failure = None
    before = lab.state()
    signal.alarm(seconds)
    try:
        if daemon:
            lab.daemon(*(["--root"] if daemon == "root" else []))
        function(lab)
    except Skipped:
        raise
    except OverTime:
        failure = f"not done after {seconds} s"
    except Failed as error:
        failure = str(error)
    except Exception:  # a defect of the test is a failure like any other
        failure = traceback.format_exc()
    finally:
        signal.alarm(0)
    try:
        signal.alarm(45)
        if lab.daemon_pid():
            lab.run("app", "alice", "proxyctl", "disconnect", check=False, timeout=20)
        lab.daemon_stop()
        if not failure:
            equal(before, lab.state(), "the network is not what it was before the test")
    except (OverTime, Failed) as error:
        failure = failure or f"cleaning up after the test: {error or 'not done after 45 s'}"
    finally:
        signal.alarm(0)
    return failure


def keep_logs(lab, logs, name):
    target = os.path.join(logs, name)
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    subprocess.run(["cp", "-r", f"{lab.dir}/logs/.", target], check=False)
    subprocess.run(["cp", f"{lab.dir}/wire.pcap", target], check=False)
    try:
        with open(os.path.join(target, "network.txt"), "w", encoding="utf-8") as file:
            file.write(lab.state())
    except Failed:
        pass
    return target


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="run tests whose FILE.NAME holds this text")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--logs", default="/tmp/proxyvpn-e2e-logs")
    parser.add_argument("--bin-dir", default=os.path.join(os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target"), "release"))
    options = parser.parse_args()
    files = sorted(name[:-3] for name in os.listdir(HERE) if name.endswith(".py") and name[:-3] not in HELPERS)
    passed, failed, skipped = 0, 0, 0
    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="proxyvpn-e2e-") as stage:
        os.chmod(stage, 0o755)
        if not options.list:
            subprocess.run(
                [f"{ROOT}/scripts/install.sh", "--quiet", "--bin-dir", options.bin_dir, "--destdir", stage], check=True,
            )
        for file in files:
            lab_module.TESTS.clear()
            importlib.import_module(file)
            chosen = [entry for entry in lab_module.TESTS if options.only in f"{file}.{entry[0].__name__}"]
            if options.list:
                for function, promise, _, _ in chosen:
                    print(f"{file}.{function.__name__}: {promise}")
            if options.list or not chosen:
                continue
            lab = Lab(f"e2e-{os.getpid()}-{file}", stage)
            try:
                lab.up()
                for function, promise, seconds, daemon in chosen:
                    name, start = f"{file}.{function.__name__}", time.monotonic()
                    try:
                        failure = one(lab, function, seconds, daemon)
                    except Skipped as reason:
                        skipped += 1
                        print(f"skipped  {name}: {reason}", flush=True)
                        continue
                    took = f"{time.monotonic() - start:.1f} s"
                    if not failure:
                        passed += 1
                        print(f"ok       {name} ({took})", flush=True)
                        continue
                    failed += 1
                    target = keep_logs(lab, options.logs, name)
                    print(f"FAILED   {name} ({took}): {promise}", flush=True)
                    for line in failure.splitlines()[:40]:
                        print(f"  | {line}")
                    for line in lab.daemon_log().splitlines()[-15:]:
                        print(f"  proxyvpnd| {line}")
                    print(f"  (logs: {target})", flush=True)
                    # a machine that a failure left in disorder must not fail the next test
                    lab.down()
                    lab.up()
            except (Failed, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"FAILED   {file}: the lab: {error}", flush=True)
            finally:
                lab.down()
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not (passed or options.list) else 0


if __name__ == "__main__":
    sys.exit(main())
