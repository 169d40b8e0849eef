"""Lockdown: no network unless connected, with a daemon or without. Here without systemd: the lock is a plain table."""

import json

from killswitch import attempts, to_web
from lab import FAILURE, TINY, equal, expect, ssh_session, test, until


def profile(lab, name="mine", url=TINY):
    lab.alice("bash", "-c", f"""printf 'backend = "proxy"\\n[upstream]\\nurl = "{url}"\\n' >{name}.toml""")
    lab.proxyctl("profile", "import", f"{name}.toml", "--replace")


def locked(lab):
    """A profile that has connected, then lockdown; returns the network's text before it."""
    profile(lab)
    lab.proxyctl("connect", "mine")
    lab.disconnect()
    before = lab.state()
    lab.proxyctl("lockdown", "on")
    return before


def closed(lab, when):
    before = to_web(lab)
    attempts(lab)
    seen = to_web(lab)[len(before) :]
    expect(not seen, lambda: f"{when}, packets went out:\n" + "\n".join(seen[:8]))


def opens(lab, when):
    before = to_web(lab)
    attempts(lab)
    expect(len(to_web(lab)) > len(before) + 5, f"{when}, nothing goes out")


@test("it asks for a profile that has connected, and for an administrator", seconds=60)
def asks(lab):
    text = lab.proxyctl("lockdown", "on", code=FAILURE)
    expect("no profile has connected yet" in text and "proxyctl connect" in text, text)
    profile(lab)
    lab.proxyctl("lockdown", "on", code=FAILURE)
    lab.connect(TINY)
    lab.proxyctl("lockdown", "on", code=FAILURE)  # ad-hoc settings are no profile
    lab.disconnect()
    opens(lab, "after lockdown was refused")
    expect("is off" in lab.proxyctl("lockdown"), "lockdown is on although it was refused")


@test("nothing leaves before, after and around a connection; turned off, the network is as it was", seconds=150)
def around(lab):
    before = locked(lab)
    status = lab.status()
    expect(status["lockdown"] and status["blocking"] and status["state"] == "disconnected", f"{status}")
    expect("lockdown-unguarded" in [item["code"] for item in status["health"]], f"it does not say that other programs can remove the lock: {status}")
    closed(lab, "locked")
    lab.proxyctl("connect", "mine")
    lab.fetch_through("http://web.lab.test/")
    lab.fetch_through("https://web.lab.test/")
    closed_udp = to_web(lab)
    attempts(lab)
    expect(len(to_web(lab)) == len(closed_udp), "connected under lockdown, packets went around the tunnel")
    text = lab.disconnect()
    expect("lockdown is on" in text, f"disconnect does not say that nothing opens: {text}")
    closed(lab, "disconnected")
    text = lab.proxyctl("connect", "--proxy-url", "http://198.51.100.10:9", code=FAILURE)
    expect("Lockdown is on" in text and "as it was" not in text, text)
    closed(lab, "after a connect that failed")
    lab.proxyctl("lockdown", "off")
    equal(before, lab.state(), "after lockdown")
    opens(lab, "after lockdown was turned off")


@test("a profile without a kill switch has one under lockdown, and none after it", seconds=90)
def killswitch(lab):
    locked(lab)
    lab.connect(TINY, "--no-killswitch")
    closed(lab, "connected with --no-killswitch under lockdown")
    lab.proxyctl("lockdown", "off")
    opens(lab, "connected with --no-killswitch after lockdown")
    lab.fetch_through("http://web.lab.test/")
    lab.proxyctl("lockdown", "on")
    closed(lab, "connected with --no-killswitch and locked again")
    lab.fetch_through("http://web.lab.test/")
    lab.proxyctl("lockdown", "off")


@test("it holds when the daemon is killed, ends, and starts again; a session from outside goes on", seconds=150)
def without_daemon(lab):
    child, say = ssh_session(lab, "net", None, "-i", f"{lab.dir}/ssh_user", "root@192.0.2.2")
    try:
        say(1)
        before = locked(lab)
        say(2)
        second, say_second = ssh_session(lab, "net", None, "-i", f"{lab.dir}/ssh_user", "root@192.0.2.2")
        say_second(3)
        second.kill()
        second.wait()
        lab.daemon_stop("KILL")
        closed(lab, "after kill -9 while disconnected")
        say(3)
        lab.daemon("--again")
        closed(lab, "with a new daemon")
        expect(lab.status()["lockdown"], "the new daemon forgot lockdown")
        lab.proxyctl("connect", "mine")
        lab.fetch_through("http://web.lab.test/")
        lab.daemon_stop("KILL")
        closed(lab, "after kill -9 while connected")
        lab.daemon("--again")
        until(20, lambda: lab.status()["state"] == "connected", lambda: f"{lab.status()}")
        closed(lab, "connected again")
        lab.daemon_stop()
        closed(lab, "after SIGTERM while connected")
        say(4)
        lab.daemon("--again")
        until(20, lambda: lab.status()["state"] == "connected", lambda: f"{lab.status()}")
        lab.disconnect()
        lab.daemon_stop()
        closed(lab, "after SIGTERM while disconnected")
        lab.daemon("--again")
        lab.proxyctl("lockdown", "off")
        equal(before, lab.state(), "after lockdown")
        say(5)
    finally:
        child.kill()
        child.wait()


@test("a record that cannot be read counts as on, and is mended by turning it off", seconds=60)
def unreadable(lab):
    before = lab.state()
    lab.daemon_stop()
    lab.app("bash", "-c", 'echo "{" >"$LAB/lib/lockdown"')
    lab.daemon("--again")
    closed(lab, "with a record that cannot be read")
    shown = json.loads(lab.proxyctl("lockdown", "--json"))
    expect(shown["lockdown"] and "lockdown-unreadable" in [item["code"] for item in shown["health"]], f"{shown}")
    lab.proxyctl("lockdown", "off")
    equal(before, lab.state(), "after lockdown")
    expect("lockdown-unreadable" not in str(lab.status()["health"]), "the health is still bad")


@test("the clean-up after a stop leaves it; --cleanup and rescue turn it off, without a daemon", seconds=90)
def rescued(lab):
    before = locked(lab)
    lab.daemon_stop("KILL")
    closed(lab, "after kill -9")
    text = lab.script("cleanup")
    expect("lockdown is on" in text, f"--cleanup --stop-post does not tell it: {text}")
    closed(lab, "after the clean-up of a stop")
    text = lab.app(f"{lab.stage}/usr/libexec/proxyvpn/proxyvpnd", "--cleanup", "--state-dir", f"{lab.dir}/lib").stdout
    expect("lockdown was on and is off now" in text, f"--cleanup does not tell it: {text}")
    equal(before, lab.state(), "after --cleanup")
    opens(lab, "after --cleanup")
    lab.daemon("--again")
    expect(not lab.status()["lockdown"], "the record is still there")
    lab.proxyctl("lockdown", "on")
    lab.daemon_stop("KILL")
    lab.script("cleanup")
    lab.app("bash", "-c", 'rm -rf /run/proxyvpn/* "$LAB"/lib/*')
    text = lab.app("env", "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent", "proxyctl", "rescue").stdout
    expect("lockdown was on and is off now" in text, f"rescue does not tell it: {text}")
    equal(before, lab.state(), "after rescue")
