"""Runs the tests of the TorVM backend: run.py [--only TEXT] [--list] [--logs DIR] [--bin-dir DIR] [--image DIR]. Needs root; programs and
image must be built. Ends with 'N passed, N failed, N skipped'.

A test whose daemon is "connected" gets a machine that is connected, and leaves it so: such tests share one VM. Around each other test,
and around such a row, the network of the machine under test must stay what it was.
"""

import argparse
import functools
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback

sys.dont_write_bytecode = True  # root leaves nothing among the sources
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "e2e")]
import lab as lab_module  # noqa: E402
from lab import ROOT, Failed, Skipped, equal  # noqa: E402
from runner import OverTime, Results, one  # noqa: E402
from torlab import TorLab  # noqa: E402

FILES = ["network", "through", "faults", "disk", "hostile", "ways", "transports"]
BEGIN_SECONDS, END_SECONDS = 120, 45


class Row:
    """Tests that share one connection."""

    def __init__(self, lab):
        self.lab, self.before = lab, None

    def begin(self):
        """A failure's text, or None."""
        if self.lab.daemon_pid():
            return None
        self.before = self.lab.state()

        def connect():
            self.lab.daemon()
            self.lab.connect_tor()

        return within(BEGIN_SECONDS, connect)

    def run(self, function, seconds):
        return self.begin() or within(seconds, lambda: function(self.lab)) or within(10, lambda: self.lab.check_state("connected"))

    def end(self):
        def disconnect():
            self.lab.disconnect()
            self.lab.daemon_stop()
            equal(self.before, self.lab.state(), "the network is not what it was before the connection")

        return within(END_SECONDS, disconnect)


def within(seconds, action):
    signal.alarm(seconds)
    try:
        action()
    except Skipped:
        raise
    except OverTime:
        return f"not done after {seconds} s"
    except Failed as error:
        return str(error)
    except Exception:  # a defect of the test is a failure like any other
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def run(lab, chosen, results):
    row = Row(lab)

    def end():
        if lab.daemon_pid():
            results.run(lab, "row.end", "after a row of tests that share a VM the network is what it was", row.end)

    for name, (function, promise, seconds, daemon) in chosen:
        if daemon == "connected":
            test = functools.partial(row.run, function, seconds)
        else:
            end()
            test = functools.partial(one, lab, function, seconds, daemon)
        results.run(lab, name, promise, test)
    end()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="run tests whose FILE.NAME holds this text")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--logs", default="/tmp/proxyvpn-torvm-logs")
    target = os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target")
    parser.add_argument("--bin-dir", default=f"{target}/release")
    parser.add_argument("--image", default=f"{target}/torvm-image", help="of scripts/build-torvm-image.sh")
    options = parser.parse_args()
    chosen = []
    for file in FILES:
        lab_module.TESTS.clear()
        importlib.import_module(file)
        chosen += [(f"{file}.{entry[0].__name__}", entry) for entry in lab_module.TESTS if options.only in f"{file}.{entry[0].__name__}"]
    if options.list:
        for name, (_, promise, _, _) in chosen:
            print(f"{name}: {promise}")
        return 0
    results = Results(options.logs)
    with tempfile.TemporaryDirectory(prefix="proxyvpn-torvm-") as stage:
        os.chmod(stage, 0o755)
        subprocess.run([f"{ROOT}/scripts/install.sh", "--quiet", "--bin-dir", options.bin_dir, "--destdir", stage], check=True)
        lab = TorLab(f"torvm-{os.getpid()}", stage, options.image)
        try:
            lab.up()
            run(lab, chosen, results)
        except (Failed, subprocess.TimeoutExpired) as error:
            results.broken("torvm", error)
        finally:
            lab.down()
    return results.status()


if __name__ == "__main__":
    sys.exit(main())
