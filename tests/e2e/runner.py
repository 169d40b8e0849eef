"""What the runners of end-to-end tests share: one test from a clean machine to a clean machine, and what is said about it."""

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback

from lab import Failed, Skipped, equal


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


class Results:
    """Counts, and prints as it goes."""

    def __init__(self, logs):
        self.logs, self.passed, self.failed, self.skipped = logs, 0, 0, 0
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def run(self, lab, name, promise, test):
        """`test()` returns a failure's text or None. After a failure the lab is a new one."""
        start = time.monotonic()
        try:
            failure = test()
        except Skipped as reason:
            self.skipped += 1
            print(f"skipped  {name}: {reason}", flush=True)
            return
        took = f"{time.monotonic() - start:.1f} s"
        if not failure:
            self.passed += 1
            print(f"ok       {name} ({took})", flush=True)
            return
        self.failed += 1
        target = keep_logs(lab, self.logs, name)
        print(f"FAILED   {name} ({took}): {promise}", flush=True)
        for line in failure.splitlines()[:40]:
            print(f"  | {line}")
        for line in lab.daemon_log().splitlines()[-15:]:
            print(f"  proxyvpnd| {line}")
        print(f"  (logs: {target})", flush=True)
        # a machine that a failure left in disorder must not fail the next test
        lab.down()
        lab.up()

    def broken(self, what, error):
        self.failed += 1
        print(f"FAILED   {what}: the lab: {error}", flush=True)

    def status(self):
        """Prints the last line; the exit status."""
        print(f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped")
        return 1 if self.failed or not self.passed else 0
