"""ExactMatch: 1 for a completion that says what the row's own completion says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from tuneloop_trainer.rewards.reward import Completion, Reward

SPACE = re.compile(r"\s+")
ENDS = " .,;:!?\"'`*()[]{}"
"""Marks that do not count at the ends."""


class Match(Reward):
    """Equals: the whole completion is the reference. Contains: the reference is in it, as whole words."""

    name = "ExactMatch"

    def __init__(self, match: Literal["Equals", "Contains"]) -> None:
        self._match = match

    def of(self, completions: Sequence[Completion]) -> list[float]:
        return [float(self._agrees(normal(one.text), normal(one.reference))) for one in completions]

    def key(self) -> str:
        return f"{self.name}/1 {self._match}"

    def _agrees(self, text: str, reference: str) -> bool:
        if self._match == "Equals" or not reference:
            return text == reference
        return re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", text) is not None


def normal(text: str) -> str:
    """Without case, kinds of characters that look alike, runs of white space, and marks at the ends."""
    return SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip(ENDS)
