"""RLOO: a completion becomes likelier by as much as its reward is above the mean of the others to the same prompt."""

from __future__ import annotations

from typing import ClassVar

from tuneloop_trainer.objectives.grpo import GRPO


class RLOO(GRPO):
    """As GRPO, by TRL's RLOO trainer: one advantage for the whole completion, not divided by the rewards' spread."""

    trained_by: ClassVar[str] = "RLOO"


OBJECTIVE = RLOO
