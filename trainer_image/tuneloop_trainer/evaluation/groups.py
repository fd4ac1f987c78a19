"""How both models do on parts of a suite, by label and by language: a mean may hide that one group gains what another loses.

Nothing is decided by it: it is told in the report and in the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from tuneloop_trainer.contract import GateMetric
from tuneloop_trainer.data.languages import LanguageFilter
from tuneloop_trainer.data.suites import Item
from tuneloop_trainer.evaluation import gates
from tuneloop_trainer.evaluation.baselines import SuiteScores
from tuneloop_trainer.evaluation.gates import Paired
from tuneloop_trainer.evaluation.probes import has_labels
from tuneloop_trainer.evaluation.suites import PreparedSuite

LEAST = 20
"""Items of a group that is told by itself; smaller ones are told as one."""
MOST = 12
"""Groups of a kind."""
EACH_SIDE = 0.025
"""Of the interval of a difference."""
OTHERS = "all others"
UNSURE = "too short or unclear"
METRICS: tuple[GateMetric, ...] = ("Accuracy", "Preference", "Reward", "ChrF", "Loss")
"""The first of these that a suite has is told of its groups."""


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    n: int
    candidate: float
    baseline: float
    lower: float
    """Of the difference, candidate less baseline."""
    upper: float


@dataclass(frozen=True, slots=True)
class Grouping:
    kind: str
    metric: GateMetric
    groups: tuple[Group, ...]


def groupings(suite: PreparedSuite, candidate: SuiteScores, baseline: SuiteScores) -> tuple[Grouping, ...]:
    """The suite by expected label and by language of its texts; nothing where all items are of one group."""
    metric = _metric(suite)
    if metric is None:
        return ()
    paired = suite.paired(metric, candidate, baseline)
    kinds = {"language": _languages(suite.items)}
    if has_labels(suite):
        kinds = {"label": [item.completion for item in suite.items]} | kinds
    found = (Grouping(kind, metric, tuple(_compared(metric, paired, names))) for kind, names in kinds.items())
    return tuple(grouping for grouping in found if len(grouping.groups) > 1)


def _metric(suite: PreparedSuite) -> GateMetric | None:
    has = {"Accuracy" if metric == "MacroF1" else metric for metric in suite.suite.metrics}
    return next((metric for metric in METRICS if metric in has), None)


def _languages(items: Sequence[Item]) -> list[str]:
    return [_any_language().foreign(item.user or item.prompt or item.completion) or UNSURE for item in items]


@cache
def _any_language() -> LanguageFilter:
    return LanguageFilter(())


def _compared(metric: GateMetric, paired: Paired, names: Sequence[str]) -> Iterator[Group]:
    """The groups from the largest on; what is too small, or one too many, together at the end."""
    of_items = [names[place] for place in paired.places or range(paired.n)]
    counted = Counter(of_items).most_common()
    own = [name for name, count in counted if count >= LEAST][:MOST]
    parts = {name: np.array([of == name for of in of_items]) for name in own}
    rest = ~np.any(list(parts.values()), axis=0) if parts else np.ones(paired.n, dtype=bool)
    for name, chosen in [*parts.items(), (OTHERS, rest)]:
        if chosen.any():
            yield _group(metric, name, paired.part(chosen))


def _group(metric: GateMetric, name: str, part: Paired) -> Group:
    result = gates.difference(metric, part, EACH_SIDE)
    means = [round(float(np.average(values, weights=part.weights)), 5) for values in (part.candidate, part.baseline)]
    return Group(name, part.n, means[0], means[1], round(result.lower, 5), round(result.upper, 5))
