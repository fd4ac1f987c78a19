"""Sequential comparison of two shares or two latencies from counts alone: what the analysis of a canary rests on.

A canary may be judged every second, by whoever is the operator then, so the evidence must hold however often it is looked at and must
follow from the counts, not from their history. Both are true of the mixture likelihood ratio used here. For one arm with `n` requests of
which `k` hit, and a prior over its share,

    M(p) = integral of q^k (1-q)^(n-k) dPrior(q)  /  p^k (1-p)^(n-k)

is a martingale of mean 1 where `p` is the true share (Robbins 1970): it ever reaches 1/a with probability at most `a` (Ville). Where the
share moves in time and `p` is its running average, it stays below one (Howard, Ramdas, McAuliffe, Sekhon, "Time-uniform, nonparametric,
nonasymptotic confidence sequences", Ann. Statist. 2021, sub-Bernoulli case). For two arms the product is such a martingale, so against a
hypothesis on both shares its minimum over the hypothesis is evidence: an e-process (Wasserman, Ramdas, Balakrishnan, "Universal inference",
PNAS 2020; Ramdas, Grünwald, Vovk, Shafer, "Game-theoretic statistics and safe anytime-valid inference", Statist. Sci. 2023). An average of
e-processes is one too, which is how the thresholds of a latency are looked at together.

No library: the operator carries neither NumPy nor SciPy, and what is needed is `lgamma` and a bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

PRIOR = (0.2, 0.8)
"""Beta(a, b) of an arm's share: little mass is spent on shares in the middle, since failures are rare."""
BISECTIONS = 32
MAX_MARGIN = 0.99
LATE_SHARE = 0.05
"""Share of the requests that may be late beyond the limit without being a reason to stop: cold caches, one slow moment."""


class Finding(StrEnum):
    """What a comparison says."""

    PASS = "Pass"
    FAIL = "Fail"
    INCONCLUSIVE = "Inconclusive"


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    hits: int
    total: int

    @property
    def ratio(self) -> float:
        return self.hits / self.total if self.total else 0.0

    def __add__(self, other: Share) -> Share:
        return Share(self.hits + other.hits, self.total + other.total)


def compare_shares(canary: Share, stable: Share, margin: float, *, level: float, miss: float) -> Finding:
    """Whether the canary's share is above the stable's by more than `margin`.

    Fail: a canary within the margin gets it with probability at most `level`, however often it is asked. Pass: one that is at the margin
    or beyond gets it with probability at most `miss` (the power against such a canary is 1 - miss). Neither: Inconclusive.
    """
    if evidence_above(canary, stable, margin) >= -math.log(level):
        return Finding.FAIL
    if evidence_below(canary, stable, margin) >= -math.log(miss):
        return Finding.PASS
    return Finding.INCONCLUSIVE


def evidence_above(canary: Share, stable: Share, margin: float) -> float:
    """Natural logarithm of the evidence against "canary <= stable + margin"; none where the counts agree with that."""
    if not canary.total or not stable.total or canary.ratio - stable.ratio <= margin:
        return -math.inf
    return _log_marginal(canary) + _log_marginal(stable) - _log_likelihood_at(canary, stable, margin)


def evidence_below(canary: Share, stable: Share, margin: float) -> float:
    """Natural logarithm of the evidence against "canary >= stable + margin"; none where the counts agree with that."""
    if not canary.total or not stable.total or canary.ratio - stable.ratio >= margin:
        return -math.inf
    # Half of the bet is on equal shares, which is what a good canary has: one share to find out instead of two.
    either = _log_sum(_log_marginal(canary) + _log_marginal(stable), _log_marginal(canary + stable)) - math.log(2)
    return either - _log_likelihood_at(canary, stable, margin)


# --- latencies ---------------------------------------------------------------


def compare_latencies(canary: Sequence[int], stable: Sequence[int], shift: int, *, level: float, miss: float, stride: int = 4) -> Finding:
    """Whether the canary is slower than the stable one by more than the limit, from two histograms over the same geometric edges.

    `shift` is the limit in buckets. At each threshold (every `stride`-th edge t) the share of the canary's requests slower than
    t * limit is compared with the share of the stable's slower than t: under "no slower than the limit" the first is never the larger
    one, at any quantile. Fail: the average evidence over the thresholds reaches the level. Pass: every threshold passes.
    """
    if len(canary) != len(stable):
        raise ValueError("The histograms have different edges.")
    pairs = _exceedances(canary, stable, shift, stride)
    above = [evidence_above(late, slow, LATE_SHARE) for late, slow in pairs]
    top = max(above, default=-math.inf)
    if top > 0 and top + math.log(sum(math.exp(each - top) for each in above) / len(above)) >= -math.log(level):
        return Finding.FAIL
    needed = -math.log(miss)
    if pairs and all(evidence_below(late, slow, LATE_SHARE) >= needed for late, slow in set(pairs)):  # many are alike at both ends
        return Finding.PASS
    return Finding.INCONCLUSIVE


def _exceedances(canary: Sequence[int], stable: Sequence[int], shift: int, stride: int) -> list[tuple[Share, Share]]:
    """(canary's requests slower than the threshold times the limit, stable's slower than the threshold) at each threshold."""
    late, slow = _above_edges(canary), _above_edges(stable)
    return [(Share(late[min(place + shift, len(late) - 1)], late[0]), Share(slow[place], slow[0])) for place in range(1, len(slow), stride)]


def _above_edges(buckets: Sequence[int]) -> list[int]:
    """How many are in bucket i or above, for each i; the first is all of them, the last none."""
    counts = [0]
    for count in reversed(buckets):
        counts.append(counts[-1] + count)
    return counts[::-1]


# --- likelihoods -------------------------------------------------------------


def _log_marginal(share: Share) -> float:
    """Of a sequence with these counts, under the prior."""
    a, b = PRIOR
    return _log_beta(share.hits + a, share.total - share.hits + b) - _log_beta(a, b)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log_likelihood(share: Share, p: float) -> float:
    missed = share.total - share.hits
    return (share.hits * math.log(p) if share.hits else 0.0) + (missed * math.log1p(-p) if missed else 0.0)


def _log_likelihood_at(canary: Share, stable: Share, margin: float) -> float:
    """The largest likelihood of both counts where the canary's share is the stable's plus the margin; concave, so by bisection."""
    margin = min(margin, MAX_MARGIN)
    low, high = 0.0, 1.0 - margin
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _slope(stable, middle) + _slope(canary, middle + margin) > 0:
            low = middle
        else:
            high = middle
    p = min(max((low + high) / 2, 1e-15), 1 - 1e-15)
    return _log_likelihood(stable, p) + _log_likelihood(canary, min(max(p + margin, 1e-15), 1 - 1e-15))


def _slope(share: Share, p: float) -> float:
    return share.hits / p - (share.total - share.hits) / (1 - p)


def _log_sum(a: float, b: float) -> float:
    top = max(a, b)
    return top + math.log1p(math.exp(min(a, b) - top))
