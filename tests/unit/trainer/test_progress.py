"""What a running stage tells: where its time goes, what it has reached, and only what is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneloop_trainer import metrics
from tuneloop_trainer.contract import MAX_PHASES, Progress, Stage
from tuneloop_trainer.progress import ProgressWriter, read_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(tmp_path: Path, clock: Clock) -> ProgressWriter:
    return ProgressWriter(tmp_path / "progress.json", Stage.TRAIN, "pod-1", clock)


def test_each_phase_has_the_time_that_it_took(progress: ProgressWriter, clock: Clock, tmp_path: Path) -> None:
    clock.now += 2
    progress.phase("LoadingModel")
    clock.now += 30
    progress.phase("Training", step=1)
    clock.now += 5
    progress.phase("Saving")
    clock.now += 4
    progress.phase("Training", step=2)
    clock.now += 1

    told = read_progress(tmp_path / "progress.json")
    assert told is not None
    assert told.phase_seconds == {"Starting": 2, "LoadingModel": 30, "Training": 5, "Saving": 4}
    assert progress.phase_seconds() == {"Starting": 2, "LoadingModel": 30, "Training": 6, "Saving": 4}


def test_phases_without_end_are_no_answer_without_end(progress: ProgressWriter, clock: Clock) -> None:
    for number in range(3 * MAX_PHASES):
        clock.now += 1
        progress.phase(f"Phase {number}")

    assert len(progress.phase_seconds()) == MAX_PHASES


def test_first_step_is_told_once_from_the_workers_start(progress: ProgressWriter, clock: Clock) -> None:
    clock.now += 12.5
    progress.first_step_done()
    clock.now += 60
    progress.first_step_done()

    assert progress.current.first_step_seconds == 12.5


def test_metrics_have_what_is_known_and_nothing_else() -> None:
    progress = Progress(pod_uid="a", stage=Stage.TRAIN, phase="Training", utilisation=37.5, phase_seconds={"LoadingModel": 3.5})

    told = metrics.render(progress).decode()

    assert "tuneloop_trainer_utilisation_ratio 0.375" in told
    assert 'tuneloop_trainer_phase_seconds{phase="LoadingModel"} 3.5' in told
    assert "tuneloop_trainer_learning_rate" not in told, "no zero for what is not known"
    assert "tuneloop_trainer_first_step_seconds" not in told
