"""ModelDeployment: one served model behind one stable URL."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tuneloop_operator.api.definitions import NAME_RULE, Column, Definition, Scale, condition
from tuneloop_operator.api.engineoptions import option_rules
from tuneloop_operator.api.types import (
    ClaimFolder,
    Condition,
    Half,
    Metadata,
    Model,
    ModelRef,
    Number,
    PodOverrides,
    Positive,
    Quantity,
    SecretName,
    SecretRef,
    Share,
    decimal,
    keyed_by,
    rules,
    sentence,
)

KIND = "ModelDeployment"
PLURAL = "modeldeployments"
SHORT_NAME = "mdep"


class FewShot(Model):
    """One example."""

    input: str = Field(max_length=8192, description="User turn.")
    output: str = Field(max_length=8192, description="Assistant turn.")


class PromptParameters(Model):
    """Defaults for what a request does not set."""

    temperature: Number | None = Field(default=None, description="Sampling temperature.")
    max_tokens: int | None = Field(default=None, ge=1, le=131_072, description="Longest answer.")


class Prompt(Model):
    """What the gateway adds to a request."""

    system: str | None = Field(default=None, max_length=16384, description="System message, unless the request has one.")
    template: str | None = Field(default=None, max_length=16384, description="Sandboxed Jinja over `text`, the last user message.")
    few_shot: Annotated[tuple[FewShot, ...], Field(max_length=32)] = Field(default=(), description="Examples before the last user message.")
    parameters: PromptParameters = Field(default=PromptParameters(), description="Defaults of sampling.")


OptionValue = Annotated[str, Field(max_length=256)]


class CompileCache(Model):
    """Where engines keep what they compile."""

    uri: ClaimFolder = Field(
        description="pvc://claim or pvc://claim/folder, not the models' claim. Who may write there can run code in the engine."
    )


class Engine(Model):
    """The vLLM engine."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.nodesPerReplica == 1 || self.acceleratorsPerReplica >= 1",
                "nodesPerReplica above 1 needs acceleratorsPerReplica of 1 or more: an engine on the CPU has one node.",
            )
        )
    )

    image: str | None = Field(
        default=None, max_length=512, description="Image with vLLM. Absent: the operator's, pinned when a revision is made."
    )
    replicas: int = Field(
        default=1, ge=0, le=64, description="Engine pods of the stable revision: the scale path. 0 only with autoscaling.minReplicas: 0."
    )
    accelerators_per_replica: int = Field(default=1, ge=0, le=16, description="Devices of a pod; 0 serves on the CPU.")
    nodes_per_replica: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Pods that are one replica together, each on a node of its own: a LeaderWorkerSet, where the cluster has them.",
    )
    accelerator_resource: str = Field(default="nvidia.com/gpu", max_length=128, description="Resource name of the devices.")
    max_model_length: int | None = Field(default=None, ge=16, le=1_048_576, description="Longest prompt and answer together, in tokens.")
    options: Annotated[dict[Annotated[str, Field(max_length=64)], OptionValue], Field(max_length=32)] = Field(
        default={},
        description="Engine options by name, from an allow-list: dtype, max-num-seqs, gpu-memory-utilization, enforce-eager, …",
        json_schema_extra=rules(*option_rules()),
    )
    compile_cache: CompileCache | None = Field(
        default=None, description="Keeps compiled kernels for the next pod and the next version. Absent: each pod compiles."
    )
    startup_timeout_seconds: int = Field(default=1200, ge=30, le=14_400, description="Time that a pod has until it is ready.")
    pod: PodOverrides = Field(default=PodOverrides(), description="Overrides for the engine's pods.")


class ReplicaSchedule(Model):
    """A time in which at least so many replicas run."""

    start: str = Field(max_length=64, description="Cron expression of its beginning, for example '0 8 * * 1-5'.")
    end: str = Field(max_length=64, description="Cron expression of its end.")
    timezone: str = Field(default="UTC", max_length=64, description="Of both, for example Europe/Berlin.")
    replicas: int = Field(ge=1, le=64, description="Engine pods at least.")


