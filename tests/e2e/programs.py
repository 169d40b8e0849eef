"""Programs of others, as they are: each at every MTU, over IPv4 and IPv6, and what they carry arrives intact."""

import contextlib
import hashlib
import json
import os
import random
import shutil

from lab import PYTHON, TINY, WEB, WEB6, Skipped, expect, test, until

HERE = os.path.dirname(os.path.abspath(__file__))
MIB = 1 << 20


def needs(*programs):
    for program in programs:
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
            raise Skipped(f"{program} is not installed")


@contextlib.contextmanager
def serving(lab, port, *args):
    """A server in net, until it listens on `port`."""
    log = f"{lab.dir}/logs/{os.path.basename(args[0])}.log"
    with open(log, "ab") as output, lab.background("net", None, *args, stdout=output, stderr=output) as child:
        until(10, lambda: f":{port} " in lab.net("ss", "-Htln").stdout or child.poll() is not None, f"{args[0]} does not listen")
        expect(child.poll() is None, lambda: f"{args[0]} ended: {open(log, encoding='utf-8').read()[-500:]}")
        yield


def each_mtu(lab):
    """Connects at one MTU after the other; gives it with the server's addresses, in turn IPv4 or IPv6 first. Afterwards no packet went
    around the tunnel, and no connection is left in it."""
    for number, mtu in enumerate([1500, 9000, 65535]):
        lab.connect(TINY, "--mtu", str(mtu))
        link = json.loads(lab.app("ip", "-json", "link", "show", "pvpn0").stdout)[0]
        expect(link["mtu"] == mtu, f"the device's MTU is {link['mtu']}, not {mtu}")
        with lab.nothing_direct():
            yield mtu, (WEB6, WEB) if number % 2 else (WEB, WEB6)
        until(10, lambda: not flows(lab), lambda: f"mtu {mtu}: connections of programs that have ended: {flows(lab)}")
        lab.disconnect()


def in_url(address):
    return f"[{address}]" if ":" in address else address


def flows(lab):
    return json.loads(lab.proxyctl("flows", "--json"))["flows"]


def fill(path, sizes, seed):
    """Files of these sizes: random bytes, the same for the same seed."""
    numbers = random.Random(seed)
    for name, size in sizes.items():
        os.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
        with open(f"{path}/{name}", "wb") as file:
            file.write(numbers.randbytes(size))


def tree(path):
    """A tree as people copy them: many small files, some of a few MB, an empty one, a link, a program."""
    numbers = random.Random(1)
    fill(path, {f"dir{number % 7}/small-{number}": numbers.randrange(1, 30_000) for number in range(200)}, 2)
    fill(path, {"large-0": 4 * MIB, "large-1": 2 * MIB + 1, "dir1/empty": 0}, 3)
    os.symlink("../large-0", f"{path}/dir0/link")
    os.chmod(f"{path}/large-1", 0o755)


def manifest(path):
    """Names, modes and contents of all below `path`, as text."""
    lines = []
    for directory, _, names in os.walk(path):
        for name in names:
            file = f"{directory}/{name}"
            if os.path.islink(file):
                kind = "link to " + os.readlink(file)
            else:
                with open(file, "rb") as content:
                    kind = f"{os.stat(file).st_mode:o} {hashlib.sha256(content.read()).hexdigest()}"
            lines.append(f"{os.path.relpath(file, path)} {kind}")
    return sorted(lines)


def same(got, wanted, what):
    got, wanted = manifest(got), manifest(wanted)
    expect(wanted, f"{what}: nothing to compare with")
    differ = sorted(set(got) ^ set(wanted))
    expect(not differ, lambda: f"{what}: {len(differ)} lines differ, such as {differ[:3]}")


def ssh_command(lab):
    return f"ssh -i {lab.dir}/home/alice/key -o UserKnownHostsFile={lab.dir}/known_hosts -o HostKeyAlias=ssh.lab.test"


@test("rsync, over ssh and with its own protocol: a tree there and, changed, back", seconds=120)
def rsync(lab):
    needs("rsync")
    home, source, back = f"{lab.dir}/home/alice", f"{lab.dir}/www/tree", f"{lab.dir}/www/back"
    tree(source)
    shutil.copytree(source, back, symlinks=True)
    with open(f"{lab.dir}/rsyncd.conf", "w", encoding="utf-8") as file:
        file.write(f"use chroot = no\nmunge symlinks = no\nuid = root\ngid = root\nread only = no\n[tree]\npath = {source}\n[back]\npath = {back}\n")
    ssh = ssh_command(lab)
    with serving(lab, 873, "rsync", "--daemon", "--no-detach", f"--config={lab.dir}/rsyncd.conf"):
        for mtu, (first, second) in each_mtu(lab):
            for prefix, *options in (f"root@{in_url(first)}:{lab.dir}/www", "-e", ssh), (f"rsync://{in_url(second)}",):
                what = f"mtu {mtu}, {prefix}"
                copy = f"{home}/copy"
                shutil.rmtree(copy, ignore_errors=True)
                lab.alice("rsync", "-a", *options, f"{prefix}/tree/", "copy/")
                same(copy, source, f"{what}: down")
                # rsync sends what differs: inside a large file, a new one, none of the removed
                fill(copy, {f"new-{mtu}": MIB}, what)
                with open(f"{copy}/large-0", "r+b") as file:
                    file.seek(MIB)
                    file.write(random.Random(what).randbytes(MIB))
                os.remove(f"{copy}/dir1/empty")
                lab.alice("rsync", "-ac", "--delete", *options, "copy/", f"{prefix}/back/")
                same(back, copy, f"{what}: up")


