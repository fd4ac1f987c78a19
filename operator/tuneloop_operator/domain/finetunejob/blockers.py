"""Why a stage's pod does not run, as a reason for programs and a sentence that says what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.api.kubernetes import Pod, Waiting
from tuneloop_operator.domain import times
from tuneloop_operator.domain.conditions import shortened
from tuneloop_operator.domain.finetunejob.snapshot import StageRun

QUOTE_LIMIT = 300
"""Characters that are quoted of somebody else's message."""
PULL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable", "ImageInspectError")
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
UNMADE_SECONDS = 30.0
"""So long a JobSet may be without its Job before that is told."""
MISSING_CLAIM = re.compile(r'persistentvolumeclaim "([^"]{1,253})" (?:not found|is being deleted)')
MISSING_SECRET = re.compile(r'secrets? "?([^"\s]{1,253})"? not found', re.IGNORECASE)
MISSING_KEY = re.compile(r"couldn't find key (\S{1,253}) in Secret (\S{1,253})")


@dataclass(frozen=True)
class Blocker:
    reason: JobReason
    message: str


def blocker(run: StageRun, now: datetime) -> Blocker | None:
    """What keeps a Job that has not ended from running; None where nothing is known to."""
    pod = run.held_back or run.pod
    if pod is None:
        return _without_pod(run, now)
    if pod.is_unschedulable:
        return _unschedulable(pod)
    for status in (*pod.status.init_container_statuses, *pod.status.container_statuses):
        if status.state.waiting is not None and (found := _waiting(pod, status.state.waiting)) is not None:
            return found
    return _mounting(run)


def claim_missing(names: tuple[str, ...]) -> Blocker:
    listed = ", ".join(names)
    message = f"PersistentVolumeClaim {listed} does not exist in this namespace. Create it, or change the uri."
    return Blocker(JobReason.CLAIM_NOT_FOUND, message)


def _without_pod(run: StageRun, now: datetime) -> Blocker | None:
    is_old = times.seconds_between(run.job.metadata.creation_timestamp, now) >= UNMADE_SECONDS
    if run.manifest["kind"] == "JobSet" and not run.made_uid and is_old:
        message = f"No Job was made for JobSet {run.job.metadata.name}. See that JobSet's controller runs, or what holds the JobSet back."
        return Blocker(JobReason.PENDING, message)
    failed = next((event for event in run.warnings if event.reason == "FailedCreate"), None)
    if failed is None:
        return None
    if "exceeded quota" in failed.message:
        message = f"The namespace's quota admits no further pod: {_quote(failed.message)}. Free or raise the quota."
        return Blocker(JobReason.QUOTA_EXCEEDED, message)
    return Blocker(JobReason.PENDING, f"The pod is refused: {_quote(failed.message)}.")


def _unschedulable(pod: Pod) -> Blocker:
    scheduled = pod.condition("PodScheduled")
    text = scheduled.message if scheduled is not None else ""
    if (claim := MISSING_CLAIM.search(text)) is not None:
        return claim_missing((claim[1],))
    if "volume node affinity conflict" in text:
        return _not_shared(text)
    message = f"No node takes the pod: {_quote(text)}. Free devices or add nodes, or ask for less in spec.compute."
    return Blocker(JobReason.UNSCHEDULABLE, message)


def _waiting(pod: Pod, waiting: Waiting) -> Blocker | None:
    if waiting.reason in PULL_REASONS:
        return Blocker(
            JobReason.IMAGE_PULL_FAILED,
            f"The trainer image cannot be pulled ({waiting.reason}): {_quote(waiting.message)}. "
            "Check the operator's setting trainerImage and spec.compute.pod.imagePullSecrets.",
        )
    if waiting.reason in CONFIG_REASONS:
        return _missing_secret(waiting.message) or Blocker(JobReason.PENDING, f"The container cannot be made: {_quote(waiting.message)}.")
    return None


def _mounting(run: StageRun) -> Blocker | None:
    """A Secret or claim that a volume names is told by events only."""
    for event in run.warnings:
        if "Multi-Attach error" in event.message:
            return _not_shared(event.message)
        if event.reason in ("FailedMount", "FailedAttachVolume"):
            return _missing_secret(event.message) or Blocker(JobReason.PENDING, f"A volume cannot be mounted: {_quote(event.message)}.")
    return None


def _not_shared(text: str) -> Blocker:
    remedy = "Use a ReadWriteMany claim, or bind all pods to the claim's node by compute.pod.nodeSelector."
    return Blocker(JobReason.VOLUME_NOT_SHARED, f"A claim can be mounted on another node only: {_quote(text)}. {remedy}")


def _missing_secret(text: str) -> Blocker | None:
    if (found := MISSING_KEY.search(text)) is not None:
        secret = found[2].rpartition("/")[2]
        return Blocker(JobReason.SECRET_NOT_FOUND, f"Secret {secret} has no key {found[1]}. Add it.")
    if (found := MISSING_SECRET.search(text)) is not None:
        message = f"Secret {found[1]} does not exist in this namespace. Create it; the pod goes on by itself."
        return Blocker(JobReason.SECRET_NOT_FOUND, message)
    return None


def _quote(text: str) -> str:
    return shortened(text, QUOTE_LIMIT).rstrip(". ")