class Autoscaling(Model):
    """Between which bounds the engine is scaled, and when it sleeps."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.minReplicas <= self.maxReplicas", "maxReplicas must not be below minReplicas."),
            (
                "!has(self.schedule) || self.schedule.all(time, time.replicas <= self.maxReplicas)",
                "schedule.replicas must not be above maxReplicas.",
            ),
        )
    )

    min_replicas: int = Field(
        default=1, ge=0, le=64, description="0: the engine is stopped while nobody asks, and the next request starts it and waits for it."
    )
    max_replicas: int = Field(ge=1, le=64, description="Engine pods at most.")
    waiting_requests: int = Field(
        default=5,
        ge=1,
        le=100_000,
        description="With KEDA and Prometheus: requests that may wait for each engine pod.",
    )
    schedule: Annotated[tuple[ReplicaSchedule, ...], Field(max_length=16)] = Field(
        default=(), description="With KEDA: times in which more replicas run."
    )
    idle_seconds: int = Field(
        default=600, ge=1, le=86_400, description="With minReplicas: 0: seconds without a request after which the engine is stopped."
    )
    hold_seconds: int = Field(
        default=300,
        ge=1,
        le=14_400,
        description="With minReplicas: 0: how long a request waits for an engine that starts, before it is answered 503.",
    )


PositiveShare = Annotated[
    str, decimal("must be a number above 0 and up to 1, as a string, for example '0.02'.", "double(self) > 0.0 && double(self) <= 1.0")
]


class RolloutStep(Model):
    """One step of a canary."""

    weight: int = Field(ge=1, le=99, description="Percent of the traffic.")
    min_requests: int = Field(default=200, ge=1, le=1_000_000, description="Requests of the canary that the step needs at least.")


class RolloutAnalysis(Model):
    """How much worse than the stable revision a canary may be, over the same time."""

    false_rollback_probability: PositiveShare = Field(
        default="0.05", description="How often chance may stop a canary that is within the limits; split over checks and steps."
    )
    max_error_ratio_increase: PositiveShare = Field(
        default="0.01", description="Added to the ratio of errors: 5xx, aborted, failed and broken answers."
    )
    max_time_to_first_token_increase: Number = Field(default="0.2", description="Share by which a first token may come later.")
    max_inter_token_latency_increase: Number = Field(default="0.2", description="Share by which the time between tokens may be longer.")
    max_harm_increase: PositiveShare = Field(default="0.02", description="Added to the share of thumbs down.")
    min_feedback: int = Field(default=50, ge=1, le=100_000, description="Thumbs on each side before harm is looked at.")
    timeout_seconds: int = Field(default=3600, ge=1, le=2_592_000, description="A step without a finding after this time is inconclusive.")


STEPS = tuple(RolloutStep(weight=weight, min_requests=least) for weight, least in ((5, 200), (25, 500), (50, 1000)))


class Rollout(Model):
    """How a new revision takes over."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.surge != 'Never' || self.allowDowntime", "surge: Never stops the engine before: set allowDowntime: true as well.")
        )
    )

    strategy: Literal["BlueGreen", "Canary", "Recreate"] = Field(
        default="BlueGreen",
        description="BlueGreen: all traffic at once, after the new revision is ready and has passed its probes. Canary: then step by"
        " step, as long as its requests are no worse than the stable revision's. Recreate: the engine before is stopped first, where"
        " there are no devices for two; requests wait up to 15 s, and are then answered 503.",
    )
    steps: Annotated[tuple[RolloutStep, ...], Field(min_length=1, max_length=16)] = Field(
        default=STEPS,
        description="Of a canary. After the last one it takes all traffic.",
        json_schema_extra=rules(("self.map(step, step.weight).isSorted()", "steps must rise in weight.")),
    )
    affinity: Literal["Session", "Request"] = Field(
        default="Session",
        description="What stays on one revision. Session: what one caller sends with one x-tuneloop-session header or first user message.",
    )
    analysis: RolloutAnalysis = Field(default=RolloutAnalysis(), description="What a canary is measured by.")
    on_inconclusive: Literal["Hold", "Promote", "Rollback"] = Field(
        default="Hold", description="What happens to a step that is inconclusive. Hold: it stays as it is until there is a finding."
    )
    surge: Literal["Auto", "Always", "Never"] = Field(
        default="Auto",
        description="Whether a second engine runs beside it. Auto: unless it finds no node and downtime is allowed. Never: in place.",
    )
    surge_timeout_seconds: int = Field(default=300, ge=0, le=86_400, description="How long a second engine may look for a node.")
    allow_downtime: bool = Field(
        default=False, description="Stop the engine before where there is no device for a second one; requests wait up to 15 s meanwhile."
    )
    keep_previous_seconds: int = Field(
        default=600, ge=0, le=86_400, description="How long the engine before stays warm: only then is going back immediate."
    )


