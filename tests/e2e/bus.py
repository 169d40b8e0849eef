"""Two users: polkit lets alice, refuses mallory. (Every method x property x caller is in the Rust tests.)"""

import os
import pty
import select
import termios
import time

from lab import NOT_AUTHORISED, NOT_CONNECTED, OK, TINY, UNREACHABLE, equal, expect, test, until


@test("mallory may read the state and nothing else; what she tries changes nothing")
def mallory(lab):
    before = lab.state()
    lab.app("bash", "-c", f"""printf 'backend = "proxy"\\n[upstream]\\nurl = "{TINY}"\\n' >/etc/proxyvpn/profiles.d/office.toml""")
    lab.run("app", "mallory", "bash", "-c", f"""printf 'backend = "proxy"\\n[upstream]\\nurl = "{TINY}"\\n' >mine.toml""")
    try:
        lab.proxyctl("status", user="mallory")
        for refused in (
            ["connect", "office"], ["connect", "--proxy-url", TINY], ["disconnect"], ["reconnect"], ["profile", "import", "mine.toml"],
            ["logs"], ["flows"],
        ):
            text = lab.proxyctl(*refused, user="mallory", code=NOT_AUTHORISED)
            expect("needs a password" in text or "not allowed" in text, f"not in the user's words: {text}")
        equal(before, lab.state(), "mallory changed the network")
        lab.proxyctl("connect", "office")
        connected = lab.state()
        lab.proxyctl("disconnect", user="mallory", code=NOT_AUTHORISED)
        lab.proxyctl("reconnect", user="mallory", code=NOT_AUTHORISED)
        equal(connected, lab.state(), "mallory changed the network")
        lab.check_state("connected")
    finally:
        lab.app("rm", "-f", "/etc/proxyvpn/profiles.d/office.toml")


@test("alice may: profiles are imported, shown, connected, removed; the codes of status --check")
def alice(lab):
    lab.proxyctl("status", "--check", code=NOT_CONNECTED)
    lab.alice("bash", "-c", f"""printf 'backend = "proxy"\\n[upstream]\\nurl = "{TINY}"\\n' >mine.toml""")
    lab.proxyctl("profile", "import", "mine.toml")
    expect("mine" in lab.proxyctl("profile", "list"), "the imported profile is not listed")
    lab.proxyctl("connect", "mine")
    lab.proxyctl("status", "--check", code=OK)
    lab.fetch_through("http://web.lab.test/")
    lab.proxyctl("reconnect")
    lab.fetch_through("http://web.lab.test/")
    lab.proxyctl("logs")
    lab.proxyctl("disconnect")
    lab.proxyctl("profile", "remove", "mine")
    expect("mine" not in lab.proxyctl("profile", "list"), "the removed profile is still listed")


@test("without a daemon: exit code 7 and what to do", daemon=None)
def no_daemon(lab):
    text = lab.proxyctl("status", code=UNREACHABLE)
    expect("proxyvpnd" in text, text)


def at_terminal(lab, user, password, *args):
    """Runs at a terminal of its own and types the password at the prompt; exit code and all that was shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        command = lab.command("app", user, args)
        os.execvp(command[0], command)
    shown, typed, end = "", False, time.monotonic() + 50
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the last process has closed it
            break
        if not piece:
            break
        shown += piece.decode(errors="replace")
        if not typed and "Password:" in shown:
            typed = True
            # the agent switches the echo off after it has asked, and throws away what was typed before
            until(20, lambda: not termios.tcgetattr(terminal)[3] & termios.ECHO, "the password would be shown")
            os.write(terminal, password.encode() + b"\n")
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    expect(typed, f"nobody was asked for a password: {shown}")
    expect(password not in shown, "the password is on the screen")
    return status, shown


@test("at a terminal polkit asks for an administrator's password: a wrong one is refused, the right one connects")
def prompt(lab):
    lab.app("bash", "-c", "getent group sudo >/dev/null || groupadd sudo; usermod -aG sudo alice; echo alice:Open-Sesame-5 | chpasswd")
    connect = ["proxyctl", "connect", "--proxy-url", TINY]
    before = lab.state()
    status, shown = at_terminal(lab, "mallory", "something-else", *connect)
    expect(status == NOT_AUTHORISED, f"ended with {status}: {shown}")
    equal(before, lab.state(), "a wrong password changed the network")
    status, shown = at_terminal(lab, "mallory", "Open-Sesame-5", *connect)
    expect(status == OK, f"ended with {status}: {shown}")
    lab.check_state("connected")
