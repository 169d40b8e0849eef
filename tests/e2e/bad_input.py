"""Bad input: each gives one clear error in the user's words, the documented exit code, and leaves the network as it was."""

import contextlib
import os
import subprocess
import time

from lab import FAILURE, NOT_AUTHORISED, PROXY, PYTHON, TINY, USAGE, equal, expect, fails_clean, faulty, test, until

HERE = os.path.dirname(os.path.abspath(__file__))


@contextlib.contextmanager
def profile(lab, name, text, mode="644"):
    path = f"/etc/proxyvpn/profiles.d/{name}.toml"
    lab.app("bash", "-c", f"cat >{path} <<'END'\n{text}\nEND\nchmod {mode} {path}")
    try:
        yield path
    finally:
        lab.app("rm", "-f", path)


@test("a TUN name that exists: the device of that name stays as it is")
def tun_exists(lab):
    lab.app("ip", "tuntap", "add", "pvpn0", "mode", "tun")
    try:
        fails_clean(lab, "--proxy-url", TINY, words=["pvpn0", "exists"])
        # another name helps, as the text should say
        lab.connect(TINY, "--tun-name", "other0")
        lab.fetch_through("http://web.lab.test/")
        lab.disconnect()
    finally:
        lab.app("ip", "link", "delete", "pvpn0")


@test("no /dev/net/tun")
def no_tun(lab):
    lab.app("rm", "/dev/net/tun")
    try:
        fails_clean(lab, "--proxy-url", TINY, words=["/dev/net/tun"])
    finally:
        lab.app("mknod", "-m", "666", "/dev/net/tun", "c", "10", "200")


@test("no CAP_NET_ADMIN", daemon=None)
def no_capability(lab):
    lab.daemon("--no-capability")
    fails_clean(lab, "--proxy-url", TINY, words=["CAP_NET_ADMIN"])


@test("polkit absent means no")
def no_polkit(lab):
    service = "/usr/share/dbus-1/system-services/org.freedesktop.PolicyKit1.service"
    lab.app("bash", "-c", f"mv {service} /run/polkit.service; pkill -x -HUP dbus-daemon; pkill -x polkitd; sleep 0.3; ! pgrep -x polkitd")
    try:
        fails_clean(lab, "--proxy-url", TINY, words=["polkit"], code=NOT_AUTHORISED, look=False)
        lab.run("app", None, "proxyctl", "disconnect", check=False)
    finally:
        lab.app("bash", "-c", f"mv /run/polkit.service {service}; pkill -x -HUP dbus-daemon; sleep 0.3")
    until(10, lambda: lab.run("app", "alice", "proxyctl", "status", check=False).returncode == 0, "polkit is back, and status still fails")


@test("a profile with a typo: file, line and word are named")
def typo(lab):
    with profile(lab, "typo", f'backend = "proxy"\n[upstream]\nurrl = "{TINY}"'):
        fails_clean(lab, "typo", words=["typo.toml", "3", "urrl"])


@test("an error in the settings: the daemon runs with its defaults and says what is wrong, and where", daemon=None)
def settings(lab):
    lab.app("bash", "-c", "printf 'log-level = \"info\"\nmax-flowz = 3\n' >/etc/proxyvpn/proxyvpnd.toml; chmod 644 /etc/proxyvpn/proxyvpnd.toml")
    try:
        lab.daemon()
        lab.proxyctl("connect", "--proxy-url", TINY)
        told = [item["text"] for item in lab.status()["health"] if item["code"] == "settings-ignored"]
        expect(told and all(word in told[0] for word in ("proxyvpnd.toml:2", "max-flowz")), f"not told: {lab.status()['health']}")
        lab.proxyctl("disconnect")
    finally:
        lab.app("rm", "-f", "/etc/proxyvpn/proxyvpnd.toml")


@test("a profile that does not exist")
def no_profile(lab):
    fails_clean(lab, "nothere", words=["nothere", "profile"])


@test("a world-readable secret, a profile that others can write")
def exposed(lab):
    lab.app("bash", "-c", "printf pw >/etc/proxyvpn/password; chmod 644 /etc/proxyvpn/password")
    try:
        text = f'backend = "proxy"\n[upstream]\nurl = "http://tester@{PROXY}:3128"\npassword-file = "/etc/proxyvpn/password"'
        with profile(lab, "open", text):
            fails_clean(lab, "open", words=["/etc/proxyvpn/password", "chmod"])
        with profile(lab, "writable", f'backend = "proxy"\n[upstream]\nurl = "{TINY}"', "666"):
            fails_clean(lab, "writable", words=["writable.toml", "chmod"])
    finally:
        lab.app("rm", "-f", "/etc/proxyvpn/password")


