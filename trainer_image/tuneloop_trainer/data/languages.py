"""Tells a text's language with py3langid, whose model is inside its package (some 130 languages; after Lui & Baldwin 2012)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from tuneloop_trainer.errors import Invalid

MIN_LETTERS = 24
"""Shorter texts are kept: on a few words the identifier guesses."""
MIN_CONFIDENCE = 0.5
"""A text is foreign only where the identifier is surer than this of another language."""
MAX_CHARACTERS = 2_000
"""The beginning tells the language; the rest costs time."""


class LanguageFilter:
    """Knows which texts are in another language than those asked for. Raises Invalid for a code that the model does not know."""

    def __init__(self, languages: Sequence[str]) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # Any: untyped
        self._wanted = frozenset(languages)
        unknown = sorted(self._wanted - set(self._identifier.labels))
        if unknown:
            raise Invalid(f"data.curation.languages has '{unknown[0]}', which is none of the {len(self._identifier.labels)} known codes.")

    @property
    def name(self) -> str:
        return f"py3langid {version('py3langid')}"

    def foreign(self, text: str) -> str | None:
        """The language that the text is in, where that is none of those asked for."""
        beginning = text[:MAX_CHARACTERS]
        if sum(map(str.isalpha, beginning)) < MIN_LETTERS:
            return None
        language, confidence = self._identifier.classify(beginning)
        return str(language) if language not in self._wanted and confidence >= MIN_CONFIDENCE else None
