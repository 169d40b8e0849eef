#!/usr/bin/env python3
"""cpio.py FOLDER: writes the folder as a cpio archive (newc, as the kernel reads it: Documentation/driver-api/early-userspace/buffer-format)
to stdout. The same content gives the same bytes on every machine: sorted names, root as owner, times 0, and of the modes only whether a file
may be executed."""

import os
import stat
import sys


def entry(inode, name, mode, data=b""):
    """One member; `name` without a leading slash."""
    raw = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + raw
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def archive(members):
    """`members`: (name, mode, data), folders before what is in them."""
    parts = [entry(inode, *member) for inode, member in enumerate(members, 1)]
    whole = b"".join(parts) + entry(0, "TRAILER!!!", 0)
    return whole + bytes(-len(whole) % 512)


def members(root):
    """What is below `root`, sorted by its bytes."""
    found = []
    for folder, folders, files in os.walk(root):
        found += [os.path.relpath(os.path.join(folder, name), root) for name in folders + files]
    for name in sorted(found, key=os.fsencode):
        path = os.path.join(root, name)
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            yield name, stat.S_IFLNK | 0o777, os.fsencode(os.readlink(path))
        elif stat.S_ISDIR(mode):
            yield name, stat.S_IFDIR | 0o755, b""
        elif stat.S_ISREG(mode):
            with open(path, "rb") as file:
                yield name, stat.S_IFREG | (0o755 if mode & 0o100 else 0o644), file.read()
        else:
            raise SystemExit(f"cpio.py: {path} is neither file, folder nor link")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.stdout.buffer.write(archive(members(sys.argv[1])))
