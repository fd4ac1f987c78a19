"""Rules that tell prose from debris, each with its source. They are made for web pages: what is shorter than a page is judged by few.

Gopher: Rae et al. 2021, "Scaling Language Models", appendix A.1.1, with that paper's thresholds. C4: Raffel et al. 2020,
"Exploring the Limits of Transfer Learning", section 2.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LONG_WORDS = 50
"""Gopher's least document. Below it, shares over few words say nothing, and only the rules on single characters hold."""
MAX_SYMBOLS_PER_WORD = 0.1
MIN_ALPHABETIC_SHARE = 0.8
MEAN_WORD_LENGTH = (3.0, 10.0)
MAX_BULLET_LINES, MAX_ELLIPSIS_LINES = 0.9, 0.3
MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS = 0.3, 0.2
MAX_TOP_RUN = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_PLACEHOLDERS = ("lorem ipsum", "enable javascript", "javascript is disabled")


def flaw(text: str) -> str | None:
    """The name of the first rule that the text breaks, or None."""
    if any(placeholder in text[:10_000].lower() for placeholder in _PLACEHOLDERS):
        return "Placeholder"  # C4
    if "\ufffd" in text and text.count("\ufffd") > 0.01 * len(text):
        return "BrokenEncoding"  # what a wrong decoding leaves; ours
    words = text.split()
    if text.count("#") + text.count("...") + text.count("…") > MAX_SYMBOLS_PER_WORD * max(len(words), 10):
        return "Symbols"  # Gopher; a text of a few words may have one
    if len(words) < LONG_WORDS:
        return None
    return _word_flaw(words) or _line_flaw(text) or _repetition(words)


def _word_flaw(words: Sequence[str]) -> str | None:
    low, high = MEAN_WORD_LENGTH
    if not low <= sum(map(len, words)) / len(words) <= high:
        return "WordLength"
    if sum(any(place.isalpha() for place in word) for word in words) < MIN_ALPHABETIC_SHARE * len(words):
        return "NoLetters"
    return None


def _line_flaw(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(("•", "-", "*")) for line in lines) > MAX_BULLET_LINES * len(lines):
        return "Bullets"
    if sum(line.endswith(("...", "…")) for line in lines) > MAX_ELLIPSIS_LINES * len(lines):
        return "Ellipses"
    again = [line for line, count in Counter(lines).items() for _ in range(count - 1)]
    if len(again) > MAX_DUPLICATE_LINES * len(lines) or sum(map(len, again)) > MAX_DUPLICATE_LINE_CHARACTERS * len(text):
        return "RepeatedLines"
    return None


def _repetition(words: Sequence[str]) -> str | None:
    """Gopher's table A1: the share of characters in the most frequent run of 2 to 4 words, and in all repeated runs of 5 to 10."""
    lowered = [word.lower() for word in words]
    characters = sum(map(len, lowered))
    for length, limit in MAX_TOP_RUN.items():
        run, count = Counter(_runs(lowered, length)).most_common(1)[0]
        if count > 1 and count * sum(map(len, run)) > limit * characters:
            return "RepeatedRuns"
    for length, limit in MAX_DUPLICATE_RUNS.items():
        if _repeated_characters(lowered, length) > limit * characters:
            return "RepeatedRuns"
    return None


def _repeated_characters(words: Sequence[str], length: int) -> int:
    """Characters of words that lie in a run which stood before; each counts once."""
    seen: set[tuple[str, ...]] = set()
    covered = bytearray(len(words))
    for start, run in enumerate(_runs(words, length)):
        if run in seen:
            covered[start : start + length] = b"\1" * length
        seen.add(run)
    return sum(len(word) for word, is_covered in zip(words, covered, strict=True) if is_covered)


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
