"""A private Tor network in the network namespace that this runs in: three directory authorities that are exits too, two relays, an obfs4
bridge and an onion service in front of WEB. Their addresses are on `lo`, public ones in different /16s, so that clients need no exceptions.

    tornet.py CACHE DIR LOGS WEB RESOLVER   runs it in DIR until it is killed; ends at once when it cannot

Keys are made once and kept in CACHE, with what the authorities know about the relays: so the next start takes seconds. When clients can
use the network, DIR/network.json tells what they need:

    authorities  lines of DirAuthority (tor(1)); clients also need TestingTorNetwork 1
    exits, relays, bridge   addresses; relays without the exits
    bridge_line, plain_bridge_line   for Bridge (tor(1)): by obfs4 and without a transport
    onion        name of the service, which listens on port 80
"""

import calendar
import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

Node = namedtuple("Node", "name address authority exit bridge")
NODES = [
    *(Node(f"exit{number}", f"{10 + number}.0.0.1", True, True, False) for number in (1, 2, 3)),
    *(Node(f"relay{number}", f"{13 + number}.0.0.1", False, False, False) for number in (1, 2)),
    Node("bridge", "16.0.0.1", False, False, True),
]
ORPORT, DIRPORT, OBFS4PORT = 9001, 9030, 9002
PUBLIC = [node for node in NODES if not node.bridge]
# Certificates of the authorities are made for a year.
KEYS_LAST = 300 * 86400
# none of the files that the distribution has
TOR = ["tor", "--defaults-torrc", "/nonexistent", "--ignore-missing-torrc", "--quiet"]
START_SECONDS = 90
# Of the service's descriptors: two periods (of 24 voting intervals), two replicas, each at four or five of the five directories.
UPLOADS = 8

COMMON = """
TestingTorNetwork 1
SocksPort 0
SafeLogging 0
ShutdownWaitLength 0
NumCPUs 1
PathsNeededToBuildCircuits 0.25
"""
RELAY = """
AssumeReachable 1
ContactInfo nobody@lab.test
IPv6Exit 0
ServerDNSDetectHijacking 0
ServerDNSTestAddresses
ServerDNSAllowNonRFC953Hostnames 1
ServerDNSRandomizeCase 0
"""
# Every relay gets every flag. The first interval is as long as the others: onion services and their clients reckon with it, and one that
# knows the first consensus alone would look for another descriptor. Five relays are too few for second guards (vanguards).
AUTHORITY = """
AuthoritativeDirectory 1
V3AuthoritativeDirectory 1
TestingV3AuthInitialVotingInterval 10
TestingV3AuthInitialVoteDelay 2
TestingV3AuthInitialDistDelay 2
V3AuthVotingInterval 10
V3AuthVoteDelay 2
V3AuthDistDelay 2
V3AuthNIntervalsValid 10
TestingAuthDirTimeToLearnReachability 0
TestingDirAuthVoteGuard *
TestingDirAuthVoteHSDir *
TestingMinExitFlagThreshold 0
TestingMinFastFlagThreshold 0
ConsensusParams vanguards-lite-enabled=0
"""
BRIDGE = f"""
BridgeRelay 1
BridgeDistribution none
PublishServerDescriptor 0
ExtORPort auto
ServerTransportPlugin obfs4 exec /usr/bin/obfs4proxy
ServerTransportListenAddr obfs4 {{address}}:{OBFS4PORT}
"""
# One hop to its relays, which is enough here.
ONION = """
HiddenServiceSingleHopMode 1
HiddenServiceNonAnonymousMode 1
HiddenServiceDir {directory}/service
HiddenServicePort 80 {web}:80
"""


def make_keys(cache):
    """Keys and fingerprints of all nodes; keys.json is only there when they are whole."""
    os.makedirs(cache, mode=0o700, exist_ok=True)
    lock = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_keys_alone(cache)
    finally:
        os.close(lock)


