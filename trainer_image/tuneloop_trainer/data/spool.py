"""Keeps records on disk between reading and tokenising, so that memory does not grow with the data.

SQLite, because what has to be asked of all rows (which are new, which documents are held out, how large a class is) are its
questions. It is one process's scratch: without journal, lock or fsync, and gone when prepare ends.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path

from tuneloop_trainer.chat import turns_of
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.splits import boundary, place

CACHE_KIB = 32 << 10
WRITE_EVERY = 1_000
_TABLES = """
CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE records (id INTEGER PRIMARY KEY, source INTEGER, place BLOB, key BLOB, dropped INTEGER DEFAULT 0, record TEXT);
CREATE INDEX places ON records (place) WHERE dropped = 0;
"""
_values = attrgetter(*(field.name for field in fields(Record)))


class Spool:
    """Records in the order in which they were added, of one source after the other."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The tokenizer's trainer reads in a thread of its own, while nobody else does.
        where = f"file:{folder / 'records.sqlite'}?nolock=1"
        self._database = sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{CACHE_KIB}", "temp_store=FILE"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(_TABLES)
        self._seed = seed
        self._held = b""
        self._waiting: list[tuple[int, bytes, bytes, str]] = []

    def close(self) -> None:
        self._database.close()

    def is_new(self, record: Record) -> bool:
        """Whether no equal record was asked about before."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (record.key[:16],)).rowcount == 1

    def add(self, source: int, record: Record) -> None:
        self._waiting.append((source, place(record.document, self._seed), record.key[:8], written(record)))
        if len(self._waiting) >= WRITE_EVERY:
            self._write()

    def drop(self, ids: Iterable[int]) -> int:
        """Take records out by their numbers, from 1 in the order of adding. Returns how many there were."""
        self._write()
        return sum(self._database.execute("UPDATE records SET dropped = 1 WHERE id = ? AND dropped = 0", (id_,)).rowcount for id_ in ids)

    def hold_out(self, fraction: float, most: int) -> None:
        """Set whole documents aside for validation: about `fraction` of the rows, at most `most` of them."""
        self._write()
        total = self._count("1")
        counts = self._database.execute("SELECT place, count(*) FROM records WHERE dropped = 0 GROUP BY place ORDER BY place")
        self._held = boundary(counts, min(fraction * total, most)) if fraction > 0 else b""

    def held(self) -> list[Record]:
        """The records set aside, in the order of adding."""
        query = "SELECT record FROM records WHERE dropped = 0 AND place <= ? ORDER BY id"
        return [read_record(text) for (text,) in self._database.execute(query, (self._held,))]

    def train(self, source: int) -> Rows:
        """The records of a source that are neither dropped nor set aside."""
        return Rows(self, source)

    def numbered(self, where: str, arguments: Sequence[object]) -> Iterator[tuple[int, Record]]:
        self._write()
        query = f"SELECT id, record FROM records WHERE dropped = 0 AND place > ? AND {where} ORDER BY id"
        for id_, text in self._database.execute(query, (self._held, *arguments)):
            yield id_, read_record(text)

    def count(self, where: str, arguments: Sequence[object]) -> int:
        self._write()
        return self._count(f"place > ? AND {where}", (self._held, *arguments))

    def everything(self) -> Iterator[tuple[int, Record]]:
        """All training records with their numbers."""
        return self.numbered("1", ())

    def _count(self, where: str, arguments: Sequence[object] = ()) -> int:
        return int(self._database.execute(f"SELECT count(*) FROM records WHERE dropped = 0 AND {where}", arguments).fetchone()[0])

    def _write(self) -> None:
        if self._waiting:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT INTO records (source, place, key, record) VALUES (?, ?, ?, ?)", self._waiting)
            self._database.execute("COMMIT")
            self._waiting.clear()


class Rows:
    """One source's training records: may be walked any number of times, and knows its length."""

    def __init__(self, spool: Spool, source: int) -> None:
        self._spool, self._source = spool, source

    def __len__(self) -> int:
        return self._spool.count("source = ?", (self._source,))

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self._spool.numbered("source = ?", (self._source,)))


def written(record: Record) -> str:
    return json.dumps(_values(record), ensure_ascii=False)


def read_record(text: str) -> Record:
    record = Record(*json.loads(text))
    return record if record.history is None else replace(record, history=turns_of(record.history))


def order_key(record: Record, seed: int) -> bytes:
    """A place in a seeded order that depends on the record alone."""
    return hashlib.sha256(seed.to_bytes(8, "big") + record.key).digest()[:8]
