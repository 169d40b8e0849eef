"""Others change the network while a connection is wanted: what is ours is put back, and the connection follows by itself. Nothing opens."""

import contextlib
import json
import os
import subprocess
import time

from lab import APP4, APP6, DNS, FAILURE, PROXY, PYTHON, SQUID, TINY, WEB, expect, test, until

HERE = os.path.dirname(os.path.abspath(__file__))
GW4, GW6 = "192.0.2.1", "2001:db8:1::1"

# At once, on a machine that has much else to do: without being told, the daemon looks every 30 s.
SOON = 8

# Does each change of its arguments, and prints how many milliseconds later all of ours was as before.
PUT_BACK = """
import subprocess, sys, time
LOOK = "ip rule; ip -6 rule; ip route show table 7376750; ip -6 route show table 7376750; ip addr show dev pvpn0; nft -s list ruleset"
def look():
    return subprocess.run(["sh", "-c", LOOK], capture_output=True, text=True).stdout
for change in sys.argv[1:]:
    before = look()
    assert "7376750" in before and "table inet proxyvpn" in before, before
    subprocess.run(["sh", "-c", change], capture_output=True)
    start = time.monotonic()
    while look() != before and time.monotonic() < start + 20: pass
    print(round((time.monotonic() - start) * 1000), change, flush=True)
    time.sleep(1)
"""

CHANGES = [
    "ip rule del priority 3731", "ip -6 rule del priority 3731; ip rule del priority 3700", "ip rule flush protocol 112; ip -6 rule flush protocol 112",
    "ip route flush table 7376750", "ip -6 route del default table 7376750", "ip addr flush dev pvpn0", "ip link set pvpn0 mtu 1300",
    "ip link set pvpn0 down", "nft flush ruleset", "nft delete table inet proxyvpn", "nft insert rule inet proxyvpn postrouting accept",
]

# UDP, TCP and a bound socket towards the web server, until it is ended.
STREAM = f"""
import socket, time
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for send in (lambda: u.sendto(b"x", ("{WEB}", 9999)),):
        try: send()
        except OSError: pass
    t = socket.socket(); t.setblocking(False); t.connect_ex(("{WEB}", 80)); t.close()
    time.sleep(0.002)
"""


