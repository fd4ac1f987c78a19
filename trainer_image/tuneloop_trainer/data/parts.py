"""What one of several pods made of its share of the rows, as files: its records with what was found out of each alone, and its counts."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import pyarrow as pa
from pydantic import ValidationError

from tuneloop_trainer.contract import Model
from tuneloop_trainer.data.curation import Judged
from tuneloop_trainer.data.filters import Filters
from tuneloop_trainer.data.records import Drops, RowReader
from tuneloop_trainer.data.spool import read_record, written
from tuneloop_trainer.errors import Mismatch

COUNTS = "part.json"
SCHEMA = pa.schema([("record", pa.string()), ("rule", pa.string()), ("signature", pa.binary())])


class ReadSource(Model):
    """What a pod found out of a source: of all its rows their number and the digest, of its own those that it dropped."""

    rows: int
    digest: str
    revision: str | None = None
    dropped: dict[str, int]
    first: str = ""
    first_row: int = 0

    @classmethod
    def of(cls, reader: RowReader) -> ReadSource:
        reading, drops = reader.reading, reader.drops
        told = {"dropped": dict(drops.counts), "first": drops.first, "first_row": drops.first_row}
        return cls(rows=reader.rows, digest=reading.digest, revision=reading.revision, **told)


class Counts(Model):
    """What a part says beside its records."""

    sources: tuple[ReadSource | None, ...]
    """None: another pod reads it alone."""
    suites: dict[str, str]
    """Digests of what evaluation items were read from."""
    drops: dict[str, int]
    details: dict[str, dict[str, int]]
    tools: tuple[str, ...]

    @classmethod
    def of(cls, sources: Sequence[ReadSource | None], suites: dict[str, str], filters: Filters) -> Counts:
        details = {name: dict(found) for name, found in filters.details.items()}
        return cls(sources=tuple(sources), suites=suites, drops=dict(filters.drops), details=details, tools=tuple(filters.tools))


def write_source(folder: Path, source: int, batches: Iterable[list[Judged]]) -> None:
    """The records of one source, in the order of its rows, a bounded batch at a time."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(_path(folder, source)), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA, options=options) as writer:
        for batch in batches:
            columns = {
                "record": [written(one.record) for one in batch],
                "rule": [one.rule for one in batch],
                "signature": [one.signature for one in batch],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))


def write_counts(folder: Path, counts: Counts) -> None:
    (folder / COUNTS).write_text(counts.model_dump_json())


def read_counts(folder: Path) -> Counts:
    """Raises Mismatch."""
    try:
        return Counts.model_validate_json((folder / COUNTS).read_bytes())
    except (OSError, ValidationError) as error:
        raise Mismatch(f"{folder.name} has no counts that can be read.") from error


def merged(folders: Iterable[Path], source: int) -> Iterator[Judged]:
    """A source's records out of all parts, in the order of its rows; of each part one batch is in memory."""
    parts = [_read(_path(folder, source)) for folder in folders if _path(folder, source).exists()]
    return heapq.merge(*parts, key=attrgetter("record.row"))


def drops_of(parts: Iterable[ReadSource]) -> Drops:
    """The drops of all pods, and the first of them."""
    known = list(parts)
    first = min((part for part in known if part.first), key=lambda part: part.first_row, default=None)
    counts: Counter[str] = Counter()
    for part in known:
        counts.update(part.dropped)
    return Drops(counts, first.first, first.first_row) if first is not None else Drops(counts)


def _read(path: Path) -> Iterator[Judged]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as opened:
        for batch in opened:
            for row in batch.to_pylist():
                yield Judged(read_record(row["record"]), row["rule"], row["signature"])


def _path(folder: Path, source: int) -> Path:
    return folder / f"source-{source:02}.arrow"
