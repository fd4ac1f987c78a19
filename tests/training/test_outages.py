"""A store that is full or away costs no run, and leaves nothing half-written; a loss that leaves its course keeps the last good."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.training.test_training import InterruptAfter
from tests.unit.trainer.builders import make_config, make_progress, run_stage

from tuneloop_trainer import manifests
from tuneloop_trainer.contract import ExitCode, Reason, RunConfig, Stage
from tuneloop_trainer.errors import LossSpike
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.manifests import verify
from tuneloop_trainer.training import checkpoints as checkpointing

FULL = OSError(errno.ENOSPC, "No space left on device")


class Store:
    """Takes or refuses what is flushed to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushes = 0
        self.refuses: Any = lambda flush: False
        original = manifests._flush_entry

        def flush(path: Path) -> None:
            if "checkpoint-" in str(path):
                self.flushes += path.name.startswith("checkpoint-") or path.name == "optimizer.pt"
                if path.name == "optimizer.pt" and self.refuses(self.flushes):
                    raise OSError(errno.EIO, "Input/output error", str(path))
            original(path)

        monkeypatch.setattr(manifests, "_flush_entry", flush)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("tuneloop_trainer.training.callbacks.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(checkpointing, "AGAIN_SECONDS", 0.0)
    return Store(monkeypatch)


@pytest.fixture
def config(tmp_path: Path, base: Path) -> RunConfig:
    """6 steps, a checkpoint each second one."""
    config = make_config(tmp_path, base)
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
    return config


def publishing(config: RunConfig, publish: str | None) -> RunConfig:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"publish": publish})})


def complete(config: RunConfig) -> list[int]:
    folders = [path for path in (Path(config.paths.work) / "train" / "checkpoints").iterdir() if path.is_dir()]
    return sorted(int(path.name.removeprefix("step-")) for path in folders if verify(path))


@pytest.mark.parametrize("publish", [None, "Asynchronous"])
def test_run_goes_on_while_the_store_takes_nothing_and_saves_as_soon_as_it_does(
    publish: str | None, store: Store, config: RunConfig
) -> None:
    config = publishing(config, publish)
    refused = []
    store.refuses = lambda flush: len(refused) < 2 and (refused.append(flush) or True)

    result = run_stage(config, Stage.TRAIN)

    assert (result.exit_code, result.train.step) == (ExitCode.DONE, 6)
    assert len(refused) == 2
    verify(Path(config.paths.work) / "train" / "final")


