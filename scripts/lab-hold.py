"""What a Type=notify service has of systemd, without systemd: a start that waits, and a store for descriptors (sd_notify(3),
sd_pid_notify_with_fds(3), sd_listen_fds(3)).

    lab-hold.py start SOCKET LOG SECONDS CMD...  starts CMD, prints its process number once it said READY=1; fails when it ends before
    lab-hold.py end SOCKET                       the service is stopped for good: lets go of what it stored

The first start makes a process that stays until `end`, whatever becomes of the service, and hands what the last one stored to the next.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
import traceback

# FileDescriptorStoreMax= of the unit; more are refused.
STORE = 16
# By this name `proxyctl rescue` tells that the process is ours.
NAME = "proxyvpn-hold"


def listener(path, kind):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(path)
    return made


class Holder:
    def __init__(self, path):
        self.path = path
        self.notify = listener(path, socket.SOCK_DGRAM)
        os.chmod(path, 0o666)
        self.control = listener(f"{path}.control", socket.SOCK_SEQPACKET)
        self.control.listen()
        self.stored = []  # name, descriptor, whether it goes when its other end does (FDPOLL)
        self.pid, self.process = None, None
        self.caller, self.deadline = None, None

    def run(self):
        while True:
            left = None if self.caller is None else max(0, self.deadline - time.monotonic()) * 1000
            events = dict(self.poll().poll(left))
            if self.notify.fileno() in events:
                self.told(*socket.recv_fds(self.notify, 4096, STORE, socket.MSG_CMSG_CLOEXEC)[:2])
            if self.process in events:
                self.ended()
            self.keep(lambda _, fd: not events.get(fd, 0) & (select.POLLHUP | select.POLLERR))
            if self.caller and time.monotonic() >= self.deadline:
                os.kill(self.pid, signal.SIGKILL)
                self.answer("said no READY=1 in time")
            if self.control.fileno() in events:
                caller = self.control.accept()[0]
                request = json.loads(caller.recv(1 << 16) or "null")
                if not request:
                    self.keep(lambda *_: False)
                    return
                self.start(caller, **request)

    def poll(self):
        poll = select.poll()
        for fd in self.notify.fileno(), self.control.fileno(), self.process:
            if fd is not None:
                poll.register(fd, select.POLLIN)
        for _, fd, watched in self.stored:
            if watched:
                poll.register(fd, 0)
        return poll

    def start(self, caller, seconds, log, command):
        # one that was just killed may still be about to end
        if self.process is not None and select.select([self.process], [], [], 2)[0]:
            self.ended()
        self.caller, self.deadline = caller, time.monotonic() + seconds
        if self.process is not None:
            self.answer("the service runs already")
            return
        self.pid = os.fork()
        if not self.pid:
            try:
                self.become(log, command)
            finally:
                os._exit(127)
        self.process = os.pidfd_open(self.pid)

    def become(self, log, command):
        """In the child: the service, with what is stored from descriptor 3 on."""
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        fds = [os.open(os.devnull, os.O_RDONLY), out, out, *(fd for _, fd, _ in self.stored)]
        # out of each other's way first
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3 + STORE) for fd in fds]
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        env = {**os.environ, "NOTIFY_SOCKET": self.path, "FDSTORE": str(STORE)}
        if self.stored:
            names = ":".join(name for name, _, _ in self.stored)
            env |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(self.stored)), "LISTEN_FDNAMES": names}
        os.execvpe(command[0], command, env)

    def told(self, text, fds):
        lines = dict(line.partition("=")[::2] for line in text.decode(errors="replace").splitlines())
        if "FDSTOREREMOVE" in lines:
            self.keep(lambda name, _: name != lines.get("FDNAME"))
        if "FDSTORE" in lines:
            room = STORE - len(self.stored)
            self.stored += [(lines.get("FDNAME", "stored"), fd, lines.get("FDPOLL") != "0") for fd in fds[:room]]
            fds = fds[room:]
        for fd in fds:  # that of BARRIER=1 among them: closed, it says that all before it was seen to
            os.close(fd)
        if "READY" in lines and self.caller:
            self.answer(None)

    def keep(self, wanted):
        for name, fd, _ in self.stored:
            if not wanted(name, fd):
                os.close(fd)
        self.stored = [entry for entry in self.stored if wanted(*entry[:2])]

    def ended(self):
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.process)
        self.process = None
        if self.caller:
            self.answer(f"ended with status {status} before it was ready")

    def answer(self, error):
        with contextlib.suppress(BrokenPipeError), self.caller:
            self.caller.send(json.dumps({"pid": self.pid, "error": error}).encode())
        self.caller = None


def hold(path, log, ready):
    """The process that stays: nobody's child, with nothing open of whoever started it."""
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as comm:
            comm.write(NAME)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for fd in 1, 2:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), fd)
        os.closerange(3, ready)
        os.closerange(ready + 1, os.sysconf("SC_OPEN_MAX"))
        holder = Holder(path)
        os.close(ready)
        holder.run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def ask(path, request):
    """One order; its answer, or nothing when the holder has ended."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        control.connect(f"{path}.control")
        control.send(json.dumps(request).encode())
        return json.loads(control.recv(4096) or "null")


def main():
    verb, path = sys.argv[1:3]
    if verb == "end":
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            ask(path, None)
        return None
    request = {"log": sys.argv[3], "seconds": float(sys.argv[4]), "command": sys.argv[5:]}
    try:
        answer = ask(path, request)
    except (FileNotFoundError, ConnectionRefusedError):
        waiting, ready = os.pipe()
        child = os.fork()
        if not child:
            os.close(waiting)
            hold(path, request["log"], ready)
        os.close(ready)
        os.waitpid(child, 0)
        os.read(waiting, 1)  # its end: the sockets listen
        answer = ask(path, request)
    if answer["error"]:
        return answer["error"]
    print(answer["pid"])
    return None


sys.exit(main())
