"""TensorBoard and MLflow get what the training logs; what they do not take costs neither the run nor its time."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3
from mlflow import MlflowClient
from tests.unit.trainer.builders import make_config, read_progress_file, replace, run_stage
from transformers import TrainerCallback, TrainerState
from urllib3.util import Retry

from tuneloop_trainer.contract import ExitCode, Mlflow, Reporting, RunConfig, Stage
from tuneloop_trainer.training import reporting
from tuneloop_trainer.training.mlflow_run import MlflowRun
from tuneloop_trainer.training.reporting import MLFLOW_RUN, Beside, telling_failure

TOKEN = "s3cret"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a run sets in its process is gone afterwards."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, decoder: Path) -> RunConfig:
    config = make_config(tmp_path_factory.mktemp("reported"), decoder)
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
    return config


def train(prepared: RunConfig, root: Path, reporting: Reporting) -> tuple[Any, Path]:
    """Train the prepared run anew, in a folder of its own; returns the result and the folder."""
    shutil.copytree(Path(prepared.paths.work), root / "work")
    config = replace(prepared, reporting=reporting, paths=prepared.paths.model_copy(update={"work": str(root / "work")}))
    result = run_stage(config, Stage.TRAIN)
    return result, root / "work" / "train"


def scalars(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps, of all event files: records of length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def test_tensorboards_files_have_every_step(prepared: RunConfig, tmp_path: Path) -> None:
    result, folder = train(prepared, tmp_path, Reporting(tensorboard=True))

    assert result.exit_code == ExitCode.DONE, result.message
    found = scalars(folder / "tensorboard")
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"):
        assert found[tag] == [1, 2, 3, 4, 5, 6], tag


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server, a process on this machine."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/runs.sqlite", "--artifacts-destination", str(folder / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command + stores, env=os.environ | quiet, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield up(f"http://127.0.0.1:{port}", process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def up(uri: str, process: subprocess.Popen[bytes]) -> str:
    retries = Retry(total=None, connect=120, backoff_factor=0.2, backoff_max=0.5)
    with urllib3.PoolManager(retries=retries) as pool:
        assert pool.request("GET", f"{uri}/health").status == 200
    assert process.poll() is None
    return uri


class Door(ThreadingHTTPServer):
    """Stands before MLflow's server: lets in who has the token, as long as the door is not shut, and notes who came."""

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        self.behind = behind
        self.logins: list[str | None] = []
        self.gate = threading.Event()
        super().__init__(("127.0.0.1", 0), Doorkeeper)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Doorkeeper(BaseHTTPRequestHandler):
    server: Door

    def do_GET(self) -> None:
        self.server.logins.append(login := self.headers.get("Authorization"))
        self.server.gate.wait()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if login == f"Bearer {TOKEN}":
            headers = {"Content-Type": "application/json"}
            answer = urllib3.request(self.command, self.server.behind + self.path, body=body, headers=headers)
            status, told = answer.status, answer.data
        else:
            status, told = 401, f"Who is {login}? ".encode() * 1000
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_POST = do_PATCH = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def door(mlflow: str) -> Iterator[Door]:
    found = Door(mlflow)
    found.gate.set()
    threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
    yield found
    found.gate.set()
    found.shutdown()
    found.server_close()


def secret(folder: Path, token: str) -> str:
    folder.mkdir()
    (folder / "MLFLOW_TRACKING_TOKEN").write_text(token + "\n")
    return str(folder)


def steps(client: MlflowClient, run: str, name: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run, name))


def test_mlflow_gets_every_step_under_the_jobs_name_with_the_secrets_keys(
    prepared: RunConfig, tmp_path: Path, door: Door, mlflow: str
) -> None:
    asked = Mlflow(tracking_uri=door.uri, experiment="e", credentials=secret(tmp_path / "secret", TOKEN))

    result, folder = train(prepared, tmp_path, Reporting(mlflow=asked))

    assert result.exit_code == ExitCode.DONE, result.message
    client = MlflowClient(tracking_uri=mlflow)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.run_name == "default/tiny"
    assert run.data.tags["tuneloop.dev/finetunejob"] == "default/tiny"
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        assert steps(client, run.info.run_id, name) == [1, 2, 3, 4, 5, 6], name
    assert run.data.params["learning_rate"] == "0.005"
    assert not [name for name, value in run.data.params.items() if str(tmp_path) in value], "no path of the store"
    assert run.info.status == "FINISHED"
    assert set(door.logins) == {f"Bearer {TOKEN}"}
    assert (folder / MLFLOW_RUN).read_text() == run.info.run_id, "for an attempt that resumes"


def told(run: MlflowRun, first: int, last: int, of: int) -> TrainerState:
    state = TrainerState(max_steps=of)
    run.on_train_begin(SimpleNamespace(to_dict=lambda: {"max_steps": of, "attempt": first}), state, None)
    for step in range(first, last + 1):
        state.global_step = step
        run.on_log(SimpleNamespace(), state, None, {"loss": 1.0 / step, "note": "no figure"})
    return state


