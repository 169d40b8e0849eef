"""`proxyctl rescue` gives the network back, whatever state the daemon and the network are in."""

import subprocess

from lab import FAILURE, OK, TINY, equal, expect, test, until
from steps import FULL, Crashes, rest

ROUNDS = 200 if FULL else 3
LONG = 3000 if FULL else 180
NO_BUS = ["env", "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent"]


def rescue(lab, before, what, code=OK):
    done = lab.app(*NO_BUS, "proxyctl", "rescue", check=False, timeout=60)
    expect(done.returncode == code, lambda: f"{what}: rescue ended with {done.returncode}: {done.stdout}")
    if code == OK:
        equal(before, lab.state(), f"{what}: after rescue")
    return done.stdout


def again(lab):
    """The next daemon, at rest, as on a fresh machine."""
    lab.daemon()
    rest(lab)


@test("after kill -9, while another process keeps the firewall for the next daemon", seconds=LONG)
def after_kill(lab):
    before = lab.state()
    for number in range(ROUNDS):
        lab.connect(TINY)
        lab.daemon_stop("KILL")
        expect("table inet proxyvpn" in lab.state(), "kill -9 left no firewall: the test could not fail")
        text = rescue(lab, before, f"round {number}")
        expect("ended proxyvpn-hold (process " in text, f"rescue does not tell what it ended: {text}")
        again(lab)


@test("with a daemon that runs, connected and not", seconds=LONG)
def while_running(lab):
    before = lab.state()
    for number in range(ROUNDS):
        if number % 2 == 0:
            lab.connect(TINY)
        text = rescue(lab, before, f"round {number}")
        expect("stopped proxyvpnd (process " in text, f"rescue does not tell what it stopped: {text}")
        again(lab)


@test("with a daemon that was stopped by SIGSTOP", seconds=LONG * 2)
def while_stopped(lab):
    before = lab.state()
    for number in range(ROUNDS):
        lab.connect(TINY)
        lab.app("kill", "-STOP", lab.daemon_pid())
        text = rescue(lab, before, f"round {number}")
        expect("killed proxyvpnd (process " in text, f"rescue does not tell what it killed: {text}")
        again(lab)


@test("with what is half-made: killed before steps of Connect and of Disconnect", seconds=LONG * 2)
def half_made(lab):
    crashes = Crashes(lab)
    before = lab.state()
    connect = crashes.asked(0, "connect", "--proxy-url", TINY).numbers()
    disconnect = crashes.asked(0, "disconnect").numbers()
    rounds = ROUNDS * 2
    for number in range(rounds):
        step = connect[number * (len(connect) - 1) // (rounds - 1)]
        killed = crashes.asked(step, "connect", "--proxy-url", TINY).killed
        expect(killed, f"not killed before step {step} of Connect")
        rescue(lab, before, f"killed before {killed} of Connect")
        again(lab)
        lab.connect(TINY)
        step = disconnect[number * (len(disconnect) - 1) // (rounds - 1)]
        killed = crashes.asked(step, "disconnect").killed
        expect(killed, f"not killed before step {step} of Disconnect")
        rescue(lab, before, f"killed before {killed} of Disconnect")
        again(lab)


@test("a table that belongs to a program of somebody else: that is named and left alone", seconds=60, daemon=None)
def held_by_others(lab):
    before = lab.state()
    with lab.background("app", None, "nft", "-i", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as nft:
        nft.stdin.write(b"add table inet proxyvpn { flags owner; }\n")
        nft.stdin.flush()
        until(5, lambda: "inet proxyvpn" in lab.app("nft", "list", "tables").stdout, "nft made no table")
        lab.app("ip", "rule", "add", "priority", "3731", "ipproto", "tcp", "lookup", "7376750", "protocol", "112")
        text = rescue(lab, before, "held by nft", FAILURE)
        expect("belongs to nft (process " in text and "left alone" in text, f"rescue does not tell who holds the table: {text}")
        expect("3731" not in lab.app("ip", "rule").stdout, "the rest is not removed")
        expect(nft.poll() is None, "rescue ended a program of somebody else")
        nft.stdin.close()
    until(5, lambda: "inet proxyvpn" not in lab.app("nft", "list", "tables").stdout, "the table did not go with nft")
    rescue(lab, before, "when nft has ended")
