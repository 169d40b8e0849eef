"""Running out of ports and descriptors: refused at once, told with the remedy, and over when the remedy is applied."""

import json

from lab import PROXY, PYTHON, WEB, expect, settings, test, tunnel_proxy, until

SECOND = "198.51.100.53"

# Short connections one after the other, so many per second, which this side closes first. Their own ports are from outside the range
# that the test narrows.
CONNECTIONS = """
import errno, json, socket, sys, time
address, count, rate, port = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
got, slowest, start = {}, 0, time.monotonic()
for number in range(count):
    time.sleep(max(0, start + number / rate - time.monotonic()))
    began, result = time.monotonic(), "ok"
    with socket.socket() as one:
        one.settimeout(20)
        one.bind(("", port + number))
        try:
            one.connect((address, 80))
            one.sendall(b"GET / HTTP/1.1\\r\\nHost: web\\r\\n\\r\\n")
            answer = b""
            while b"hello" not in answer:
                piece = one.recv(4096)
                if not piece:
                    result = "no answer"
                    break
                answer += piece
        except OSError as error:
            result = errno.errorcode.get(error.errno, str(error))
            slowest = max(slowest, time.monotonic() - began)
    got[result] = got.get(result, 0) + 1
print(json.dumps([got, slowest]))
"""


def connections(lab, count, rate, port):
    return json.loads(lab.alice(PYTHON, "-c", CONNECTIONS, WEB, str(count), str(rate), str(port), timeout=50).stdout)


def health(lab, code):
    return next((item["text"] for item in lab.status()["health"] if item["code"] == code), None)


@test("no port is left towards the proxy: refused at once, told with the remedy, which helps", seconds=100)
def ports(lab):
    with settings(lab, ip_local_port_range="30000 30199", tcp_tw_reuse=0), tunnel_proxy(lab, 9020) as url:
        lab.connect(url)
        got, slowest = connections(lab, 300, 100, 40000)
        expect(got.keys() == {"ok", "ECONNREFUSED"} and 150 < got["ok"] < 201, f"200 ports gave {got}")
        expect(slowest < 3, f"a refusal took {slowest:.1f} s")
        counters = lab.status()["statistics"]
        expect(counters["flows-refused-no-port"] == got["ECONNREFUSED"], f"{got}, but {counters}")
        expect(counters["flows-closed-first"] > 150 and counters["flows-refused-no-socket"] == 0, f"{counters}")
        text = until(5, lambda: health(lab, "ports-exhausted"), lambda: f"not told: {lab.status()['health']}")
        expect("tcp_tw_reuse=1" in text, f"the remedy is not in the text: {text}")

        lab.app("sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")
        until(10, lambda: lab.fetch("http://web.lab.test/", check=False).returncode == 0, "no port is reused")
        got, _ = connections(lab, 300, 100, 41000)
        expect(got == {"ok": 300}, f"with the remedy: {got}")
        until(40, lambda: not [item for item in lab.status()["health"] if "ports" in item["code"]], "told though it is over")


@test("no port is left towards one address of the proxy: the next one is taken")
def second_address(lab):
    with settings(lab, ip_local_port_range="30000 30099", tcp_tw_reuse=0), tunnel_proxy(lab, 9021):
        lab.connect("http://proxy.lab.test:9021", "--proxy-ip", PROXY, "--proxy-ip", SECOND)
        got, _ = connections(lab, 150, 100, 42000)
        expect(got == {"ok": 150}, f"100 ports towards each of two addresses gave {got}")
        used = lab.app("ss", "-Htan", "dport", "9021").stdout
        expect(PROXY in used and SECOND in used, f"not both addresses were used:\n{used}")


@test("no descriptor is left: refused at once and told with the remedy, connections that are open go on", seconds=90)
def descriptors(lab):
    with tunnel_proxy(lab, 9022) as url:
        lab.connect(url)
        pid = lab.daemon_pid()
        open_now = int(lab.app("sh", "-c", f"ls /proc/{pid}/fd | wc -l").stdout)
        with lab.background("app", "alice", "curl", "-sS", "--max-time", "60", "-o", "part", "http://web.lab.test/slow/60000") as transfer:
            until(10, lambda: lab.alice("test", "-s", "part", check=False).returncode == 0, "the transfer did not begin")
            # the daemon's own user may change its limits, where this machine's root may not
            prlimit = "app", "proxyvpn", "prlimit", "--pid", pid
            before = lab.run(*prlimit, "--nofile", "--output", "SOFT", "--noheadings").stdout.strip()
            lab.run(*prlimit, f"--nofile={open_now}:")
            got, slowest = connections(lab, 5, 100, 43000)
            expect(got == {"ECONNREFUSED": 5} and slowest < 3, f"without descriptors: {got}, after {slowest:.1f} s")
            counters = lab.status()["statistics"]
            expect(counters["flows-refused-no-socket"] >= 5 and counters["flows-refused-no-port"] == 0, f"{counters}")
            text = until(5, lambda: health(lab, "descriptors-exhausted"), lambda: f"not told: {lab.status()['health']}")
            expect("LimitNOFILE" in text, f"the remedy is not in the text: {text}")
            expect(not health(lab, "resolvers-changed"), "what could not be read is told as changed")
            lab.check_state("connected")
            lab.run(*prlimit, f"--nofile={before}:")
            got, _ = connections(lab, 5, 100, 44000)
            expect(got == {"ok": 5}, f"with descriptors again: {got}")
            expect(transfer.wait(30) == 0, "the transfer that was open before broke off")
