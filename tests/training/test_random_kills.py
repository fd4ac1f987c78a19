"""Killed at any moment, in any way, a run ends as if nobody had touched it: the same rows at each step, the same losses to the last bit."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from tests.training.conftest import Attempt, Zygote
from tests.training.runs import EVERY_STEPS, forwards, losses, prepared_run, rows_by_attempt, rows_of_steps, weights
from tests.unit.trainer.builders import copy_work

from tuneloop_trainer.contract import ExitCode, RunConfig, Stage, TrainSummary
from tuneloop_trainer.errors import Mismatch
from tuneloop_trainer.manifests import verify

MAX_STEPS = 60
SEED = 20260301
Publish = Literal["Asynchronous"] | None


@dataclass
class Run:
    """One run of the disturbed kind, and what was seen of it."""

    config: RunConfig
    steps_done: int = 0
    """By all attempts together."""
    wrong_resumes: list[str] = field(default_factory=list)

    @property
    def train(self) -> Path:
        return Path(self.config.paths.work) / "train"

    def newest_complete(self) -> int:
        """By the test's own look at every file."""
        complete = [0]
        for folder in (self.train / "checkpoints").glob("step-*"):
            try:
                verify(folder)
                complete.append(int(folder.name.removeprefix("step-")))
            except Mismatch:
                pass
        return max(complete)

    def reached(self) -> int:
        """The last step done. What is final is told by itself: its checkpoints go with it, before the attempt is over."""
        if (self.train / "final").exists():
            return MAX_STEPS
        try:
            return int(json.loads((self.train / "checkpoints" / "position.json").read_bytes())["reached"])
        except (OSError, ValueError):
            return 0

    def is_saving(self) -> bool:
        return any(self.train.glob("writing/checkpoint-*"))

    def tear_newest(self) -> None:
        """As a store does that lost the end of a file in a power cut."""
        if (step := self.newest_complete()) > EVERY_STEPS:
            torn = self.train / "checkpoints" / f"step-{step}" / "optimizer.pt"
            torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])


@pytest.fixture(scope="module")
def prepared(zygote: Zygote, base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepared_run(zygote, base, tmp_path_factory.mktemp("prepared"), MAX_STEPS)


# --- killing -----------------------------------------------------------------


def wait_until(attempt: Attempt, happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if happened():
            return True
        if attempt.is_over():
            return False
        time.sleep(0.002)
    raise AssertionError("neither the moment nor the end came")


def kill(attempt: Attempt, run: Run, chance: random.Random) -> bool:
    """Kill the attempt at a random moment in a random way; False where it had ended by itself."""
    moment = chance.choice(("a step", "a step", "a save", "a save", "the start"))
    begun = run.reached()
    match moment:
        case "a step":
            step = begun + chance.randint(1, 9)
            came = wait_until(attempt, lambda: run.reached() >= step)
            time.sleep(chance.uniform(0, 0.04))
        case "a save":
            came = wait_until(attempt, lambda: run.reached() > begun) and wait_until(attempt, run.is_saving)
            time.sleep(chance.uniform(0, 0.03))
        case _:
            came = True
            time.sleep(chance.uniform(0, 0.5))
    if not came or attempt.is_over():
        return False
    match chance.choice(("pod", "pod", "worker", "SIGTERM")):
        case "pod":
            attempt.kill_all()
        case "worker":
            for pid in attempt.workers():
                attempt.signal_worker(pid, signal.SIGKILL)
        case _:
            attempt.signal_launcher(signal.SIGTERM)
    return True


def disturb(zygote: Zygote, run: Run, chance: random.Random, kills: int) -> tuple[int, TrainSummary]:
    """Attempts until the run is done, of which at most `kills` are killed. Returns how many were, and the last summary."""
    killed = 0
    while True:
        resumes_at, seen = run.newest_complete(), len(list(forwards(run.config)))
        attempt = zygote.start(run.config, Stage.TRAIN)
        if killed < kills and kill(attempt, run, chance):
            killed += 1
        code = attempt.wait()
        first = next((forward.step for forward in list(forwards(run.config))[seen:]), None)
        if first is not None and first != resumes_at + 1:
            run.wrong_resumes.append(f"began with step {first} after a checkpoint of step {resumes_at}")
        if first is not None:
            run.steps_done += (MAX_STEPS if code == ExitCode.DONE else run.reached()) - resumes_at
        if code == ExitCode.DONE:
            summary = attempt.result().train
            assert summary is not None
            return killed, summary
        assert code in (-signal.SIGKILL, ExitCode.INTERRUPTED, ExitCode.OUT_OF_MEMORY), attempt.result().message
        if killed < kills and chance.random() < 0.2:
            run.tear_newest()


def assert_as_undisturbed(run: Run, summary: TrainSummary, undisturbed: RunConfig) -> None:
    assert run.wrong_resumes == []
    expected = rows_of_steps(undisturbed)
    assert len(expected) == MAX_STEPS
    wrong = [step for (_, step), rows in rows_by_attempt(run.config).items() if rows != expected[step]]
    assert wrong == [], "steps that saw other rows, kept or lost"
    assert rows_of_steps(run.config) == expected
    assert losses(run.config) == losses(undisturbed)
    assert weights(run.config) == weights(undisturbed)
    assert summary.steps_lost == run.steps_done - MAX_STEPS
    assert not (run.train / "checkpoints").exists()
    assert not list(run.train.glob(".*tmp*"))


def survive(zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, root: Path, kills: int, publish: Publish) -> None:
    prepared = prepared.model_copy(update={"checkpoint": prepared.checkpoint.model_copy(update={"publish": publish})})
    chance = random.Random(SEED + kills)
    killed = rounds = lost = 0
    while killed < kills:
        run = Run(copy_work(prepared, root / str(rounds)))
        more, summary = disturb(zygote, run, chance, kills - killed)
        assert_as_undisturbed(run, summary, undisturbed)
        killed, rounds, lost = killed + more, rounds + 1, lost + summary.steps_lost
    print(f"{killed} kills in {rounds} runs of {MAX_STEPS} steps: 0 wrong resumes, {lost} steps done again")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("publish", [None, "Asynchronous"])
def test_ten_kills_change_nothing(publish: Publish, zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path) -> None:
    survive(zygote, prepared, undisturbed, tmp_path, kills=10, publish=publish)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("publish", [None, "Asynchronous"])
def test_sixty_kills_change_nothing(publish: Publish, zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path) -> None:
    survive(zygote, prepared, undisturbed, tmp_path, kills=60, publish=publish)
