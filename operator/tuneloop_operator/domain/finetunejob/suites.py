"""How often a set of evaluation items has decided: after so many promotions its level is spent, and a person or new items must decide."""

from __future__ import annotations

from collections.abc import Sequence

from tuneloop_operator.api.finetunejob import EvaluationStatus, GateStatus
from tuneloop_operator.api.modelversion import ModelVersion

MAX_USES = 5
"""Promotions of one model that one version of a suite decides; each is tested at alpha / 5, so that alpha bounds them all."""
DECIDED = ("Approved", "Withdrawn")
"""A version that was withdrawn later was approved on the suite's word all the same."""


def with_uses(evaluation: EvaluationStatus, digests: dict[str, str], versions: Sequence[ModelVersion], own_uid: str) -> EvaluationStatus:
    """The evaluation, each gate with its suite's digest and how many promotions of the model that digest has decided before.

    `versions`: of the model; one made by the job itself does not count.
    """
    gates = tuple(_with_use(gate, digests.get(gate.suite), versions, own_uid) for gate in evaluation.gates)
    return evaluation.model_copy(update={"gates": gates})


def _with_use(gate: GateStatus, digest: str | None, versions: Sequence[ModelVersion], own_uid: str) -> GateStatus:
    if digest is None:
        return gate  # a job whose data was prepared before digests were told
    uses = sum(_is_promoted_by(version, digest) and not _is_made_by(version, own_uid) for version in versions)
    return gate.model_copy(update={"suite_digest": digest, "uses": uses})


def _is_promoted_by(version: ModelVersion, digest: str) -> bool:
    """Whatever the suite was called there: its items make it what it is."""
    evaluation = version.spec.evaluation
    return version.spec.approval in DECIDED and evaluation is not None and any(gate.suite_digest == digest for gate in evaluation.gates)


def _is_made_by(version: ModelVersion, uid: str) -> bool:
    return version.spec.lineage is not None and version.spec.lineage.fine_tune_job_uid == uid


def exhausted(evaluation: EvaluationStatus) -> tuple[str, ...]:
    """Suites that may not decide any more, where they would: a verdict that promotes nothing needs no level."""
    if evaluation.verdict != "Pass":
        return ()
    return tuple(sorted({gate.suite for gate in evaluation.gates if gate.uses is not None and gate.uses >= MAX_USES}))


def exhausted_sentence(suites: Sequence[str], version: str) -> str:
    """What to do where suites are exhausted."""
    named = f"suite {suites[0]} has" if len(suites) == 1 else f"suites {', '.join(suites)} have"
    return (
        f"The gates passed, but {named} decided {MAX_USES} promotions of this model already: chance may have passed them by now. "
        f"Give evaluation.suites new items in a new FineTuneJob, or set spec.approval of ModelVersion {version} to Approved yourself."
    )
