"""The ModelVersion that a FineTuneJob ends with: made once, and nobody's child, since it outlives the job."""

from __future__ import annotations

from typing import Any, Literal

from tuneloop_operator.api import API_VERSION
from tuneloop_operator.api import finetunejob as api
from tuneloop_operator.api import modelversion as versions
from tuneloop_operator.api.methods import LoRA
from tuneloop_operator.api.objectives import prompt_format
from tuneloop_operator.api.types import Source
from tuneloop_operator.render import names
from tuneloop_operator.render.pods import Json
from tuneloop_operator.render.run_config import base_snapshot_uri

Approval = Literal["Pending", "Approved", "Rejected"]


def model_version(
    job: api.FineTuneJob,
    spec: dict[str, Any],
    resolved: api.Resolved,
    number: int,
    approval: Approval,
    probes_uri: str | None,
    reference_uri: str | None = None,
) -> Json:
    """`spec` is the job's, as it goes into the lineage; artifact and evaluation are those of the job's status."""
    artifact, evaluation = job.status.artifact, job.status.evaluation
    if artifact is None or evaluation is None:
        raise ValueError("a version is made of a packaged and evaluated model")
    lineage = versions.Lineage(
        fine_tune_job=job.metadata.name,
        fine_tune_job_uid=job.metadata.uid,
        spec=spec,
        config_digest=resolved.config_digest or "",
        dataset_digests=resolved.dataset_digests,
        image=resolved.image or "",
        base_digest=resolved.base_digest if job.spec.base_model.uri is None else None,
        parent=resolved.baseline.name if resolved.baseline is not None and resolved.baseline.type == "ModelVersion" else None,
    )
    content = versions.ModelVersionSpec(
        model=job.spec.output.model,
        version=number,
        artifact=versions.Artifact.model_validate({**artifact.model_dump(), "rank": _rank(job.spec, artifact.format)}),
        base=_base(job, resolved),
        lineage=lineage,
        evaluation=evaluation,
        probes_uri=probes_uri,
        reference_uri=reference_uri,
        prompt=versions.VersionPrompt(
            format=prompt_format(job.spec.objective.type, job.spec.prompt_format),
            template=_template(job.spec),
            probe_sha256=resolved.prompt_probe,
        ),
        approval=approval,
    )
    name = names.model_version(job.spec.output.model, number)
    more = {names.JOB_LABEL: job.metadata.name, names.MODEL_LABEL: job.spec.output.model}
    return {
        "apiVersion": API_VERSION,
        "kind": versions.KIND,
        "metadata": {
            "name": name,
            "namespace": job.metadata.namespace,
            "labels": names.labels("modelversion", job.spec.output.model, **more),
            "ownerReferences": [],
        },
        "spec": content.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def _base(job: api.FineTuneJob, resolved: api.Resolved) -> versions.BaseRef | None:
    """None where the weights were drawn: the lineage has the digest of what they were drawn for."""
    source = job.spec.base_model.files
    if source is None or job.spec.base_model.uri is None:
        return None
    pinned = _pinned_source(source, resolved)
    return versions.BaseRef(source=pinned, digest=resolved.base_digest, snapshot_uri=base_snapshot_uri(job, resolved))


def _pinned_source(source: Source, resolved: api.Resolved) -> Source:
    return source.model_copy(update={"revision": resolved.base_revision or source.revision})


def _rank(spec: api.FineTuneJobSpec, format_: str) -> int | None:
    return (spec.method.lora or LoRA()).rank if format_ == "Adapter" and spec.method.type == "LoRA" else None


def _template(spec: api.FineTuneJobSpec) -> str | None:
    """The prompt template over `text` that a gateway can apply: that of the first source which has one."""
    templates = (source.template for source in spec.data.train if source.template is not None)
    return next((template.prompt for template in templates if template.prompt is not None), None)
