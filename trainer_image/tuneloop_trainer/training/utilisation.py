"""Model FLOPs utilisation (MFU): the share of a device's peak that goes into the model's own arithmetic.

    MFU = FLOPs of a token x tokens a second / (peak FLOPs of a device x devices)

by Chowdhery et al., "PaLM" (arXiv 2204.02311, appendix B); FLOPs of a token and the devices' dense peaks are TRL's (`trl.trainer.utils`):
forward, and twice that backward. Below a frozen base no gradients of the weights are computed, which are half of the backward pass: LoRA
is counted as two thirds. What is computed again for gradient checkpointing is not the model's, and does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FROZEN_SHARE = 2 / 3


def utilisation(model_config: Any, mean_length: float, *, is_frozen: bool, processes: int) -> Callable[[float], float] | None:
    """Percent of the peak at so many tokens a second, over all devices; None on a CPU, and where model or device are not known.

    `model_config` is transformers' (Any: untyped); `mean_length` the tokens of a row.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops

    peak = get_peak_flops(torch.cuda.get_device_name(), "bfloat16")
    try:
        flops = compute_flops_per_token(model_config, round(mean_length))
    except (AttributeError, TypeError):  # a model of another kind than TRL's formula is for
        return None
    if not peak:
        return None
    counted = round(flops * (FROZEN_SHARE if is_frozen else 1.0))
    return lambda tokens_per_second: float(compute_mfu(counted, tokens_per_second, processes, peak))
