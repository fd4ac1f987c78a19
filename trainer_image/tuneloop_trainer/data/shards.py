"""Tokenised rows in Arrow files, written once by prepare and memory-mapped by train."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

ROWS_PER_SHARD = 100_000
BATCH = 1_000
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("doc_id", pa.string()),
        ("length", pa.int32()),
        ("prompt_length", pa.int32()),
        ("seq_lengths", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row to train on; labels are -100 where there is no loss. `sequences` are the lengths of what is packed into it."""

    input_ids: list[int]
    labels: list[int]
    document: str
    prompt_length: int
    sequences: tuple[int, ...] = ()

    @property
    def supervised(self) -> int:
        """Tokens with loss. The first token is never predicted."""
        return sum(label >= 0 for label in self.labels[1:])


def write_shards(folder: Path, name: str, rows: Iterable[TokenRow]) -> str:
    """Write `<name>-00000.arrow` and so on. Returns the sha256 over the rows' ordered input_ids and labels."""
    digest = hashlib.sha256()
    iterator = iter(rows)
    for shard in range(10_000):
        part = list(islice(iterator, ROWS_PER_SHARD))
        if not part and shard:
            break
        with pa.OSFile(str(folder / f"{name}-{shard:05}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for start in range(0, len(part), BATCH):
                chunk = part[start : start + BATCH]
                for row in chunk:
                    digest.update(array("i", row.input_ids))
                    digest.update(array("i", row.labels))
                writer.write_batch(_batch(chunk))
    return digest.hexdigest()


def _batch(rows: Sequence[TokenRow]) -> pa.RecordBatch:
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "doc_id": [row.document for row in rows],
        "length": [len(row.input_ids) for row in rows],
        "prompt_length": [row.prompt_length for row in rows],
        "seq_lengths": [row.sequences or (len(row.input_ids),) for row in rows],
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
        yield TokenRow(row["input_ids"], row["labels"], row["doc_id"], row["prompt_length"], tuple(row["seq_lengths"]))
