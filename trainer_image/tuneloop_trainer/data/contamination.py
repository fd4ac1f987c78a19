"""Finds training rows that equal an evaluation item, so that no gate is passed by having seen its answers.

Three rules: the same normalised text, 3-word shingles with a Jaccard similarity of at least 0.8, or a shared run of 13 words
(the rule of the GPT-3 paper, Brown et al. 2020, appendix C). Runs of words that many items share are the template's, not the
item's, and count for neither of the last two.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

HASH, JACCARD, NGRAM = "ContaminatedHash", "ContaminatedJaccard", "ContaminatedNgram"
SHINGLE, RUN = 3, 13
MIN_JACCARD = 0.8
COMMON_RUN_ITEMS = 10
"""A run of 13 words in more items than this is boilerplate."""
COMMON_SHINGLE_SHARE = 0.3
_WORD = re.compile(r"\w+")

Words = tuple[str, ...]


def words(text: str) -> Words:
    """Lower-cased words without punctuation, in Unicode's compatibility form."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def runs(sequence: Words, length: int) -> set[Words]:
    """Every run of that many words; a shorter sequence is its own and only run."""
    if len(sequence) < length:
        return {sequence}
    return {sequence[start : start + length] for start in range(len(sequence) - length + 1)}


class ContaminationIndex:
    """The evaluation items' texts, indexed by their runs of words."""

    def __init__(self, items: Iterable[str]) -> None:
        sequences = [words(item) for item in items]
        self._whole = set(sequences) - {()}
        shingles = [runs(sequence, SHINGLE) for sequence in sequences]
        counts = Counter(shingle for item in shingles for shingle in item)
        common = max(COMMON_RUN_ITEMS, COMMON_SHINGLE_SHARE * len(sequences))
        self._common_shingles = {shingle for shingle, count in counts.items() if count > common}
        self._sizes: list[int] = []
        self._items_by_shingle: dict[Words, list[int]] = defaultdict(list)
        for number, item in enumerate(shingles):
            own = item - self._common_shingles
            self._sizes.append(len(own))
            for shingle in own:
                self._items_by_shingle[shingle].append(number)
        long_runs = Counter(run for sequence in sequences if len(sequence) >= RUN for run in runs(sequence, RUN))
        # In a set of two or three items a template's words cannot be told from the items' own by their number alone.
        limit = min(COMMON_RUN_ITEMS, max(1, len(sequences) // 2))
        self._long_runs = {run for run, count in long_runs.items() if count <= limit}

    def rule(self, text: str) -> str | None:
        """The rule by which the text equals an item, or None."""
        sequence = words(text)
        if sequence in self._whole:
            return HASH
        if len(sequence) >= RUN and not self._long_runs.isdisjoint(runs(sequence, RUN)):
            return NGRAM
        return JACCARD if self._is_similar(runs(sequence, SHINGLE) - self._common_shingles) else None

    def _is_similar(self, shingles: set[Words]) -> bool:
        shared: Counter[int] = Counter()
        for shingle in shingles:
            shared.update(self._items_by_shingle.get(shingle, ()))
        return any(count >= MIN_JACCARD * (len(shingles) + self._sizes[number] - count) for number, count in shared.items())
