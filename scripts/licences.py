"""Checks every dependency against [licenses] allow and [sources] of deny.toml, for machines without cargo-deny.

Reads `cargo metadata --format-version 1` on stdin; the argument is deny.toml. Prints what is not allowed; status 1 then.
"""

import json
import re
import sys

text = open(sys.argv[1], encoding="utf-8").read()
allowed = set(re.findall(r'"([^"]+)"', re.search(r"^allow = \[(.*?)\]", text, re.M | re.S).group(1)))


def holds(expression):
    """Is an SPDX expression satisfied by the allowed licences? AND binds tighter than OR; '/' is the old OR."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))

    def either():
        result = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            result = both() or result
        return result

    def both():
        result = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            result = one() and result
        return result

    def one():
        token = tokens.pop(0)
        if token == "(":
            result = either()
            tokens.pop(0)
            return result
        if tokens[:1] == ["WITH"]:
            tokens.pop(0)
            token += " WITH " + tokens.pop(0)
        return token in allowed

    return either()


bad, packages = [], json.load(sys.stdin)["packages"]
for package in packages:
    name = f"{package['name']} {package['version']}"
    if not package.get("license") or not holds(package["license"]):
        bad.append(f"{name}: licence {package.get('license')!r} is not allowed")
    source = package["source"] or ""
    if source and source != "registry+https://github.com/rust-lang/crates.io-index":
        bad.append(f"{name}: comes from {source}")
print("\n".join(bad) or f"{len(packages)} packages, every licence and source allowed")
sys.exit(bool(bad))
