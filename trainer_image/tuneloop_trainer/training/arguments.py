"""What a user may pass through to the trainer's arguments: known names only, each with its type."""

from __future__ import annotations

from collections.abc import Mapping

from tuneloop_trainer.errors import Invalid

Value = str | int | float | bool
ALLOWED: dict[str, type] = {
    "adam_beta1": float,
    "adam_beta2": float,
    "adam_epsilon": float,
    "gradient_checkpointing": bool,
    "lr_scheduler_type": str,
    "max_grad_norm": float,
    "neftune_noise_alpha": float,
    "optim": str,
    "weight_decay": float,
}


def parse_arguments(extra: Mapping[str, Value]) -> dict[str, Value]:
    """The extra arguments with their types. Raises Invalid, naming the argument."""
    unknown = sorted(extra.keys() - ALLOWED.keys())
    if unknown:
        raise Invalid(f"training.extraArguments has no '{unknown[0]}'; it may hold {', '.join(ALLOWED)}.")
    return {name: _parse(name, value) for name, value in extra.items()}


def _parse(name: str, value: Value) -> Value:
    text = str(value).strip()
    try:
        if ALLOWED[name] is bool:
            return {"true": True, "false": False}[text.lower()]
        parsed: Value = ALLOWED[name](text)
        return parsed
    except (KeyError, ValueError):
        raise Invalid(f"training.extraArguments.{name}: '{text[:40]}' is no {ALLOWED[name].__name__}.") from None
