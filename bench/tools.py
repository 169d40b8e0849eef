"""The programs that the bench compares, each as a way from the machine `app` to the servers in `net`."""

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import time

from lab import APP4, PROXY, Failed, expect, until

# The servers: addresses of the range for benchmarks (RFC 2544), all of them local to `net`.
SERVERS, SERVER, PORT = "198.18.0.0/16", "198.18.0.1", 9000
RELAY_PORT = 1080
RELAY = f"{PROXY}:{RELAY_PORT}"
# The relay as the clients of the two bare TUNs reach it, and the addresses of those.
RELAY_BEHIND_TUN, NEAR, FAR = "198.18.255.1", "198.19.255.1", "198.19.255.2"


def _take_descriptors():
    """The unit's LimitNOFILE, or what this machine allows even root; programs started from here inherit it."""
    unit = 131072
    with contextlib.suppress(ValueError, OSError):  # no CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (unit, unit))
        return unit
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
    return allowed


DESCRIPTORS = _take_descriptors()


class Broken(Failed):
    """Wrong bytes, a lost connection: no figure of this run can be trusted."""


def inside(pid):
    """The process number as the process itself sees it, or None when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return None


def alive(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


def numbers():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(pid):
    children = {}
    for number in numbers():
        with contextlib.suppress(OSError), open(f"/proc/{number}/stat", encoding="ascii", errors="replace") as stat:
            children.setdefault(int(stat.read().rsplit(")", 1)[1].split()[1]), []).append(number)
    found, todo = [], [pid]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


class Tool:
    """No program at all: the wire itself."""

    name, title = "direct", "direct"
    client = ()  # what the load generator is told about a proxy
    peer = False  # true: somebody else's program; if it fails, only its column does

    def __init__(self, bench):
        self.bench, self.lab = bench, bench.lab

    def start(self):
        pass

    def pids(self):
        """Processes of the program, as this machine numbers them."""
        return []

    def stop(self):
        pass

    def check(self):
        """Goes the traffic the way that is to be measured?"""
        origin = self.bench.load("origin", *self.client)["origin"]
        direct = origin == APP4
        expect(direct == (self.name == "direct"), f"{self.title}: the server saw a connection from {origin}, so it went another way than it should")


class Connect(Tool):
    """The client speaks CONNECT itself: what the proxy can give at most."""

    name, title = "connect", "CONNECT client"
    client = ("-x", f"http:{RELAY}")


class Program(Tool):
    """A program that runs in `app`; `command` starts it."""

    child = None
    device = None
    routed = False

    def command(self):
        raise NotImplementedError

    def route(self):
        """Leads the traffic into the program."""

    def unroute(self):
        """Takes that back."""

    def there(self):
        return self.lab.app("ip", "link", "show", self.device, check=False).returncode == 0

    def start(self):
        expect(not (self.device and self.there()), f"{self.device} is there before {self.title} started: something of an earlier run holds it")
        log = open(f"{self.lab.dir}/logs/{self.name}.log", "ab")  # noqa: SIM115 (the program's for its life)
        inherited = self.inherited()
        self.child = self.lab.popen("app", None, *self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=inherited)
        log.close()
        for fd in inherited:
            os.close(fd)
        until(10, lambda: self.child.poll() is not None or (self.there() if self.device else self.listens()), f"{self.title} did not start")
        self.expect_alive()
        self.routed = True
        self.route()

    def inherited(self):
        return ()

    def listens(self):
        return True

    def expect_alive(self):
        if self.child.poll() is not None:
            with open(f"{self.lab.dir}/logs/{self.name}.log", encoding="utf-8", errors="replace") as log:
                raise Failed(f"{self.title} ended: {log.read()[-500:]}")

    def check(self):
        super().check()
        self.expect_alive()

    def pids(self):
        return [pid for pid in descendants(self.child.pid) if alive(pid)]

    def stop(self):
        if not self.child:
            return
        pids = [*self.pids(), self.child.pid]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids[:-1]:  # the last one only waits for them
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            end = time.monotonic() + 3
            while time.monotonic() < end and any(self.child.poll() is None if pid == self.child.pid else alive(pid) for pid in pids):
                time.sleep(0.05)
        expect(self.child.poll() is not None, f"{self.title} cannot be ended")
        self.child = None
        if self.routed:
            self.routed = False
            self.unroute()


class TunPair(Program):
    """Two bare TUNs without a stack between them: what any program behind a TUN costs at the very least."""

    name, title = "tuns", "two bare TUNs"
    client = ("-x", f"http:{RELAY_BEHIND_TUN}:{RELAY_PORT}")
    device = "bench0"

    def inherited(self):
        self.far = os.open(f"/proc/{self.lab.pids['net']}/ns/net", os.O_RDONLY)
        return (self.far,)

    def command(self):
        return [f"{self.bench.bin}/tunpair", self.device, "bench1", str(self.far)]

    def route(self):
        until(5, lambda: self.lab.net("ip", "link", "show", "up", "dev", "bench1", check=False).stdout, "no second TUN")
        self.lab.app("ip", "addr", "add", NEAR, "peer", FAR, "dev", self.device)
        self.lab.app("ip", "route", "add", f"{RELAY_BEHIND_TUN}/32", "dev", self.device, "src", NEAR)
        self.lab.net("ip", "route", "add", f"{NEAR}/32", "dev", "bench1")


class ProxyVpn(Tool):
    """proxyvpnd as a user runs it: its own user, the firewall, the routes, connected by proxyctl."""

    name, title = "proxyvpn", "proxyvpn"

    def start(self):
        self.lab.daemon()
        number = int(self.lab.daemon_pid())
        namespace = os.readlink(f"/proc/{self.lab.pids['app']}/ns/pid")
        self.pid = next(pid for pid in numbers() if inside(pid) == number and _pid_namespace(pid) == namespace)
        self.lab.alice("proxyctl", "connect", "--proxy-url", f"http://{RELAY}")

    def check(self):
        super().check()
        expect(alive(self.pid), "proxyvpnd ended")

    def pids(self):
        return [self.pid]

    def stop(self):
        if self.lab.daemon_pid():
            self.lab.alice("proxyctl", "disconnect")
            self.lab.daemon_stop()


def _pid_namespace(pid):
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return None


class Redsocks(Program):
    """No TUN: the kernel redirects connections to a local port (Debian's package)."""

    name, title = "redsocks", "redsocks"
    peer = True

    def command(self):
        path = f"{self.lab.dir}/redsocks.conf"
        with open(path, "w", encoding="ascii") as file:
            file.write(
                "base { log_debug = off; log_info = off; log = stderr; daemon = off; redirector = iptables;"
                f" redsocks_conn_max = 60000; rlimit_nofile = {DESCRIPTORS}; }}\n"
                f"redsocks {{ local_ip = 127.0.0.1; local_port = 12345; listenq = 4096; ip = {PROXY}; port = {RELAY_PORT};"
                " type = http-connect; splice = true; }\n"
            )
        return [self.bench.peers["redsocks"], "-c", path]

    def listens(self):
        return ":12345 " in self.lab.app("ss", "-Htln").stdout

    def route(self):
        rules = (
            "table ip bench {\nchain output {\ntype nat hook output priority -100;\n"
            f"ip daddr {SERVERS} meta l4proto tcp redirect to :12345;\n}}\n}}\n"
        )
        self.lab.app("nft", "-f", "-", data=rules)

    def unroute(self):
        self.lab.app("nft", "delete", "table", "ip", "bench", check=False)  # it may not have come to be


class Tun2proxy(Program):
    """A user-space stack behind a TUN (crates.io)."""

    name, title = "tun2proxy", "tun2proxy"
    peer = True
    device = "bench2"

    def command(self):
        return shlex.split(f"{self.bench.peers['tun2proxy']} --tun {self.device} --proxy http://{RELAY} --max-sessions 60000 --verbosity off")

    def route(self):
        self.lab.app("ip", "link", "set", self.device, "up")
        self.lab.app("ip", "addr", "add", "198.19.254.1/30", "dev", self.device)
        self.lab.app("ip", "route", "add", SERVERS, "dev", self.device, "src", "198.19.254.1")


TOOLS = [Tool, Connect, TunPair, ProxyVpn, Redsocks, Tun2proxy]
