"""Starts a Type=notify service without systemd: lab-start.py SOCKET LOG SECONDS CMD...

Prints its process number once it said READY=1; fails when it ends before or takes longer.
"""

import os
import socket
import subprocess
import sys
import time

path, log, seconds, command = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:]
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind(path)
os.chmod(path, 0o666)
with open(log, "ab") as out:
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        env={**os.environ, "NOTIFY_SOCKET": path},
    )
deadline = time.monotonic() + seconds
listener.settimeout(0.05)
while time.monotonic() < deadline:
    if child.poll() is not None:
        sys.exit(f"ended with status {child.returncode} before it was ready")
    try:
        if b"READY=1" in listener.recv(4096).splitlines():
            print(child.pid)
            # leave without waiting: the service goes on
            sys.stdout.flush()
            os._exit(0)
    except TimeoutError:
        continue
child.kill()
sys.exit("said no READY=1 in time")