@test("iperf3, one stream and eight, down and up: no error, and what was sent arrives", seconds=120)
def iperf3(lab):
    needs("iperf3")
    with serving(lab, 5201, "iperf3", "-s"):
        for mtu, (first, second) in each_mtu(lab):
            for address, *options in (first,), (first, "-R"), (second, "-P", "8"), (second, "-P", "8", "-R"):
                what = f"mtu {mtu}, {address}, {' '.join(options)}"

                def attempt():
                    text = lab.alice("iperf3", "-J", "-c", address, "-n", str(128 * MIB), *options, check=False).stdout
                    # the server takes one client, and may not be done with the one before
                    return None if "the server is busy" in text else json.loads(text)

                result = until(20, attempt, f"{what}: the server stays busy")
                expect("error" not in result, f"{what}: {result.get('error')}")
                sent, received = result["end"]["sum_sent"]["bytes"], result["end"]["sum_received"]["bytes"]
                # iperf3 ends as soon as all is sent: what the sockets on the way still hold is not counted
                expect(128 * MIB <= sent and sent - 64 * MIB <= received <= sent, f"{what}: sent {sent}, received {received}")


@contextlib.contextmanager
def nginx(lab):
    root = f"{lab.dir}/www"
    numbers = random.Random(4)
    fill(f"{root}/page", {f"small-{number}": numbers.randrange(0, 30_000) for number in range(60)}, 5)
    fill(f"{root}/page", {f"large-{number}": numbers.randrange(MIB // 2, 2 * MIB) for number in range(8)}, 6)
    with open(f"{lab.dir}/nginx.conf", "w", encoding="utf-8") as file:
        file.write(f"""daemon off;
master_process off;
user root;
pid {lab.dir}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {lab.dir}/nginx-body;
  proxy_temp_path {lab.dir}/nginx-proxy;
  fastcgi_temp_path {lab.dir}/nginx-fastcgi;
  uwsgi_temp_path {lab.dir}/nginx-uwsgi;
  scgi_temp_path {lab.dir}/nginx-scgi;
  server {{
    listen [::]:8080 ipv6only=off;
    listen [::]:8443 ipv6only=off ssl http2;
    ssl_certificate {lab.dir}/web.pem;
    ssl_certificate_key {lab.dir}/web.key;
    root {root};
    autoindex on;
  }}
}}
""")
    with serving(lab, 8443, "nginx", "-c", f"{lab.dir}/nginx.conf"):
        yield root


@test("a page of a browser's: 100 connections at once, some kept, some closed, some cancelled; every object intact", seconds=120)
def page(lab):
    needs("nginx")
    with nginx(lab) as root:
        for mtu, addresses in each_mtu(lab):
            for address in addresses:
                done = lab.alice(PYTHON, f"{HERE}/page.py", address, "8080", root)
                expect(done.stdout.strip() == "413 objects, 25 cancelled", f"mtu {mtu}, {address}: {done.stdout}")


@test("curl over HTTP/2, 68 streams in one connection, and wget of a whole tree")
def http2(lab):
    needs("nginx")
    with nginx(lab) as root:
        for mtu, addresses in each_mtu(lab):
            for address in addresses:
                what = f"mtu {mtu}, {address}"
                name = "web6.lab.test" if ":" in address else "web.lab.test"
                got = f"{lab.dir}/home/alice/got"
                shutil.rmtree(got, ignore_errors=True)
                names = sorted(os.listdir(f"{root}/page"))
                versions = lab.alice(
                    "curl", "-sS", "--no-progress-meter", "--max-time", "50", "--http2", "-Z", "--parallel-max", "100", "--create-dirs",
                    "-w", "%{http_version}\\n", "-o", "got/#1", f"https://{name}:8443/page/{{{','.join(names)}}}",
                ).stdout.split()
                expect(versions == ["2"] * len(names), f"{what}: not HTTP/2: {versions}")
                same(got, f"{root}/page", f"{what}: curl")
                shutil.rmtree(got)
                lab.alice("wget", "-q", "-r", "-np", "-nH", "-R", "index.html*", "-P", "got", f"http://{in_url(address)}:8080/page/")
                same(f"{got}/page", f"{root}/page", f"{what}: wget")


@test("git over ssh: clone, push, and another clone with the same history")
def git_ssh(lab):
    settings = {
        "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@lab.test", "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@lab.test", "GIT_SSH_COMMAND": ssh_command(lab),
    }

    def git(*args):
        return lab.alice("git", *args, env=settings).stdout.strip()

    for mtu, (address, _) in each_mtu(lab):
        path = f"{lab.dir}/www/{mtu}.git"
        lab.net("git", "init", "-q", "--bare", "-b", "main", path, env=settings)
        one, two, url = f"one-{mtu}", f"two-{mtu}", f"ssh://root@{in_url(address)}{path}"
        git("init", "-q", "-b", "main", one)
        fill(f"{lab.dir}/home/alice/{one}", {"big": 3 * MIB, "small": 10}, url)
        git("-C", one, "add", ".")
        git("-C", one, "commit", "-qm", "files")
        git("-C", one, "push", "-q", url, "main")
        git("clone", "-q", url, two)
        git("-C", two, "fsck", "--no-progress")
        expect(git("-C", one, "rev-parse", "HEAD") == git("-C", two, "rev-parse", "HEAD"), f"{url}: another history")


@test("a connection of messages both ways, some large, some after a pause, as a web socket has them")
def messages(lab):
    with serving(lab, 7001, PYTHON, f"{HERE}/messages.py"):
        for mtu, addresses in each_mtu(lab):
            for address in addresses:
                done = lab.alice(PYTHON, f"{HERE}/messages.py", address)
                expect(done.stdout.strip() == "300 messages each way", f"mtu {mtu}, {address}: {done.stdout}")
