"""Brief: a reward for short answers that still say what they should. A reward of one's own is a function of a completion.

It is called once for each completion, and returns a number; what it raises, and what is no number, ends the run with the row's name.
"""

from __future__ import annotations

from collections.abc import Mapping

from tuneloop_trainer.rewards import Completion


def brief(completion: Completion, settings: Mapping[str, str]) -> float:
    """1 for an empty answer, a half for one of `characters` characters. `must`: without this word there is nothing."""
    if settings.get("must", "") not in completion.text:
        return 0.0
    half = float(settings.get("characters", "100"))
    return half / (half + len(completion.text))
