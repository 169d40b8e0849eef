"""The lab (scripts/lab.sh) for tests: one object per lab, with commands in its machines and what must hold about them."""

import contextlib
import difflib
import json
import os
import subprocess
import threading
import time
from signal import SIGKILL

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPT = os.path.join(ROOT, "scripts", "lab.sh")
PYTHON = "/usr/bin/python3"

APP4, APP6 = "192.0.2.2", "2001:db8:1::2"
PROXY, PROXY6, DNS = "198.51.100.10", "2001:db8:2::10", "198.51.100.53"
WEB, WEB6, SSH = "203.0.113.80", "2001:db8:3::80", "203.0.113.22"
SQUID = "http://tester@proxy.lab.test:3128"
TINY = f"http://{PROXY}:8888"

# proxyctl's documented exit codes
OK, FAILURE, USAGE, NOT_CONNECTED, NOT_AUTHORISED, TIMED_OUT, BLOCKED, UNREACHABLE = range(8)

TESTS = []


class Failed(AssertionError):
    """A promise does not hold."""


class Skipped(Exception):
    """This machine cannot run the test; the text says why."""


def test(promise, seconds=60, daemon="user"):
    """Registers a test. `promise` is what it keeps; `daemon` is "user" (CAP_NET_ADMIN only), "root" or None."""

    def register(function):
        TESTS.append((function, promise, seconds, daemon))
        return function

    return register


def expect(condition, text):
    if not condition:
        raise Failed(text() if callable(text) else text)


def equal(before, after, what):
    if before != after:
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=0)
        raise Failed(f"{what}:\n" + "\n".join(lines))


