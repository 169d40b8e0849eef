"""Works whatever the reverse-path filter is: out through the proxy, and in by ssh."""

from lab import TINY, expect, test


def with_filter(lab, value):
    save = lab.app("bash", "-c", "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo $f $(cat $f); done").stdout
    lab.app("bash", "-c", f"for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo {value} >$f; done")
    try:
        lab.connect(TINY)
        device = lab.status()["device"]
        got = lab.app("cat", f"/proc/sys/net/ipv4/conf/{device}/rp_filter").stdout.strip()
        expect(got == str(value), f"rp_filter of {device} is {got}: it must come from 'default', not from us")
        with lab.nothing_direct(" and not src port 22"):
            lab.fetch_through("http://web.lab.test/")
            lab.fetch_through("https://web6.lab.test/", source="2001:db8:")
            done = lab.net("ssh", "-i", f"{lab.dir}/ssh_user", "-o", f"UserKnownHostsFile={lab.dir}/known_hosts", "-o", "ConnectTimeout=10",
                           "root@192.0.2.2", "echo", "inside")
        expect("inside" in done.stdout, done.stdout)
        lab.disconnect()
    finally:
        lab.app("bash", "-c", f"while read -r f v; do [ ! -e $f ] || echo $v >$f; done <<'END'\n{save}END")


@test("rp_filter 0 on every device")
def off(lab):
    with_filter(lab, 0)


@test("rp_filter 1 (strict) on every device")
def strict(lab):
    with_filter(lab, 1)


@test("rp_filter 2 (loose) on every device")
def loose(lab):
    with_filter(lab, 2)
