"""The part of prepare that gives the corpus's own words tokens of their own: it writes a new base, which the later stages train."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

from tuneloop_trainer import bases, extending, models
from tuneloop_trainer.contract import Manifest, Reason, RunConfig, Stage, Vocabulary, VocabularySummary
from tuneloop_trainer.data.curation import Sources
from tuneloop_trainer.data.terms import Term, find_terms, texts_of
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives.objective import TERMS
from tuneloop_trainer.stages.outputs import stage_folder

BASE = bases.OWN
SAMPLE_TEXTS = 2_000
"""Texts that are read with the old and with the new tokenizer, to see that they stay what they were and how much shorter they are."""
SHOWN = 20


@dataclass(frozen=True)
class Extended:
    """The new base, and what is told of it."""

    folder: Path
    tokenizer: models.Tokenizer
    summary: VocabularySummary
    shown: dict[str, int]
    """The terms that save the most tokens, and how many."""


def extend_vocabulary(config: RunConfig, asked: Vocabulary, base: Path, train: Sources, folder: Path) -> Extended | None:
    """Find the terms, and write the base with them below `folder`. None where there are none, or all are left out."""

    def load() -> models.Tokenizer:
        return models.load_tokenizer(base, config.base.uri)

    old = load()
    found = find_terms(
        lambda: texts_of(chain.from_iterable(train)),
        lambda words: [len(extending.pieces(old, word)) for word in words],
        asked.min_count,
        asked.min_fertility,
        asked.max_tokens,
    )
    new, fit = extending.add_terms(load, [term.text for term in found])
    if not fit:
        return None
    terms = [term for term in found if term.text in set(fit)]
    before, after = _lengths(config, old, new, islice(texts_of(chain.from_iterable(train)), SAMPLE_TEXTS))
    ids = extending.extend(base, folder / BASE, old, new, [term.text for term in terms])
    summary = VocabularySummary(tokens=len(terms), left_out=len(found) - len(terms), sample_before=before, sample_after=after)
    _write(folder / TERMS, asked, terms, ids, summary)
    return Extended(folder / BASE, new, summary, {term.text.strip(): term.saved for term in terms[:SHOWN]})


def _lengths(config: RunConfig, old: models.Tokenizer, new: models.Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """Tokens of the sample before and after. Raises Invalid where a text would not come back as it did."""
    before = after = 0
    for text in texts:
        if extending.written(old, text) != extending.written(new, text):
            raise Invalid(
                f"The tokenizer of {config.base.uri} does not write texts as they were once it has new words. Leave out vocabulary.",
                Reason.MODEL_NOT_FOUND,
            )
        before += len(extending.pieces(old, text))
        after += len(extending.pieces(new, text))
    return before, after


def _write(path: Path, asked: Vocabulary, terms: list[Term], ids: list[int], summary: VocabularySummary) -> None:
    content = asked.model_dump(mode="json") | summary.model_dump(mode="json") | {"ids": ids, "terms": [asdict(term) for term in terms]}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1))


@dataclass(frozen=True)
class Described:
    """What the data card and the result say of the vocabulary."""

    summary: VocabularySummary | None
    card: dict[str, object] | None
    warnings: tuple[str, ...] = ()


def describe(config: RunConfig, extended: Extended | None) -> Described:
    asked = config.vocabulary
    if asked is None:
        return Described(None, None)
    if extended is None:
        warning = (
            f"No word occurs {asked.min_count} times and is cut into {asked.min_fertility} tokens or more: the vocabulary stays as it is. "
            "Lower minCount."
        )
        return Described(VocabularySummary(tokens=0), None, (warning,))
    return Described(extended.summary, extended.summary.model_dump(mode="json") | {"saved": extended.shown})


# --- for the later stages -----------------------------------------------------


def trained_base(config: RunConfig, prepared: Manifest) -> Path:
    """The base that is trained: the new one, verified with all that prepare wrote, or the one that prepare found. Raises Mismatch."""
    own = stage_folder(config, Stage.PREPARE) / BASE
    return own if own.is_dir() else bases.require_prepared(config, prepared)