class ApiKeys(Model):
    """Keys of the API."""

    secret_ref: SecretRef = Field(description="Secret with one key per entry; an entry named `reviewer.<name>` may correct answers.")


class Auth(Model):
    """Who may use the API."""

    api_keys: ApiKeys | None = Field(default=None, description="Absent: everybody who reaches the Service.")
    requests_per_minute: int | None = Field(
        default=None, ge=1, le=1_000_000, description="For each key, over all gateway replicas. Without keys: for all callers together."
    )
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Likewise, of prompts and answers together. Counted when an answer ends: a key that used more waits until it is even.",
    )


class DatabaseSecret(Model):
    """A Secret's key that holds an SQLAlchemy URL."""

    name: SecretName = Field(description="Name of the Secret.")
    key: str = Field(default="url", max_length=253, description="Key in it.")


class DatabaseVolume(Model):
    """The claim of the SQLite database."""

    size: Quantity = Field(default="10Gi", description="Size of the claim.")
    storage_class_name: str | None = Field(default=None, max_length=253, description="Absent: the default class.")
    retention_policy: Literal["Retain", "Delete"] = Field(default="Retain", description="Retain: captured data survives this object.")


class Database(Model):
    """Where captured traffic and feedback are kept."""

    model_config = ConfigDict(
        json_schema_extra=rules(("!(has(self.secretRef) && has(self.volume))", "secretRef and volume exclude each other."))
    )

    secret_ref: DatabaseSecret | None = Field(default=None, description="A PostgreSQL database.")
    volume: DatabaseVolume | None = Field(default=None, description="SQLite on a claim.")


class Capture(Model):
    """What is kept of the traffic."""

    sample_rate: Share = Field(default="1", description="Share of the requests, 0 to 1.")
    personal_data: Literal["Redact", "Keep"] = Field(
        default="Redact", description="Redact mail addresses, numbers and the like before storing."
    )
    retention_days: int = Field(default=30, ge=1, le=3650, description="Days until captured texts are deleted.")
    database: Database = Field(default=Database(), description="Absent: SQLite on a claim of 10Gi.")


class Feedback(Model):
    """Safeguards of the feedback."""

    max_share_of_one_subject: PositiveShare = Field(
        default="0.02", description="Largest share of the exported rows that one subject may have given."
    )


class Tracing(Model):
    """Spans of requests by OpenTelemetry, without their texts."""

    endpoint: str = Field(
        pattern=r"^https?://[A-Za-z0-9]([-A-Za-z0-9.:]*[A-Za-z0-9])?(/[A-Za-z0-9._/-]*)?$",
        max_length=512,
        json_schema_extra=sentence("must be the address of an OTLP/HTTP receiver, for example http://collector.observability:4318."),
        description="An OTLP/HTTP receiver, for example http://collector.observability:4318; `/v1/traces` is added.",
    )
    sample_rate: Share = Field(
        default="0.1", description="Share of the requests that are traced, where their sender's `traceparent` does not say."
    )


