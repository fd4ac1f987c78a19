"""FineTuneJob: one run, from data and a base model to one model version."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tuneloop_operator.api.definitions import NAME_RULE, Column, Definition, immutable
from tuneloop_operator.api.methods import Method, Quantization, Vocabulary, method_rules
from tuneloop_operator.api.objectives import Objective, spec_rules
from tuneloop_operator.api.rowsources import RowSource
from tuneloop_operator.api.starting import StartingModel, starting_rules
from tuneloop_operator.api.types import (
    DNS_LABEL,
    Condition,
    Half,
    Metadata,
    Model,
    Name,
    Number,
    PodOverrides,
    Positive,
    SecretRef,
    Share,
    StoreRef,
    decimal,
    keyed_by,
    rules,
    sentence,
)
from tuneloop_trainer.contract import GateMetric, Metric

KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SHORT_NAME = "ftj"


Template = Annotated[str, Field(min_length=1, max_length=16384)]
ObjectName = Annotated[
    str, Field(pattern=DNS_LABEL, max_length=63, json_schema_extra=sentence("must be the name of an object: only a-z, 0-9 and '-'."))
]
ColumnName = Annotated[str, Field(max_length=128)]


class RowTemplate(Model):
    """Sandboxed Jinja over a row's columns."""

    prompt: Template | None = Field(default=None, description="The prompt, for example `Sentiment of: {{ text }}`.")
    completion: Template | None = Field(default=None, description="What the model should answer, for example `{{ label }}`.")
    chosen: Template | None = Field(default=None, description="The better of two answers.")
    rejected: Template | None = Field(default=None, description="The worse of two answers.")
    text: Template | None = Field(default=None, description="The text, where there is no prompt.")


class Columns(Model):
    """Role -> column. A role that is absent is read from the column of the same name."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!has(self.messages) || !(has(self.prompt) || has(self.completion))", "messages takes the place of prompt and completion."),
        )
    )

    prompt: ColumnName | None = Field(default=None, description="Column of the prompt, where there is no template.")
    completion: ColumnName | None = Field(default=None, description="Column of the completion, where there is no template.")
    messages: ColumnName | None = Field(
        default=None,
        description="Column of a conversation, in the place of prompt and completion (SFT): a list of {role, content} with the roles "
        "system, user and assistant. Each assistant's turn is learned but those with weight: 0. Absent: `messages`, where the rows have "
        "it and no prompt.",
    )
    chosen: ColumnName | None = Field(default=None, description="Column of the better of two answers.")
    rejected: ColumnName | None = Field(default=None, description="Column of the worse of two answers.")
    desirable: ColumnName | None = Field(default=None, description="Column that says, by true or false, whether the completion is good.")
    text: ColumnName | None = Field(default=None, description="Column of the text, and what templates call `text`.")
    label: ColumnName | None = Field(default=None, description="Column of the label, and what templates call `label`.")
    document: ColumnName | None = Field(default=None, description="Column of the document id: rows of one document are never split.")
    group: ColumnName | None = Field(
        default=None,
        description="Column that says who wrote a row (a dialect, an age band, a site), by which the report divides evaluation items and "
        "validation rows. Absent: none, whatever the columns are called.",
    )


class FeedbackRef(Model):
    """Curated feedback and labels that a ModelDeployment's gateway holds."""

    deployment: Name = Field(description="A ModelDeployment of the same namespace.")
    epoch: str | None = Field(
        default=None,
        pattern=r"^[0-9]+$",
        max_length=16,
        json_schema_extra=sentence("must be the number of an epoch, as a string, for example '0'."),
        description="Epoch of the drift detector whose rows are read. Absent: the one that runs when they are read.",
    )


ONE_PLACE = rules(
    ("has(self.source) != has(self.feedback)", "exactly one of source and feedback must be set."),
    (
        "!has(self.columns) || !has(self.columns.messages) || !has(self.template)",
        "columns.messages names conversations, which no template renders: template cannot be set.",
    ),
)


class DataSource(Model):
    """Rows to train on."""

    model_config = ConfigDict(json_schema_extra=ONE_PLACE)

    source: RowSource | None = Field(default=None, description="Files of a claim, a bucket or the hub.")
    feedback: FeedbackRef | None = Field(default=None, description="The training half of a deployment's curated feedback.")
    columns: Columns = Field(default=Columns(), description="Which column plays which role.")
    template: RowTemplate | None = Field(
        default=None, description="How a row becomes the texts of its objective. What has no template is read from its column."
    )
    weight: Positive = Field(default="1", description="Share of the training rows, relative to the other sources.")


