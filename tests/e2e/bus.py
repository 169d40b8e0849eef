"""Two users: polkit lets alice, refuses mallory. (Every method x property x caller is in the Rust tests.)"""

from lab import NOT_AUTHORISED, NOT_CONNECTED, OK, TINY, UNREACHABLE, equal, expect, test


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
