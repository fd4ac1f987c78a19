"""Why pods make no headway, in one word and one sentence; the worst of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from tuneloop_operator.api.conditions import DeploymentReason
from tuneloop_operator.api.kubernetes import ContainerStatus, Deployment, Pod, Terminated
from tuneloop_operator.domain import times
from tuneloop_operator.domain.conditions import shortened
from tuneloop_operator.domain.modeldeployment.crashes import diagnose, known_by, sentence, unwrapped
from tuneloop_operator.render.engine import VERIFY

PULL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError")
START_REASONS = ("StartError", "ContainerCannotRun")
"""The image has not what is to be run."""
CRASHES = 3
"""Restarts after which an engine counts as failed; one may be bad luck."""
TIMEOUT_SLACK_SECONDS = 30
"""Pulling and verifying come before the startup probe begins to count."""


@dataclass(frozen=True)
class Failure:
    """What is wrong."""

    reason: DeploymentReason
    message: str
    is_fatal: bool
    """It will not heal by itself: the same bytes on the same kind of node fail again."""


def find_failure(
    what: str, pods: Iterable[Pod], deployment: Deployment | None, warnings: Mapping[str, str], startup_seconds: int, now: datetime
) -> Failure | None:
    """The worst failure of the pods that are not ready; None where all is well or only takes its time. `what` begins the sentence."""
    waiting = [pod for pod in pods if not pod.is_ready and pod.metadata.deletion_timestamp is None]
    found = [failure for pod in waiting if (failure := _of_pod(what, pod, warnings, startup_seconds, now)) is not None]
    if found:
        return next((failure for failure in found if failure.is_fatal), found[0])
    return _of_deployment(what, deployment)


def never_ready(what: str, leaders: Iterable[Pod], made: Deployment, startup_seconds: int) -> Failure | None:
    """Where leaders that are not ready were made anew long after the first ones: their groups end again and again."""
    first = made.metadata.creation_timestamp
    later = [times.parse(pod.metadata.creation_timestamp) for pod in leaders if not pod.is_ready]
    if not any(at is not None and times.seconds_between(first, at) > startup_seconds + TIMEOUT_SLACK_SECONDS for at in later):
        return None
    message = f"{what} was not ready {startup_seconds} s after its start: its pods end, and begin again. Look at the logs of its groups."
    return Failure(DeploymentReason.STARTUP_TIMEOUT, message, is_fatal=True)


def _of_pod(what: str, pod: Pod, warnings: Mapping[str, str], startup_seconds: int, now: datetime) -> Failure | None:
    if pod.is_unschedulable:
        return _unschedulable(what, pod)
    for container in (*pod.status.init_container_statuses, *pod.status.container_statuses):
        if (failure := _of_container(what, container)) is not None:
            return failure
    started = pod.status.start_time
    if started is not None and times.seconds_between(started, now) > startup_seconds + TIMEOUT_SLACK_SECONDS:
        message = f"{what} was not ready {startup_seconds} s after its start. Raise engine.startupTimeoutSeconds, or look at the pod's log."
        return Failure(DeploymentReason.STARTUP_TIMEOUT, message, is_fatal=True)
    if (warning := warnings.get(pod.metadata.uid)) is not None:
        return _of_warning(what, warning)
    return None


def _unschedulable(what: str, pod: Pod) -> Failure:
    scheduled = pod.condition("PodScheduled")
    why = shortened(scheduled.message if scheduled is not None else "", 400)
    message = f"{what} finds no node: {why} Free devices or memory, or ask for less in engine and engine.pod.resources."
    return Failure(DeploymentReason.UNSCHEDULABLE, message, is_fatal=False)


def _of_container(what: str, container: ContainerStatus) -> Failure | None:
    waiting = container.state.waiting
    if waiting is not None and waiting.reason in PULL_REASONS:
        message = f"{what} cannot pull its image: {shortened(waiting.message, 400)} Check the image's name and imagePullSecrets."
        return Failure(DeploymentReason.IMAGE_PULL_FAILED, message, is_fatal=False)
    if waiting is not None and waiting.reason in CONFIG_REASONS:
        message = f"{what} cannot start: {shortened(waiting.message, 400)}"
        return Failure(DeploymentReason.SECRET_NOT_FOUND, message, is_fatal=False)
    ended = container.state.terminated or container.last_state.terminated
    if ended is None or ended.exit_code == 0:
        return None
    if ended.reason in START_REASONS:
        why = shortened(ended.message, 300).rstrip(".")
        message = f"{what} cannot be started from its image: {why}. Set engine.image to one with python3 and vLLM."
        return Failure(DeploymentReason.ENGINE_FAILED, message, is_fatal=True)
    if container.name == VERIFY:
        return _unverified(what, ended)
    if ended.reason == "OOMKilled":
        message = f"{what} ran out of memory and was killed. Raise engine.pod.resources (requests and limits of memory)."
        return Failure(DeploymentReason.OUT_OF_MEMORY, message, is_fatal=True)
    return _crashed(what, container.restart_count, ended)


def _crashed(what: str, restarts: int, ended: Terminated) -> Failure | None:
    """At once where what it said leaves no hope; else a crash may be bad luck."""
    said, known = sentence(ended.message), diagnose(ended.message)
    is_hopeless = known is not None and known.is_permanent
    if restarts < CRASHES and not is_hopeless:
        return None
    last = said or shortened(ended.message[-300:], 300) or "look at the pod's log."
    times_ = f"{restarts} times, last " if restarts > 1 else ""
    message = f"{what} ended {times_}with exit code {ended.exit_code}: {last}"
    if known is None:
        return Failure(DeploymentReason.ENGINE_FAILED, message, is_fatal=True)
    return Failure(known.reason, f"{message.rstrip('. ')}. {known.remedy}", is_fatal=True)


def not_loaded(what: str, said: str) -> Failure:
    """An adapter that a running engine refused, by the engine's own sentence."""
    why, known = unwrapped(said).rstrip(". "), known_by(said)
    remedy = known.remedy if known is not None else "Put its files back as they were published, or serve another version."
    return Failure(DeploymentReason.ENGINE_FAILED, f"{what} could not load the adapter: {why}. {remedy}", is_fatal=True)


def _unverified(what: str, ended: Terminated) -> Failure:
    why = shortened(ended.message[-400:], 400)
    message = f"{what} was not started, since the model's files could not be verified: {why or f'exit code {ended.exit_code}.'}"
    return Failure(DeploymentReason.ENGINE_FAILED, message, is_fatal=True)


def _of_warning(what: str, warning: str) -> Failure:
    text = shortened(warning, 400)
    is_missing = "not found" in warning or "non-existent" in warning
    reason = DeploymentReason.SECRET_NOT_FOUND if is_missing and "secret" in warning.lower() else DeploymentReason.STARTING
    return Failure(reason, f"{what} waits: {text}", is_fatal=False)


def _of_deployment(what: str, deployment: Deployment | None) -> Failure | None:
    """Pods that could not even be made."""
    conditions = deployment.status.conditions if deployment is not None else ()
    refused = next((c for c in conditions if c.type == "ReplicaFailure" and c.status == "True"), None)
    if refused is None:
        return None
    is_quota = "exceeded quota" in refused.message
    reason = DeploymentReason.QUOTA_EXCEEDED if is_quota else DeploymentReason.ENGINE_FAILED
    return Failure(reason, f"{what} has no pods: {shortened(refused.message, 500)}", is_fatal=False)
