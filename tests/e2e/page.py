"""A browser's load on a page: page.py ADDRESS PORT ROOT, where the server gives the files in ROOT/page by plain HTTP.

100 connections are open at once. A half of them stays and fetches one object after the other, a quarter is closed by the server after each
object, and a quarter is cancelled in the middle of a large object (RST) and then tried anew. Every object must equal its file; prints the
number of objects and of cancelled fetches.
"""

import asyncio
import os
import socket
import struct
import sys

ADDRESS, PORT, ROOT = sys.argv[1], int(sys.argv[2]), sys.argv[3]
CONNECTIONS = 100
NAMES = sorted(os.listdir(f"{ROOT}/page"))
SMALL = [name for name in NAMES if name.startswith("small")]
LARGE = [name for name in NAMES if name.startswith("large")]


def connect():
    return asyncio.open_connection(ADDRESS, PORT)


def content(name):
    with open(f"{ROOT}/page/{name}", "rb") as file:
        return file.read()


async def ask(connection, name, keep):
    """Sends a request; returns the length of the answer's body."""
    reader, writer = connection
    writer.write(f"GET /page/{name} HTTP/1.1\r\nHost: page.test\r\nConnection: {'keep-alive' if keep else 'close'}\r\n\r\n".encode())
    status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    assert status.split()[1] == "200", status
    return next(int(field.split(":")[1]) for field in fields if field.startswith("content-length:"))


async def fetch(connection, name, keep):
    length = await ask(connection, name, keep)
    body = await connection[0].readexactly(length)
    assert body == content(name), f"{name} is not what the server has"
    if not keep:
        assert await connection[0].read() == b"", f"{name}: bytes after the end"
        connection[1].close()
    return 1


async def cancel(connection, name):
    """Takes the beginning, and resets the connection while the rest is on its way."""
    length = await ask(connection, name, True)
    begin = await connection[0].readexactly(10_000)
    assert length > len(begin) and content(name).startswith(begin), f"{name} does not begin as the server's"
    connection[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection[1].transport.abort()


async def work(number, connection):
    """What one of the connections is for; the number of objects that it got."""
    small = [SMALL[(number + turn) % len(SMALL)] for turn in range(6)]
    large = LARGE[number % len(LARGE)]
    if number % 4 == 2:
        await fetch(connection, large, False)
        for name in small[:2]:
            await fetch(await connect(), name, False)
        return 3
    if number % 4 == 3:
        await cancel(connection, large)
        return await fetch(await connect(), small[0], False)
    got = 0
    for name in [*small, large] if number % 8 == 0 else small:
        got += await fetch(connection, name, True)
    connection[1].close()
    return got


async def main():
    connections = await asyncio.gather(*(connect() for _ in range(CONNECTIONS)))
    got = await asyncio.gather(*(work(number, connection) for number, connection in enumerate(connections)))
    print(sum(got), "objects,", CONNECTIONS // 4, "cancelled")


asyncio.run(main())
