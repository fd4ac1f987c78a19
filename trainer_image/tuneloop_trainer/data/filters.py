"""What is decided on each record alone: personal data, quality, language, toxicity. In batches, each drop counted with its detail."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tuneloop_trainer.contract import Curation
from tuneloop_trainer.data import personal
from tuneloop_trainer.data.languages import LanguageFilter
from tuneloop_trainer.data.quality import flaw
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.toxicity import ToxicityScorer

BATCH_ROWS, BATCH_CHARACTERS = 512, 4_000_000
TEXTS = ("prompt", "completion", "content", "system", "user", "rejected")
"""The record's fields that hold a user's text."""


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists that are bounded in rows and in characters."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.size
        if len(batch) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Filters:
    """As the run asks for them; models are loaded only where they are needed."""

    def __init__(self, asked: Curation) -> None:
        self.drops: Counter[str] = Counter()
        self.details: dict[str, Counter[str]] = defaultdict(Counter)
        """What was found, in rows: kinds of personal data, languages, rules of quality."""
        self._personal_data = asked.personal_data
        self._quality = asked.quality
        self._languages = LanguageFilter(asked.languages) if asked.languages else None
        self._max_toxicity = asked.max_toxicity
        self._toxicity = ToxicityScorer() if asked.max_toxicity is not None else None

    @property
    def tools(self) -> list[str]:
        """Names and versions of the models that decided."""
        return [tool.name for tool in (self._languages, self._toxicity) if tool is not None]

    def apply(self, batch: list[Record]) -> list[Record]:
        """Those to keep, in order, redacted where that is asked for."""
        kept = [record for record in map(self._without_personal_data, batch) if record is not None]
        kept = [record for record in kept if self._is_good(record) and self._is_understood(record)]
        return self._without_toxic(kept)

    def redacted(self, text: str) -> str:
        """A text of an evaluation item as it would stand in a training row."""
        return personal.redact(text, Counter()) if self._personal_data == "Redact" else text

    def _without_personal_data(self, record: Record) -> Record | None:
        if self._personal_data == "Keep":
            return record
        found: Counter[str] = Counter()
        texts = {name: getattr(record, name) for name in TEXTS}
        redacted = {name: personal.redact(text, found) for name, text in texts.items() if text is not None}
        history = None
        if record.history is not None:
            history = tuple(turn._replace(content=personal.redact(turn.content, found)) for turn in record.history)
        if not found:
            return record
        self.details["personalData"].update(found.keys())
        if self._personal_data == "Redact":
            return replace(record, history=history, **redacted)  # type: ignore[arg-type]  # TEXTS are fields that hold text
        self.drops["PersonalData"] += 1
        return None

    def _is_good(self, record: Record) -> bool:
        rule = flaw(main_text(record)) if self._quality == "Gopher" else None
        if rule is not None:
            self.drops["LowQuality"] += 1
            self.details["quality"][rule] += 1
        return rule is None

    def _is_understood(self, record: Record) -> bool:
        language = self._languages.foreign(main_text(record)) if self._languages is not None else None
        if language is not None:
            self.drops["Language"] += 1
            self.details["languages"][language] += 1
        return language is None

    def _without_toxic(self, records: list[Record]) -> list[Record]:
        """An answer that is not to be given may be toxic; what is learned from it is to avoid it."""
        if self._toxicity is None or self._max_toxicity is None:
            return records
        questions = self._toxicity.scores([record.content for record in records])
        answers = self._toxicity.scores(["" if record.desirable is False else record.completion for record in records])
        kept = [r for r, one, other in zip(records, questions, answers, strict=True) if max(one, other) <= self._max_toxicity]
        self.drops["Toxic"] += len(records) - len(kept)
        return kept


def main_text(record: Record) -> str:
    """The longer of question and answer: what a page's rules and a language are judged by."""
    return max(record.content, record.completion, key=len)
