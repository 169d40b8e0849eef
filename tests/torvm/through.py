"""Connected: what programs of the machine have of it. All of these share one VM."""

import ipaddress
import itertools
import subprocess
import time

from lab import DNS, PYTHON, WEB, WEB6, expect, test, until
from torlab import CONTROL, GUEST, SOCKS

# Refused means at once: nobody waits for a timeout.
AT_ONCE = 1.0
OTHER_RESOLVER = "9.9.9.9"
ONION_RANGE = ipaddress.ip_network("10.192.0.0/10")


@test("a page by address and by name: the server sees an exit, the wire relays only", seconds=90, daemon="connected")
def page(lab):
    with lab.only_to():
        lab.fetch_by_exit(f"http://{WEB}/")
        lab.fetch_by_exit("http://web.lab.test/")
        lab.fetch_by_exit("https://web.lab.test/")


@test("a big file comes whole", seconds=120, daemon="connected")
def big(lab):
    size = 2_000_000
    with lab.only_to():
        body = lab.fetch(f"http://{WEB}/bytes/{size}", "-o", "/dev/null", "-w", "%{size_download}", timeout=90).stdout
    expect(body == str(size), f"{body} bytes came, not {size}")


@test("an onion service by its name, for a program that knows nothing of Tor", seconds=200, daemon="connected")
def onion(lab):
    with lab.only_to():
        onion_page(lab)
        address = lab.alice("getent", "ahostsv4", lab.tor["onion"]).stdout.split()[0]
        expect(ipaddress.ip_address(address) in ONION_RANGE, f"the name stands for {address}")


def onion_page(lab):
    """The periods of this network are four minutes, not a day: who asks at the change of one gets nothing, and has to forget that."""

    def answered():
        if "hello from" in lab.fetch(f"http://{lab.tor['onion']}/", timeout=20, check=False).stdout:
            return True
        lab.proxyctl("torvm", "new-identity")
        time.sleep(11)  # Tor takes one every 10 s
        return False

    until(150, answered, "the onion service does not answer")


@test("DNS goes through Tor whichever resolver is asked, by IPv4 or IPv6", seconds=60, daemon="connected")
def names(lab):
    with lab.only_to():
        for server in DNS, OTHER_RESOLVER, GUEST:
            answer = lab.alice("dig", "+short", "+time=15", "+tries=1", f"@{server}", "web.lab.test", "A", timeout=30).stdout.strip()
            expect(answer == WEB, f"{server} answers {answer!r}")
        begin = time.monotonic()
        lab.alice("dig", "+short", "+time=5", "+tries=1", "@2001:db8:3::53", "web.lab.test", "A", check=False)
        expect(time.monotonic() - begin < 2 * AT_ONCE, "a resolver with an IPv6 address is waited for")


def refused(lab, what, statement):
    """The statement fails as soon as anything tells it to."""
    code = f"import socket, time\nbegin = time.monotonic()\ntry:\n    {statement}\n    print('done')\nexcept OSError as error:\n    print(type(error).__name__, error)\nprint(time.monotonic() - begin)"
    said, took = lab.alice(PYTHON, "-c", code, timeout=30).stdout.strip().rsplit("\n", 1)
    expect(said != "done", f"{what} is not refused")
    expect("timed out" not in said and float(took) < AT_ONCE, f"{what}: {said} after {took} s")


@test("UDP and IPv6 are refused at once, so that programs fall back", seconds=60, daemon="connected")
def refusals(lab):
    with lab.only_to():
        refused(lab, "UDP", f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); s.connect(('{WEB}', 443)); s.send(b'x' * 40); s.recv(1)")
        refused(lab, "UDP to the guest", f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); s.connect(('{GUEST}', 9999)); s.send(b'x' * 40); s.recv(1)")
        refused(lab, "TCP by IPv6", f"socket.create_connection(('{WEB6}', 80), 5)")
        refused(lab, "UDP by IPv6", f"s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.settimeout(5); s.connect(('{WEB6}', 443)); s.send(b'x' * 40); s.recv(1)")
        refused(lab, "DNS over TCP", f"s = socket.create_connection(('{OTHER_RESOLVER}', 53), 5)")


@test("SOCKS for programs of the machine: who gives different passwords gets different circuits", seconds=120, daemon="connected")
def socks(lab):
    def client(user):
        return lab.fetch_by_exit("http://web.lab.test/", "--proxy", f"socks5h://{user}:x@{GUEST}:{SOCKS}")

    with lab.only_to():
        first, numbers = client("one"), itertools.count()

        def another():
            time.sleep(0.5)
            return client(f"user{next(numbers)}") != first

        # There are three exits, but soon after its start Tor may know one alone.
        until(60, another, lambda: f"{next(numbers)} users are all seen from {first}")


