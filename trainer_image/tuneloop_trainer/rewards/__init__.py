"""What a completion is worth: rewards of the trainer, of the trainer image's own packages, and of reward models."""

from __future__ import annotations

from collections.abc import Sequence

from tuneloop_trainer.contract import Reward as Asked
from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.rewards.entry_point import Brought
from tuneloop_trainer.rewards.match import Match
from tuneloop_trainer.rewards.reward import Completion, Reward
from tuneloop_trainer.rewards.scorer import ModelReward

__all__ = ["Completion", "Reward", "reward_of", "totals"]


def reward_of(asked: Asked, config: RunConfig) -> Reward:
    """The reward that the configuration asks for. Raises Invalid where the image or the store does not have it."""
    if asked.entry_point is not None:
        return Brought(asked.entry_point)
    if asked.model is not None:
        return ModelReward(asked.model, config.prompt_format, config.training.max_sequence_length)
    return Match(asked.exact_match.match if asked.exact_match is not None else "Equals")


def totals(rewards: Sequence[tuple[Reward, float]], completions: Sequence[Completion]) -> list[float]:
    """Per completion the sum of its rewards by weight."""
    columns = [[weight * value for value in reward.of(completions)] for reward, weight in rewards]
    return [sum(values) for values in zip(*columns, strict=True)]
