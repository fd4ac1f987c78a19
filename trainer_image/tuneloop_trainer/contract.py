"""What the operator and the trainer say to each other: the run's configuration, its progress, and each stage's result.

Imports pydantic and the standard library only, so that the operator can use it without the trainer's dependencies.
The operator writes one `RunConfig` as JSON into a ConfigMap, mounted at `CONFIG_PATH` in every stage's pod.
A stage answers with a `StageResult` in its termination message (at most `RESULT_LIMIT` bytes) and the same beside its output.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from enum import IntEnum, StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

VERSION = 1
CONFIG_PATH = "/etc/tuneloop/run/config.json"
"""Where every stage finds its `RunConfig`."""
TERMINATION_PATH = "/dev/termination-log"
PROGRESS_PORT = 8080
"""Port of `GET /progress` (JSON of `Progress`), `GET /metrics` (Prometheus) and `GET /healthz` while a stage runs."""
RESULT_LIMIT = 3500
"""Bytes that a `StageResult` may have; Kubernetes cuts a termination message at 4096."""
PROGRESS_LIMIT = 16 * 1024
"""Bytes that an answer of `GET /progress` may have."""
ENV_NODES, ENV_PROCESSES, ENV_RENDEZVOUS = "TUNELOOP_NODES", "TUNELOOP_PROCESSES", "TUNELOOP_RENDEZVOUS"
"""Environment of the pods that train together: how many pods, how many processes in each, and `host:port` of the first one."""
RENDEZVOUS_PORT = 29500
MAX_GATES = 16
MAX_PHASES = 16
"""Phases of a stage whose time is told."""
TOKENS_PER_MICRO_BATCH = {"cpu": 512, "cuda": 16384}
"""The trainer's own choice of a micro-batch is as many rows as have so many tokens. On a CPU, rows of like length in small groups
cost a tenth less time than the whole batch at once, and half the memory."""
PROBE_TEXT = "Is the sky blue?"
"""What a user says whose prompt `PrepareSummary.prompt_probe_sha256` is the digest of: the prompt template, then the chat template with a
generation prompt (Chat), as token ids."""


REFERENCE_FILE = "reference.json"
"""JSON list of what users would have said, had they sent the training rows: a sample, beside `EvaluateSummary`'s full result."""


def tokens_digest(tokens: list[int]) -> str:
    """Of token ids in order; the gateway computes the same of what the engine reads."""
    return "sha256:" + hashlib.sha256(json.dumps(tokens, separators=(",", ":")).encode()).hexdigest()


class Model(BaseModel):
    """Frozen, closed, camelCase at the edge."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class ExitCode(IntEnum):
    """What a stage's exit code says to the operator."""

    DONE = 0
    BUG = 1
    INVALID = 10
    """The user's input is wrong: no retry."""
    OUT_OF_MEMORY = 11
    NON_FINITE = 12
    """The loss is no number any more, or has left its course."""
    STALLED = 13
    PEER_LOST = 14
    """Another process of the same training went away; its own exit code says why."""
    UNAVAILABLE = 69
    """The hub, a source or the store does not answer: another attempt may do better."""
    INTERRUPTED = 75
    """Saved after SIGTERM: start another attempt, which resumes."""


class Stage(StrEnum):
    PREPARE = "prepare"
    TRAIN = "train"
    PACKAGE = "package"
    EVALUATE = "evaluate"


class Reason(StrEnum):
    """Why a stage did not succeed; a subset of the FineTuneJob's reasons, spelled the same."""

    DATA_INVALID = "DataInvalid"
    DATA_EMPTY = "DataEmpty"
    MODEL_NOT_FOUND = "ModelNotFound"
    ACCESS_DENIED = "AccessDenied"
    SOURCE_UNAVAILABLE = "SourceUnavailable"
    STORE_UNAVAILABLE = "StoreUnavailable"
    OUT_OF_MEMORY = "OutOfMemory"
    REWARD_FAILED = "RewardFailed"
    NON_FINITE_LOSS = "NonFiniteLoss"
    LOSS_SPIKE = "LossSpike"
    STEP_STALLED = "StepStalled"
    PREEMPTED = "Preempted"
    INTERNAL_ERROR = "InternalError"


# --- configuration -----------------------------------------------------------


FeedbackRows = Literal["Labels", "Ratings", "Preferences"]
"""What people said: labels and corrections (columns text, label); whether an answer is good (text, completion, desirable); the better of
two answers (text, chosen, rejected)."""