@test("the control port is the daemon's alone: neither alice nor root reaches it", seconds=60, daemon="connected")
def control(lab):
    connect = f"import socket; s = socket.create_connection(('{GUEST}', {CONTROL}), 5); s.send(b'PROTOCOLINFO 1\\r\\n'); print(s.recv(100))"
    for user in "alice", "mallory", None:
        done = lab.run("app", user, PYTHON, "-c", connect, check=False, timeout=20)
        expect(done.returncode, f"{user or 'root'} reaches Tor's control port: {done.stdout}")
    done = lab.run("app", "proxyvpn", PYTHON, "-c", connect, check=False, timeout=20)
    expect("250-PROTOCOLINFO" in done.stdout, f"anti-test: the daemon's user does not reach it either: {done.stdout}")


@test("a new identity: new circuits, at once", seconds=120, daemon="connected")
def new_identity(lab):
    def circuits():
        listed = lab.proxyctl("torvm", "circuits")
        expect(any(f"exit{number}" in listed for number in (1, 2, 3)), f"no circuit ends at an exit: {listed}")
        return {line.split()[0] for line in listed.splitlines() if line[:1].isdigit()}

    def at_rest():  # by itself Tor makes no new ones now
        before = circuits()
        time.sleep(3)
        return before if circuits() == before else None

    lab.fetch_by_exit()
    before = until(40, at_rest, "Tor makes new circuits all the time")
    lab.proxyctl("torvm", "new-identity")
    # whether another exit comes is up to the guards, which are not exits then
    until(15, lambda: circuits() - before, "there are no new circuits")
    lab.fetch_by_exit()
    text = lab.proxyctl("torvm", "new-identity", user="mallory", code=None)
    expect("not allowed" in text or "password" in text, f"mallory may have a new identity: {text}")


@test("while nothing is done the wire is quiet but for relays, and the VM is in no hurry", seconds=60, daemon="connected")
def idle(lab):
    def cpu():
        with open(f"/proc/{lab.qemu()}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    with lab.only_to():
        time.sleep(1)
        begin, before = time.monotonic(), cpu()
        time.sleep(5)
        share = (cpu() - before) / (time.monotonic() - begin)
    expect(share < 0.5, f"QEMU takes {share:.0%} of a core with nothing to do")


@test("proxyctl shows the backend and how far Tor is", seconds=30, daemon="connected")
def shown(lab):
    status = lab.status()
    expect(status["backend"] == "torvm", str(status))
    text = lab.proxyctl("status")
    expect("torvm" in text, text)
    log = lab.proxyctl("torvm", "log")
    expect("Bootstrapped 100%" in log, f"Tor's log: {log[-500:]}")


@test("a shell with QEMU's rights, in its place, reaches nothing", seconds=60, daemon="connected")
def break_out(lab):
    pid = str(lab.qemu())
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        status = dict(line.split(":\t", 1) for line in file.read().splitlines())
    uid = status["Uid"].split()[0]
    expect(uid not in ("0", lab.app("id", "-u", "proxyvpn").stdout.strip()), f"QEMU runs as uid {uid}")
    for name in "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
        expect(int(status[name], 16) == 0, f"QEMU has capabilities: {name} {status[name]}")
    expect(status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", f"QEMU: NoNewPrivs {status['NoNewPrivs']}, Seccomp {status['Seccomp']}")
    place = ["nsenter", "-t", pid, "-n", "--"]
    links = subprocess.run([*place, "ip", "-o", "link"], capture_output=True, text=True, check=True).stdout.splitlines()
    expect([line.split(": ")[1] for line in links] == ["lo"], f"QEMU's network: {links}")
    tried = subprocess.run(
        [*place, "setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--no-new-privs", "--bounding-set=-all", PYTHON, "-c", BREAK_OUT],
        capture_output=True, text=True, timeout=30,
    )
    expect(tried.returncode == 0 and "reached" not in tried.stdout, f"with QEMU's rights: {tried.stdout}{tried.stderr}")
    outside = lab.run("app", "alice", PYTHON, "-c", BREAK_OUT, check=False, timeout=60).stdout
    expect("reached" in outside, f"anti-test: outside of that place nothing is reached either: {outside}")


BREAK_OUT = f"""
import socket
for address in [("{GUEST}", {SOCKS}), ("10.10.10.2", 22), ("127.0.0.1", 22), ("192.0.2.1", 22), ("{WEB}", 80)]:
    try:
        socket.create_connection(address, 5)
        print("reached", address)
    except OSError as error:
        print(error)
"""
