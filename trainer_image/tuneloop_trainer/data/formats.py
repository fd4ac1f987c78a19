"""Reads rows out of one file: JSON lines, CSV, Parquet and Arrow, plain or compressed, a bounded piece at a time."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tuneloop_trainer.contract import Reason
from tuneloop_trainer.errors import Invalid

Values = dict[str, object] | str
"""A row's columns, or why it has none."""
PASSED_OVER = "it is another pod's"
MAX_LINE_BYTES = 1 << 20
MAX_BYTES = 64 << 30
MAX_EXPANSION = 200
"""Real text packs to a tenth; a file that unfolds to more than this times its size is taken for a decompression bomb."""
EXPANSION_FREE_BYTES = 64 << 20
BATCH_BYTES, BATCH_ROWS = 4 << 20, 1024
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".arrow")
COMPRESSIONS = ("", ".gz", ".zst")
_NOT_A_NUMBER = ("nan", "NaN")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Share:
    """Which rows of a source a pod takes, of several that prepare one set: each reads all bytes, and takes every `of`-th row."""

    number: int = 0
    of: int = 1

    def takes(self, row: int) -> bool:
        return row % self.of == self.number


ALONE = Share()


@dataclass
class Intake:
    """What has been read of a source: counted against the limits, and hashed."""

    uri: str
    share: Share = ALONE
    size: int = 0
    rows: int = 0
    """Rows that were counted so far."""
    has_begun: bool = False
    """Whether a row with columns was seen: all pods look at the first one, so that all read the source in the same way."""
    hash: Any = field(default_factory=hashlib.sha256)  # Any: hashlib's own type is private

    def take(self, content: bytes) -> None:
        self.hash.update(content)
        self.size += len(content)
        if self.size > MAX_BYTES * self.share.of:
            raise too_large(self.uri, self.share)

    def wants(self, row: int) -> bool:
        return not self.has_begun or self.share.takes(row)


def too_large(uri: str, share: Share) -> Invalid:
    return Invalid(f"Dataset {uri} is larger than {MAX_BYTES * share.of >> 30} GiB. Split it, take a sample, or raise data.workers.")


def format_of(name: str) -> tuple[str, str] | None:
    """(format, compression) by the file's name; None where it is of no known one."""
    for compression in COMPRESSIONS:
        stem = name.lower().removesuffix(compression)
        if compression and stem == name.lower():
            continue
        found = next((suffix for suffix in SUFFIXES if stem.endswith(suffix)), None)
        if found is not None and not (compression and found in (".parquet", ".arrow")):
            return found, compression
    return None


def read_file(path: Path, intake: Intake) -> Iterator[Values]:
    """The file's rows in order. Raises Invalid for what is no file of its format, too large, or cannot be opened."""
    suffix, compression = format_of(path.name) or ("", "")
    try:
        if suffix in _BINARY:
            yield from _BINARY[suffix](path, intake)
            return
        with path.open("rb") as raw:
            yield from _TEXT[suffix](_decompressed(raw, compression, intake.uri), intake)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Invalid(f"Dataset {intake.uri}: {path.name} is damaged or is not compressed as its name says.") from error
    except OSError as error:
        if error.errno is None:  # Arrow's own, from the zstd stream
            raise Invalid(f"Dataset {intake.uri}: {path.name} is damaged or is not compressed as its name says.") from error
        raise Invalid(f"Dataset {intake.uri} cannot be read: {error.strerror}.", Reason.ACCESS_DENIED) from error


def read_json_lines(stream: IO[bytes], intake: Intake) -> Iterator[Values]:
    for line in _lines(stream, intake):
        if line.strip():
            yield _json_row(line) if intake.wants(intake.rows + 1) else PASSED_OVER