class FeedbackExport(Model):
    """Rows that the gateway of a deployment exports (`GET {url}?split=&epoch=&rows=`, NDJSON of the gateway's ExportRow)."""

    deployment: str
    url: str
    token_file: str
    """File holding the internal token, sent as `Authorization: Bearer`."""
    split: Literal["train", "gate"] = "train"
    epoch: str | None = None
    """Of the detector. None: the current one."""
    rows: FeedbackRows = "Labels"


class Template(Model):
    """Sandboxed Jinja over a row's columns, for each text that the objective reads. What has no template is read from its column."""

    prompt: str | None = Field(default=None, max_length=16384)
    completion: str | None = Field(default=None, max_length=16384)
    chosen: str | None = Field(default=None, max_length=16384)
    rejected: str | None = Field(default=None, max_length=16384)
    text: str | None = Field(default=None, max_length=16384)


class Bucket(Model):
    """Objects of S3: one, or those that lie directly below a prefix."""

    path: str
    """bucket/key, or bucket/prefix."""
    credentials: str | None = None
    """Folder with the keys of a Secret, one file each."""


class Repository(Model):
    """Data files of a data set on the hub."""

    name: str
    """organisation/name."""
    path: str = ""
    """A file, a folder, or a folder's files by a pattern; empty: what the repository trains on."""
    revision: str | None = None
    credentials: str | None = None
    """Folder with the key `token` of a Secret."""


class DataSource(Model):
    """One source of rows: a file (or folder) at `path`, objects of a bucket, a repository of the hub, or a feedback export."""

    uri: str
    """As the user wrote it, for messages and lineage."""
    path: str | None = None
    feedback: FeedbackExport | None = None
    bucket: Bucket | None = None
    repository: Repository | None = None
    columns: dict[str, str] = {}
    """Role -> column in the file. Roles: prompt, completion, messages, chosen, rejected, desirable, text, label, document, system,
    group. A role that is absent is read from the column of the same name, but group: it is read where it is named alone."""
    template: Template | None = None
    """Renders texts from the row; absent: the roles are used as they are."""
    weight: float = 1.0

    @model_validator(mode="after")
    def _one_place(self) -> DataSource:
        if sum(place is not None for place in (self.path, self.feedback, self.bucket, self.repository)) != 1:
            raise ValueError("exactly one of path, feedback, bucket and repository must be set")
        return self


class Base(Model):
    """The base model: a local folder, or a repository of the hub at a commit."""

    uri: str
    path: str | None = None
    repository: str | None = None
    revision: str | None = None


class Scratch(Model):
    """A decoder whose weights are drawn, by `training.seed`, and the tokenizer that it gets."""

    family: Literal["Llama", "Qwen3"]
    layers: int
    hidden_size: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    tie_embeddings: bool
    vocabulary_size: int | None = None
    """Tokens of the tokenizer to train on the training rows. None: it is the one of `RunConfig.base`."""


class Lora(Model):
    rank: int = 32
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Literal["AllLinear", "Attention"] = "AllLinear"
    dora: bool = False
    """Whether the length of each column of the weights is learned apart from its direction."""


class PromptTuning(Model):
    virtual_tokens: int = 20
    """Rows that are learned, and stand before every text in the place of tokens."""


MethodType = Literal["LoRA", "Full", "PromptTuning"]


class Method(Model):
    type: MethodType
    lora: Lora | None = None
    prompt_tuning: PromptTuning | None = None


class Quantization(Model):
    """How the frozen base under an adapter is kept while it is trained."""

    bits: Literal[4] = 4
    type: Literal["NF4"] = "NF4"


NEW_ROWS_SHARE = 0.1
"""Share of a run's steps in which, with a new vocabulary, only the new tokens' rows are learned."""


class Vocabulary(Model):
    """Words of the corpus that get tokens of their own."""

    min_count: int = 100
    min_fertility: int = 3
    """Tokens that a word has to be cut into."""
    max_tokens: int = 500
    initialization: Literal["SubtokenMean"] = "SubtokenMean"
    """A new row begins as the mean of the rows of the tokens that its word was cut into."""


ObjectiveType = Literal["SFT", "Pretraining", "SequenceClassification", "Seq2Seq", "DPO", "KTO", "RewardModel", "GRPO", "RLOO", "Custom"]
Metric = Literal["Accuracy", "MacroF1", "Loss", "Preference", "Reward", "ChrF"]
GateMetric = Literal["Accuracy", "Loss", "Preference", "Reward", "ChrF"]


