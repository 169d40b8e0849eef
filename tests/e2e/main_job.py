"""The main job: whatever TCP a program speaks goes through the proxy, intact."""

import hashlib
import random
import time

from lab import PROXY6, PYTHON, SSH, TINY, WEB, WEB6, expect, ssh_session, test, until

HERE = __file__.rpartition("/")[0]
BLOCK = random.Random(20240229).randbytes(1 << 20)
GIB = 1 << 30


def digest_of(length):
    """SHA-256 of what lab-web.py serves as /bytes/LENGTH."""
    digest, sent = hashlib.sha256(), 0
    while sent < length:
        piece = (sent.to_bytes(8, "big") + BLOCK[8:])[: length - sent]
        digest.update(piece)
        sent += len(piece)
    return digest.hexdigest()


@test("curl over http and https, IPv4 and IPv6, comes from the proxy and nothing goes around it")
def curl(lab):
    lab.connect()
    with lab.nothing_direct():
        for url in "http://web.lab.test/", "https://web.lab.test/", f"http://{WEB}/":
            lab.fetch_through(url)
        for url in f"http://[{WEB6}]/", "https://web6.lab.test/":
            lab.fetch_through(url, source=WEB6[:9])


@test("the server does see the machine itself without a connection (the check above can fail)", daemon=None)
def curl_direct(lab):
    before = len(lab.direct())
    expect(WEB not in lab.fetch("http://web.lab.test/").stdout, "a direct fetch looks like one through the proxy")
    expect(len(lab.direct()) > before, "the sniffer does not see direct packets")


@test("a proxy without a password, a proxy given by IPv6 literal")
def other_proxies(lab):
    for url in TINY, f"http://tester@[{PROXY6}]:3128":
        lab.connect(url)
        with lab.nothing_direct():
            lab.fetch_through("https://web.lab.test/")
        lab.disconnect()


@test("wget")
def wget(lab):
    lab.connect()
    body = lab.alice("wget", "-qO-", "--ca-certificate", f"{lab.dir}/ca.pem", "https://web.lab.test/").stdout
    expect(WEB in body, body)


@test("git clone over https")
def git(lab):
    script = f"""
set -e
export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@lab.test GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@lab.test
rm -rf work {lab.dir}/www/git; mkdir -p {lab.dir}/www/git; git init -q work; cd work
head -c 3000000 /dev/urandom >big; git add big; git commit -qm one; git rev-parse HEAD
cd ..; git clone -q --bare work {lab.dir}/www/git/repo.git; git -C {lab.dir}/www/git/repo.git update-server-info
"""
    head = lab.net("bash", "-c", f"mkdir -p {lab.dir}/home/net && cd {lab.dir}/home/net\n{script}").stdout.split()[-1]
    lab.connect()
    with lab.nothing_direct():
        lab.alice("git", "clone", "-q", "https://web.lab.test/git/repo.git", "clone", env={"GIT_CONFIG_GLOBAL": "/dev/null"})
    got = lab.alice("git", "-C", "clone", "rev-parse", "HEAD").stdout.strip()
    expect(got == head, f"cloned {got}, not {head}")


@test("an interactive ssh session lives through 30 s of silence", seconds=90)
def ssh(lab):
    lab.connect()
    child, say = ssh_session(lab, "app", "alice", "-i", "key", f"root@{SSH}")
    try:
        say(1)
        time.sleep(30)
        say(2)
    finally:
        child.kill()
        child.wait()


@test("a download of 1 GiB arrives intact", seconds=240)
def download(lab):
    lab.connect()
    with lab.nothing_direct():
        done = lab.alice("bash", "-c", f"curl -sS --max-time 220 http://web.lab.test/bytes/{GIB} | sha256sum", timeout=230)
    expect(digest_of(GIB) in done.stdout, f"checksum differs: {done.stdout}")


@test("an upload of 1 GiB arrives intact", seconds=240)
def upload(lab):
    script = f"""
import http.client, hashlib, random
block, digest = random.Random(7).randbytes(1 << 20), hashlib.sha256()
def body():
    for number in range({GIB >> 20}):
        piece = number.to_bytes(8, "big") + block[8:]
        digest.update(piece)
        yield piece
connection = http.client.HTTPConnection("web.lab.test", 80, timeout=60)
connection.request("PUT", "/", body(), {{"Content-Length": "{GIB}"}})
answer = connection.getresponse().read().decode().strip()
print("intact" if answer == digest.hexdigest() else f"sent {{digest.hexdigest()}}, arrived {{answer}}")
"""
    lab.connect()
    with lab.nothing_direct():
        done = lab.alice(PYTHON, "-c", script, timeout=230)
    expect(done.stdout.strip() == "intact", done.stdout)


@test("200 fetches at the same time, each intact", seconds=120)
def parallel(lab):
    length = 300_000
    lab.connect()
    done = lab.alice(
        "bash", "-c",
        f"seq 200 | xargs -P 200 -I% sh -c 'curl -sS --max-time 90 https://web.lab.test/bytes/{length} | sha256sum' | sort | uniq -c",
        timeout=110,
    )
    expect(done.stdout.split() == ["200", digest_of(length), "-"], done.stdout)


@test("half-close: nc -N sends all, closes its side, and still gets the answer")
def half_close(lab):
    with lab.background("net", None, PYTHON, "-u", f"{HERE}/proxy.py", "198.51.100.10", "9001", "tunnel"):
        until(5, lambda: "9001" in lab.net("ss", "-Htln").stdout, "the test proxy does not listen")
        lab.connect("http://198.51.100.10:9001")
        got = lab.alice("nc", "-N", "-w", "10", WEB, "7", data="all of it\n").stdout
    expect(got == "all of it\n[10 bytes]", repr(got))


@test("a port that refuses, and a port that the proxy refuses: a real ECONNREFUSED, at once")
def refused(lab):
    script = """
import errno, socket, sys, time
start = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)
    print("connected")
except OSError as error:
    print(errno.errorcode.get(error.errno, error), "late" if time.monotonic() - start > 3 else "at once")
"""
    lab.connect()
    for address, port in (WEB, "9"), (WEB, "8081"), (WEB6, "9"):
        got = lab.alice(PYTHON, "-c", script, address, port).stdout.strip()
        expect(got == "ECONNREFUSED at once", f"[{address}]:{port}: {got}")
