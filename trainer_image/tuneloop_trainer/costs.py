"""Bounds what a piece of work may cost, in CPU time and in memory: for templates, which users write and which may loop or grow."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0
BYTES = 512 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
_handled = False


class TooCostly(Exception):
    """The work took more than it may."""

    def __init__(self) -> None:
        super().__init__(f"it needs more than {SECONDS:g} CPU seconds or {BYTES >> 20} MiB")


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TooCostly in the work once it has taken SECONDS of CPU time, or asks for BYTES more memory. In the main thread alone, which
    is the one that signals reach; in others nothing is bounded. For work beside which no other thread computes: theirs would count too.

    CPU time, so that a machine that is busy with other things refuses nothing. Memory by a limit on the address space: an operation
    that makes a huge value in one go is refused before it is made, which no count of steps would do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _handle()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    except MemoryError as error:
        raise TooCostly from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _handle() -> None:
    """Once: the handler is never taken back, and without a running timer never called."""
    global _handled
    if not _handled:
        signal.signal(signal.SIGVTALRM, _expired)
        _handled = True


def _address_space() -> int:
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 64).split(maxsplit=1)[0]) * _PAGE
    finally:
        os.close(file)


def _expired(number: int, frame: object) -> None:
    raise TooCostly
