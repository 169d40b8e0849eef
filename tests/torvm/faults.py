"""The failsafe: whatever breaks, the machine is blocked at once, says why, and comes back by itself. Meanwhile the wire is empty but for
relays. (That the wire's detector fires is shown in network.py.)"""

import contextlib
import os
import signal
import subprocess
import time

from lab import PYTHON, WEB, expect, test, until
from torlab import PROFILE

# what programs do meanwhile: TCP, UDP, DNS, and as root past the routes
STREAM = f"""
import contextlib, socket, time
while True:
    for attempt in range(3):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
            s.settimeout(0.2)
            if attempt: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            s.connect(("{WEB}", 80))
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            if attempt: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            s.sendto(b"x" * 40, ("{WEB}", 53 if attempt == 2 else 9999))
    time.sleep(0.02)
"""


@contextlib.contextmanager
def stream(lab):
    """Programs that try all the time, and nothing of theirs on the wire."""
    with lab.only_to(), lab.background("app", None, PYTHON, "-c", STREAM, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        yield


@test("anti-test: disconnected, the stream of attempts is on the wire", daemon=None)
def detector(lab):
    before = len(lab.around(lab.relays))
    with lab.background("app", None, PYTHON, "-c", STREAM, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        time.sleep(1)
    seen = lab.around(lab.relays)[before:]
    for what in f"> {WEB}.80: Flags [S]", f"> {WEB}.9999: UDP", f"> {WEB}.53: ":
        expect(any(what in line for line in seen), f"the sniffer does not see '{what}'")


def blocked_and_back(lab, code, *words, seconds=20):
    """Blocked with this reason; then connected again by itself."""
    told = lab.await_state("blocked", "connecting", seconds=seconds)
    reason = told["reason"]
    text = f"{reason['code']} {reason['text']}"
    expect(reason["code"] == code, f"the reason is {text}")
    for word in words:
        expect(word.lower() in text.lower(), f"the reason does not say '{word}': {text}")
    lab.await_state("connected")
    lab.fetch_by_exit()


@test("kill -9 of QEMU: blocked at once with the cause, nothing on the wire, and it comes back", seconds=150, daemon="connected")
def qemu_killed(lab):
    with stream(lab):
        begin = time.monotonic()
        os.kill(lab.qemu(), signal.SIGKILL)
        until(5, lambda: lab.status()["state"] != "connected", "QEMU is dead, and the state is connected")
        took = time.monotonic() - begin
        expect(took < 1.5, f"noticed only after {took:.1f} s")
        blocked_and_back(lab, "vm-failed")


@test("QEMU stands still: noticed, blocked, started anew", seconds=180, daemon="connected")
def qemu_hangs(lab):
    with stream(lab):
        os.kill(lab.qemu(), signal.SIGSTOP)
        blocked_and_back(lab, "vm-hung", seconds=40)


@test("the TAP device is deleted: nothing goes out meanwhile, and it comes back", seconds=150, daemon="connected")
def tap_deleted(lab):
    with stream(lab):
        lab.app("ip", "link", "delete", lab.status()["device"])
        lab.await_state("blocked", "connecting", seconds=10)
        lab.await_state("connected")
        lab.fetch_by_exit()


@test("kill -9 of the daemon while connected: the VM runs on, connections through it live, the next daemon goes on with it", seconds=120, daemon="connected")
def daemon_killed(lab):
    qemu = lab.qemu()
    with stream(lab):
        lab.daemon_stop("KILL")
        time.sleep(3)
        expect(lab.qemu() == qemu, "the VM did not outlive the daemon")
        lab.daemon("--again")
        lab.await_state("connected")
        lab.fetch_by_exit()
    expect(lab.qemu() == qemu, "the next daemon started another VM")


@test("kill -9 of the daemon, and its record of the VM is lost: the next one ends that VM and starts another", seconds=150, daemon="connected")
def record_lost(lab):
    qemu = lab.qemu()
    with stream(lab):
        lab.daemon_stop("KILL")
        lab.app("rm", "/run/proxyvpn/torvm.json")
        offset = len(lab.daemon_log())
        lab.daemon("--again")
        lab.await_state("connected")
        lab.fetch_by_exit()
    told = lab.daemon_log()[offset:]
    expect("it is started anew" in told and "cannot connect" not in told, f"not at the first attempt: {told[-2000:]}")
    expect(lab.qemu() not in (None, qemu), "the next daemon went on with a VM that it does not know")


@test("the daemon is told to restart: the VM runs on", seconds=120, daemon="connected")
def restarted(lab):
    qemu = lab.qemu()
    with stream(lab):
        lab.daemon_stop("KILL")
        lab.daemon("--again", "--keep-block")  # as the unit starts it
        lab.await_state("connected")
        lab.daemon_stop("INT")  # as TERM, but the lab keeps what systemd keeps for a restart
        lab.daemon("--again", "--keep-block")
        lab.await_state("connected")
        lab.fetch_by_exit()
    expect(lab.qemu() == qemu, "a restart of the daemon ended the VM")


PHASES = ("check-privileges", "save-network", "create-tap", "launch-vm", "wait-tap", "configure-tap", "flush-dns", "wait-bootstrap")


@test("kill -9 of the daemon in each phase of connecting: the next one goes on to connected; no packet around Tor behind the firewall", seconds=400, daemon=None)
def daemon_killed_in_phases(lab):
    options = "--log-level", "debug"
    lab.daemon(*options)
    for phase in PHASES:
        offset = len(lab.daemon_log())
        with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            until(60, lambda: f'phase="{phase}"' in lab.daemon_log()[offset:], f"no phase {phase}")
            lab.daemon_stop("KILL")
        with stream(lab) if phase in PHASES[6:] else contextlib.nullcontext():
            time.sleep(0.3)
            lab.daemon("--again", *options)
            state = lab.status()["state"]
            expect(state in ("connecting", "connected", "blocked"), f"killed in {phase}: the next daemon is {state}")
        with stream(lab):
            if phase == PHASES[-1]:
                lab.await_state("connected")
                lab.fetch_by_exit()
        lab.disconnect()
        until(10, lambda: lab.qemu() is None, f"killed in {phase}: after disconnect QEMU is left")
