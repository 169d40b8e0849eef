"""Tests of the bench itself: what it makes of figures, and its programs in C against each other in a network namespace of their own.

test_bench.py BIN-DIR; without the right to make a namespace the programs are skipped.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "e2e")]
import report  # noqa: E402
from rig import left_over  # noqa: E402
from tools import alive  # noqa: E402

AS_ROOT = [] if os.geteuid() == 0 else ["--user"]
NAMESPACE = ["unshare", *AS_ROOT, *(["--map-root-user"] if AS_ROOT else []), "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
TITLES = {"connect": "CONNECT client", "tuns": "two bare TUNs", "proxyvpn": "proxyvpn", "redsocks": "redsocks", "tun2proxy": "tun2proxy"}
GOALS = 24


def judged(runs, skipped=None, crowd=0):
    return {goal["name"]: goal for goal in report.judge(runs, skipped or {}, TITLES, crowd)}


class Goals(unittest.TestCase):
    NAME = "bulk down, 1 flow, ÷ CONNECT client"

    def bulk(self, vpn, tuns):
        return judged({"connect": [{"down1_gbps": 10.0}], "tuns": [{"down1_gbps": tuns}], "proxyvpn": [{"down1_gbps": vpn}]})[self.NAME]

    def test_every_goal_is_there_with_its_fields(self):
        self.assertEqual(len(judged({})), GOALS)
        for goal in [*judged({}).values(), *judged({name: [{}] for name in TITLES}).values()]:
            self.assertIsNone(goal["value"])
            self.assertIsNone(goal["met"])
            self.assertTrue(goal["why"], goal["name"])
            self.assertGreater(goal["limit"], 0)

    def test_met_is_the_plain_truth_whatever_the_floor_is(self):
        self.assertIs(self.bulk(8.0, 9.0)["met"], True)
        self.assertIs(self.bulk(8.0, 1.0)["met"], True)
        self.assertIs(self.bulk(7.9, 9.0)["met"], False)
        self.assertIs(self.bulk(7.9, 1.0)["met"], False)

    def test_a_goal_that_the_floor_misses_is_marked(self):
        self.assertEqual(report.verdict(self.bulk(7.0, 7.5)), "not reached, nor by two bare TUNs")
        self.assertEqual(report.verdict(self.bulk(7.0, 8.5)), "NOT reached")
        self.assertEqual(self.bulk(7.0, 7.5)["floor"], 0.75)

    def test_a_ratio_is_that_of_one_repetition(self):
        runs = {"connect": [{"wwr_p50": 10.0}, {"wwr_p50": 100.0}, {}], "proxyvpn": [{"wwr_p50": 10.0}, {"wwr_p50": 300.0}, {"wwr_p50": 1.0}]}
        goal = judged(runs)["write-write-read, p50, ÷ CONNECT client"]
        self.assertEqual((goal["value"], goal["min"], goal["max"], goal["n"], goal["met"]), (2.0, 1.0, 3.0, 2, True))

    def test_fewer_wake_ups_than_one_is_less_than_one(self):
        self.assertIs(judged({"proxyvpn": [{"rest_wakes": 1}]})["wake-ups per second at rest"]["met"], False)
        self.assertIs(judged({"proxyvpn": [{"rest_wakes": 0}]})["wake-ups per second at rest"]["met"], True)

    def test_fewer_idle_connections_are_no_figure_of_the_50_000(self):
        runs, name = {"proxyvpn": [{"crowd_held": 18_000, "crowd_down_ratio": 1.0}]}, "idle connections held, of 50,000"
        goals = judged(runs, {"50,000 idle connections": "few descriptors"}, 18_000)
        for goal in name, "bulk down beside 50,000 idle ÷ without":
            self.assertEqual((goals[goal]["value"], goals[goal]["met"], goals[goal]["why"]), (None, None, "few descriptors"))
        whole = judged({"proxyvpn": [{"crowd_held": 50_000}]}, {}, 50_000)[name]
        self.assertEqual((whole["value"], whole["met"], whole["why"]), (50_000, True, None))

    def test_what_was_skipped_is_the_reason(self):
        goal = judged({"proxyvpn": [{"down1_cpu": 0.5}], "redsocks": []}, {"redsocks": "not installed"})["CPU per GB, down, ÷ redsocks"]
        self.assertEqual(goal["why"], "redsocks: not installed")
        self.assertEqual(report.verdict(goal), "not measured: redsocks: not installed")

    def test_tables_show_every_figure(self):
        runs = {"tuns": [{"idle_held": 10_000, "crowd_held": 18_000}], "proxyvpn": [{"idle_held": 10_000, "closed_port": "refused"}]}
        text = report.table(["two bare TUNs", "proxyvpn"], [report.summary(run) for run in runs.values()], 18_000)
        self.assertIn("idle connections held, of 18,000", text)
        self.assertIn("refused", text)
        self.assertEqual(len(report.goal_table(report.judge(runs, {}, TITLES, 0)).splitlines()), GOALS + 1)


class LeftOver(unittest.TestCase):
    def test_a_process_of_an_earlier_run_is_found(self):
        with tempfile.TemporaryDirectory(prefix="proxyvpn-unit.") as earlier, tempfile.TemporaryDirectory(prefix="proxyvpn-unit.") as own:
            for folder, env, found in (earlier, {}, True), (own, {}, False), (own, {"PVLAB_ID": "unit"}, True), (own, {"PVLAB_ID": "unit2"}, False):
                program = Path(folder, "sleep")
                program.write_bytes(Path("/bin/sleep").read_bytes())
                program.chmod(0o755)
                child = subprocess.Popen([program, "60"], env=env)
                try:
                    end = time.monotonic() + 5  # a program that has just started has no environment yet
                    while (seen := any(entry.startswith(f"{child.pid} ") for entry in left_over("unit", own))) != found and time.monotonic() < end:
                        time.sleep(0.02)
                    self.assertEqual(seen, found)
                finally:
                    child.kill()
                    child.wait()
                self.assertFalse(alive(child.pid))


@unittest.skipUnless(subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0, "no network namespace can be made here")
class Programs(unittest.TestCase):
    """Server and relay on 127.0.0.1; the load generator comes straight, by CONNECT and by SOCKS5."""

    WAYS = (), ("-x", "http:127.0.0.1:1080"), ("-x", "socks5:127.0.0.1:1080")

    @classmethod
    def setUpClass(cls):
        script = 'ip link set lo up && "$0/server" 9000 2 & "$0/relay" 1080 2 & echo $$ && wait'
        cls.space = subprocess.Popen([*NAMESPACE, "sh", "-c", script, cls.bin], stdout=subprocess.PIPE, text=True)
        cls.space.stdout.readline()
        children = Path(f"/proc/{cls.space.pid}/task/{cls.space.pid}/children")
        cls.inside = children.read_text(encoding="ascii").split()[0]
        end = time.monotonic() + 10
        while any(cls.connect(port) != "open" for port in (9000, 1080)) and time.monotonic() < end:
            time.sleep(0.02)

    @classmethod
    def tearDownClass(cls):
        cls.space.kill()
        cls.space.wait()
        cls.space.stdout.close()

    @classmethod
    def run_load(cls, what, *args, port=9000, stdin=None, limit=None):
        enter = ["nsenter", "--target", cls.inside, "--net", *AS_ROOT, *(["--preserve-credentials"] if AS_ROOT else [])]
        before = ["prlimit", f"--nofile={limit}"] if limit else []
        command = [*enter, *before, f"{cls.bin}/load", what, "-t", f"127.0.0.1:{port}", *args]
        return subprocess.run(command, input=stdin or "", capture_output=True, text=True, timeout=60, check=False)

    @classmethod
    def connect(cls, port):
        done = cls.run_load("conns", "-n", "1", "-c", "1", port=port) if port == 9000 else cls.run_load("origin", "-x", "http:127.0.0.1:1080")
        return "open" if done.returncode == 0 and '"errors": 1' not in done.stdout else "closed"

    def load(self, what, *args, **options):
        done = self.run_load(what, *args, **options)
        self.assertEqual(done.returncode, 0, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def test_bytes_arrive_by_every_way(self):
        for way in self.WAYS:
            for mode in "DU":
                with self.subTest(way=way, mode=mode):
                    (done,) = self.load("bulk", *way, "-v", "-m", mode, "-n", "4", "-d", "0.1")
                    self.assertGreater(done["bytes"], 1_000_000)

    def test_so_many_connections_are_so_many(self):
        for way in self.WAYS:
            with self.subTest(way=way):
                (done,) = self.load("conns", *way, "-n", "16", "-c", "500")
                self.assertEqual((done["total"], done["errors"]), (500, 0))

    def test_a_rate_is_kept(self):
        (*_, done) = self.load("conns", "-n", "64", "-r", "200", "-d", "1", "-p")
        self.assertEqual(done["errors"], 0)
        self.assertLessEqual(done["total"], 200)  # fewer only on a machine that is too busy
        self.assertGreater(done["total"], 0)
        self.assertGreaterEqual(done["seconds"], 1)

    def test_refused_connections_are_counted_as_that(self):
        (done,) = self.load("conns", "-n", "4", "-c", "20", port=9)
        self.assertEqual((done["total"], done["errors"], done["refused"], done["silent"]), (0, 20, 20, 0))

    def test_a_proxy_refuses_what_it_cannot_reach(self):
        for way in self.WAYS[1:]:
            (done,) = self.load("conns", *way, "-n", "4", "-c", "20", port=9)
            self.assertEqual((done["total"], done["errors"], done["refused"]), (0, 20, 0))

    def test_idle_connections_are_used_again(self):
        for way in self.WAYS:
            opened, used = self.load("idle", *way, "-n", "100")
            self.assertEqual((opened["open"], used["alive"]), (100, 100))


if __name__ == "__main__":
    Programs.bin = os.path.abspath(sys.argv.pop(1))
    unittest.main()
