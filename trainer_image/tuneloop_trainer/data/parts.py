"""What one of several pods made of its share of the rows, as files: its records with what was found out of each alone, their tokens where
these depend on no other row, and its counts."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from tuneloop_trainer.contract import Model, Reason
from tuneloop_trainer.data.curation import Judged
from tuneloop_trainer.data.filters import Filters
from tuneloop_trainer.data.parallel import InOrder
from tuneloop_trainer.data.records import Drops, Record, RowReader
from tuneloop_trainer.data.shards import Task, TokenRow
from tuneloop_trainer.data.spool import read_record, written
from tuneloop_trainer.errors import Invalid, Mismatch, Unavailable
from tuneloop_trainer.objectives.objective import Tokens

COUNTS = "part.json"
RECORDS = pa.schema([("record", pa.string()), ("rule", pa.string()), ("signature", pa.binary())])
TOKENS = pa.schema([("row", pa.int64()), ("tokens", pa.string())])
BATCH_ROWS, BATCH_CHARACTERS = 512, 1 << 20
"""Of each part one batch is in memory while they are joined."""


@dataclass(frozen=True)
class Tokenizer:
    """How a pod tokenises its rows before it is known which of them are kept."""

    tokens: Callable[[Record], Tokens]
    processes: int
    revision: str | None
    """Commit of the base whose tokenizer it is, or the digest of its files on a claim."""


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
    base: str | None
    """Commit of the base whose tokenizer made the tokens."""

    @classmethod
    def of(cls, sources: Sequence[ReadSource | None], suites: dict[str, str], filters: Filters, base: str | None) -> Counts:
        details = {name: dict(found) for name, found in filters.details.items()}
        told = {"drops": dict(filters.drops), "details": details, "tools": tuple(filters.tools)}
        return cls(sources=tuple(sources), suites=suites, base=base, **told)


def write_source(folder: Path, source: int, batches: Iterable[list[Judged]], tokenizer: Tokenizer | None) -> None:
    """The records of one source in the order of its rows, and their tokens."""
    judged = chain.from_iterable(batches)
    if tokenizer is None:
        made: Iterable[tuple[Judged, str | None]] = ((one, None) for one in judged)
    else:
        made = InOrder(partial(_tokens_of, tokenizer.tokens), attrgetter("record.size"), tokenizer.processes).results(judged)
    with _writer(_path(folder, source, "records"), RECORDS) as add_record, _writer(_path(folder, source, "tokens"), TOKENS) as add_tokens:
        for one, tokens in made:
            record = written(one.record)
            add_record((record, one.rule, one.signature), len(record))
            add_tokens((one.record.row, tokens), len(tokens or ""))


_row_values = attrgetter(*(field.name for field in fields(TokenRow)))
_task_values = attrgetter(*(field.name for field in fields(Task)))


def _values(row: TokenRow) -> list[Any]:
    """For JSON; `dataclasses.astuple` would copy each token."""
    return [_task_values(value) if isinstance(value, Task) else value for value in _row_values(row)]


def _tokens_of(make: Callable[[Record], Tokens], judged: Judged) -> str | None:
    """As text, made in the process that tokenises. None for a row that will not be trained on, or cannot be: what is wrong with it counts
    only where it is kept, and is told then."""
    if judged.rule is not None:
        return None
    try:
        tokens = make(judged.record)
    except Invalid:
        return None
    return json.dumps([tokens.whole, [_values(row) for row in tokens.rows]], ensure_ascii=False, separators=(",", ":"))


@contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[tuple[Any, ...], int], None]]:  # Any: a column of the schema each
    """Takes rows with the characters that they count, and writes them in bounded batches."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    waiting: list[tuple[Any, ...]] = []
    size = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema, options=options) as writer:

        def flush() -> None:
            nonlocal size
            columns = [pa.array(column, field.type) for column, field in zip(zip(*waiting, strict=True), schema, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            waiting.clear()
            size = 0

        def add(row: tuple[Any, ...], characters: int) -> None:
            nonlocal size
            waiting.append(row)
            size += characters
            if len(waiting) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
                flush()

        yield add
        if waiting:
            flush()


def write_counts(folder: Path, counts: Counts) -> None:
    (folder / COUNTS).write_text(counts.model_dump_json())


def read_counts(folder: Path) -> Counts:
    """Raises Mismatch."""
    try:
        return Counts.model_validate_json((folder / COUNTS).read_bytes())
    except (OSError, ValidationError) as error:
        raise Mismatch(f"{folder.name} has no counts that can be read.") from error


def merged(folders: Iterable[Path], source: int) -> Iterator[Judged]:
    """A source's records out of all parts, in the order of its rows."""
    parts = (_read(_path(folder, source, "records")) for folder in folders)
    judged = (map(_judged, part) for part in parts)
    return heapq.merge(*judged, key=attrgetter("record.row"))


def with_tokens(
    records: Iterable[Record], folders: Iterable[Path], source: int, make: Callable[[Record], Tokens]
) -> Iterator[tuple[Record, Tokens]]:
    """The records of a source that are trained on, in the order of its rows, with the tokens that the parts have of them."""
    known = heapq.merge(*(_read(_path(folder, source, "tokens")) for folder in folders), key=itemgetter("row"))
    for record in records:
        text = next(row["tokens"] for row in known if row["row"] == record.row)
        yield record, _tokens(text) if text is not None else make(record)


def drops_of(parts: Iterable[ReadSource]) -> Drops:
    """The drops of all pods, and the first of them."""
    known = list(parts)
    first = min((part for part in known if part.first), key=lambda part: part.first_row, default=None)
    counts: Counter[str] = Counter()
    for part in known:
        counts.update(part.dropped)
    return Drops(counts, first.first, first.first_row) if first is not None else Drops(counts)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Raises Unavailable where a part went away after it was verified: its rows would be missing."""
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as opened:
            for batch in opened:
                yield from batch.to_pylist()
    except FileNotFoundError as error:
        raise Unavailable("A part of the rows is gone; it is made again.", Reason.STORE_UNAVAILABLE) from error


def _judged(row: dict[str, Any]) -> Judged:
    return Judged(read_record(row["record"]), row["rule"], row["signature"])


def _tokens(text: str) -> Tokens:
    whole, rows = json.loads(text)
    return Tokens([_token_row(*row) for row in rows], whole)


def _token_row(ids: list[int], labels: list[int], document: str, prompt: int, sequences: list[int], *more: Any) -> TokenRow:
    rejected, target, task, generated = more
    return TokenRow(ids, labels, document, prompt, tuple(sequences), rejected, target, Task(*task) if task is not None else None, generated)


def _path(folder: Path, source: int, what: str) -> Path:
    return folder / f"{what}-{source:02}.arrow"
