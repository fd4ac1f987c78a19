"""Checkpoints that are published beside the training: the same run, whatever ends it and whatever the store does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.training.conftest import Zygote
from tests.training.runs import EVERY_STEPS, losses, prepared_run, together, wait_for_step
from tests.unit.trainer.builders import copy_work, make_progress
from transformers import TrainerControl, TrainerState

from tuneloop_trainer.contract import Checkpoint, ExitCode, RunConfig, Stage
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.manifests import verify
from tuneloop_trainer.training.callbacks import AGAIN_SECONDS, DecideCheckpoints
from tuneloop_trainer.training.checkpoints import Checkpoints
from tuneloop_trainer.training.publishing import Late, Publisher
from tuneloop_trainer.training.world import World

STEPS = 14


@pytest.fixture(scope="module")
def prepared(zygote: Zygote, decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepared_run(zygote, decoder, tmp_path_factory.mktemp("prepared"), STEPS)


def asynchronous(prepared: RunConfig, root: Path) -> RunConfig:
    config = copy_work(prepared, root)
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"publish": "Asynchronous"})})


def test_signal_is_answered_with_a_checkpoint_of_that_step_whatever_is_being_published(
    zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path
) -> None:
    config = asynchronous(prepared, tmp_path)
    attempt = zygote.start(config, Stage.TRAIN)
    wait_for_step(attempt, config, EVERY_STEPS + 1)
    attempt.signal_launcher(signal.SIGTERM)
    assert attempt.wait() == ExitCode.INTERRUPTED
    stopped = attempt.result().train

    finished = zygote.run(config, Stage.TRAIN).train

    assert stopped is not None
    assert finished is not None
    assert (finished.resumed_from_step, finished.steps_lost) == (stopped.step, 0)
    assert losses(config) == losses(undisturbed)


def test_two_processes_publish_once_both_have_flushed_and_stop_together(
    zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path
) -> None:
    config = asynchronous(prepared, tmp_path)
    attempt = zygote.start(config, Stage.TRAIN, **together())
    wait_for_step(attempt, config, EVERY_STEPS + 2)
    attempt.signal_worker(attempt.workers()[1], signal.SIGTERM)
    assert attempt.wait() == ExitCode.INTERRUPTED
    stopped = attempt.result().train
    folder = Path(config.paths.work) / "train" / "checkpoints"
    published = sorted(verify(path).metadata["step"] for path in folder.glob("step-*"))

    finished = zygote.run(config, Stage.TRAIN, **together()).train

    assert stopped is not None
    assert finished is not None
    assert len(published) == 2, "the one on its way, and that of the signal"
    assert published[-1] == stopped.step
    assert (finished.resumed_from_step, finished.steps_lost) == (stopped.step, 0)
    assert losses(config) == pytest.approx(losses(undisturbed), rel=0.05), "dropout is drawn by each process for itself"


# --- what publishes -----------------------------------------------------------


def test_nothing_waits_for_a_slow_store_unless_asked_to(tmp_path: Path) -> None:
    publisher, store = Publisher(World()), threading.Event()
    publisher.start(5, tmp_path, store.wait)

    assert [publisher.settle(), publisher.settle()] == [None, None]
    assert publisher.pending_step == 5
    store.set()
    assert publisher.settle(60) == 5
    assert (publisher.pending_step, publisher.settle(60)) == (None, None)


def test_what_fails_beside_the_training_is_told_at_the_next_look(tmp_path: Path) -> None:
    publisher = Publisher(World())

    def fail() -> None:
        raise OSError(28, "No space left on device")

    publisher.start(5, tmp_path, fail)
    with pytest.raises(OSError, match="No space left"):
        publisher.settle(60)
    assert publisher.pending_step is None


class OfTwo(World):
    """The first of two processes; what the other one votes is known."""

    others: tuple[bool, bool] = (False, False)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        return tuple(mine or other for mine, other in zip(flags, self.others, strict=True))


def test_part_that_cannot_be_flushed_is_not_published(tmp_path: Path) -> None:
    publisher = Publisher(OfTwo(0, 2))
    publisher.start(5, tmp_path / "missing", lambda: pytest.fail("published"))
    with pytest.raises(OSError, match="missing"):
        publisher.settle(60)
    assert publisher.settle(60) is None


@pytest.mark.parametrize(("others", "told"), [((True, False), Late), ((False, True), OSError)])
def test_part_of_another_process_that_is_late_or_lost_is_not_published(
    others: tuple[bool, bool], told: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OfTwo, "others", others)
    publisher = Publisher(OfTwo(0, 2))
    publisher.start(5, tmp_path, lambda: pytest.fail("published"))
    with pytest.raises(told):
        publisher.settle(60)
    assert publisher.settle(60) is None


def test_what_takes_longer_than_it_was_waited_for_is_no_longer_looked_after(tmp_path: Path) -> None:
    publisher, store = Publisher(World()), threading.Event()
    publisher.start(5, tmp_path, store.wait)
    with pytest.raises(Late, match=r"not published after 0 s"):
        publisher.settle(0.01)
    assert publisher.pending_step is None
    store.set()


def test_process_ends_although_the_store_never_comes_back(tmp_path: Path) -> None:
    program = (
        "import threading; from pathlib import Path; from tuneloop_trainer.training.publishing import Publisher;"
        "from tuneloop_trainer.training.world import World;"
        f"Publisher(World()).start(5, Path({str(tmp_path)!r}), threading.Event().wait)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_checkpoint_that_could_not_be_published_is_made_up_for_soon(tmp_path: Path) -> None:
    checkpoints, now = Checkpoints(tmp_path, "plan", keep=1), [0.0]

    def settle() -> None:
        checkpoints.has_missed = now[0] == 1.0

    plan, progress = Checkpoint(every_minutes=60), make_progress(tmp_path, Stage.TRAIN)
    decide = DecideCheckpoints(plan, Interrupts(), checkpoints, progress, settle, lambda: now[0])
    saves = []
    for second in (0.0, 1.0, 2.0, 1.0 + AGAIN_SECONDS):
        now[0] = second
        saves.append(decide.on_step_end(None, TrainerState(global_step=3, max_steps=9), TrainerControl()).should_save)

    assert saves == [False, False, False, True]