@pytest.mark.parametrize("publish", [None, "Asynchronous"])
def test_store_that_stays_away_ends_the_run_for_another_attempt(
    publish: str | None, store: Store, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = publishing(config, publish)
    monkeypatch.setattr(checkpointing, "OUTAGE_SECONDS", 0.0)
    store.refuses = lambda flush: flush > 1

    result = run_stage(config, Stage.TRAIN)

    assert (result.exit_code, result.reason) == (ExitCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)
    assert "Input/output error" in result.message
    assert complete(config) == [2]
    assert store.flushes == 3, "two of the first, and the one that was refused"
    assert not list((Path(config.paths.work) / "train").glob("writing/*"))
    store.refuses = lambda flush: False
    resumed = run_stage(config, Stage.TRAIN)
    assert (resumed.exit_code, resumed.train.resumed_from_step) == (ExitCode.DONE, 2)
    assert resumed.train.steps_lost == 2 if publish is None else resumed.train.steps_lost in (3, 4), "noticed after a later step"


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.TRAIN])
def test_full_store_is_named_in_every_stage(stage: Stage, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise FULL

    monkeypatch.setattr(f"tuneloop_trainer.stages.{stage.value}.told_again", full)

    result = run_stage(make_config(tmp_path, base), stage)

    assert (result.exit_code, result.reason) == (ExitCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)
    assert result.message == "The store does not answer or is full: No space left on device."


def test_loss_that_is_no_number_keeps_the_last_good_checkpoint(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuneloop_trainer.training.trainer import Resumable

    original = Resumable.training_step

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 3 else loss

    monkeypatch.setattr(Resumable, "training_step", poisoned)

    result = run_stage(config, Stage.TRAIN)

    assert (result.exit_code, result.reason) == (ExitCode.NON_FINITE, Reason.NON_FINITE_LOSS)
    assert result.message.endswith("The checkpoint of step 2 is kept.")
    assert complete(config) == [2]


@pytest.mark.parametrize(("ratio", "last", "raises"), [(3.0, 3.1, True), (3.0, 2.9, False), (None, 1e9, False)])
def test_loss_far_above_the_median_of_the_steps_before_is_a_spike(ratio: float | None, last: float, raises: bool, tmp_path: Path) -> None:
    from tuneloop_trainer.training.callbacks import SPIKE_STEPS, ReportProgress

    report = ReportProgress(
        make_progress(tmp_path, Stage.TRAIN),
        SimpleNamespace(saved_step=15),  # type: ignore[arg-type]
        4,
        lambda: 0,
        ratio,
    )
    state: Any = SimpleNamespace(global_step=0, max_steps=100)
    report.on_train_begin(None, state, None)  # type: ignore[arg-type]
    usual = [9.0, *([1.0] * (SPIKE_STEPS - 1))]  # one high loss at the start is no measure of what is usual
    for step, loss in enumerate(usual, 1):
        state.global_step = step
        report.on_log(None, state, None, {"loss": loss})  # type: ignore[arg-type]
    state.global_step += 1

    if not raises:
        report.on_log(None, state, None, {"loss": last})  # type: ignore[arg-type]
        return
    with pytest.raises(LossSpike, match=r"Step 21: loss 3\.1 is above 3 times 1, .* The checkpoint of step 15 is kept\.") as caught:
        report.on_log(None, state, None, {"loss": last})  # type: ignore[arg-type]
    assert (caught.value.exit_code, caught.value.reason) == (ExitCode.NON_FINITE, Reason.LOSS_SPIKE)


def test_interrupted_run_that_cannot_save_says_so(store: Store, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop_trainer.training.trainer.FAREWELL_SECONDS", 0.0)
    store.refuses = lambda flush: True
    interrupts = Interrupts()
    interrupts.requested = True

    result = run_stage(config, Stage.TRAIN, interrupts)

    assert (result.exit_code, result.reason) == (ExitCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)


# --- beside the training --------------------------------------------------------


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A store that does not come back from flushing the checkpoint of step 2, until the event is set."""
    back, original = threading.Event(), manifests._flush_entry

    def flush(path: Path) -> None:
        if "checkpoint-2" in str(path):
            back.wait(60)
        original(path)

    monkeypatch.setattr(manifests, "_flush_entry", flush)
    yield back
    back.set()


def test_signal_is_answered_although_the_checkpoint_before_does_not_come_to_be(
    stuck: threading.Event, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloop_trainer.training.trainer.FAREWELL_SECONDS", 0.1)
    config = publishing(config, "Asynchronous")

    stopped = run_stage(config, Stage.TRAIN, InterruptAfter(3))

    assert (stopped.exit_code, stopped.train.step) == (ExitCode.INTERRUPTED, 3)
    assert complete(config) == [3]
    stuck.set()
    resumed = run_stage(config, Stage.TRAIN)
    assert (resumed.exit_code, resumed.train.resumed_from_step, resumed.train.steps_lost) == (ExitCode.DONE, 3, 0)


def test_store_that_takes_one_checkpoint_for_ever_ends_the_run_for_another_attempt(
    stuck: threading.Event, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloop_trainer.training.trainer.OUTAGE_SECONDS", 0.1)

    result = run_stage(publishing(config, "Asynchronous"), Stage.TRAIN)

    assert (result.exit_code, result.reason) == (ExitCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)
    assert complete(config) == []
