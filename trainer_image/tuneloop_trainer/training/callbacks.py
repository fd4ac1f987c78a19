"""What happens after each step: progress, checkpoints by time, the end on SIGTERM or on a loss that is no number."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from tuneloop_trainer.contract import Checkpoint
from tuneloop_trainer.errors import LossSpike, NonFinite
from tuneloop_trainer.hardware import peak_memory_bytes
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.training.checkpoints import AGAIN_SECONDS, Checkpoints
from tuneloop_trainer.watchdog import SAVING, TRAINING

log = logging.getLogger("tuneloop.train")
RECENT_STEPS = 20
SPIKE_STEPS = 20
"""A spike is one against the median of so many steps before it."""


class ReportProgress(TrainerCallback):
    """Writes step, loss, speed and remaining time after each step."""

    def __init__(
        self,
        progress: ProgressWriter,
        checkpoints: Checkpoints,
        global_batch: int,
        tokens: Callable[[], int],
        spike_ratio: float | None = None,
    ) -> None:
        self.utilisation: Callable[[float], float] | None = None
        """Percent of the devices' peak at so many tokens a second, where that is known."""
        self._spike_ratio = spike_ratio
        self._progress = progress
        self._checkpoints = checkpoints
        self._global_batch = global_batch
        self._tokens = tokens
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=RECENT_STEPS + 1)  # (time, step, tokens)
        self.losses: list[float] = []
        self.reward: float | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._marks.append((time.monotonic(), state.global_step, self._tokens()))
        self._progress.phase(TRAINING, step=state.global_step, max_steps=state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFinite(
                f"Step {state.global_step}: loss {loss}, gradient norm {norm}. Lower training.learningRate, or look at the data."
                f"{self._kept()}"
            )
        self._refuse_spike(state.global_step, loss)
        self._progress.first_step_done()
        self.losses.append(loss)
        self.reward = logs.get("reward")
        self._marks.append((time.monotonic(), state.global_step, self._tokens()))
        speed, remaining = self.tokens_per_second(), self._seconds_per_step() * (state.max_steps - state.global_step)
        rewarded = "" if self.reward is None else f" reward={self.reward:.4f}"
        log.info(
            "step=%d/%d loss=%.4f%s gradient_norm=%.3f remaining_seconds=%.0f",
            state.global_step, state.max_steps, loss, rewarded, norm, remaining,
        )  # fmt: skip
        self._progress.update(
            phase=TRAINING,
            step=state.global_step,
            percent=round(100 * state.global_step / state.max_steps, 1),
            samples=state.global_step * self._global_batch,
            loss=loss,
            reward=self.reward,
            learning_rate=logs.get("learning_rate"),
            gradient_norm=norm,
            tokens_per_second=speed,
            utilisation=self.utilisation(speed) if self.utilisation is not None and speed is not None else None,
            remaining_seconds=remaining,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _refuse_spike(self, step: int, loss: float) -> None:
        """Raises LossSpike where a limit is set, and the loss is above so many times the median of the steps before."""
        recent = self.losses[-SPIKE_STEPS:]
        if self._spike_ratio is None or len(recent) < SPIKE_STEPS:
            return
        usual = median(recent)
        if loss > self._spike_ratio * usual > 0:
            raise LossSpike(
                f"Step {step}: loss {loss:.4g} is above {self._spike_ratio:g} times {usual:.4g}, the median of the {SPIKE_STEPS} steps "
                f"before. Lower training.learningRate, look at the data, or raise training.lossSpikeRatio.{self._kept()}"
            )

    def _kept(self) -> str:
        step = self._checkpoints.saved_step
        return f" The checkpoint of step {step} is kept." if step else ""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._checkpoints.note_step(state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.phase(TRAINING, checkpoint_step=self._checkpoints.saved_step)

    def tokens_per_second(self) -> float | None:
        if not self._marks:
            return None
        (start, _, first), (end, _, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else None

    def figures(self) -> dict[str, float]:
        """The speed up to now, for the log of a step that has just ended."""
        start, _, first = self._marks[0]
        spent = time.monotonic() - start
        if spent <= 0:
            return {}
        speed = (self._tokens() - first) / spent
        used = {"mfu": round(self.utilisation(speed), 2)} if self.utilisation is not None else {}
        return {"tokens_per_second": round(speed, 1)} | used

    def _seconds_per_step(self) -> float:
        (start, first, _), (end, last, _) = self._marks[0], self._marks[-1]
        return (end - start) / max(last - first, 1)


class DecideCheckpoints(TrainerCallback):
    """Saves by time or by steps, at the end, and on SIGTERM, after which training stops. What could not be saved is tried again soon."""

    def __init__(
        self,
        plan: Checkpoint,
        interrupts: Interrupts,
        checkpoints: Checkpoints,
        progress: ProgressWriter,
        settle: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settle = settle
        self._plan = plan
        self._interrupts = interrupts
        self._checkpoints = checkpoints
        self._progress = progress
        self._missed_at: float | None = None
        self._clock = clock
        self._saved = clock()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        self._see_to_published()
        # Clocks and signals differ between processes; what follows from them must not.
        is_due = self._is_due(state.global_step) or state.global_step >= state.max_steps
        interrupted, is_due = self._checkpoints.world.any(self._interrupts.requested, is_due)
        if interrupted:
            self._interrupts.requested = True
            control.should_save = control.should_training_stop = True
        if is_due:
            control.should_save = True
        if control.should_save:
            self._progress.phase(SAVING)  # the watchdog is patient with the store
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_saved = state.global_step in (self._checkpoints.saved_step, self._checkpoints.publisher.pending_step)
        self._saved, self._missed_at = (self._clock(), None) if is_saved else (self._saved, self._clock())
        self._checkpoints.has_missed = False  # of one before this

    def _see_to_published(self) -> None:
        """Of what was left to be published beside the training: what is now, and what could not be."""
        before = self._checkpoints.saved_step
        self._settle()
        if self._checkpoints.saved_step != before:
            self._progress.update(checkpoint_step=self._checkpoints.saved_step)
        if self._checkpoints.has_missed:
            self._checkpoints.has_missed, self._missed_at = False, self._clock()

    def _is_due(self, step: int) -> bool:
        if self._missed_at is not None:
            return self._clock() - self._missed_at >= AGAIN_SECONDS
        minutes, steps = self._plan.every_minutes, self._plan.every_steps
        return (minutes is not None and self._clock() - self._saved >= 60 * minutes) or (steps is not None and step % steps == 0)


class StopEarly(TrainerCallback, ExportableState):
    """Ends training when the held-out loss has not fallen for `patience` evaluations, and keeps the best checkpoint.

    Its state is part of each checkpoint, so a resumed run stops where an undisturbed one would.
    """

    def __init__(self, patience: int, best_loss: float = math.inf, best_step: int = 0, waited: int = 0) -> None:
        self._patience = patience
        self._best_loss = best_loss
        self.best_step = best_step
        self._waited = waited
        self.keep: Callable[[int], None] = lambda step: None

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> TrainerControl:
        if metrics["eval_loss"] < self._best_loss:
            self._best_loss, self.best_step, self._waited = metrics["eval_loss"], state.global_step, 0
            self.keep(state.global_step)
            control.should_save = True
        else:
            self._waited += 1
            if self._waited >= self._patience:
                control.should_save = control.should_training_stop = True
        return control

    def state(self) -> dict[str, Any]:
        attributes = {"_best_loss": self._best_loss, "best_step": self.best_step, "_waited": self._waited}
        return {"args": {"patience": self._patience}, "attributes": attributes}
