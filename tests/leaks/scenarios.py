"""The columns of the matrix: states of the machine, and faults under a stream of probes.

A column says what is done and, by `world.guarded()`, when nothing may leave. `anti` columns are the other way round: with the protection
off, every probe must be seen at the far end, or its whole row is worth nothing.
"""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import namedtuple

import plan
from lab import PYTHON, ROOT, WEB, Skipped, expect, until
from world import FIREWALL_IN_FORCE, PROXY_URL, Uplink, freeze

Column = namedtuple("Column", "name text kind run")
COLUMNS = []
# without the kill switch these are steered into the tunnel all the same, and those go around it
STEERED = ("tcp", "tcp6", "mptcp", "pushed-tcp", "lan-tcp", "ra-tcp", "dns-tcp", "proxy-tcp", "proxy-other", "proxy-root", "proxy-daemon")
UNSTEERED = ("udp", "udp6", "icmp", "icmp6", "dns-udp", "mdns", "ssdp", "broadcast", "device-udp", "pktinfo", "pushed-udp", "lan-udp", "stun", "quic")


def column(name, text, kind="guard"):
    def register(run):
        COLUMNS.append(Column(name, text, kind, run))
        return run

    return register


def protected_by_the_kernel(world):
    """Whether the chain that drops by the final device is there."""
    return "hook postrouting" in world.shell("app", "nft list table inet proxyvpn", check=False)


@contextlib.contextmanager
def tunnel_address_without_us(world):
    """A device with the tunnel's addresses, as any program could make it: what the machine answers then is the control of the attacks
    from the local network."""
    world.shell("app", f"""ip tuntap add dev control0 mode tun; ip addr add {plan.TUNNEL4}/30 dev control0
        ip -6 addr add {plan.TUNNEL6}/64 dev control0 nodad; ip link set control0 up
        # the kernel tells IPv6 neighbours about another device's address only as their proxy
        sysctl -qw net.ipv6.conf.eth0.proxy_ndp=1 net.ipv6.neigh.eth0.proxy_delay=0; ip -6 neigh add proxy {plan.TUNNEL6} dev eth0""")
    try:
        yield
    finally:
        world.shell("app", f"ip -6 neigh del proxy {plan.TUNNEL6} dev eth0; sysctl -qw net.ipv6.conf.eth0.proxy_ndp=0; ip link delete control0")


# ---- the protection is off: every detector must fire

def opened(world):
    world.disconnected()
    until(3, lambda: plan.ADVERTISED_NET in world.shell("app", "ip -6 route"), "the router advertisement gave no route")
    with tunnel_address_without_us(world), world.open():
        for _ in range(3):
            world.fire(2)
            time.sleep(0.15)


column("open", "disconnected: every probe must get out", "anti")(opened)


@column("no-killswitch", "connected with --no-killswitch: UDP must get out, steered TCP must not", "anti-steered")
def _(world):
    world.connected("--no-killswitch")
    with world.open():
        for _ in range(3):
            world.fire(2)
            time.sleep(0.15)


# ---- states

@contextlib.contextmanager
def locked(world):
    """Disconnected, with lockdown on; without systemd the lock is a plain table."""
    if "lockdown" not in world.lab.proxyctl("--help"):
        raise Skipped("this proxyctl has no lockdown")
    world.disconnected()
    profile(world, "locked")
    world.lab.proxyctl("connect", "locked")
    world.disconnected()
    world.lab.proxyctl("lockdown", "on")
    try:
        yield
    finally:
        world.lab.proxyctl("lockdown", "off")


def profile(world, name, more=""):
    text = f'backend = "proxy"\n[upstream]\nurl = "{PROXY_URL}"\n{more}'
    world.lab.alice("sh", "-c", f"cat >{name}.toml", data=text)
    world.lab.proxyctl("profile", "import", f"{name}.toml", "--replace")