class Dpo(Model):
    beta: float = 0.1
    loss: Literal["Sigmoid", "Hinge", "IPO"] = "Sigmoid"


class Kto(Model):
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


class ExactMatch(Model):
    """1 for a completion that says what the row's own completion says, else 0; case, white space and marks at the ends aside."""

    match: Literal["Equals", "Contains"] = "Equals"


class EntryPoint(Model):
    """A function that the trainer image brings: its name in the entry points `tuneloop.rewards`, and what it is told."""

    name: str
    settings: dict[str, str] = {}
    timeout_seconds: int = Field(default=10, ge=1)
    """For one completion."""


class Scorer(Model):
    """A packaged reward model."""

    uri: str
    path: str
    manifest_digest: str


class Reward(Model):
    """One of the rewards of a completion; exactly one of the three blocks is set."""

    exact_match: ExactMatch | None = None
    entry_point: EntryPoint | None = None
    model: Scorer | None = None
    weight: float = 1.0

    @model_validator(mode="after")
    def _one_kind(self) -> Reward:
        if sum(block is not None for block in (self.exact_match, self.entry_point, self.model)) != 1:
            raise ValueError("exactly one of exactMatch, entryPoint and model must be set")
        return self

    @property
    def name(self) -> str:
        if self.entry_point is not None:
            return self.entry_point.name
        return "ExactMatch" if self.model is None else "Model"


class Rollouts(Model):
    """How GRPO and RLOO have completions written and judge them."""

    rewards: tuple[Reward, ...] = Field(min_length=1, max_length=4)
    """A completion's reward is their sum by weight."""
    num_generations: int = Field(default=8, ge=2)
    """Completions of each prompt, compared with each other. A global batch is so many times fewer prompts."""
    max_completion_length: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.0, ge=0)
    """How close the model is held to its base; 0 needs no reference."""


class Classification(Model):
    labels: tuple[str, ...] = ()
    """The classes; empty: the distinct labels of the training rows."""
    class_weights: Literal["None", "Balanced"] = "None"
    """Balanced: a row counts by the inverse of its class's share."""


class Seq2Seq(Model):
    """How an encoder-decoder writes the answers that are judged."""

    max_answer_tokens: int = 128
    beams: int = 1


class Custom(Model):
    """An objective that a derived trainer image brings: its name in the entry points `tuneloop.objectives`, and what it is told."""

    name: str
    settings: dict[str, str] = {}


class Defaults(Model):
    """What a run is trained with where its configuration is silent."""

    learning_rate: float
    warmup_share: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0


DEFAULTS: dict[tuple[ObjectiveType, MethodType], Defaults] = {
    ("SFT", "LoRA"): Defaults(learning_rate=2e-4),
    ("SFT", "Full"): Defaults(learning_rate=2e-5),
    ("SFT", "PromptTuning"): Defaults(learning_rate=2e-2, schedule="linear"),
    ("Pretraining", "LoRA"): Defaults(learning_rate=2e-4),
    ("Pretraining", "Full"): Defaults(learning_rate=2e-5, weight_decay=0.1),
    ("SequenceClassification", "LoRA"): Defaults(learning_rate=2e-4, warmup_share=0.06, schedule="linear"),
    ("SequenceClassification", "Full"): Defaults(learning_rate=2e-5, warmup_share=0.06, schedule="linear", weight_decay=0.01),
    ("Seq2Seq", "LoRA"): Defaults(learning_rate=5e-4, schedule="linear"),
    ("Seq2Seq", "Full"): Defaults(learning_rate=5e-5, schedule="linear", weight_decay=0.01),
    ("DPO", "LoRA"): Defaults(learning_rate=5e-6, warmup_share=0.1),
    ("DPO", "Full"): Defaults(learning_rate=5e-7, warmup_share=0.1),
    ("KTO", "LoRA"): Defaults(learning_rate=5e-6, warmup_share=0.1),
    ("KTO", "Full"): Defaults(learning_rate=5e-7, warmup_share=0.1),
    ("RewardModel", "LoRA"): Defaults(learning_rate=1e-4, warmup_share=0.1),
    ("RewardModel", "Full"): Defaults(learning_rate=1e-5, warmup_share=0.1),
    ("GRPO", "LoRA"): Defaults(learning_rate=1e-5, schedule="constant_with_warmup"),
    ("GRPO", "Full"): Defaults(learning_rate=1e-6, schedule="constant_with_warmup"),
    ("RLOO", "LoRA"): Defaults(learning_rate=1e-5, schedule="constant_with_warmup"),
    ("RLOO", "Full"): Defaults(learning_rate=1e-6, schedule="constant_with_warmup"),
    ("Custom", "LoRA"): Defaults(learning_rate=2e-4),
    ("Custom", "Full"): Defaults(learning_rate=2e-5),
}
"""The one table of defaults by objective and method; LoRA learns at about ten times the rate of all weights,
a prompt of a few rows at a hundred times that of LoRA."""
FROM_SCRATCH = Defaults(learning_rate=6e-4, warmup_share=0.02, weight_decay=0.1)
"""As the table, for Pretraining of weights that were drawn."""


SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
"""Of transformers' schedules those that need no arguments of their own."""
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_torch_4bit", "adamw_torch_8bit"),
    *("adamw_anyprecision", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "stable_adamw", "grokadamw"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "adafactor", "adagrad", "sgd"),
    *("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit", "lomo", "adalomo"),
    *("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
    *("galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise"),
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
)
"""Those that transformers knows by name; some need a package that the trainer's image does not bring."""

Value = str | int | float | bool
ArgumentType = type[float] | type[bool] | type[str] | tuple[str, ...]
"""A tuple: one of these words."""
_OF_ANY: dict[str, ArgumentType] = {
    "adam_beta1": float,
    "adam_beta2": float,
    "adam_epsilon": float,
    "gradient_checkpointing": bool,
    "lr_scheduler_type": SCHEDULES,
    "max_grad_norm": float,
    "neftune_noise_alpha": float,
    "optim": OPTIMIZERS,
    "weight_decay": float,
}
EXTRA_ARGUMENTS: dict[ObjectiveType, dict[str, ArgumentType]] = {
    "SFT": _OF_ANY,
    "Pretraining": _OF_ANY,
    "SequenceClassification": _OF_ANY,
    "Seq2Seq": _OF_ANY,
    "DPO": _OF_ANY | {"disable_dropout": bool},
    "KTO": _OF_ANY | {"disable_dropout": bool},
    "RewardModel": _OF_ANY | {"center_rewards_coefficient": float, "disable_dropout": bool},
    "GRPO": _OF_ANY | {"mask_truncated_completions": bool, "scale_rewards": ("group", "batch", "none")},
    "RLOO": _OF_ANY | {"mask_truncated_completions": bool, "normalize_advantages": bool},
    "Custom": _OF_ANY | {"lr_scheduler_type": str, "optim": str},
}
"""What `training.extraArguments` may hold: of the arguments of each objective's trainer those that Tuneloop does not decide itself. A
derived image may know more words than ours. `tests/training/test_arguments.py` compares it with the libraries."""
OWN_FIELDS = {
    "beta": "beta of the objective's settings",
    "bf16": "training.precision",
    "learning_rate": "training.learningRate",
    "max_length": "training.maxSequenceLength",
    "max_steps": "training.maxSteps",
    "num_train_epochs": "training.epochs",
    "packing": "training.packing",
    "per_device_train_batch_size": "training.globalBatchSize",
    "report_to": "training.reporting",
    "seed": "training.seed",
    "warmup_steps": "training.warmupSteps",
}
"""Arguments that have a field of the spec."""


def parse_arguments(objective: ObjectiveType, extra: Mapping[str, Value]) -> dict[str, Value]:
    """The extra arguments with their types. Raises ValueError, a sentence that names the argument and what was probably meant."""
    known = EXTRA_ARGUMENTS[objective]
    for name in sorted(extra.keys() - known.keys()):
        meant = difflib.get_close_matches(name[:64], [*known, *OWN_FIELDS], n=1, cutoff=0.5)
        hint = f"did you mean {OWN_FIELDS.get(meant[0], meant[0])}? It" if meant else "it"
        raise ValueError(f"training.extraArguments has no {name[:64]!r} with {objective}; {hint} may hold {', '.join(sorted(known))}.")
    return {name: _argument(name, known[name], value) for name, value in extra.items()}


def _argument(name: str, type_: ArgumentType, value: Value) -> Value:
    text = str(value).strip()
    said = f"training.extraArguments.{name}: {text[:40]!r}"
    if isinstance(type_, tuple):
        if text not in type_:
            nearest = difflib.get_close_matches(text[:64], type_, n=1, cutoff=0)[0]
            raise ValueError(f"{said} is none of its words; the nearest is {nearest}.")
        return text
    if type_ is bool and text.lower() not in ("true", "false"):
        raise ValueError(f"{said} is no bool: set true or false.")
    if type_ is bool:
        return text.lower() == "true"
    try:
        parsed: Value = type_(text)
    except ValueError:
        parsed = math.nan
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise ValueError(f"{said} is no float.")
    return parsed


