"""The daemon is killed before every single step of Connect, of going on after a crash, and of Disconnect. Each time it gets to what was
wanted, or to what was before; and from the moment that the block is in force until somebody disconnects nothing leaves."""

import time

from lab import PYTHON, TINY, WEB, WEB6, equal, expect, test
from steps import FULL, Crashes, rest

# UDP and ICMP a hundred times a second, TCP ten times: IPv4 and IPv6, to the outside.
STREAM = f"""
import itertools, socket, struct, time
v4, v6 = socket.AF_INET, socket.AF_INET6
def tcp(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setblocking(False)
        s.connect_ex((address, 80))
def udp(family, address):
    with socket.socket(family, socket.SOCK_DGRAM) as s: s.sendto(b"x" * 40, (address, 9999))
def icmp(family, address):
    with socket.socket(v4, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s: s.sendto(struct.pack("!BBHHH", 8, 0, 0xf7ff, 0, 0), (address, 0))
for turn in itertools.count():
    for attempt, family, address in (udp, v4, "{WEB}"), (udp, v6, "{WEB6}"), (icmp, v4, "{WEB}"), (tcp, v4, "{WEB}"), (tcp, v6, "{WEB6}"):
        if attempt is not tcp or turn % 10 == 0:
            try: attempt(family, address)
            except OSError: pass
    time.sleep(0.01)
"""


def once(crashes, before, connect=0, on=0, off=0):
    """Connect, going on and Disconnect, each killed before the step with that number (0: before none). Whether going on was."""
    lab = crashes.lab
    first = crashes.asked(connect, "connect", "--proxy-url", TINY)
    since, wanted = first.closed(), first.did("rename", "/intent.json")
    expect(wanted or not since, "the network was closed before the record said so: a crash would open it")
    if not first.killed:
        lab.daemon_stop("KILL")
    second = crashes.again(on)
    since = since or second.closed()
    what = f"Connect killed before step {first.killed}, going on before {second.killed}"
    if second.killed:
        second = crashes.again(0)
        since = since or second.closed()
    state = rest(lab)
    expect((state == "connected") == wanted, f"{what}: the daemon is {state}, and a connection was {'' if wanted else 'not '}wanted")
    crashes.untrace(second)
    if wanted:
        lab.fetch_through("http://web.lab.test/")
        till = time.time()
        third = crashes.asked(off, "disconnect")
        what += f", Disconnect before {third.killed}"
        if third.killed:
            last = crashes.again(0)
            state = rest(lab)
            crashes.untrace(last)
            if state == "connected":
                expect(not third.did("unlink", "/intent.json"), f"{what}: the daemon connects again")
                till = time.time()
                lab.disconnect()
        crashes.windows.append((since, till, what))
    equal(before, lab.state(), f"{what}: the network is not what it was")
    return on and "going on before None" not in what


@test("kill -9 before every step of Connect, of going on after that, of Disconnect", seconds=3000 if FULL else 600)
def every_step(lab):
    crashes = Crashes(lab)
    rest(lab)
    before = lab.state()
    with lab.background("app", None, PYTHON, "-c", STREAM):
        # which steps there are, going on with a network that is as before
        connect = crashes.asked(0, "connect", "--proxy-url", TINY)
        off = crashes.asked(0, "disconnect")
        equal(before, lab.state(), "without a crash")
        wanted = next(int(line[1]) + 1 for line in connect.lines if line[2] == "rename")
        crashes.asked(wanted, "connect", "--proxy-url", TINY)
        on = crashes.again(0)
        crashes.untrace(on)
        crashes.asked(0, "disconnect")
        connect, on, off = (steps.numbers() for steps in (connect, on, off))
        for numbers in connect, on, off:
            expect(len(numbers) > 5, f"too few steps: {numbers}")
        print(f"         {len(connect)}, {len(on)}, {len(off)} steps of Connect, of going on, of Disconnect", flush=True)
        # The later Connect is killed, the less is left to do for going on: so its steps come from the last to the first.
        missed = []
        for number in connect:
            late = on.pop() if on and number > wanted else 0
            if not once(crashes, before, number, late, off.pop(0) if off else 0):
                missed += [late] if late else []
        for number in missed + on:
            expect(once(crashes, before, wanted, number, off.pop(0) if off else 0), f"going on has no step {number}")
        for number in off:
            once(crashes, before, off=number)
    crashes.leaks()