class Validation(Model):
    """Rows that are held out of the training data, by document."""

    fraction: Half = Field(default="0.1", description="Share of the documents, 0 to 0.5.")


Ratio = Annotated[str, decimal("must be a number of at least 1, as a string, for example '3'.", "double(self) >= 1.0")]
Language = Annotated[
    str, Field(pattern=r"^[a-z]{2,3}$", max_length=3, json_schema_extra=sentence("must be a language's ISO 639 code, for example 'en'."))
]


class Toxicity(Model):
    """Offensive language, by a small model that hears swear words and not meaning."""

    max: Share = Field(description="Highest score that a row may have, 0 to 1; rows above it are dropped. 0.8 drops what is plainly rude.")


class ClassBalance(Model):
    """A limit on how much larger than the smallest class a class may be. A class is a distinct completion."""

    max_ratio: Ratio = Field(description="Rows of a class for each row of the smallest; what is beyond is dropped.")


class Curation(Model):
    """What is removed from the training rows before anything is trained. Every drop is counted in status.data."""

    deduplicate: Literal["None", "Exact", "Near"] = Field(
        default="Exact",
        description="Exact: remove rows that are equal after normalisation. Near: also those whose runs of three words agree to 80 %.",
    )
    personal_data: Literal["Keep", "Redact", "Drop"] = Field(
        default="Keep",
        description="What to do with mail addresses, phone, card, account and social security numbers, and IP addresses.",
    )
    quality: Literal["None", "Gopher"] = Field(
        default="None", description="Gopher: remove repetitive and garbled texts by the rules of the Gopher and C4 corpora."
    )
    languages: Annotated[tuple[Language, ...], Field(max_length=16)] = Field(
        default=(), description="Remove texts that are surely in another language. Short texts are kept."
    )
    toxicity: Toxicity | None = Field(default=None, description="Remove offensive rows.")
    class_balance: ClassBalance | None = Field(default=None, description="Remove rows of the largest classes.")
    decontaminate: bool = Field(
        default=True, description="Remove rows that equal, nearly equal or share 13 words with an item of an evaluation suite."
    )


class Data(Model):
    """Where the rows come from."""

    train: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=16)] = Field(description="Sources of training rows.")
    validation: Validation | None = Field(default=None, description="Hold out a part of the training data.")
    curation: Curation = Field(default=Curation(), description="What is removed.")
    workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Pods that read, curate and tokenise the rows, each its share; the result is that of one. All mount the claims.",
    )


AboveOne = Annotated[str, decimal("must be a number above 1, as a string, for example '5'.", "double(self) > 1.0")]


class EarlyStopping(Model):
    """Stop when the validation loss no longer falls."""

    patience: int = Field(default=3, ge=1, le=100, description="Evaluations without a better loss.")


class MLflow(Model):
    """A tracking server of MLflow."""

    tracking_uri: str = Field(
        max_length=512, pattern=r"^https?://[^\s@?#]+$", description="https://host:port of the server; what it asks for is in the Secret."
    )
    experiment: str | None = Field(default=None, min_length=1, max_length=256, description="Name; made where it does not exist.")
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
    )


class Reporting(Model):
    """A place that the training's figures go to beside its own progress."""

    model_config = ConfigDict(
        json_schema_extra=rules(("(self.type == 'MLflow') == has(self.mlflow)", "type MLflow, and no other, needs mlflow."))
    )

    type: Literal["TensorBoard", "MLflow"] = Field(
        description="TensorBoard: event files on the store, in runs/<run>/train/tensorboard. MLflow: a run on a tracking server."
    )
    mlflow: MLflow | None = Field(default=None, description="Which server.")


