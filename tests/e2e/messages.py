"""A long connection of messages: messages.py serves on port 7001; messages.py ADDRESS is its client.

Both sides send at the same time and as they please: messages of 1 byte to 200 KB, now and then after a pause. Each one has its length in
front, and the contents follow from one number that both know, so that a lost, doubled or changed byte is seen where it happens.
"""

import random
import socket
import sys
import threading
import time

PORT, COUNT = 7001, 300


def contents(seed):
    numbers = random.Random(seed)
    for _ in range(COUNT):
        yield numbers.randbytes(numbers.choice([1, 100, 1400, 5_000, 200_000]))


def send(stream, seed):
    for number, message in enumerate(contents(seed)):
        stream.sendall(len(message).to_bytes(4, "big") + message)
        if number % 50 == 49:
            time.sleep(0.1)


def exactly(stream, length):
    data = bytearray()
    while len(data) < length:
        piece = stream.recv(length - len(data))
        if not piece:
            raise EOFError(f"{len(data)} of {length} bytes, then the end")
        data += piece
    return bytes(data)


def receive(stream, seed):
    for number, message in enumerate(contents(seed)):
        length = int.from_bytes(exactly(stream, 4), "big")
        if length != len(message) or exactly(stream, length) != message:
            raise ValueError(f"message {number} is not what was sent")


def talk(stream, mine, theirs):
    with stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sending = threading.Thread(target=send, args=(stream, mine), daemon=True)
        sending.start()
        receive(stream, theirs)
        sending.join()


if len(sys.argv) == 1:
    with socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        while True:
            talk(listener.accept()[0], "server", "client")
else:
    talk(socket.create_connection((sys.argv[1], PORT), 20), "client", "server")
    print(COUNT, "messages each way")
