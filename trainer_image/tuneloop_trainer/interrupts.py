"""SIGTERM in the worker: ends a stage at once, or lets a training step finish and be saved."""

from __future__ import annotations

import signal

from tuneloop_trainer.errors import Interrupted


class Interrupts:
    """Until `defer` is called, SIGTERM raises Interrupted in the main thread; afterwards it only sets `requested`."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._received)

    def defer(self) -> None:
        self._deferred = True

    def _received(self, number: int, frame: object) -> None:
        self.requested = True
        if not self._deferred:
            raise Interrupted("Ended by SIGTERM; the stage starts again.")