class Training(Model):
    """Hyper-parameters."""

    epochs: Positive = Field(default="1", description="Passes over the training rows; ignored where maxSteps is set.")
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000, description="Optimiser steps.")
    global_batch_size: int = Field(default=16, ge=1, le=4096, description="Rows in one optimiser step, over all devices and accumulation.")
    learning_rate: Positive | None = Field(default=None, description="Peak learning rate. Absent: by objective and method.")
    warmup_steps: int | None = Field(
        default=None, ge=0, le=100_000, description="Steps of linear warm-up. Absent: by objective and method."
    )
    max_sequence_length: int = Field(default=512, ge=8, le=131_072, description="Tokens of a row; longer ones are cut and counted.")
    packing: bool = Field(default=False, description="Pack several rows into one sequence. Pretraining always does.")
    precision: Literal["BF16", "FP32"] = Field(default="BF16", description="Precision of the forward pass.")
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Seed of order, initialisation and dropout.")
    early_stopping: EarlyStopping | None = Field(default=None, description="Needs data.validation.")
    loss_spike_ratio: AboveOne | None = Field(
        default=None,
        description="End the run, with its last checkpoint kept, at a step whose loss is above so many times the median of the 20 steps "
        "before; '5' is cautious. Absent: only where the loss is no number.",
    )
    extra_arguments: Annotated[dict[str, Annotated[str, Field(max_length=256)]], Field(max_length=32)] = Field(
        default={},
        description="Passed to the trainer's arguments; other names than those of docs/objectives.md are refused before any Job is made.",
    )
    reporting: Annotated[tuple[Reporting, ...], Field(max_length=2)] = Field(
        default=(),
        description="Where else the figures of each step go. What cannot be reported is lost and counted; it fails and delays no step.",
        json_schema_extra=keyed_by("type"),
    )


class Compute(Model):
    """Where the training runs."""

    model_config = ConfigDict(
        json_schema_extra=rules(("!has(self.minNodes) || self.minNodes <= self.nodes", "minNodes must not be above nodes."))
    )

    nodes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Pods that train together, each with acceleratorsPerNode devices. More than one need a store whose claim is "
        "ReadWriteMany, or one node for all.",
    )
    min_nodes: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Elastic: where some of the nodes are lost, or not to be had for a minute, training goes on from its checkpoint with "
        "those there are, down to so many, with the same global batch; its next attempt asks for all again. Absent: it waits for all.",
    )
    accelerators_per_node: int = Field(default=1, ge=0, le=16, description="Devices of a training pod; 0 trains on the CPU.")
    accelerator_resource: str = Field(default="nvidia.com/gpu", max_length=128, description="Resource name of the devices.")
    parallelism: Literal["Auto", "DataParallel", "FSDP"] = Field(
        default="Auto",
        description="How several processes, one for each device or each pod on CPUs, share the training. DataParallel: each holds the "
        "whole model. FSDP: weights, gradients and optimiser are divided among them. Auto: FSDP where the model does not fit otherwise.",
    )
    cost_per_accelerator_hour: Number | None = Field(
        default=None, description="Price of one device for an hour, in any currency; status.estimate then tells the cost."
    )
    pod: PodOverrides = Field(
        default=PodOverrides(), description="Overrides for the pods of all stages; resources only for train and evaluate."
    )


class Checkpoint(Model):
    """How often the run can be taken up again."""

    every_minutes: Positive | None = Field(
        default=None, description="Minutes between checkpoints. Absent: 10, where everySteps is absent too."
    )
    every_steps: int | None = Field(default=None, ge=1, description="Steps between checkpoints.")
    keep: int = Field(default=2, ge=1, le=20, description="Newest checkpoints that are kept.")
    publish: Literal["Synchronous", "Asynchronous"] = Field(
        default="Synchronous",
        description="Asynchronous: a checkpoint is flushed to the store, hashed and published beside the steps that follow. The last one, "
        "the best one and that of an interruption are published before anything else.",
    )


class SuiteDataset(Model):
    """Items of a suite."""

    model_config = ConfigDict(json_schema_extra=ONE_PLACE)

    source: RowSource | None = Field(default=None, description="Files of a claim, a bucket or the hub, as in data.train.")
    feedback: FeedbackRef | None = Field(default=None, description="The gate half of a deployment's reviewer-labelled traffic.")
    columns: Columns = Field(default=Columns(), description="Which column plays which role.")
    template: RowTemplate | None = Field(default=None, description="As in data.train.")
    labels: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=64)] = Field(
        default=(),
        description="Completions to choose from, scored by summed log-probability. Absent: the distinct completions of the items.",
    )


