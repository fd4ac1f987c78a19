"""GRPO: of several completions that the model writes to a prompt, those of a higher reward than the others become likelier."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from tuneloop_trainer import models
from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import RunConfig, Suite
from tuneloop_trainer.data.records import ASKED, PROMPTED, Record, Shape
from tuneloop_trainer.data.shards import Task, TokenRow
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives.objective import Done, Objective, Parts, Sources, Tokens

if TYPE_CHECKING:
    from tuneloop_trainer.evaluation.suites import PreparedSuite
    from tuneloop_trainer.rewards import Reward

COLUMNS = ("input_ids", "prompt", "reference", "system", "row")


class GRPO(Objective):
    """TRL's GRPO trainer on prompts that are tokenised already. Judged by the rewards of greedy answers to held-out prompts."""

    trained_by: ClassVar[str] = "GRPO"
    """TRL's name of it."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        if config.rollouts is None:
            raise Invalid(f"{config.objective} has no rewards.")
        self.rollouts = config.rollouts
        self.repeats = self.rollouts.num_generations
        if config.training.global_batch_size % self.repeats:
            raise Invalid(f"training.globalBatchSize {config.training.global_batch_size} is no multiple of numGenerations {self.repeats}.")
        matches = any(reward.exact_match is not None for reward in self.rollouts.rewards)
        self.shape = PROMPTED if matches else ASKED

    @cached_property
    def judges(self) -> list[tuple[Reward, float]]:
        """The rewards with their weights. Raises Invalid where the image or the store lacks one."""
        from tuneloop_trainer.rewards import reward_of

        return [(reward_of(asked, self.config), asked.weight) for asked in self.rollouts.rewards]

    # --- prepare ---

    def suite_shape(self, suite: Suite) -> Shape:
        return self.shape if set(suite.metrics) == {"Reward"} else super().suite_shape(suite)

    def look_at(self, train: Sources, others: Sequence[Record]) -> None:
        """The rewards are looked up here, and asked about one row, before a device is taken."""
        from tuneloop_trainer.rewards import Completion, totals

        first = next((record for records in train for record in records), None)
        if first is not None:
            totals(self.judges, [Completion(first.prompt, first.completion, first.completion, first.row, first.system)])

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        """A prompt that leaves no room for its completion is dropped, not cut: it would ask something else."""
        ids = formatter.prompt_ids(record.prompt, record.system)
        room = self.rollouts.max_completion_length
        task = Task(record.prompt, record.completion, record.row, record.system)
        row = TokenRow(ids, [], record.document, len(ids), task=task, generated=room)
        whole = len(ids) + room
        return Tokens([row] if ids and whole <= self.config.training.max_sequence_length else [], whole)

    # --- train ---

    def trainer(self, parts: Parts) -> Any:
        from tuneloop_trainer.training.rollouts import make_trainer

        settings = self.rollouts
        own = {
            "num_generations": settings.num_generations,
            "max_completion_length": settings.max_completion_length,
            "temperature": settings.temperature,
            "beta": settings.beta,
            "reward_weights": [weight for _, weight in self.judges],
            "disable_dropout": True,
            "remove_unused_columns": True,
        }
        adapter = self.adapter(parts.model)
        if adapter is None and settings.beta > 0:
            half = self.config.training.precision == "BF16"
            own["model_init_kwargs"] = {"dtype": "bfloat16" if half else "float32", "local_files_only": True, "use_safetensors": True}
        rewards = [reward for reward, _ in self.judges]
        return make_trainer(self.trained_by, rewards, own | parts.arguments, parts, adapter, COLUMNS)

    def reward_bytes(self) -> int:
        return sum(reward.size_bytes() for reward, _ in self.judges)

    # --- evaluate ---

    def rewards(self, model: models.Model, suite: PreparedSuite, done: Done) -> list[float]:
        from tuneloop_trainer.evaluation import scoring
        from tuneloop_trainer.rewards import Completion, totals

        prompts = [item.prompt for item in suite.encoded]
        formatter = suite.formatter
        answers = scoring.greedy_answers(model, prompts, self.rollouts.max_completion_length, formatter.stops, done)
        completions = [
            Completion(item.prompt, formatter.decode(answer.tokens), item.completion, item.id, item.system)
            for item, answer in zip(suite.items, answers, strict=True)
        ]
        return totals(self.judges, completions)

    def reward_key(self) -> str:
        settings = self.rollouts
        judged = [f"{reward.key()} x {weight:g}" for reward, weight in self.judges]
        return f"{self.config.image} {settings.max_completion_length} {judged}"


OBJECTIVE = GRPO