class Gateway(Model):
    """The front of the deployment."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.replicas == 1 || (has(self.capture) && has(self.capture.database) && has(self.capture.database.secretRef))",
                "more than one gateway replica needs a database: set gateway.capture.database.secretRef.",
            ),
        )
    )

    replicas: int = Field(default=1, ge=1, le=32, description="Gateway pods; more than one needs a database.")
    auth: Auth = Field(default=Auth(), description="Who may use the API.")
    capture: Capture = Field(default=Capture(), description="What is kept of the traffic.")
    feedback: Feedback = Field(default=Feedback(), description="Safeguards of the feedback.")
    tracing: Tracing | None = Field(default=None, description="Absent: no traces.")
    pod: PodOverrides = Field(default=PodOverrides(), description="Overrides for the gateway's pods.")


class DriftSettings(Model):
    """The detector on users' inputs."""

    reference: Literal["Live"] = Field(default="Live", description="Live: sampled from traffic after a version takes all of it.")
    size: int = Field(default=2000, ge=100, le=100_000, description="Rows of the reference.")
    false_alarm_every_requests: int = Field(
        default=100_000, ge=100, description="Sampled requests between false alarms, guaranteed on average."
    )
    minimum_effect: Half = Field(default="0.1", description="Smallest effect (AUC - 0.5) that may retrain.")
    horizon_days: Positive = Field(default="30", description="Days that the reference must last.")
    mix_over_seconds: int = Field(
        default=86_400, ge=0, le=604_800, description="Live rows are drawn from so long a buffer, so that daily cycles are no drift."
    )


class Monitoring(Model):
    """What is watched."""

    source: Literal["Direct", "Prometheus"] = Field(
        default="Direct", description="Where the operator reads the evidence: from the gateway, or from its Prometheus."
    )
    drift: DriftSettings | None = Field(default=None, description="Absent: drift is not watched.")


class Trigger(Model):
    """What starts a retraining."""

    type: Literal["Drift"] = Field(description="Drift: the inputs changed.")


ANYTHING: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}
GATES: dict[str, Any] = {
    "type": "array",
    "maxItems": 16,
    "items": {"type": "object", **ANYTHING},
    "description": "Tests that decide the version's approval.",
}
TEMPLATE_SCHEMA: dict[str, Any] = {
    "type": "object",
    **ANYTHING,
    "properties": {
        "evaluation": {
            "type": "object",
            **ANYTHING,
            "description": "As in a FineTuneJob; with at least one gate.",
            "properties": {"gates": GATES},
        }
    },
}
"""What the rule on gates reads of a template; everything else of it is checked when the job is made."""


class RetrainingTemplate(Model):
    """Merged over the served version's lineage."""

    spec: dict[str, Any] = Field(
        default={},
        description="Fields of a FineTuneJob's spec.",
        json_schema_extra=TEMPLATE_SCHEMA,
    )


