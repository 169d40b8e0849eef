"""How fast the TorVM is; see scripts/bench.sh --torvm. All of it runs in the lab of the tests, whose private Tor network takes the same
processors. So programs are compared within one round: the same download by a Tor that runs on the machine itself, and by the TorVM."""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from statistics import median

sys.dont_write_bytecode = True  # root leaves nothing among the sources
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [f"{ROOT}/tests/e2e", f"{ROOT}/tests/torvm"]
import guest  # noqa: E402
from lab import WEB, expect, until  # noqa: E402
from report import aligned, plain  # noqa: E402
from rig import busy_share, end_on_signals, expect_nothing_left, machine, today  # noqa: E402
from torlab import CONNECT_SECONDS, GUEST, PROFILE, SOCKS, TorLab, native_client  # noqa: E402

MIB = 1 << 20
TICKS = os.sysconf("SC_CLK_TCK")
# Of the native Tor, whose user goes around the TorVM; and of the downloads through the TorVM.
NATIVE, TUNNELLED = "alice", "mallory"
WAYS = ("native", "socks", "trans")


def say(text):
    print(f"bench: {text} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)


def stat(pid):
    """Fields of /proc/PID/stat from the state on."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def cpu(pid):
    """Seconds of processor."""
    user, system = stat(pid)[11:13]
    return (int(user) + int(system)) / TICKS


def rss(pid):
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        return int(re.search(r"^VmRSS:\s+(\d+) kB", file.read(), re.MULTILINE)[1]) / 1024


def now():
    """On the clock of a process's start."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def processes(lab, program):
    """Numbers, as this machine has them, of the lab's processes that run this program of the stage, or QEMU."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/cmdline", "rb") as file:
                first = file.read().split(b"\0")[0].decode(errors="replace")
            parent = int(name)
            while first.startswith((program, f"/usr/bin/{program}", f"{lab.stage}/usr/libexec/proxyvpn/{program}")) and parent > 1:
                if parent == int(lab.pids["app"]):
                    found.append(int(name))
                    break
                parent = int(stat(parent)[1])
    return found


def qemu(lab):
    found = processes(lab, "qemu-system-x86_64")
    return found[0] if found else None


class Figures:
    """What was measured, of all rounds."""

    def __init__(self):
        self.values, self.what = {}, {}

    def add(self, name, what, unit, value):
        self.values.setdefault(name, []).append(value)
        self.what[name] = (what, unit)

    def median(self, name):
        return median(self.values[name])

    def table(self):
        lines = [["", "median", "least..most", ""]]
        for name, (what, unit) in self.what.items():
            values = self.values[name]
            lines.append([what, plain(median(values)), f"{plain(min(values))}..{plain(max(values))}" if len(values) > 1 else "", unit])
        return aligned(lines)

    def json(self):
        return {
            name: {"what": what, "unit": unit, "median": self.median(name), "all": self.values[name]}
            for name, (what, unit) in self.what.items()
        }


def start_alone(figures, image, folder):
    """The guest by itself: no daemon, no Tor network."""
    with guest.Machine(image, folder, guest.blank(f"{folder}/disk"), memory=128) as booted:
        for status, what in ("init", "its PID 1 runs"), ("network", "its network is there"), ("tor", "Tor is started"):
            figures.add(f"start_{status}", f"QEMU's start until {what}", "s", booted.wait(status, 60)[0])
        figures.add("start_cpu", "  CPU of QEMU until Tor is started", "s", booted.cpu())


def connect(figures, lab):
    begin, at = now(), {}
    with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as attempt:
        for line in attempt.stderr:
            if said := re.match(r"Tor (\d+)%", line):
                at.setdefault(int(said[1]), now())
        expect(attempt.wait(CONNECT_SECONDS) == 0, "proxyctl connect failed")
    whole = now() - begin
    expect(at, "proxyctl connect did not tell how far Tor is")
    started = int(stat(qemu(lab))[19]) / TICKS
    figures.add("tor_answers", "QEMU's start until Tor answers the daemon", "s", min(at.values()) - started)
    figures.add("bootstrap", "QEMU's start until 100 %", "s", begin + whole - started)
    figures.add("connect", "proxyctl connect, all of it", "s", whole)


def disconnect(figures, lab):
    begin = now()
    lab.disconnect()
    figures.add("disconnect", "proxyctl disconnect", "s", now() - begin)
    until(10, lambda: qemu(lab) is None, "QEMU does not end")


def download(lab, user, size, *args):
    """MiB per second from the first byte to the last."""
    said = lab.run("app", user, "curl", "-sS", "--max-time", "120", "-o", "/dev/null", "-w", "%{size_download} %{time_starttransfer} %{time_total}",
                   *args, f"http://{WEB}/bytes/{size}", timeout=130).stdout.split()
    expect(int(said[0]) == size, f"{said[0]} bytes came, not {size}")
    return size / MIB / (float(said[2]) - float(said[1]))


@contextlib.contextmanager
def native_tor(lab):
    directory = f"{lab.dir}/home/{NATIVE}/tor"
    with lab.background("app", NATIVE, *native_client(lab, directory), "--Log", f"notice file {directory}/log", stdout=subprocess.DEVNULL):
        until(60, lambda: "Bootstrapped 100%" in lab.alice("cat", f"{directory}/log", check=False).stdout, "the native Tor does not get to 100 %")
        yield


def round_of_downloads(figures, lab, size, pids):
    rates = {}
    before = {}
    for way in WAYS:
        if way == "trans":
            before = {name: cpu(pid) for name, pid in pids.items()}
        user, args = {
            "native": (NATIVE, ("--proxy", "socks5h://127.0.0.1:9150")),
            "socks": (TUNNELLED, ("--proxy", f"socks5h://{GUEST}:{SOCKS}")),
            "trans": (TUNNELLED, ()),
        }[way]
        rates[way] = download(lab, user, size, *args)
    for name, pid in pids.items():
        figures.add(f"{name}_cpu", f"  CPU of {name}, for 100 MiB through Tor", "s", (cpu(pid) - before[name]) * 100 * MIB / size)
    figures.add("native", "download by a Tor of the machine itself", "MiB/s", rates["native"])
    figures.add("socks", "download through the TorVM by SOCKS", "MiB/s", rates["socks"])
    figures.add("trans", "download through the TorVM, without settings", "MiB/s", rates["trans"])
    figures.add("socks_ratio", "  by SOCKS ÷ native, same round", "", rates["socks"] / rates["native"])
    figures.add("trans_ratio", "  without settings ÷ native, same round", "", rates["trans"] / rates["native"])


def idle(figures, pids, seconds):
    before, begin = {name: cpu(pid) for name, pid in pids.items()}, now()
    time.sleep(seconds)
    for name, pid in pids.items():
        figures.add(f"{name}_idle", f"CPU of {name} with nothing to do, of a core", "%", 100 * (cpu(pid) - before[name]) / (now() - begin))


@contextlib.contextmanager
def without_tor(image, program):
    """A copy of the image with this program in Tor's place."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(image, folder, dirs_exist_ok=True)
        with open(program, "rb") as file:
            guest.changed(image, f"{folder}/initramfs", [("usr/bin/tor", 0o100755, file.read())])
        with open(f"{folder}/manifest.json", encoding="utf-8") as file:
            manifest = json.load(file)
        digest = subprocess.run(["sha256sum", f"{folder}/initramfs"], capture_output=True, text=True, check=True).stdout.split()[0]
        manifest["initramfs"] |= {"sha256": digest, "size": os.path.getsize(f"{folder}/initramfs")}
        with open(f"{folder}/manifest.json", "w", encoding="utf-8") as file:
            json.dump(manifest, file)
        yield folder


def tap(figures, lab, options, rounds, seconds):
    """The TAP device and the machine's virtual network device alone, through the daemon's firewall and the guest's."""
    with without_tor(options.image, f"{options.bin}/guest") as image:
        lab.daemon(image=image)
        with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            until(CONNECT_SECONDS, lambda: lab.status()["phase"] == "wait-bootstrap", "the guest's network does not come")

            def load(mode, length):
                said = lab.app(f"{options.bin}/load", "bulk", "-t", f"{WEB}:80", "-m", mode, "-n", "1", "-d", str(length), check=False, timeout=60)
                return json.loads(said.stdout.splitlines()[-1]) if said.returncode == 0 else None

            until(20, lambda: load("D", 0.1), "nothing answers in Tor's place")
            for _ in range(rounds):
                for mode, what in ("D", "down"), ("U", "up"):
                    done = load(mode, seconds)
                    expect(done, "a transfer without Tor failed")
                    figures.add(f"tap_{what}", f"TAP device and guest without Tor, {what}", "Mbit/s", done["gbps"] * 1000)
        lab.disconnect()
        lab.daemon_stop()


def main():
    parser = argparse.ArgumentParser()
    for name, what in ("bin", "of the bench's programs"), ("stage", "made by install.sh --destdir"), ("image", "of build-torvm-image.sh"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR", help=what)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    end_on_signals()
    starts, rounds, size, seconds = (3, 3, 8 * MIB, 2) if options.quick else (7, 7, 32 * MIB, 5)
    name = "torvm-bench"
    expect_nothing_left(name, options.bin)
    about = f"{machine()}, {today()}, other load before {100 * busy_share():.0f} %"
    figures = Figures()
    say(f"the guest alone, {starts} times")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(starts):
            start_alone(figures, options.image, folder)
    lab = TorLab(name, options.stage, options.image)
    try:
        lab.up()
        lab.profile()
        lab.app("tee", "-a", f"/etc/proxyvpn/profiles.d/{PROFILE}.toml", data=f'[bypass]\nusers = ["{NATIVE}"]\n')
        lab.daemon()
        say(f"connecting, {starts} times")
        for number in range(starts):
            if number:
                disconnect(figures, lab)
            connect(figures, lab)
        pids = {"QEMU": qemu(lab), "proxyvpnd": processes(lab, "proxyvpnd")[-1]}
        figures.add("rss_start", "memory (RSS) of QEMU with a machine of 128 MiB, at 100 %", "MiB", rss(pids["QEMU"]))
        say("30 s with nothing to do")
        idle(figures, pids, 30)
        say(f"downloads, {rounds} rounds")
        with native_tor(lab):
            for _ in range(rounds):
                round_of_downloads(figures, lab, size, pids)
        figures.add("rss_qemu", "memory (RSS) of QEMU after the downloads", "MiB", rss(pids["QEMU"]))
        figures.add("rss_daemon", "memory (RSS) of proxyvpnd", "MiB", rss(pids["proxyvpnd"]))
        figures.add("rss_launcher", "memory (RSS) of the launcher's processes", "MiB", sum(rss(pid) for pid in processes(lab, "proxyvpn-qemu")))
        disconnect(figures, lab)
        lab.daemon_stop()
        say("without Tor")
        tap(figures, lab, options, rounds, seconds)
    finally:
        lab.down()
    print(f"{about}; accelerator tcg\n\n{figures.table()}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": about, "figures": figures.json()}, file, indent=1)
    print("bench: ok")


if __name__ == "__main__":
    main()
