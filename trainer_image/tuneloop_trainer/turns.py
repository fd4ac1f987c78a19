"""One process at a time, among all pods that share a store: so that what they all need is fetched once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger("tuneloop.turns")
PATIENCE_SECONDS = 3600.0
"""So long another one's work is waited for; then it is done twice rather than not at all."""
EVERY_SECONDS = 2.0
GROUP_MAY_LOCK = 0o664
"""Runs of one store may have different users; its group they share."""


@contextmanager
def turn(path: Path, patience: float = PATIENCE_SECONDS, every: float = EVERY_SECONDS) -> Iterator[None]:
    """Waits for the lock on this file and holds it. The kernel frees the lock of a process that dies, the server that of a node.

    A store without locks is no reason to fail, and neither is a lock that cannot be opened or is never free: what is done under a
    lock here is right without one, it only costs more. A marker file in the lock's place would outlive a killed pod.
    """
    lock = FileLock(path, timeout=patience, mode=GROUP_MAY_LOCK, poll_interval=every, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        log.warning("%s is held by another run for more than %.0f s: not waiting any longer", path.name, patience)
    except OSError as error:
        log.warning("%s cannot be locked (%s): another run may do the same work", path.name, error.strerror)
    try:
        yield
    finally:
        with suppress(OSError):  # a store that is gone says so where it is read
            lock.release()
