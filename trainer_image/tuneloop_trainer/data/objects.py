"""Rows in S3: an object, or those that lie directly below a prefix, in the order of their names.

An object counts as fetched where as many bytes came as it has, and it had the same ETag before and after: one that is written to
meanwhile is not read as a mixture.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from os import SEEK_END
from pathlib import Path
from typing import Any

from tuneloop_trainer.contract import Bucket, Reason
from tuneloop_trainer.data.fetching import Pace, RemoteFile, refuse_unknown_format
from tuneloop_trainer.data.formats import format_of
from tuneloop_trainer.errors import Invalid, Unavailable
from tuneloop_trainer.stores import buckets
from tuneloop_trainer.stores.credentials import read_key

TEXTS = (".jsonl", ".ndjson", ".csv")


class Objects:
    """The objects of one source."""

    def __init__(
        self, bucket: Bucket, uri: str, request_seconds: float = buckets.REQUEST_SECONDS, attempts: int = buckets.ATTEMPTS
    ) -> None:
        self._uri = uri
        self._whose = [read_key(bucket.credentials, *names, owner=uri) or "" for names in (buckets.ENDPOINT, buckets.ACCESS)]
        self._path = bucket.path.strip("/")
        self._store = buckets.filesystem(bucket.credentials, uri, request_seconds, attempts)

    def files(self) -> list[RemoteFile]:
        from pyarrow.fs import FileSelector, FileType

        with _told(self._uri):
            found = self._store.get_file_info(self._path)
            if found.type == FileType.File:
                refuse_unknown_format(self._path, self._uri)
                return [RemoteFile(self._path, found.size)]
            listed = self._store.get_file_info(FileSelector(self._path))
        files = [RemoteFile(item.path, item.size) for item in listed if item.type == FileType.File and format_of(item.path) is not None]
        return sorted(files, key=lambda file: file.name)

    def identity(self, file: RemoteFile) -> str | None:
        with _told(self._uri), self._store.open_input_stream(file.name) as source:
            size, tag = _version(source)
        return "\0".join((*self._whose, file.name, size, tag)) if tag else None

    def fetch(self, file: RemoteFile, target: Path, pace: Pace) -> Path:
        with _told(self._uri):
            with self._store.open_input_stream(file.name) as source, target.open("wb") as sink:
                before = _version(source)
                size = pace.copy(partial(_read, source), sink, buckets.CHUNK)
            with self._store.open_input_stream(file.name) as source:
                after = _version(source)
        if after != before:
            raise Unavailable(f"Dataset {self._uri}: {file.name[-80:]} changed while it was read.", Reason.SOURCE_UNAVAILABLE)
        if str(size) != before[0] or _is_filled_up(target):
            message = f"Dataset {self._uri}: {file.name[-80:]} broke off before its {before[0]} bytes were there."
            raise Unavailable(message, Reason.SOURCE_UNAVAILABLE)
        return target


def _read(source: Any, size: int) -> bytes:
    """At most so many bytes. Into zeros of ours: where a server sends less than it was asked for, and says so, Arrow counts what it asked
    for, and hands out whatever was in the memory."""
    zeros = bytearray(size)
    count = source.readinto(zeros)
    return bytes(memoryview(zeros)[:count])


def _is_filled_up(path: Path) -> bool:
    """Whether a text ends in the zeros that stand where nothing came."""
    if path.suffix.lower() not in TEXTS or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, SEEK_END)
        return file.read(1) == b"\0"


def _version(source: Any) -> tuple[str, str]:
    """(size, ETag)"""
    metadata = source.metadata()
    return metadata.get("Content-Length", b"").decode(), metadata.get("ETag", b"").decode()


def _told(uri: str) -> AbstractContextManager[None]:
    return buckets.told(
        denied=Invalid(f"Dataset {uri} may not be read with the keys of its Secret. Look at its secretRef.", Reason.ACCESS_DENIED),
        missing=Invalid(f"Dataset {uri} does not exist: there is no such bucket, object or prefix."),
        away=Unavailable(f"Dataset {uri} cannot be read: S3 does not answer as it should.", Reason.SOURCE_UNAVAILABLE),
    )
