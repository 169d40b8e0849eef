"""An SSH session into the machine survives Connect and Disconnect; a new one can be opened meanwhile."""

import time

from lab import TINY, expect, ssh_session, test


@test("a session into the machine survives connect, connected and disconnect", seconds=90)
def survives(lab):
    child, say = ssh_session(lab, "net", None, "-i", f"{lab.dir}/ssh_user", "root@192.0.2.2")
    try:
        say(1)
        lab.connect(TINY)
        say(2)
        time.sleep(3)
        say(3)
        second, say_second = ssh_session(lab, "net", None, "-i", f"{lab.dir}/ssh_user", "root@192.0.2.2")
        try:
            say_second(4)
        finally:
            second.kill()
            second.wait()
        # what the session's user does goes through the tunnel like everything else
        lab.fetch_through("http://web.lab.test/")
        lab.disconnect()
        say(5)
    finally:
        child.kill()
        child.wait()


@test("anti-test: without inbound replies the session does stall", seconds=60)
def without_replies(lab):
    lab.app("bash", "-c", f"""cat >/etc/proxyvpn/profiles.d/closed.toml <<'END'
backend = "proxy"
[upstream]
url = "{TINY}"
[protect]
inbound-replies = false
END""")
    try:
        lab.proxyctl("connect", "closed")
        done = lab.net("nc", "-z", "-w", "3", "192.0.2.2", "22", check=False)
        expect(done.returncode != 0, "a connection from outside was answered though inbound-replies is off")
    finally:
        lab.app("rm", "/etc/proxyvpn/profiles.d/closed.toml")
