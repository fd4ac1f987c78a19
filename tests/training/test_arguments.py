"""The table of `training.extraArguments` is that of the installed libraries: an upgrade that changes their arguments is looked at."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_training import losses
from tests.unit.trainer.builders import replace, run_stage
from tests.unit.trainer.objectives import make_run

from tuneloop_trainer.contract import EXTRA_ARGUMENTS, OPTIMIZERS, OWN_FIELDS, SCHEDULES, ArgumentType, ExitCode, ObjectiveType, Stage
from tuneloop_trainer.objectives import MODULES

GOLDEN = Path(__file__).parents[1] / "golden" / "training" / "arguments.json"
REGENERATE = "UPDATE_GOLDEN=1 pytest tests/training/test_arguments.py"
CLASSES: dict[ObjectiveType, str] = {
    "SFT": "SFTConfig",
    "Pretraining": "SFTConfig",
    "SequenceClassification": "TrainingArguments",
    "Seq2Seq": "TrainingArguments",
    "DPO": "DPOConfig",
    "KTO": "KTOConfig",
    "RewardModel": "RewardConfig",
    "GRPO": "GRPOConfig",
    "RLOO": "RLOOConfig",
    "Custom": "TrainingArguments",
}


@cache
def arguments(name: str) -> dict[str, Any]:
    """Name and type of each argument of a class of TRL's or transformers'."""
    import transformers
    import trl

    class_ = getattr(transformers if name == "TrainingArguments" else trl, name)
    return {field.name: field.type for field in dataclasses.fields(class_)}


def words(type_: Any) -> list[str]:
    """A type as names of plain types, without None; what is no plain type is left as it calls itself."""
    parts = typing.get_args(type_) if isinstance(type_, types.UnionType) else (type_,)
    return sorted(getattr(part, "__name__", str(part)) for part in parts if part is not type(None))


def test_arguments_of_the_libraries_are_those_that_were_looked_at() -> None:
    found: dict[str, Any] = {
        name: {argument: words(type_) for argument, type_ in arguments(name).items()} for name in set(CLASSES.values())
    }
    common = found["TrainingArguments"]
    for name in found.keys() - {"TrainingArguments"}:
        found[name] = {argument: type_ for argument, type_ in found[name].items() if common.get(argument) != type_}
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    known = json.loads(GOLDEN.read_text())
    changed = sorted(
        f"{name}.{argument}"
        for name in found.keys() | known.keys()
        for argument in found.get(name, {}).keys() | known.get(name, {}).keys()
        if found.get(name, {}).get(argument) != known.get(name, {}).get(argument)
    )
    assert not changed, (
        f"the libraries' arguments changed: {', '.join(changed)}. Decide for each whether EXTRA_ARGUMENTS in tuneloop_trainer/contract.py "
        f"passes it through, then run: {REGENERATE}"
    )


@pytest.mark.parametrize("objective", EXTRA_ARGUMENTS)
def test_what_a_job_may_pass_through_is_an_argument_of_its_trainer(objective: ObjectiveType) -> None:
    known = arguments(CLASSES[objective])
    for name, type_ in EXTRA_ARGUMENTS[objective].items():
        assert name in known, f"{CLASSES[objective]} has no {name}: take it out of EXTRA_ARGUMENTS, then run: {REGENERATE}"
        wanted = "str" if isinstance(type_, tuple) else type_.__name__
        assert wanted in words(known[name]), f"{CLASSES[objective]}.{name} is {known[name]}, not {wanted}"
        assert name not in OWN_FIELDS


@pytest.mark.parametrize("objective", MODULES)
def test_class_of_the_table_is_the_one_that_the_objective_makes(objective: ObjectiveType) -> None:
    if objective in ("GRPO", "RLOO"):  # made by TRL's name of it
        assert CLASSES[objective] == f"{objective}Config"
        return
    module = importlib.import_module(f"tuneloop_trainer.objectives.{MODULES[objective]}")
    ours = [class_ for class_ in module.OBJECTIVE.__mro__ if class_.__module__.startswith("tuneloop_trainer")]
    assert re.findall(r"args=(\w+)\(", "".join(map(inspect.getsource, ours)))[0] == CLASSES[objective]


def test_words_of_optimizers_are_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) == {str(name.value) for name in OptimizerNames}, "mend OPTIMIZERS in tuneloop_trainer/contract.py"


def test_schedules_are_those_that_need_no_arguments_of_their_own() -> None:
    import torch
    from transformers.optimization import get_scheduler
    from transformers.trainer_utils import SchedulerType

    def works(name: str) -> bool:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        try:
            get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)
        except (TypeError, ValueError):
            return False
        return True

    # What watches a metric needs one after each step.
    watching = {"reduce_lr_on_plateau", "greedy"}
    assert set(SCHEDULES) == {name.value for name in SchedulerType if works(name.value)} - watching


def value(type_: ArgumentType) -> Any:
    return type_[0] if isinstance(type_, tuple) else {float: 0.5, bool: True}[type_]


@pytest.mark.parametrize("objective", MODULES)
def test_every_argument_that_may_be_passed_makes_a_configuration(objective: ObjectiveType, tmp_path: Path) -> None:
    import transformers
    import trl

    name = CLASSES[objective]
    given = {argument: value(type_) for argument, type_ in EXTRA_ARGUMENTS[objective].items()}
    made = getattr(transformers if name == "TrainingArguments" else trl, name)(output_dir=str(tmp_path), use_cpu=True, bf16=False, **given)
    assert {argument: getattr(made, argument) for argument in given} == given


def test_argument_of_one_objective_alone_reaches_its_loss(tmp_path: Path, base: Path) -> None:
    plain = make_run(tmp_path / "plain", base, "RewardModel", steps=1)
    asked = make_run(tmp_path / "asked", base, "RewardModel", steps=1)
    asked = replace(asked, training=asked.training.model_copy(update={"extra_arguments": {"center_rewards_coefficient": "1000"}}))
    for config in (plain, asked):
        assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
        assert run_stage(config, Stage.TRAIN).exit_code == ExitCode.DONE
    assert losses(asked)[0] > losses(plain)[0] + 1e-3
