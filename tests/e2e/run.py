"""Runs the end-to-end tests: run.py [--only TEXT] [--list] [--logs DIR] [--bin-dir DIR]. Needs root; the programs must be built.

Each file next to this one is a set of promises with a lab of its own. After each test the network of the machine under test must be
what it was before it, whatever the test is about. Ends with 'N passed, N failed, N skipped'.
"""

import argparse
import functools
import importlib
import os
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True  # root leaves nothing among the sources
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import lab as lab_module  # noqa: E402
from lab import ROOT, Failed, Lab  # noqa: E402
from runner import Results, one  # noqa: E402

HELPERS = {"lab", "run", "messages", "page", "proxy", "rawbus", "runner", "steps"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="run tests whose FILE.NAME holds this text")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--logs", default="/tmp/proxyvpn-e2e-logs")
    parser.add_argument("--bin-dir", default=os.path.join(os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target"), "release"))
    options = parser.parse_args()
    files = sorted(name[:-3] for name in os.listdir(HERE) if name.endswith(".py") and name[:-3] not in HELPERS)
    results = Results(options.logs)
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
                    results.run(lab, f"{file}.{function.__name__}", promise, functools.partial(one, lab, function, seconds, daemon))
            except (Failed, subprocess.TimeoutExpired) as error:
                results.broken(file, error)
            finally:
                lab.down()
    return 0 if options.list else results.status()


if __name__ == "__main__":
    sys.exit(main())
