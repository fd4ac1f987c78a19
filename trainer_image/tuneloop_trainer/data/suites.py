"""Evaluation items as prepare snapshots them: evaluate reads only these, so source and gate cannot drift apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tuneloop_trainer.chat import History, turns_of
from tuneloop_trainer.contract import HELD_OUT_METRICS, RunConfig, Suite
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.errors import Invalid

MAX_ITEMS = 20_000
MAX_LABELS = 64


@dataclass(frozen=True, slots=True)
class Item:
    """One evaluation item. `id` is its place in the snapshot."""

    id: int
    document: str
    prompt: str
    completion: str
    system: str | None = None
    user: str | None = None
    """As in the record: what a user would send."""
    rejected: str | None = None
    history: History = None
    """As in the record: what was said before the prompt."""
    group: str | None = None
    """As in the record: who wrote it."""

    @property
    def asked(self) -> int:
        """Characters up to the answer."""
        return len(self.prompt) + sum(len(turn.content) for turn in self.history or ())


def suites_of(config: RunConfig) -> tuple[Suite, ...]:
    """The configured suites, and the validation split's own where it is held out and not named."""
    suites = config.evaluation.suites
    if config.validation_fraction > 0 and not any(suite.type == "Validation" for suite in suites):
        return (*suites, Suite(name="validation", type="Validation", metrics=HELD_OUT_METRICS[config.objective]))
    return suites


def items_of(records: Iterable[Record]) -> list[Item]:
    """Distinct records as items: an item that occurs twice would count twice in a test."""
    distinct = {record.key: record for record in records}
    return [
        Item(
            number,
            record.document,
            record.prompt,
            record.completion,
            record.system,
            record.user,
            record.rejected,
            record.history,
            record.group,
        )
        for number, record in enumerate(distinct.values())
    ]


def write_items(folder: Path, suite: Suite, items: list[Item]) -> str:
    """Write `<suite>.jsonl`; returns the sha256 of what is scored: naming a column of groups makes no other suite of it."""
    if len(items) > MAX_ITEMS:
        raise Invalid(f"Suite {suite.name} has {len(items)} items; at most {MAX_ITEMS} are scored. Take a sample.")
    (folder / f"{suite.name}.jsonl").write_bytes(_lines(items))
    return hashlib.sha256(_lines([replace(item, group=None) for item in items])).hexdigest()


def _lines(items: list[Item]) -> bytes:
    return "".join(json.dumps(_content(item), ensure_ascii=False, sort_keys=True) + "\n" for item in items).encode()


def _content(item: Item) -> dict[str, object]:
    """Without what a suite of an earlier release did not have: the digest of other suites stays what it was."""
    return {name: value for name, value in asdict(item).items() if name not in ("rejected", "history", "group") or value is not None}


def read_items(folder: Path, suite: Suite) -> list[Item]:
    with (folder / f"{suite.name}.jsonl").open(encoding="utf-8") as file:
        return [_item(json.loads(line)) for line in file]


def _item(content: dict[str, Any]) -> Item:
    return Item(**(content | {"history": turns_of(content.get("history"))}))


def labels_of(suite: Suite, items: list[Item]) -> tuple[str, ...]:
    """The completions that are scored: as configured, or the distinct completions. Raises Invalid where Accuracy cannot be had."""
    labels = suite.labels or tuple(sorted({item.completion for item in items}))
    if len(labels) > MAX_LABELS:
        raise Invalid(
            f"Suite {suite.name} has {len(labels)} distinct completions; Accuracy is scored over at most {MAX_LABELS} labels. "
            "Set the suite's labels, or use the metric Loss."
        )
    if len(labels) < 2:
        raise Invalid(f"Suite {suite.name} has one label only, {labels[0]!r}: Accuracy would always be 1. Set the suite's labels.")
    unknown = next((item for item in items if item.completion not in labels), None)
    if unknown is not None:
        names = ", ".join(labels)[:200]
        raise Invalid(f"Suite {suite.name}, item {unknown.id}: '{unknown.completion[:40]}' is none of the labels {names}.")
    return labels


def needs_labels(suite: Suite) -> bool:
    return "Accuracy" in suite.metrics or "MacroF1" in suite.metrics
