"""What a FineTuneJob can optimise, and what goes with what: one table for the rules, the defaults and the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tuneloop_operator.api.rewards import GRPO, RLOO
from tuneloop_operator.api.types import Model, Name, Positive, rules
from tuneloop_trainer.contract import DEFAULTS, FROM_SCRATCH, HELD_OUT_METRICS, FeedbackRows, ObjectiveType

Format = Literal["Adapter", "Merged"]


@dataclass(frozen=True)
class Traits:
    """What an objective reads, writes and is served as."""

    meaning: str
    texts: tuple[str, ...]
    """Roles that a row must have; a template may render those of `TEMPLATES`."""
    adapter: bool = True
    """Whether LoRA may leave an adapter instead of whole weights."""
    servable: bool = True
    packs: bool = False
    turns: bool = True
    """Whether a prompt may be a user's turn of a chat."""
    converses: bool = False
    """Whether a row may be a conversation in the place of prompt and completion."""
    feedback: FeedbackRows | None = "Labels"
    """What of the gateway's feedback it learns from."""
    block: str | None = None
    """The field of `objective` with its settings."""


TRAITS: dict[ObjectiveType, Traits] = {
    "SFT": Traits("learns the answers to prompts", ("prompt", "completion"), packs=True, converses=True, block="sft"),
    "Pretraining": Traits(
        "learns texts, every token of them, from a base or from scratch", ("text",), adapter=False, packs=True, feedback=None
    ),
    "SequenceClassification": Traits(
        "gives a text one of a few labels", ("text", "label"), adapter=False, servable=False, block="sequenceClassification"
    ),
    "Seq2Seq": Traits(
        "learns to turn one text into another, by a base with an encoder and a decoder",
        ("prompt", "completion"),
        adapter=False,
        servable=False,
        turns=False,
        block="seq2Seq",
    ),
    "DPO": Traits("learns to prefer one answer to another", ("prompt", "chosen", "rejected"), feedback="Preferences", block="dpo"),
    "KTO": Traits(
        "learns from answers that were found good or bad", ("prompt", "completion", "desirable"), feedback="Ratings", block="kto"
    ),
    "RewardModel": Traits(
        "learns to score answers from which of two was preferred",
        ("prompt", "chosen", "rejected"),
        adapter=False,
        servable=False,
        feedback="Preferences",
    ),
    "GRPO": Traits(
        "has completions written, and learns from those of a higher reward than the others", ("prompt", "completion"), block="grpo"
    ),
    "RLOO": Traits("as GRPO, each completion against the mean of the others", ("prompt", "completion"), block="rloo"),
    "Custom": Traits("is a class of a derived trainer image", ("prompt", "completion"), packs=True, converses=True, block="custom"),
}
ROLLING_OUT = ["GRPO", "RLOO"]
"""Objectives whose model writes the completions that it learns from."""
DIVIDED = ["SFT", "Pretraining", "SequenceClassification", "DPO", "KTO", "RewardModel"]
"""Objectives whose losses with a model divided among processes were compared with those of one process."""
TEMPLATES = ("prompt", "completion", "chosen", "rejected", "text")
"""Texts that a template may render."""


class SFT(Model):
    """Supervised fine-tuning."""

    loss: Literal["CompletionOnly", "FullSequence"] = Field(
        default="CompletionOnly", description="Which tokens are learned: the completion's, or all."
    )


class SequenceClassification(Model):
    """Classification of texts."""

    labels: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=64)] = Field(
        default=(), description="The labels. Absent: the distinct labels of the training rows."
    )
    class_weights: Literal["None", "Balanced"] = Field(
        default="None", description="Balanced: a row counts by the inverse of its label's share, so that rare labels are learned."
    )


class Seq2Seq(Model):
    """How the answers are written that the metric ChrF is measured on."""

    max_answer_tokens: int = Field(default=128, ge=1, le=4096, description="Tokens of an answer; what goes on longer is cut.")
    beams: int = Field(default=1, ge=1, le=16, description="Answers that are pursued at a time; 1 takes the likeliest token after token.")


