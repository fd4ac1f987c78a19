"""Training resumes where it was, to the last bit, and stops when the loss is no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.training.runs import losses, weights
from tests.unit.trainer.builders import (
    copy_work,
    make_base,
    make_config,
    make_gated,
    make_rows,
    make_source,
    replace,
    run_stage,
    write_jsonl,
)
from tests.unit.trainer.hubs import COMMIT, hub_of

from tuneloop_trainer.contract import Base, Checkpoint, Curation, ExitCode, Method, Reason, RunConfig, Stage
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.manifests import verify


class InterruptAfter(Interrupts):
    """As if SIGTERM came during the given step."""

    def __init__(self, step: int) -> None:
        self._left = step
        super().__init__()

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left <= 0

    @requested.setter
    def requested(self, value: bool) -> None: ...


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunConfig:
    """Two sources, so that the order is not trivial; dropout, so that random numbers count."""
    root = tmp_path_factory.mktemp("prepared")
    sources = [
        make_source(write_jsonl(root / "data" / "old.jsonl", make_rows(20)), weight=0.5),
        make_source(write_jsonl(root / "data" / "new.jsonl", make_rows(9, 500)), weight=0.5),
    ]
    config = make_config(root, base, sources)
    config = replace(config, method=Method(type="LoRA", lora=config.method.lora.model_copy(update={"dropout": 0.1})))  # type: ignore[union-attr]
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
    return config


@pytest.fixture(scope="module")
def undisturbed(prepared: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = copy_work(prepared, tmp_path_factory.mktemp("undisturbed"))
    assert run_stage(config, Stage.TRAIN).exit_code == ExitCode.DONE
    return config


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.paths.work) / "train" / "checkpoints").glob("step-*"))


def test_interrupted_run_ends_bit_equal_to_an_undisturbed_one(prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path) -> None:
    config = copy_work(prepared, tmp_path)

    stopped = run_stage(config, Stage.TRAIN, InterruptAfter(3))
    resumed = run_stage(config, Stage.TRAIN)

    assert (stopped.exit_code, stopped.reason, stopped.train.step) == (ExitCode.INTERRUPTED, Reason.PREEMPTED, 3)
    assert (resumed.exit_code, resumed.train.resumed_from_step, resumed.train.steps_lost) == (ExitCode.DONE, 3, 0)
    assert losses(config) == losses(undisturbed)
    assert weights(config) == weights(undisturbed)


def test_torn_checkpoint_is_passed_over_and_the_lost_steps_are_told(prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path) -> None:
    config = copy_work(prepared, tmp_path)
    run_stage(config, Stage.TRAIN, InterruptAfter(5))
    assert checkpoints(config) == ["step-4", "step-5"]
    optimizer = Path(config.paths.work) / "train" / "checkpoints" / "step-5" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])

    resumed = run_stage(config, Stage.TRAIN)

    assert (resumed.train.resumed_from_step, resumed.train.steps_lost) == (4, 1)
    assert weights(config) == weights(undisturbed)


def test_kill_after_the_last_checkpoint_loses_nothing(
    prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_work(prepared, tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr("tuneloop_trainer.stages.train.finish", None)
        assert run_stage(config, Stage.TRAIN).exit_code == ExitCode.BUG

    resumed = run_stage(config, Stage.TRAIN)

    assert (resumed.exit_code, resumed.train.step, resumed.train.resumed_from_step) == (ExitCode.DONE, 6, 6)
    assert resumed.train.loss == losses(undisturbed)[-1]
    assert weights(config) == weights(undisturbed)
    assert run_stage(config, Stage.TRAIN) == resumed, "what was done without a step is told again too"


def test_kill_after_the_weights_are_published_leaves_no_checkpoints_behind(
    prepared: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_work(prepared, tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr("tuneloop_trainer.stages.train.tidy", None)
        assert run_stage(config, Stage.TRAIN).exit_code == ExitCode.BUG
    assert checkpoints(config)

    assert run_stage(config, Stage.TRAIN).exit_code == ExitCode.DONE
    assert checkpoints(config) == []


def test_other_micro_batch_sees_the_same_rows(prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path) -> None:
    config = copy_work(replace(prepared, method=Method(type="LoRA", lora=prepared.method.lora)), tmp_path)
    run_stage(config, Stage.TRAIN, InterruptAfter(2))
    halved = replace(config, training=config.training.model_copy(update={"micro_batch_size": 2}))

    resumed = run_stage(halved, Stage.TRAIN)

    assert (resumed.train.resumed_from_step, resumed.train.micro_batch_size, resumed.train.samples) == (2, 2, 24)
    assert losses(halved) == pytest.approx(losses(undisturbed), rel=0.01)


def test_checkpoints_of_another_configuration_are_not_resumed_from(prepared: RunConfig, tmp_path: Path) -> None:
    config = copy_work(prepared, tmp_path)
    run_stage(config, Stage.TRAIN, InterruptAfter(3))
    other = replace(config, training=config.training.model_copy(update={"learning_rate": 1e-3}))
    assert run_stage(other, Stage.PREPARE).exit_code == ExitCode.DONE

    assert run_stage(other, Stage.TRAIN).train.resumed_from_step is None


def test_finished_training_tells_its_result_again(undisturbed: RunConfig) -> None:
    folder = Path(undisturbed.paths.work) / "train" / "final"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    again = run_stage(undisturbed, Stage.TRAIN)

    assert (again.exit_code, again.train.step) == (ExitCode.DONE, 6)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_progress_tells_how_far_training_is(prepared: RunConfig, tmp_path: Path) -> None:
    from tests.unit.trainer.builders import read_progress_file

    config = copy_work(prepared, tmp_path)
    run_stage(config, Stage.TRAIN, InterruptAfter(3))

    progress = read_progress_file(tmp_path)

    assert (progress.step, progress.max_steps, progress.percent, progress.samples) == (3, 6, 50.0, 12)
    assert progress.loss is not None
    assert progress.checkpoint_step == 3
    assert progress.remaining_seconds is not None
    assert (progress.tokens_per_second or 0) > 0


def test_adapters_are_fp32_over_a_frozen_bf16_base(prepared: RunConfig, base: Path) -> None:
    import torch

    from tuneloop_trainer.objectives import objective_of
    from tuneloop_trainer.stages.train import load

    objective = objective_of(prepared)
    model = objective.with_adapter(load(objective, base))

    dtypes = {(name.split(".")[-2 if "lora" not in name else -3], p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert {dtype for _, dtype, trained in dtypes if trained} == {torch.float32}
    assert {dtype for _, dtype, trained in dtypes if not trained} == {torch.bfloat16}
    trained = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_full_training_keeps_fp32_masters(prepared: RunConfig, base: Path) -> None:
    import torch

    from tuneloop_trainer.objectives import objective_of
    from tuneloop_trainer.stages.train import load

    model = load(objective_of(replace(prepared, method=Method(type="Full"))), base)

    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True)}


def test_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = make_config(tmp_path, base)
    run_stage(config, Stage.PREPARE)

    result = run_stage(config, Stage.TRAIN)

    assert (result.exit_code, result.reason) == (ExitCode.NON_FINITE, Reason.NON_FINITE_LOSS)
    assert result.message.startswith("Step 1: loss nan")
    assert not (tmp_path / "work" / "train" / "final").exists()
    assert checkpoints(config) == []


def test_packed_rows_are_trained_on(tmp_path: Path, base: Path) -> None:
    config = make_config(tmp_path, base)
    config = replace(config, training=config.training.model_copy(update={"packing": True, "max_steps": 2}))
    summary = run_stage(config, Stage.PREPARE).prepare
    card = json.loads((tmp_path / "work" / "prepare" / "card.json").read_text())

    result = run_stage(config, Stage.TRAIN)

    assert summary.rows_kept == 40
    assert card["sources"][0]["rows"] < 20
    assert result.train.step == 2


def test_training_stops_early_and_keeps_the_best_weights(tmp_path: Path, base: Path) -> None:
    config = make_config(tmp_path, base, validation_fraction=0.2, curation=Curation(decontaminate=False))
    # Nothing is learned at this rate, so the first of the evaluations, every 2 steps, stays the best.
    training = config.training.model_copy(update={"early_stopping_patience": 2, "learning_rate": 1e-30, "max_steps": 20})
    config = replace(config, training=training, checkpoint=Checkpoint(every_minutes=None, every_steps=1, keep=1))
    run_stage(config, Stage.PREPARE)
    interrupted = run_stage(config, Stage.TRAIN, InterruptAfter(5))

    result = run_stage(config, Stage.TRAIN)

    assert interrupted.exit_code == ExitCode.INTERRUPTED
    assert (result.exit_code, result.train.step) == (ExitCode.DONE, 6), "the resumed run stops where an undisturbed one would"
    assert verify(tmp_path / "work" / "train" / "final").metadata["step"] == 2


def test_changed_base_is_refused(prepared: RunConfig, tmp_path: Path, base: Path) -> None:
    import shutil

    copy: Any = shutil.copytree(base, tmp_path / "base")
    config = copy_work(prepared, tmp_path / "run")
    config = replace(config, base=Base(uri=config.base.uri, path=str(copy)))
    run_stage(config, Stage.PREPARE)
    (Path(copy) / "generation_config.json").write_text("{}")

    result = run_stage(config, Stage.TRAIN)

    assert result.exit_code == ExitCode.BUG
    assert "changed since it was pinned" in result.message


def test_later_stages_use_the_commit_that_prepare_found(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(make_gated(tmp_path, base), base=Base(uri="hf://org/tiny", repository="org/tiny"))
    with hub_of(base, monkeypatch) as hub:
        summary = run_stage(config, Stage.PREPARE).prepare
        hub.commit = "f" * 40  # main moves on
        hub.files["config.json"] = b"{}"

        later = [run_stage(config, stage) for stage in (Stage.TRAIN, Stage.PACKAGE, Stage.EVALUATE)]

    assert summary.base_revision == COMMIT
    assert [result.exit_code for result in later] == [ExitCode.DONE] * 3
    assert verify(Path(config.paths.work) / "prepare").metadata["base_revision"] == COMMIT
    adapter = json.loads((Path(config.paths.artifact) / "adapter_config.json").read_text())
    assert adapter["revision"] == COMMIT