@test("wrong usage: exit code 2 and one line that says what")
def usage(lab):
    for args in (
        ["connect", "--proxy-url", TINY, "--proxy-host", "x"], ["connect", "--mtu", "12"], ["connect", "--tun-name", "a/b"], ["fly"],
        ["connect", "--no-such-option"], ["connect", "--dns", "resolver"],
    ):
        text = lab.proxyctl(*args, code=USAGE)
        expect(text.startswith("error:"), text)


@test("addresses that make no sense")
def nonsense(lab):
    for url in "http://", "ftp://proxy.lab.test:21", "http://proxy.lab.test:99999", "http://user:secret@proxy.lab.test:3128", "nonsense":
        before = lab.state()
        done = lab.run("app", "alice", "proxyctl", "connect", "--proxy-url", url, check=False)
        expect(done.returncode in (FAILURE, USAGE), f"{url}: ended with {done.returncode}: {done.stdout}")
        expect("secret" not in done.stdout, f"the password is in the text: {done.stdout}")
        equal(before, lab.state(), url)


@test("a string of 64 MiB over D-Bus, and one that the bus lets through", seconds=60)
def long_string(lab):
    pid = lab.daemon_pid()
    before = lab.state()
    for length in 64 << 20, 16 << 20, 1 << 20, 70_000:
        got = lab.alice(PYTHON, f"{HERE}/rawbus.py", "long", str(length), timeout=40).stdout
        # the bus itself ends a client that goes over its limit
        expect(got.startswith("error") or "closed the connection" in got, f"{length} bytes: {got[:300]}")
        if length < 1 << 24:
            expect(got.startswith("error") and len(got) < 2000, f"{length} bytes: {len(got)} bytes came back: {got[:300]}")
    expect(lab.daemon_pid() == pid, "the daemon ended")
    lab.check_state("disconnected")
    equal(before, lab.state(), "the network changed")


@test("a client that vanishes in mid-call, and one that floods", seconds=90)
def vanish(lab):
    pid = lab.daemon_pid()
    with faulty(lab, "silent", 9012) as url, profile(lab, "slow", f'backend = "proxy"\n[upstream]\nurl = "{url}"'):
        for _ in range(3):
            lab.alice(PYTHON, f"{HERE}/rawbus.py", "vanish")
        lab.disconnect()  # one of them may have been let in before it left
        lab.alice(PYTHON, f"{HERE}/rawbus.py", "linger")
        lab.check_state("connecting")
        lab.alice(PYTHON, f"{HERE}/rawbus.py", "flood", "2000")
        lab.proxyctl("status", timeout=10)
        lab.disconnect()
    expect(lab.daemon_pid() == pid, "the daemon ended")
    lab.connect(TINY)
    lab.fetch_through("http://web.lab.test/")


@test("a second Connect while connecting, and while connected", seconds=90)
def second_connect(lab):
    with faulty(lab, "silent", 9013) as url:
        lab.proxyctl("connect", "--proxy-url", url, "--no-wait")
        lab.check_state("connecting")
        text = lab.proxyctl("connect", "--proxy-url", TINY, code=FAILURE)
        expect("disconnect" in text, f"the text does not say what to do: {text}")
        start = time.monotonic()
        lab.disconnect()
        expect(time.monotonic() - start < 5, "disconnect while connecting took long")
    lab.connect(TINY)
    text = lab.proxyctl("connect", "--proxy-url", TINY, code=FAILURE)
    expect("disconnect" in text, f"the text does not say what to do: {text}")
    lab.fetch_through("http://web.lab.test/")


@test("a proxy on this very machine: found out and explained; works with a bypass for its user", seconds=90)
def loops(lab):
    lab.app("bash", "-c", f"""id pvproxy >/dev/null 2>&1 || useradd --system -M pvproxy
        printf 'Port 8899\\nListen 127.0.0.1\\nTimeout 60\\nMaxClients 50\\n' >{lab.dir}/own-proxy.conf""")
    with lab.background("app", "pvproxy", "tinyproxy", "-d", "-c", f"{lab.dir}/own-proxy.conf", stdout=subprocess.DEVNULL):
        until(5, lambda: "8899" in lab.app("ss", "-Htln").stdout, "tinyproxy does not listen")
        fails_clean(lab, "--proxy-url", "http://127.0.0.1:8899", words=["this machine", "bypass"])
        lab.connect("http://127.0.0.1:8899", "--bypass-user", "pvproxy")
        expect("hello from http" in lab.fetch("http://web.lab.test/").stdout, "no fetch through the machine's own proxy")
        lab.disconnect()
