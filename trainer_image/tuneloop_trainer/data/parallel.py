"""Calls a function on records in several processes; the results come in the order of the records, whatever the number of processes.

The processes are forks: tokenizer and templates need neither be loaded nor pickled again. `ProcessPoolExecutor`, because a child that is
killed breaks it, where `multiprocessing.Pool` would wait for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.errors import OutOfMemory
from tuneloop_trainer.hardware import cpu_threads

CHUNK_ITEMS, CHUNK_SIZE = 100, 1 << 20
AHEAD = 3
"""Chunks that wait for each process; with the bound on a chunk they bound the memory."""
_SET_PDEATHSIG = 1

LEAST_ROWS = 4_000
"""Fewer are tokenised before other processes would have begun."""

A = TypeVar("A")
B = TypeVar("B")


class InOrder(Generic[A, B]):
    """`call` on items, by `workers` processes. `size` is what an item counts against CHUNK_SIZE."""

    def __init__(self, call: Callable[[A], B], size: Callable[[A], int], workers: int) -> None:
        self._call, self._size, self._workers = call, size, workers

    def results(self, items: Iterable[A]) -> Iterator[tuple[A, B]]:
        """(item, result) in the order of the items. Raises what the call raises, OutOfMemory where a process was killed."""
        if self._workers < 2:
            yield from ((item, self._call(item)) for item in items)
            return
        try:
            with _processes(self._call, self._workers) as pool:
                waiting: deque[tuple[list[A], Future[list[B]]]] = deque()
                for chunk in self._chunks(items):
                    waiting.append((chunk, pool.submit(_called, chunk)))
                    if len(waiting) > AHEAD * self._workers:
                        yield from _pairs(waiting)
                while waiting:
                    yield from _pairs(waiting)
        except BrokenProcessPool as error:
            raise OutOfMemory("A process that tokenised rows was killed, most likely for memory.") from error

    def _chunks(self, items: Iterable[A]) -> Iterator[list[A]]:
        chunk: list[A] = []
        size = 0
        for item in items:
            chunk.append(item)
            size += self._size(item)
            if len(chunk) == CHUNK_ITEMS or size >= CHUNK_SIZE:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk


def _pairs(waiting: deque[tuple[list[A], Future[list[B]]]]) -> Iterator[tuple[A, B]]:
    chunk, future = waiting.popleft()
    yield from zip(chunk, future.result(), strict=True)


def processes(config: RunConfig, rows: int) -> int:
    """How many to tokenise with. An objective of a plug-in may keep what it sees of the rows: it sees all of them in one process."""
    return 1 if rows < LEAST_ROWS or config.objective == "Custom" else cpu_threads(config.threads)


_call: Callable[..., Any] | None = None
"""In a child: what it was forked to call."""


@contextmanager
def _processes(call: Callable[[A], B], workers: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin, (call, os.getpid()))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _begin(call: Callable[..., object], parent: int) -> None:
    """A child ends with its parent, by whatever signal, and is no handler of the parent's."""
    global _call
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _call = call


def _called(chunk: list[A]) -> list[Any]:  # Any: what it was forked to call says what
    assert _call is not None
    return [_call(item) for item in chunk]
