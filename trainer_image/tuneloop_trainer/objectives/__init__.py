"""One module per objective: what its rows are, which model and trainer it takes, and how it is judged. Nothing else names one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.objectives.objective import NOTES, Objective

__all__ = ["Objective", "objective_of"]

MODULES = {
    "SFT": "sft",
    "Pretraining": "pretraining",
    "SequenceClassification": "classification",
    "DPO": "dpo",
    "KTO": "kto",
    "RewardModel": "reward",
}


def objective_of(config: RunConfig, prepared: Path | None = None) -> Objective:
    """The run's objective; with what prepare noted for it, where the folder of prepare is given."""
    module = import_module(f"tuneloop_trainer.objectives.{MODULES[config.objective]}")
    objective: Objective = module.OBJECTIVE(config)
    if prepared is not None and (prepared / NOTES).is_file():
        objective.read_notes(prepared)
    return objective
