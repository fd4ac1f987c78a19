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
    """No container runs."""
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
    TERMINATED: Outcome.LOST,
    ExitCode.DONE: Outcome.LOST,
}
"""Of a Job that failed; whatever is not listed is a bug."""


def outcome(run: StageRun) -> Outcome:
    if run.job.is_complete:
        return Outcome.DONE if result(run) is not None else Outcome.UNREADABLE
    if run.job.is_failed:
        return _failure(run)
    return Outcome.RUNNING if _is_running(run.pod) else Outcome.PENDING


def result(run: StageRun) -> StageResult | None:
    """What the newest pod that ended said."""
    for pod in reversed(run.pods):
        if (ended := terminated(pod)) is not None:
            return parse_result(ended.message, run.stage, ended.exit_code)
    return None


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
    """Time that the run's containers ran, queueing and pulling excluded."""
    return sum(_container_seconds(pod, now) for pod in run.pods)


def _container_seconds(pod: Pod, now: datetime) -> float:
    if (ended := terminated(pod)) is not None:
        end = times.parse(ended.finished_at)
        return times.seconds_between(ended.started_at, end) if end is not None else 0.0
    return times.seconds_between(running_since(pod), now)


def _failure(run: StageRun) -> Outcome:
    code = _exit_code(run)
    if code is None:
        return Outcome.LOST
    if code == KILLED and run.pod is not None and run.pod.metadata.deletion_timestamp is not None:
        return Outcome.LOST  # it was deleted and did not end in time; memory has nothing to do with it
    return BY_EXIT_CODE.get(code, Outcome.BUG)


def _exit_code(run: StageRun) -> int | None:
    for pod in reversed(run.pods):
        if (ended := terminated(pod)) is not None:
            return ended.exit_code
    failed = run.job.condition("Failed")
    found = EXIT_CODE.search(failed.message) if failed is not None else None
    return int(found[1]) if found is not None and len(found[1]) <= 3 else None


def _is_running(pod: Pod | None) -> bool:
    return pod is not None and running_since(pod) is not None
