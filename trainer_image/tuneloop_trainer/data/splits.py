"""Holds out whole documents for validation, by the order of a seeded hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def place(document: str, seed: int) -> bytes:
    """The document's place in the order. The hash makes it independent of the others, so added rows move few."""
    return hashlib.sha256(f"{seed}\0{document}".encode()).digest()[:16]


def boundary(counts: Iterable[tuple[bytes, int]], rows: float) -> bytes:
    """The place of the last document to hold out: of the first ones in order, as many as come to that many rows, at least
    one and never all. `counts` are the places in order, each with its document's rows. Empty: none is held out."""
    held, last, before = 0, b"", None
    for here, count in counts:
        if before is not None:  # so that the last document is never taken
            if last and held + before[1] > rows:
                break
            last, held = before[0], held + before[1]
        before = (here, count)
    return last
