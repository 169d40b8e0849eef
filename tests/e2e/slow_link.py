"""A slow, long and lossy way to the proxy: as fast as a program that speaks CONNECT itself, and no flow starves another."""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess

from lab import PYTHON, ROOT, WEB, expect, settings, test, tunnel_proxy, until
from main_job import digest_of

PORT = 9030
# Two wires of the same kind, each with its own address of the proxy: one for proxyvpn, one for the program that speaks CONNECT itself.
OURS, OTHERS, LAN = "10.98.1", "10.98.2", "10.98.0.0/16"
KBITS, ONE_WAY_MS, LOSS_PER_MILLE, QUEUE = 1000, 100, 10, 65536
LENGTH = 150_000
# The engine's ring, and the program's own socket.
RING, SEND_BUFFER = 256 << 10, 128 << 10
# What the kernel holds towards the proxy and the link is not ready for: the engine's limit, and one buffer of the kernel's.
UNSENT = (128 + 64) << 10


@contextlib.contextmanager
def wire(lab, network):
    """Brings up NETWORK.1 in app and NETWORK.2 in net; gives a function that makes chance begin anew."""
    program = f"{lab.dir}/link"
    if not os.path.exists(program):
        subprocess.run(["cc", "-std=gnu11", "-O2", "-o", program, f"{ROOT}/tests/e2e/link.c"], check=True)
    name = "wire" + network.rpartition(".")[2]
    spaces = [f"/proc/{lab.pids[machine]}/ns/net" for machine in ("app", "net")]
    child = subprocess.Popen(
        [program, spaces[0], name, spaces[1], name, *map(str, (KBITS, ONE_WAY_MS, LOSS_PER_MILLE, QUEUE))], stdout=subprocess.PIPE,
    )
    try:
        expect(child.stdout.readline() == b"ready\n", "the slow wire could not be made")
        for machine, own, peer in ("app", 1, 2), ("net", 2, 1):
            # no announcements of IPv6 on it, which would shift the others' chances
            lab.run(machine, None, "sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=1")
            lab.run(machine, None, "ip", "addr", "add", f"{network}.{own}", "peer", f"{network}.{peer}", "dev", name)
            lab.run(machine, None, "ip", "link", "set", name, "up")
        yield lambda: child.send_signal(signal.SIGUSR1)
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def two_wires(lab):
    """Connects over one wire; the other's proxy can be reached around the tunnel. Gives what comes before a measured pair."""
    # What the kernel remembers of a way would make the second run another one than the first.
    with settings(lab, tcp_no_metrics_save=1), tunnel_proxy(lab, PORT), wire(lab, OURS) as ours, wire(lab, OTHERS) as others:
        lab.net("sysctl", "-qw", "net.ipv4.tcp_no_metrics_save=1")
        lab.connect(f"http://{OURS}.2:{PORT}", "--lan", LAN)

        def again():
            ours()
            others()

        yield again


def way(through_proxyvpn):
    """What curl needs to take one of the two ways."""
    return [] if through_proxyvpn else ["-p", "-x", f"http://{OTHERS}.2:{PORT}"]


def curls(lab, script):
    """Runs the script's curl both ways at the same time; gives each one's output, proxyvpn's first."""
    children = [
        lab.popen("app", "alice", "bash", "-o", "pipefail", "-c", script, "curl", *way(ours), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                  text=True)
        for ours in (True, False)
    ]
    texts = []
    for child in children:
        text = child.communicate(timeout=60)[0]
        expect(child.returncode == 0, f"{script}: ended with {child.returncode}: {text}")
        texts.append(text)
    return texts