class DPO(Model):
    """Direct preference optimisation."""

    beta: Positive = Field(default="0.1", description="How close the model is held to its base: more is closer.")
    loss: Literal["Sigmoid", "Hinge", "IPO"] = Field(default="Sigmoid", description="Sigmoid: as published. Hinge, IPO: less eager.")


class KTO(Model):
    """Kahneman-Tversky optimisation."""

    beta: Positive = Field(default="0.1", description="How close the model is held to its base: more is closer.")
    desirable_weight: Positive = Field(default="1", description="What a good answer counts.")
    undesirable_weight: Positive = Field(default="1", description="What a bad answer counts; raise it where bad answers are rare.")


class Custom(Model):
    """An objective of one's own: `examples/objectives/custom` is one."""

    name: Name = Field(description="Its name in the entry points `tuneloop.objectives` of the trainer image.")
    settings: Annotated[dict[str, Annotated[str, Field(max_length=256)]], Field(max_length=32)] = Field(
        default={}, description="What it is told."
    )


def _blocks() -> Iterator[tuple[str, str]]:
    for name, traits in TRAITS.items():
        if traits.block is not None:
            yield f"!has(self.{traits.block}) || self.type == '{name}'", f"{traits.block} may be set only with type: {name}."


class Objective(Model):
    """What the training optimises."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_blocks(),
            ("self.type != 'Custom' || has(self.custom)", "type: Custom needs custom.name."),
            ("self.type != 'GRPO' || has(self.grpo)", "type: GRPO needs grpo.rewards."),
            ("self.type != 'RLOO' || has(self.rloo)", "type: RLOO needs rloo.rewards."),
        )
    )

    type: ObjectiveType = Field(default="SFT", description=" ".join(f"{name}: {traits.meaning}." for name, traits in TRAITS.items()))
    sft: SFT | None = Field(default=None, description="Settings of SFT.")
    sequence_classification: SequenceClassification | None = Field(default=None, description="Settings of SequenceClassification.")
    seq2seq: Seq2Seq | None = Field(default=None, alias="seq2Seq", description="Settings of Seq2Seq.")
    dpo: DPO | None = Field(default=None, description="Settings of DPO.")
    kto: KTO | None = Field(default=None, description="Settings of KTO.")
    grpo: GRPO | None = Field(default=None, description="Settings of GRPO.")
    rloo: RLOO | None = Field(default=None, description="Settings of RLOO.")
    custom: Custom | None = Field(default=None, description="Which objective of the trainer image.")


def spec_rules() -> tuple[tuple[str, str], ...]:
    """The rules between the objective and the rest of a FineTuneJob's spec."""
    return (*_output_rules(), *_data_rules(), *_training_rules(), *_rollout_rules(), *_vocabulary_rules(), *_metric_rules())


