"""What is wanted, and that changes are under way, is recorded. A record that cannot be written stops Connect before it changed anything;
one that cannot be believed blocks everything until somebody disconnects. Nothing hangs, whatever lies in its place."""

import contextlib

from lab import FAILURE, PYTHON, TINY, equal, expect, test, until
from steps import rest

INTENT = "/run/proxyvpn/intent.json"

# What a crash, another version or somebody else can have left, as a command in the record's directory.
SPOILED = {
    "cut": "truncate -s 40 intent.json",
    "empty": ": >intent.json",
    "zeroes": "truncate -s 0 intent.json; truncate -s 300 intent.json",
    "of a newer version": 'sed -i s/.version.:1/\\"version\\":2/ intent.json',
    "with an unknown field": 'sed -i s/.killswitch.:/\\"new\\":1,\\"killswitch\\":/ intent.json',
    "writable for others": "chmod 666 intent.json",
    "of another user": "chown alice intent.json",
    "a link": "mv intent.json other.json; ln -s other.json intent.json",
    "a pipe": "rm intent.json; mkfifo intent.json",
    "a directory": "rm intent.json; mkdir intent.json",
    "huge": "truncate -s 100M intent.json",
}


def spoil(lab, command):
    lab.app("bash", "-c", f"cd /run/proxyvpn && {command}")


@test("a record of what is wanted that cannot be believed blocks until somebody disconnects", seconds=240)
def spoiled_intent(lab):
    before = lab.state()
    for what, command in SPOILED.items():
        lab.connect(TINY)
        lab.daemon_stop("KILL")
        spoil(lab, command)
        lab.daemon("--again")
        status = until(10, lambda: (found := lab.status())["state"] == "blocked" and found, f"{what}: not blocked: {lab.status()}")
        expect(status["reason"]["code"] == "intent-unreadable", f"{what}: {status['reason']}")
        for words in INTENT, "proxyctl disconnect":
            expect(words in status["reason"]["text"], f"{what}: the reason does not name {words}: {status['reason']}")
        with lab.nothing_direct():
            lab.fetch("http://web.lab.test/", timeout=3, check=False)
            lab.app(PYTHON, "-c", 'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("203.0.113.80", 9999))', check=False)
        lab.disconnect()
        equal(before, lab.state(), f"{what}: after disconnect")
        expect(lab.app("test", "-e", INTENT, check=False).returncode, f"{what}: the record is still there")


@test("a journal that cannot be believed stops nothing", seconds=180)
def spoiled_journal(lab):
    before = lab.state()
    for what, command in SPOILED.items():
        if "version" in what or "field" in what:
            continue
        lab.connect(TINY)
        lab.daemon_stop("KILL")
        lab.app("bash", "-c", f'cd "$LAB/lib" && {command.replace("intent.json", "journal.json")}')
        lab.daemon("--again")
        expect(rest(lab) == "connected", f"{what}: the daemon did not go on")
        lab.disconnect()
        equal(before, lab.state(), f"{what}: after disconnect")


@contextlib.contextmanager
def mounted(lab, directory, options):
    """`directory` with what is in it on a file system of its own."""
    lab.app("bash", "-c", f"mount -t tmpfs -o {options} tmpfs {directory} && chown proxyvpn: {directory} && chmod 700 {directory}")
    try:
        yield
    finally:
        lab.app("umount", "-l", directory)


@test("a full disk and a read-only one stop Connect before it changed anything", seconds=120)
def full_disk(lab):
    rest(lab)
    for directory, words in ("/run/proxyvpn", "cannot record what is wanted"), (f"{lab.dir}/lib", "writing the journal"):
        for trouble, cause in ("full", "No space left"), ("read-only", "Read-only file system"):
            with mounted(lab, directory, "size=8k"):
                if trouble == "full":
                    lab.app("bash", "-c", f"head -c 1M /dev/zero >{directory}/rest", check=False)
                else:
                    lab.app("mount", "-o", "remount,ro", directory)
                before = lab.state()
                with lab.background("app", None, "ip", "monitor", "rule", "route", "link", stdout=-1) as monitor:
                    text = lab.proxyctl("connect", "--proxy-url", TINY, code=FAILURE)
                    monitor.kill()
                    seen = monitor.stdout.read().decode()
                    monitor.stdout.close()
                expect(words in text and cause in text, f"{directory} {trouble}: the error does not say '{words}' and '{cause}': {text}")
                expect(not seen.strip(), f"{directory} {trouble}: the network changed meanwhile: {seen}")
                equal(before, lab.state(), f"{directory} {trouble}")
                lab.check_state("disconnected")
    lab.connect(TINY)
