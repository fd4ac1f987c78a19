"""Which version a deployment should serve: the pinned one, or the highest that is approved, verified and not rejected here.

A pinned version needs a person's approval alone: a model that was trained elsewhere has no evaluation that could be verified.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuneloop_operator.api.conditions import DeploymentReason, VersionCondition
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain import conditions
from tuneloop_operator.domain.modeldeployment.revisions import revision_of
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render.revisions import Revision


@dataclass(frozen=True)
class Target:
    """What should be served, or why nothing new should."""

    version: ModelVersion | None = None
    reason: DeploymentReason | None = None
    """Why there is no version; with a version, RolledBack where a higher one was rejected here."""
    message: str = ""
    is_final: bool = False
    """The user must act: nobody else will bring what is missing."""


def resolve(snapshot: Snapshot, stable: Revision | None) -> Target:
    """The target by the spec, the versions and what was rejected here."""
    if snapshot.deployment.spec.model.version is None:
        return _latest(snapshot, stable)
    return _pinned(snapshot, stable, snapshot.deployment.spec.model.version)


def is_servable(version: ModelVersion) -> bool:
    """Approved, and what is shipped is what was evaluated."""
    return version.spec.approval == "Approved" and conditions.is_true(version.status.conditions, VersionCondition.VERIFIED)


def rejection(snapshot: Snapshot, version: ModelVersion) -> Revision | None:
    """The revision of this version under the current spec, if it was rejected."""
    revision = revision_of(snapshot.deployment, version, snapshot.revisions)
    return revision if revision is not None and revision.is_rejected else None


# --- a pinned version --------------------------------------------------------


def _pinned(snapshot: Snapshot, stable: Revision | None, number: int) -> Target:
    model = snapshot.deployment.spec.model.name
    version = snapshot.version(number)
    if version is None:
        message = f"Model {model} has no version {number}; {_known(snapshot)} Set spec.model.version to one of them, or leave it out."
        return Target(reason=DeploymentReason.VERSION_NOT_FOUND, message=message, is_final=True)
    rejected = rejection(snapshot, version)
    if rejected is not None:
        return _all_rejected(rejected, stable)
    if version.spec.approval != "Approved":
        return Target(reason=_unapproved_reason(version), message=_unapproved_text(version), is_final=True)
    return Target(version=version)


def _unapproved_reason(version: ModelVersion) -> DeploymentReason:
    is_withdrawn = version.spec.approval == "Withdrawn"
    return DeploymentReason.WITHDRAWN if is_withdrawn else DeploymentReason.NO_APPROVED_VERSION


def _unapproved_text(version: ModelVersion) -> str:
    name, approval = version.metadata.name, version.spec.approval
    if approval == "Pending":
        return f"ModelVersion {name} is not approved: set its spec.approval to Approved, or serve another version."
    return f"ModelVersion {name} is {approval.lower()}: serve another version."


# --- the latest version ------------------------------------------------------


def _latest(snapshot: Snapshot, stable: Revision | None) -> Target:
    """Descends from the highest version. A rejected one is passed over; but below a stable version that may still be served nothing
    is tried: what was rejected then is this spec, not that version."""
    servable = sorted((v for v in snapshot.versions if is_servable(v)), key=lambda v: v.spec.version, reverse=True)
    if not servable:
        return _none_servable(snapshot)
    stable_number = stable.pinned.version if stable is not None else None
    passed: Revision | None = None
    for version in servable:
        rejected = rejection(snapshot, version)
        if rejected is None:
            if passed is None:
                return Target(version=version)
            message = _rejected_text(passed, stable)
            return Target(version=version, reason=DeploymentReason.ROLLED_BACK, message=message)
        passed = passed or rejected
        if version.spec.version == stable_number:
            return _all_rejected(rejected, stable)
    assert passed is not None  # the loop saw at least one version
    return _all_rejected(passed, stable)


def _none_servable(snapshot: Snapshot) -> Target:
    model = snapshot.deployment.spec.model.name
    pending = [v for v in snapshot.versions if v.spec.approval == "Pending"]
    if pending:
        newest = max(pending, key=lambda v: v.spec.version).metadata.name
        hint = f"Set spec.approval of ModelVersion {newest} to Approved, or wait for a job whose gates pass."
    else:
        hint = f"A FineTuneJob with output.model: {model} whose gates pass makes one."
    message = f"Model {model} has no version that is approved and verified; {_known(snapshot)} {hint}"
    return Target(reason=DeploymentReason.NO_APPROVED_VERSION, message=message)


def _all_rejected(rejected: Revision, stable: Revision | None) -> Target:
    """Nothing is left to try. Where nothing served before, nothing was rolled back: the reason is that of the rejection."""
    reason = DeploymentReason.ROLLED_BACK
    if stable is None and rejected.verdict is not None and rejected.verdict.reason in set(DeploymentReason):
        reason = DeploymentReason(rejected.verdict.reason)
    return Target(reason=reason, message=_rejected_text(rejected, stable), is_final=True)


# --- sentences ---------------------------------------------------------------


def _known(snapshot: Snapshot) -> str:
    numbers = sorted(v.spec.version for v in snapshot.versions)
    if not numbers:
        return "it has none yet."
    newest = ", ".join(map(str, numbers[-5:]))
    return f"it has {newest}." if len(numbers) <= 5 else f"its newest are {newest}."


def _rejected_text(rejected: Revision, stable: Revision | None) -> str:
    verdict = rejected.verdict
    assert verdict is not None  # rejected revisions have one
    number = rejected.pinned.version
    if stable is not None and stable.pinned.version == number:
        return f"Version {number} was rejected under the new spec ({verdict.reason}): {verdict.message} It serves on under the old one."
    serving = f" Version {stable.pinned.version} serves on." if stable is not None else ""
    return f"Version {number} was rejected here ({verdict.reason}): {verdict.message}{serving}"
