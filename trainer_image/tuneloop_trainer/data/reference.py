"""A sample of what users would have said, had they sent the training rows: with it live traffic is compared after the rollout."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path

from tuneloop_trainer.contract import REFERENCE_FILE, RunConfig
from tuneloop_trainer.data.curation import Sources
from tuneloop_trainer.data.schedule import quotas
from tuneloop_trainer.data.spool import order_key

TEXTS = 1000
MIN_TEXTS = 300
"""Fewer tell a difference from chance too seldom to be worth a word."""
MAX_CHARACTERS = 8192
"""As much of a text as the gateway looks at."""
MAX_BYTES = 1 << 20
"""Of the whole sample: the engine hands it out, and the gateway reads it, in one piece."""


def write_reference(config: RunConfig, sources: Sources, folder: Path) -> None:
    """Writes nothing where too few rows are made of a user's text alone. Rows are drawn by a seeded order, by the sources' weights."""
    wanted = quotas([source.weight if len(rows) else 0.0 for source, rows in zip(config.train, sources, strict=True)], TEXTS)
    texts: list[str] = []
    for rows, share in zip(sources, wanted, strict=True):
        said = ((order_key(record, config.training.seed), record.user) for record in rows if record.user and record.system is None)
        texts += [user[:MAX_CHARACTERS].encode("utf-8", "replace").decode() for _, user in heapq.nsmallest(share, said)]
    texts = _bounded(texts)
    if len(texts) >= MIN_TEXTS:
        (folder / REFERENCE_FILE).write_text(json.dumps(texts, ensure_ascii=False))


def _bounded(texts: Sequence[str]) -> list[str]:
    """Each cut to an equal share of the bytes, where they are more than may be."""
    if sum(len(text.encode()) + 4 for text in texts) <= MAX_BYTES:
        return list(texts)
    share = MAX_BYTES // len(texts) // 4 - 4
    return [text[:share] for text in texts]
