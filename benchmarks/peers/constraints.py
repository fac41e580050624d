"""The pinned versions of peers, read from constraints.txt."""

from __future__ import annotations

from peers.base import CONSTRAINTS


def pinned(package: str) -> str:
    """`package==version`."""
    for line in CONSTRAINTS.read_text().splitlines():
        if line.partition("==")[0] == package:
            return line.strip()
    raise LookupError(f"{CONSTRAINTS.name} does not pin {package}")