def test_attempt_that_resumes_goes_on_with_its_run_and_one_that_was_removed_is_made_anew(tmp_path: Path, mlflow: str) -> None:
    asked, noted, client = Mlflow(tracking_uri=mlflow), tmp_path / MLFLOW_RUN, MlflowClient(tracking_uri=mlflow)

    first = MlflowRun(asked, "ns/resumed", noted, lambda: True)
    first.on_train_end(None, told(first, 1, 2, of=4), None)
    run = noted.read_text()
    assert client.get_run(run).info.status == "KILLED", "interrupted before its end"

    second = MlflowRun(asked, "ns/resumed", noted, lambda: False)
    state = told(second, 3, 4, of=4)
    assert client.get_run(run).info.status == "RUNNING"
    second.on_train_end(None, state, None)
    assert (client.get_run(run).info.status, noted.read_text()) == ("FINISHED", run)
    assert steps(client, run, "loss") == [1, 2, 3, 4]
    assert client.get_run(run).data.params["attempt"] == "1", "a server refuses to change a parameter"

    client.delete_run(run)
    third = MlflowRun(asked, "ns/resumed", noted, lambda: False)
    told(third, 1, 1, of=4)
    third.on_failure()
    assert noted.read_text() != run
    assert client.get_run(noted.read_text()).info.status == "FAILED"


def test_error_that_ends_the_training_ends_the_run_of_mlflow_too(tmp_path: Path, mlflow: str) -> None:
    run = MlflowRun(Mlflow(tracking_uri=mlflow), "ns/failed", tmp_path / MLFLOW_RUN, lambda: False)
    beside = Beside("MLflow", run, lambda count: None)

    beside.on_log(SimpleNamespace(), TrainerState(), None, {"loss": 1.0})
    with pytest.raises(ValueError, match="diverged"), telling_failure([TrainerCallback(), beside]):
        raise ValueError("diverged")

    assert MlflowClient(tracking_uri=mlflow).get_run((tmp_path / MLFLOW_RUN).read_text()).info.status == "FAILED"


def test_server_that_refuses_costs_no_step_and_its_answer_tells_no_token(
    prepared: RunConfig, tmp_path: Path, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Mlflow(tracking_uri=door.uri, credentials=secret(tmp_path / "secret", "of-another"))

    result, _ = train(prepared, tmp_path, Reporting(mlflow=asked))

    assert result.exit_code == ExitCode.DONE, result.message
    assert door.logins[0] == "Bearer of-another"
    assert read_progress_file(tmp_path).reports_lost == 9, "the begin, six steps, the summary, the end"
    warned = [record for record in caplog.records if record.name == "tuneloop.reporting"]
    assert [record.levelname for record in warned] == ["WARNING"], "once"
    assert "401" in warned[0].getMessage()
    assert "of-another" not in caplog.text
    assert len(warned[0].getMessage()) < 500


@pytest.mark.parametrize("kind", ["unreachable", "hanging"])
def test_server_that_is_away_or_hangs_costs_neither_the_run_nor_its_time(
    kind: str, prepared: RunConfig, tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "FAREWELL_SECONDS", 0.5)
    door.gate.clear()
    asked = Mlflow(tracking_uri=door.uri)
    if kind == "unreachable":
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # nobody listens there
            asked = Mlflow(tracking_uri=f"http://127.0.0.1:{taken.getsockname()[1]}")

    result, _ = train(prepared, tmp_path, Reporting(mlflow=asked))

    assert result.exit_code == ExitCode.DONE, result.message
    assert result.train.step == 6
    assert read_progress_file(tmp_path).reports_lost >= 7
    assert result.train.seconds < 8, "it would be more with one try of ten seconds in the way"


class Hanging(TrainerCallback):
    def __init__(self) -> None:
        self.gate = threading.Event()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.gate.wait()


def test_callback_that_hangs_delays_nothing_and_is_counted() -> None:
    hanging, lost = Hanging(), []
    beside = Beside("test", hanging, lost.append, waiting=3, farewell=0.05)
    state = TrainerState()

    for _ in range(10):
        beside.on_log(SimpleNamespace(), state, None, {"loss": 1.0})
    beside.on_train_end(SimpleNamespace(), state, None)

    assert lost[-1] >= 10
    hanging.gate.set()


class Watching(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs["loss"] < 0:
            raise ValueError("broken")
        self.seen.append((state.global_step, logs["loss"]))


def test_each_event_has_the_state_of_its_moment_and_a_failure_ends_no_other() -> None:
    watching, lost = Watching(), []
    beside = Beside("test", watching, lost.append)
    state = TrainerState()
    for step, loss in enumerate((3.0, -1.0, 2.0)):
        state.global_step = step
        beside.on_log(SimpleNamespace(), state, None, {"loss": loss})
    beside.on_train_end(SimpleNamespace(), state, None)

    assert watching.seen == [(0, 3.0), (2, 2.0)]
    assert lost[-1] == 1
