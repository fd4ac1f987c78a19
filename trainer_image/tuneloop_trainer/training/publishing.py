"""A written checkpoint is flushed, hashed and published beside the training, which goes on meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloop_trainer.manifests import flush
from tuneloop_trainer.training.world import World


@dataclass
class Pending:
    """First each of several processes flushes what it wrote; once all have, the first one publishes. One alone does both at once."""

    step: int
    publish: Callable[[], Any]
    flushed: Future[None] | None = None
    published: Future[Any] | None = None


class Late(Exception):
    """What was waited for is not published yet. It is no longer looked after, and may still come to be."""


class Publisher:
    """One checkpoint at a time. All processes start and look after the same steps."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: Pending | None = None

    @property
    def pending_step(self) -> int | None:
        return self._pending.step if self._pending is not None else None

    def start(self, step: int, written: Path, publish: Callable[[], Any]) -> None:
        if self._world.size == 1:
            self._pending = Pending(step, publish, published=_submit(publish))
        else:
            self._pending = Pending(step, publish, flushed=_submit(lambda: flush(written)))

    def settle(self, seconds: float = 0.0) -> int | None:
        """The step whose checkpoint is published now; None where there is none, or it takes longer. With `seconds` it is waited for,
        and Late raised. Raises what failed: in all processes where one could not flush its part, in the first one where it could not
        publish."""
        pending, until = self._pending, time.monotonic() + seconds
        if pending is None:
            return None
        if pending.published is None and not self._is_flushed(pending, seconds):
            self._not_yet(seconds)
            return None
        if not self._world.is_first:
            self._pending = None
            return pending.step
        if pending.published is None:
            pending.published = _submit(pending.publish)
        if not _is_done(pending.published, until - time.monotonic() if seconds else 0.0):
            self._not_yet(seconds)
            return None
        self._pending = None
        pending.published.result()
        return pending.step

    def _not_yet(self, seconds: float) -> None:
        if seconds:
            self._pending = None
            raise Late(f"the checkpoint is not published after {seconds:.0f} s")

    def _is_flushed(self, pending: Pending, seconds: float) -> bool:
        """By all processes."""
        assert pending.flushed is not None
        is_done = _is_done(pending.flushed, seconds)
        error = pending.flushed.exception() if is_done else None
        is_late, has_failed = self._world.any(not is_done, error is not None)
        if has_failed:
            self._pending = None
            raise error or OSError("another process could not flush its part")
        return not is_late


def _submit(what: Callable[[], Any]) -> Future[Any]:
    """In a thread that the process does not wait for as it ends: a store that does not come back must not hold it."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(what())
        except BaseException as error:  # noqa: BLE001  # told where it is waited for
            future.set_exception(error)

    threading.Thread(target=work, name="publisher", daemon=True).start()
    return future


def _is_done(future: Future[Any], seconds: float) -> bool:
    if seconds > 0:
        wait([future], seconds)
    return future.done()
