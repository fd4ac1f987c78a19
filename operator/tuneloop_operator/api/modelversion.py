"""ModelVersion: the immutable record of one trained artifact, and the one field that changes: its approval."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tuneloop_operator.api.definitions import Column, Definition, condition, immutable
from tuneloop_operator.api.finetunejob import EvaluationStatus
from tuneloop_operator.api.types import Condition, Digest, Metadata, Model, Name, Source, keyed_by, rules, sentence

KIND = "ModelVersion"
PLURAL = "modelversions"
SHORT_NAME = "mv"


class Artifact(Model):
    """What was trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!has(self.rank) || self.format == 'Adapter'", "rank is an adapter's: leave it out, or set format: Adapter.")
        )
    )

    uri: str = Field(
        pattern=r"^pvc://[^ ]+$",
        max_length=512,
        description="Folder of the model.",
        json_schema_extra=sentence("must be pvc://claim/folder, without '..'.", "!self.contains('..')"),
    )
    manifest_digest: Digest = Field(description="sha256 of its manifest.")
    format: Literal["Adapter", "Merged"] = Field(description="Adapter: needs the base. Merged: complete.")
    size_bytes: int = Field(ge=0, description="Bytes of all files.")
    rank: int | None = Field(
        default=None, ge=1, le=512, description="Rank of an adapter; the engine makes room for it. Absent: that of the lineage, or 32."
    )


class BaseRef(Model):
    """The base model."""

    source: Source = Field(description="Where it came from.")
    digest: str | None = Field(default=None, max_length=80, description="sha256 over its files.")
    snapshot_uri: Annotated[
        str | None,
        Field(
            pattern=r"^pvc://[^ ]+$",
            max_length=512,
            json_schema_extra=sentence("must be pvc://claim/folder, without '..'.", "!self.contains('..')"),
        ),
    ] = Field(default=None, description="Where the training keeps a base of the hub: engines read it there, and need no network.")


class Lineage(Model):
    """Where the version came from."""

    fine_tune_job: str = Field(max_length=63, description="Name of the job.")
    fine_tune_job_uid: str = Field(max_length=64, description="UID of the job.")
    spec: dict[str, Any] = Field(
        description="The job's spec.", json_schema_extra={"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    )
    config_digest: str = Field(max_length=80, description="sha256 over what was asked for.")
    dataset_digests: Annotated[dict[str, Annotated[str, Field(max_length=80)]], Field(max_length=16)] = Field(
        default={}, description="sha256 of each source."
    )
    image: str = Field(default="", max_length=512, description="The trainer image.")
    base_digest: str | None = Field(
        default=None, max_length=80, description="Of drawn weights: sha256 over configuration and tokenizer that they were drawn for."
    )
    parent: str | None = Field(default=None, max_length=63, description="The version that it was compared with.")


class VersionPrompt(Model):
    """The prompt that the model was trained with."""

    format: Literal["Chat", "Text"] = Field(default="Chat", description="As in the job.")
    template: str | None = Field(
        default=None, max_length=16384, description="Prompt template over `text`, where the training data had one."
    )
    probe_sha256: str | None = Field(
        default=None, max_length=80, description="sha256 over the tokens of a probe prompt, as training renders it."
    )


class ModelVersionSpec(Model):
    """Immutable but for approval."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.evaluation)"
                " || (has(self.evaluation.artifactDigest) && self.evaluation.artifactDigest == self.artifact.manifestDigest)",
                "evaluation.artifactDigest must equal artifact.manifestDigest: what is evaluated is what is shipped.",
            ),
            (
                "self.approval == oldSelf.approval || !(oldSelf.approval in ['Rejected', 'Withdrawn'])",
                "approval cannot change any more: Rejected and Withdrawn are final. Train a new version.",
            ),
        )
    )

    model: Name = Field(description="Name of the model.")
    version: int = Field(ge=1, description="Number of the version.")
    artifact: Artifact = Field(description="What was trained.")
    base: BaseRef | None = Field(default=None, description="The base model.")
    lineage: Lineage | None = Field(default=None, description="Where it came from; absent = trained elsewhere.")
    evaluation: EvaluationStatus | None = Field(default=None, description="What its gates said.")
    probes_uri: str | None = Field(default=None, max_length=512, description="Items with the evaluator's answers, asked before traffic.")
    reference_uri: str | None = Field(default=None, max_length=512, description="A sample of the training inputs, for live ones.")
    prompt: VersionPrompt = Field(default=VersionPrompt(), description="The prompt it was trained with.")
    approval: Literal["Pending", "Approved", "Rejected", "Withdrawn"] = Field(
        default="Pending", description="Approved versions may be served as the latest."
    )


class ModelVersionStatus(Model):
    """What was observed."""

    observed_generation: int = Field(default=0, description="Generation of the spec that this status speaks of.")
    conditions: Annotated[tuple[Condition, ...], Field(max_length=8)] = Field(
        default=(), description="Verified, InUse.", json_schema_extra=keyed_by("type")
    )
    served_by: Annotated[tuple[Annotated[str, Field(max_length=63)], ...], Field(max_length=64)] = Field(
        default=(), description="ModelDeployments that serve it."
    )


class ModelVersion(Model):
    """One trained artifact."""

    metadata: Metadata
    spec: ModelVersionSpec
    status: ModelVersionStatus = ModelVersionStatus()


DEFINITION = Definition(
    kind=KIND,
    plural=PLURAL,
    short_name=SHORT_NAME,
    model=ModelVersion,
    columns=(
        Column("Model", ".spec.model"),
        Column("Version", ".spec.version", "integer"),
        Column("Approval", ".spec.approval"),
        Column("Verdict", ".spec.evaluation.verdict"),
        Column("Verified", condition("Verified")),
        Column("In use", condition("InUse")),
        Column("Age", ".metadata.creationTimestamp", "date"),
        Column("Job", ".spec.lineage.fineTuneJob", priority=1),
        Column("Format", ".spec.artifact.format", priority=1),
    ),
    rules=(
        {
            "rule": "self.metadata.name == '%s-v%d'.format([self.spec.model, self.spec.version])",
            "message": "metadata.name must be <spec.model>-v<spec.version>.",
        },
        *immutable(
            ModelVersionSpec,
            "approval",
            path=".spec",
            when="",
            message="{field} cannot change: a ModelVersion is the record of one artifact. Only approval can.",
        ),
    ),
)
