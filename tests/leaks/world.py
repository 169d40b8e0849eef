"""The lab, and what the matrix adds to it: a second uplink, a container behind a bridge, routes and networks that a hostile DHCP server or
router would give, an attacker on the local network, and a capture at the far end of every uplink."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time

import plan
import probes
import wire
from lab import PYTHON, Failed, expect, until

HERE = os.path.dirname(os.path.abspath(__file__))
PROXY_URL = "http://proxy.lab.test:8888"
FIREWALL_IN_FORCE = ("apply-routes", "configure-dns", "flush-dns")  # the phases behind it
STREAM = ("udp", "udp6", "device-udp", "packet", "ping", "pktinfo", "old-udp", "box-udp", "box-tcp", "tcp", "device-tcp", "old-tcp")
STREAM_RATE = 1000


class Uplink:
    """A wire between app and net; `name` is the device of app, which can be another after a rename."""

    def __init__(self, number):
        first = number == 0
        self.name, self.far = f"eth{number}", f"wan{number}"
        self.net4, self.net6 = ("192.0.2", "2001:db8:1:") if first else ("10.44.0", "2001:db8:4:")
        self.link = None


class World:
    def __init__(self, lab, keep):
        self.lab, self.keep = lab, keep
        self.uplinks, self.captures, self.tcpdumps, self.agents = [Uplink(0)], [], [], {}
        self.users, self.oracle, self.column, self.captured, self.indices, self.stops = {}, None, None, 0, set(), 0
        self.broken = {}  # probes that this machine cannot run, and why

    # ---- making it

    def shell(self, machine, script, check=True):
        """In the network namespace of a machine of the lab, with the files of this one; `set -e`."""
        pid = self.lab.pids[machine]
        done = subprocess.run(["nsenter", "-t", pid, "-n", "--", "bash", "-ec", script], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        expect(not check or done.returncode == 0, lambda: f"in {machine}: {script.strip()[:200]}: {done.stderr.strip()}")
        return done.stdout

    def up(self):
        self.lab.up()
        self.users = {name: int(self.lab.app("id", "-u", name).stdout) for name in ("root", "alice", "mallory", "proxyvpn")}
        self.shell("net", f"""
            for a in {plan.SINK4} {plan.PUSHED}; do ip addr add $a/32 dev lo; done
            for a in {plan.SINK6} {plan.ADVERTISED}; do ip -6 addr add $a/128 dev lo nodad; done""")
        self.shell("app", """
            sysctl -qw net.ipv4.ping_group_range='0 2147483647' net.ipv6.conf.default.accept_ra=2 net.ipv6.conf.default.accept_ra_rt_info_max_plen=128
            sysctl -qw net.ipv6.conf.eth0.accept_ra=2 net.ipv6.conf.eth0.accept_ra_rt_info_max_plen=128 net.ipv6.conf.default.accept_dad=0
            sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
            ip link add br0 type bridge mcast_snooping 0
            ip addr add 172.30.0.1/24 dev br0; ip -6 addr add 2001:db8:7::1/64 dev br0 nodad; ip link set br0 up
            ip link add box0 master br0 type veth peer name inner; ip link set box0 up""")
        for where, machine in ("app", "app"), ("lan", "net"), ("box", None):
            self.agents[where] = Agent(where, self.lab.pids[machine] if machine else None)
        box = self.agents["box"].process.pid
        self.shell("app", f"ip link set inner netns {box}")
        self.in_box("""
            ip link set lo up; ip addr add 172.30.0.2/24 dev inner; ip -6 addr add 2001:db8:7::2/64 dev inner nodad; ip link set inner up
            ip route add default via 172.30.0.1; ip -6 route add default via 2001:db8:7::1""")
        self.foreign_tables()
        self.plug(self.uplinks[0])
        self.oracle = self.make_oracle()
        self.see()

    def make_oracle(self):
        return wire.Oracle([], {8888})

    def in_box(self, script, check=True):
        done = subprocess.run(["nsenter", "-t", str(self.agents["box"].process.pid), "-n", "--", "bash", "-ec", script], capture_output=True, text=True)
        expect(not check or done.returncode == 0, lambda: f"in the container: {done.stderr.strip()}")
        return done.returncode == 0

    def foreign_tables(self):
        """Connection tracking and the container's NAT, as other programs have them."""
        self.shell("app", """nft -f - <<'NFT'
            table inet lab
            delete table inet lab
            table inet lab {
                chain track { type filter hook output priority -100; ct state new counter; }
                chain nat { type nat hook postrouting priority 100; ip saddr 172.30.0.0/24 oifname != "br0" masquerade; }
            }\nNFT""")

    def plug(self, uplink, route=True):
        """Gives both ends what they have after DHCP and a router advertisement, and begins a capture."""
        near, far = uplink.name, uplink.far
        public = uplink.far == "wan0"
        self.shell("net", f"""
            ip addr replace {uplink.net4}.1/24 dev {far}; ip -6 addr replace {uplink.net6}:1/64 dev {far} nodad
            [ {far} != wan0 ] || {{ ip addr replace {plan.FALSE_LAN4}/28 dev {far}; ip -6 addr replace {plan.FALSE_LAN6}/64 dev {far} nodad; }}
            ip link set {far} up""")
        self.capture(far)
        self.shell("app", f"""
            ip addr replace {uplink.net4}.2/24 brd + dev {near}; ip link set {near} up; ip -6 addr replace {uplink.net6}:2/64 dev {near} nodad""")
        if public:
            self.shell("app", f"ip addr replace 203.0.113.194/28 dev {near}; ip -6 addr replace 2001:db8:3:1::2/64 dev {near} nodad")
        if route:
            self.routes(uplink)
        self.own_device(uplink)

    def routes(self, uplink):
        self.shell("app", f"""
            ip route replace default via {uplink.net4}.1 dev {uplink.name}; ip -6 route replace default via {uplink.net6}:1 dev {uplink.name}
            ip route replace {plan.PUSHED_NET} via {uplink.net4}.1 dev {uplink.name}""")

    def own_device(self, uplink):
        """The container's macvlan on the first uplink."""
        if uplink.far != "wan0" or self.in_box("ip link show mv0 >/dev/null 2>&1", check=False):
            return
        made = f"ip link add mv0 link {uplink.name} address {plan.OWN_MAC} type macvlan mode bridge && ip link set mv0 netns {self.agents['box'].process.pid}"
        try:
            self.shell("app", made)
            self.in_box("ip link set mv0 up")
        except Failed as why:
            self.broken["macvlan"] = f"no macvlan here ({str(why).splitlines()[-1]})"

    def capture(self, far):
        """Everything on a wire, seen from its far end, from before the near end comes up."""
        index = self.links("net")[far]["ifindex"]  # one that came back with the same name is another
        if index in self.indices:
            return
        self.indices.add(index)
        self.captured += 1
        path = f"{self.lab.dir}/far-{self.captured}.pcap"
        command = ["tcpdump", "-i", far, "-n", "-U", "--immediate-mode", "-B", "16384", "-s", "400", "--time-stamp-precision=nano", "-w", path, "-Z", "root"]
        with open(f"{self.lab.dir}/logs/far-{self.captured}.log", "wb") as log:
            process = subprocess.Popen(["nsenter", "-t", self.lab.pids["net"], "-n", "--", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.tcpdumps.append((capture := wire.Capture(path, far), process))
        self.captures.append(capture)
        until(5, capture.started, f"tcpdump does not capture on {far}")

    def see(self):
        """Looks at the uplinks anew: indices, addresses of the hardware, link-local addresses."""
        near, far = self.links("app"), self.links("net")
        for uplink in self.uplinks:
            here, there = near.get(uplink.name), far.get(uplink.far)
            if not here or not there:
                uplink.link = None
                continue
            local = [one["local"] for one in there["addr_info"] if one["scope"] == "link"]
            uplink.link = {
                "name": uplink.name, "index": here["ifindex"], "mac": here["address"], "router_mac": there["address"], "far": uplink.far,
                "far_index": there["ifindex"], "address4": f"{uplink.net4}.2", "address6": f"{uplink.net6}:2", "broadcast": f"{uplink.net4}.255",
                "router4": f"{uplink.net4}.1", "router6": f"{uplink.net6}:1", "router_local": local[0] if local else "fe80::1",
            }
            self.oracle.routers.add(bytes.fromhex(there["address"].replace(":", "")))

    def links(self, machine):
        return {one["ifname"]: one for one in json.loads(self.shell(machine, "ip -j addr"))}

    def view(self, where):
        """The uplinks as an agent must know them."""
        links = [uplink.link for uplink in self.uplinks if uplink.link]
        if where == "lan":  # sends from the far end to the machine
            links = [{**one, "name": one["far"], "index": one["far_index"], "mac": one["router_mac"], "router_mac": one["mac"]} for one in links]
        if where == "box":
            links = [{**one, "name": "mv0", "mac": plan.OWN_MAC} for one in links if one["far"] == "wan0"]
        return {"uplinks": links, "users": self.users, "router": "192.0.2.1"}

    def down(self):
        for agent in self.agents.values():
            agent.end()
        for _, process in self.tcpdumps:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.lab.down()

    def lost_packets(self):
        """Ends the captures; what they missed, as text, or ''."""
        lost = []
        for number, (capture, process) in enumerate(self.tcpdumps, 1):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait()
            with open(f"{self.lab.dir}/logs/far-{number}.log", encoding="utf-8") as file:
                lost += [f"{capture.device}: {line.strip()}" for line in file if "dropped by" in line and not line.startswith("0 ")]
        return "; ".join(lost)

    # ---- probes and windows

    def fire(self, rounds=2):
        """Each probe, in all places at once."""
        orders = [(agent, {"do": "fire", "rounds": rounds, "probes": self.column.probes, **self.view(where)}) for where, agent in self.agents.items()]
        for agent, order in orders:
            agent.send(order)
        for agent, _ in orders:
            self.column.count(agent.receive())

    @contextlib.contextmanager
    def stream(self, names=STREAM, rate=STREAM_RATE):
        """These probes meanwhile, all together so many packets a second."""
        chosen = [name for name in names if name in self.column.probes and name not in self.broken]
        running = []
        for where in "app", "box":
            mine = [name for name in chosen if probes.by_name(name).where == where]
            if mine:
                self.agents[where].ask("stream", self, probes=mine, rate=rate * len(mine) / len(chosen))
                running.append(self.agents[where])
        try:
            yield
        finally:
            for agent in running:
                self.column.count({name: {"": count} for name, count in agent.ask("still", self).items()})

    @contextlib.contextmanager
    def guarded(self, settle=0.05, beacons=True):
        """Whatever leaves the machine meanwhile, but what is allowed, is a leak. A beacon at both ends shows that the capture would
        have seen it; without a wire (`beacons`) there can be none."""
        start = time.time_ns()
        if beacons:
            self.agents["app"].ask("beacon", self)
        yield
        time.sleep(settle)
        if beacons:
            self.agents["app"].ask("beacon", self)
            time.sleep(0.002)
        self.column.windows.append((start, time.time_ns(), beacons))

    @contextlib.contextmanager
    def open(self):
        """Every probe must be seen at the far end."""
        start = time.time_ns()
        yield
        time.sleep(0.4)
        self.column.opened.append((start, time.time_ns()))

    @contextlib.contextmanager
    def without_tunnel(self):
        """The network is open, but the tunnel's own addresses must never be seen."""
        start = time.time_ns()
        yield
        time.sleep(0.05)
        self.column.without_tunnel.append((start, time.time_ns()))

    def captured_until_now(self):
        """The packets since the last time; tcpdump writes them when it gets to it."""
        self.stops += 1
        text = f"full stop {self.stops}."
        self.see()
        self.agents["lan"].ask("full_stop", self, text=text)
        missing, packets = {uplink.far for uplink in self.uplinks if uplink.link}, []

        def complete():
            for seen in [seen for capture in self.captures for seen in capture.new()]:
                packets.append(seen)
                if text.encode() in seen.data:
                    missing.discard(seen.device)
            return not missing

        until(20, complete, lambda: f"the capture on {', '.join(missing)} does not go on")
        return packets

    def judge(self, column):
        """What the captures say about the column's windows."""
        packets = sorted(self.captured_until_now(), key=lambda seen: seen.time)
        beacons = [0] * len(column.windows)
        for seen in packets:
            probe = self.oracle.verdict(seen)
            if not probe:
                continue
            for number, (start, end, _) in enumerate(column.windows):
                if start <= seen.time <= end:
                    beacons[number] += probe == wire.BEACON
                    if probe != wire.BEACON:
                        column.leaks.setdefault(probe, []).append(seen)
            if within(column.without_tunnel, seen) and wire.parse(seen.data).source in (plan.TUNNEL4, plan.TUNNEL6):
                column.leaks.setdefault(wire.OTHER, []).append(seen)
            if within(column.opened, seen):
                column.seen[probe] = column.seen.get(probe, 0) + 1
        for number, (_, _, wanted) in enumerate(column.windows):
            if wanted and beacons[number] < 2:
                column.failures.append(f"the capture was blind: {beacons[number]} of 2 beacons seen in window {number + 1} of {len(column.windows)}")
                break

    # ---- the daemon

    def start(self, *args):
        self.lab.daemon(*args, "--log-level", "debug", "--keep-block")

    def restart(self):
        self.start("--again")

    def state(self):
        return self.lab.status()["state"]

    def await_state(self, *wanted, seconds=20):
        state = None

        def there():
            nonlocal state
            state = self.state()
            return state in wanted

        until(seconds, there, lambda: f"the state is {state}, not {' or '.join(wanted)}, after {seconds} s")

    def disconnected(self):
        """The open network, with connections from before the next Connect."""
        if not self.lab.daemon_pid():
            self.restart()
        if self.state() != "disconnected":
            self.lab.disconnect()
            self.await_state("disconnected")
        self.agents["app"].ask("standing", self)
        self.agents["lan"].ask("advertise", self)
        self.agents["app"].ask("old", self)

    def connected(self, *args):
        self.disconnected()
        self.lab.connect(PROXY_URL, *args)
        expect(self.state() == "connected", "connect succeeded, but the state is another")

    def host_pid(self, but=None):
        """The daemon's number outside of its PID namespace."""
        mine = os.stat(f"/proc/{self.lab.pids['app']}/ns/net").st_ino
        for name in os.listdir("/proc"):
            if not name.isdigit() or name == but:
                continue
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/comm", encoding="ascii") as file:
                    if file.read().strip() == "proxyvpnd" and os.stat(f"/proc/{name}/ns/net").st_ino == mine:
                        return int(name)
        return None

    def slowly(self, action, judged, most=2000):
        """Runs `action` (a process) while the daemon may only run for moments; after each, everything stands still and all probes are
        fired. `judged()` says whether nothing may leave then. Returns how often it said so."""
        guarded, offset, run = 0, self.log_size(), self.times(0.001, 0.0003)
        pid = self.host_pid()
        try:
            while action.poll() is None and most:
                most -= 1
                if not freeze(pid, run):
                    break
                if judged():
                    guarded += 1
                    with self.guarded(settle=0.002):
                        self.fire(1)
                    self.column.phases.update(re.findall(r'phase="([a-z-]+)"', self.log_since(offset))[-1:])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        try:
            action.wait(30)
        except subprocess.TimeoutExpired:
            raise Failed("not done 30 s after the daemon may run again") from None
        return guarded

    def log_size(self):
        with contextlib.suppress(FileNotFoundError):
            return os.path.getsize(f"{self.lab.dir}/logs/proxyvpnd.log")
        return 0

    def log_since(self, offset):
        with open(f"{self.lab.dir}/logs/proxyvpnd.log", encoding="utf-8", errors="replace") as file:
            file.seek(offset)
            return file.read()


def within(windows, seen):
    return any(start <= seen.time <= end for start, end in windows)


def freeze(pid, run):
    """Lets a process run for so many seconds, then stops it; False when it is gone."""
    try:
        os.kill(pid, signal.SIGCONT)
        time.sleep(run)
        os.kill(pid, signal.SIGSTOP)
        until(2, lambda: stopped(pid), "the daemon does not stop")
        return True
    except (ProcessLookupError, FileNotFoundError):
        return False


def stopped(pid):
    tasks = os.listdir(f"/proc/{pid}/task")
    states = []
    for task in tasks:
        with contextlib.suppress(FileNotFoundError):
            with open(f"/proc/{pid}/task/{task}/stat", encoding="ascii", errors="replace") as file:
                states.append(file.read().rpartition(")")[2].split()[0])
    return all(state in "TZX" for state in states)


class Agent:
    """A running agent.py."""

    def __init__(self, where, pid):
        self.where = where
        enter = ["nsenter", "-t", pid, "-n", "--"] if pid else ["unshare", "--net", "--"]
        command = [*enter, "setpriv", "--pdeathsig", "KILL", PYTHON, "-B", f"{HERE}/agent.py", where]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def receive(self):
        line = self.process.stdout.readline()
        expect(line, f"the agent in {self.where} ended")
        answer = json.loads(line)
        expect("failed" not in answer, lambda: f"the agent in {self.where}: {answer['failed']}")
        return answer

    def ask(self, what, world, **more):
        self.send({"do": what, **world.view(self.where), **more})
        return self.receive()

    def end(self):
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
