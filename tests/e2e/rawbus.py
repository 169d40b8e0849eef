"""A D-Bus client without a library, for what libraries refuse to send: rawbus.py CASE.

long N     Connect with a profile name of N bytes; prints the reply
vanish     Connect to the profile "slow" and leave at once
linger     the same, but leave half a second later, without having read a reply
flood N    N Status calls at once, then leave
awake      as root: take logind's name and say that the machine woke up
"""

import os
import socket
import struct
import sys
import time


def align(data, to):
    return data + b"\0" * (-len(data) % to)


def text(value):
    raw = value.encode()
    return struct.pack("<I", len(raw)) + raw + b"\0"


def field(code, signature, value):
    data = struct.pack("<B", code) + struct.pack("<B", len(signature)) + signature.encode() + b"\0"
    # a string, path or signature; these start where four bytes begin, a signature anywhere
    if signature == "g":
        return data + struct.pack("<B", len(value)) + value.encode() + b"\0"
    return align(data, 4) + text(value)


def call(serial, destination, path, interface, member, signature="", body=b""):
    return message(1, serial, [(1, "o", path), (6, "s", destination), (2, "s", interface), (3, "s", member)], signature, body)


def message(kind, serial, entries, signature, body):
    fields = b""
    if signature:
        entries.append((8, "g", signature))
    for entry in entries:
        fields = align(fields, 8) + field(*entry)
    header = b"l" + bytes([kind, 0, 1]) + struct.pack("<III", len(body), serial, len(fields)) + fields
    return align(header, 8) + body


def connect(name):
    body = align(text(name), 4) + struct.pack("<I", 0)  # an empty a{sv}
    body = align(body, 8)
    return call(2, "org.proxyvpn1", "/org/proxyvpn1", "org.proxyvpn1.Manager", "Connect", "sa{sv}", body)


def read_message(bus):
    def exactly(length):
        data = b""
        while len(data) < length:
            piece = bus.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    fixed = exactly(16)
    body, _, fields = struct.unpack("<III", fixed[4:])
    rest = exactly(fields + (-fields % 8) + body)
    return fixed[1], rest


def main():
    bus = socket.socket(socket.AF_UNIX)
    bus.connect("/run/dbus/system_bus_socket")
    bus.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
    if not bus.recv(1000).startswith(b"OK"):
        sys.exit("not let in")
    bus.sendall(b"BEGIN\r\n")
    bus.sendall(call(1, "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello"))
    read_message(bus)
    case = sys.argv[1]
    try:
        if case == "long":
            bus.sendall(connect("a" * int(sys.argv[2])))
        elif case == "vanish":
            bus.sendall(connect("slow"))
            return
        elif case == "linger":
            bus.sendall(connect("slow"))
            time.sleep(0.5)
            return
        elif case == "flood":
            for serial in range(2, 2 + int(sys.argv[2])):
                bus.sendall(call(serial, "org.proxyvpn1", "/org/proxyvpn1", "org.proxyvpn1.Manager", "Status"))
            return
        elif case == "awake":
            name = align(text("org.freedesktop.login1"), 4) + struct.pack("<I", 0)
            bus.sendall(call(2, "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su", name))
            while (got := read_message(bus))[0] not in (2, 3):
                pass
            if got[0] == 3:
                sys.exit("the name of logind is not to be had")
            entries = [(1, "o", "/org/freedesktop/login1"), (2, "s", "org.freedesktop.login1.Manager"), (3, "s", "PrepareForSleep")]
            bus.sendall(message(4, 3, entries, "b", struct.pack("<I", 0)))
            time.sleep(0.5)
            return
        while True:
            kind, rest = read_message(bus)
            if kind in (2, 3):
                print("error" if kind == 3 else "reply", rest.replace(b"\0", b" ").decode(errors="replace"))
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        print("the bus closed the connection")


main()
