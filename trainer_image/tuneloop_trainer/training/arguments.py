"""The trainer's arguments: each value with where it came from, and those that a user passes through."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tuneloop_trainer import contract
from tuneloop_trainer.contract import Defaults, RunConfig, Value
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.training.plan import Plan

EVALUATIONS = 10
"""Times that the held-out loss is measured in a run that may stop early."""
Origin = Literal["spec", "default", "derived", "extraArguments"]
"""Who set a value: the job's spec (the schema's defaults included), the table of defaults by objective and method, the trainer
from the data and the device, or `training.extraArguments`."""

SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True},
    "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
}
"""FSDP2, a unit for each layer. Gradients are divided after each micro-batch: else all of them would be whole on each device until the
last one. Activations are computed again by the model's own gradient checkpointing: accelerate's keeps no state of random numbers, so that
dropout would differ in the backward pass."""


def read_arguments(config: RunConfig) -> dict[str, Value]:
    """The extra arguments with their types. Raises Invalid; the operator refuses the same before any stage."""
    try:
        return contract.parse_arguments(config.objective, config.training.extra_arguments)
    except ValueError as error:
        raise Invalid(str(error)) from error


@dataclass(frozen=True)
class Settings:
    """The trainer's arguments that decide what is learned, each with its origin."""

    values: dict[str, Any]
    origins: dict[str, Origin]
    more: dict[str, Any] = field(default_factory=dict)
    """What is no argument of the trainer's, and of the defaults."""

    def beside(self, name: str, value: Any) -> Settings:
        return replace(self, more=self.more | {name: value})

    def record(self) -> dict[str, dict[str, Any]]:
        arguments = {name: {"value": value, "from": self.origins[name]} for name, value in self.values.items()}
        more = {name: {"value": value, "from": "default"} for name, value in self.more.items()}
        return dict(sorted((arguments | more).items()))

    def described(self) -> str:
        """On one line, for the log."""
        return " ".join(f"{name}={value} ({self.origins[name]})" for name, value in sorted(self.values.items()))


def resolve(config: RunConfig, plan: Plan, defaults: Defaults, device: str) -> Settings:
    """Every value from its highest source: extra arguments, the spec, the table of defaults, what is derived."""
    training = config.training
    rate_from: Origin = config.origins.get("learning_rate", "spec")
    steps_from: Origin = "spec" if training.max_steps is not None else "derived"
    micro_from: Origin = "derived" if training.micro_batch_size is None else "spec"
    asked_warmup = training.warmup_steps
    chosen: dict[str, tuple[Any, Origin]] = {
        "per_device_train_batch_size": (plan.micro_batch, micro_from),
        "gradient_accumulation_steps": (plan.accumulation, "derived"),
        "max_steps": (plan.max_steps, steps_from),
        "learning_rate": (training.learning_rate, rate_from),
        "lr_scheduler_type": (defaults.schedule, "default"),
        "warmup_steps": (
            _share(defaults.warmup_share, plan.max_steps) if asked_warmup is None else asked_warmup,
            "default" if asked_warmup is None else "spec",
        ),
        "weight_decay": (defaults.weight_decay, "default"),
        "bf16": (training.precision == "BF16", "spec"),
        "seed": (training.seed, "spec"),
        "gradient_checkpointing": (device != "cpu", "derived"),
    }
    extra: dict[str, tuple[Any, Origin]] = {name: (value, "extraArguments") for name, value in read_arguments(config).items()}
    chosen |= extra
    return Settings({name: value for name, (value, _) in chosen.items()}, {name: origin for name, (_, origin) in chosen.items()})


def _share(share: float, steps: int) -> int:
    """The share of the steps, rounded up; in whole thousandths, so that no rounding of floats adds one."""
    return -(-round(1000 * share) * steps // 1000)


def surroundings(plan: Plan, folder: Path, evaluates: bool, device: str) -> dict[str, Any]:
    """What is the same for every run: where it writes, what it logs, and that nothing is hidden or saved behind our back."""
    return {
        "output_dir": str(folder),
        "per_device_eval_batch_size": plan.micro_batch,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "ignore_data_skip": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": max(1, plan.max_steps // EVALUATIONS),
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_backend": "gloo" if plan.processes > 1 and device == "cpu" else None,
        "ddp_find_unused_parameters": False if plan.processes > 1 else None,
    } | (SHARDED if plan.is_sharded and plan.processes > 1 else {})