def stream(lab):
    return lab.background("app", "alice", PYTHON, "-c", STREAM, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def codes(lab):
    return [item["code"] for item in lab.status()["health"]]


def state(lab, wanted, seconds, reason=""):
    """Waits for a state, with its reason's code, and returns how long that took."""
    start = time.monotonic()

    def there():
        status = lab.status()
        return status["state"] == wanted and (not reason or status["reason"]["code"] == reason)

    until(seconds, there, lambda: f"not {wanted} {reason} within {seconds} s: {lab.status()['state']} {lab.status()['reason']}")
    return time.monotonic() - start


def down(lab):
    lab.app("ip", "link", "set", "eth0", "down")


def up(lab):
    """As the lab had it."""
    lab.app("sh", "-c", f"""ip link set eth0 up; ip route replace default via {GW4}
        ip -6 addr replace {APP6}/64 dev eth0 nodad; ip -6 route replace default via {GW6}""")
    until(10, lambda: lab.app("ip", "-6", "addr", "show", "dev", "eth0", "scope", "link").stdout, "eth0 has no link-local address")


@contextlib.contextmanager
def restored(lab):
    try:
        yield
    finally:
        up(lab)


@test("what others remove or change is put back at once; no TCP goes around the tunnel meanwhile", seconds=180)
def put_back(lab):
    lab.connect(TINY)
    time.sleep(1)
    with stream(lab):
        before = len(lab.packets(f"src host 192.0.2.2 and dst host {WEB} and tcp"))
        lines = lab.app(PYTHON, "-c", PUT_BACK, *CHANGES, timeout=150).stdout.splitlines()
        after = lab.packets(f"src host 192.0.2.2 and dst host {WEB} and tcp")
    expect(len(lines) == len(CHANGES), f"not all was done: {lines}")
    slow = [line for line in lines if int(line.split()[0]) > SOON * 1000]
    print("  put back, ms after the end of the change (seen by a poll of some 30 ms):", "; ".join(lines))
    expect(not slow, f"put back too late: {slow}")
    expect(len(after) == before, lambda: "TCP went around the tunnel:\n" + "\n".join(after[before:][:5]))
    expect("put-back" in codes(lab), f"nobody was told: {codes(lab)}")
    lab.check_state("connected")
    lab.fetch_through("http://web.lab.test/")


@test("who fights is told about, and has what was removed put back in the end", seconds=60)
def fight(lab):
    lab.connect(TINY)
    with lab.background("app", None, "sh", "-c", "while :; do ip rule del priority 3731 2>/dev/null; done"):
        until(20, lambda: "contested" in codes(lab), lambda: f"nobody was told: {codes(lab)}")
    until(5, lambda: "lookup 7376750" in lab.app("ip", "rule").stdout, "the rule did not come back")
    lab.fetch_through("http://web.lab.test/")


@test("a thousand route changes in a second by others cost little, and what is ours is put back meanwhile", seconds=60)
def route_daemon(lab):
    lab.connect(TINY)
    pid = lab.daemon_pid()
    ticks = os.sysconf("SC_CLK_TCK")

    def used():
        return sum(int(field) for field in lab.app("cat", f"/proc/{pid}/stat").stdout.rsplit(")", 1)[1].split()[11:13]) / ticks

    lab.app("sh", "-c", """ip link add rd0 type veth peer name rd1; ip link set rd0 up; ip link set rd1 up
        for n in $(seq 100); do echo route add 10.99.$n.0/24 dev rd0 table 254; done >/run/add
        for n in $(seq 100); do echo route add 10.99.$n.0/24 dev rd0 table 100; done >/run/add100
        sed s/add/del/ /run/add >/run/del; sed s/add/del/ /run/add100 >/run/del100""")
    time.sleep(3)
    try:
        before, start = used(), time.monotonic()
        with lab.background("app", None, "sh", "-c", "while :; do for f in add add100 del del100; do ip -batch /run/$f; sleep 0.1; done; done"):
            time.sleep(5)
            lab.app("ip", "rule", "del", "priority", "3731")
            until(SOON, lambda: "lookup 7376750" in lab.app("ip", "rule").stdout, "not put back")
            time.sleep(1)
        share = (used() - before) / (time.monotonic() - start)
        print(f"  the daemon took {share:.1%} of a processor")
        expect(share < 0.15, f"the daemon took {share:.1%} of a processor")
    finally:
        lab.app("sh", "-c", "ip link del rd0; rm -f /run/add* /run/del*")
    lab.check_state("connected")


@test("uplink down: blocked for that reason; up again: connected by itself, and nothing left meanwhile", seconds=120)
def uplink_down(lab):
    lab.connect(TINY)
    with stream(lab), lab.nothing_direct(), restored(lab):
        for _ in range(3):
            down(lab)
            took = state(lab, "blocked", 5, "no-uplink")
            expect("network is down" in lab.status()["reason"]["text"], lab.status()["reason"])
            time.sleep(0.5)
            up(lab)
            back = state(lab, "connected", 8)
            print(f"  blocked after {took:.2f} s, connected again after {back:.2f} s")
            time.sleep(1)
    lab.fetch_through("http://web.lab.test/")


@test("a long time without a network: the first uplink that comes is taken at once, not after the pause of a minute", seconds=150)
def long_outage(lab):
    lab.connect(TINY)
    with lab.nothing_direct(), restored(lab):
        down(lab)
        state(lab, "blocked", 5, "no-uplink")
        time.sleep(35)
        up(lab)
        took = state(lab, "connected", 5)
        print(f"  connected again after {took:.2f} s")


@test("the default route replaced, gone and back, and another address: the connection follows", seconds=120)
def another_gateway(lab):
    lab.net("ip", "addr", "add", "192.0.2.254/24", "dev", "wan0")
    lab.connect(TINY)
    try:
        with lab.nothing_direct(" and not src host 192.0.2.77"), restored(lab):
            lab.app("ip", "route", "replace", "default", "via", "192.0.2.254")
            time.sleep(1)
            lab.check_state("connected")
            lab.fetch_through("http://web.lab.test/")
            lab.app("ip", "route", "del", "default")
            state(lab, "blocked", 5, "no-uplink")
            # a new lease: another address too
            lab.app("sh", "-c", f"ip addr add 192.0.2.77/24 dev eth0; ip route add default via {GW4} src 192.0.2.77")
            state(lab, "connected", 5)
            lab.fetch_through("http://web.lab.test/")
            lab.app("sh", "-c", f"ip route replace default via {GW4}; ip addr del 192.0.2.77/24 dev eth0")
            time.sleep(0.5)
            state(lab, "connected", 5)
    finally:
        lab.net("ip", "addr", "del", "192.0.2.254/24", "dev", "wan0")


@test("while a connection is made anew and the proxy is silent, what is in force is put back too", seconds=120)
def connecting(lab):
    lab.connect(TINY)
    lab.net("nft", "add table inet silent; add chain inet silent in { type filter hook input priority 0; }; add rule inet silent in tcp dport 8888 drop")
    try:
        with stream(lab), lab.nothing_direct(f" and not dst host {PROXY}"):
            again = lab.popen("app", "alice", "proxyctl", "reconnect", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            asking, rounds = lambda: lab.status()["phase"] == "probe-upstream", 0  # noqa: E731
            while rounds < 3:
                until(20, asking, lambda: f"not asking the proxy: {lab.status()}")
                lab.app("sh", "-c", "ip rule del priority 3731; ip route flush table 7376750")
                until(SOON, lambda: "lookup 7376750" in lab.app("ip", "rule").stdout and "unreachable" in lab.app("ip", "route", "show", "table", "7376750").stdout,
                      "not put back while connecting")
                # it asks for 10 s, and pauses then: what is seen in a pause does not count
                rounds += asking()
            again.kill()
            again.wait()
    finally:
        lab.net("nft", "delete", "table", "inet", "silent")
    state(lab, "connected", 20)


@test("another address: what is open from the old one ends at once, so that programs try again; with the same address it goes on", seconds=90)
def stranded(lab):
    def transfer():
        child = lab.popen("app", "alice", "curl", "-sS", "--max-time", "40", "-o", "part", "http://web.lab.test/slow/1500000",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        until(10, lambda: lab.alice("stat", "-c%s", "part", check=False).stdout.strip() not in ("", "0"), "the transfer did not begin")
        return child

    def moved(address):
        lab.app("sh", "-c", f"ip addr flush dev eth0 scope global; ip addr add {address}/24 dev eth0; ip route add default via {GW4}")

    lab.connect(TINY)
    child = transfer()
    try:
        with lab.nothing_direct(" and not src host 192.0.2.77"), restored(lab):
            moved("192.0.2.2")
            state(lab, "connected", 5)
            time.sleep(2)
            expect(child.poll() is None, lambda: f"a transfer with the same address ended: {child.stdout.read()}")
            moved("192.0.2.77")
            start = time.monotonic()
            until(SOON, lambda: child.poll() is not None, "a transfer from an address that is gone hangs")
            print(f"  ended {time.monotonic() - start:.2f} s after the move")
            state(lab, "connected", 5)
            lab.fetch_through("http://web.lab.test/")
            moved(APP4)
    finally:
        child.kill()
        child.wait()


@test("no route to the proxy, and a network that is down, are not taken for a dead proxy", seconds=90)
def causes(lab):
    lab.connect(TINY)
    lab.app("ip", "route", "add", "unreachable", f"{PROXY}/32")
    try:
        state(lab, "blocked", 5, "no-route")
    finally:
        lab.app("ip", "route", "del", "unreachable", f"{PROXY}/32")
    state(lab, "connected", 5)
    lab.service("stop", "tinyproxy")
    try:
        lab.fetch("http://web.lab.test/", check=False, timeout=5)
        lab.app("sh", "-c", "for i in 1 2 3 4; do curl -s -m 2 http://web.lab.test/; done; true")
        state(lab, "blocked", 15, "upstream-unreachable")
    finally:
        lab.service("start", "tinyproxy", 8888)
    state(lab, "connected", 70)
    lab.disconnect()
    before = lab.state()
    with restored(lab):
        down(lab)
        answer = lab.connect(TINY, code=FAILURE)
        expect("network is down" in answer, answer)
        expect(lab.status()["reason"]["code"] == "no-uplink", lab.status()["reason"])
    until(5, lambda: lab.state() == before, "an attempt without a network left something")


@contextlib.contextmanager
def asking(lab):
    """A connection that is being made: its proxy is asked, and the answer is held back until what is given is called."""
    lab.net("nft", "add table inet late; add chain inet late out { type filter hook output priority 0; }; "
            "add rule inet late out tcp sport 8888 tcp flags & psh == psh drop")
    child = lab.popen("app", "alice", "proxyctl", "connect", "--proxy-url", TINY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(SOON, lambda: lab.status()["phase"] == "probe-upstream", lambda: f"not asking the proxy: {lab.status()}")
        yield lambda: lab.net("nft", "delete", "table", "inet", "late")
    finally:
        child.wait(30)


@test("a way that is cut after the proxy has answered and before the first look at the network is noticed", seconds=60)
def cut_early(lab):
    try:
        with asking(lab) as answer:
            pid = lab.daemon_pid()
            lab.app("kill", "-STOP", pid)
            try:
                answer()
                waiting = ["ss", "-Htn", "state", "established", "dst", f"{PROXY}:8888"]
                until(20, lambda: any(int(line.split()[0]) for line in lab.app(*waiting).stdout.splitlines()), "the proxy's answer does not come")
                lab.app("ip", "route", "add", "unreachable", f"{PROXY}/32")
            finally:
                lab.app("kill", "-CONT", pid)
            state(lab, "blocked", 10, "no-route")
            lab.app("ip", "route", "del", "unreachable", f"{PROXY}/32")
    finally:
        lab.app("ip", "route", "del", "unreachable", f"{PROXY}/32", check=False)
    state(lab, "connected", 10)


@test("the machine's DNS servers that change while the proxy is asked are followed", seconds=60)
def resolvers_early(lab):
    try:
        with asking(lab) as answer:
            lab.app("sh", "-c", "echo nameserver 198.51.100.54 > /etc/resolv.conf")
            answer()
            state(lab, "connected", 20)
            until(SOON, lambda: lab.status()["resolvers"] == ["198.51.100.54"], lambda: f"not followed: {lab.status()['resolvers']}")
    finally:
        lab.app("sh", "-c", f"echo nameserver {DNS} > /etc/new.conf; mv /etc/new.conf /etc/resolv.conf")


@test("routes of others in our table, and a firewall that another program holds, are said to be what they are", seconds=90)
def taken(lab):
    lab.connect(TINY)
    lab.app("ip", "route", "add", "198.18.7.0/24", "dev", "eth0", "table", "7376750")
    try:
        until(5, lambda: "foreign-routes" in codes(lab), lambda: f"nobody told: {codes(lab)}")
        lab.proxyctl("reconnect", code=None)
        state(lab, "blocked", 5, "routes-taken")
    finally:
        lab.app("ip", "route", "del", "198.18.7.0/24", "table", "7376750")
    state(lab, "connected", 10)
    lab.disconnect()
    holder = lab.popen("app", None, "nft", "-i", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        holder.stdin.write("add table inet proxyvpn { flags owner; }\n")
        holder.stdin.flush()
        until(5, lambda: "owner" in lab.app("nft", "list", "tables").stdout or "proxyvpn" in lab.app("nft", "list", "tables").stdout, "nft did not take the table")
        answer = lab.connect(TINY, code=FAILURE)
        expect(lab.status()["reason"]["code"] == "firewall-taken", answer)
    finally:
        holder.kill()
        holder.wait()


@test("an uplink renamed, and a second one with strict reverse-path filtering, are taken in; nothing leaves by them", seconds=90)
def other_uplinks(lab):
    pid = lab.net("sh", "-c", "echo $$").stdout and lab.pids["net"]
    mark = "/proc/sys/net/ipv4/conf/{}/src_valid_mark"
    lab.connect(TINY)
    lab.app("sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/default/rp_filter")
    try:
        subprocess.run(["nsenter", "-t", pid, "-n", "ip", "link", "add", "wan1", "type", "veth", "peer", "name", "eth1", "netns", lab.pids["app"]], check=True)
        expect("route-specific" not in codes(lab), codes(lab))
        lab.app("sh", "-c", "ip link set eth1 up; ip addr add 192.168.77.2/24 dev eth1; ip route add 198.18.0.0/24 via 192.168.77.1 dev eth1 proto dhcp")
        lab.net("sh", "-c", "ip link set wan1 up; ip addr add 192.168.77.1/24 dev wan1; nft 'add table inet seen { counter got { } ; "
                "chain in { type filter hook prerouting priority -400; iifname wan1 meta l4proto { tcp, udp, icmp } counter name got ; } ; }'")
        until(SOON, lambda: lab.app("cat", mark.format("eth1")).stdout.strip() == "112", "the second uplink did not get its src_valid_mark")
        lab.app(PYTHON, "-c", """
import socket
for kind in socket.SOCK_DGRAM, socket.SOCK_STREAM:
    for to in ("192.168.77.1", 9), ("198.18.0.1", 9):
        s = socket.socket(socket.AF_INET, kind); s.setblocking(False)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth1")
        try: s.connect(to); s.send(b"x")
        except OSError: pass
""")
        time.sleep(0.3)
        got = lab.net("nft", "-j", "list", "counter", "inet", "seen", "got").stdout
        packets = [entry["counter"]["packets"] for entry in json.loads(got)["nftables"] if "counter" in entry]
        expect(packets == [0], f"something left by the second uplink: {got}")
        until(8, lambda: "route-specific" in codes(lab), lambda: f"nobody told of a route that the network set: {codes(lab)}")
        lab.app("sh", "-c", "ip link set eth1 down; ip link set eth1 name uplink7; ip link set uplink7 up")
        until(SOON, lambda: lab.app("cat", mark.format("uplink7"), check=False).stdout.strip() == "112", "a renamed uplink lost its src_valid_mark")
        lab.check_state("connected")
        lab.fetch_through("http://web.lab.test/")
    finally:
        lab.app("sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/default/rp_filter; ip link del eth1 2>/dev/null || ip link del uplink7")
        lab.net("nft", "delete", "table", "inet", "seen", check=False)
    lab.check_state("connected")


@test("the tunnel device renamed, deleted or down by others: made anew or put back, nothing left meanwhile", seconds=90)
def device(lab):
    lab.connect(TINY)
    with stream(lab), lab.nothing_direct():
        for change in "ip link set pvpn0 down", "ip link set pvpn0 down; ip link set pvpn0 name other0", "ip link del pvpn0":
            lab.app("sh", "-c", change)
            # for a moment it is still said to be connected, and a block has a device too: what counts is that programs get through
            time.sleep(0.3)
            until(10, lambda: "hello from" in lab.fetch("http://web.lab.test/", check=False, timeout=5).stdout,
                  lambda: f"no way through after: {change}: {lab.status()['state']} {lab.status()['reason']}")
            state(lab, "connected", 5)
            expect("UP" in lab.app("ip", "link", "show", "pvpn0").stdout, "the device is not up")
            time.sleep(0.5)
    expect("other0" not in lab.app("ip", "link").stdout, "the renamed device stayed")


@test("the machine's DNS servers change, in any way files can: the exceptions follow in one step; named ones stay", seconds=90)
def resolvers(lab):
    # a server on a second address, which only its exception lets through
    lab.net("ip", "addr", "add", "198.51.100.54/32", "dev", "lo")
    rules = lambda: lab.app("ip", "rule").stdout  # noqa: E731
    followed = lambda server: f"to {server} " in rules() and lab.status()["resolvers"] == [server]  # noqa: E731
    ways = [
        ("echo nameserver 198.51.100.54 > /etc/resolv.conf", "198.51.100.54"),
        (f"echo nameserver {DNS} > /etc/new.conf; mv /etc/new.conf /etc/resolv.conf", DNS),
        ("mkdir -p /run/elsewhere; echo nameserver 198.51.100.54 > /run/elsewhere/a; ln -sf /run/elsewhere/a /etc/resolv.conf", "198.51.100.54"),
        (f"echo nameserver {DNS} > /run/elsewhere/b; mv /run/elsewhere/b /run/elsewhere/a", DNS),
        ("rm /etc/resolv.conf; echo nameserver 198.51.100.54 > /etc/resolv.conf", "198.51.100.54"),
    ]
    try:
        lab.connect(TINY)
        expect(followed(DNS), rules())
        for way, server in ways:
            lab.app("sh", "-c", way)
            until(SOON, lambda: followed(server), lambda: f"not followed: {way}\n{rules()}{lab.status()['resolvers']}")
            other = "198.51.100.54" if server == DNS else DNS
            expect(other not in rules(), "the former server is still let through")
            before = len(lab.packets(f"dst host {other} and port 53"))
            lab.app(PYTHON, "-c", f"import socket; s = socket.socket(2, 2); s.sendto(b'x' * 20, ('{other}', 53))", check=False)
            lab.app(PYTHON, "-c", f"import socket; s = socket.socket(2, 2); s.sendto(b'x' * 20, ('{server}', 53))")
            until(SOON, lambda: lab.packets(f"dst host {server} and port 53"), "the new server is not let through")
            expect(len(lab.packets(f"dst host {other} and port 53")) == before, "the former server could be asked")
        expect("resolvers-changed" in codes(lab), codes(lab))
        lab.disconnect()
        lab.connect(TINY, "--dns", DNS)
        lab.app("sh", "-c", "echo nameserver 198.51.100.54 > /etc/resolv.conf")
        time.sleep(1)
        expect(lab.status()["resolvers"] == [DNS] and "198.51.100.54" not in rules(), rules())
    finally:
        lab.app("sh", "-c", f"rm -rf /run/elsewhere; echo nameserver {DNS} > /etc/new.conf; mv /etc/new.conf /etc/resolv.conf")
        lab.net("ip", "addr", "del", "198.51.100.54/32", "dev", "lo")


@test("the end of a sleep makes the daemon try at once", seconds=120)
def resume(lab):
    lab.connect(TINY)
    lab.service("stop", "tinyproxy")
    lab.app("sh", "-c", "for i in 1 2 3 4; do curl -s -m 2 http://web.lab.test/; done; true")
    state(lab, "blocked", 15)
    # tries come 1, 3, 7, 15 and 31 s after the begin
    time.sleep(16)
    lab.service("start", "tinyproxy", 8888)
    time.sleep(1)
    lab.check_state("blocked")
    lab.app(PYTHON, f"{HERE}/rawbus.py", "awake")
    took = state(lab, "connected", 4)
    print(f"  connected {took:.2f} s after the end of the sleep")
    expect("woke up" in lab.daemon_log(), "the signal was not seen")


@test("a proxy with a name and a password is found again by itself", seconds=60)
def by_name(lab):
    lab.connect(SQUID)
    with lab.nothing_direct(), restored(lab):
        down(lab)
        state(lab, "blocked", 5, "no-uplink")
        lab.app("ip", "link", "del", "pvpn0")
        time.sleep(3)
        state(lab, "blocked", 5, "no-uplink")
        up(lab)
        state(lab, "connected", 8)
    lab.fetch_through("http://web.lab.test/")


@test("a proxy whose name could not be looked up is found when the machine gets other DNS servers", seconds=120)
def found_by_other_servers(lab):
    lab.connect(SQUID)
    try:
        with lab.nothing_direct(" and not dst host 198.51.100.54"):
            lab.app("sh", "-c", "echo nameserver 198.51.100.54 > /etc/resolv.conf")
            until(SOON, lambda: lab.status()["resolvers"] == ["198.51.100.54"], "not followed")
            lab.app("ip", "link", "del", "pvpn0")
            state(lab, "blocked", 20, "upstream-unresolvable")
            # tried again after 1 s, 2 s, 4 s: in the next long pause the servers change
            until(60, lambda: lab.daemon_log().count("cannot be looked up") >= 6, "not tried again")
            state(lab, "blocked", 15, "upstream-unresolvable")
            lab.app("sh", "-c", f"echo nameserver {DNS} > /etc/resolv.conf")
            print(f"  connected {state(lab, 'connected', 2.5):.2f} s after the change")
    finally:
        lab.app("sh", "-c", f"echo nameserver {DNS} > /etc/resolv.conf")
