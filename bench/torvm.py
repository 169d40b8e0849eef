"""How fast the TorVM is: torvm.py --stage DIR --image DIR [--quick] [--json FILE]. Needs root; see scripts/bench.sh --torvm.

Everything is in the lab of the tests (tests/torvm), with its private Tor network, whose relays share this machine's processors with the
virtual machine: what is measured is a lower bound. Ends with 'bench: ok'.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True  # root leaves nothing among the sources
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [f"{ROOT}/tests/e2e", f"{ROOT}/tests/torvm"]
import guest  # noqa: E402
from image import BUSYBOX, altered, content  # noqa: E402
from lab import WEB, Failed, until  # noqa: E402
from torlab import PROFILE, TorLab  # noqa: E402

MIB = 1 << 20
# Tor's place in the guest: bytes for whoever connects, without Tor.
SOURCE = """#!/usr/bin/busybox sh
while :; do /usr/bin/busybox nc -l -p 9095 </dev/zero >/dev/null 2>&1; done
"""


def starts(image, times):
    """Seconds from QEMU's start to the guest's init, its network, and Tor's start."""
    seen = {"init": [], "network": [], "tor": []}
    with tempfile.TemporaryDirectory() as folder:
        disk = guest.blank(f"{folder}/disk")
        for _ in range(times):
            with guest.Machine(image, folder, disk, memory=128) as machine:
                machine.wait("tor", 60)
                for at, said in machine.said:
                    if said["status"] in seen:
                        seen[said["status"]].append(at)
    return {name: statistics.median(all_) for name, all_ in seen.items()}


def connects(lab, times):
    """Seconds from `proxyctl connect` to its end, and from QEMU's start to 100 %; the last stays connected."""
    whole, from_qemu = [], []
    for number in range(times):
        begin = time.monotonic()
        with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as attempt:
            until(60, lab.qemu, "QEMU does not start")
            started = time.monotonic()
            if attempt.wait(120):
                raise Failed("proxyctl connect failed")
        whole.append(time.monotonic() - begin)
        from_qemu.append(time.monotonic() - started)
        if number < times - 1:
            lab.disconnect()
            until(10, lambda: lab.qemu() is None, "QEMU does not end")
    return statistics.median(whole), statistics.median(from_qemu)


def rate(lab, url, *args, seconds):
    """MiB per second of a fetch that is cut off after some seconds."""
    said = lab.alice("curl", "-sS", "--max-time", str(seconds), "-o", "/dev/null", "-w", "%{size_download} %{time_total} %{time_starttransfer}", *args, url,
                     check=False, timeout=seconds + 20).stdout
    figures = re.search(r"(\d+) ([\d.]+) ([\d.]+)$", said)
    if not figures or int(figures[1]) < MIB:
        raise Failed(f"{url}: {said}")
    return int(figures[1]) / (float(figures[2]) - float(figures[3])) / MIB


def cpu(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) / 1024


def idle(pids, seconds):
    """Percent of a core that each takes with nothing to do."""
    before, begin = [cpu(pid) for pid in pids], time.monotonic()
    time.sleep(seconds)
    return [100 * (cpu(pid) - was) / (time.monotonic() - begin) for pid, was in zip(pids, before, strict=True)]


def outside(lab, pid):
    """A process of the machine under test by its number outside."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/status", encoding="utf-8", errors="replace") as file:
                numbers = re.search(r"^NSpid:\s+(.*)$", file.read(), re.MULTILINE)
            if numbers and numbers[1].split()[-1] == pid and os.path.samefile(f"/proc/{name}/ns/pid", f"/proc/{lab.pids['app']}/ns/pid"):
                return int(name)
        except OSError:
            continue
    raise Failed("the daemon is gone")


def tap_without_tor(lab, seconds):
    """The TAP device alone: a guest that sends bytes where Tor would be."""
    files = {"usr/bin/busybox": (content(BUSYBOX), 0o755), "usr/bin/tor": (SOURCE.encode(), 0o755)}
    with altered(lab, files) as image:
        lab.daemon(image=image)
        with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            until(90, lambda: lab.status()["phase"] == "wait-bootstrap", "the guest has no network")
            time.sleep(2)
            result = rate(lab, f"http://{WEB}/", "--http0.9", seconds=seconds)
        lab.disconnect()
        lab.daemon_stop()
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    times, seconds = (1, 5) if options.quick else (5, 20)
    figures = {}

    def show(name, value, unit, what):
        figures[name] = {"value": round(value, 3), "unit": unit, "what": what}
        print(f"{what:<58} {value:10.2f} {unit}", flush=True)

    alone = starts(options.image, times)
    show("init", alone["init"], "s", "QEMU's start to PID 1 (TCG)")
    show("network", alone["network"], "s", "QEMU's start to the guest's network")
    show("tor-started", alone["tor"], "s", "QEMU's start to Tor's start")
    lab = TorLab(f"torbench-{os.getpid()}", options.stage, options.image)
    try:
        lab.up()
        lab.daemon()
        whole, from_qemu = connects(lab, times)
        show("bootstrap", from_qemu, "s", "QEMU's start to Tor at 100 %")
        show("connect", whole, "s", "proxyctl connect, all of it")
        time.sleep(3)
        show("tor-throughput", statistics.median(rate(lab, f"http://{WEB}/bytes/{1 << 30}", seconds=seconds) for _ in range(3)), "MiB/s", "one download through the TAP device and Tor")
        pids = lab.qemu(), outside(lab, lab.daemon_pid())
        show("qemu-rss", rss(pids[0]), "MiB", "memory of QEMU (guest of 128 MiB)")
        show("daemon-rss", rss(pids[1]), "MiB", "memory of proxyvpnd")
        time.sleep(2)
        shares = idle(pids, seconds)
        show("qemu-idle", shares[0], "%", "QEMU with nothing to do, of a core")
        show("daemon-idle", shares[1], "%", "proxyvpnd with nothing to do, of a core")
        begin = time.monotonic()
        lab.disconnect()
        until(10, lambda: lab.qemu() is None, "QEMU does not end")
        show("disconnect", time.monotonic() - begin, "s", "disconnect until the virtual machine is off")
        lab.daemon_stop()
        show("tap-throughput", tap_without_tor(lab, seconds), "MiB/s", "one download through the TAP device, from the guest itself")
    finally:
        lab.down()
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    print("bench: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