HELD_OUT_METRICS: dict[ObjectiveType, tuple[Metric, ...]] = {
    "SFT": ("Loss",),
    "Pretraining": ("Loss",),
    "SequenceClassification": ("Accuracy", "MacroF1", "Loss"),
    "Seq2Seq": ("Loss", "ChrF"),
    "DPO": ("Preference",),
    "KTO": ("Loss",),
    "RewardModel": ("Preference",),
    "GRPO": ("Reward",),
    "RLOO": ("Reward",),
    "Custom": ("Loss",),
}
"""What is measured on the validation split of a run that names no suite over it; its default gate tests the first."""


class Training(Model):
    """Hyper-parameters; one of epochs and max_steps decides the length (max_steps wins)."""

    epochs: float = 1.0
    max_steps: int | None = None
    global_batch_size: int = 16
    micro_batch_size: int | None = None
    """None: chosen by the trainer. The operator halves it after an out-of-memory attempt."""
    parallelism: Literal["FSDP"] | None = None
    """FSDP: weights, gradients and optimiser are divided over the processes. None: each holds them all."""
    learning_rate: float = 2e-4
    warmup_steps: int | None = None
    max_sequence_length: int = 512
    packing: bool = False
    precision: Literal["BF16", "FP32"] = "BF16"
    seed: int = 42
    early_stopping_patience: int | None = None
    loss_spike_ratio: float | None = Field(default=None, gt=1.0)
    """A step whose loss is above so many times the median of the 20 steps before ends the run. None: only a loss that is no number."""
    extra_arguments: dict[str, Value] = {}


class Checkpoint(Model):
    every_minutes: float | None = 10
    every_steps: int | None = None
    keep: int = 2
    publish: Literal["Asynchronous"] | None = None
    """Asynchronous: what is saved by the plan is published beside the training. None: before the next step."""


class Curation(Model):
    deduplicate: Literal["None", "Exact", "Near"] = "Exact"
    decontaminate: bool = True
    personal_data: Literal["Keep", "Redact", "Drop"] = "Keep"
    quality: Literal["None", "Gopher"] = "None"
    languages: tuple[str, ...] = ()
    max_toxicity: float | None = None
    max_class_ratio: float | None = None
    """Rows of the largest class for each of the smallest; what is beyond is dropped."""


class Suite(Model):
    """One set of evaluation items. `Validation` is the split that prepare holds out of the training data."""

    name: str
    type: Literal["Dataset", "Validation"]
    source: DataSource | None = None
    labels: tuple[str, ...] = ()
    """Completions that are scored by summed log-probability; empty: the distinct completions of the suite (at most 64)."""
    metrics: tuple[Metric, ...]
    """Preference: the share of items whose chosen answer the model finds likelier than the rejected one. Reward: the mean reward, by
    the run's own rewards, of the model's most likely answers. ChrF: how like the items'
    completions those are, 0 to 1."""


class Gate(Model):
    suite: str
    metric: GateMetric
    rule: Literal["Superior", "NonInferior"]
    margin: float = 0.03
    alpha: float = 0.05
    """The level the user set; the test is done at `alpha / promotions` (api.md: five promotions a suite)."""
    min_items: int = 400


class Artifact(Model):
    """A packaged model on the store."""

    path: str
    manifest_digest: str
    format: Literal["Adapter", "Merged"]
    base: Base | None = None
    """The base that an adapter belongs to."""


class Baseline(Model):
    """What the candidate is compared with: the base model, or a packaged artifact, pinned when the run was made."""

    type: Literal["Base", "ModelVersion"]
    name: str
    artifact: Artifact | None = None


class Evaluation(Model):
    suites: tuple[Suite, ...] = ()
    gates: Annotated[tuple[Gate, ...], Field(max_length=MAX_GATES)] = ()
    baseline: Baseline = Baseline(type="Base", name="base")
    promotions_per_suite: int = 5


class Push(Model):
    """A place that a model which the gates did not reject is pushed to."""

    uri: str
    """oci://registry/repository:tag, or s3://bucket/prefix."""
    credentials: str | None = None
    """Folder with the keys of a Secret, one file each."""
    plain_http: bool = False
    """Whether the registry speaks no TLS."""


