"""However the worker ends, the operator is told, and it can ask all the while."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.unit.trainer.builders import make_config

from tuneloop_trainer.contract import ExitCode, Progress, Reason, Stage, StageResult
from tuneloop_trainer.hardware import cpu_threads, oom_kills
from tuneloop_trainer.watchdog import LEAST_SECONDS, Watchdog

pytestmark = pytest.mark.process

RUN = """
import os, sys
from tuneloop_trainer.contract import Stage
from tuneloop_trainer.launcher import Launcher, Surroundings
sys.exit(Launcher(Stage(sys.argv[1]), Surroundings.from_environment(), (sys.executable, "-c", sys.argv[2])).run())
"""
WRITE_PROGRESS = """
import json, os, signal, sys, time
def progress(**fields):
    with open(os.environ["TUNELOOP_PROGRESS_FILE"], "w") as file:
        json.dump({"podUid": os.environ["POD_UID"], "stage": sys.argv[1], "phase": "Training"} | fields, file)
def result(code, **fields):
    with open(os.environ["TUNELOOP_RESULT_FILE"], "w") as file:
        json.dump({"stage": sys.argv[1], "exitCode": code} | fields, file)
    sys.exit(code)
"""
EARLY = """
import importlib.abc, os, runpy, signal, sys
class SendsSigterm(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "tuneloop_trainer.launcher":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, SendsSigterm())
runpy.run_module("tuneloop_trainer", run_name="__main__", alter_sys=True)
"""


class Run:
    """A launcher over a worker made of a few lines."""

    def __init__(self, root: Path, worker: str, stage: Stage = Stage.TRAIN, stall_seconds: float | None = None) -> None:
        self.root = root
        config = make_config(root, root / "base").model_copy(update={"stall_seconds": stall_seconds})
        (root / "config.json").write_text(config.model_dump_json(by_alias=True))
        environment = dict(os.environ) | {
            "TUNELOOP_CONFIG": str(root / "config.json"),
            "TERMINATION_PATH": str(root / "termination"),
            "PROGRESS_PORT": str(_free_port()),
            "POD_UID": "pod-7",
            "TMPDIR": str(root),
        }
        self.port = int(environment["PROGRESS_PORT"])
        command = [sys.executable, "-c", RUN, stage.value, WRITE_PROGRESS + worker]
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)

    def get(self, path: str) -> str:
        for _ in range(200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as response:
                    body: str = response.read().decode()
                    return body
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the launcher does not answer")

    def wait_for(self, phase: str) -> Progress:
        for _ in range(200):
            progress = Progress.model_validate_json(self.get("/progress"))
            if progress.phase == phase:
                return progress
            time.sleep(0.05)
        raise AssertionError(f"the phase never became {phase}")

    def result(self) -> StageResult:
        code = self.process.wait(timeout=30)
        result = StageResult.model_validate_json((self.root / "termination").read_bytes())
        assert result.exit_code == code
        assert json.loads((self.root / "work" / "train-result.json").read_bytes())["exitCode"] == code
        return result


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)  # its worker too, as the end of PID 1 ends a container
        run.process.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("worker", "code", "reason"),
    [
        ("result(0)", ExitCode.DONE, None),
        ('result(10, reason="DataInvalid", message="no column")', ExitCode.INVALID, Reason.DATA_INVALID),
        ('result(12, reason="NonFiniteLoss")', ExitCode.NON_FINITE, Reason.NON_FINITE_LOSS),
        ("os.kill(os.getpid(), signal.SIGKILL)", ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        ("os.abort()", ExitCode.BUG, Reason.INTERNAL_ERROR),
        ("sys.exit(3)", ExitCode.BUG, Reason.INTERNAL_ERROR),
    ],
)
def test_end_of_the_worker_is_told(worker: str, code: ExitCode, reason: Reason | None, tmp_path: Path, launched: list[Run]) -> None:
    launched.append(Run(tmp_path, worker))

    result = launched[0].result()

    assert (result.exit_code, result.reason) == (code, reason)
    assert not list(tmp_path.glob("tuneloop-*")), "scratch is removed"


def test_progress_and_metrics_are_answered_while_the_worker_is_busy(tmp_path: Path, launched: list[Run]) -> None:
    launched.append(Run(tmp_path, 'progress(step=3, maxSteps=9, loss=0.5, phase="Busy")\nwhile True: pass'))

    progress = launched[0].wait_for("Busy")
    metrics = launched[0].get("/metrics")

    assert (progress.pod_uid, progress.step, progress.max_steps) == ("pod-7", 3, 9)
    assert "tuneloop_trainer_step 3.0" in metrics
    assert "tuneloop_trainer_loss 0.5" in metrics
    assert "tuneloop_trainer_learning_rate" not in metrics, "a value that is not known has no sample"
    assert launched[0].get("/healthz") == "ok\n"


def test_sigterm_reaches_the_worker(tmp_path: Path, launched: list[Run]) -> None:
    worker = """
