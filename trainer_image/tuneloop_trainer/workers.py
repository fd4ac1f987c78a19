"""A pod's worker processes: one for each device, started together, ended together; the launcher is told how by the most telling one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tuneloop_trainer.contract import ENV_NODES, ENV_PROCESSES, ENV_RENDEZVOUS, ExitCode, StageResult
from tuneloop_trainer.results import read_result

ENV_NODE = "JOB_COMPLETION_INDEX"
"""Set by Kubernetes in the pods of an Indexed Job."""
PEERS_SECONDS = 20.0
"""So long the others have to notice that one of them ended with an error, and to end too."""
TELLING = (
    ExitCode.INVALID,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.NON_FINITE,
    ExitCode.STALLED,
    ExitCode.UNAVAILABLE,
    ExitCode.INTERRUPTED,
)
"""Which of several exit codes is the cause, first one first; a crash comes before them all, a lost peer after."""


@dataclass(frozen=True)
class Place:
    """Where a pod stands among those that train together."""

    node: int = 0
    nodes: int = 1
    processes: int = 1
    rendezvous: str = "127.0.0.1:29500"

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Place:
        return cls(
            node=int(env.get(ENV_NODE, "0")),
            nodes=int(env.get(ENV_NODES, "1")),
            processes=int(env.get(ENV_PROCESSES, "1")),
            rendezvous=env.get(ENV_RENDEZVOUS, cls.rendezvous),
        )

    def environment(self, local: int) -> dict[str, str]:
        """What torch wants to know; nothing where one process trains alone."""
        size = self.nodes * self.processes
        if size == 1:
            return {}
        host, _, port = self.rendezvous.rpartition(":")
        return {
            "WORLD_SIZE": str(size),
            "RANK": str(self.node * self.processes + local),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }


@dataclass
class Worker:
    """One process; its number among those of the pod is also that of its device."""

    pid: int
    result: Path
    code: int | None = None
    was_ended: bool = False
    """By the launcher, because of another one."""

    def signal(self, number: int) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass
class Workers:
    started: list[Worker] = field(default_factory=list)
    _failed_at: float | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str], result: Path) -> None:
        process = subprocess.Popen(command, env=environment)
        self.started.append(Worker(process.pid, result))

    def signal(self, number: int) -> None:
        for worker in self.started:
            worker.signal(number)

    def reaped(self, pid: int, code: int) -> None:
        for worker in self.started:
            if worker.pid == pid:
                worker.code = code
                if code != 0 and self._failed_at is None:
                    self._failed_at = time.monotonic()

    @property
    def are_over(self) -> bool:
        return all(worker.code is not None for worker in self.started)

    def end_what_is_left(self) -> None:
        """Once one has failed, the others have nothing to do any more."""
        if self._failed_at is None or time.monotonic() - self._failed_at < PEERS_SECONDS:
            return
        for worker in self.started:
            worker.was_ended = worker.was_ended or worker.code is None
            worker.signal(signal.SIGKILL)

    def outcome(self) -> tuple[int, StageResult | None]:
        """The exit code that says why, and what that worker left; the first worker's where all are equal."""
        ended = [worker for worker in self.started if not worker.was_ended] or self.started
        telling = min(ended, key=lambda worker: _rank(worker.code or 0))
        result = read_result(telling.result)
        return telling.code or 0, result if result is not None and result.exit_code == telling.code else None


def _rank(code: int) -> int:
    if code in TELLING:
        return 1 + TELLING.index(ExitCode(code))
    return {0: 100, ExitCode.PEER_LOST: 99}.get(code, 0)
