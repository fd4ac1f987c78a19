"""SIGTERM in the worker: ends a stage at once, or lets a training step finish and be saved."""

from __future__ import annotations

import signal
from types import TracebackType

from tuneloop_trainer.errors import Interrupted


class Interrupts:
    """SIGTERM only sets `requested`, except within a `with` block, where it raises Interrupted in the main thread: once, and no longer
    after `defer`. What came before the block is raised as it is entered."""

    def __init__(self) -> None:
        self.requested = False
        self._has_come = self._at_once = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._received)

    def defer(self) -> None:
        self._at_once = False

    def __enter__(self) -> None:
        self._at_once = True
        if self._has_come:
            self._raise()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._at_once = False

    def _received(self, number: int, frame: object) -> None:
        self.requested = self._has_come = True
        if self._at_once:
            self._raise()

    def _raise(self) -> None:
        self._at_once = False
        raise Interrupted("Ended by SIGTERM; the stage starts again.")
