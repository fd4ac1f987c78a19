"""What GRPO and RLOO pay for: the rewards of a completion, and how completions are written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tuneloop_operator.api.types import Digest, Model, Name, Number, Positive, rules, sentence


class ExactMatch(Model):
    """Compares with the row's own completion, case, white space and marks at the ends aside."""

    match: Literal["Equals", "Contains"] = Field(
        default="Equals", description="Equals: the whole completion is it. Contains: it is somewhere in the completion, as whole words."
    )


class EntryPoint(Model):
    """A function of the trainer image: `examples/objectives/reward` is one."""

    name: Name = Field(description="Its name in the entry points `tuneloop.rewards` of the trainer image.")
    settings: Annotated[dict[str, Annotated[str, Field(max_length=256)]], Field(max_length=32)] = Field(
        default={}, description="What it is told."
    )
    timeout_seconds: int = Field(default=10, ge=1, le=600, description="So long it may take for one completion; longer ends the run.")


class RewardModel(Model):
    """A packaged model of the objective RewardModel, as its ModelVersion's `spec.artifact` names it."""

    uri: str = Field(
        pattern=r"^pvc://[^ ]+$",
        max_length=512,
        description="Folder of the model.",
        json_schema_extra=sentence("must be pvc://claim/folder, without '..'.", "!self.contains('..')"),
    )
    manifest_digest: Digest = Field(description="sha256 of its manifest: another model under the same name is refused.")


class Reward(Model):
    """A number for a completion."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!has(self.exactMatch) || self.type == 'ExactMatch'", "exactMatch may be set only with type: ExactMatch."),
            ("has(self.entryPoint) == (self.type == 'EntryPoint')", "entryPoint must be set with type: EntryPoint, and only then."),
            ("has(self.model) == (self.type == 'Model')", "model must be set with type: Model, and only then."),
        )
    )

    type: Literal["ExactMatch", "EntryPoint", "Model"] = Field(
        description="ExactMatch: 1 where the completion says what the row's own says, else 0. EntryPoint: what a function of the trainer "
        "image returns. Model: the score of a reward model."
    )
    exact_match: ExactMatch | None = Field(default=None, description="Settings of ExactMatch.")
    entry_point: EntryPoint | None = Field(default=None, description="Which function.")
    model: RewardModel | None = Field(default=None, description="Which reward model.")
    weight: Positive = Field(default="1", description="What it counts in the sum.")


class GRPO(Model):
    """Group relative policy optimisation."""

    rewards: Annotated[tuple[Reward, ...], Field(min_length=1, max_length=4)] = Field(
        description="A completion's reward is their sum by weight."
    )
    num_generations: int = Field(
        default=8, ge=2, le=64, description="Completions of each prompt. training.globalBatchSize counts completions, not prompts."
    )
    max_completion_length: int = Field(
        default=256, ge=1, le=16_384, description="Tokens that a completion may have; prompt and completion fit training.maxSequenceLength."
    )
    temperature: Positive = Field(default="1", description="Of the completions: less is less varied, and teaches less.")
    beta: Number = Field(default="0", description="How close the model is held to its base; 0 needs no memory for one.")


class RLOO(GRPO):
    """REINFORCE leave one out."""

    num_generations: int = Field(
        default=4, ge=2, le=64, description="Completions of each prompt. training.globalBatchSize counts completions, not prompts."
    )
    beta: Number = Field(default="0.05", description="How close the model is held to its base; 0 needs no memory for one.")
