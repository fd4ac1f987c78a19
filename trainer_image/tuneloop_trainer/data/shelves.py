"""Fetched files that are kept on the store, so that several pods and runs that read the same fetch it once.

What a reader has is a link of its own: a file that is removed here goes when its last reader is done.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tuneloop_trainer.turns import GROUP_MAY_LOCK, turn

KEPT_SECONDS = 7 * 24 * 3600.0
"""A file that nobody read for so long goes."""
LEAST_FREE = 0.5
"""Share of the store that stays free of them: checkpoints need it more."""
LOCKS = 2
"""Hex digits that tell the files of one lock: files are never more locks than 256."""


class Shelf:
    """Files by what identifies their content. Nothing here is a reason to fail: what cannot be kept or taken is fetched."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def take(self, identity: str, target: Path, fetch: Callable[[], Path], is_current: Callable[[], bool]) -> Path:
        """The file, linked to the target, or fetched and kept for others, where its identity is the same afterwards. Raises what the
        two functions raise."""
        name = hashlib.sha256(identity.encode()).hexdigest()
        place = self._folder / name
        with turn(self._folder / f"{name[:LOCKS]}.lock"):
            if self._linked(place, target):
                return target
            path = fetch()
            self.make_room()
            if self._has_room() and is_current():
                self._keep(path, place)
        return path

    def make_room(self, size: int = 0) -> None:
        """Remove what was not read for long; where the store has little room, or less than is asked for, what was not read for longest."""
        with suppress(OSError):
            kept = sorted((path.stat().st_mtime, path) for path in self._folder.iterdir() if path.suffix != ".lock")
            for read_at, path in kept:
                if self._has_room(size) and self._clock() - read_at < KEPT_SECONDS:
                    return
                path.unlink(missing_ok=True)

    def _has_room(self, size: int = 0) -> bool:
        usage = shutil.disk_usage(self._folder)
        return usage.free >= max(LEAST_FREE * usage.total, size)

    def _keep(self, path: Path, place: Path) -> None:
        with suppress(OSError):
            path.chmod(GROUP_MAY_LOCK)  # a link to what others own asks for the right to write
        with suppress(OSError), path.open("rb") as file:
            os.fsync(file.fileno())
            self._linked(path, place)

    def _linked(self, source: Path, target: Path) -> bool:
        try:
            os.link(source, target)
        except OSError:  # it is not there, or the store has no links
            return False
        with suppress(OSError):
            os.utime(target, (self._clock(), self._clock()))
        return True
