"""How one attempt of a stage stands, by its Job's conditions and its pod's exit code."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum

from tuneloop_operator.api.kubernetes import Pod, Terminated
from tuneloop_operator.domain import times
from tuneloop_operator.domain.finetunejob.results import parse_result
from tuneloop_operator.domain.finetunejob.snapshot import StageRun
from tuneloop_operator.render.training import CONTAINER
from tuneloop_trainer.contract import ExitCode, StageResult

KILLED = 137
"""SIGKILL: by the kernel for memory, or by the kubelet when the grace period is over."""
TERMINATED = 143
EXIT_CODE = re.compile(r"failed with exit code (\d+)")
"""In the message of a Job that its pod failure policy ended; it outlives the pod."""


class Outcome(StrEnum):
    PENDING = "Pending"
    """No container runs, or one of several that work together does not."""
    RUNNING = "Running"
    DONE = "Done"
    UNREADABLE = "Unreadable"
    """Complete, but its pod is gone, or said nothing that could be believed."""
    INVALID = "Invalid"
    OUT_OF_MEMORY = "OutOfMemory"
    NON_FINITE = "NonFinite"
    STALLED = "Stalled"
    INTERRUPTED = "Interrupted"
    LOST = "Lost"
    """The pod or its node went away without a word."""
    UNAVAILABLE = "Unavailable"
    """What it reads or writes did not answer."""
    BUG = "Bug"

    @property
    def is_active(self) -> bool:
        return self in (Outcome.PENDING, Outcome.RUNNING)


BY_EXIT_CODE = {
    ExitCode.INVALID: Outcome.INVALID,
    ExitCode.OUT_OF_MEMORY: Outcome.OUT_OF_MEMORY,
    KILLED: Outcome.OUT_OF_MEMORY,
    ExitCode.NON_FINITE: Outcome.NON_FINITE,
    ExitCode.STALLED: Outcome.STALLED,
    ExitCode.UNAVAILABLE: Outcome.UNAVAILABLE,
    ExitCode.INTERRUPTED: Outcome.INTERRUPTED,
    ExitCode.PEER_LOST: Outcome.LOST,
    TERMINATED: Outcome.LOST,
    ExitCode.DONE: Outcome.LOST,
}
"""Of a Job that failed; whatever is not listed is a bug."""


CONSEQUENCES: tuple[int, ...] = (
    ExitCode.UNAVAILABLE, ExitCode.STALLED, ExitCode.INTERRUPTED, TERMINATED, ExitCode.PEER_LOST, ExitCode.DONE,
)  # fmt: skip
"""Exit codes of pods that trained together, those that may follow from another's last; what is not here is a cause."""


def outcome(run: StageRun) -> Outcome:
    if run.job.is_complete:
        return Outcome.DONE if result(run) is not None else Outcome.UNREADABLE
    if run.job.is_failed:
        return _failure(run)
    return Outcome.RUNNING if _is_running(run.pod) and run.held_back is None else Outcome.PENDING


def result(run: StageRun) -> StageResult | None:
    """What the newest pod that ended said; of several that trained together, the one that says why."""
    telling = _telling(run)
    return parse_result(telling[1].message, run.stage, telling[1].exit_code) if telling is not None else None


def _telling(run: StageRun) -> tuple[Pod, Terminated] | None:
    """The newest pod that ended of each number; of these, the one whose exit code is the cause, and not what follows from it."""
    ended = {pod.index: (pod, state) for pod in run.pods if (state := terminated(pod)) is not None}
    return min((ended[index] for index in sorted(ended)), key=lambda one: _telling_rank(*one), default=None)


def _telling_rank(pod: Pod, ended: Terminated) -> int:
    was_deleted = ended.exit_code == KILLED and pod.metadata.deletion_timestamp is not None
    code = TERMINATED if was_deleted else ended.exit_code
    return CONSEQUENCES.index(code) + 1 if code in CONSEQUENCES else 0


def terminated(pod: Pod) -> Terminated | None:
    return next((status.state.terminated for status in pod.status.container_statuses if status.name == CONTAINER), None)


def running_since(pod: Pod | None) -> str | None:
    """When the container started, if it runs."""
    if pod is None:
        return None
    states = [status.state.running for status in pod.status.container_statuses if status.name == CONTAINER]
    return next((state.started_at for state in states if state is not None), None)


def ended_at(run: StageRun) -> str | None:
    """When the Job was seen to have ended."""
    for type_ in ("Complete", "Failed"):
        if (condition := run.job.condition(type_)) is not None:
            return condition.last_transition_time
    return None


def running_seconds(run: StageRun, now: datetime) -> float:
    """Time that the run's container ran, queueing and pulling excluded; of several at once, the first one's."""
    return sum(_container_seconds(pod, now) for pod in run.pods if pod.index == 0)


def _container_seconds(pod: Pod, now: datetime) -> float:
    if (ended := terminated(pod)) is not None:
        end = times.parse(ended.finished_at)
        return times.seconds_between(ended.started_at, end) if end is not None else 0.0
    return times.seconds_between(running_since(pod), now)


def _failure(run: StageRun) -> Outcome:
    code = _exit_code(run)
    if code is None:
        return Outcome.LOST
    telling = _telling(run)
    if code == KILLED and telling is not None and telling[0].metadata.deletion_timestamp is not None:
        return Outcome.LOST  # it was deleted and did not end in time; memory has nothing to do with it
    return BY_EXIT_CODE.get(code, Outcome.BUG)


def _exit_code(run: StageRun) -> int | None:
    if (telling := _telling(run)) is not None:
        return telling[1].exit_code
    failed = run.job.condition("Failed")
    found = EXIT_CODE.search(failed.message) if failed is not None else None
    return int(found[1]) if found is not None and len(found[1]) <= 3 else None


def _is_running(pod: Pod | None) -> bool:
    return pod is not None and running_since(pod) is not None
