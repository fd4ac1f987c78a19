"""Tests and intervals for paired comparisons, items grouped by document.

`wins` and `losses` are discordant items: the candidate alone right, the baseline alone right.
Everything is one-sided at the level it is given; an interval has that level on each side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000
POWER = 0.8
_CHUNK_CELLS = 2_000_000


class Interval(NamedTuple):
    lower: float
    upper: float


def exact_mcnemar(wins: int, losses: int) -> float:
    """P-value against "the candidate is not better", for independent items (McNemar 1947, in its exact form)."""
    discordant = wins + losses
    return float(binomtest(wins, discordant, 0.5, alternative="greater").pvalue) if discordant else 1.0


def sign_flip_p(differences: Sequence[int]) -> float:
    """The exact McNemar test for documents with several items.

    Each entry is a document's wins minus losses. If candidate and baseline were equally good, each document's difference
    would be as likely with the other sign; this is the share of all sign patterns with a sum at least as large, by
    convolution. With one item per document it is the exact McNemar test.
    """
    sizes = [abs(difference) for difference in differences if difference]
    observed = sum(differences)
    chances = np.ones(1)
    for size in sizes:
        # Adds +size or -size, each with probability 1/2; index 0 stands for the smallest sum.
        spread = np.zeros(len(chances) + 2 * size)
        spread[: len(chances)] += chances / 2
        spread[2 * size :] += chances / 2
        chances = spread
    return float(min(1.0, chances[observed + sum(sizes) :].sum()))


def tango_interval(wins: int, losses: int, n: int, alpha: float) -> Interval:
    """Score interval of the difference of two paired proportions, wins/n - losses/n.

    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17 (1998) 891-908: all differences that the score test at level alpha does not refuse.
    """
    z = float(norm.isf(alpha))
    observed = (wins - losses) / n
    lower = -1.0 if losses == n else _crossing(lambda delta: _tango_score(wins, losses, n, delta) - z, -1.0, observed)
    upper = 1.0 if wins == n else _crossing(lambda delta: _tango_score(wins, losses, n, delta) + z, observed, 1.0)
    return Interval(lower, upper)


def _tango_score(wins: int, losses: int, n: int, delta: float) -> float:
    """The score statistic for the difference delta; falls as delta grows."""
    b = -wins - losses + (2 * n - wins + losses) * delta
    c = -losses * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + delta * (1 - delta))
    distance = wins - losses - n * delta
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function becomes negative, by bisection: it may be infinite at its ends."""
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def bootstrap_means(values: Floats, weights: Floats, documents: Sequence[str], seed: int, resamples: int = RESAMPLES) -> Floats:
    """Weighted means of `values` over resampled documents: a document is drawn with all its items."""
    _, groups = np.unique(np.asarray(documents), return_inverse=True)
    count = int(groups.max()) + 1
    sums = np.bincount(groups, weights=values * weights, minlength=count)
    totals = np.bincount(groups, weights=weights, minlength=count)
    random = np.random.default_rng(seed)
    means: list[Floats] = []
    step = max(1, _CHUNK_CELLS // count)
    for start in range(0, resamples, step):
        drawn = random.integers(0, count, size=(min(step, resamples - start), count))
        means.append(sums[drawn].sum(axis=1) / totals[drawn].sum(axis=1))
    return np.concatenate(means)


class GroupMeans(NamedTuple):
    """Weighted means of several series by group."""

    means: Floats
    """groups x series."""
    resampled: Floats
    """resamples x groups x series."""


def bootstrap_group_means(
    series: Floats, weights: Floats, documents: Sequence[str], parts: npt.NDArray[np.bool_], seed: int, resamples: int
) -> GroupMeans:
    """As `bootstrap_means`, for `series` (items x series) in each of the groups that `parts` (items x groups) says: a document that is
    drawn brings its items to all of its groups. Each group is of so many documents that no resample is without it."""
    _, of = np.unique(np.asarray(documents), return_inverse=True)
    count, (groups, kinds) = int(of.max()) + 1, (parts.shape[1], series.shape[1])
    weighted = parts * weights[:, None]
    cells = np.concatenate([weighted[:, :, None] * series[:, None, :], weighted[:, :, None]], axis=2).reshape(len(series), -1)
    sums = np.stack([np.bincount(of, weights=cell, minlength=count) for cell in cells.T], axis=1)
    random = np.random.default_rng(seed)
    drawn = (np.bincount(random.integers(0, count, size=count), minlength=count) for _ in range(resamples))
    totals = np.stack([sums.sum(axis=0), *(counts @ sums for counts in drawn)]).reshape(-1, groups, kinds + 1)
    means = totals[:, :, :-1] / totals[:, :, -1:]
    return GroupMeans(means[0], means[1:])


def bootstrap_interval(means: Floats, alpha: float) -> Interval:
    """The percentile interval, alpha on each side."""
    lower, upper = np.quantile(means, [alpha, 1 - alpha])
    return Interval(float(lower), float(upper))


def bootstrap_p(means: Floats) -> float:
    """P-value against "the mean is not above 0"; never 0, as the resamples are finitely many."""
    return float((1 + np.count_nonzero(means <= 0)) / (1 + len(means)))


def power(effect: float, standard_error: float, alpha: float) -> float:
    """Chance to find a difference of `effect` with a one-sided test at alpha, by the normal approximation."""
    if standard_error <= 0:
        return 1.0
    return float(norm.cdf(effect / standard_error - norm.isf(alpha)))


def detectable(standard_error: float, alpha: float) -> float:
    """The difference that is found with 80 % power."""
    return float((norm.isf(alpha) + norm.ppf(POWER)) * standard_error)


def items_needed(effect: float, standard_error: float, n: int, alpha: float) -> int:
    """Items with which `effect` would be found with 80 % power, if they scatter as these n do."""
    return math.ceil(n * (detectable(standard_error, alpha) / effect) ** 2) if effect > 0 else 0


def macro_f1(expected: Sequence[int], given: Sequence[int], labels: int) -> float:
    """Mean of the F1 scores over the labels that occur in `expected`."""
    pairs = list(zip(expected, given, strict=True))
    scores = []
    for label in range(labels):
        hits = sum(e == g == label for e, g in pairs)
        wanted, said = sum(e == label for e, _ in pairs), sum(g == label for _, g in pairs)
        if wanted:
            scores.append(2 * hits / (wanted + said))
    return sum(scores) / len(scores) if scores else 0.0
