"""Inputs that are resolved once and pinned in status, so that a running job cannot drift: image, baseline, and what was asked for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tuneloop_operator.api import modelversion
from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.api.finetunejob import FineTuneJobSpec, PinnedBaseline, Resolved
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.api.rowsources import PLACES
from tuneloop_operator.domain.decision import Invalid, WaitingFor
from tuneloop_operator.domain.finetunejob.snapshot import FineTuneJobSnapshot
from tuneloop_operator.render import names
from tuneloop_operator.render.run_config import row_sources
from tuneloop_operator.settings import Settings
from tuneloop_trainer.contract import parse_arguments

BASELINE_SECONDS = 30.0
BASE = PinnedBaseline(type="Base", name="base")


def resolve(snapshot: FineTuneJobSnapshot, settings: Settings) -> Resolved:
    """What the job's stages use. Raises Invalid, or WaitingFor where the baseline is not there yet."""
    pinned = snapshot.job.status.resolved
    if snapshot.job.status.started_at is not None:
        return pinned
    refuse_unreadable(snapshot.job.spec)
    digest = config_digest(snapshot.job.spec)
    if pinned.config_digest == digest:
        return pinned.model_copy(update={"image": settings.trainer_image})
    # Until training has started an edited spec is another job: nothing of what was pinned for the old one counts.
    return Resolved(image=settings.trainer_image, config_digest=digest, baseline=pin_baseline(snapshot))


def refuse_unreadable(spec: FineTuneJobSpec) -> None:
    """What no Job is made for: what the schema refuses by now, of a job that was made under an earlier one, and what it does not say.
    Raises Invalid."""
    for source in row_sources(spec):
        if not source.uri.startswith(PLACES):
            raise Invalid(JobReason.DATA_INVALID, f"Rows are read from {', '.join(PLACES)} only, not from {source.uri}.")
    try:
        parse_arguments(spec.objective.type, spec.training.extra_arguments)
    except ValueError as error:
        raise Invalid(JobReason.INVALID_ARGUMENT, str(error)) from error


def config_digest(spec: FineTuneJobSpec) -> str:
    """sha256 over what was asked for: all but how and where it is run, and who approves it. Defaults are left out, so that a field
    that a later version adds changes no digest of an old spec."""
    asked = spec_content(spec)
    for field in ("runPolicy", "approval"):
        asked.pop(field, None)
    compute = {field: value for field, value in asked.pop("compute", {}).items() if field not in ("pod", "costPerAcceleratorHour")}
    if compute:
        asked["compute"] = compute
    asked["data"].pop("workers", None)
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def spec_content(spec: FineTuneJobSpec) -> dict[str, Any]:
    """The spec as JSON, without defaults."""
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


def pin_baseline(snapshot: FineTuneJobSnapshot) -> PinnedBaseline:
    """The baseline as it is now. Raises WaitingFor."""
    asked = snapshot.job.spec.evaluation.baseline
    if asked.type == "Base" or asked.name is None:
        return BASE
    if asked.type == "Deployment":
        return _pin(_stable_version(snapshot, asked.name))
    version = _version(snapshot, asked.name)
    if version is None:
        raise _missing(f"ModelVersion {asked.name} does not exist. Create it, or change evaluation.baseline.")
    return _pin(version)


def moved_baseline(snapshot: FineTuneJobSnapshot, pinned: PinnedBaseline | None) -> PinnedBaseline | None:
    """What the baseline's deployment serves by now, if that is not what was pinned."""
    asked = snapshot.job.spec.evaluation.baseline
    if asked.type != "Deployment" or snapshot.deployment is None or snapshot.deployment.status.stable is None:
        return None
    number = snapshot.deployment.status.stable.version
    served = _version(snapshot, names.model_version(snapshot.deployment.spec.model.name, number)) if number is not None else None
    if served is None or (pinned is not None and pinned.name == served.metadata.name):
        return None
    return _pin(served)


def _stable_version(snapshot: FineTuneJobSnapshot, name: str) -> ModelVersion:
    deployment = snapshot.deployment
    if deployment is None:
        raise _missing(f"ModelDeployment {name} of evaluation.baseline does not exist. Create it.")
    number = deployment.status.stable.version if deployment.status.stable is not None else None
    if number is None:
        raise _missing(f"ModelDeployment {name} of evaluation.baseline serves no version yet.")
    version = _version(snapshot, names.model_version(deployment.spec.model.name, number))
    if version is None:
        raise _missing(f"The version that ModelDeployment {name} serves no longer exists.")
    return version


def _missing(message: str) -> WaitingFor:
    return WaitingFor(JobReason.MODEL_NOT_FOUND, message, BASELINE_SECONDS)


def _version(snapshot: FineTuneJobSnapshot, name: str) -> ModelVersion | None:
    return next((version for version in snapshot.versions if version.metadata.name == name), None)


def _pin(version: ModelVersion) -> PinnedBaseline:
    base: modelversion.BaseRef | None = version.spec.base
    return PinnedBaseline(
        type="ModelVersion",
        name=version.metadata.name,
        artifact_uri=version.spec.artifact.uri,
        manifest_digest=version.spec.artifact.manifest_digest,
        format=version.spec.artifact.format,
        base_uri=base.source.uri if base is not None else None,
        base_revision=base.source.revision if base is not None else None,
    )