class Retraining(Model):
    """When and how a better model is trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.template) || !has(self.template.spec) || !has(self.template.spec.evaluation)"
                " || (has(self.template.spec.evaluation.gates) && size(self.template.spec.evaluation.gates) > 0)",
                "template.spec.evaluation must have gates: a retraining without a gate is refused.",
            ),
        )
    )

    triggers: Annotated[tuple[Trigger, ...], Field(min_length=1, max_length=8)] = Field(description="What starts a retraining.")
    min_new_examples: int = Field(
        default=200, ge=1, le=1_000_000, description="Curated rows since another version took over that a retraining needs."
    )
    approval: Literal["Automatic", "Manual"] = Field(
        default="Automatic", description="Manual: the job is made suspended; un-suspending it is the approval."
    )
    cooldown_seconds: int = Field(default=86_400, ge=0, description="Time between two retrainings.")
    max_runs_per_month: int = Field(default=8, ge=0, le=1000, description="Budget.")
    template: RetrainingTemplate = Field(
        default=RetrainingTemplate(), description="Merged over the served version's lineage.spec; required for models trained elsewhere."
    )


class ModelDeploymentSpec(Model):
    """Which model to serve, how, and when to train a better one."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!has(self.retraining) || (has(self.monitoring) && has(self.monitoring.drift))", "a Drift trigger needs monitoring.drift."),
            (
                "!has(self.engine) || self.engine.replicas > 0 || (has(self.autoscaling) && self.autoscaling.minReplicas == 0)",
                "engine.replicas: 0 needs autoscaling.minReplicas: 0, so that a request starts the engine again.",
            ),
        )
    )

    model: ModelRef = Field(description="Which model.")
    task: Literal["Chat", "Completion"] = Field(default="Chat", description="Chat: /v1/chat/completions. Completion: /v1/completions.")
    prompt: Prompt | None = Field(default=None, description="Absent: the prompt that the version was trained with.")
    engine: Engine = Field(default=Engine(), description="The vLLM engine.")
    autoscaling: Autoscaling | None = Field(default=None, description="Absent: engine.replicas is what runs.")
    rollout: Rollout = Field(default=Rollout(), description="How a new revision takes over.")
    gateway: Gateway = Field(default=Gateway(), description="The front of the deployment.")
    monitoring: Monitoring = Field(default=Monitoring(), description="What is watched.")
    retraining: Retraining | None = Field(default=None, description="Absent: nothing is retrained.")


# --- status ------------------------------------------------------------------


class StartupStatus(Model):
    """How long the engine took, of the replica that took longest; seconds."""

    schedule_seconds: int = Field(default=0, description="Until it had a node.")
    pull_seconds: int = Field(default=0, description="Until its image and volumes were there.")
    fetch_seconds: int = Field(default=0, description="Until the model's files were read and equal to their manifest.")
    load_seconds: int = Field(default=0, description="Until the engine was ready.")
    first_token_seconds: str = Field(default="0", max_length=16, description="Until it had answered the warm-up prompt.")


class RevisionStatus(Model):
    """A revision in use."""

    version: int | None = Field(default=None, description="The ModelVersion's number.")
    revision: str = Field(default="", max_length=63, description="Name of the ControllerRevision.")
    weight: int | None = Field(default=None, description="Percent of the traffic that a canary takes.")
    ready_replicas: int = Field(default=0, description="Ready engine pods.")
    since: str | None = Field(default=None, max_length=32, description="In this role since.")
    startup: StartupStatus | None = Field(default=None, description="How long its engine took to start.")
    message: str = Field(default="", max_length=512, description="What it waits for.")


Verdict = Literal["Pass", "Fail", "Inconclusive"]


class CheckStatus(Model):
    """One comparison of the canary with the stable revision."""

    name: str = Field(max_length=32, description="What is compared.")
    canary: str = Field(default="", max_length=64, description="The canary's figure.")
    stable: str = Field(default="", max_length=64, description="The stable revision's.")
    verdict: Verdict = Field(default="Inconclusive", description="Pass, Fail or Inconclusive.")


class AnalysisStatus(Model):
    """What a running canary's step says; written when a verdict changes or a tenth more requests came."""

    step: int = Field(default=1, description="Number of the step.")
    requests: int = Field(default=0, description="Requests of the canary in this step.")
    verdict: Verdict = Field(default="Inconclusive", description="Of the step.")
    checks: Annotated[tuple[CheckStatus, ...], Field(max_length=16)] = Field(
        default=(), description="Check by check.", json_schema_extra=keyed_by("name")
    )


class DriftStatus(Model):
    """What the detector says."""

    log_evidence: str = Field(default="0", max_length=16, description="Natural logarithm of the evidence; alarm at logThreshold.")
    log_threshold: str = Field(default="0", max_length=16, description="ln(falseAlarmEveryRequests).")
    effect: str = Field(default="0", max_length=16, description="AUC - 0.5 over the last 500 pairs.")
    detected_at: str | None = Field(default=None, max_length=32, description="When the alarm was raised.")
    requests: int = Field(default=0, description="Pairs tested.")


