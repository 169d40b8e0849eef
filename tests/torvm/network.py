"""What the other tests stand on: the private Tor network works, and the sniffer sees what goes around it."""

from lab import PYTHON, WEB, expect, test, until
from torlab import native


@test("a native client reaches a page by an exit and an onion service, and talks to relays only", seconds=150, daemon=None)
def native_tor(lab):
    def onion():
        # a client that asks at the change of a period, four minutes here, gets nothing and remembers it: the next one is new
        with native(lab) as socks:
            lab.fetch_by_exit("http://web.lab.test/", *socks)
            return "hello from" in lab.fetch(f"http://{lab.tor['onion']}/", *socks, timeout=20, check=False).stdout

    with lab.only_to():
        until(90, onion, "the onion service does not answer")


@test("a native client with the bridge talks to the bridge only", daemon=None)
def native_bridge(lab):
    bridge = ["UseBridges 1", f"Bridge {lab.tor['bridge_line']}", "ClientTransportPlugin obfs4 exec /usr/bin/obfs4proxy"]
    with lab.only_to(lab.tor["bridge"]), native(lab, *bridge) as socks:
        lab.fetch_by_exit("http://web.lab.test/", *socks)


@test("anti-test: without a connection the sniffer sees what goes around Tor, TCP, UDP and DNS", daemon=None)
def detector(lab):
    before = len(lab.around(lab.relays))
    expect(lab.client_of("http://web.lab.test/") == "192.0.2.2", "the server does not see the machine itself")
    lab.app(PYTHON, "-c", f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{WEB}', 9999))")
    seen = "\n".join(until(5, lambda: lab.around(lab.relays)[before:], "the sniffer sees nothing"))
    for what in f"> {WEB}.80: Flags [S]", f"> {WEB}.9999: UDP", ".53: ":
        until(5, lambda: what in "\n".join(lab.around(lab.relays)[before:]), lambda: f"the sniffer does not see '{what}':\n{seen}")
