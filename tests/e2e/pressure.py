"""Sides that stop reading, bulk beside short connections, many connections: nothing is lost, and nothing stays."""

import contextlib
import hashlib
import json
import os
import subprocess
import time

from lab import PROXY, PYTHON, ROOT, WEB, expect, settings, test, tunnel_proxy, until
from main_job import digest_of

MIB = 1 << 20
RING = 256 << 10
# bench/relay.c and bench/server.c
RELAY_PORT, SERVER_PORT = 9040, 9041
# So many addresses for the server that neither the program's ports towards one of them run out nor the relay's.
SERVERS, SERVER, TARGETS = "198.18.0.0/16", "198.18.0.1", 200
SINK_PORT = 9042

# Asks for bytes, takes a few, waits for a line, takes the rest.
LATE_READER = f"""
import hashlib, socket, sys
one = socket.create_connection(("{WEB}", 80), 20)
one.sendall(b"GET /bytes/%d HTTP/1.1\\r\\nHost: web\\r\\nConnection: close\\r\\n\\r\\n" % int(sys.argv[1]))
head = b""
while b"\\r\\n\\r\\n" not in head:
    head += one.recv(1000)
digest = hashlib.sha256(head.partition(b"\\r\\n\\r\\n")[2])
print("begun", flush=True)
sys.stdin.readline()
while data := one.recv(65536):
    digest.update(data)
print(digest.hexdigest())
"""

# Takes a few bytes of each connection, waits for a line, takes the rest and answers with their digest.
LATE_SERVER = f"""
import hashlib, socket, sys, threading
go = threading.Event()
def serve(one):
    digest = hashlib.sha256(one.recv(1000))
    go.wait()
    while data := one.recv(65536):
        digest.update(data)
    one.sendall(digest.hexdigest().encode())
    one.close()
def accept(listener):
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
listener = socket.create_server(("{WEB}", {SINK_PORT}))
threading.Thread(target=accept, args=(listener,), daemon=True).start()
sys.stdin.readline()
go.set()
sys.stdin.readline()
"""

WRITER = f"""
import socket, sys
with socket.create_connection(("{WEB}", {SINK_PORT}), 60) as one:
    block = bytes(range(256)) * 256
    for number in range(int(sys.argv[1]) // 65536):
        one.sendall(number.to_bytes(8, "big") + block[8:])
    one.shutdown(socket.SHUT_WR)
    print(one.recv(100).decode())
"""


def written_digest(length):
    """SHA-256 of what WRITER sends."""
    digest, block = hashlib.sha256(), bytes(range(256)) * 256
    for number in range(length // 65536):
        digest.update(number.to_bytes(8, "big") + block[8:])
    return digest.hexdigest()


def go_on(child):
    child.stdin.write(b"\n")
    child.stdin.flush()


def counters(lab):
    return lab.status()["statistics"]


def flows(lab):
    now = counters(lab)
    return now["flows-opened"] - now["flows-closed"]


def memory(lab):
    """Bytes of the daemon that are in memory."""
    status = lab.app("cat", f"/proc/{lab.daemon_pid()}/status").stdout
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) << 10


def descriptors(lab):
    return len(lab.app("ls", f"/proc/{lab.daemon_pid()}/fd").stdout.split())


def nothing_dropped(lab):
    dropped = counters(lab)["drop-device"]
    expect(dropped == 0, f"{dropped} packets were dropped on the way to the kernel")


@test("a program and a server that stop reading for seconds: memory stays bounded, others go on, every byte arrives", seconds=90)
def zero_window(lab):
    count, length = 3, 32 * MIB
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with tunnel_proxy(lab, 9043) as url, contextlib.ExitStack() as stack:
        lab.connect(url)
        server = stack.enter_context(lab.background("net", None, PYTHON, "-c", LATE_SERVER, **pipes))
        until(5, lambda: f":{SINK_PORT} " in lab.net("ss", "-Htln").stdout, "the late server does not listen")
        before = memory(lab)
        readers, writers = (
            [stack.enter_context(lab.background("app", "alice", PYTHON, "-c", script, str(length), **pipes)) for _ in range(count)]
            for script in (LATE_READER, WRITER)
        )
        for reader in readers:
            expect(reader.stdout.readline() == b"begun\n", "a download did not begin")

        def moved():
            now = counters(lab)
            return now["bytes-sent"], now["bytes-received"]

        def stands_still():
            first = moved()
            time.sleep(0.7)
            return min(first) > count * RING and moved() == first

        until(20, stands_still, lambda: f"bytes go on though nobody reads: {moved()}")
        time.sleep(3)  # the promise: a window may stay shut
        most = before + count * 2 * (2 * RING) + 4 * MIB
        expect(memory(lab) < most, f"the daemon holds {memory(lab)} bytes for {2 * count} connections, more than {most}")
        lab.fetch_through("http://web.lab.test/")
        for child in server, *readers:
            go_on(child)
        for reader in readers:
            expect(reader.stdout.readline().decode().strip() == digest_of(length), "a download is not intact")
        for writer in writers:
            expect(writer.stdout.readline().decode().strip() == written_digest(length), "an upload is not intact")
        nothing_dropped(lab)


