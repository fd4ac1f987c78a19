"""Measures one training from outside, whichever library runs it: a callback that is added to every Trainer of its process.

Imports nothing but transformers, so that it runs in the environments of other libraries too. The loop is from the trainer's
`on_train_begin` to its `on_train_end`, what it saves in between included.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

OURS = "tuneloop_trainer"
EVENTS = (
    "train_begin", "epoch_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "substep_end", "step_end", "log", "evaluate",
    "save", "epoch_end", "train_end",
)  # fmt: skip


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


class Meter:
    """What is measured. `started` is when the process was asked for, as time.time()."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.imported = 0
        self.begin = self.end = 0.0
        self.steps: list[float] = []
        self.first_step_at = 0.0
        self.callbacks = 0.0

    def imports_done(self) -> None:
        self.imported = resident("VmRSS")

    def report(self) -> dict[str, Any]:
        return {
            "loop_seconds": self.end - self.begin,
            "steps": len(self.steps),
            "step_seconds": [later - earlier for earlier, later in zip([self.begin, *self.steps], self.steps, strict=False)],
            "first_step_seconds": self.first_step_at - self.started,
            "callback_seconds": self.callbacks,
            "peak_bytes": resident("VmHWM") - self.imported,
            "imports_bytes": self.imported,
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.report()))

    def install(self) -> None:
        """From here on every Trainer is measured, and the callbacks of ours in it."""
        from transformers import Trainer, TrainerCallback
        from transformers.trainer_callback import CallbackHandler

        meter = self

        class Marks(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                meter.begin = time.monotonic()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                meter.steps.append(time.monotonic())
                if not meter.first_step_at:
                    meter.first_step_at = time.time()

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                meter.end = time.monotonic()

        whole, add = Trainer.__init__, CallbackHandler.add_callback

        @functools.wraps(whole)
        def started(trainer: Any, *args: Any, **kwargs: Any) -> None:
            whole(trainer, *args, **kwargs)
            trainer.add_callback(Marks())

        @functools.wraps(add)
        def added(handler: Any, callback: Any) -> None:
            add(handler, callback)
            if type(handler.callbacks[-1]).__module__.startswith(OURS):
                self._time(handler.callbacks[-1])

        Trainer.__init__ = started
        CallbackHandler.add_callback = added

    def _time(self, callback: Any) -> None:
        """Adds up the seconds that this callback takes."""
        for name in EVENTS:
            method = getattr(callback, f"on_{name}")

            def timed(*args: Any, _method: Any = method, **kwargs: Any) -> Any:
                before = time.perf_counter()
                try:
                    return _method(*args, **kwargs)
                finally:
                    self.callbacks += time.perf_counter() - before

            setattr(callback, f"on_{name}", timed)
