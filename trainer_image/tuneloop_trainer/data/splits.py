"""Holds out whole documents for validation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence


def held_out_documents(documents: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The documents to hold out: in the order of a seeded hash, as many as come to `fraction` of the rows, at least one
    and never all. The hash makes a document's place independent of the others, so added rows move few."""
    if fraction <= 0:
        return set()
    rows = Counter(documents)
    ordered = sorted(rows, key=lambda document: hashlib.sha256(f"{seed}\0{document}".encode()).digest())
    held: set[str] = set()
    count = 0
    for document in ordered[:-1]:
        if held and count + rows[document] > fraction * len(documents):
            break
        held.add(document)
        count += rows[document]
    return held
