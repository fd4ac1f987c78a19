"""After evaluation: the version's number, its approval, and the end of the job; and the job that need not train at all."""

from __future__ import annotations

from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain.finetunejob import findings
from tuneloop_operator.domain.finetunejob.attempts import Active, Done, Over
from tuneloop_operator.domain.finetunejob.case import Case, Standing
from tuneloop_operator.domain.finetunejob.folding import fold
from tuneloop_operator.domain.finetunejob.resolve import moved_baseline, spec_content
from tuneloop_operator.domain.finetunejob.stages import advance
from tuneloop_operator.domain.finetunejob.suites import exhausted, exhausted_sentence
from tuneloop_operator.render import names, versions
from tuneloop_trainer.contract import REFERENCE_FILE, Stage

VERDICT_REASONS = {
    "Pass": JobReason.GATE_PASSED,
    "Fail": JobReason.GATE_FAILED,
    "Inconclusive": JobReason.GATE_INCONCLUSIVE,
    "NoGates": JobReason.NO_GATES,
}
SOON = 1.0


def already_trained(case: Case) -> Standing | None:
    """A job that was deleted and made again, by Git for example, ends at once where its model exists."""
    if case.status.started_at is not None:
        return None
    same = next((version for version in reversed(_own_model(case)) if _is_of_equal_lineage(case, version)), None)
    if same is None:
        return None
    case.learn(model_version=same.spec.version)
    message = f"{same.metadata.name} was trained by a job of this name from the same data, base and settings; nothing is trained again."
    return Standing("Succeeded", JobReason.ALREADY_TRAINED, message, succeeded=True, ended=True)


def baseline_moved(case: Case) -> Standing | None:
    """The gate is run again where the baseline's deployment serves another version by now."""
    if case.status.model_version is not None or isinstance(case.verdict(Stage.EVALUATE), (Active, Over)):
        return None
    moved = moved_baseline(case.snapshot, case.resolved.baseline)
    if moved is None:
        return None
    case.learn(resolved=case.resolved.model_copy(update={"baseline": moved}), evaluation=None)
    fold(case)
    return advance(case, Stage.EVALUATE, case.verdict(Stage.EVALUATE))


def version(case: Case) -> Standing:
    """The number is written first, the object is made by the next pass, and the job ends when it is seen."""
    made = next((found for found in _own_model(case) if _is_own(case, found)), None)
    if made is not None:
        case.learn(model_version=made.spec.version)
        return _succeeded(case, made)
    if not _is_what_was_packaged(case):
        message = "The evaluation speaks of another artifact than the one that was packaged. Look at the logs of both stages."
        return Standing("Failed", JobReason.INTERNAL_ERROR, message, is_stalled=True, succeeded=False, ended=True)
    taken = {found.spec.version for found in _own_model(case)}
    number = case.status.model_version
    if number is None or number in taken:
        number = max(taken, default=0) + 1
        case.learn(model_version=number)
    else:
        case.create.append(_manifest(case, number))
    return Standing("Evaluating", JobReason.EVALUATING, f"Version {number} is being recorded.", requeue_after=SOON)


def _is_what_was_packaged(case: Case) -> bool:
    artifact, evaluation = case.status.artifact, case.status.evaluation
    return artifact is not None and evaluation is not None and evaluation.artifact_digest == artifact.manifest_digest


def _manifest(case: Case, number: int) -> dict[str, object]:
    job = case.job.model_copy(update={"status": case.status})
    spec = spec_content(case.job.spec)
    spec.get("runPolicy", {}).pop("suspend", None)
    if case.resolved.base_revision is not None:
        starting = spec["baseModel"]
        (starting if "uri" in starting else starting["tokenizer"]["source"])["revision"] = case.resolved.base_revision
    verdict = case.verdict(Stage.EVALUATE)
    summary = verdict.result.evaluate if isinstance(verdict, Done) else None
    probes = _probes_uri(case, summary.probes if summary is not None else None)
    full = verdict.result.uri if isinstance(verdict, Done) and summary is not None and summary.has_reference else None
    reference = _probes_uri(case, f"{full.rpartition('/')[0]}/{REFERENCE_FILE}" if full else None)
    return versions.model_version(job, spec, case.resolved, number, _approval(case), probes, reference)


def _approval(case: Case) -> versions.Approval:
    """By the gates; a person's word is needed where the job says so, or the gates do not say anything, or may not any more."""
    evaluation = case.status.evaluation
    if evaluation is None:
        return "Pending"
    if evaluation.verdict == "Fail":
        return "Rejected"
    is_decided = evaluation.verdict == "Pass" and not exhausted(evaluation)
    return "Approved" if is_decided and case.job.spec.approval == "Automatic" else "Pending"


def _probes_uri(case: Case, path: str | None) -> str | None:
    """A path inside this run's store as a uri; anything else is not believed."""
    folders = case.config().paths
    uri = names.pvc_uri(path)
    return uri if uri is not None and path is not None and path.startswith((f"{folders.work}/", f"{folders.artifact}/")) else None


def _succeeded(case: Case, made: ModelVersion) -> Standing:
    evaluation = made.spec.evaluation
    reason = VERDICT_REASONS.get(evaluation.verdict, JobReason.COMPLETED) if evaluation is not None else JobReason.COMPLETED
    if reason is JobReason.GATE_PASSED:
        reason = JobReason.COMPLETED
    words = findings.verdict_sentence(evaluation) if evaluation is not None else ""
    spent = exhausted(evaluation) if evaluation is not None else ()
    if spent:
        reason, words = JobReason.SUITE_EXHAUSTED, f"{exhausted_sentence(spent, made.metadata.name)} {words}"
    message = f"{made.metadata.name} is {made.spec.approval}. {words}"
    return Standing("Succeeded", reason, message, succeeded=True, ended=True)


def _own_model(case: Case) -> list[ModelVersion]:
    of_model = [found for found in case.snapshot.versions if found.spec.model == case.job.spec.output.model]
    return sorted(of_model, key=lambda found: found.spec.version)


def _is_own(case: Case, found: ModelVersion) -> bool:
    return found.spec.lineage is not None and found.spec.lineage.fine_tune_job_uid == case.job.metadata.uid


def _is_of_equal_lineage(case: Case, found: ModelVersion) -> bool:
    lineage, resolved = found.spec.lineage, case.resolved
    if lineage is None or resolved.base_digest is None:
        return False
    base_digest = found.spec.base.digest if found.spec.base is not None else lineage.base_digest
    return (
        lineage.fine_tune_job == case.job.metadata.name
        and lineage.fine_tune_job_uid != case.job.metadata.uid
        and lineage.config_digest == resolved.config_digest
        and lineage.dataset_digests == resolved.dataset_digests
        and base_digest == resolved.base_digest
    )