class Paths(Model):
    """Folders of the run. All but `sources` are writable by the stage's user."""

    work: str
    """This run's own folder on the store: prepare/, train/, package/, evaluate/ below it."""
    artifact: str
    """Folder that the packaged model is published to, by rename."""
    cache: str
    """Shared by the runs of the store: base model snapshots, baseline results."""


MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Of a Secret, as files; to MLflow's client they are environment variables."""


class Mlflow(Model):
    """A tracking server of MLflow."""

    tracking_uri: str = Field(max_length=512)
    experiment: str | None = Field(default=None, max_length=256)
    credentials: str | None = None
    """Folder with those of MLFLOW_KEYS that the Secret has, one file each."""


class Reporting(Model):
    """Where the training reports to beside its own progress."""

    tensorboard: bool = False
    mlflow: Mlflow | None = None


class Estimated(Model):
    """What the training was expected to need, for the report: the operator's estimate, as far as it is measured afterwards."""

    device: str
    peak_memory_bytes: int
    micro_batch_size: int
    hours_from: float | None = None
    hours_to: float | None = None


class RunConfig(Model):
    """Everything a run's stages need; the same file for all of them."""

    version: Literal[1] = 1
    namespace: str
    name: str
    uid: str
    paths: Paths
    base: Base
    scratch: Scratch | None = None
    """Weights are drawn for this; `base` has the tokenizer, or nothing."""
    objective: ObjectiveType = "SFT"
    dpo: Dpo | None = None
    kto: Kto | None = None
    classification: Classification | None = None
    rollouts: Rollouts | None = None
    """Of GRPO and RLOO."""
    seq2seq: Seq2Seq | None = None
    custom: Custom | None = None
    loss: Literal["CompletionOnly", "FullSequence"] = "CompletionOnly"
    prompt_format: Literal["Chat", "Text"] = "Chat"
    method: Method
    quantization: Quantization | None = None
    vocabulary: Vocabulary | None = None
    train: tuple[DataSource, ...] = Field(min_length=1, max_length=16)
    validation_fraction: float = 0.0
    curation: Curation = Curation()
    training: Training = Training()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    model: str
    output_format: Literal["Adapter", "Merged"]
    stall_seconds: float | None = None
    """No step for so long ends the attempt with STALLED. None: decided by the trainer from its own median step."""
    threads: int | None = None
    push: Annotated[tuple[Push, ...], Field(max_length=4)] = ()
    image: str = ""
    """The trainer image, for the lineage in the model card."""
    origins: dict[str, Literal["spec", "default"]] = {}
    """Name of a training value -> whether the spec has it, or the table of defaults."""
    reporting: Reporting | None = None
    estimate: Estimated | None = None
    """Written when the training starts."""


# --- progress ----------------------------------------------------------------


class Progress(Model):
    """A running stage's state, answered at `GET /progress`."""

    version: Literal[1] = 1
    pod_uid: str
    """The pod's UID (env POD_UID), so that an answer of another pod on a reused address is not believed."""
    stage: Stage
    phase: str = Field(max_length=64)
    """A word for what goes on now: LoadingModel, Training, Saving, Scoring, …"""
    step: int = 0
    max_steps: int = 0
    percent: float = 0.0
    samples: int = 0
    loss: float | None = None
    reward: float | None = None
    """Mean reward of the last step's completions."""
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    rows_per_second: float | None = None
    """Rows read, tokenised or scored in the phase that runs."""
    remaining_seconds: float | None = None
    checkpoint_step: int | None = None
    steps_lost: int = 0
    """As in `TrainSummary`."""
    peak_memory_bytes: int | None = None
    reports_lost: int = 0
    """Events that could not be reported to MLflow or TensorBoard."""
    utilisation: float | None = Field(default=None, ge=0)
    """Model FLOPs utilisation in percent; None on a CPU, and on a device whose peak is not known."""
    first_step_seconds: float | None = None
    """From the start of the worker to the end of the first step that it made."""
    phase_seconds: Annotated[dict[str, float], Field(max_length=MAX_PHASES)] = {}
    """Seconds that each phase of the stage has taken so far; that of the phase which runs now is not among them."""


# --- results -----------------------------------------------------------------


