"""Words of the corpus that deserve a token of their own: frequent, and cut into many pieces by the tokenizer.

A word is counted with the space before it, where there is one, because that is how it becomes a token: `" angiogram"` after another word,
`"angiogram"` at the beginning of a text or behind a bracket. Memory is bounded: a first walk keeps the frequent words by Misra and Gries'
summary (Agarwal et al. 2012, "Mergeable Summaries", how several counts are taken down at once), a second one counts exactly those.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tuneloop_trainer.data.records import Record

WORD = re.compile(r"\w+")
MAX_CHARACTERS = 64
"""Of a word; longer runs are identifiers or scripts that write without spaces."""
KEPT = 1 << 17
"""Words that the first walk keeps. One whose share of all words is above 1 / KEPT is never lost."""
Texts = Callable[[], Iterable[str]]
"""Walks the corpus from its beginning."""
Pieces = Callable[[list[str]], list[int]]
"""Into how many tokens each word is cut."""


@dataclass(frozen=True, slots=True)
class Term:
    text: str
    """With the space before it, where it has one."""
    count: int
    fertility: int
    """Tokens that it is cut into."""

    @property
    def saved(self) -> int:
        """Tokens of the corpus that are saved where it is one."""
        return self.count * (self.fertility - 1)


def texts_of(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        said = (turn.content for turn in record.history or ())
        yield from (text for text in (record.system, *said, record.prompt, record.completion, record.rejected) if text)


def words(text: str) -> Iterator[str]:
    """Words with a letter in them, each with the space before it."""
    for found in WORD.finditer(text):
        start, end = found.span()
        if end - start <= MAX_CHARACTERS and not found[0].isdigit():
            yield text[start - 1 : end] if start and text[start - 1] == " " else found[0]


def find_terms(texts: Texts, pieces: Pieces, least_count: int, least_fertility: int, most: int, kept: int = KEPT) -> list[Term]:
    """Those that save the most tokens first; of equals, in the order of the alphabet."""
    frequent = _frequent(texts(), kept)
    counts = Counter(word for text in texts() for word in words(text) if word in frequent)
    candidates = sorted(word for word, count in counts.items() if count >= least_count)
    found = [Term(word, counts[word], size) for word, size in zip(candidates, pieces(candidates), strict=True) if size >= least_fertility]
    return sorted(found, key=lambda term: (-term.saved, term.text))[:most]


def _frequent(texts: Iterable[str], kept: int) -> frozenset[str]:
    """Every word that makes up more than 1 / kept of all words, and others; at most twice as many as are kept."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words(text))
        if len(counts) > 2 * kept:
            floor = sorted(counts.values(), reverse=True)[kept]
            counts = Counter({word: count - floor for word, count in counts.items() if count > floor})
    return frozenset(counts)
