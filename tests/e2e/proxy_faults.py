"""A proxy that fails: one clear error, nothing around it, and the network as it was when there is no connection to be had."""

import subprocess
import time

from lab import PROXY, SQUID, expect, fails_clean, faulty, test, until


@test("wrong password")
def wrong_password(lab):
    lab.alice("sh", "-c", "printf wrong >bad; chmod 600 bad")
    text = fails_clean(lab, "--proxy-url", SQUID, "--password-file", f"{lab.dir}/home/alice/bad", words=["proxy.lab.test", "password"])
    expect("wrong" not in text.replace("wrong password", ""), f"the password is in the text: {text}")


@test("a password is needed and none is given")
def no_password(lab):
    fails_clean(lab, "--proxy-url", "http://proxy.lab.test:3128", words=["proxy.lab.test", "user name and password"])


@test("a proxy that refuses connections")
def refused(lab):
    fails_clean(lab, "--proxy-url", f"http://{PROXY}:3999", words=[f"{PROXY}:3999", "refused"])


@test("a proxy that cannot be reached at all", seconds=90)
def unreachable(lab):
    lab.net("ip", "route", "add", "blackhole", "198.51.100.99")
    fails_clean(lab, "--proxy-url", "http://198.51.100.99:3128", words=["198.51.100.99"], timeout=70)


@test("a name that does not resolve")
def unresolvable(lab):
    fails_clean(lab, "--proxy-url", "http://nowhere.lab.test:3128", words=["nowhere.lab.test"])


@test("a resolver that does not answer", seconds=90)
def no_resolver(lab):
    lab.service("stop", "dnsmasq")
    try:
        fails_clean(lab, "--proxy-url", SQUID.replace("tester@", ""), words=["proxy.lab.test"], timeout=70)
    finally:
        lab.service("start", "dnsmasq", 53)


@test("a proxy that takes the connection and answers nothing", seconds=90)
def silent(lab):
    with faulty(lab, "silent", 9002) as url:
        fails_clean(lab, "--proxy-url", url, words=[f"{PROXY}:9002", "answer"], timeout=70)


@test("something that does not speak HTTP, and a header without an end")
def not_http(lab):
    for mode, port in ("garbage", 9003), ("huge", 9004):
        with faulty(lab, mode, port) as url:
            fails_clean(lab, "--proxy-url", url, words=[f"{PROXY}:{port}"], timeout=40)
    fails_clean(lab, "--proxy-url", "http://web.lab.test:22", words=["web.lab.test:22"], timeout=40)


@test("a proxy that refuses each destination: the program's connect is refused, nothing goes around it")
def refuses_destinations(lab):
    with faulty(lab, "refuse", 9005) as url:
        lab.connect(url)
        with lab.nothing_direct():
            done = lab.fetch("http://web.lab.test/", check=False)
        expect(done.returncode == 7, f"curl ended with {done.returncode}, not 7 (could not connect): {done.stdout}")


@test("a proxy that stops answering: the program gets an error in bounded time", seconds=120)
def stops_answering(lab):
    with faulty(lab, "sleepy", 9006) as url:
        lab.connect(url)
        start = time.monotonic()
        with lab.nothing_direct():
            done = lab.fetch("http://web.lab.test/", timeout=90, check=False)
        expect(done.returncode == 7, f"curl ended with {done.returncode} after {time.monotonic() - start:.0f} s: {done.stdout}")


@test("a proxy that dies in mid-transfer: the program notices, nothing goes around it, and it works again when it is back", seconds=120)
def dies(lab):
    lab.connect()
    with lab.nothing_direct():
        transfer = lab.popen("app", "alice", "curl", "-sS", "--max-time", "60", "-o", "part", "http://web.lab.test/slow/1000000",
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        until(10, lambda: lab.alice("test", "-s", "part", check=False).returncode == 0, "the transfer did not begin")
        lab.service("stop", "squid")
        try:
            start = time.monotonic()
            transfer.wait(30)
            expect(transfer.returncode in (18, 56), f"curl ended with {transfer.returncode}: {transfer.stdout.read()}")
            expect(time.monotonic() - start < 10, "the program noticed late")
            done = lab.fetch("http://web.lab.test/", timeout=10, check=False)
            expect(done.returncode != 0, "a fetch worked without the proxy")
        finally:
            transfer.kill()
            lab.service("start", "squid", 3128)
        until(30, lambda: lab.fetch("http://web.lab.test/", timeout=5, check=False).returncode == 0, "no fetch works though the proxy is back")
    lab.fetch_through("http://web.lab.test/")