class ModelShape(Model):
    """What the memory and the time of training follow from: at most 210 bytes as JSON."""

    parameters: int = Field(ge=1, le=10**13)
    hidden_size: int = Field(ge=1, le=10**6)
    intermediate_size: int = Field(ge=1, le=10**6)
    layers: int = Field(ge=1, le=10**4)
    heads: int = Field(ge=1, le=10**4)
    key_value_heads: int = Field(ge=1, le=10**4)
    head_size: int = Field(ge=1, le=10**4)
    vocabulary: int = Field(ge=1, le=10**7)
    encoder_layers: int | None = Field(default=None, ge=1, le=10**4)
    """Of an encoder-decoder, whose `layers` are its decoder's. None: there is no encoder."""
    pairs: Literal["Biased", "Dropped"] | None = None
    """Of an encoder-decoder: why training keeps the scores of all pairs of positions. Biased: positions are a bias upon them (T5).
    Dropped: some of them are dropped, which only some devices do without keeping them."""

    @classmethod
    def of(cls, config: Mapping[str, Any], headers: Iterable[Mapping[str, Any]]) -> ModelShape | None:
        """From a model's `config.json` and the headers of its safetensors files; None for a model that is described otherwise."""
        nested = config.get("text_config")
        text: Mapping[str, Any] = nested if isinstance(nested, Mapping) else config

        def read(*names: str) -> int | None:
            found = (text.get(name) for name in names)
            return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)

        hidden = read("hidden_size", "d_model", "n_embd")
        heads = read("decoder_attention_heads", "num_attention_heads", "n_head", "num_heads")
        if hidden is None or not heads:
            return None
        given: dict[str, Any] = {
            "parameters": _count(headers),
            "hidden_size": hidden,
            "intermediate_size": read("intermediate_size", "d_ff", "decoder_ffn_dim", "ffn_dim", "n_inner") or 4 * hidden,
            "layers": read("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers"),
            "heads": heads,
            "key_value_heads": read("num_key_value_heads") or heads,
            "head_size": read("head_dim", "d_kv") or hidden // heads,
            "vocabulary": read("vocab_size"),
        }
        if text.get("is_encoder_decoder") is True:
            pairs = "Biased" if read("relative_attention_num_buckets") else "Dropped" if text.get("attention_dropout") else None
            given |= {"encoder_layers": read("encoder_layers", "num_layers"), "pairs": pairs}
        try:
            return cls.model_validate(given)
        except ValidationError:
            return None


def _count(headers: Iterable[Mapping[str, Any]]) -> int:
    """Numbers in all tensors."""
    tensors = (tensor for header in headers for name, tensor in header.items() if name != "__metadata__")
    return sum(math.prod(tensor["shape"]) for tensor in tensors if isinstance(tensor, Mapping) and isinstance(tensor.get("shape"), list))


class VocabularySummary(Model):
    tokens: int
    """New tokens; 0 where the corpus has no word that deserves one."""
    left_out: int = 0
    """Words that deserved one, and that the tokenizer would not have written as they are."""
    sample_before: int = 0
    """Tokens of the first texts with the base's tokenizer, and with the new one."""
    sample_after: int = 0


class PrepareSummary(Model):
    rows_in: int
    rows_kept: int
    dropped: dict[str, int] = {}
    """Rows dropped by reason (at most 16 reasons): Duplicate, Contaminated, TooLong, NoSupervisedToken, Empty …"""
    warnings: tuple[Annotated[str, Field(max_length=160)], ...] = Field(default=(), max_length=8)
    """What is likely wrong and was not refused; the data card has all of them."""
    tokens: int
    supervised_share: float
    truncated: int = 0
    validation_rows: int = 0
    max_steps: int
    base_digest: str
    base_revision: str | None = None
    dataset_digests: dict[str, str] = {}
    """Source URI -> sha256 of what was read of it (at most 16)."""
    dataset_revisions: dict[str, str] = {}
    """Source URI -> the commit that was read, of sources on the hub."""
    suite_digests: dict[str, str] = {}
    """Suite name -> sha256 over its items (at most 8)."""
    shards_digest: str
    """sha256 over ordered input_ids and labels."""
    prompt_probe_sha256: str | None = None
    """`tokens_digest` of the prompt that training makes of PROBE_TEXT. None where a gateway could not make the same of a text alone."""
    """sha256 of a rendered probe prompt (chat template of the tokenizer), to compare with what is served."""
    longest_row: int | None = None
    """Tokens of the longest training row; with those that a completion may have, where the model writes it."""
    reward_bytes: int = 0
    """Weights of the reward models that stand beside the model."""
    rows_per_second: float | None = None
    """Rows read for each second between the first that was read and the last that was written."""
    peak_memory_bytes: int | None = None
    """Of the preparing process; those that tokenise beside it not counted."""
    model: ModelShape | None = None
    """None where the base model's config does not say."""
    vocabulary: VocabularySummary | None = None


