"""Nothing leaks: the probes of ../leaks in the states and under the faults of the TorVM backend. leaks.py [--image DIR] and the options of
../leaks/run.py. What may leave is TCP to relays; every probe must be seen with the protection off, or its row fails."""

import os
import signal
import sys
import time

sys.dont_write_bytecode = True  # root leaves nothing among the sources
HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
sys.path[:0] = [f"{TESTS}/leaks", f"{TESTS}/e2e", HERE]
os.environ["PROXYVPN_TUNNEL4"] = "10.10.10.2"  # before the plan is read, here and in the agents
import frames  # noqa: E402
import plan  # noqa: E402
import run  # noqa: E402
import scenarios  # noqa: E402
import wire  # noqa: E402
from lab import ROOT, expect, until  # noqa: E402
from scenarios import Column, acting, protected_by_the_kernel  # noqa: E402
from torlab import CONNECT_SECONDS, PROFILE, TorLab  # noqa: E402

LAUNCHER = "/run/proxyvpn-qemu.sock"


class Oracle(wire.Oracle):
    """Knows that only relays are talked to."""

    def __init__(self, relays):
        super().__init__([], set())
        self.relays = set(relays)

    def allowed(self, packet):
        if packet.source in (plan.TUNNEL4, plan.TUNNEL6):
            return False
        if packet.kind == frames.ARP:
            return True
        if packet.protocol == 58:
            return wire.allowed_neighbour_discovery(packet)
        if packet.protocol != 6 or not packet.ports or wire.probe_of_ports(packet):
            return False
        source, destination = packet.ports
        return packet.destination in self.relays or (packet.source, packet.destination, source, destination) in self.inbound


class World(run.Timed):
    def make_oracle(self):
        return Oracle(self.lab.relays)

    def connected(self):
        self.disconnected()
        self.lab.connect_tor()

    def await_state(self, *wanted, seconds=CONNECT_SECONDS):
        super().await_state(*wanted, seconds=seconds)


COLUMNS = [next(one for one in scenarios.COLUMNS if one.name == "open")]


def column(name, text):
    def register(function):
        COLUMNS.append(Column(name, text, "guard", function))
        return function

    return register


@column("connecting", "connecting, from the phase behind configure-tap on, while Tor gets to 100 %")
def _(world):
    world.disconnected()
    offset = world.log_size()
    with acting(world, "connect", PROFILE) as action:
        until(60, lambda: 'phase="flush-dns"' in world.log_since(offset), "no phase flush-dns")
        with world.guarded(), world.stream():
            world.fire()
            expect(action.wait(CONNECT_SECONDS) == 0, "connect failed")
            world.fire()


@column("connected", "connected")
def _(world):
    if world.state() != "connected":
        world.connected()
    with world.guarded():
        for _ in range(4):
            world.fire(2)
            time.sleep(0.1)
        time.sleep(1.2)  # what a kernel sends again after a second


@column("daemon-killed", "kill -9 of the daemon while connected, and a new start")
def _(world):
    with world.guarded(), world.stream():
        for _ in range(world.times(2, 50)):
            world.lab.daemon_stop("KILL")
            world.fire(1)
            world.restart()
            world.fire(1)
            world.await_state("connected")


@column("blocked", "blocked: QEMU is killed and cannot be started; then back")
def _(world):
    with world.guarded(), world.stream():
        world.lab.app("mv", LAUNCHER, f"{LAUNCHER}.away")
        os.kill(world.lab.qemu(), signal.SIGKILL)
        world.await_state("blocked", seconds=10)
        world.fire(3)
        world.lab.app("mv", f"{LAUNCHER}.away", LAUNCHER)
        world.await_state("connected")
        world.fire()


@column("device-deleted", "the TAP device is deleted, and QEMU with it; then back")
def _(world):
    with world.guarded(), world.stream():
        world.shell("app", f"ip link delete {world.lab.status()['device']}")
        world.fire(2)
        time.sleep(1)  # noticed by now
        world.await_state("connected")
        world.fire(1)


@column("disconnecting", "proxyctl disconnect, step by step: while the firewall is there")
def _(world):
    with acting(world, "disconnect") as action:
        guarded = world.slowly(action, lambda: protected_by_the_kernel(world))
    expect(guarded, "disconnect was over before its first step")
    world.await_state("disconnected")


def main():
    parser = run.arguments()
    target = os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target")
    parser.add_argument("--image", default=f"{target}/torvm-image", help="of scripts/build-torvm-image.sh")
    options = parser.parse_args()
    return run.measure(options, COLUMNS, lambda stage: World(TorLab(f"torvm-leaks-{os.getpid()}", stage, options.image), options.logs, options.full))


if __name__ == "__main__":
    sys.exit(main())
