"""Fixtures of the tests that train: a base model, and a process to fork stages from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.training.zygote import ENV_SAMPLES
from tests.unit.trainer.builders import copy_work, make_base, make_encoder_decoder

from tuneloop_trainer.contract import ExitCode, RunConfig, Stage, StageResult

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Attempt:
    """A launcher that runs."""

    def __init__(self, zygote: Zygote, pid: int, root: Path) -> None:
        self._zygote = zygote
        self.pid = pid
        self.root = root

    def signal_launcher(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_all(self) -> None:
        """As the end of a container: launcher and worker at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def signal_worker(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def workers(self) -> list[int]:
        with suppress(OSError):
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        return []

    def is_over(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    def wait(self) -> int:
        """The launcher's exit code; negative where a signal ended it."""
        return self._zygote.read()

    def result(self) -> StageResult:
        return StageResult.model_validate_json((self.root / "termination").read_bytes())


class Zygote:
    """The process that launchers are forked from, one at a time."""

    def __init__(self) -> None:
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "tests.training.zygote"]
        self._process = subprocess.Popen(
            command, env=environment, cwd=Path(__file__).parents[2], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def start(self, config: RunConfig, stage: Stage, **extra: str) -> Attempt:
        root = Path(config.paths.work).parent
        (root / "config.json").write_text(config.model_dump_json(by_alias=True))
        (root / "termination").unlink(missing_ok=True)
        environment = {
            "TUNELOOP_CONFIG": str(root / "config.json"),
            "TERMINATION_PATH": str(root / "termination"),
            "PROGRESS_PORT": str(free_port()),
            "POD_UID": "pod-1",
            "TMPDIR": str(root),
            ENV_SAMPLES: str(root / "samples.jsonl"),
        } | extra
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"stage": stage.value, "environment": environment}) + "\n")
        self._process.stdin.flush()
        return Attempt(self, self.read(), root)

    def run(self, config: RunConfig, stage: Stage, **extra: str) -> StageResult:
        attempt = self.start(config, stage, **extra)
        attempt.wait()
        return attempt.result()

    def read(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder_decoder(tmp_path_factory.mktemp("encoder-decoder") / "tiny")


@pytest.fixture(scope="session")
def base(decoder: Path) -> Path:
    return decoder


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, prepared: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run that a module has `prepared`, trained by one process to its end."""
    config = copy_work(prepared, tmp_path_factory.mktemp("undisturbed"))
    assert zygote.run(config, Stage.TRAIN).exit_code == ExitCode.DONE
    return config
