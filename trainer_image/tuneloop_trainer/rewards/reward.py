"""What every reward is: numbers for completions, and a name for the run's log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuneloop_trainer.errors import RewardFailed

SHOWN = 80
"""Characters of a completion in a message."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote to a row's prompt. `reference` is the row's own completion, empty where it has none."""

    prompt: str
    text: str
    reference: str
    row: int
    system: str | None = None


class Reward:
    """One reward, ready to judge."""

    name: str

    def of(self, completions: Sequence[Completion]) -> list[float]:
        """A number for each. Raises RewardFailed, naming the row."""
        raise NotImplementedError

    def key(self) -> str:
        """What its numbers depend on."""
        return self.name

    def size_bytes(self) -> int:
        """Of the weights that it loads."""
        return 0


def failed(name: str, completion: Completion, problem: str) -> RewardFailed:
    """The error for one completion: which reward, which row, what it was given."""
    text = completion.text if len(completion.text) <= SHOWN else completion.text[: SHOWN - 1] + "…"
    return RewardFailed(f"Reward '{name}' {problem} for row {completion.row}, completion {text!r}. Correct the reward, or the row.")


def finite(name: str, completion: Completion, value: object) -> float:
    """The reward as a float. Raises RewardFailed for what is no number."""
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever the function returned
    except (TypeError, ValueError):
        raise failed(name, completion, f"returned {str(value)[:40]!r}, which is no number,") from None
    if not math.isfinite(number):
        raise failed(name, completion, f"is {number}")
    return number
