"""A resolver on this machine that is not systemd-resolved (dnsmasq on 127.0.0.1): it works when its servers are named, else a warning says what to do."""

import contextlib
import time

from lab import DNS, TINY, WEB, expect, test, until

RESOLV_CONF = "/etc/resolv.conf"


@contextlib.contextmanager
def stub(lab):
    before = lab.app("cat", RESOLV_CONF).stdout
    with lab.background("app", None, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", f"--server={DNS}",
                        "--listen-address=127.0.0.1", "--bind-interfaces", "--user=root", "--pid-file=/run/stub.pid", "--cache-size=0"):
        until(5, lambda: "127.0.0.1:53 " in lab.app("ss", "-Hlun").stdout, "dnsmasq does not listen")
        lab.app("sh", "-c", f"echo nameserver 127.0.0.1 >{RESOLV_CONF}")
        try:
            yield
        finally:
            lab.app("sh", "-c", f"cat >{RESOLV_CONF}; kill $(cat /run/stub.pid)", data=before)


def look_up(lab, name):
    """The address or nothing, and how long it took."""
    start = time.monotonic()
    done = lab.alice("getent", "ahostsv4", name, check=False, timeout=30)
    return done.stdout.split()[:1], time.monotonic() - start


@test("with its servers named, look-ups go on through it and nothing else leaves")
def named(lab):
    with stub(lab):
        lab.connect(TINY, "--dns", DNS)
        with lab.nothing_direct():
            for attempt in "first", "second":
                found, took = look_up(lab, "web.lab.test")
                expect(found == [WEB] and took < 1, f"{attempt}: {found} after {took:.2f} s")
            lab.fetch_through("http://web.lab.test/")
        expect(lab.app("cat", RESOLV_CONF).stdout == "nameserver 127.0.0.1\n", "resolv.conf was changed")
        lab.disconnect()
        expect(look_up(lab, "web.lab.test")[0] == [WEB], "no look-up after Disconnect")


@test("with its servers not known, what it asks is refused, and a warning says what to do")
def unknown(lab):
    with stub(lab):
        lab.connect(TINY)
        text = lab.proxyctl("status")
        expect("127.0.0.1" in text and "--dns" in text, f"the status does not say what to do: {text}")
        with lab.nothing_direct(f" and not host {DNS}"):
            before = len(lab.packets(f"dst host {DNS} and port 53"))
            found, took = look_up(lab, "web.lab.test")
            expect(not found and took < 25, f"{found} after {took:.2f} s")
            expect(len(lab.packets(f"dst host {DNS} and port 53")) == before, "its question left")
        lab.disconnect()
        expect(look_up(lab, "web.lab.test")[0] == [WEB], "no look-up after Disconnect")