signal.signal(signal.SIGTERM, lambda *_: result(75, reason="Preempted", message="Saved at step 4 of 9."))
progress(phase="Ready")
while True: time.sleep(0.01)
"""
    launched.append(Run(tmp_path, worker))
    launched[0].wait_for("Ready")

    launched[0].process.send_signal(signal.SIGTERM)

    assert launched[0].result().message == "Saved at step 4 of 9."


def test_sigterm_that_comes_while_the_launcher_imports_is_not_lost(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "base")
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    environment = dict(os.environ) | {"TUNELOOP_CONFIG": str(tmp_path / "config.json"), "TERMINATION_PATH": str(tmp_path / "termination")}
    environment |= {"PROGRESS_PORT": str(_free_port()), "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", EARLY, "train"], env=environment, timeout=60, check=False)
    assert ended.returncode == ExitCode.INTERRUPTED


def test_worker_that_stops_moving_is_ended(tmp_path: Path, launched: list[Run]) -> None:
    launched.append(Run(tmp_path, "signal.signal(signal.SIGUSR1, lambda *_: None)\nprogress(step=1)\ntime.sleep(60)", stall_seconds=0.5))

    result = launched[0].result()

    assert (result.exit_code, result.reason) == (ExitCode.STALLED, Reason.STEP_STALLED)


def test_configuration_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"version": 1}')
    environment = dict(os.environ) | {"TUNELOOP_CONFIG": str(tmp_path / "config.json"), "TERMINATION_PATH": str(tmp_path / "termination")}

    code = subprocess.run([sys.executable, "-m", "tuneloop_trainer", "prepare"], env=environment, timeout=30, check=False).returncode

    assert code == ExitCode.BUG
    assert "configuration" in (tmp_path / "termination").read_text()


def at(step: int, phase: str = "Training") -> Progress:
    return Progress(pod_uid="", stage=Stage.TRAIN, phase=phase, step=step)


def test_watchdog_waits_twenty_median_steps() -> None:
    watchdog = Watchdog(None, 0.0)
    for step in range(10):
        assert not watchdog.is_stalled(at(step), 100.0 * step)

    assert watchdog.limit_seconds == 2000
    assert not watchdog.is_stalled(at(9), 900 + 1999)
    assert watchdog.is_stalled(at(9), 900 + 2001)


def test_rows_and_bytes_that_come_are_a_sign_of_life() -> None:
    watchdog, read = Watchdog(None, 0.0), at(0, "Fetching")
    assert not watchdog.is_stalled(read, 0.0)
    assert not watchdog.is_stalled(read.model_copy(update={"percent": 0.1}), 3500.0)
    assert not watchdog.is_stalled(read.model_copy(update={"percent": 0.1}), 7000.0)
    assert not watchdog.is_stalled(read.model_copy(update={"percent": 0.1, "samples": 1000}), 7200.0)
    assert watchdog.is_stalled(read.model_copy(update={"percent": 0.1, "samples": 1000}), 7200.0 + 3601)


def test_watchdog_is_patient_with_fast_steps_and_with_other_phases() -> None:
    watchdog = Watchdog(5.0, 0.0)

    assert not watchdog.is_stalled(at(0, "LoadingModel"), 0.0)
    assert not watchdog.is_stalled(at(0, "LoadingModel"), 600.0), "a limit for steps does not count while loading"
    fast = Watchdog(None, 0.0)
    for step in range(10):
        fast.is_stalled(at(step), 0.1 * step)
    assert fast.limit_seconds == LEAST_SECONDS


@pytest.mark.parametrize(("content", "threads"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("", None)])
def test_threads_follow_the_quota(content: str, threads: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(content)
    usable = len(os.sched_getaffinity(0))

    assert cpu_threads(None, tmp_path) == min(threads or usable, usable)
    assert cpu_threads(7, tmp_path) == 7


def test_oom_kills_are_read_from_the_cgroup(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) is None
    (tmp_path / "memory.events").write_text("low 0\noom 2\noom_kill 3\noom_group_kill 0\n")
    assert oom_kills(tmp_path) == 3


@pytest.mark.long
def test_real_training_is_interrupted_and_resumed(tmp_path: Path, base: Path) -> None:
    config = make_config(tmp_path, base)
    config = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 150})})
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    port = _free_port()
    environment = dict(os.environ) | {
        "TUNELOOP_CONFIG": str(tmp_path / "config.json"),
        "TERMINATION_PATH": str(tmp_path / "termination"),
        "PROGRESS_PORT": str(port),
    }
    command = [sys.executable, "-m", "tuneloop_trainer"]
    subprocess.run([*command, "prepare"], env=environment, check=True, timeout=120)

    training = subprocess.Popen([*command, "train"], env=environment)
    _wait_for_step(port, 3)
    training.send_signal(signal.SIGTERM)
    code = training.wait(timeout=60)
    stopped = StageResult.model_validate_json((tmp_path / "termination").read_bytes())
    resumed = subprocess.run([*command, "train"], env=environment, check=False, timeout=200).returncode
    finished = StageResult.model_validate_json((tmp_path / "termination").read_bytes())

    assert (code, resumed) == (ExitCode.INTERRUPTED, ExitCode.DONE)
    assert stopped.train is not None
    assert finished.train is not None
    assert 3 <= stopped.train.step < 150
    assert (finished.train.resumed_from_step, finished.train.step, finished.train.steps_lost) == (stopped.train.step, 150, 0)


def _wait_for_step(port: int, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=2) as response:
                if Progress.model_validate_json(response.read()).step >= step:
                    return
        except OSError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")
