"""Tokenised rows in Arrow files, written once by prepare and memory-mapped by train."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from tuneloop_trainer.chat import IGNORED

ROWS_PER_SHARD = 100_000
BATCH, BATCH_TOKENS = 1_000, 500_000
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("doc_id", pa.string()),
        ("length", pa.int32()),
        ("prompt_length", pa.int32()),
        ("seq_lengths", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("target", pa.int32()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("row", pa.int32()),
        ("system", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt as its author wrote it, the answer that the row has, and the row's number for messages."""

    prompt: str
    reference: str
    row: int
    system: str | None = None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row to train on; labels are -100 where there is no loss. `sequences` are the lengths of what is packed into it.

    `rejected` is another completion of the same prompt, `target` a class or a judgement of the whole row. `task` is what a completion
    that the model writes is judged by, `generated` how many tokens it may have."""

    input_ids: list[int]
    labels: list[int]
    document: str
    prompt_length: int
    sequences: tuple[int, ...] = ()
    rejected: list[int] | None = None
    target: int | None = None
    task: Task | None = None
    generated: int = 0

    @property
    def supervised(self) -> int:
        """Tokens with loss. The first token is never predicted; a row without labels is learned as a whole."""
        if not self.labels:
            return 1
        ignored = self.labels.count(IGNORED) - (self.labels[0] == IGNORED)
        return len(self.labels) - 1 - ignored

    @property
    def length(self) -> int:
        """Tokens that a step computes for the row: a preference goes through the model with either answer."""
        return len(self.input_ids) + self.generated + (0 if self.rejected is None else self.prompt_length + len(self.rejected))


def write_shards(folder: Path, name: str, rows: Iterable[TokenRow]) -> str:
    """Write `<name>-00000.arrow` and so on. Returns the sha256 over the rows' ordered tokens and labels."""
    digest = hashlib.sha256()
    batches = _batches(rows)
    ahead = next(batches, [])
    for shard in count():
        with pa.OSFile(str(folder / f"{name}-{shard:05}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            written = 0
            while ahead and written < ROWS_PER_SHARD:
                for row in ahead:
                    _hash(row, digest)
                writer.write_batch(_batch(ahead))
                written += len(ahead)
                ahead = next(batches, [])
        if not ahead:
            return digest.hexdigest()
    raise AssertionError  # for mypy: the loop has no end of its own


def _batches(rows: Iterable[TokenRow]) -> Iterator[list[TokenRow]]:
    """Bounded in rows and in tokens."""
    batch: list[TokenRow] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += row.length
        if len(batch) >= BATCH or tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _hash(row: TokenRow, digest: Any) -> None:  # Any: hashlib's own type is private
    digest.update(array("i", row.input_ids))
    digest.update(array("i", row.labels))
    for more in ([] if row.rejected is None else row.rejected, [] if row.target is None else [row.target]):
        digest.update(array("i", more))
    if row.task is not None:
        digest.update(f"{row.task.prompt}\0{row.task.reference}\0".encode())


def _batch(rows: Sequence[TokenRow]) -> pa.RecordBatch:
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "doc_id": [row.document for row in rows],
        "length": [row.length for row in rows],
        "prompt_length": [row.prompt_length for row in rows],
        "seq_lengths": [row.sequences or (len(row.input_ids),) for row in rows],
        "rejected_ids": [row.rejected for row in rows],
        "target": [row.target for row in rows],
        "prompt": [row.task and row.task.prompt for row in rows],
        "reference": [row.task and row.task.reference for row in rows],
        "row": [row.task and row.task.row for row in rows],
        "system": [row.task and row.task.system for row in rows],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def shard_files(folder: Path, name: str) -> list[str]:
    return sorted(str(path) for path in folder.glob(f"{name}-*.arrow"))


def read_table(folder: Path, name: str) -> pa.Table:
    """The rows as one table over memory-mapped files."""
    tables = []
    for path in shard_files(folder, name):
        with pa.memory_map(path) as source:
            tables.append(pa.ipc.open_stream(source).read_all())
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def read_rows(folder: Path, name: str) -> Iterator[TokenRow]:
    for row in read_table(folder, name).to_pylist():
        yield TokenRow(
            row["input_ids"],
            row["labels"],
            row["doc_id"],
            row["prompt_length"],
            tuple(row["seq_lengths"]),
            row["rejected_ids"],
            row["target"],
        )
