"""The daemon's part of starting QEMU: start_qemu.py ROOT [kvm]. ROOT is the root folder of the machine whose launcher is asked, in the
network namespace of this process. Prints the launcher's first reply, then keeps QEMU until it is ended or standard input is closed.
The guest is a kernel of a few instructions, by the Multiboot specification: it writes a line to the first serial port, and halts."""
import fcntl
import json
import os
import select
import socket
import struct
import sys
import tempfile

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def guest(text):
    base, header, room = 0x100000, 32, 24
    # mov dx, 0x3f8; mov esi, text; again: lodsb; test al, al; jz end; out dx, al; jmp again; end: cli; hlt
    code = b"\xba\xf8\x03\0\0\xbe" + struct.pack("<I", base + header + room) + b"\xac\x84\xc0\x74\x03\xee\xeb\xf8\xfa\xf4"
    code = code.ljust(room, b"\x90") + text + b"\0"
    end, magic, flags = base + header + len(code), 0x1BADB002, 0x10000
    return struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFFFFFF, base, base, end, end, base + header) + code


def opened(folder, name, content, flags, mode):
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        os.fchmod(file.fileno(), mode)
        if isinstance(content, int):
            file.truncate(content)
        else:
            file.write(content)
    return os.open(path, flags)


def main(root, accelerator="tcg"):
    tap = os.open(f"{root}/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"torvm-test", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    qmp, channel = socket.socketpair(), socket.socketpair()
    config = os.memfd_create("config")
    os.write(config, b"{}")
    with tempfile.TemporaryDirectory() as folder:
        fds = [tap, link[1].fileno(), qmp[1].fileno(), channel[1].fileno(),
               opened(folder, "kernel", guest(b"hello from the guest\n"), os.O_RDONLY, 0o644),
               opened(folder, "initramfs", bytes(4096), os.O_RDONLY, 0o644),
               opened(folder, "state", 64 << 20, os.O_RDWR, 0o600), config]
    launcher = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher.settimeout(30)
    launcher.connect(f"{root}/run/proxyvpn-qemu.sock")
    socket.send_fds(launcher, [json.dumps({"accelerator": accelerator, "memory-mib": 128}).encode()], fds)
    print(launcher.recv(4096).decode(), flush=True)
    ready, _, _ = select.select([launcher, sys.stdin], [], [])
    if launcher in ready:
        print(launcher.recv(4096).decode(), flush=True)


main(*sys.argv[1:])
