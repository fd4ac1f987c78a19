"""One module per objective: what its rows are, which model and trainer it takes, and how it is judged. Nothing else names one."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from tuneloop_trainer.contract import Custom, RunConfig
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives.objective import NOTES, TERMS, Objective

__all__ = ["Objective", "objective_of"]

GROUP = "tuneloop.objectives"
"""Entry points under which a derived image brings objectives of its own."""
MODULES = {
    "SFT": "sft",
    "Pretraining": "pretraining",
    "SequenceClassification": "classification",
    "Seq2Seq": "seq2seq",
    "DPO": "dpo",
    "KTO": "kto",
    "RewardModel": "reward",
    "GRPO": "grpo",
    "RLOO": "rloo",
}


def objective_of(config: RunConfig, prepared: Path | None = None) -> Objective:
    """The run's objective; with what prepare noted for it, where the folder of prepare is given."""
    objective = (_own if config.custom is None else _brought(config.custom))(config)
    if prepared is not None and (prepared / NOTES).is_file():
        objective.read_notes(prepared)
    if prepared is not None and (prepared / TERMS).is_file():
        objective.new_tokens = tuple(json.loads((prepared / TERMS).read_text())["ids"])
    return objective


def _own(config: RunConfig) -> Objective:
    objective: Objective = import_module(f"tuneloop_trainer.objectives.{MODULES[config.objective]}").OBJECTIVE(config)
    return objective


def _brought(custom: Custom) -> type[Objective]:
    """The class of a derived image. Raises Invalid: only the spec, or the image, can be changed."""
    brought = entry_points(group=GROUP)
    if custom.name not in brought.names:
        names = ", ".join(sorted(brought.names)) or "none"
        raise Invalid(f"The trainer image has no objective '{custom.name}' in the entry points {GROUP}; it has {names}.")
    try:
        found = brought[custom.name].load()
    except Exception as error:  # whatever the package raises when it is imported
        raise Invalid(f"Objective '{custom.name}' of the trainer image does not load: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise Invalid(f"Objective '{custom.name}' of the trainer image is no class below {Objective.__module__}.Objective.")
    return found
