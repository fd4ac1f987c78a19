"""Extra arguments that the trainer does not have are refused before any Job is made."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.builders import World, make_job, make_spec

from tuneloop_trainer.contract import EXTRA_ARGUMENTS, ObjectiveType, Stage, parse_arguments


def asking(extra: dict[str, str], **changes: Any) -> dict[str, Any]:
    return make_spec(training={"extraArguments": extra}, **changes)


def test_unknown_argument_stalls_the_job_before_any_job_and_a_mended_spec_goes_on() -> None:
    world = World(job=make_job(asking({"wieght_decay": "0.1"})))
    decision = world.settle()
    assert world.runs == {}
    assert not decision.create
    assert not decision.apply
    assert world.condition("Stalled") == ("True", "InvalidArgument")
    assert world.condition("Succeeded") == ("False", "InvalidArgument")
    assert world.message().startswith("training.extraArguments has no 'wieght_decay' with SFT; did you mean weight_decay? It may hold ")

    metadata = world.job.metadata.model_copy(update={"generation": 2})
    mended = make_job(asking({"weight_decay": "0.1"})).spec
    world.job = world.job.model_copy(update={"spec": mended, "metadata": metadata})
    world.settle()
    assert world.current().stage is Stage.PREPARE
    assert all(condition.type != "Stalled" for condition in world.job.status.conditions)


def test_argument_that_became_unknown_does_not_end_a_training_that_runs() -> None:
    world = World().up_to(Stage.TRAIN)
    training = world.job.spec.training.model_copy(update={"extra_arguments": {"of_an_earlier_release": "1"}})
    world.job = world.job.model_copy(update={"spec": world.job.spec.model_copy(update={"training": training})})
    world.settle()
    assert world.current().stage is Stage.TRAIN
    assert world.condition("Succeeded")[0] == "Unknown"


@pytest.mark.parametrize(
    ("objective", "extra", "sentence"),
    [
        ("SFT", {"learning_rat": "1"}, "no 'learning_rat' with SFT; did you mean training.learningRate? It may hold adam_beta1, "),
        ("SFT", {"max_steps": "1"}, "did you mean training.maxSteps?"),
        ("SFT", {"push_to_hub": "true"}, "no 'push_to_hub' with SFT; it may hold"),
        ("SFT", {"disable_dropout": "true"}, "no 'disable_dropout' with SFT"),
        ("RLOO", {"scale_rewards": "none"}, "no 'scale_rewards' with RLOO"),
        ("SFT", {"z" * 5000: "1"}, f"no '{'z' * 64}' with SFT; it"),
        ("SFT", {"a\nb": "1"}, r"no 'a\nb' with SFT"),
        ("SFT", {"weight_decay": "high"}, "extraArguments.weight_decay: 'high' is no float."),
        ("SFT", {"max_grad_norm": "nan"}, "extraArguments.max_grad_norm: 'nan' is no float."),
        ("SFT", {"gradient_checkpointing": "yes"}, "'yes' is no bool: set true or false."),
        ("SFT", {"optim": "adamw_trch"}, "'adamw_trch' is none of its words; the nearest is adamw_torch."),
        ("DPO", {"lr_scheduler_type": "cosin"}, "the nearest is cosine."),
    ],
)
def test_sentence_names_what_is_wrong_and_what_was_meant(objective: ObjectiveType, extra: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^training\.extraArguments") as caught:
        parse_arguments(objective, extra)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 600


def test_values_have_their_types() -> None:
    extra = {"weight_decay": " 0.1 ", "gradient_checkpointing": "TRUE", "optim": "adafactor"}
    assert parse_arguments("SFT", extra) == {"weight_decay": 0.1, "gradient_checkpointing": True, "optim": "adafactor"}
    assert parse_arguments("RewardModel", {"center_rewards_coefficient": "1e-2"}) == {"center_rewards_coefficient": 0.01}


def test_an_objective_of_ones_own_may_name_optimizers_of_its_image() -> None:
    assert parse_arguments("Custom", {"optim": "of_my_own"}) == {"optim": "of_my_own"}
    assert EXTRA_ARGUMENTS["Custom"].keys() == EXTRA_ARGUMENTS["SFT"].keys()
