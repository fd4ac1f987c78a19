"""Says when training has stopped moving."""

from __future__ import annotations

from collections import deque
from statistics import median

from tuneloop_trainer.contract import Progress

TRAINING, SAVING = "Training", "Saving"
LEAST_SECONDS = 600.0
MEDIANS = 20.0
"""Without a configured limit, a step may take this many times the median step."""
OTHER_PHASE_SECONDS = 3600.0
"""For phases without steps: loading and saving, which depend on the size of the model and the speed of the store."""


class Watchdog:
    """Is told the progress again and again; a new phase or step is a sign of life, and in phases without steps a sample or percent."""

    def __init__(self, limit_seconds: float | None, now: float) -> None:
        self._configured = limit_seconds
        self._beat: tuple[str, int, float] = ("", 0, 0.0)
        self._since = now
        self._steps: deque[float] = deque(maxlen=50)

    def is_stalled(self, progress: Progress | None, now: float) -> bool:
        beat = _beat(progress) if progress is not None else ("", 0, 0.0)
        if beat != self._beat:
            if beat[0] == self._beat[0] == TRAINING:
                self._steps.append((now - self._since) / max(beat[1] - self._beat[1], 1))
            self._beat, self._since = beat, now
            return False
        return now - self._since > self.limit_seconds

    @property
    def limit_seconds(self) -> float:
        if self._beat[0] != TRAINING:
            return max(OTHER_PHASE_SECONDS, self._configured or 0.0)
        if self._configured is not None:
            return self._configured
        return max(LEAST_SECONDS, MEDIANS * median(self._steps)) if self._steps else OTHER_PHASE_SECONDS


def _beat(progress: Progress) -> tuple[str, int, float]:
    return progress.phase, progress.step, 0.0 if progress.phase == TRAINING else progress.samples + progress.percent
