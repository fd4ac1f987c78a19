"""How both models do on parts of a suite, by label, by language and by who wrote: a mean may hide that one group gains what another loses.

Nothing is decided by it: it is told in the report and in the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from tuneloop_trainer.contract import GateMetric
from tuneloop_trainer.data.languages import LanguageFilter
from tuneloop_trainer.data.suites import Item
from tuneloop_trainer.evaluation import gates, statistics
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
UNSAID = "not said"
NO_GROUPS = frozenset({OTHERS, UNSURE, UNSAID})
"""Names of what is no group of its own."""
RESAMPLES = 2_000
"""For the intervals of gaps."""
Chosen = npt.NDArray[np.bool_]
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
class Gap:
    """How far the best and the worst of the groups are apart, by each model. The intervals hold for any number of groups."""

    candidate: float
    lower: float
    upper: float
    baseline: float
    growth_lower: float
    """Of the candidate's gap less the baseline's."""
    growth_upper: float


@dataclass(frozen=True, slots=True)
class Grouping:
    kind: str
    metric: GateMetric
    groups: tuple[Group, ...]
    gap: Gap | None = None
    """None: fewer than two groups are of enough documents."""


def groupings(suite: PreparedSuite, candidate: SuiteScores, baseline: SuiteScores) -> tuple[Grouping, ...]:
    """The suite by expected label, by language of its texts and by what the data says of who wrote them; nothing where all items are of
    one group."""
    metric = _metric(suite)
    if metric is None:
        return ()
    paired = suite.paired(metric, candidate, baseline)
    kinds = [("label", [item.completion for item in suite.items])] if has_labels(suite) else []
    kinds.append(("language", _languages(suite.items)))
    if any(item.group is not None for item in suite.items):
        kinds.append((_column(suite), [item.group or UNSAID for item in suite.items]))
    found = (_grouping(kind, metric, paired, names) for kind, names in kinds)
    return tuple(grouping for grouping in found if len(grouping.groups) > 1)


def _metric(suite: PreparedSuite) -> GateMetric | None:
    has = {"Accuracy" if metric == "MacroF1" else metric for metric in suite.suite.metrics}
    return next((metric for metric in METRICS if metric in has), None)


def _languages(items: Sequence[Item]) -> list[str]:
    return [_any_language().foreign(item.user or item.prompt or item.completion) or UNSURE for item in items]


def _column(suite: PreparedSuite) -> str:
    """The column of the groups; rows that are held out may be of several sources."""
    source = suite.suite.source
    return source.columns["group"] if source is not None else "group"


@cache
def _any_language() -> LanguageFilter:
    return LanguageFilter(())


def grown(suite: str, told: Sequence[Grouping]) -> list[str]:
    """A sentence for each gap that is shown to be wider than the baseline's."""
    return [
        f"{suite}: {grouping.metric} of the best and the worst {grouping.kind} differ by {grouping.gap.candidate:.3g}, "
        f"the baseline's by {grouping.gap.baseline:.3g}."
        for grouping in told
        if grouping.gap is not None and grouping.gap.growth_lower > 0
    ]


def _grouping(kind: str, metric: GateMetric, paired: Paired, names: Sequence[str]) -> Grouping:
    parts = _parts(paired, names)
    groups = tuple(_group(metric, name, paired.part(chosen)) for name, chosen in parts.items())
    return Grouping(kind, metric, groups, gap_of(paired, [chosen for name, chosen in parts.items() if name not in NO_GROUPS]))


def _parts(paired: Paired, names: Sequence[str]) -> dict[str, Chosen]:
    """Which items are whose: the groups from the largest on; what is too small, or one too many, together at the end."""
    of_items = [names[place] for place in paired.places or range(paired.n)]
    counted = Counter(of_items).most_common()
    own = [name for name, count in counted if count >= LEAST and name != OTHERS][:MOST]
    parts = {name: np.array([of == name for of in of_items]) for name in own}
    rest = ~np.any(list(parts.values()), axis=0) if parts else np.ones(paired.n, dtype=bool)
    return parts | ({OTHERS: rest} if rest.any() else {})


def gap_of(paired: Paired, parts: Sequence[Chosen], resamples: int = RESAMPLES) -> Gap | None:
    """A range of means that are noisy is larger than the range of the true ones, and no resample of it tells by how much. But ranges
    are no further apart than the range of the differences (they are seminorms): of these the bootstrap has the level, at any number of
    groups. Growth adds both models' in each resample, as the gaps may be between different groups; it errs towards seeing none."""
    documents = np.asarray(paired.documents)
    told = [chosen for chosen in parts if len(set(documents[chosen])) >= LEAST]
    if len(told) < 2:
        return None
    series = np.stack([paired.candidate, paired.baseline], axis=1)
    means, resampled = statistics.bootstrap_group_means(series, paired.weights, paired.documents, np.stack(told, axis=1), 0, resamples)
    (candidate, baseline), strays = np.ptp(means, axis=0), np.ptp(resampled - means, axis=1)
    alone, both = (float(np.quantile(stray, 1 - 2 * EACH_SIDE)) for stray in (strays[:, 0], strays.sum(axis=1)))
    growth = candidate - baseline
    ends = (candidate, max(0.0, candidate - alone), candidate + alone, baseline, growth - both, growth + both)
    return Gap(*(round(float(end), 5) for end in ends))


def _group(metric: GateMetric, name: str, part: Paired) -> Group:
    result = gates.difference(metric, part, EACH_SIDE)
    means = [round(float(np.average(values, weights=part.weights)), 5) for values in (part.candidate, part.baseline)]
    return Group(name, part.n, means[0], means[1], round(result.lower, 5), round(result.upper, 5))