def make_keys_alone(cache):
    if os.path.exists(f"{cache}/keys.json") and time.time() - os.path.getmtime(f"{cache}/keys.json") < KEYS_LAST:
        return
    for name in os.listdir(cache):
        path = f"{cache}/{name}"
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    certificates = []
    for node in NODES:
        os.makedirs(f"{cache}/{node.name}/keys", mode=0o700)
        if node.authority:
            keys = f"{cache}/{node.name}/keys/authority"
            command = ["tor-gencert", "--create-identity-key", "--passphrase-fd", "0", "-m", "12", "-a", f"{node.address}:{DIRPORT}",
                       "-i", f"{keys}_identity_key", "-s", f"{keys}_signing_key", "-c", f"{keys}_certificate"]
            certificates.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            certificates[-1].stdin.write(b"passphrase\n")
            certificates[-1].stdin.close()
    if any(process.wait() for process in certificates):
        sys.exit("tor-gencert failed")
    fingerprints = {node.name: fingerprint(cache, node) for node in NODES}
    with open(f"{cache}/keys.json", "w", encoding="ascii") as file:
        json.dump(fingerprints, file)


def fingerprint(cache, node):
    """Makes the relay's keys, too."""
    nobody = "F" * 40
    command = [*TOR, "-f", "/nonexistent", "--list-fingerprint", "--DataDirectory", f"{cache}/{node.name}", "--ORPort", "1", "--Nickname", node.name,
               "--Address", node.address, "--DirAuthority", f"nobody orport=1 v3ident={nobody} 127.0.0.1:1 {nobody}"]
    done = subprocess.run(command, capture_output=True, text=True)
    line = re.search(rf"^{node.name} ([0-9A-F ]+)$", done.stdout, re.MULTILINE)
    return line[1].replace(" ", "") if line else sys.exit(f"tor --list-fingerprint: {done.stdout}{done.stderr}")


def authority_lines(cache, fingerprints):
    lines = []
    for node in NODES:
        if node.authority:
            with open(f"{cache}/{node.name}/keys/authority_certificate", encoding="ascii") as file:
                identity = re.search(r"^fingerprint ([0-9A-F]{40})$", file.read(), re.MULTILINE)[1]
            lines.append(f"{node.name} orport={ORPORT} no-v2 v3ident={identity} {node.address}:{DIRPORT} {fingerprints[node.name]}")
    return lines


