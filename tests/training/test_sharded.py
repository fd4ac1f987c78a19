"""Processes that divide weights, gradients and optimiser among them (FSDP) train as one does, and any number of them takes it up."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import Zygote
from tests.training.runs import killed_and_resumed, losses, prepared_run, rows_of_steps, rows_together, together, wait_for_step
from tests.unit.trainer.builders import copy_work
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tuneloop_trainer.contract import ExitCode, RunConfig, Stage
from tuneloop_trainer.training import parts

STEPS = 8
WEIGHTS = {"LoRA": "adapter_model.safetensors", "Full": "model.safetensors"}


@pytest.fixture(scope="module", params=WEIGHTS)
def prepared(request: pytest.FixtureRequest, zygote: Zygote, decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """In fp32, where no rounding hides a wrong gradient, and in several micro-batches a step."""
    config = prepared_run(zygote, decoder, tmp_path_factory.mktemp(request.param), STEPS, dropout=0.0, method=request.param)
    exact = {"precision": "FP32", "learning_rate": 1e-3, "micro_batch_size": 1}
    output = "Adapter" if request.param == "LoRA" else "Merged"
    return config.model_copy(update={"training": config.training.model_copy(update=exact), "output_format": output})


@pytest.fixture(scope="module")
def alone(zygote: Zygote, prepared: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = prepare_again(zygote, prepared, tmp_path_factory.mktemp("alone"))
    assert zygote.run(config, Stage.TRAIN).exit_code == ExitCode.DONE
    return config


def prepare_again(zygote: Zygote, prepared: RunConfig, root: Path, **training: object) -> RunConfig:
    config = copy_work(prepared, root)
    config = config.model_copy(update={"training": config.training.model_copy(update=training)})
    assert zygote.run(config, Stage.PREPARE).exit_code == ExitCode.DONE
    return config


def sharded(zygote: Zygote, prepared: RunConfig, root: Path) -> RunConfig:
    return prepare_again(zygote, prepared, root, parallelism="FSDP")


def processes(count: int) -> dict[str, str]:
    return together(count) if count > 1 else {}


def assert_as_alone(config: RunConfig, alone: RunConfig) -> None:
    assert rows_together(config) == {step: sorted(rows) for step, rows in rows_of_steps(alone).items()}
    assert losses(config) == pytest.approx(losses(alone), rel=1e-4)
    (found, expected) = (load_file(Path(of.paths.work) / "train" / "final" / WEIGHTS[of.method.type]) for of in (config, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=1e-4)


def test_processes_with_a_part_each_train_as_one_does(zygote: Zygote, prepared: RunConfig, alone: RunConfig, tmp_path: Path) -> None:
    config = sharded(zygote, prepared, tmp_path)

    result = zygote.run(config, Stage.TRAIN, **together())

    assert (result.exit_code, result.message) == (ExitCode.DONE, "")
    assert_as_alone(config, alone)
    assert zygote.run(config, Stage.PACKAGE).exit_code == ExitCode.DONE


@pytest.mark.parametrize(("first", "second"), [(2, 1), pytest.param(1, 4, marks=pytest.mark.long)])
def test_another_number_of_processes_takes_up_what_was_saved_in_parts(
    zygote: Zygote, prepared: RunConfig, alone: RunConfig, tmp_path: Path, first: int, second: int
) -> None:
    config = sharded(zygote, prepared, tmp_path)
    attempt = zygote.start(config, Stage.TRAIN, **processes(first))
    wait_for_step(attempt, config, 2)

    attempt.signal_worker(attempt.workers()[-1], signal.SIGTERM)
    code = attempt.wait()
    stopped = attempt.result().train
    pieces = pieces_of_matrices(config)
    finished = zygote.run(config, Stage.TRAIN, **processes(second)).train

    assert code == ExitCode.INTERRUPTED
    assert stopped is not None
    assert finished is not None
    assert pieces == {first}, "each process holds a part of every matrix and of its moments, and writes it"
    assert (finished.resumed_from_step, finished.steps_lost, finished.step) == (stopped.step, 0, STEPS)
    assert_as_alone(config, alone)


@pytest.mark.long
@pytest.mark.parametrize("publish", [None, "Asynchronous"])
def test_process_that_is_killed_ends_all_and_they_go_on_from_the_last_parts(
    publish: str | None, zygote: Zygote, prepared: RunConfig, alone: RunConfig, tmp_path: Path
) -> None:
    config = sharded(zygote, prepared, tmp_path)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"publish": publish})})

    finished = killed_and_resumed(zygote, config)

    assert finished.resumed_from_step in ((5,) if publish is None else (None, 5)), "what was not published yet is not taken up"
    assert_as_alone(config, alone)


def test_parts_are_not_taken_for_whole_checkpoints_nor_those_for_parts(zygote: Zygote, prepared: RunConfig, tmp_path: Path) -> None:
    config = sharded(zygote, prepared, tmp_path)
    attempt = zygote.start(config, Stage.TRAIN)
    wait_for_step(attempt, config, 6)
    attempt.kill_all()
    attempt.wait()
    whole = config.model_copy(update={"training": config.training.model_copy(update={"parallelism": None})})

    finished = zygote.run(whole, Stage.TRAIN).train

    assert finished is not None
    assert (finished.resumed_from_step, finished.step) == (None, STEPS)


def test_full_store_is_told_as_such_to_all_processes() -> None:
    full = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"), parts._telling():
        raise parts.CheckpointException("save", {1: (full, None)})  # type: ignore[dict-item]


def pieces_of_matrices(config: RunConfig) -> set[int]:
    """In how many pieces the newest checkpoint holds its matrices."""
    newest = max((Path(config.paths.work) / "train" / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name[5:]))
    held = FileSystemReader(newest / parts.FOLDER).read_metadata().state_dict_metadata.values()
    return {len(of.chunks) for of in held if isinstance(of, TensorStorageMetadata) and len(of.size) == 2}
