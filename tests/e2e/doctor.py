"""The diagnosis finds what is wrong, says what to do, and changes nothing."""

import json

from lab import FAILURE, OK, PROXY, SQUID, equal, expect, faulty, test

PASSWORD = "--password-file"


def doctor(lab, *args, code):
    before = lab.state()
    report = json.loads(lab.proxyctl("doctor", "--json", *args, code=code, timeout=60))
    equal(before, lab.state(), "doctor changed the network")
    checks = {check["code"]: check for check in report["checks"]}
    for check in checks.values():
        expect((check["outcome"] in ("ok", "skipped")) == (check["remedy"] == ""), f"a remedy where none is needed, or none: {check}")
    return checks


def outcome(checks, code, want, *words):
    found = checks[code]
    expect(found["outcome"] == want, f"{code} is {found}, not {want}")
    for word in words:
        expect(word in found["text"] + found["remedy"], f"{code} does not say '{word}': {found}")


@test("a machine and a proxy on which all is well")
def well(lab):
    checks = doctor(lab, "--proxy-url", SQUID, PASSWORD, f"{lab.dir}/home/alice/password", code=OK)
    for code in "capability", "tun", "device-name", "firewall", "firewall-owner", "resolver", "dns-udp", "proxy", "proxy-name", "proxy-ip-literal", "dns-tcp-proxy":
        outcome(checks, code, "ok")


@test("a proxy that refuses addresses")
def names_only(lab):
    with faulty(lab, "names", 9011) as url:
        checks = doctor(lab, "--proxy-url", url, code=FAILURE)
    outcome(checks, "proxy", "ok")
    outcome(checks, "proxy-name", "ok")
    outcome(checks, "proxy-ip-literal", "failed", "refuses addresses")
    outcome(checks, "dns-tcp-proxy", "warning")


@test("a proxy that is not there, and a wrong password")
def no_proxy(lab):
    checks = doctor(lab, "--proxy-url", f"http://{PROXY}:3999", code=FAILURE)
    outcome(checks, "proxy", "failed", "refused")
    outcome(checks, "dns-tcp-proxy", "skipped")
    lab.alice("sh", "-c", "printf wrong >bad; chmod 600 bad")
    checks = doctor(lab, "--proxy-url", SQUID, PASSWORD, f"{lab.dir}/home/alice/bad", code=FAILURE)
    outcome(checks, "proxy", "failed", "password")


@test("a resolver that does not answer")
def no_resolver(lab):
    lab.service("stop", "dnsmasq")
    try:
        checks = doctor(lab, "--proxy-url", f"http://{PROXY}:8888", code=FAILURE)
    finally:
        lab.service("start", "dnsmasq", 53)
    outcome(checks, "dns-udp", "failed", "198.51.100.53")
    outcome(checks, "proxy", "ok")


@test("a daemon without the capability", daemon=None)
def no_capability(lab):
    lab.daemon("--no-capability")
    checks = doctor(lab, code=FAILURE)
    outcome(checks, "capability", "failed", "CAP_NET_ADMIN")
    outcome(checks, "tun", "skipped")
