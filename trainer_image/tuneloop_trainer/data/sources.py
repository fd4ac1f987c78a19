"""Reads the rows of a source: a file, a folder of files, or a gateway's export. Everything read is bounded and hashed."""

from __future__ import annotations

import csv
import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, Any

from tuneloop_trainer.contract import DataSource, FeedbackExport, Reason
from tuneloop_trainer.errors import Invalid, StageError

MAX_LINE_BYTES = 1 << 20
MAX_ROWS = 1_000_000
MAX_BYTES = 1 << 30
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
HTTP_TIMEOUT_SECONDS = 30.0
HTTP_ATTEMPTS = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number in the source, from 1, and its columns. `values` is None where it could not be parsed."""

    number: int
    values: dict[str, object] | None
    problem: str = ""


@dataclass
class Reading:
    """A source while it is read: iterate over `rows()` once, then `digest` is the sha256 of all bytes read."""

    source: DataSource
    _hash: Any = field(default_factory=hashlib.sha256)  # Any: hashlib's own type is private
    _bytes: int = 0

    @property
    def digest(self) -> str:
        return str(self._hash.hexdigest())

    def rows(self) -> Iterator[Row]:
        number = 0
        for values in self._values():
            number += 1
            if number > MAX_ROWS:
                raise Invalid(f"Dataset {self.source.uri} has more than {MAX_ROWS} rows. Split it, or take a sample.")
            yield Row(number, values) if isinstance(values, dict) else Row(number, None, values)
        if number == 0:
            raise Invalid(f"Dataset {self.source.uri} is empty: it has no rows.", Reason.DATA_EMPTY)

    def _values(self) -> Iterator[dict[str, object] | str]:
        if self.source.feedback is not None:
            with _open_export(self.source.feedback, self.source.uri) as response:
                yield from self._json_lines(response)
                if response.length:
                    raise StageError(f"The export {self.source.uri} broke off {response.length} bytes before its end.")
            return
        for path in _files(Path(self.source.path or ""), self.source.uri):
            try:
                if path.suffix == ".parquet":
                    yield from self._parquet(path)
                    continue
                with path.open("rb") as file:
                    yield from self._csv(file) if path.suffix == ".csv" else self._json_lines(file)
            except OSError as error:
                raise Invalid(f"Dataset {self.source.uri} cannot be read: {error.strerror}.", Reason.ACCESS_DENIED) from error

    def _lines(self, stream: IO[bytes]) -> Iterator[bytes]:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise Invalid(f"Dataset {self.source.uri}, line {number}: longer than {MAX_LINE_BYTES} bytes.")
            self._count(line)
            yield line

    def _count(self, content: bytes) -> None:
        self._hash.update(content)
        self._bytes += len(content)
        if self._bytes > MAX_BYTES:
            raise Invalid(f"Dataset {self.source.uri} is larger than {MAX_BYTES >> 20} MiB. Split it, or take a sample.")

    def _json_lines(self, stream: IO[bytes]) -> Iterator[dict[str, object] | str]:
        for line in self._lines(stream):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                yield "it is not JSON"
                continue
            yield values if isinstance(values, dict) else "it is not a JSON object"

    def _csv(self, stream: IO[bytes]) -> Iterator[dict[str, object] | str]:
        csv.field_size_limit(MAX_LINE_BYTES)
        text = (line.decode("utf-8-sig" if index == 0 else "utf-8") for index, line in enumerate(self._lines(stream)))
        try:
            for values in csv.DictReader(text, strict=True):
                extra = None in values
                yield "it has more fields than the header" if extra else {key: value for key, value in values.items() if value is not None}
        except UnicodeDecodeError as error:
            raise Invalid(f"Dataset {self.source.uri} is not UTF-8.") from error
        except csv.Error as error:
            raise Invalid(f"Dataset {self.source.uri} is not CSV: {error}.") from error

    def _parquet(self, path: Path) -> Iterator[dict[str, object] | str]:
        import pyarrow
        import pyarrow.parquet

        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                self._count(chunk)
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise Invalid(f"Dataset {self.source.uri} is not Parquet: {error}.") from error


def _files(path: Path, uri: str) -> list[Path]:
    """The file itself, or a folder's files of a known format in the order of their names."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise Invalid(f"Dataset {uri} is of no known format. Use a file that ends in {', '.join(SUFFIXES)}.")
        return [path]
    if not path.is_dir():
        raise Invalid(f"Dataset {uri} does not exist.")
    found = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.suffix in SUFFIXES)
    if not found:
        raise Invalid(f"Dataset {uri} is a folder without a file that ends in {', '.join(SUFFIXES)}.", Reason.DATA_EMPTY)
    return found


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to wherever it points."""

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:
        return None


def _open_export(export: FeedbackExport, uri: str) -> HTTPResponse:
    """The export's body as a stream. A gateway that is away for a moment is asked again."""
    token = Path(export.token_file).read_text().strip()
    separator = "&" if "?" in export.url else "?"
    request = urllib.request.Request(f"{export.url}{separator}split={export.split}", headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    for attempt in range(HTTP_ATTEMPTS):
        if attempt:
            time.sleep(min(2.0**attempt, 20.0))
        try:
            response = opener.open(request, timeout=HTTP_TIMEOUT_SECONDS)
            assert isinstance(response, HTTPResponse)
            return response
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                message = f"The gateway of {export.deployment} refuses the export {uri} ({error.code})."
                raise Invalid(message, Reason.ACCESS_DENIED) from None
            if error.code < 500:
                raise Invalid(f"The gateway of {export.deployment} has no export for {uri} ({error.code}).") from None
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            continue
    raise StageError(f"The gateway of {export.deployment} did not answer {HTTP_ATTEMPTS} times; its export {uri} is needed.")
