"""TRL's SFT trainer on rows that are tokenised already: our order, our checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from trl import SFTTrainer

from tuneloop_trainer.data.schedule import Order
from tuneloop_trainer.training.checkpoints import Checkpoints
from tuneloop_trainer.training.heads import select_positions


class OrderSampler(Sampler[int]):
    """The run's sequence of rows from the samples already consumed onwards."""

    def __init__(self, order: Order, consumed: int) -> None:
        self._rest = order[consumed:]

    def __len__(self) -> int:
        return len(self._rest)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rest.tolist())


class Trainer(SFTTrainer):
    """Differs from TRL's in three things: rows come in a given order, a checkpoint is complete or not there at all, and the head is
    computed where a token is learned."""

    def __init__(self, *args: Any, order: Order, consumed: int, checkpoints: Checkpoints, **kwargs: Any) -> None:  # Any: TRL's
        self.order = order
        self.consumed = consumed
        self.checkpoints = checkpoints
        self.best_step: int | None = None
        self._random_state_of: str | None = None
        super().__init__(*args, **kwargs)
        select_positions(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return OrderSampler(self.order, self.consumed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        step = self.state.global_step
        samples = step * len(self.order) // self.state.max_steps
        self.checkpoints.add(Path(self.args.output_dir) / f"checkpoint-{step}", step, samples, keep_step=self.best_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put off until the first step: the data loader draws a random number when it starts, which an undisturbed run
        did before its own first step, and dropout would differ from there on."""
        self._random_state_of = checkpoint

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._random_state_of is not None:
            super()._load_rng_state(self._random_state_of)
            self._random_state_of = None
        return super().training_step(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write its card into every checkpoint; ours is written when the model is packaged."""

    def tokens_trained(self) -> int:
        return int(self._total_train_tokens)


def trainable_share(model: torch.nn.Module) -> float:
    """Share of the parameters that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return float(sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes))
