"""A step that hangs, or does not fit, costs one attempt: the next goes on from the last checkpoint with the same rows in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.training.conftest import Zygote
from tests.training.runs import losses, prepared_run, rows_of_steps, weights
from tests.training.zygote import ENV_HANG_AT, ENV_OUT_OF_MEMORY_AT
from tests.unit.trainer.builders import copy_work, replace

from tuneloop_trainer.contract import ExitCode, Reason, RunConfig, Stage

STEPS = 12


@pytest.fixture(scope="module")
def prepared(zygote: Zygote, base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepared_run(zygote, base, tmp_path_factory.mktemp("prepared"), STEPS)


def test_step_that_hangs_is_ended_and_the_run_goes_on(zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path) -> None:
    config = replace(copy_work(prepared, tmp_path), stall_seconds=2.0)

    stalled = zygote.run(config, Stage.TRAIN, **{ENV_HANG_AT: "8"})
    resumed = zygote.run(config, Stage.TRAIN)

    assert (stalled.exit_code, stalled.reason) == (ExitCode.STALLED, Reason.STEP_STALLED)
    assert resumed.train is not None
    assert (resumed.exit_code, resumed.train.resumed_from_step, resumed.train.steps_lost) == (ExitCode.DONE, 5, 2)
    assert losses(config) == losses(undisturbed)
    assert weights(config) == weights(undisturbed)


def test_half_the_micro_batch_sees_the_same_rows_in_the_same_order(
    zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path
) -> None:
    config = copy_work(prepared, tmp_path)

    failed = zygote.run(config, Stage.TRAIN, **{ENV_OUT_OF_MEMORY_AT: "7"})
    halved = replace(config, training=config.training.model_copy(update={"micro_batch_size": 2}))  # as the operator does
    resumed = zygote.run(halved, Stage.TRAIN)

    assert (failed.exit_code, failed.reason) == (ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY)
    assert resumed.train is not None
    assert (resumed.train.resumed_from_step, resumed.train.micro_batch_size, resumed.train.samples) == (5, 2, 4 * STEPS)
    assert rows_of_steps(halved) == rows_of_steps(undisturbed)
    assert losses(halved) == pytest.approx(losses(undisturbed), rel=0.05)