class FeedbackStatus(Model):
    """What people said."""

    up: int = Field(default=0, description="Thumbs up.")
    down: int = Field(default=0, description="Thumbs down.")
    corrections: int = Field(default=0, description="Corrections.")
    curated: int = Field(default=0, description="Rows that a retraining would train on.")
    gate: int = Field(default=0, description="Rows that a retraining would be gated on.")


class RetrainingStatus(Model):
    """The only status that is accumulated, written with a precondition before a job is made."""

    episode: int = Field(default=0, description="Number of the current or last trigger episode.")
    epoch: int = Field(default=0, description="Times that the detector was started afresh.")
    last_trigger: str | None = Field(default=None, max_length=32, description="Drift.")
    last_triggered_at: str | None = Field(default=None, max_length=32, description="When the last job was decided.")
    last_job: str | None = Field(default=None, max_length=63, description="Name of the last retraining job.")
    last_job_uid: str | None = Field(
        default=None, max_length=64, description="Its UID, once it was seen: a job that is deleted is not made again."
    )
    last_rows: int = Field(default=0, description="Curated rows when the last job of this epoch was decided.")
    promoted_rows: int = Field(default=0, description="Curated rows of this epoch that were there when another version took over.")
    runs_this_month: int = Field(default=0, description="Jobs made in `month`.")
    month: str | None = Field(default=None, max_length=7, description="YYYY-MM, UTC.")
    blocked_by: str | None = Field(default=None, max_length=64, description="Why nothing trains.")


class ModelDeploymentStatus(Model):
    """What was observed."""

    observed_generation: int = Field(default=0, description="Generation of the spec that this status speaks of.")
    url: str | None = Field(default=None, max_length=512, description="Where clients send requests.")
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = Field(
        default=(), description="Standard conditions.", json_schema_extra=keyed_by("type")
    )
    stable: RevisionStatus | None = Field(default=None, description="What takes the traffic.")
    canary: RevisionStatus | None = Field(default=None, description="What is being rolled out.")
    analysis: AnalysisStatus | None = Field(default=None, description="What the canary's requests say.")
    drift: DriftStatus | None = Field(default=None, description="What the detector says.")
    feedback: FeedbackStatus | None = Field(default=None, description="What people said.")
    retraining: RetrainingStatus = Field(default=RetrainingStatus(), description="What was retrained.")
    config_generation: int = Field(default=0, description="Generation of the gateway's configuration.")
    replicas: int = Field(default=0, description="Engine pods of the stable revision.")
    selector: str = Field(default="", max_length=512, description="Selector of the stable engine's pods.")


class ModelDeployment(Model):
    """One served model."""

    metadata: Metadata
    spec: ModelDeploymentSpec
    status: ModelDeploymentStatus = ModelDeploymentStatus()


DEFINITION = Definition(
    kind=KIND,
    plural=PLURAL,
    short_name=SHORT_NAME,
    model=ModelDeployment,
    columns=(
        Column("Available", condition("Available")),
        Column("Ready", condition("Ready")),
        Column("Version", ".status.stable.version", "integer"),
        Column("Canary", ".status.canary.version", "integer"),
        Column("Weight", ".status.canary.weight", "integer"),
        Column("Replicas", ".status.replicas", "integer"),
        Column("Drift", condition("DriftDetected")),
        Column("URL", ".status.url"),
        Column("Age", ".metadata.creationTimestamp", "date"),
        Column("Model", ".spec.model.name", priority=1),
        Column("Reason", '.status.conditions[?(@.type=="Ready")].reason', priority=1),
    ),
    rules=(
        NAME_RULE,
        {
            "rule": "!has(self.spec.engine) || self.spec.engine.nodesPerReplica == 1 || self.metadata.name.size() <= 38",
            "message": "metadata.name must be at most 38 characters where engine.nodesPerReplica is above 1: its pods are named by it.",
        },
    ),
    scale=Scale(spec_replicas=".spec.engine.replicas", status_replicas=".status.replicas", selector=".status.selector"),
)
