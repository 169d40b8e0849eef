"""The state disk: what Tor keeps from one start to the next, and what becomes of a broken one."""

import os
import re
import subprocess
import time

from lab import equal, expect, test, until


def guards(lab):
    """What Tor's state file on the disk says about guards."""
    text = subprocess.run(["debugfs", "-R", "cat /tor/state", lab.disk()], capture_output=True, text=True).stdout
    # without what is counted
    return {re.search(r"rsa_id=(\w+)", line)[1]: re.search(r"sampled_on=(\S+)", line)[1] for line in text.splitlines() if line.startswith("Guard in=default")}


def check(lab):
    return subprocess.run(["e2fsck", "-fn", lab.disk()], capture_output=True, text=True)


@test("disconnect: the VM powers down in time with a clean disk, and the next start keeps its guards", seconds=200)
def kept(lab):
    before, said = lab.state(), len(lab.daemon_log())
    found = []
    for _ in range(2):
        lab.connect_tor()
        lab.fetch_by_exit()
        begin = time.monotonic()
        lab.disconnect()
        equal(before, lab.state(), "the network is not what it was")
        until(8, lambda: lab.qemu() is None, "QEMU is left")
        took = time.monotonic() - begin
        expect(took < 5, f"the VM took {took:.1f} s to power down")
        done = check(lab)
        expect(done.returncode == 0, f"the disk is not clean: {done.stdout}")
        found.append(guards(lab))
    expect(found[0], "Tor has no guards on the disk")
    expect(found[0].items() <= found[1].items(), f"other guards: {found[0]}, then {found[1]}")
    expect("did not power off by itself" not in lab.daemon_log()[said:], "the VM was ended by force")


def damaged(lab, damage, words=""):
    """A connection made and ended, the disk damaged, connected again. Returns the guards of before."""
    lab.connect_tor()
    lab.disconnect()
    until(8, lambda: lab.qemu() is None, "QEMU is left")
    before, said = guards(lab), len(lab.daemon_log())
    damage()
    lab.connect_tor()
    lab.fetch_by_exit()
    expect(words in lab.daemon_log()[said:], f"the log does not say '{words}'")
    lab.disconnect()
    until(8, lambda: lab.qemu() is None, "QEMU is left")
    expect(check(lab).returncode == 0, "the disk is not clean")
    return before


@test("a full state disk: made free but for the guards, and it connects", seconds=200)
def full(lab):
    def fill():
        file = f"{lab.dir}/filler"
        subprocess.run(["sh", "-ec", f"head -c 60000000 /dev/urandom >{file}; debugfs -w -R 'write {file} tor/filler' {lab.disk()}; rm {file}"],
                       capture_output=True, check=True)

    before = damaged(lab, fill)
    expect(before and before.items() <= guards(lab).items(), "a full disk cost the guards")


@test("a corrupt state disk: made anew, and it connects", seconds=200)
def corrupt(lab):
    def spoil():
        with open(lab.disk(), "r+b") as file:
            file.write(os.urandom(4_000_000))

    damaged(lab, spoil, "the state disk was broken and is made anew")
