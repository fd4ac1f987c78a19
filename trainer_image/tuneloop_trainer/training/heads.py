"""The language-model head on the positions that are learned, and on no others, where TRL's own head would take all of them."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import FusedCausalLMOutput

Module = Any  # transformers and peft are followed by no type checker here
Tensor = Any
IGNORED = -100
TRITON = ("cuda", "xpu")
"""Devices on which TRL's head takes labelled positions alone."""
POSITIONS_AT_ONCE = 1024
"""Logits are made for so many positions; where there are more, they are made again in the backward pass instead of kept."""
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def select_positions(model: Module, temperature: float = 1.0, device: str | None = None) -> bool:
    """Lets `model(..., fused_lm_head=True)` of a model that TRL gave a fused head compute its head on labelled positions alone.

    On devices with Triton TRL does so itself. Elsewhere it computes all positions and masks them, which doubles the time of a step
    where few tokens are learned. Models whose logits are more than their head over the last hidden state (soft-capping, a logit
    scale) keep TRL's way. `device` is where it will be trained, if it is not there yet. Returns whether the model's forward was replaced.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    routed = getattr(core.config.get_text_config(), "output_router_logits", False)
    if (device or core.device.type) in TRITON or routed or core.config.is_encoder_decoder or not has_plain_head(core):
        return False
    whole = core.forward

    @functools.wraps(type(core).forward)  # its signature is what `generate` checks names against
    def forward(self: Module, *args: Any, fused_lm_head: bool = False, labels: Tensor = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or kwargs.get("shift_labels") is not None or kwargs.get("output_router_logits"):
            more = {} if labels is None else {"labels": labels}
            return whole(*args, **more, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)
        kwargs["use_cache"] = False
        kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != IGNORED
        return _output(self.get_output_embeddings(), hidden, labels[:, 1:], mask, temperature)

    core.forward = types.MethodType(forward, core)
    return True


@torch.no_grad()
def has_plain_head(core: Module) -> bool:
    """Whether the model's logits are exactly its head over its last hidden state. Found by running it on a few tokens, because
    a list of architectures would miss the next one."""
    head = core.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        return False
    training = core.training
    core.eval()
    ids = torch.arange(1, 5, device=core.device).unsqueeze(0)
    try:
        logits = core(input_ids=ids, use_cache=False).logits
        return bool(torch.equal(logits, head(core.base_model(input_ids=ids, use_cache=False).last_hidden_state)))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        core.train(training)


def _output(head: Module, hidden: Tensor, labels: Tensor, mask: Tensor, temperature: float) -> FusedCausalLMOutput:
    """As TRL's fused head answers: every field is zero where there is no label."""
    rows, targets = hidden[mask], labels[mask]
    chunks = list(zip(rows.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True))
    if len(chunks) > 1 and rows.requires_grad:
        parts = [checkpoint(_scores, head, part, goal, temperature, use_reentrant=False) for part, goal in chunks]
    else:
        parts = [_scores(head, part, goal, temperature) for part, goal in chunks]
    fields = {
        name: torch.zeros(mask.shape, dtype=values[0].dtype, device=mask.device).masked_scatter(mask, torch.cat(values))
        for name, values in zip(OUTPUTS, zip(*parts, strict=True), strict=True)
    }
    return FusedCausalLMOutput(**fields, label_mask=mask)


def _scores(head: Module, rows: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Log-probability of each target; entropy, mean logit and whether the target is the likeliest for TRL's metrics."""
    logits = head(rows).float() / temperature
    chances = torch.log_softmax(logits, dim=-1)
    chosen = chances.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        fixed = chances.detach()
        entropy = -(fixed.exp() * fixed).sum(-1)
        return chosen, entropy, logits.detach().mean(-1), fixed.argmax(-1) == targets
