"""Runs probes inside a machine: agent.py WHERE, with one JSON order for each line of standard input and one JSON answer each.

fire     each probe so many rounds: how often it was tried, and what the kernel answered
stream   the same all the time at so many packets a second, in a process of its own, until `still`
old      opens what the probes old-* send on; port 7 of plan.SINK* must listen
inside   opens connections, and `talk` sends on them: through the tunnel, if there is one
standing joins the groups that a query asks for
beacon   one packet with the daemon's mark, which may always leave: without it at the far end, a silence means nothing
full_stop  a frame that ends what is to be judged: what was sent before it has been captured when it has
advertise  a router advertisement
"""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import struct
import sys
import time

import frames
import plan
import probes

OLD = {
    "old-tcp": (probes.V4, socket.SOCK_STREAM, plan.SINK4), "old-tcp6": (probes.V6, socket.SOCK_STREAM, plan.SINK6),
    "old-device": (probes.V4, socket.SOCK_STREAM, plan.SINK4), "old-listener": (probes.V4, socket.SOCK_STREAM, plan.SINK4),
    "old-udp": (probes.V4, socket.SOCK_DGRAM, plan.SINK4),
}


PR_SET_PDEATHSIG = 1


class Agent:
    def __init__(self, where):
        self.chosen = [one for one in probes.PROBES if one.where == where]
        self.sequence = itertools.count(1)
        self.old, self.listeners, self.standing, self.shots, self.within = {}, [], [], [], []
        self.child = None

    def one(self, probe, order):
        """Fires once; returns the name of the kernel's error, or ''."""
        shot = probes.Shot(probe.number, next(self.sequence), order)
        shot.keep = self.old.get(probe.name)
        self.shots.append(shot)
        user = order["users"][probe.user]
        os.seteuid(user)
        try:
            with shot.noting():
                probe.run(shot)
        finally:
            os.seteuid(0)
        return shot.errors[0] if shot.errors else ""

    def forget(self):
        for shot in self.shots:
            shot.close()
        self.shots.clear()

    def ready(self, names):
        return [one for one in self.chosen if one.name in names and (one.name not in OLD or one.name in self.old)]

    def fire(self, order):
        answer = {}
        for _ in range(order["rounds"]):
            self.forget()
            for probe in self.ready(order["probes"]):
                said = self.one(probe, order)
                counts = answer.setdefault(probe.name, {})
                counts[said] = counts.get(said, 0) + 1
        return answer

    def stream(self, order):
        reading, writing = os.pipe()
        self.child = os.fork(), reading
        if self.child[0]:
            os.close(writing)
            return {}
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        ready, counts, start = self.ready(order["probes"]), {}, time.monotonic()
        for number in itertools.count():
            if stop:
                break
            if number % 32 == 0:
                self.forget()
                time.sleep(max(0, start + number / order["rate"] - time.monotonic()))
            probe = ready[number % len(ready)]
            self.one(probe, order)
            counts[probe.name] = counts.get(probe.name, 0) + 1
        os.write(writing, json.dumps(counts).encode())
        os._exit(0)

    def still(self, _order):
        process, reading = self.child
        os.kill(process, signal.SIGTERM)
        with os.fdopen(reading, "rb") as pipe:
            counts = json.loads(pipe.read() or b"{}")
        os.waitpid(process, 0)
        self.child = None
        return counts

    def open_old(self, order):
        for one in [*self.old.values(), *self.listeners]:
            one.close()
        self.old.clear()
        self.listeners.clear()
        for name, (family, kind, address) in OLD.items():
            number, one = probes.by_name(name).number, socket.socket(family, kind)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.SOCK_STREAM:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if name == "old-device":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, order["uplinks"][0]["name"].encode())
            one.bind(("", plan.source_port(number, next(self.sequence))))
            one.settimeout(3)
            one.connect((address, 7))
            if name == "old-listener":
                self.listeners.append(listener := socket.socket(family, kind))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", one.getsockname()[1]))
                listener.listen()
            one.setblocking(False)
            self.old[name] = one
        return {}

    def inside(self, _order):
        for one in self.within:
            one.close()
        self.within = [socket.create_connection((address, 7), timeout=10) for address in (plan.SINK4, plan.SINK6)]
        return {}

    def talk(self, _order):
        said = {}
        for number, one in enumerate(self.within):
            try:
                one.send(frames.token(0xFFFF, next(self.sequence)))
                said[str(number)] = ""
            except OSError as error:
                said[str(number)] = str(error)
        return said

    def join(self, order):
        for one in self.standing:
            one.close()
        self.standing.clear()
        for link in order["uplinks"]:
            four, six = socket.socket(probes.V4, socket.SOCK_DGRAM), socket.socket(probes.V6, socket.SOCK_DGRAM)
            self.standing += [four, six]
            # a device that came back has lost them: joining anew is an error elsewhere
            with contextlib.suppress(OSError):
                group = struct.pack("4s4si", frames.address(plan.STANDING4), bytes(4), link["index"])
                four.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            with contextlib.suppress(OSError):
                group = struct.pack("16si", frames.address(plan.STANDING6), link["index"])
                six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
        return {}

    def beacon(self, order):
        for link in order["uplinks"]:
            with socket.socket(probes.V4, socket.SOCK_DGRAM) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, plan.MARK)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link["name"].encode())
                one.sendto(frames.token(0, next(self.sequence)), (plan.SINK4, plan.destination_port(0)))
        return {}

    def full_stop(self, order):
        shot = probes.Shot(0, 0, order)
        for link in order["uplinks"]:
            shot.frame(link, 0x88B5, order["text"].encode().ljust(46, b"\0"))
        shot.close()
        return {"failed": f"{order['do']}: {shot.errors[0]}"} if shot.errors else {}

    def advertise(self, order):
        shot = probes.Shot(0, 0, order)
        for link in order["uplinks"]:
            packet = frames.router_advertisement(link["mac"], link["router_local"], plan.ADVERTISED_NET, 1800)
            shot.frame(link, frames.IP6, packet, to="33:33:00:00:00:01")
        shot.close()
        return {"failed": f"{order['do']}: {shot.errors[0]}"} if shot.errors else {}


def main():
    agent = Agent(sys.argv[1])
    orders = {
        "fire": agent.fire, "stream": agent.stream, "still": agent.still, "old": agent.open_old, "standing": agent.join,
        "beacon": agent.beacon, "advertise": agent.advertise, "full_stop": agent.full_stop, "inside": agent.inside, "talk": agent.talk,
    }
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = orders[order["do"]](order)
        except OSError as error:
            answer = {"failed": f"{order['do']}: {error}"}
        print(json.dumps(answer), flush=True)
    if agent.child:
        os.kill(agent.child[0], signal.SIGKILL)


if __name__ == "__main__":
    main()