@test("1 Mbit/s, 200 ms there and back, 1 % loss: down and up at most 1.15 times as long as a program that speaks CONNECT itself", seconds=120)
def as_fast(lab):
    digest = digest_of(LENGTH)
    lab.alice("bash", "-c", f"curl -sS http://web.lab.test/bytes/{LENGTH} >sent; sha256sum sent | grep -q {digest}")
    down = f"curl -sS --max-time 50 \"$@\" -w '\\n%{{time_total}}' http://{WEB}/bytes/{LENGTH} | " \
        "{ python3 -c 'import hashlib, sys; *body, time = sys.stdin.buffer.read().rpartition(b\"\\n\"); " \
        "print(hashlib.sha256(body[0]).hexdigest(), time.decode())'; }"
    up = f"curl -sS --max-time 50 \"$@\" -T sent -H Expect: -w '%{{time_total}}' http://{WEB}/ | tr '\\n' ' '"
    with two_wires(lab) as again:
        for what, script in ("down", down), ("up", up):
            times = []
            for _ in range(3):
                again()
                ends = [text.split() for text in curls(lab, script)]
                expect([got for got, _ in ends] == [digest] * 2, f"{what}: not intact: {ends}")
                times.append([float(seconds) for _, seconds in ends])
            ratio = statistics.median(ours for ours, _ in times) / statistics.median(others for _, others in times)
            expect(ratio <= 1.15, f"{what}: {ratio:.2f} times as long; proxyvpn and a CONNECT client, in s: {times}")


# Writes as much as it can for so many seconds, straight or through a proxy; prints how much that was, and holds the connection.
FLOOD = f"""
import select, socket, sys, time
seconds, *proxy = sys.argv[1:]
one = socket.create_connection(tuple(proxy) if proxy else ("{WEB}", 80), 20)
one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {SEND_BUFFER // 2})
if proxy:
    one.sendall(b"CONNECT {WEB}:80 HTTP/1.1\\r\\nHost: {WEB}:80\\r\\n\\r\\n")
    one.recv(4096)
one.sendall(b"PUT / HTTP/1.1\\r\\nHost: web\\r\\nContent-Length: 1000000000\\r\\n\\r\\n")
one.setblocking(False)
print("open", flush=True)
end, written = time.monotonic() + float(seconds), 0
while time.monotonic() < end:
    if select.select([], [one], [], 0.1)[1]:
        written += one.send(bytes(65536))
print(written, flush=True)
time.sleep(60)
"""


@test("an upload into a slow link is held back, and does not starve a short connection more than a CONNECT client's does", seconds=60)
def held_back(lab):
    seconds = 6
    with two_wires(lab), contextlib.ExitStack() as stack:
        proxies = [], [f"{OTHERS}.2", str(PORT)]
        floods = [
            stack.enter_context(lab.background("app", "alice", PYTHON, "-c", FLOOD, str(seconds), *proxy, stdout=subprocess.PIPE))
            for proxy in proxies
        ]
        for flood in floods:
            expect(flood.stdout.readline() == b"open\n", "no upload began")
        # Both are written to for a while before the short ones come.
        until(10, lambda: all(queued(lab, network) > QUEUE for network in (OURS, OTHERS)), "the uploads do not fill their buffers")
        ours, others = (float(text) for text in curls(lab, f"curl -sS --max-time 40 \"$@\" -o /dev/null -w '%{{time_total}}' http://{WEB}/"))
        expect(ours < 1.5 * others + 0.5, f"beside an upload, a short connection took {ours:.2f} s; with CONNECT clients {others:.2f} s")
        written = [int(flood.stdout.readline()) for flood in floods]
        kernel = queued(lab, OURS)
        unsent = re.findall(r"notsent:([0-9]+)", lab.app("ss", "-Htin", "dst", f"{OURS}.2").stdout)
        most = KBITS * 1000 // 8 * (seconds + 1) + RING + SEND_BUFFER + kernel
        expect(written[0] < most, f"{written[0]} bytes were taken from the program in {seconds} s, more than {most}")
        expect(unsent and max(map(int, unsent)) <= UNSENT, f"{unsent} bytes wait in sockets to the proxy, more than {UNSENT}")


def queued(lab, network):
    """Bytes that wait in this machine's sockets towards the proxy there, and on the way."""
    lines = lab.app("ss", "-Htn", "dst", f"{network}.2").stdout.splitlines()
    return sum(int(line.split()[2]) for line in lines)