class TrainSummary(Model):
    step: int
    max_steps: int
    samples: int
    loss: float | None = None
    reward: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    seconds: float
    resumed_from_step: int | None = None
    steps_lost: int = 0
    """Steps of the whole run that were done and had to be done again, over all attempts so far."""
    peak_memory_bytes: int | None = None
    micro_batch_size: int = 1


class PackageSummary(Model):
    path: str
    manifest_digest: str
    format: Literal["Adapter", "Merged"]
    size_bytes: int


class GateResult(Model):
    """One gate's numbers. `difference` is candidate - baseline in the metric's own units: better is below 0 for Loss, above 0
    for the others. [`lower`, `upper`] is its interval at the gate's own level (each side alpha / promotions)."""

    suite: str = Field(max_length=63)
    metric: str = Field(max_length=16)
    rule: str = Field(max_length=16)
    verdict: Literal["Pass", "Fail", "Inconclusive"]
    candidate: float
    baseline: float
    difference: float
    lower: float
    upper: float
    n: int
    p: float | None = None
    discordant: int | None = None
    detectable: float | None = None
    """The difference that this n would find with 80 % power at the observed discordance."""


class SuiteScore(Model):
    """Point estimates of one suite for candidate and baseline, beside the gates."""

    accuracy: float | None = None
    baseline_accuracy: float | None = None
    macro_f1: float | None = None
    majority_rate: float | None = None
    parse_rate: float | None = None
    """Share of free (greedy) answers that are one of the labels, on a sample of the items."""
    loss: float | None = None
    reward: float | None = None
    baseline_reward: float | None = None
    chrf: float | None = None
    baseline_chrf: float | None = None
    bleu: float | None = None
    """Of the whole suite at once, 0 to 1."""
    n: int


class EvaluateSummary(Model):
    verdict: Literal["Pass", "Fail", "Inconclusive", "NoGates"]
    artifact_digest: str
    gates: tuple[GateResult, ...] = ()
    scores: dict[str, SuiteScore] = {}
    pushed: tuple[str, ...] = ()
    """Digests under which the model is found at the places of `RunConfig.push`, in their order."""
    probes: str | None = None
    """Path of the probe items (JSON list of `Probe`), at most 50."""
    page: str | None = Field(default=None, pattern=r"^[a-z0-9]+\.html$", max_length=32)
    """Name of the run's report, a page of HTML beside the full results."""
    has_reference: bool = False
    """There is a REFERENCE_FILE beside the full result."""
    message: str = Field(default="", max_length=300)


class Probe(Model):
    """One item to ask the served model before it takes traffic; greedy answers must agree."""

    prompt: str
    """What a user would send: the item's role `text` where the suite has a template (the gateway applies the same template to the
    last user message), else the item's whole prompt."""
    answer: str
    """The evaluator's greedy answer of at most `max_tokens` tokens, stripped."""
    max_tokens: int


class StageResult(Model):
    """A stage's last word."""

    version: Literal[1] = 1
    stage: Stage
    exit_code: int
    reason: Reason | None = None
    message: str = Field(default="", max_length=600)
    uri: str | None = None
    """Where the full result lies."""
    sha256: str | None = None
    phase_seconds: Annotated[dict[str, float], Field(max_length=MAX_PHASES)] = {}
    """As in `Progress`, once the stage has ended."""
    prepare: PrepareSummary | None = None
    train: TrainSummary | None = None
    package: PackageSummary | None = None
    evaluate: EvaluateSummary | None = None


class ManifestFile(Model):
    path: str
    size: int
    sha256: str


class Manifest(Model):
    """Lists every file of a published folder. Its digest is `sha256:` over the canonical JSON (sorted keys, no spaces)."""

    version: Literal[1] = 1
    kind: Literal["dataset", "checkpoint", "model"]
    files: tuple[ManifestFile, ...]
    metadata: dict[str, str | int | float | bool | None] = {}

    def canonical(self) -> bytes:
        """The bytes of `manifest.json`: sorted keys, no spaces, ASCII."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> str:
        """`sha256:<hex>` over `canonical()`; equals the hash of the file `manifest.json`."""
        return "sha256:" + hashlib.sha256(self.canonical()).hexdigest()
