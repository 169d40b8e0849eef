"""After a connection the network is what it would have been without us."""

from lab import TINY, equal, expect, test


@test("50 times connect and disconnect", seconds=240)
def fifty_times(lab):
    before = lab.state()
    for number in range(50):
        lab.connect(TINY)
        if number == 0:
            connected = lab.state()
            expect(connected != before, "connected, and the comparison sees no difference: it could not fail")
        lab.disconnect()
        if number % 10 == 0:
            equal(before, lab.state(), f"after disconnect number {number + 1}")
    equal(before, lab.state(), "after 50 times")


@test("what others have in the network stays theirs", seconds=60)
def foreign_settings(lab):
    lab.app("bash", "-c", """set -e
        nft 'add table inet mine; add chain inet mine out { type filter hook output priority 0; }; add rule inet mine out counter name x drop comment "x"' 2>/dev/null ||
        nft 'add table inet mine; add chain inet mine out { type filter hook output priority 0; }; add rule inet mine out tcp dport 4444 drop'
        ip rule add from 10.9.9.9 lookup 4711 priority 3700; ip -6 rule add from 2001:db8:9::9 lookup 4711 priority 3701
        ip route add 10.77.0.0/16 via 192.0.2.1 table 4711; ip route add 10.78.0.0/16 via 192.0.2.1""")
    try:
        before = lab.state()
        lab.connect(TINY)
        lab.fetch_through("http://web.lab.test/")
        lab.disconnect()
        equal(before, lab.state(), "somebody else's settings changed")
    finally:
        lab.app("bash", "-c", """nft delete table inet mine; ip rule del priority 3700 from 10.9.9.9; ip -6 rule del priority 3701
            ip route flush table 4711; ip route del 10.78.0.0/16""")


@test("SIGTERM while connected", seconds=60)
def terminated(lab):
    before = lab.state()
    lab.connect(TINY)
    lab.daemon_stop()
    equal(before, lab.state(), "after SIGTERM")


@test("kill -9 while connected, then proxyvpnd --cleanup", seconds=60)
def killed_and_cleaned(lab):
    before = lab.state()
    lab.connect(TINY)
    lab.daemon_stop("KILL")
    expect(lab.state() != before, "kill -9 left nothing to clean: the test could not fail")
    lab.script("cleanup")
    equal(before, lab.state(), "after --cleanup")
    lab.script("cleanup")
    equal(before, lab.state(), "after a second --cleanup")


@test("kill -9 while connected, then proxyctl rescue as root; no state, no bus needed", seconds=60)
def rescued(lab):
    before = lab.state()
    lab.connect(TINY)
    lab.daemon_stop("KILL")
    lab.app("bash", "-c", 'rm -rf /run/proxyvpn/* "$LAB"/lib/*')
    lab.run("app", "alice", "proxyctl", "rescue", check=False)
    expect(lab.state() != before, "a user who is not root opened the network")
    text = lab.app("env", "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent", "proxyctl", "rescue").stdout
    expect(any(line.startswith("rule remove priority") for line in text.splitlines()), f"it does not say what it removed: {text}")
    equal(before, lab.state(), "after rescue")
    lab.fetch("http://web.lab.test/")


@test("the same with a daemon that runs as root", seconds=90, daemon="root")
def as_root(lab):
    before = lab.state()
    lab.connect(TINY)
    lab.fetch_through("https://web.lab.test/")
    lab.disconnect()
    equal(before, lab.state(), "after disconnect")


@test("a dry run and a plan change nothing", seconds=60)
def dry_run(lab):
    before = lab.state()
    text = lab.connect(TINY, "--dry-run")
    for word in "pvpn0", "nft", "rule", "route":
        expect(word in text, f"the plan does not mention '{word}': {text}")
    equal(before, lab.state(), "a dry run changed the network")
    lab.check_state("disconnected")