class Suite(Model):
    """A named set of items to evaluate on."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("(self.type == 'Dataset') == has(self.dataset)", "dataset must be set with type: Dataset, and only then."),
            (
                "!('Preference' in self.metrics) || !('Accuracy' in self.metrics || 'MacroF1' in self.metrics)",
                "Preference compares an item's own two answers, Accuracy and MacroF1 its labels: make two suites.",
            ),
        )
    )

    name: Name = Field(description="Name that gates refer to.")
    type: Literal["Dataset", "Validation"] = Field(
        default="Dataset", description="Dataset: own items. Validation: the rows that data.validation holds out."
    )
    dataset: SuiteDataset | None = Field(default=None, description="The items.")
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1, max_length=4)] = Field(
        default=("Accuracy",),
        description="What is measured. Preference: the share of items whose chosen answer is likelier than the rejected one. ChrF: how "
        "like the items' completions the model's own answers are, letter by letter, 0 to 1; on the first 500 items. "
        "Reward: the mean reward of the likeliest answers.",
    )


Level = Annotated[
    str, decimal("must be a number above 0 and up to 0.5, as a string, for example '0.05'.", "double(self) > 0.0 && double(self) <= 0.5")
]


class Gate(Model):
    """A test that the candidate must pass against the baseline, on the same items."""

    suite: Name = Field(description="Name of a suite.")
    metric: GateMetric = Field(default="Accuracy", description="What is compared.")
    rule: Literal["Superior", "NonInferior"] = Field(
        description="Superior: better than the baseline. NonInferior: worse by less than margin."
    )
    margin: Number = Field(default="0.03", description="Largest loss that NonInferior allows.")
    alpha: Level = Field(default="0.05", description="Level of the suite; each of its five promotions is tested at alpha / 5.")
    min_items: int = Field(default=400, ge=10, le=100_000, description="Fewer items make the gate Inconclusive.")


class Baseline(Model):
    """What the candidate is compared with, pinned when the job is first seen."""

    model_config = ConfigDict(json_schema_extra=rules(("(self.type == 'Base') != has(self.name)", "name must be set unless type is Base.")))

    type: Literal["Base", "ModelVersion", "Deployment"] = Field(
        default="Base", description="The base model, a version, or what a deployment serves."
    )
    name: ObjectName | None = Field(default=None, description="Name of the ModelVersion (`sentiment-v3`) or of the ModelDeployment.")


class Evaluation(Model):
    """What is measured after training, and what must hold for approval."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.gates) || self.gates.all(g, has(self.suites) && self.suites.exists(s, s.name == g.suite))",
                "every gate must name a suite of evaluation.suites.",
            ),
            (
                "!has(self.gates) || !has(self.suites)"
                " || self.gates.all(g, self.suites.all(s, s.name != g.suite || g.metric in s.metrics))",
                "a gate's metric must be among the metrics of its suite.",
            ),
        )
    )

    suites: Annotated[tuple[Suite, ...], Field(max_length=8)] = Field(
        default=(), description="Sets of items.", json_schema_extra=keyed_by("name")
    )
    gates: Annotated[tuple[Gate, ...], Field(max_length=16)] = Field(
        default=(), description="Tests that decide the version's approval; all must pass."
    )
    baseline: Baseline = Field(default=Baseline(), description="What the candidate is compared with.")


