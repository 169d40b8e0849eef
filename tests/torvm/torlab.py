"""The lab with a private Tor network, and the TorVM backend on the machine under test."""

import contextlib
import json
import os
import re
import subprocess
import time

from lab import APP4, APP6, WEB, Lab, expect, until

HERE = os.path.dirname(os.path.abspath(__file__))
PROFILE = "tor"
# A local network with private addresses, as most are; the lab's own are from a range that passes for the Internet's.
OWN, NEIGHBOUR = "192.168.77.2", "192.168.77.3"
PUBLIC_NEIGHBOUR = "192.0.2.3"
GUEST, HOST = "10.10.10.1", "10.10.10.2"
SOCKS, CONTROL = 9050, 9051
STATE_DISK = "state.img"
# of a boot under TCG on a busy machine
CONNECT_SECONDS = 90


class TorLab(Lab):
    def __init__(self, name, stage, image):
        super().__init__(name, stage)
        self.image, self.tor = image, {}

    def up(self):
        super().up("--tor", timeout=180)
        with open(f"{self.dir}/tor/network.json", encoding="ascii") as file:
            self.tor = json.load(file)
        self.net("ip", "addr", "add", f"{NEIGHBOUR}/24", "dev", "wan0")
        self.net("ip", "addr", "add", f"{PUBLIC_NEIGHBOUR}/32", "dev", "wan0")
        self.app("ip", "addr", "add", f"{OWN}/24", "dev", "eth0")
        self.profile()

    @property
    def relays(self):
        return self.tor["exits"] + self.tor["relays"]

    # ---- the daemon

    def daemon(self, *args, image=None):
        return super().daemon(*args, "--torvm-image", image or self.image)

    def profile(self, upstream="direct://", upstream_more="", **keys):
        """Writes the approved profile. `keys` are those of [torvm], with _ for -; `upstream_more` are lines of [upstream]."""
        keys = {"memory_mib": 128, "accel": "tcg", "testing": True, "directory_authorities": self.tor["authorities"], **keys}
        lines = ['backend = "torvm"', "[upstream]", f"url = {json.dumps(upstream)}", upstream_more, "[torvm]"]
        lines += [f"{name.replace('_', '-')} = {json.dumps(value)}" for name, value in keys.items()]
        self.app("tee", f"/etc/proxyvpn/profiles.d/{PROFILE}.toml", data="\n".join([*lines, ""]))

    def connect_tor(self, *args, **options):
        return self.proxyctl("connect", PROFILE, *args, **{"timeout": CONNECT_SECONDS, **options})

    def await_state(self, *wanted, seconds=CONNECT_SECONDS):
        """Waits for one of these states; returns the status."""
        status = {}

        def there():
            nonlocal status
            status = self.status()
            return status["state"] in wanted

        until(seconds, there, lambda: f"the state is not {' or '.join(wanted)} after {seconds} s: {status}")
        return status

    def qemu(self):
        """QEMU's number outside of the machine; None when there is none."""
        parents, found = {}, []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if b"/qemu-system-" in b"/" + file.read().split(b"\0")[0]:
                        found.append(int(name))
        for pid in found:
            parent = pid
            while parent := parents.get(parent):
                if parent == int(self.pids["app"]):
                    return pid
        return None

    def disk(self):
        """The state disk's file."""
        return f"{self.dir}/lib/{STATE_DISK}"

    def tor_property(self, name):
        """A property of org.proxyvpn1.TorVm, as any user reads it."""
        said = self.alice("busctl", "--json=short", "get-property", "org.proxyvpn1", "/org/proxyvpn1/torvm", "org.proxyvpn1.TorVm", name).stdout
        return json.loads(said)["data"]

    def bootstrap(self):
        return dict(zip(("percent", "tag", "summary", "warning", "reason", "hint"), self.tor_property("Bootstrap"), strict=True))

    # ---- looking

    def around(self, allowed, but="less 0"):
        """Packets of the machine other than TCP to `allowed`, what the filter `but` matches, ARP and neighbour discovery."""
        tcp = " or ".join(f"dst host {address}" for address in allowed) or "less 0"
        return self.packets(
            f"(src host {APP4} or src host {APP6} or src host {OWN} or net 10.10.0.0/16) and not (src host {APP4} and tcp and ({tcp})) and not ({but})"
            " and not icmp6 and not arp and not dst net 224.0.0.0/4 and not dst net ff00::/8"
        )

    @contextlib.contextmanager
    def only_to(self, *allowed, but=""):
        """Meanwhile nothing leaves but TCP to these addresses, and what the filter `but` matches (default: to the relays)."""
        allowed = allowed or ([] if but else self.relays)
        but = but or "less 0"
        before = len(self.around(allowed, but))
        yield
        time.sleep(0.1)
        seen = self.around(allowed, but)
        expect(len(seen) == before, lambda: "packets went around Tor:\n" + "\n".join(seen[before : before + 8]))

    @contextlib.contextmanager
    def empty_wire(self):
        """Meanwhile nothing leaves at all."""
        before = len(self.around([]))
        yield
        time.sleep(0.1)
        seen = self.around([])
        expect(len(seen) == before, lambda: "packets left:\n" + "\n".join(seen[before : before + 8]))

    def client_of(self, url, *args, **options):
        """The address that the web server saw."""
        body = self.fetch(url, *args, **options).stdout
        seen = re.search(r"you are (?:::ffff:)?(\S+)", body)
        expect(seen, f"{url}: {body}")
        return seen[1]

    def fetch_by_exit(self, url=f"http://{WEB}/", *args, **options):
        client = self.client_of(url, *args, **options)
        expect(client in self.tor["exits"], f"{url}: the server saw {client}, which is no exit")
        return client


def native_client(lab, directory, *torrc):
    """Writes the configuration of a Tor client of the machine itself; returns its command. It listens for SOCKS on 127.0.0.1:9150."""
    lines = ["TestingTorNetwork 1", *(f"DirAuthority {line}" for line in lab.tor["authorities"]), "SocksPort 127.0.0.1:9150", *torrc]
    lab.alice("mkdir", "-p", "-m", "700", directory)
    lab.alice("tee", f"{directory}/torrc", data="\n".join([*lines, f"DataDirectory {directory}", ""]))
    return ["tor", "--defaults-torrc", "/nonexistent", "--ignore-missing-torrc", "-f", f"{directory}/torrc"]


@contextlib.contextmanager
def native(lab, *torrc):
    """A Tor client of the machine itself, at 100 %; gives curl's arguments for it."""
    directory = f"{lab.dir}/home/alice/tor"
    lab.alice("rm", "-rf", directory)
    with lab.background("app", "alice", *native_client(lab, directory, *torrc), "--Log", f"notice file {directory}/log", stdout=subprocess.DEVNULL):
        until(60, lambda: "Bootstrapped 100%" in lab.alice("cat", f"{directory}/log", check=False).stdout,
              lambda: f"a native client does not get to 100 %:\n{lab.alice('tail', f'{directory}/log', check=False).stdout}")
        yield "--socks5-hostname", "127.0.0.1:9150"


@contextlib.contextmanager
def profile(lab, *args, **keys):
    """Another profile meanwhile."""
    lab.profile(*args, **keys)
    try:
        yield
    finally:
        lab.profile()
