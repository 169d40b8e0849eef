"""What the bench's programs in Python share: the lab with its servers, the load generator, and what this machine is like."""

import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time

from lab import Lab, expect, until
from tools import DESCRIPTORS, PORT, RELAY_PORT, SERVER, SERVERS, Broken, alive, numbers

WORKERS = 2
# The same for every program: no run is to end because a client has no port left.
SYSCTLS = {
    "net.ipv4.ip_local_port_range": "2000 65000", "net.ipv4.tcp_tw_reuse": "1", "net.core.somaxconn": "65535",
    "net.ipv4.tcp_max_syn_backlog": "65535", "net.ipv4.conf.all.rp_filter": "0", "net.ipv4.conf.default.rp_filter": "0",
}
KERNEL_PORTS = {"net.ipv4.ip_local_port_range": "32768 60999", "net.ipv4.tcp_tw_reuse": "2"}


class Rig:
    """The lab `name`, with a relay and a server in its `net`. `sysctls` are those of `app` that differ."""

    def __init__(self, name, options, sysctls=None):
        self.bin = options.bin
        self.sysctls = {**SYSCTLS, "net.ipv4.tcp_congestion_control": options.congestion}
        self.own_sysctls = sysctls or {}
        self.lab = Lab(name, options.stage)
        self.servers = []

    def up(self):
        lab = self.lab
        lab.up()
        lab.script("service", "stop", "tcpdump")  # it would cost every program something, and not each the same
        for machine, own in ("app", self.own_sysctls), ("net", {}):
            lab.run(machine, None, "sysctl", "-qw", *(f"{name}={value}" for name, value in {**self.sysctls, **own}.items()))
        lab.net("ip", "route", "add", "local", SERVERS, "dev", "lo")
        self.serve(WORKERS)

    def serve(self, workers):
        """Starts the relay and the server anew, with so many processes each. At the machine's end they end too."""
        for server in self.servers:
            server.kill()
            server.wait()
        self.servers = []
        for name, port in ("relay", RELAY_PORT), ("server", PORT):
            until(5, lambda port=port: not self.listens(port), f"port {port} of the {name} is still taken")
            self.servers.append(self.lab.popen("net", None, f"{self.bin}/{name}", str(port), str(workers), stdin=subprocess.DEVNULL))
            until(5, lambda port=port: self.listens(port), f"{name} does not listen")

    def listens(self, port):
        return f":{port} " in self.lab.net("ss", "-Htln").stdout

    def sockets(self, machine):
        """TCP's line of sockstat: {"inuse": …, "tw": …, …}."""
        text = self.lab.run(machine, None, "cat", "/proc/net/sockstat").stdout
        fields = next(line.split()[1:] for line in text.splitlines() if line.startswith("TCP:"))
        return {name: int(value) for name, value in zip(fields[::2], fields[1::2], strict=True)}

    def start_load(self, what, *args, stdin=subprocess.DEVNULL, port=PORT):
        command = [f"{self.bin}/load", what, "-t", f"{SERVER}:{port}", *args]
        child = self.lab.popen("app", None, *command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        child.what = " ".join(command[1:])
        return child

    def finish_load(self, child, seconds):
        try:
            out, error = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise Broken(f"load {child.what}: not done after {seconds} s") from None
        if child.returncode:
            what = {1: "a connection failed", 3: "wrong bytes"}.get(child.returncode, f"ended with {child.returncode}")
            raise Broken(f"load {child.what}: {what}: {error.strip() or out.strip()}")
        return json.loads(out)

    def load(self, what, *args, port=PORT):
        return self.finish_load(self.start_load(what, *args, port=port), 120)


def workers_for(connections):
    """Processes that the relay needs to hold so many, with two sockets each and its pool of pipes; the kernel does not spread evenly."""
    workers = WORKERS
    while 2 * connections * 1.1 / workers + 1200 > DESCRIPTORS:
        workers += 1
    return workers


def left_over(lab, own):
    """Processes of an earlier run: of programs that were put where only such a run puts them, or of its lab. `own`: where ours are."""
    found = []
    for pid in numbers():
        try:
            program = os.readlink(f"/proc/{pid}/exe")
            with open(f"/proc/{pid}/environ", "rb") as file:
                of_lab = f"PVLAB_ID={lab}".encode() in file.read().split(b"\0")
        except OSError:
            continue
        of_run = program.startswith(f"{own.rsplit('.', 1)[0]}.") and not program.startswith(f"{own}/")
        if pid not in (os.getpid(), os.getppid()) and alive(pid) and (of_lab or of_run):
            found.append(f"{pid} ({program})")
    return found


def expect_nothing_left(lab, own):
    left = left_over(lab, own)
    expect(not left, f"processes of an earlier run are still there: {', '.join(left)}. End them with 'PVLAB_ID={lab} scripts/lab.sh down'")


def busy_share():
    """Share of the machine's CPU time that is in use now, by whatever else runs."""

    def times():
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    all_before, idle_before = times()
    time.sleep(1)
    all_after, idle_after = times()
    return 1 - (idle_after - idle_before) / (all_after - all_before)


def machine():
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")), "")
    return f"{os.cpu_count()} CPUs{f' ({model})' if model else ''}, Linux {platform.release()}"


def today():
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def end_on_signals():
    """Through the clean-up."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
