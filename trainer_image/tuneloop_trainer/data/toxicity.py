"""Scores texts for offensive language with alt-profanity-check: a linear model over words, inside its package.

Weak by construction: English, trained on comments and tweets of about 2017; it hears swear words, not meaning. It passes
polite contempt, and it flags quotations, reclaimed words and anatomy.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

MAX_CHARACTERS = 20_000


class ToxicityScorer:
    """Loads its model once, from the package (under 1 MB)."""

    def __init__(self) -> None:
        from profanity_check import predict_prob

        self._predict = predict_prob

    @property
    def name(self) -> str:
        return f"alt-profanity-check {version('alt-profanity-check')}"

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Per text the model's probability, 0 to 1, that it offends."""
        if not texts:
            return []
        return [float(score) for score in self._predict([text[:MAX_CHARACTERS] for text in texts])]
