"""The matrix' own tests: what counts as passed, and that nothing does whose probe is broken. No root, no network."""

import collections
import os
import sys
import unittest

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "e2e")]
import matrix  # noqa: E402
import probes  # noqa: E402
import wire  # noqa: E402
from scenarios import STEERED, UNSTEERED, Column  # noqa: E402

NAMES = [one.name for one in probes.PROBES]


class Run:
    """A column as run.py leaves it, in which everything went well."""

    def __init__(self, name, kind):
        self.name, self.scenario = name, Column(name, name, kind, None)
        self.windows, self.opened, self.without_tunnel, self.failures = [], [], [], []
        self.leaks, self.seen, self.skipped, self.seconds = {}, {}, "", 1.0
        self.tried = {one: collections.Counter({"": 3}) for one in NAMES}
        if kind == "guard":
            self.windows = [(1, 2, True)]
        else:
            self.opened = [(1, 2)]
            self.seen = {one: 3 for one in NAMES if kind == "anti" or one in UNSTEERED}


class Counting(unittest.TestCase):
    def setUp(self):
        self.open, self.steered, self.guard, self.again = Run("open", "anti"), Run("free", "anti-steered"), Run("kill", "guard"), Run("again", "anti")

    def matrix(self, lost=""):
        return matrix.Matrix([self.open, self.steered, self.guard, self.again], {}, lost)

    def test_all_is_well(self):
        got = self.matrix()
        self.assertEqual((got.passed, got.failed, got.skipped), (4 * len(NAMES) + 1, 0, 0))

    def test_a_leak_fails(self):
        for name in "udp", wire.OTHER:
            self.guard.leaks = {name: []}
            self.assertEqual(self.matrix().failed, 1)

    def test_a_probe_that_is_broken_fails_and_its_row_counts_for_nothing(self):
        for column in self.open, self.again:
            well = self.matrix().passed
            del column.seen["udp"]
            got = self.matrix()
            self.assertEqual((got.failed, got.cells["udp", "kill"]), (1, matrix.VOID))
            self.assertLess(got.passed, well - 1)
            column.seen["udp"] = 1

    def test_without_the_kill_switch_udp_must_leave_and_steered_tcp_must_not(self):
        self.steered.seen[STEERED[0]] = 1
        self.assertEqual(self.matrix().failed, 1)
        del self.steered.seen[UNSTEERED[0]]
        self.assertEqual(self.matrix().failed, 2)

    def test_without_anti_test_nothing_counts(self):
        got = matrix.Matrix([self.guard], {}, "")
        self.assertEqual((got.passed, got.cells["udp", "kill"]), (1, matrix.VOID))

    def test_a_documented_limit_is_counted_apart(self):
        limit = next(name for name, column in matrix.DOCUMENTED if column == "*")
        self.guard.leaks = {limit: []}
        got = self.matrix()
        self.assertEqual((got.failed, got.limits, got.passed), (0, 1, 4 * len(NAMES)))

    def test_a_column_that_broke_off_fails(self):
        self.guard.failures.append("the capture was blind")
        self.assertEqual(self.matrix().failed, 1)
        self.guard.failures.clear()
        self.assertEqual(self.matrix(lost="12 packets dropped").failed, 1)

    def test_a_protocol_that_the_kernel_does_not_have_is_skipped(self):
        for column in self.open, self.again:
            del column.seen["udplite"]
            column.tried["udplite"] = collections.Counter({"EPROTONOSUPPORT": 3})
        got = self.matrix()
        self.assertEqual((got.failed, got.skipped), (0, 1))

    def test_what_was_not_tried_is_not_passed(self):
        before = self.matrix().passed
        del self.guard.tried["udp"]
        self.assertEqual(self.matrix().passed, before - 1)


if __name__ == "__main__":
    unittest.main()
