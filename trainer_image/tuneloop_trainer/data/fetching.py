"""Files of a source that lie elsewhere: listed once, then fetched one by one, each whole before it is read and gone afterwards.

So a set needs the disk of its largest file, and nothing is ever read of half a file.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from tuneloop_trainer.contract import Reason
from tuneloop_trainer.data.formats import ALONE, MAX_BYTES, SUFFIXES, Share, format_of, too_large
from tuneloop_trainer.data.shelves import Shelf
from tuneloop_trainer.errors import Invalid, Unavailable

MAX_FILES = 10_000
GRACE_SECONDS, LEAST_BYTES_PER_SECOND = 120.0, 64 << 10
"""A file that comes more slowly, after a while, is given up: a server that sends now and then meets every timeout of a client."""
KNOWN = ", ".join(SUFFIXES) + " (the text formats also with .gz or .zst)"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a listing. `name` is its path there, `size` None where the listing does not say."""

    name: str
    size: int | None


class Remote(Protocol):
    """A place that files are fetched from."""

    def files(self) -> list[RemoteFile]:
        """What is to be read, in order. Raises Invalid or Unavailable."""

    def identity(self, file: RemoteFile) -> str | None:
        """What tells the file's content, and who may read it, from any other; None for one that lies on this machine already, or that
        nothing is told of. Raises Invalid or Unavailable."""

    def fetch(self, file: RemoteFile, target: Path, pace: Pace) -> Path:
        """Write the file to the target, verified, or say where it already lies. Raises Invalid or Unavailable."""


@dataclass
class Workspace:
    """Where files are fetched to, and who is told how far it is: the share of the source's bytes, 0 to 100."""

    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    told: Callable[[float], None] = lambda _: None
    commits: dict[tuple[str, str | None], str] = field(default_factory=dict)
    """(repository, revision asked for) -> its commit, found once for all sources of a run."""
    share: Share = ALONE
    shelf: Shelf | None = None
    """Where fetched files are kept for others. None: each is gone once it was read."""


@dataclass
class Pace:
    """Watches one file come."""

    uri: str
    name: str
    told: Callable[[int], None] = lambda _: None
    share: Share = ALONE
    clock: Callable[[], float] = time.monotonic
    _started: float = field(init=False)
    _bytes: int = 0

    def __post_init__(self) -> None:
        self._started = self.clock()

    def copied(self, count: int) -> None:
        """Raises Invalid for a file that is too large, Unavailable for one that comes too slowly."""
        self._bytes += count
        if self._bytes > MAX_BYTES * self.share.of:
            raise too_large(self.uri, self.share)
        if (self.clock() - self._started - GRACE_SECONDS) * LEAST_BYTES_PER_SECOND > self._bytes:
            raise Unavailable(f"Dataset {self.uri}: {self.name[-80:]} comes too slowly to be waited for.", Reason.SOURCE_UNAVAILABLE)
        self.told(self._bytes)

    def copy(self, read: Callable[[int], bytes], sink: IO[bytes], chunk: int) -> int:
        """Bytes copied until the end."""
        while content := read(chunk):
            sink.write(content)
            self.copied(len(content))
        return self._bytes


def fetched(remote: Remote, uri: str, work: Workspace) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file; it is there until the next one is asked for. Raises Invalid or Unavailable."""
    files = remote.files()
    _refuse_too_many(files, uri, work.share)
    if work.shelf is not None:
        work.shelf.make_room(max(file.size or 0 for file in files))
    total, before = sum(file.size or 0 for file in files) or 1, 0
    for file in files:
        with _folder(work, file, uri) as folder:
            done = before

            def told(count: int, done: int = done) -> None:
                work.told(round(min(100.0, 100 * (done + count) / total), 1))

            target = folder / _local_name(file.name)
            path = _fetch(remote, file, target, Pace(uri, file.name, told, work.share), work.shelf)
            yield PurePosixPath(file.name).name, path
        before += file.size or 0


def _fetch(remote: Remote, file: RemoteFile, target: Path, pace: Pace, shelf: Shelf | None) -> Path:
    """Once for all that share the shelf, as long as it is what was asked for."""
    fetch = partial(remote.fetch, file, target, pace)
    identity = remote.identity(file) if shelf is not None else None
    if shelf is None or identity is None:
        return fetch()
    return shelf.take(identity, target, fetch, lambda: remote.identity(file) == identity)


@contextmanager
def _folder(work: Workspace, file: RemoteFile, uri: str) -> Iterator[Path]:
    work.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work.folder).free
    if (file.size or 0) > free:
        raise Unavailable(
            f"Dataset {uri}: {file.name[-80:]} has {_gib(file.size or 0)}, and the store has {_gib(free)} free. "
            "Make the claim larger, or split the file.",
            Reason.STORE_UNAVAILABLE,
        )
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=work.folder) as folder:
        yield Path(folder)


def _local_name(name: str) -> str:
    """The last part of the name, short enough for any file system, with the suffixes that tell its format."""
    return PurePosixPath(name).name.replace("\0", "")[-100:]


def _refuse_too_many(files: list[RemoteFile], uri: str, share: Share) -> None:
    if not files:
        raise Invalid(f"Dataset {uri} has no file that ends in {KNOWN}.", Reason.DATA_EMPTY)
    if len(files) > MAX_FILES:
        raise Invalid(f"Dataset {uri} has {len(files)} files; at most {MAX_FILES} are read. Join them.")
    if sum(file.size or 0 for file in files) > MAX_BYTES * share.of:
        raise too_large(uri, share)


def refuse_unknown_format(name: str, uri: str) -> None:
    """Raises Invalid."""
    if format_of(name) is None:
        raise Invalid(f"Dataset {uri} is of no known format. Use a file that ends in {KNOWN}.")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
