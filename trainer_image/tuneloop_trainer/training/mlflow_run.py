"""One run on a tracking server of MLflow: opened, fed and ended as the training goes, and taken up again by an attempt that resumes."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from tuneloop_trainer.contract import MLFLOW_KEYS, Mlflow
from tuneloop_trainer.manifests import write_atomically
from tuneloop_trainer.stores.credentials import read_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

NO_LONGER_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What a server answers about a run that was removed for good, or put into its bin."""
DEFAULT_EXPERIMENT = "Default"
LONGEST = 500
"""Characters of a parameter's value: what every version of MLflow takes."""
BATCH = 100
"""Parameters that a server takes at once."""
HIDDEN = ("output_dir", "logging_dir", "hub_token", "push_to_hub_token", "report_to", "run_name", "_name_or_path", "name_or_path")
"""Settings that name a place in this pod, a key, or nothing that the training depends on."""
TAG = "tuneloop.dev/finetunejob"
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""What MLflow's client reads beside the Secret's keys: few, short tries, and nothing to MLflow's makers."""


class MlflowRun(TrainerCallback):
    """Its id is noted in a file. Everything raises; who calls decides what a failure costs."""

    def __init__(self, asked: Mlflow, name: str, noted: Path, is_interrupted: Callable[[], bool]) -> None:
        self._asked = asked
        self._name = name
        self._noted = noted
        self._is_interrupted = is_interrupted
        self._client: MlflowClient | None = None
        self._id: str | None = None
        self._keys: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        client, run = self._open()
        told = {**(model.config.to_dict() if hasattr(model, "config") else {}), **args.to_dict()}
        self._tell_parameters(client, run, told)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        from mlflow.entities import Metric

        client, run = self._open()
        now = int(time.time() * 1000)
        figures = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        client.log_batch(run, metrics=[Metric(name, value, now, state.global_step) for name, value in figures.items()])

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        client, run = self._open()
        is_whole = state.global_step >= state.max_steps or not self._is_interrupted()
        client.set_terminated(run, "FINISHED" if is_whole else "KILLED")

    def on_failure(self) -> None:
        client, run = self._open()
        client.set_terminated(run, "FAILED")

    def hidden(self, text: str) -> str:
        """Without the keys, that an answer of the server may hold as they were sent."""
        login = ":".join(self._keys.get(key, "") for key in MLFLOW_KEYS[:2])
        for key in (*self._keys.values(), base64.b64encode(login.encode()).decode()):
            text = text.replace(key, "***")
        return text

    def _open(self) -> tuple[MlflowClient, str]:
        if self._client is None:
            keys = {key: read_key(self._asked.credentials, key, owner="training.reporting") for key in MLFLOW_KEYS}
            self._keys = {key: value for key, value in keys.items() if value}
            os.environ |= ENVIRONMENT | self._keys
            from mlflow import MlflowClient  # seconds, which the training does not wait for

            self._client = MlflowClient(tracking_uri=self._asked.tracking_uri)
        if self._id is None:
            self._id = self._taken_up(self._client) or self._made(self._client)
            write_atomically(self._noted, self._id.encode(), durable=False)
        return self._client, self._id

    def _taken_up(self, client: MlflowClient) -> str | None:
        """The run that an earlier attempt noted; None where there is none, or none any longer."""
        from mlflow.exceptions import MlflowException

        noted = self._noted.read_text().strip() if self._noted.is_file() else ""
        if not noted:
            return None
        try:
            client.update_run(noted, status="RUNNING")
        except MlflowException as error:
            if error.error_code in NO_LONGER_THERE:
                return None
            raise
        return noted

    def _made(self, client: MlflowClient) -> str:
        name = self._asked.experiment or DEFAULT_EXPERIMENT
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else client.create_experiment(name)
        return str(client.create_run(experiment, run_name=self._name, tags={TAG: self._name}).info.run_id)

    def _tell_parameters(self, client: MlflowClient, run: str, settings: Mapping[str, Any]) -> None:
        """An attempt that resumes tells what is new alone: the server refuses to change what it has."""
        from mlflow.entities import Param

        known = client.get_run(run).data.params
        texts = {name: str(value) for name, value in settings.items() if name not in HIDDEN and name not in known}
        params = [Param(name, text) for name, text in texts.items() if len(text) <= LONGEST]
        for start in range(0, len(params), BATCH):
            client.log_batch(run, params=params[start : start + BATCH])
