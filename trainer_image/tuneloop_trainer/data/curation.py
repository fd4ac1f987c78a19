"""What is removed from the training rows, in order: duplicates, what equals an evaluation item, what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tuneloop_trainer.data.contamination import ContaminationIndex
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.splits import held_out_documents

Sources = list[list[Record]]
"""Records per source."""


def deduplicate(sources: Sources, drops: Counter[str]) -> Sources:
    """Keep the first of equal rows, over all sources."""
    seen: set[bytes] = set()

    def is_new(record: Record) -> bool:
        key = record.key
        if key in seen:
            drops["Duplicate"] += 1
            return False
        seen.add(key)
        return True

    return [[record for record in records if is_new(record)] for records in sources]


def decontaminate(sources: Sources, items: Sequence[str], drops: Counter[str]) -> Sources:
    """Drop rows that equal an evaluation item by any rule, counted by rule."""
    if not items:
        return sources
    index = ContaminationIndex(items)

    def is_clean(record: Record) -> bool:
        rule = index.rule(record.content)
        if rule is not None:
            drops[rule] += 1
        return rule is None

    return [[record for record in records if is_clean(record)] for records in sources]


def hold_out(sources: Sources, fraction: float, seed: int) -> tuple[Sources, list[Record]]:
    """Training rows and the validation split: whole documents."""
    documents = held_out_documents([record.document for records in sources for record in records], fraction, seed)
    train = [[record for record in records if record.document not in documents] for records in sources]
    return train, [record for records in sources for record in records if record.document in documents]
