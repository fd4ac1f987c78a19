"""The processes that train one model together: they meet once, agree at each step, and tell when one of them is gone."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

MEETING = timedelta(minutes=30)
"""So long the first pod waits for the last one to be scheduled and to pull its image."""
CONNECTING = timedelta(seconds=5)
"""So long one try to reach the first process takes."""
LOOKING_SECONDS = 0.1
PATIENCE = timedelta(hours=1)
"""So long a process waits for another at one point: a save to a slow store takes its time. The watchdog looks after steps."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size`; the first one writes, all others wait for it."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, as soon as one process has it set."""
        if self.size == 1:
            return flags
        import torch

        votes = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes)

    def told_by_first(self, value: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return value
        import torch

        box: list[Any] = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        told: T = box[0]
        return told

    def leave(self) -> None:
        if self.size > 1:
            import torch

            torch.distributed.destroy_process_group()


def join() -> World:
    """Meet the others, as many as the environment says; alone where it says nothing.

    Gloo carries what lies on the CPU, so that flags can be agreed on without a device's stream.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    import torch

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    has_device = torch.cuda.is_available()
    if has_device:
        torch.cuda.set_device(local)
    store = _meet(rank, size)
    backend = "cpu:gloo,cuda:nccl" if has_device else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return World(rank, size)


def _meet(rank: int, size: int) -> Any:  # Any: torch is imported only where it is needed
    """The store of all processes, once all are there. Torch would wait for them where no signal is heard, and an attempt that was
    given up would keep its devices until it is killed."""
    import torch

    end = time.monotonic() + MEETING.total_seconds()
    while (store := _connected(rank, size, is_last_try=time.monotonic() > end)) is None:
        time.sleep(LOOKING_SECONDS)
    store.add("met", 1)
    while store.add("met", 0) < size:
        if time.monotonic() > end:
            raise torch.distributed.DistStoreError(f"Not all {size} processes of the training were there within {MEETING}.")
        time.sleep(LOOKING_SECONDS)
    store.set_timeout(MEETING)
    return store


def _connected(rank: int, size: int, *, is_last_try: bool) -> Any:  # Any: torch is imported only where it is needed
    """None where the first process is not there yet.

    Torch waits for it, twice as long as it is told, where no signal is heard; so it is asked only where there is somebody to answer.
    """
    import torch

    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank != 0 and not is_last_try and not _listens(address):
        return None
    try:
        return torch.distributed.TCPStore(*address, world_size=size, is_master=rank == 0, timeout=CONNECTING, wait_for_workers=False)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError):
        if is_last_try or rank == 0:
            raise
        return None


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, CONNECTING.total_seconds()).close()
    except OSError:
        return False
    return True


def is_of_peers(error: BaseException) -> bool:
    """Whether another process of the world went away, rather than this one failing."""
    import torch

    if isinstance(error, (torch.distributed.DistBackendError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo", "Connection closed by peer", "NCCL"))
