"""Finds near duplicates by MinHash (Broder 1997) and locality-sensitive hashing, in memory of 16 bytes a row.

Signatures (`datasketch`, 128 permutations over runs of 3 words) go to a file; the bands of 8 are then sorted one at a time,
and neighbours with an equal band are compared. `datasketch`'s own index would hold some 8 KB a row. A pair of Jaccard
similarity 0.8 meets in one of the 16 bands with probability 0.95, one of 0.9 with 0.9999, one of 0.5 with 0.06; a pair that
meets is near where at least 0.8 of the signatures agree (standard error 0.035). Near rows are linked, and of what hangs together
the first is kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tuneloop_trainer.data.contamination import SHINGLE, runs, words

THRESHOLD = 0.8
PERMUTATIONS, BAND = 128, 8
CHUNK = 1 << 16
_MIX = np.random.default_rng(7).integers(1, 2**63, BAND, dtype=np.uint64) | np.uint64(1)


def signatures(texts: Sequence[str]) -> list[bytes]:
    """Of each text the MinHash."""
    from datasketch import MinHash

    if not texts:
        return []
    shingles = [[" ".join(run).encode() for run in runs(words(text), SHINGLE)] for text in texts]
    made = MinHash.generator(shingles, num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
    return [signature.digest().astype(np.uint32).tobytes() for signature in made]


class NearDuplicates:
    """Takes the texts' signatures in order, then says which of the texts are near an earlier one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "signatures.u32"
        self._file = self._path.open("wb")
        self._rows = 0

    def add(self, signatures: Sequence[bytes]) -> None:
        self._file.writelines(signatures)
        self._rows += len(signatures)

    def close(self) -> None:
        self._file.close()

    def later(self) -> Iterator[int]:
        """The numbers, from 1, of the texts to drop."""
        self._file.close()
        if self._rows < 2:
            return
        signatures = np.memmap(self._path, np.uint32, "r", shape=(self._rows, PERMUTATIONS))
        first = np.arange(self._rows, dtype=np.int64)
        for start in range(0, PERMUTATIONS, BAND):
            for one, other in self._near_pairs(signatures, start):
                _link(first, one, other)
        yield from (row + 1 for row in range(self._rows) if _first(first, row) != row)

    def _near_pairs(self, signatures: npt.NDArray[np.uint32], start: int) -> Iterator[tuple[int, int]]:
        """Pairs that share the band and are near: each row with the one before it among its equals, and with their first."""
        keys = np.empty(self._rows, dtype=np.uint64)
        for row in range(0, self._rows, CHUNK):
            band = signatures[row : row + CHUNK, start : start + BAND].astype(np.uint64)
            keys[row : row + CHUNK] = (band * _MIX).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        follows = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
        if not len(follows):
            return
        starts = np.zeros(self._rows, dtype=bool)
        starts[follows] = True
        heads = np.maximum.accumulate(np.where(starts, 0, np.arange(self._rows)))
        for lot in range(0, len(follows), CHUNK // 16):
            places = follows[lot : lot + CHUNK // 16]
            later = signatures[order[places]]
            for earlier in (order[places - 1], order[heads[places]]):
                near = (later == signatures[earlier]).mean(axis=1) >= THRESHOLD
                yield from zip(earlier[near].tolist(), order[places][near].tolist(), strict=True)


def _first(first: npt.NDArray[np.int64], row: int) -> int:
    while first[row] != row:
        first[row] = first[first[row]]
        row = int(first[row])
    return row


def _link(first: npt.NDArray[np.int64], one: int, other: int) -> None:
    one, other = _first(first, one), _first(first, other)
    first[max(one, other)] = min(one, other)