class Network:
    def __init__(self, cache, directory, logs, web, resolver):
        self.cache, self.directory, self.logs, self.web = cache, directory, logs, web
        os.makedirs(directory, exist_ok=True)
        make_keys(cache)
        with open(f"{cache}/keys.json", encoding="ascii") as file:
            self.fingerprints = json.load(file)
        self.authorities = authority_lines(cache, self.fingerprints)
        with open(f"{directory}/resolv.conf", "w", encoding="ascii") as file:
            file.write(f"nameserver {resolver}\n")
        self.processes, self.started = {}, 0

    def torrc(self, node):
        lines = [
            COMMON, RELAY, *(f"DirAuthority {line}" for line in self.authorities), f"Nickname {node.name}", f"Address {node.address}",
            f"OutboundBindAddress {node.address}", f"ORPort {node.address}:{ORPORT} IPv4Only", f"ServerDNSResolvConfFile {self.directory}/resolv.conf",
        ]
        if node.exit:
            lines += ["ExitRelay 1", "ExitPolicy accept *:*", "ExitPolicyRejectPrivate 0"]
        else:
            lines += ["ExitRelay 0", "ExitPolicy reject *:*"]
        if node.authority:
            lines += [f"DirPort {node.address}:{DIRPORT} IPv4Only", AUTHORITY]
        if node.bridge:
            lines.append(BRIDGE.format(address=node.address))
        return lines

    def start(self):
        self.started = time.time()
        for node in NODES:
            subprocess.run(["ip", "addr", "replace", f"{node.address}/32", "dev", "lo"], check=True)
            data = f"{self.directory}/{node.name}"
            os.makedirs(data, mode=0o700)
            for kept in *glob.glob(f"{self.cache}/{node.name}/cached-*"), f"{self.cache}/{node.name}/keys", f"{self.cache}/{node.name}/pt_state":
                if os.path.isdir(kept):
                    shutil.copytree(kept, f"{data}/{os.path.basename(kept)}")
                elif os.path.exists(kept):
                    shutil.copy2(kept, data)
            self.run(node.name, self.torrc(node))

    def start_onion(self):
        os.makedirs(f"{self.directory}/onion", mode=0o700)
        onion = ONION.format(directory=f"{self.directory}/onion", web=self.web)
        self.run("onion", [COMMON, *(f"DirAuthority {line}" for line in self.authorities), onion])

    def run(self, name, torrc):
        data = f"{self.directory}/{name}"
        with open(f"{data}/torrc", "w", encoding="ascii") as file:
            file.write("\n".join([*torrc, f"DataDirectory {data}", f"Log notice [rend]info file {self.log(name)}", ""]))
        command = ["setpriv", "--pdeathsig", "KILL", *TOR, "-f", f"{data}/torrc"]
        self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def ready(self):
        """Goes on with the start: have the authorities agreed, in this run, on all relays, and are bridge and onion service in the network?"""
        for node in NODES:
            if node.authority and not self.agreed(node):
                return False
        # Not before: with the consensus that was kept the service would be in the periods of that time, and in today's after minutes.
        if "onion" not in self.processes:
            self.start_onion()
        # A client that asks too early is told that there is no such service, and does not ask again for minutes.
        return self.said("bridge", "Bootstrapped 100%") and self.said("onion", "descriptor: finished with status 200") >= UPLOADS and self.bridge_line()

    def agreed(self, node):
        path = f"{self.directory}/{node.name}/cached-microdesc-consensus"
        with contextlib.suppress(FileNotFoundError):
            with open(path, encoding="ascii") as file:
                consensus = file.read()
            since = re.search(r"^valid-after (.*)$", consensus, re.MULTILINE)
            if since and calendar.timegm(time.strptime(since[1], "%Y-%m-%d %H:%M:%S")) > self.started:
                flags = re.findall(r"^s (.*)$", consensus, re.MULTILINE)
                exits = [each for each in flags if " Exit " in f" {each} "]
                return len([each for each in flags if " Running " in f" {each} "]) == len(PUBLIC) and len(exits) == 3
        return False

    def said(self, name, text):
        """How often it is in the log."""
        with contextlib.suppress(FileNotFoundError):
            with open(self.log(name), encoding="utf-8") as file:
                return file.read().count(text)
        return 0

    def log(self, name):
        return f"{self.logs}/tor-{name}.log"

    def bridge_line(self):
        bridge = next(node for node in NODES if node.bridge)
        with contextlib.suppress(FileNotFoundError):
            with open(f"{self.directory}/bridge/pt_state/obfs4_bridgeline.txt", encoding="ascii") as file:
                arguments = re.search(r"^Bridge obfs4 .*(cert=\S+ iat-mode=\d)", file.read(), re.MULTILINE)
            if arguments:
                return f"obfs4 {bridge.address}:{OBFS4PORT} {self.fingerprints['bridge']} {arguments[1]}"
        return None

    def facts(self):
        with open(f"{self.directory}/onion/service/hostname", encoding="ascii") as file:
            onion = file.read().strip()
        bridge = next(node for node in NODES if node.bridge)
        return {
            "authorities": self.authorities, "exits": [node.address for node in NODES if node.exit],
            "relays": [node.address for node in PUBLIC if not node.exit], "bridge": bridge.address, "bridge_line": self.bridge_line(),
            "plain_bridge_line": f"{bridge.address}:{ORPORT} {self.fingerprints['bridge']}", "onion": onion,
        }

    def keep(self):
        """For the next start."""
        for node in NODES:
            for path in *glob.glob(f"{self.directory}/{node.name}/cached-*"), f"{self.directory}/{node.name}/pt_state":
                kept = f"{self.cache}/{node.name}/{os.path.basename(path)}"
                if os.path.isdir(path):
                    shutil.copytree(path, kept, dirs_exist_ok=True)
                elif os.path.exists(path):
                    shutil.copy2(path, kept)

    def failure(self):
        for name, process in self.processes.items():
            if process.poll() is not None:
                return f"tor of {name} ended with {process.returncode}: see {self.log(name)}"
        return None


def main():
    network = Network(*sys.argv[1:6])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    network.start()
    end = time.monotonic() + START_SECONDS
    while not network.ready():
        if why := network.failure():
            sys.exit(why)
        if time.monotonic() > end:
            sys.exit(f"no consensus after {START_SECONDS} s: see {network.log('*')}")
        time.sleep(0.1)
    network.keep()
    with open(f"{network.directory}/network.json.new", "w", encoding="ascii") as file:
        json.dump(network.facts(), file, indent=1)
    os.rename(f"{network.directory}/network.json.new", f"{network.directory}/network.json")
    while not (why := network.failure()):
        time.sleep(1)
    sys.exit(why)


if __name__ == "__main__":
    main()