def acting(world, *arguments):
    return world.lab.background("app", "alice", "proxyctl", *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@column("lockdown", "lockdown: disconnected, connecting from the first step on, connected, disconnecting to the last, without a daemon")
def _(world):
    with locked(world), world.guarded(), world.stream():
        world.fire(3)
        with acting(world, "connect", "locked") as action:
            world.slowly(action, lambda: True)
        world.await_state("connected")
        world.fire()
        with acting(world, "disconnect") as action:
            world.slowly(action, lambda: True)
        world.await_state("disconnected")
        world.fire()
        world.lab.daemon_stop("KILL")
        world.fire()
        world.restart()
        world.fire()


@contextlib.contextmanager
def kept_lock(world):
    """Lockdown with a lock that belongs to a socket, as systemd keeps it."""
    hold, path, power = f"{ROOT}/scripts/lab-hold.py", f"{world.lab.dir}/lock", "-all,+net_admin"
    user = [f"--{kind}={power}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    user = ["setpriv", "--reuid", "proxyvpn", "--regid", "proxyvpn", "--clear-groups", "--no-new-privs", *user]
    program = f"{world.lab.stage}/usr/libexec/proxyvpn/proxyvpnd"
    with locked(world):
        world.lab.app(PYTHON, hold, "start", path, f"{world.lab.dir}/logs/lock.log", "15", *user, program, "--lock")
        try:
            yield
        finally:
            if not world.lab.daemon_pid():
                world.restart()
            world.lab.app(PYTHON, hold, "end", path)


FLUSH = "nft flush ruleset; nft delete table inet proxyvpn-lock; nft delete table inet proxyvpn"


@column("lockdown-kept", "lockdown whose lock is kept by systemd: firewall flushed and deleted, connected, the daemon killed")
def _(world):
    with kept_lock(world), world.guarded(), world.stream():
        world.fire()
        world.shell("app", FLUSH, check=False)
        world.fire()
        world.lab.proxyctl("connect", "locked")
        world.shell("app", FLUSH, check=False)
        world.fire()
        world.lab.daemon_stop("KILL")
        world.shell("app", FLUSH, check=False)
        world.fire()
        world.restart()
        world.fire()


@column("lockdown-alone", "lockdown, and the daemon stopped for good: the lock alone, flushed and deleted")
def _(world):
    with kept_lock(world):
        with world.guarded(), world.stream():
            world.lab.daemon_stop("TERM")
            world.fire()
            world.shell("app", FLUSH, check=False)
            world.fire(3)
            world.restart()
            world.fire()


@column("connecting", "connecting, step by step: from the phase behind apply-firewall on")
def _(world):
    world.disconnected()
    offset = world.log_size()
    reached = {}

    def in_force():
        log = world.log_since(offset)
        for phase in FIREWALL_IN_FORCE:
            reached.setdefault(phase, f'phase="{phase}"' in log)
            reached[phase] |= f'phase="{phase}"' in log
        return any(reached.values())

    with acting(world, "connect", "--proxy-url", PROXY_URL) as action:
        guarded = world.slowly(action, in_force)
    expect(action.returncode == 0, "connect failed")
    expect(guarded, "no step was met behind apply-firewall")
    with world.guarded():
        world.fire()


@column("connected", "connected")
def _(world):
    world.connected()
    with world.guarded():
        for _ in range(4):
            world.fire(2)
            time.sleep(0.1)
        time.sleep(1.2)  # what a kernel sends again after a second
        world.fire(1)


@column("reconnecting", "proxyctl reconnect, step by step")
def _(world):
    world.connected()
    with acting(world, "reconnect") as action:
        guarded = world.slowly(action, lambda: True)
    expect(guarded, "reconnect was over before its first step")
    world.await_state("connected")


@column("replaced", "the rules are replaced again and again, in a flood from a container and from the machine")
def _(world):
    world.connected()
    with world.guarded(), world.stream(["box-udp", "device-udp"], 20_000):
        for _ in range(world.times(10, 100)):
            world.lab.proxyctl("reconnect")
        world.fire(1)
    world.await_state("connected")


@column("held", "going on with a connection while the proxy is silent: connecting behind the block")
def _(world):
    world.connected()
    world.lab.service("stop", "tinyproxy")
    with silent_proxy(world), world.guarded():
        with acting(world, "reconnect"):
            world.await_state("connecting", "blocked")
            for _ in range(3):
                world.fire()
                time.sleep(0.3)
    world.lab.service("start", "tinyproxy", 8888)


@contextlib.contextmanager
def silent_proxy(world):
    with world.lab.background("net", None, PYTHON, "-u", f"{ROOT}/tests/e2e/proxy.py", plan.PROXY, "8888", "silent", stderr=subprocess.DEVNULL):
        until(5, lambda: ":8888 " in world.lab.net("ss", "-Htln").stdout, "the silent proxy does not listen")
        yield


@column("blocked", "blocked: the proxy is gone")
def _(world):
    world.connected()
    with world.guarded(), world.stream():
        world.lab.service("stop", "tinyproxy")
        world.fire()
        with acting(world, "reconnect"):
            world.await_state("blocked")
        world.fire(3)
    world.lab.service("start", "tinyproxy", 8888)
    with world.guarded(), world.stream():
        world.await_state("connected", seconds=40)
        world.fire()


@column("blocked-no-tun", "blocked: no device can be made")
def _(world):
    world.connected()
    world.lab.app("mv", "/dev/net/tun", "/dev/net/tun.away")
    try:
        with world.guarded(), world.stream():
            world.shell("app", "ip link delete pvpn0")
            world.await_state("blocked")
            world.fire(3)
    finally:
        world.lab.app("mv", "/dev/net/tun.away", "/dev/net/tun")
    with world.guarded(), world.stream():
        world.await_state("connected", seconds=40)


@column("blocked-unreadable", "blocked: the record of what is wanted cannot be read")
def _(world):
    world.connected()
    with world.guarded():
        world.lab.daemon_stop("KILL")
        world.lab.app("sh", "-c", "echo '{' >/run/proxyvpn/intent.json")
        world.fire()
        world.restart()
        world.await_state("blocked")
        world.fire(3)


@column("disconnecting", "proxyctl disconnect, step by step: while the firewall is there")
def _(world):
    world.connected()
    with acting(world, "disconnect") as action:
        guarded = world.slowly(action, lambda: protected_by_the_kernel(world))
    expect(guarded, "disconnect was over before its first step")
    world.await_state("disconnected")


@column("forward-tunnel", "a profile that lets containers into the tunnel: connected, the device deleted, the daemon killed, step by step to disconnected")
def _(world):
    world.disconnected()
    profile(world, "forwarding", '[protect]\nforward = "tunnel"\n')
    world.lab.proxyctl("connect", "forwarding")
    fetch = f"curl -sS --max-time 10 http://{WEB}/"
    expect(world.in_box(fetch, check=False), "a container's TCP does not go through the tunnel")
    with world.guarded(), world.stream():
        world.fire(3)
        world.shell("app", "ip link delete pvpn0")
        world.fire()
        world.await_state("connected", seconds=30)
        world.lab.daemon_stop("KILL")
        world.fire()
        world.restart()
        world.await_state("connected", seconds=30)
        world.fire()
        expect(world.in_box(fetch, check=False), "a container's TCP does not go through the tunnel after a new start")
        world.lab.proxyctl("reconnect")
        world.fire()
    with acting(world, "disconnect") as action:
        world.slowly(action, lambda: protected_by_the_kernel(world))


@column("after-disconnect", "connections of the tunnel after disconnect: its address is never seen")
def _(world):
    world.connected()
    world.agents["app"].ask("inside", world)
    said = world.agents["app"].ask("talk", world)
    expect(not any(said.values()), f"a connection through the tunnel does not work: {said}")
    with world.without_tunnel():
        world.lab.disconnect()
        for _ in range(8):
            world.agents["app"].ask("talk", world)
            time.sleep(0.2)


# ---- faults of the daemon

def killed(world, name, times):
    """The daemon dies under the stream, and is started again as systemd does it."""
    world.connected()
    with world.guarded(), world.stream():
        for number in range(times):
            die(world, name)
            if number % 4 == 0:
                world.fire(1)
            time.sleep(random.uniform(0, 0.15))
            world.restart()
            # not always back where it was: the next one dies in the middle of connecting
            if number % 3:
                world.await_state("connected")
            if number % 4 == 0:
                world.fire(1)
        world.await_state("connected")


def die(world, name):
    if name == "SEGV":  # the first one only resets the handler that Rust has for its stacks
        os.kill(world.host_pid(), signal.SIGSEGV)
        time.sleep(0.02)
    world.lab.daemon_stop(name)


@column("kill", "kill -9 of the daemon, and a new start")
def _(world):
    killed(world, "KILL", world.times(6, 200))


@column("segv", "SIGSEGV of the daemon, and a new start")
def _(world):
    killed(world, "SEGV", world.times(3, 200))


@column("hang", "the daemon hangs; the watchdog kills it; a new start")
def _(world):
    world.connected()
    with world.guarded(), world.stream():
        os.kill(world.host_pid(), signal.SIGSTOP)
        for _ in range(3):
            world.fire()
            time.sleep(0.4)
        world.lab.daemon_stop("KILL")
        world.fire()
        world.restart()
        world.await_state("connected")


@column("restart", "systemctl restart, then an upgrade: told to end, and a new start, step by step")
def _(world):
    world.connected()
    for upgrade in False, True:
        with world.guarded(), world.stream():
            if upgrade:
                program = f"{world.lab.stage}/usr/libexec/proxyvpn/proxyvpnd"
                subprocess.run(["sh", "-ec", 'cp -p "$1" "$1.new"; mv "$1.new" "$1"', "-", program], check=True)
            world.lab.daemon_stop("INT")  # as TERM, but the lab keeps what systemd keeps for a restart
            world.fire()
            starter = threading.Thread(target=world.restart)
            starter.start()
            pid = until(10, world.host_pid, "the daemon does not start")
            for _ in range(world.times(40, 200)):
                if not freeze(pid, 0.002):
                    break
                world.fire(1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            starter.join()
            world.await_state("connected")
            world.fire()


@column("descriptors", "the daemon is out of file descriptors")
def _(world):
    world.connected()
    pid = world.lab.daemon_pid()
    limits = "app", "proxyvpn", "prlimit", "--pid", pid
    before = world.lab.run(*limits, "--nofile", "--output", "SOFT", "--noheadings").stdout.strip()
    with world.guarded(), world.stream():
        world.lab.run(*limits, "--nofile=8:")
        world.fire(3)
        world.shell("app", "ip link delete pvpn0")
        world.fire(3)
        time.sleep(1)
        world.lab.run(*limits, f"--nofile={before}:", check=False)
        back(world)


@column("memory", "the daemon is out of memory")
def _(world):
    world.connected()
    pid = world.lab.daemon_pid()
    with world.guarded(), world.stream():
        world.lab.run("app", "proxyvpn", "prlimit", "--pid", pid, "--as=1048576:1048576", "--data=1048576:1048576")
        world.fire(3)
        world.shell("app", "ip link delete pvpn0")
        end = time.monotonic() + 5
        while world.lab.daemon_pid() and time.monotonic() < end:
            world.fire(1)
            time.sleep(0.1)
        back(world, again=True)


def back(world, again=False):
    """Until it is connected again; systemd would start a daemon that has died. `again`: kill one that lives on."""
    if again:
        world.lab.daemon_stop("KILL")
    if not world.lab.daemon_pid():
        world.restart()
    world.await_state("connected", seconds=40)
    world.fire()


@column("disk", "the disk of the state and of the record is full")
def _(world):
    world.disconnected()
    world.lab.daemon_stop("KILL")
    full = 'for d in /run/proxyvpn "$LAB/lib"; do dd if=/dev/zero of=$d/filler bs=512 count=1000 2>/dev/null || true; done'
    world.lab.app("sh", "-ec", 'for d in /run/proxyvpn "$LAB/lib"; do mount -t tmpfs -o size=32k,mode=700 tmpfs $d; chown proxyvpn: $d; done')
    try:
        world.restart()
        world.lab.connect(PROXY_URL)
        with world.guarded(), world.stream():
            world.lab.app("sh", "-c", full)
            world.fire()
            world.shell("app", "ip link delete pvpn0")
            time.sleep(2)
            world.fire()
            world.lab.daemon_stop("KILL")
            world.fire()
            with contextlib.suppress(AssertionError):
                world.restart()
            world.fire()
            world.lab.daemon_stop("KILL")
            world.lab.app("sh", "-c", 'rm -f /run/proxyvpn/filler "$LAB/lib/filler"')
            world.restart()
            world.await_state("connected", "blocked")
            world.fire()
        world.disconnected()
    finally:
        world.lab.daemon_stop("KILL")
        world.lab.app("sh", "-c", 'umount /run/proxyvpn "$LAB/lib"')
        world.start()


@column("bus", "the system bus is gone")
def _(world):
    world.connected()
    pid = world.lab.app("pgrep", "-x", "dbus-daemon").stdout.split()[0]
    with world.guarded(), world.stream():
        world.lab.app("kill", pid)
        world.fire()
        time.sleep(0.5)
        world.lab.app("sh", "-c", "rm -f /run/dbus/pid; dbus-daemon --system --fork --nopidfile --nosyslog")
        until(5, lambda: not world.lab.daemon_pid(), "the daemon does not notice that the bus is gone")
        world.fire()
        world.restart()
        world.await_state("connected")
        world.fire()


# ---- faults of the network

def disturbed(world, *scripts, pause=0.3, rest=0.0):
    """Somebody does this in the machine under the stream, and it settles again."""
    world.connected()
    with world.guarded(), world.stream():
        for script in scripts:
            world.shell("app", script, check=False)
            world.fire(1)
            time.sleep(pause)
            world.fire(1)
        time.sleep(rest)
        world.fire(1)
    settle(world)


def settle(world):
    """The other programs' part is as it was; ours has to come by itself or by a new connection."""
    world.foreign_tables()
    world.see()


@column("tun-deleted", "the tunnel's device is deleted, three times")
def _(world):
    world.connected()
    with world.guarded(), world.stream():
        for _ in range(3):
            world.shell("app", "ip link delete pvpn0", check=False)
            world.fire()
            time.sleep(0.3)
            world.await_state("connected", seconds=30)
            world.fire()


@column("tun-down", "the tunnel's device is set down, and loses its addresses")
def _(world):
    disturbed(world, "ip link set pvpn0 down", "ip addr flush dev pvpn0", "ip link set pvpn0 up", rest=1)


@column("nft-flush", "nft flush ruleset")
def _(world):
    disturbed(world, *["nft flush ruleset"] * 3)


@column("nft-delete", "nft delete table inet proxyvpn; chains emptied one by one")
def _(world):
    chains = "for c in prerouting input output forward filter_output postrouting; do nft flush chain inet proxyvpn $c; done"
    disturbed(world, chains, "nft delete table inet proxyvpn")


@column("iptables", "iptables -F, -X and policies to ACCEPT, old and new kind, IPv4 and IPv6")
def _(world):
    tools = [tool for tool in ("iptables", "ip6tables", "iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft") if world.has(tool)]
    if not tools:
        raise Skipped("iptables is not installed")
    flush = "for t in filter nat mangle raw; do {0} -t $t -F; {0} -t $t -X; done; for c in INPUT FORWARD OUTPUT; do {0} -P $c ACCEPT; done"
    disturbed(world, *[flush.format(tool) for tool in tools], pause=0.1)


@column("conntrack", "conntrack -F")
def _(world):
    if not world.has("conntrack"):
        raise Skipped("conntrack is not installed")
    disturbed(world, *["conntrack -F"] * 3)


SHADOW = "ip -4 route {} default via 192.0.2.1 dev eth0 table 7376750"


@column("rules", "rules and routes are deleted at random, and others put in front")
def _(world):
    acts = [
        *(f"ip {family} rule del priority {priority}" for family in ("-4", "-6") for priority in (3700, 3701, 3702, 3703, 3731)),
        "ip -4 route flush table 7376750", "ip -6 route flush table 7376750",
        "ip -4 route del default dev pvpn0 table 7376750", "ip -6 route del default dev pvpn0 table 7376750",
        "ip -4 route del unreachable default table 7376750", "ip -6 route del unreachable default table 7376750",
        f"{SHADOW.format('prepend')} metric 1", "ip -4 rule flush; ip -4 rule add pref 32766 lookup main",
        "ip -4 rule add priority 10 lookup main; ip -6 rule add priority 10 lookup main",
    ]
    random.shuffle(acts)
    try:
        disturbed(world, *acts, pause=0.05, rest=0.5)
    finally:
        for family in "-4", "-6":
            world.shell("app", f"ip {family} rule del priority 10", check=False)
        world.shell("app", SHADOW.format("del"), check=False)
        world.shell("app", "ip -4 rule | grep -q 'lookup default' || ip -4 rule add pref 32767 lookup default")


@column("ipv6", "IPv6 is switched off and on")
def _(world):
    world.connected()
    with world.guarded(), world.stream():
        world.shell("app", "sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
        world.fire()
        world.shell("app", "sysctl -qw net.ipv6.conf.all.disable_ipv6=0; ip -6 addr add 2001:db8:7::1/64 dev br0 nodad")
        world.plug(world.uplinks[0])
        world.fire()
        time.sleep(1)
        world.see()
        world.fire()


# ---- faults of the uplink

@contextlib.contextmanager
def second_uplink(world, route):
    second = Uplink(1)
    app, net = world.lab.pids["app"], world.lab.pids["net"]
    world.uplinks.append(second)
    try:
        subprocess.run(["nsenter", "-t", net, "-n", "--", "ip", "link", "add", second.far, "type", "veth", "peer", "name", second.name, "netns", app], check=True)
        world.plug(second, route=route)
        until(5, lambda: "fe80" in world.shell("app", f"ip -6 addr show dev {second.name} scope link"), "no link-local address on the second uplink")
        world.see()
        world.agents["app"].ask("standing", world)
        yield second
    finally:
        world.shell("net", f"ip link delete {second.far}", check=False)
        world.uplinks.remove(second)
        world.see()


@column("uplink-new", "a second uplink appears and takes the default route, and goes again")
def _(world):
    world.connected()
    with world.guarded(), world.stream():
        with second_uplink(world, route=True):
            world.fire()
            time.sleep(0.5)
            world.fire(3)
        world.plug(world.uplinks[0])
        world.fire()


@column("uplink-second", "two uplinks from the beginning; the default route moves between them")
def _(world):
    with second_uplink(world, route=False) as second:
        world.see()
        world.connected()
        with world.guarded(), world.stream():
            for uplink in second, world.uplinks[0], second, world.uplinks[0]:
                world.routes(uplink)
                world.fire()
                time.sleep(0.2)
        world.lab.disconnect()


@column("uplink-down", "the uplink goes down and comes up")
def _(world):
    world.connected()
    with world.guarded(beacons=False), world.stream():
        for _ in range(2):
            world.shell("app", "ip link set eth0 down")
            world.fire()
            time.sleep(0.3)
            world.plug(world.uplinks[0])
            world.fire()
            time.sleep(0.3)
    with world.guarded():
        world.fire(3)


@column("uplink-renamed", "the uplink gets another name")
def _(world):
    world.connected()
    uplink = world.uplinks[0]

    def rename(name):
        world.shell("app", f"ip link set {uplink.name} down; ip link set {uplink.name} name {name}")
        uplink.name = name
        world.plug(uplink)
        world.see()

    try:
        with world.guarded(beacons=False), world.stream():
            rename("wired7")
            world.fire(3)
            time.sleep(0.5)
        with world.guarded():
            world.fire(3)
    finally:
        rename("eth0")


@column("uplink-bridged", "the uplink becomes the port of a bridge, as for virtual machines")
def _(world):
    world.connected()
    uplink = world.uplinks[0]
    mac = uplink.link["mac"]
    try:
        with world.guarded(beacons=False), world.stream():
            world.in_box("ip link delete mv0")
            world.shell("app", f"ip link add wanbr address {mac} type bridge; ip addr flush dev eth0; ip link set eth0 master wanbr; ip link set wanbr up")
            uplink.name = "wanbr"
            world.plug(uplink)
            world.see()
            world.fire(2)
            time.sleep(0.5)
        with world.guarded():
            world.fire(3)
    finally:
        world.shell("app", "ip link delete wanbr", check=False)
        uplink.name = "eth0"
        world.plug(uplink)
        world.see()


@column("uplink-gone", "the uplink is taken away, and another comes with the same name")
def _(world):
    world.connected()
    app, net = world.lab.pids["app"], world.lab.pids["net"]
    with world.guarded(beacons=False), world.stream():
        world.shell("app", "ip link delete eth0")
        world.see()
        world.fire()
        time.sleep(0.3)
        subprocess.run(["nsenter", "-t", net, "-n", "--", "ip", "link", "add", "wan0", "type", "veth", "peer", "name", "eth0", "netns", app], check=True)
        world.plug(world.uplinks[0])
        world.see()
        world.agents["app"].ask("standing", world)
        world.fire()
    with world.guarded():
        for _ in range(3):
            world.fire(2)
            time.sleep(0.3)


@column("proxy-dead", "the proxy dies and comes back under load")
def _(world):
    world.connected()
    with world.guarded(), world.stream():
        for _ in range(world.times(2, 10)):
            world.lab.service("stop", "tinyproxy")
            world.fire()
            time.sleep(0.5)
            world.lab.service("start", "tinyproxy", 8888)
            world.fire()
        world.await_state("connected", seconds=40)


# ---- and at the end once more

@column("open-again", "disconnected: every probe must still get out", "anti")
def _(world):
    opened(world)
