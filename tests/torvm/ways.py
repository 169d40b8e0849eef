"""Ways to Tor: by a bridge, behind a proxy; and what is said when there is none."""

import shutil
import subprocess

from image import BUSYBOX, altered, content
from lab import PROXY, WEB, equal, expect, test, until
from torlab import CONNECT_SECONDS, PROFILE, profile


@test("with an obfs4 bridge the wire carries the bridge and nothing else", seconds=150)
def obfs4(lab):
    with profile(lab, transport="obfs4", bridges=[lab.tor["bridge_line"]]), lab.only_to(lab.tor["bridge"]):
        lab.connect_tor()
        lab.fetch_by_exit("http://web.lab.test/")
        lab.disconnect()


@test("with a bridge without transport, too", seconds=150)
def plain_bridge(lab):
    with profile(lab, transport="none", bridges=[lab.tor["plain_bridge_line"]]), lab.only_to(lab.tor["bridge"]):
        lab.connect_tor()
        lab.fetch_by_exit("http://web.lab.test/")
        lab.disconnect()


@test("Tor behind squid: the wire carries the proxy and nothing else", seconds=150)
def behind_squid(lab):
    keys = f'username = "tester"\npassword-file = "{lab.dir}/tor-password"\n'
    lab.app("install", "-m", "600", "-o", "proxyvpn", f"{lab.dir}/password", f"{lab.dir}/tor-password")
    with profile(lab, f"http://{PROXY}:3128", upstream_more=keys), lab.only_to(PROXY):
        lab.connect_tor()
        lab.fetch_by_exit("http://web.lab.test/")
        lab.disconnect()
    log = lab.net("cat", f"{lab.dir}/logs/squid/access.log").stdout
    expect(any(f"CONNECT {relay}:9001" in log for relay in lab.relays), f"squid carried no relay: {log[-500:]}")


@test("Tor behind the proxy by itself (https-proxy): the wire carries the proxy and nothing else", seconds=150)
def tors_own_proxy(lab):
    with profile(lab, https_proxy=f"{PROXY}:8888"), lab.only_to(PROXY):
        lab.connect_tor()
        lab.fetch_by_exit("http://web.lab.test/")
        lab.disconnect()


@test("who connects sees how far Tor is, and so does the bus", seconds=150)
def progress(lab):
    seen = []
    with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as attempt:
        while attempt.poll() is None:
            seen.append(lab.bootstrap())
        text = attempt.communicate()[0]
    expect(attempt.returncode == 0 and "100" in text, f"no progress: {text}")
    percents = [one["percent"] for one in seen]
    expect(percents == sorted(percents) and any(0 < percent < 100 for percent in percents), f"percents on the bus: {percents}")
    expect(all(one["tag"] and one["summary"] for one in seen if one["percent"]), f"without words: {seen}")
    lab.disconnect()


@test("accel = auto: it connects, and says how the VM runs and why", seconds=180)
def automatic(lab):
    with profile(lab, accel="auto"):
        lab.connect_tor()
        used, why = lab.tor_property("Accelerator"), lab.tor_property("AcceleratorReason")
        expect(used in ("kvm", "tcg") and why, f"{used!r} because {why!r}")
        lab.fetch_by_exit()
        lab.disconnect()


def hinted(lab, *words):
    """An attempt that gets nowhere, with a hint that has these words, is ended."""
    before = lab.state()
    with lab.background("app", "alice", "proxyctl", "connect", PROFILE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as attempt:
        hint = until(90, lambda: lab.bootstrap()["hint"], lambda: f"no hint: {lab.bootstrap()}")
        expect(all(word in hint.lower() for word in words), f"the hint does not speak of {words}: {hint}")
        lab.fetch(f"http://{WEB}/", timeout=2, check=False)
        lab.disconnect()
        attempt.wait(10)
    equal(before, lab.state(), "the network is not what it was")


@test("a bridge that does not answer: the hint says so, nothing else is contacted, and the attempt can be ended", seconds=150)
def dead_bridge(lab):
    dead = lab.tor["bridge_line"].replace(":9002 ", ":9 ")
    with profile(lab, transport="obfs4", bridges=[dead]), lab.only_to(lab.tor["bridge"]):
        hinted(lab, "bridge")


# The place of nft, which init runs as root before Tor.
SHIFTED = """#!/usr/bin/busybox sh
B=/usr/bin/busybox
$B date -s "@$(($($B date +%s) + SECONDS))" >/dev/null
exec /usr/bin/nft-itself "$@"
"""


# By 30 hours relays are still talked to, but their consensus is too old; by years their certificates are of another time.
@test("a clock in the guest that is wrong by hours or by years: the hint says so, and to which side", seconds=400)
def wrong_clock(lab):
    nft = shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin:/bin")
    for hours, side in (30, "ahead"), (3 * 8766, "ahead"), (-3 * 8766, "behind"):
        shifted = SHIFTED.replace("SECONDS", str(hours * 3600)).encode()
        files = {"usr/bin/busybox": (content(BUSYBOX), 0o755), "usr/bin/nft-itself": (content(nft), 0o755), "usr/bin/nft": (shifted, 0o755)}
        with altered(lab, files) as image, lab.only_to():
            lab.daemon_stop()
            lab.daemon(image=image)
            hinted(lab, "clock", side)


@test("bridges of an imported profile are set and listed by proxyctl", seconds=150)
def set_bridges(lab):
    text = lab.app("cat", f"/etc/proxyvpn/profiles.d/{PROFILE}.toml").stdout
    lab.alice("tee", "mine.toml", data=text)
    lab.proxyctl("profile", "import", "mine.toml")
    try:
        lab.proxyctl("torvm", "bridges", "set", "mine", lab.tor["bridge_line"], "--transport", "obfs4")
        listed = lab.proxyctl("torvm", "bridges", "list", "mine")
        expect(lab.tor["bridge"] in listed, f"not listed: {listed}")
        with lab.only_to(lab.tor["bridge"]):
            lab.proxyctl("connect", "mine", timeout=CONNECT_SECONDS)
            lab.fetch_by_exit()
            lab.disconnect()
    finally:
        lab.proxyctl("profile", "remove", "mine", code=None)
