"""Reports to other programs in threads beside the training, and never in its way.

A store or a server that does not answer must neither fail nor stall a step: each callback runs in a thread of its own, which is fed by a
short queue. What finds the queue full, and what fails, is lost, counted and warned of once; the training goes on.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from tuneloop_trainer.contract import Reporting, RunConfig
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.training.mlflow_run import MlflowRun

log = logging.getLogger("tuneloop.reporting")
MLFLOW_RUN = "mlflow-run"
"""File with the id of the run on MLflow's server."""
WAITING = 1000
"""Events that wait at most."""
FAREWELL_SECONDS = 10.0
"""So long the end of the training waits for what has not been reported yet."""
TOLD = 300
"""Characters of a failure in the log: a server's answer may be long."""


class Beside(TrainerCallback):
    """One callback in a thread of its own. `lost` is told, by the training's thread, how many events were lost so far."""

    def __init__(
        self, name: str, callback: TrainerCallback, lost: Callable[[int], None], waiting: int = WAITING, farewell: float | None = None
    ) -> None:
        self._name = name
        self._hidden: Callable[[str], str] = getattr(callback, "hidden", str)
        self._callback = callback
        self._tell_lost = lost
        self._farewell = FAREWELL_SECONDS if farewell is None else farewell
        self._lost = 0
        self._lock = threading.Lock()
        self._queue: queue.Queue[Callable[[], Any] | None] = queue.Queue(maxsize=waiting)
        self._thread = threading.Thread(target=self._run, name=f"report-{name}", daemon=True)
        self._thread.start()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        self._later("on_train_begin", args, state, control, model=model)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._later("on_log", args, state, control, logs=dict(logs or {}))
        if self._lost:
            self._tell_lost(self._lost)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._later("on_train_end", args, state, control)
        self._end()

    def on_failure(self) -> None:
        """The training ends by an error, which no callback of transformers is told of."""
        if (told := getattr(self._callback, "on_failure", None)) is not None:
            self._put(told)
        self._end()

    def _end(self) -> None:
        self._put(None)
        self._thread.join(self._farewell)
        if self._thread.is_alive():
            self._note_lost(1 + self._queue.qsize(), "it does not answer")
        if self._lost:
            self._tell_lost(self._lost)

    def _later(self, event: str, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The state as it is now: the trainer goes on changing it."""
        then = copy.copy(state)
        self._put(lambda: getattr(self._callback, event)(args, then, control, **kwargs))

    def _put(self, event: Callable[[], Any] | None) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._note_lost(1, "it does not keep up")

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                event()
            except Exception as error:  # noqa: BLE001 - whatever a library raises: the training is not its business
                self._note_lost(1, f"{type(error).__name__}: {self._hidden(str(error))[:TOLD]}")

    def _note_lost(self, count: int, why: str) -> None:
        with self._lock:
            if not self._lost:
                log.warning("%s lacks a part of the run: %s", self._name, why)
            self._lost += count


def reporters(config: RunConfig, folder: Path, progress: ProgressWriter, interrupts: Interrupts) -> list[Beside]:
    """The callbacks that the run asks for; what they need of a folder lies below this one."""
    asked = config.reporting or Reporting()
    lost: dict[str, int] = {}

    def told(name: str) -> Callable[[int], None]:
        def tell(count: int) -> None:
            lost[name] = count
            progress.update(reports_lost=sum(lost.values()))

        return tell

    made = [tensorboard(folder / "tensorboard", told("TensorBoard"))] if asked.tensorboard else []
    if asked.mlflow is not None:
        run = MlflowRun(asked.mlflow, f"{config.namespace}/{config.name}", folder / MLFLOW_RUN, lambda: interrupts.requested)
        made.append(Beside("MLflow", run, told("MLflow")))
    return made


def tensorboard(folder: Path, lost: Callable[[int], None]) -> Beside:
    """Events for TensorBoard, in files below the folder."""
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)
    return Beside("TensorBoard", callback, lost)


@contextmanager
def telling_failure(callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """Those of the callbacks that report are told of an error that ends the training."""
    try:
        yield
    except BaseException:
        for callback in callbacks:
            if isinstance(callback, Beside):
                callback.on_failure()
        raise
