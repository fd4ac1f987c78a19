"""SIGTERM at any moment of the worker's life: told as an interruption, or too late to matter, and never taken for a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.builders import make_config, make_progress

from tuneloop_trainer import worker
from tuneloop_trainer.contract import ExitCode, Reason, Stage, StageResult
from tuneloop_trainer.errors import Interrupted
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.results import read_result

DONE = StageResult(stage=Stage.PREPARE, exit_code=ExitCode.DONE)


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = signal.getsignal(signal.SIGTERM)
    interrupts = Interrupts()
    interrupts.install()
    yield interrupts
    signal.signal(signal.SIGTERM, before)


def test_sigterm_while_the_worker_reads_its_configuration_is_an_interruption(tmp_path: Path) -> None:
    config, result = tmp_path / "config.json", tmp_path / "result.json"
    os.mkfifo(config)
    environment = os.environ | {
        "TUNELOOP_CONFIG": str(config),
        "TUNELOOP_RESULT_FILE": str(result),
        "TUNELOOP_PROGRESS_FILE": str(tmp_path / "progress.json"),
    }
    process = subprocess.Popen([sys.executable, "-m", "tuneloop_trainer.worker", "prepare"], env=environment)
    with config.open("w") as pipe:  # opens once the worker does
        process.send_signal(signal.SIGTERM)
        pipe.write(make_config(tmp_path, tmp_path / "base").model_dump_json(by_alias=True))

    assert process.wait(timeout=60) == ExitCode.INTERRUPTED
    told = read_result(result)
    assert told is not None
    assert (told.exit_code, told.reason) == (ExitCode.INTERRUPTED, Reason.PREEMPTED)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        (lambda: signal.raise_signal(signal.SIGTERM), ExitCode.INTERRUPTED),
        (lambda: DONE, ExitCode.DONE),
    ],
)
def test_sigterm_counts_while_the_stage_runs_and_not_while_its_result_is_written(
    stage: Any, told: ExitCode, interrupts: Interrupts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_stage", lambda *_: stage())

    result = worker.run(Stage.PREPARE, make_config(tmp_path, tmp_path), make_progress(tmp_path, Stage.PREPARE), interrupts)
    signal.raise_signal(signal.SIGTERM)

    assert result.exit_code == told


def test_second_sigterm_does_not_disturb_the_answer_to_the_first(interrupts: Interrupts) -> None:
    cleaned = []

    def interrupted() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(Interrupted), interrupts:
        interrupted()
    assert cleaned


def test_deferred_sigterm_is_only_noted(interrupts: Interrupts) -> None:
    with interrupts:
        interrupts.defer()
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.requested