def _only(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def _without(trait: str) -> list[str]:
    return [name for name, traits in TRAITS.items() if not getattr(traits, trait)]


def _in(names: list[str]) -> str:
    return "self.objective.type in [" + ", ".join(f"'{name}'" for name in names) + "]"


def _output_rules() -> Iterator[tuple[str, str]]:
    names = _without("adapter")
    yield (
        f"!({_in(names)}) || !has(self.output.format) || self.output.format == 'Merged'",
        f"{_only(names)} leave no adapter: output.format must be Merged.",
    )


def _data_rules() -> Iterator[tuple[str, str]]:
    converse: list[str] = [name for name, traits in TRAITS.items() if traits.converses]
    trained = "self.data.train.exists(s, has(s.columns) && has(s.columns.messages))"
    judged = (
        "(has(self.evaluation) && has(self.evaluation.suites) && self.evaluation.suites.exists(s, has(s.dataset) && has(s.dataset.columns)"
        " && has(s.dataset.columns.messages)))"
    )
    yield (
        f"({_in(converse)} && self.promptFormat == 'Chat') || !({trained} || {judged})",
        f"columns.messages names conversations: it needs promptFormat: Chat, and the objective {' or '.join(converse)}.",
    )
    names = _without("feedback")
    yield (
        f"!({_in(names)}) || self.data.train.all(s, !has(s.feedback))",
        f"feedback has labels, corrections and votes on answers, which {_only(names)} cannot learn from: set data.train.source.",
    )
    for texts in dict.fromkeys(_rendered(traits) for traits in TRAITS.values()):
        # What a custom objective reads is its own affair: prepare says what a template renders in vain.
        names = [name for name, traits in TRAITS.items() if _rendered(traits) == texts and name != "Custom"]
        others = " || ".join(f"has(s.template.{name})" for name in TEMPLATES if name not in texts)
        yield (
            f"!({_in(names)}) || self.data.train.all(s, !has(s.template) || !({others}))",
            f"a template of {_only(names)} can render {_only(list(texts))} only.",
        )


def _rendered(traits: Traits) -> tuple[str, ...]:
    return tuple(name for name in traits.texts if name in TEMPLATES)


def _training_rules() -> Iterator[tuple[str, str]]:
    names = _without("packs")
    yield f"!({_in(names)}) || !self.training.packing", f"rows of {_only(names)} cannot be packed: training.packing must be false."
    yield (
        "self.objective.type != 'KTO' || self.training.globalBatchSize >= 2",
        "KTO compares each row with another of its batch: training.globalBatchSize must be at least 2.",
    )
    names = [*DIVIDED, "Custom"]
    yield f"self.compute.parallelism != 'FSDP' || {_in(names)}", f"compute.parallelism: FSDP is for {_only(names)}."


def _rollout_rules() -> Iterator[tuple[str, str]]:
    for name in ROLLING_OUT:
        field = name.lower()
        block = f"self.objective.{field}"
        yield (
            f"!has({block}) || self.training.globalBatchSize % {block}.numGenerations == 0",
            f"{name} counts completions: training.globalBatchSize must be a multiple of objective.{field}.numGenerations.",
        )
        yield (
            f"!has({block}) || {block}.maxCompletionLength < self.training.maxSequenceLength",
            f"training.maxSequenceLength holds prompt and completion: it must be above objective.{field}.maxCompletionLength.",
        )
    names = ROLLING_OUT
    yield (
        f"!({_in(names)}) || !(has(self.training.lossSpikeRatio) || has(self.training.earlyStopping))",
        f"the loss of {_only(names)} says nothing: training.lossSpikeRatio and training.earlyStopping cannot be set.",
    )
    yield (
        f"!({_in(names)}) || !has(self.vocabulary)",
        f"{_only(names)} learn from what the model writes, and it writes no token that it never learned: vocabulary cannot be set.",
    )


def _vocabulary_rules() -> Iterator[tuple[str, str]]:
    yield "!has(self.vocabulary) || self.objective.type != 'Seq2Seq'", "vocabulary gives a decoder new tokens: Seq2Seq cannot have it."


def _metric_rules() -> Iterator[tuple[str, str]]:
    yield (
        "self.objective.type in ['DPO', 'RewardModel'] || !has(self.evaluation) || !has(self.evaluation.suites)"
        " || !self.evaluation.suites.exists(s, s.type == 'Validation' && 'Preference' in s.metrics)",
        "the rows that are held out have two answers with DPO and RewardModel only: the metric Preference needs a suite of type Dataset.",
    )
    names = ROLLING_OUT
    yield (
        f"{_in(names)} || !has(self.evaluation) || !has(self.evaluation.suites)"
        " || !self.evaluation.suites.exists(s, 'Reward' in s.metrics)",
        f"the metric Reward is that of the rewards of {_only(names)}: another objective has none.",
    )
    yield (
        f"!({_in(names)}) || !has(self.evaluation) || !has(self.evaluation.suites)"
        " || self.evaluation.suites.all(s, s.type != 'Validation' || s.metrics.all(m, m == 'Reward'))",
        f"the rows that {_only(names)} hold out are prompts: the metrics of a suite of type Validation must be [Reward].",
    )
    yield (
        "self.objective.type != 'SequenceClassification' || !has(self.evaluation) || !has(self.evaluation.suites)"
        " || !self.evaluation.suites.exists(s, 'Preference' in s.metrics)",
        "SequenceClassification writes no answers: the metric Preference cannot be measured.",
    )
    yield (
        "self.objective.type != 'RewardModel' || !has(self.evaluation) || !has(self.evaluation.suites)"
        " || self.evaluation.suites.all(s, s.metrics.all(m, m == 'Preference'))",
        "RewardModel scores answers and writes none: the metrics of its suites must be [Preference].",
    )
    yield (
        "self.objective.type != 'Seq2Seq' || !has(self.evaluation) || !has(self.evaluation.suites)"
        " || self.evaluation.suites.all(s, s.metrics.all(m, m in ['Loss', 'ChrF']))",
        "Seq2Seq is judged by what it writes: the metrics of its suites must be Loss or ChrF.",
    )
    yield (
        "self.objective.type == 'Seq2Seq' || !has(self.evaluation) || !has(self.evaluation.suites)"
        " || !self.evaluation.suites.exists(s, 'ChrF' in s.metrics)",
        "the metric ChrF is measured with Seq2Seq only.",
    )


# --- what is read from the table elsewhere -----------------------------------


def default_format(objective: ObjectiveType, leaves_adapter: bool) -> Format:
    """What `output.format` means where it is absent."""
    return "Adapter" if leaves_adapter and TRAITS[objective].adapter else "Merged"


def prompt_format(objective: ObjectiveType, asked: Literal["Chat", "Text"]) -> Literal["Chat", "Text"]:
    """How the model is prompted: what has learned texts, not turns, is not asked in turns."""
    return asked if TRAITS[objective].turns and "prompt" in TRAITS[objective].texts else "Text"


def objective_name(lineage_spec: dict[str, Any]) -> str:
    """What a job of this spec optimised."""
    objective = lineage_spec.get("objective")
    return str(objective.get("type", "SFT")) if isinstance(objective, dict) else "SFT"


def method_name(lineage_spec: dict[str, Any]) -> str:
    """Which weights a job of this spec trained."""
    method = lineage_spec.get("method")
    return str(method.get("type", "LoRA")) if isinstance(method, dict) else "LoRA"


def is_servable(lineage_spec: dict[str, Any]) -> bool:
    """Whether an engine can serve what a job of this spec trained. Unknown objectives can: they were trained elsewhere."""
    if method_name(lineage_spec) == "PromptTuning":
        return False
    name = objective_name(lineage_spec)
    return name not in TRAITS or TRAITS[name].servable


def feedback_rows(objective: str) -> FeedbackRows | None:
    """What of the feedback that a gateway exports are rows to train on; None where nothing is, or the objective is unknown."""
    return next((traits.feedback for name, traits in TRAITS.items() if name == objective), None)


def combinations() -> str:
    """The table of what goes together, for the reference."""
    lines = ["| objective, method | a row has | output.format | served as |", "|---|---|---|---|"]
    for name, traits in TRAITS.items():
        roles = ", ".join(traits.texts) + (", or messages" if traits.converses else "")
        served = "Chat, Completion" if traits.servable else "not served: reason NotServable"
        for method in ("LoRA", "Full"):
            both = method == "LoRA" and traits.adapter
            formats = "Adapter (absent means this): the operator serves it on its base; or Merged" if both else "Merged only"
            lines.append(f"| {name} with {method} | {roles} | {formats} | {served} |")
    prompted = ", ".join(TRAITS["SFT"].texts)
    lines.append(f"| SFT with PromptTuning | {prompted} | Adapter only: the learned prompt | not served: reason NotServable |")
    lines.append("| any, with LoRA and `lora.dora: true`, or with `vocabulary` | as above | Merged only | as above |")
    return "\n".join(lines)


def defaults() -> str:
    """The table of defaults, for the reference."""
    lines = [
        "| objective, method | learning rate | warm-up | schedule | weight decay | measured on data.validation |",
        "|---|---|---|---|---|---|",
    ]
    rows = [(f"{name} with {method}", name, values) for (name, method), values in DEFAULTS.items()]
    place = next(number for number, (_, name, _) in enumerate(rows) if name == "Pretraining")
    rows.insert(place, ("Pretraining from scratch", "Pretraining", FROM_SCRATCH))
    for title, name, values in rows:
        metrics = ", ".join(HELD_OUT_METRICS[name])
        warmup = f"{100 * values.warmup_share:g} % of the steps"
        lines.append(f"| {title} | {values.learning_rate:g} | {warmup} | {values.schedule} | {values.weight_decay:g} | {metrics} |")
    return "\n".join(lines)
