"""New tokens first: for a part of the run only their rows are learned, then all that the method trains.

The rest is held by hooks on the gradients and not by `requires_grad`: the processes that train together agree once on which parameters have
gradients. A parameter without a gradient is passed over by the optimiser, so that it keeps neither moments nor a share of the weight decay;
the moments of the rows begin anew with the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from tuneloop_trainer.contract import NEW_ROWS_SHARE

Tensor = Any  # torch is followed by no type checker here


def first_steps(max_steps: int) -> int:
    """Steps in which only the new rows are learned; at least one is left for the method."""
    return min(max(1, round(NEW_ROWS_SHARE * max_steps)), max_steps - 1)


class NewRowsFirst(TrainerCallback):
    """Holds everything but the new rows for the first steps."""

    def __init__(self, model: Any, tokens: Sequence[int], steps: int) -> None:
        self._steps = steps
        self._is_first = steps > 0
        self._held: list[Tensor] = []
        self._decays: list[float] | None = None
        embeddings = {
            id(layer.weight) for layer in (model.get_input_embeddings(), _head(model)) if isinstance(layer.weight, torch.nn.Parameter)
        }
        rows = torch.tensor(list(tokens))
        self._rows: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "trainable_tokens_delta" in name:
                self._rows.append(parameter)
            elif id(parameter) in embeddings:
                self._rows.append(parameter)
                parameter.register_hook(functools.partial(self._rows_alone, rows.to(parameter.device)))
            else:
                self._held.append(parameter)
                parameter.register_hook(self._nothing)

    def _rows_alone(self, rows: Tensor, gradient: Tensor) -> Tensor:
        if not self._is_first:
            return gradient
        return torch.zeros_like(gradient).index_copy_(0, rows, gradient.index_select(0, rows))

    def _nothing(self, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self._is_first else gradient

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any) -> None:
        self._is_first = state.global_step < self._steps
        if optimizer is not None and state.global_step == self._steps:
            for parameter in self._rows:
                optimizer.state.pop(parameter, None)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any) -> None:
        if not self._is_first:
            return
        for parameter in self._held:
            parameter.grad = None
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any) -> None:
        if self._decays is not None:
            for group, decay in zip(optimizer.param_groups, self._decays, strict=True):
                group["weight_decay"] = decay
            self._decays = None


def _head(model: Any) -> Any:
    """The layer of the logits; for a model without one, that of the input."""
    return model.get_output_embeddings() or model.get_input_embeddings()


def in_two_parts(rates: list[Callable[[int], float]], steps: int) -> list[Callable[[int], float]]:
    """A schedule's rates, held at their height for the first steps and begun then."""

    def rate(whole: Callable[[int], float], step: int) -> float:
        return 1.0 if step < steps else whole(step - steps)

    return [functools.partial(rate, whole) for whole in rates]
