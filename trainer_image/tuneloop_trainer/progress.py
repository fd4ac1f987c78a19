"""A running stage's progress: the worker writes it to a small file, the launcher answers from that file.

Two processes, so that a worker deep in a matrix product still has an answer, and its silence can be seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuneloop_trainer.contract import MAX_PHASES, Progress, Stage
from tuneloop_trainer.manifests import write_atomically

MIN_INTERVAL_SECONDS = 0.5


class ProgressWriter:
    """Holds the newest progress and writes it, at most twice a second but for a new phase."""

    def __init__(self, path: Path, stage: Stage, pod_uid: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._written = float("-inf")
        self.started = self._since = clock()
        self.current = Progress(pod_uid=pod_uid, stage=stage, phase="Starting")
        self._write()

    def update(self, **fields: Any) -> None:  # Any: whatever fields of Progress change
        """Change fields of the progress; a new phase, step or checkpoint is always written."""
        before = self.current
        if fields.get("phase", before.phase) != before.phase:
            fields["phase_seconds"] = self.phase_seconds()
            self._since = self._clock()
        self.current = Progress.model_validate(before.model_dump() | fields)
        if _landmarks(before) != _landmarks(self.current) or self._clock() - self._written >= MIN_INTERVAL_SECONDS:
            self._write()

    def phase(self, name: str, **fields: Any) -> None:  # Any: as above
        self.update(phase=name, **fields)

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase up to now, that of the current one included."""
        name, spent = self.current.phase, self._clock() - self._since
        known = self.current.phase_seconds
        if name not in known and len(known) >= MAX_PHASES:
            return known
        return known | {name: round(known.get(name, 0.0) + spent, 2)}

    def first_step_done(self) -> None:
        """The first step of this worker: what it took to get there is what a restart costs."""
        if self.current.first_step_seconds is None:
            self.update(first_step_seconds=round(self._clock() - self.started, 2))

    def counter(self, phase: str, total: int) -> Callable[[int], None]:
        """Begin a phase of `total` items; the returned function is told how many are done."""
        self.phase(phase, samples=0, percent=0.0, remaining_seconds=None, rows_per_second=None)
        started = self._clock()

        def done(count: int) -> None:
            spent = self._clock() - started
            remaining = spent / count * (total - count) if count else None
            rate = count / spent if spent > 0 else None
            self.update(samples=count, percent=round(100 * count / max(total, 1), 1), remaining_seconds=remaining, rows_per_second=rate)

        return done

    def _write(self) -> None:
        self._written = self._clock()
        write_atomically(self._path, self.current.model_dump_json(by_alias=True, exclude_none=True).encode(), durable=False)


def _landmarks(progress: Progress) -> tuple[str, int, int | None]:
    return progress.phase, progress.step, progress.checkpoint_step


def read_progress(path: Path) -> Progress | None:
    try:
        return Progress.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