@contextlib.contextmanager
def bench_programs(lab):
    """The bench's relay and server in net; gives a function that starts its load generator in app."""
    for name, *sources in ("load", "load", "client", "common"), ("server", "server", "common"), ("relay", "relay", "common"):
        files = [f"{ROOT}/bench/{source}.c" for source in sources]
        subprocess.run(["cc", "-std=gnu11", "-O2", "-pthread", "-o", f"{lab.dir}/{name}", *files], check=True)
    lab.net("ip", "route", "replace", "local", SERVERS, "dev", "lo")
    with contextlib.ExitStack() as stack:
        for name, port in ("relay", RELAY_PORT), ("server", SERVER_PORT):
            stack.enter_context(lab.background("net", None, f"{lab.dir}/{name}", str(port), "2", stdin=subprocess.DEVNULL))
            until(5, lambda port=port: f":{port} " in lab.net("ss", "-Htln").stdout, f"the bench's {name} does not listen")
        lab.connect(f"http://{PROXY}:{RELAY_PORT}")

        def load(*args):
            command = f"{lab.dir}/load", *args, "-t", f"{SERVER}:{SERVER_PORT}", "-T", str(TARGETS)
            return stack.enter_context(lab.background("app", "alice", *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))

        yield load
        lab.disconnect()


def finished(child):
    """What the load generator says when it is done."""
    text = child.communicate(timeout=60)[0].decode()
    expect(child.returncode == 0, f"the load generator ended with {child.returncode}: {text}")
    return json.loads(text.splitlines()[-1])


@test("8 bulk flows and short connections beside them: none is lost, every byte is right, no packet is dropped", seconds=90)
def bulk_and_short(lab):
    with bench_programs(lab) as load:
        def moved():
            now = counters(lab)
            return min(now["bytes-sent"], now["bytes-received"])

        bulk = [load("bulk", "-m", way, "-v", "-n", "4", "-d", "4") for way in "DU"]
        before = until(10, moved, "the bulk flows do not begin")
        # a connection that takes 10 s is an error to the load generator
        short = finished(load("conns", "-n", "4", "-d", "2"))
        expect(short["total"] >= 4 and short["errors"] == 0, f"short connections beside bulk: {short}")
        expect(moved() - before > 8 * MIB, f"there was no bulk beside them: {moved() - before} bytes")
        for child in bulk:
            finished(child)
        until(10, lambda: flows(lab) == 0, "flows stay")
        nothing_dropped(lab)


@test("20,000 short connections leave no flow, no descriptor and no memory behind", seconds=120)
def many(lab):
    def connections(load, count):
        done = finished(load("conns", "-n", "32", "-c", str(count)))
        expect(done["total"] >= count and done["errors"] == 0, f"{done}")
        until(20, lambda: flows(lab) == 0, "flows stay")

    def tracked():
        return int(lab.app("cat", "/proc/sys/net/netfilter/nf_conntrack_count").stdout)

    # So that the daemon's ports do not run out either, however small the range.
    with settings(lab, tcp_tw_reuse=1), bench_programs(lab) as load:
        connections(load, 2000)
        rest = descriptors(lab), memory(lab)
        first = tracked()
        connections(load, 18000)
        until(20, lambda: descriptors(lab) <= rest[0], lambda: f"{descriptors(lab)} descriptors, {rest[0]} after the first 2,000")
        until(20, lambda: memory(lab) < rest[1] + 2 * MIB, lambda: f"{memory(lab)} bytes, {rest[1]} after the first 2,000")
        # Each connection is tracked twice, as the program's and as ours, until its time is over.
        expect(tracked() <= 10 * first + 1000, f"{tracked()} connections are tracked after 20,000, {first} after 2,000")
        now = counters(lab)
        refused = {name: value for name, value in now.items() if value and ("refused" in name or "timed-out" in name or "drop" in name)}
        expect(not refused, f"{refused}")
