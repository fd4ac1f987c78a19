"""What the pod has: CPU threads within its quota, the device, peak memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_loaded_to: ContextVar[str | None] = ContextVar("loaded_to", default=None)


def cpu_threads(configured: int | None = None, cgroup: Path = CGROUP) -> int:
    """Threads to compute with: as configured, else the CPUs this process may use, cut to the cgroup's quota."""
    if configured is not None:
        return max(1, configured)
    usable = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return max(1, min(usable, round(quota))) if quota is not None else usable


def use_threads(configured: int | None) -> None:
    import torch

    torch.set_num_threads(max(1, cpu_threads(configured) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _quota(cgroup: Path) -> float | None:
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def oom_kills(cgroup: Path = CGROUP) -> int | None:
    """How often the kernel killed a process of this container for memory; None where it does not say."""
    try:
        lines = (cgroup / "memory.events").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def peak_memory_bytes() -> int:
    """The device's peak where there is one, else the peak resident set of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loaded_to() -> str:
    """Where models are loaded to: the device, unless `loading_to` says otherwise."""
    return _loaded_to.get() or device()


@contextmanager
def loading_to(place: str) -> Iterator[None]:
    token = _loaded_to.set(place)
    try:
        yield
    finally:
        _loaded_to.reset(token)
