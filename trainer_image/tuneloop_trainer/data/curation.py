"""What is removed from the training rows: what is wrong with a row alone, duplicates, what equals an evaluation item, what is
held out, and what is beyond a class's share. Every drop is counted by reason.

What a row says by itself is judged where it is read; what is asked of all rows is asked in one place, in the order of the rows. So the
result is the same whether one pod reads them or several do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from tuneloop_trainer.contract import Curation
from tuneloop_trainer.data.contamination import ContaminationIndex
from tuneloop_trainer.data.filters import BATCH_ROWS, Filters, batches
from tuneloop_trainer.data.near import NearDuplicates, signatures
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.spool import Rows, Spool, order_key
from tuneloop_trainer.errors import Invalid

MAX_CLASSES, MAX_CLASS_CHARACTERS = 64, 64
Sources = Sequence[Rows]
"""Training records per source, in the order of the configuration."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A record, and what was found out of it alone."""

    record: Record
    rule: str | None = None
    """By which it equals an evaluation item."""
    signature: bytes | None = None
    """Its MinHash, where near duplicates are looked for."""


class Judging:
    """Looks at each record alone."""

    def __init__(self, asked: Curation) -> None:
        self.filters = Filters(asked)
        self._asked = asked
        self._index: ContaminationIndex | None = None

    def guard(self, items: Iterable[Record]) -> None:
        """Evaluation items that no training row may equal; to be told before the first record."""
        texts = [self.filters.redacted(record.content) for record in items]
        self._index = ContaminationIndex(texts) if texts and self._asked.decontaminate else None

    def rule(self, record: Record) -> str | None:
        return self._index.rule(record.content) if self._index is not None else None

    def judged(self, records: Iterable[Record]) -> Iterator[list[Judged]]:
        """In batches, those that no filter drops."""
        for batch in batches(records):
            kept = self.filters.apply(batch)
            marks = signatures(list(map(compared, kept))) if self._asked.deduplicate == "Near" else [None] * len(kept)
            yield [Judged(record, self.rule(record), mark) for record, mark in zip(kept, marks, strict=True)]


class Curating:
    """Takes the sources one after the other, keeps what is worth keeping on disk, and then looks at the whole."""

    def __init__(self, asked: Curation, folder: Path, seed: int, most_held_out: int) -> None:
        self.drops: Counter[str] = Counter()
        self._asked = asked
        self._seed = seed
        self._most_held_out = most_held_out
        self._spool = Spool(folder, seed)
        self._near = NearDuplicates(folder) if asked.deduplicate == "Near" else None
        self._sources = 0

    def close(self) -> None:
        self._spool.close()
        if self._near is not None:
            self._near.close()

    def add(self, records: Iterable[Record], judging: Judging) -> None:
        """One source's records. Of equal ones only the first is looked at any further."""
        for batch in batches(records):
            new = [record for record in judging.filters.apply(batch) if self._is_new(record)]
            self._keep([Judged(record, judging.rule(record)) for record in new])
        self._sources += 1

    def take(self, judged: Iterable[Judged]) -> None:
        """One source's records that were judged already, in the order of its rows."""
        left = iter(judged)
        while batch := list(islice(left, BATCH_ROWS)):
            self._keep([one for one in batch if self._is_new(one.record)])
        self._sources += 1

    def divide(self, validation_fraction: float) -> tuple[Sources, list[Record]]:
        """Training records per source, and the validation split."""
        if self._near is not None:
            self.drops["NearDuplicate"] += self._spool.drop(self._near.later())
        self._spool.hold_out(validation_fraction, self._most_held_out)
        validation = self._spool.held() if validation_fraction > 0 else []
        if self._asked.decontaminate and validation:
            index = ContaminationIndex([record.content for record in validation])
            rules = ((number, index.rule(record.content)) for number, record in self._spool.everything())
            found = [(number, rule) for number, rule in rules if rule is not None]
            self.drops.update(rule for _, rule in found)
            self._spool.drop(number for number, _ in found)
        self._cap_classes()
        self.drops = +self.drops
        return [self._spool.train(source) for source in range(self._sources)], validation

    def _keep(self, judged: Sequence[Judged]) -> None:
        self.drops.update(one.rule for one in judged if one.rule is not None)
        clean = [one for one in judged if one.rule is None]
        for one in clean:
            self._spool.add(self._sources, one.record)
        if self._near is not None:
            known = [one.signature for one in clean if one.signature is not None]
            self._near.add(known if len(known) == len(clean) else signatures([compared(one.record) for one in clean]))

    def _is_new(self, record: Record) -> bool:
        if self._asked.deduplicate == "None" or self._spool.is_new(record):
            return True
        self.drops["Duplicate"] += 1
        return False

    def _cap_classes(self) -> None:
        """Drop rows of the classes that have more than `max_class_ratio` times the smallest's, by a seeded order of their own."""
        if self._asked.max_class_ratio is None:
            return
        classes = classes_of(chain.from_iterable(self._spool.train(source) for source in range(self._sources)))
        if classes is None:
            raise Invalid(f"data.curation.classBalance needs completions of at most {MAX_CLASSES} classes; the rows have more.")
        most = int(self._asked.max_class_ratio * min(classes.values(), default=0))
        places: dict[str, list[tuple[bytes, int]]] = {name: [] for name, count in classes.items() if count > most}
        for number, record in self._spool.everything():
            if (name := record.completion.strip()) in places:
                places[name].append((order_key(record, self._seed), number))
        for found in places.values():
            self.drops["ClassBalance"] += self._spool.drop(number for _, number in sorted(found)[most:])


def compared(record: Record) -> str:
    """The text that near duplicates are known by."""
    return f"{record.content} {record.completion}"


def classes_of(records: Iterable[Record]) -> Counter[str] | None:
    """Rows by completion; None where the completions are no classes (long, or too many)."""
    found: Counter[str] = Counter()
    for name in _names(records):
        if name is None or (name not in found and len(found) == MAX_CLASSES):
            return None
        found[name] += 1
    return found


def _names(records: Iterable[Record]) -> Iterator[str | None]:
    for record in records:
        name = record.completion.strip()
        yield name if len(name) <= MAX_CLASS_CHARACTERS and not record.history else None