def read_csv(stream: IO[bytes], intake: Intake) -> Iterator[Values]:
    """Rows under the header of the first line. What other programs write for a missing number (`nan`) is no text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    text = (line.decode() for line in _lines(stream, intake))
    number = 1
    try:
        for values in csv.DictReader(text, strict=True):
            number += 1
            if None in values:
                yield "it has more fields than the header"
            else:
                yield {key: None if value in _NOT_A_NUMBER else value for key, value in values.items() if value is not None}
    except UnicodeDecodeError as error:
        raise Invalid(f"Dataset {intake.uri} is not UTF-8 after row {number - 1}. Convert it to UTF-8.") from error
    except csv.Error as error:
        raise Invalid(f"Dataset {intake.uri} is not CSV after row {number - 1}: {error}.") from error


def _json_row(line: bytes) -> Values:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 (byte {error.start + 1})"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(values, dict):
        return "it is not a JSON object"
    return "it has half of a surrogate pair, which is no character" if _has_lone_surrogate(text, values) else values


def _has_lone_surrogate(text: str, values: dict[str, object]) -> bool:
    """JSON may escape what UTF-8 cannot hold, and no tokenizer takes."""
    if "\\ud" not in text and "\\uD" not in text:
        return False
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _decompressed(raw: IO[bytes], compression: str, uri: str) -> IO[bytes]:
    if not compression:
        return raw
    if compression == ".gz":
        return io.BufferedReader(_Expanding(gzip.GzipFile(fileobj=raw), raw, uri))
    import pyarrow

    return io.BufferedReader(_Expanding(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"), raw, uri))


class _Expanding(io.RawIOBase):
    """A decompressed stream that ends where it unfolds to far more than was read."""

    def __init__(self, source: Any, raw: IO[bytes], uri: str) -> None:  # Any: a GzipFile or Arrow's untyped stream
        self._source, self._raw, self._uri, self._out = source, raw, uri, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # Any: whatever the reader above has as a buffer
        content: bytes = self._source.read(len(buffer))
        self._out += len(content)
        if self._out > EXPANSION_FREE_BYTES and self._out > MAX_EXPANSION * self._raw.tell():
            raise Invalid(
                f"Dataset {self._uri} unfolds to more than {MAX_EXPANSION} times its size: a decompression bomb. Nothing is read."
            )
        buffer[: len(content)] = content
        return len(content)


def _lines(stream: IO[bytes], intake: Intake) -> Iterator[bytes]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise Invalid(
                f"Dataset {intake.uri}, line {number}: longer than {MAX_LINE_BYTES} bytes. Split the row, or write one row on each line."
            )
        if number == 1:
            _refuse_utf16(line, intake.uri)
        intake.take(line)
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _refuse_utf16(line: bytes, uri: str) -> None:
    if line.startswith(_UTF16) or (b"\0" in line[:4] and line[:4].strip(b"\0")):
        raise Invalid(f"Dataset {uri} is in UTF-16 or UTF-32. Convert it to UTF-8, for example with `iconv -f UTF-16 -t UTF-8`.")


def _take_file(path: Path, intake: Intake) -> None:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            intake.take(chunk)


def _parquet(path: Path, intake: Intake) -> Iterator[Values]:
    import pyarrow
    import pyarrow.parquet

    _take_file(path, intake)
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
            unfolded = sum(group.total_byte_size for group in groups)
            _refuse_bomb(unfolded, path, intake.uri)
            mean = unfolded / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1.0, mean)))), use_threads=False):
                yield from _wanted(batch, intake)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Invalid(f"Dataset {intake.uri} is not Parquet: {_short(error)}.") from error


def _arrow(path: Path, intake: Intake) -> Iterator[Values]:
    """An IPC file, or an IPC stream (as `datasets` saves)."""
    import pyarrow

    _take_file(path, intake)
    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches)) if is_file else iter(opened)
            for batch in batches:
                _refuse_bomb(batch.nbytes, path, intake.uri)
                step = max(1, min(BATCH_ROWS, BATCH_BYTES * max(1, batch.num_rows) // max(1, batch.nbytes)))
                for start in range(0, batch.num_rows, step):
                    yield from _wanted(batch.slice(start, step), intake)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Invalid(f"Dataset {intake.uri} is not Arrow: {_short(error)}.") from error


def _wanted(batch: Any, intake: Intake) -> Iterator[Values]:  # Any: Arrow is untyped
    """The batch's rows; those that are passed over are not made into Python's objects."""
    wanted = [intake.wants(intake.rows + 1 + place) for place in range(batch.num_rows)]
    if not all(wanted):
        import pyarrow

        batch = batch.take(pyarrow.array([place for place, is_wanted in enumerate(wanted) if is_wanted], pyarrow.int64()))
    made = iter(batch.to_pylist())
    yield from (next(made) if is_wanted else PASSED_OVER for is_wanted in wanted)


def _refuse_bomb(unfolded: int, path: Path, uri: str) -> None:
    if unfolded > EXPANSION_FREE_BYTES and unfolded > MAX_EXPANSION * path.stat().st_size:
        raise Invalid(f"Dataset {uri} unfolds to more than {MAX_EXPANSION} times its size: a decompression bomb. Nothing is read.")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


_TEXT: dict[str, Callable[[IO[bytes], Intake], Iterator[Values]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
}
_BINARY: dict[str, Callable[[Path, Intake], Iterator[Values]]] = {".parquet": _parquet, ".arrow": _arrow}