class PushTarget(Model):
    """A registry or bucket that the model is copied to."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.uri.startsWith('oci://') || (self.uri.startsWith('s3://') && has(self.secretRef))",
                "uri must start with oci:// (oci://registry/repository:tag) or s3:// (s3://bucket/prefix); s3:// needs secretRef.",
            ),
            ("!has(self.plainHttp) || !self.plainHttp || self.uri.startsWith('oci://')", "plainHttp is for oci:// alone."),
        )
    )

    uri: str = Field(
        min_length=6,
        max_length=256,
        description="oci://registry/repository:tag (without a tag: the beginning of the model's digest), or s3://bucket/prefix.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="oci: a Secret of type kubernetes.io/dockerconfigjson, or with username and password. "
        "s3: a Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_ENDPOINT_URL and AWS_REGION.",
    )
    plain_http: bool = Field(default=False, description="The registry speaks no TLS; for registries inside the cluster.")


class Output(Model):
    """Where the model goes."""

    model: Name = Field(description="Name of the model; its versions are ModelVersions `<model>-v<n>`.")
    store: StoreRef = Field(description="Where runs and models are written.")
    push: Annotated[tuple[PushTarget, ...], Field(max_length=4)] = Field(
        default=(),
        description="Where a model that the gates did not reject is copied to, after its evaluation.",
        json_schema_extra=keyed_by("uri"),
    )
    format: Literal["Adapter", "Merged"] | None = Field(default=None, description="Absent: by objective and method.")


class RunPolicy(Model):
    """How the run is run; editable at any time."""

    suspend: bool = Field(default=False, description="Stop after a checkpoint, and give the devices back, until it is false again.")
    max_restarts: int = Field(
        default=3, ge=0, le=100, description="Attempts after failures; interruptions that made progress do not count."
    )
    active_deadline_seconds: int | None = Field(
        default=None, ge=60, description="Running time, queueing excluded, after which the job fails."
    )
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, description="Remove the child Jobs so long after the end.")


class FineTuneJobSpec(Model):
    """What to train, on what, how, and what must hold for the result to be approved."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.training.globalBatchSize % (self.compute.nodes * (self.compute.acceleratorsPerNode > 0"
                " ? self.compute.acceleratorsPerNode : 1)) == 0",
                "training.globalBatchSize must be a multiple of compute.nodes x compute.acceleratorsPerNode: each takes an equal share.",
            ),
            (
                "self.compute.parallelism != 'FSDP' || self.compute.nodes > 1 || self.compute.acceleratorsPerNode > 1",
                "compute.parallelism: FSDP divides the model among several processes: set compute.nodes or acceleratorsPerNode above 1.",
            ),
            (
                "self.compute.parallelism != 'FSDP' || !has(self.vocabulary)",
                "vocabulary trains single rows of a whole matrix: compute.parallelism must not be FSDP.",
            ),
            ("!has(self.training.earlyStopping) || has(self.data.validation)", "training.earlyStopping needs data.validation."),
            (
                "has(self.data.validation) || !has(self.evaluation) || !has(self.evaluation.suites)"
                " || !self.evaluation.suites.exists(s, s.type == 'Validation')",
                "a suite of type Validation needs data.validation.",
            ),
            *method_rules(),
            *spec_rules(),
            *starting_rules(),
        )
    )

    base_model: StartingModel = Field(description="The model to start from.")
    objective: Objective = Field(default=Objective(), description="What the training optimises.")
    prompt_format: Literal["Chat", "Text"] = Field(
        default="Chat",
        description="Chat: prompt as user turn, completion as assistant turn of the tokenizer's template. Text: as they are.",
    )
    method: Method = Field(default=Method(), description="Which weights are trained.")
    quantization: Quantization | None = Field(
        default=None, description="Keep the frozen base in few bits while LoRA is trained. Absent: in the precision of the training."
    )
    vocabulary: Vocabulary | None = Field(default=None, description="New tokens for words of the training rows. Absent: the base's tokens.")
    data: Data = Field(description="Where the rows come from.")
    training: Training = Field(default=Training(), description="Hyper-parameters.")
    compute: Compute = Field(default=Compute(), description="Where the training runs.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="How often the run can be taken up again.")
    evaluation: Evaluation = Field(default=Evaluation(), description="What is measured, and what must hold.")
    output: Output = Field(description="Where the model goes.")
    approval: Literal["Automatic", "Manual"] = Field(
        default="Automatic", description="Automatic: passed gates approve the version. Manual: a person does."
    )
    run_policy: RunPolicy = Field(default=RunPolicy(), description="How the run is run; editable at any time.")


# --- status ------------------------------------------------------------------


class PinnedBaseline(Model):
    """The baseline, as it was when the job was first seen."""

    type: str = Field(max_length=32, description="Base or ModelVersion.")
    name: str = Field(max_length=63, description="Name of the ModelVersion, or base.")
    artifact_uri: str | None = Field(default=None, max_length=512, description="Where it lies.")
    manifest_digest: str | None = Field(default=None, max_length=80, description="Digest of its manifest.")
    format: str | None = Field(default=None, max_length=16, description="Adapter or Merged.")
    base_uri: str | None = Field(default=None, max_length=512, description="The base model that it belongs to.")
    base_revision: str | None = Field(default=None, max_length=64, description="Its revision.")


class Resolved(Model):
    """Inputs that were resolved once, so that a running job cannot drift."""

    image: str | None = Field(default=None, max_length=512, description="The trainer image.")
    config_digest: str | None = Field(default=None, max_length=80, description="sha256 over what was asked for.")
    base_revision: str | None = Field(default=None, max_length=64, description="Commit of the base model.")
    base_digest: str | None = Field(default=None, max_length=80, description="sha256 over the base model's files.")
    dataset_digests: Annotated[dict[str, str], Field(max_length=16)] = Field(default={}, description="sha256 of each source.")
    dataset_revisions: Annotated[dict[str, str], Field(max_length=16)] = Field(default={}, description="Commit of each source on the hub.")
    suite_digests: Annotated[dict[str, str], Field(max_length=8)] = Field(
        default={}, description="sha256 of the items of each suite: the version of the suite."
    )
    baseline: PinnedBaseline | None = Field(default=None, description="What the candidate is compared with.")
    prompt_probe: str | None = Field(
        default=None, max_length=80, description="sha256 over the tokens of the probe prompt, as training renders it."
    )


class DataStatus(Model):
    """What the prepare stage made of the data."""

    rows_in: int = Field(default=0, description="Rows read.")
    rows_kept: int = Field(default=0, description="Rows that are trained on.")
    dropped: Annotated[dict[str, int], Field(max_length=16)] = Field(default={}, description="Rows dropped, by reason.")
    tokens: int = Field(default=0, description="Tokens of the kept rows.")
    truncated: int = Field(default=0, description="Rows that were cut.")
    validation_rows: int = Field(default=0, description="Rows held out.")
    supervised_share: Number | None = Field(default=None, description="Share of the tokens that are learned.")
    warnings: Annotated[tuple[Annotated[str, Field(max_length=160)], ...], Field(max_length=8)] = Field(
        default=(), description="What is likely wrong and was not refused; the data card has all of them."
    )
    new_tokens: int | None = Field(default=None, description="Words that got a token of their own, by spec.vocabulary.")
    shorter_by: Number | None = Field(default=None, description="Share of the tokens that a sample of the rows lost by them.")
    rows_per_second: Number | None = Field(default=None, description="Rows for each second of reading, curation and tokenising.")
    peak_memory_bytes: int | None = Field(default=None, description="What preparing took; the processes that tokenise not counted.")
    report_uri: str | None = Field(default=None, max_length=512, description="The data card.")


class Estimate(Model):
    """What the training will need, before it takes a device; and beside it what it took."""

    device: str = Field(max_length=32, description="cpu, a device of the operator's table, or unknown.")
    peak_memory_bytes: int = Field(description="Highest memory of one device, or of the process on a CPU.")
    memory_limit_bytes: int | None = Field(default=None, description="What there is: the pod's memory limit on a CPU, or the device's.")
    disk_bytes: int = Field(description="Checkpoints, artifact and tokenised rows on the store.")
    micro_batch_size: int = Field(description="Rows that a device takes at a time.")
    accumulation_steps: int = Field(description="Micro-batches of one optimiser step.")
    gradient_checkpointing: bool = Field(description="Whether activations are computed again in the backward pass.")
    parallelism: str | None = Field(
        default=None, max_length=16, description="DataParallel or FSDP, as asked for or chosen; absent where one process trains."
    )
    hours_from: Number | None = Field(default=None, description="Shortest training time.")
    hours_to: Number | None = Field(default=None, description="Longest training time.")
    hours_basis: str | None = Field(
        default=None, max_length=16, description="DeviceTable: by the device's usual speed. Measured: by the speed of the first 20 steps."
    )
    cost_from: Number | None = Field(default=None, description="Devices x hoursFrom x compute.costPerAcceleratorHour.")
    cost_to: Number | None = Field(default=None, description="The same of hoursTo.")
    measured_peak_memory_bytes: int | None = Field(default=None, description="What the training took.")
    measured_hours: Number | None = Field(default=None, description="How long the last attempt trained.")
    peak_memory_ratio: Number | None = Field(default=None, description="Estimated over measured memory: 1 is exact.")
    hours_ratio: Number | None = Field(
        default=None, description="Geometric middle of the device table's interval over the measured hours: 1 is exact."
    )


class ProgressStatus(Model):
    """How far the training is; written for a percent at most every 10 seconds, else once a minute."""

    step: int = Field(default=0, description="Optimiser steps done.")
    max_steps: int = Field(default=0, description="Optimiser steps in all.")
    percent: int = Field(default=0, description="Whole percent.")
    display: str = Field(default="", max_length=32, description="step/maxSteps, for the column.")
    loss: str | None = Field(default=None, max_length=16, description="Last training loss.")
    reward: str | None = Field(default=None, max_length=16, description="Mean reward of the last step, where there are rewards.")
    learning_rate: str | None = Field(default=None, max_length=16, description="Learning rate of the last step.")
    gradient_norm: str | None = Field(default=None, max_length=16, description="Gradient norm of the last step, before clipping.")
    tokens_per_second: str | None = Field(default=None, max_length=16, description="Training tokens a second.")
    utilisation: str | None = Field(
        default=None, max_length=16, description="Model FLOPs utilisation in percent; only on devices whose peak is known."
    )
    memory_bytes: int | None = Field(default=None, description="Peak memory so far: the device's, or of the process on a CPU.")
    first_step_seconds: str | None = Field(
        default=None, max_length=16, description="From the start of the attempt's process to the end of its first step."
    )
    estimated_completion_time: str | None = Field(default=None, max_length=32, description="To the minute.")
    updated_at: str | None = Field(default=None, max_length=32, description="When this was written.")


class StageTimes(Model):
    """Where a stage's time went."""

    stage: str = Field(max_length=16, description="prepare, train, package or evaluate.")
    seconds: str = Field(max_length=16, description="Of the attempt that ended the stage.")
    phases: Annotated[dict[str, Annotated[str, Field(max_length=16)]], Field(max_length=16)] = Field(
        default={}, description="Seconds of each phase."
    )


class GateStatus(Model):
    """One gate's numbers."""

    suite: str = Field(max_length=63, description="Suite.")
    metric: str = Field(max_length=16, description="Metric.")
    rule: str = Field(max_length=16, description="Rule.")
    verdict: str = Field(max_length=16, description="Pass, Fail or Inconclusive.")
    candidate: str = Field(max_length=16, description="The candidate's value.")
    baseline: str = Field(max_length=16, description="The baseline's value.")
    difference: str = Field(max_length=16, description="Candidate - baseline.")
    interval: str = Field(max_length=40, description="Confidence interval of the difference.")
    n: int = Field(description="Items.")
    p: str | None = Field(default=None, max_length=16, description="One-sided p-value.")
    detectable: str | None = Field(default=None, max_length=16, description="Difference found with 80 % power.")
    suite_digest: str | None = Field(default=None, max_length=80, description="sha256 of the suite's items: its version.")
    uses: int | None = Field(
        default=None, description="Promotions of the model that this version of the suite decided before; after 5 it decides none."
    )


class ScoreStatus(Model):
    """One suite's numbers beside the gates."""

    suite: str = Field(max_length=63, description="Suite.")
    n: int = Field(description="Items.")
    accuracy: str | None = Field(default=None, max_length=16, description="The candidate's accuracy.")
    baseline_accuracy: str | None = Field(default=None, max_length=16, description="The baseline's accuracy.")
    macro_f1: str | None = Field(default=None, max_length=16, description="The candidate's macro-F1.")
    majority_rate: str | None = Field(default=None, max_length=16, description="Accuracy of always giving the most frequent label.")
    parse_rate: str | None = Field(default=None, max_length=16, description="Share of free answers that are a label.")
    loss: str | None = Field(default=None, max_length=16, description="The candidate's held-out loss.")
    reward: str | None = Field(default=None, max_length=16, description="The candidate's mean reward.")
    baseline_reward: str | None = Field(default=None, max_length=16, description="The baseline's mean reward.")
    chrf: str | None = Field(default=None, max_length=16, description="How like the expected ones the candidate's answers are.")
    baseline_chrf: str | None = Field(default=None, max_length=16, description="The same of the baseline's answers.")
    bleu: str | None = Field(default=None, max_length=16, description="BLEU of the candidate's answers, 0 to 1, over the whole suite.")


class EvaluationStatus(Model):
    """What the gates said."""

    verdict: str = Field(max_length=16, description="Pass, Fail, Inconclusive or NoGates.")
    artifact_digest: str = Field(default="", max_length=80, description="Digest of the manifest that was evaluated.")
    gates: Annotated[tuple[GateStatus, ...], Field(max_length=16)] = Field(default=(), description="Per gate.")
    scores: Annotated[tuple[ScoreStatus, ...], Field(max_length=8)] = Field(default=(), description="Per suite.")
    message: str | None = Field(
        default=None,
        max_length=300,
        description="How many items an inconclusive gate needs, and the groups of a suite that are further apart than by the baseline.",
    )
    report_uri: str | None = Field(default=None, max_length=512, description="The full results.")


class ArtifactStatus(Model):
    """The packaged model."""

    uri: str = Field(max_length=512, description="Where it lies.")
    manifest_digest: str = Field(max_length=80, description="Digest of its manifest.")
    format: str = Field(max_length=16, description="Adapter or Merged.")
    size_bytes: int = Field(description="Bytes.")


class PushStatus(Model):
    """A copy of the model, pulled back and found equal."""

    uri: str = Field(max_length=256, description="As in output.push.")
    digest: str = Field(max_length=80, description="oci: of the artifact's manifest. s3: of the packaged manifest, and the folder's name.")


class FineTuneJobStatus(Model):
    """What was observed."""

    observed_generation: int = Field(default=0, description="Generation of the spec that this status speaks of.")
    phase: str = Field(
        default="",
        max_length=32,
        description="For the column: Pending, Preparing, Training, Packaging, Evaluating, Suspended, Succeeded, Failed, Stalled.",
    )
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = Field(
        default=(), description="Standard conditions.", json_schema_extra=keyed_by("type")
    )
    started_at: str | None = Field(
        default=None, max_length=32, description="When the first training Job was made; the spec is immutable from then on."
    )
    finished_at: str | None = Field(default=None, max_length=32, description="When the job succeeded or failed.")
    running_seconds: int = Field(default=0, description="Training time so far, queueing and suspension excluded.")
    resolved: Resolved = Field(default=Resolved(), description="Inputs resolved once.")
    data: DataStatus | None = Field(default=None, description="What the prepare stage made of the data.")
    estimate: Estimate | None = Field(default=None, description="What the training will need, known before it starts.")
    progress: ProgressStatus | None = Field(default=None, description="How far the training is.")
    times: Annotated[tuple[StageTimes, ...], Field(max_length=4)] = Field(
        default=(), description="Where the time of the stages that are done went.", json_schema_extra=keyed_by("stage")
    )
    attempts: int = Field(default=0, description="Training attempts.")
    checkpoint_step: int | None = Field(default=None, description="Newest checkpoint.")
    steps_lost: int = Field(default=0, description="Steps that had to be done again.")
    artifact: ArtifactStatus | None = Field(default=None, description="The packaged model.")
    evaluation: EvaluationStatus | None = Field(default=None, description="What the gates said.")
    report_uri: str | None = Field(
        default=None, max_length=512, description="The run's report: one page of HTML with curves, data, evaluation, answers and lineage."
    )
    pushed: Annotated[tuple[PushStatus, ...], Field(max_length=4)] = Field(
        default=(), description="Copies of the model.", json_schema_extra=keyed_by("uri")
    )
    model_version: int | None = Field(default=None, description="The version's number, written before the ModelVersion is made.")
    prepare_runs: int = Field(default=0, description="Times that the prepare stage was started.")
    message: str = Field(default="", max_length=1024, description="The sentence of the Succeeded condition.")


class FineTuneJob(Model):
    """One fine-tuning run."""

    metadata: Metadata
    spec: FineTuneJobSpec
    status: FineTuneJobStatus = FineTuneJobStatus()


DEFINITION = Definition(
    kind=KIND,
    plural=PLURAL,
    short_name=SHORT_NAME,
    model=FineTuneJob,
    columns=(
        Column("Phase", ".status.phase"),
        Column("Step", ".status.progress.display"),
        Column("Loss", ".status.progress.loss"),
        Column("Done", ".status.progress.estimatedCompletionTime"),
        Column("Version", ".status.modelVersion", "integer"),
        Column("Age", ".metadata.creationTimestamp", "date"),
        Column("Model", ".spec.output.model", priority=1),
        Column("Message", ".status.message", priority=1),
    ),
    rules=(
        NAME_RULE,
        *immutable(
            FineTuneJobSpec,
            "runPolicy",
            "approval",
            path=".spec",
            when="has(oldSelf.status) && has(oldSelf.status.startedAt)",
            message="{field} cannot change once training has started; only runPolicy and approval can. Make a new FineTuneJob instead.",
        ),
    ),
)