def until(seconds, condition, text):
    """Waits until `condition()` is true and returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        expect(time.monotonic() < end, text)
        time.sleep(0.05)
    return value


class Lab:
    def __init__(self, name, stage):
        self.env = {**os.environ, "PVLAB_ID": name}
        self.dir = f"/tmp/pvlab-{name}"
        self.stage = stage
        self.pids = {}

    def script(self, *args, timeout=60, check=True):
        done = subprocess.run([SCRIPT, *args], env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise Failed(f"lab.sh {' '.join(args)}: {(done.stdout + done.stderr)[-1500:]}")
        return done.stdout

    def up(self, *options, timeout=60):
        self.script("up", "--stage", self.stage, *options, timeout=timeout)
        for machine in "app", "net":
            with open(f"{self.dir}/{machine}.pid", encoding="ascii") as file:
                self.pids[machine] = file.read().strip()

    def down(self):
        self.script("down")

    # ---- commands in the machines

    def command(self, machine, user, args, env=None):
        # nsenter forks into the PID namespace: its child is to die with it
        enter = ["nsenter", "-t", self.pids[machine], "-m", "-n", "-p", "--", "setpriv", "--pdeathsig", "KILL"]
        home = "/root"
        if user:
            enter += ["--reuid", user, "--regid", user, "--init-groups"]
            home = f"{self.dir}/home/{user}" if os.path.isdir(f"{self.dir}/home/{user}") else "/"
        ca = f"{self.dir}/ca.pem"
        variables = {
            "PATH": f"{self.dir}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "USER": user or "root",
            "LAB": self.dir, "LC_ALL": "C.UTF-8", "TERM": "dumb", "CURL_CA_BUNDLE": ca, "SSL_CERT_FILE": ca, "GIT_SSL_CAINFO": ca,
            **(env or {}),
        }
        return [*enter, "env", "-i", f"--chdir={home}", *(f"{name}={value}" for name, value in variables.items()), *args]

    def run(self, machine, user, *args, timeout=60, check=True, data=None, env=None):
        """Runs to its end; returns the CompletedProcess with text output, stderr after stdout."""
        try:
            done = subprocess.run(
                self.command(machine, user, args, env), input=data if data is not None else "", stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout,
            )
        except subprocess.TimeoutExpired as expired:
            raise Failed(f"{' '.join(args)}: not done after {timeout} s: {expired.stdout}") from None
        if check:
            expect(done.returncode == 0, lambda: f"{' '.join(args)} ended with {done.returncode}: {done.stdout[-2000:]}")
        return done

    def alice(self, *args, **options):
        return self.run("app", "alice", *args, **options)

    def app(self, *args, **options):
        return self.run("app", None, *args, **options)

    def net(self, *args, **options):
        return self.run("net", None, *args, **options)

    def popen(self, machine, user, *args, **options):
        return subprocess.Popen(self.command(machine, user, args), **options)

    @contextlib.contextmanager
    def background(self, machine, user, *args, **options):
        child = self.popen(machine, user, *args, start_new_session=True, **options)
        try:
            yield child
        finally:
            # The whole group: what nsenter has just forked has not said yet that it is to die with it, and would go on sending.
            if child.poll() is None:
                os.killpg(child.pid, SIGKILL)
            child.wait()

    # ---- the daemon and proxyctl

    def daemon(self, *args):
        return self.script("daemon", *args)

    def daemon_stop(self, signal="TERM"):
        self.script("daemon-stop", signal)

    def daemon_pid(self):
        with contextlib.suppress(FileNotFoundError):
            with open(f"{self.dir}/daemon.pid", encoding="ascii") as file:
                pid = file.read().strip()
            if self.app("kill", "-0", pid, check=False).returncode == 0:
                return pid
        return None

    def daemon_log(self):
        with contextlib.suppress(FileNotFoundError):
            with open(f"{self.dir}/logs/proxyvpnd.log", encoding="utf-8", errors="replace") as file:
                return file.read()
        return ""

    def proxyctl(self, *args, user="alice", code=OK, **options):
        done = self.run("app", user, "proxyctl", *args, check=False, **options)
        expect(
            code is None or done.returncode == code,
            lambda: f"proxyctl {' '.join(args)} as {user} ended with {done.returncode}, not {code}: {done.stdout}",
        )
        return done.stdout

    def connect(self, url=SQUID, *args, **options):
        password = ["--password-file", f"{self.dir}/home/alice/password"] if "@" in url else []
        return self.proxyctl("connect", "--proxy-url", url, *password, *args, **options)

    def disconnect(self):
        return self.proxyctl("disconnect")

    def status(self):
        return json.loads(self.proxyctl("status", "--json"))

    def check_state(self, state):
        status = self.status()
        expect(status["state"] == state, f"state is {status['state']}, not {state}: {status}")

    # ---- looking

    def state(self):
        return self.script("state")

    def packets(self, pcap_filter):
        """What the sniffer saw on the wire, one line per packet."""
        return self.script("wire", pcap_filter).splitlines()

    def direct(self, but=""):
        """Packets of the machine that went around the tunnel: neither to the proxy nor name resolution, ARP or ND."""
        return self.packets(
            f"(src host {APP4} or src host {APP6}) and not (dst host {PROXY} or dst host {PROXY6}) and not (dst host {DNS} and port 53)"
            f" and not icmp6 and not arp and not dst net 224.0.0.0/4 and not dst net ff00::/8{but}"
        )

    @contextlib.contextmanager
    def nothing_direct(self, but=""):
        """No packet goes around the tunnel meanwhile; `but` filters what may."""
        before = len(self.direct(but))
        yield
        time.sleep(0.1)
        seen = self.direct(but)
        expect(len(seen) == before, lambda: "packets went around the tunnel:\n" + "\n".join(seen[before : before + 5]))

    def fetch(self, url, *args, timeout=30, **options):
        return self.alice("curl", "-sS", "--max-time", str(timeout), *args, url, timeout=timeout + 5, **options)

    def fetch_through(self, url, source=WEB):
        """A fetch that the web server must see coming from the proxy."""
        body = self.fetch(url).stdout
        expect("hello from" in body and source in body, f"{url}: the server saw another client than the proxy: {body}")
        return body

    def service(self, verb, name, port=""):
        self.script("service", verb, name, *([str(port)] if port else []))


def ssh_session(lab, machine, user, *args):
    """An interactive session; returns it and a function that types a line and waits for its answer."""
    child = lab.popen(machine, user, "ssh", "-tt", "-o", f"UserKnownHostsFile={lab.dir}/known_hosts", *args,
                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = bytearray()

    def reader():
        while data := child.stdout.read1(4096):
            output.extend(data)

    threading.Thread(target=reader, daemon=True).start()

    def say(number):
        # the shell does the sum: an echo of the typed line is not an answer
        child.stdin.write(f"echo sum-$(({number}+1000))\n".encode())
        child.stdin.flush()
        until(10, lambda: f"sum-{number + 1000}".encode() in output or child.poll() is not None, lambda: f"no answer: {bytes(output)!r}")
        expect(child.poll() is None, lambda: f"ssh ended: {bytes(output)!r}")

    return child, say


@contextlib.contextmanager
def faulty(lab, mode, port):
    with lab.background("net", None, PYTHON, "-u", f"{ROOT}/tests/e2e/proxy.py", PROXY, str(port), mode):
        until(5, lambda: f":{port} " in lab.net("ss", "-Htln").stdout, "the test proxy does not listen")
        yield f"http://{PROXY}:{port}"


@contextlib.contextmanager
def settings(lab, **values):
    """Kernel parameters of the machine under test, below net.ipv4."""
    before = {name: lab.app("sysctl", "-n", f"net.ipv4.{name}").stdout.strip() for name in values}
    try:
        for name, value in values.items():
            lab.app("sysctl", "-qw", f"net.ipv4.{name}={value}")
        yield
    finally:
        for name, value in before.items():
            lab.app("sysctl", "-qw", f"net.ipv4.{name}={value}")


@contextlib.contextmanager
def tunnel_proxy(lab, port, address="0.0.0.0"):
    """A proxy that passes half-closes on, so that who closes first is who closed first."""
    with lab.background("net", None, PYTHON, "-u", f"{ROOT}/tests/e2e/proxy.py", address, str(port), "tunnel", stderr=subprocess.DEVNULL):
        until(5, lambda: f":{port} " in lab.net("ss", "-Htln").stdout, "the test proxy does not listen")
        yield f"http://{PROXY}:{port}"


def fails_clean(lab, *args, words, code=FAILURE, look=True, **options):
    """The connection is refused with these words, and the network has not changed."""
    before = lab.state()
    text = lab.proxyctl("connect", *args, code=code, **options)
    equal(before, lab.state(), "a failed connect changed the network")
    for word in words:
        expect(word.lower() in text.lower(), f"the error does not say '{word}': {text}")
    expect("panicked" not in text and "Error {" not in text, f"not in the user's words: {text}")
    expect("connecting" not in text.splitlines(), f"a step without a name: {text}")
    if look:
        lab.check_state("disconnected")
    return text
