"""Decides a gate: is the candidate better than the baseline, or at least not worse by more than a margin?

Pass: the test shows it at alpha / promotions. Fail: the data speaks against it, or could well have shown it and did not.
Inconclusive: too few items to say; never promotes alone. A Pass needs no look at the power, as the level holds at any n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tuneloop_trainer.contract import Gate, GateMetric, GateResult
from tuneloop_trainer.evaluation import statistics
from tuneloop_trainer.evaluation.statistics import Floats, Interval

MIN_POWER = 0.5
MEANS = ("Loss", "Reward", "ChrF")
"""Metrics whose items have any value; of the others an item is right or wrong."""
Verdict = Literal["Pass", "Fail", "Inconclusive"]


@dataclass(frozen=True)
class Paired:
    """Scores of both models on the same items. `weights`: an item's tokens for Loss, else 1."""

    candidate: Floats
    baseline: Floats
    weights: Floats
    documents: Sequence[str]
    places: Sequence[int] = ()
    """Of these items in the suite; empty: they are its first ones."""

    def part(self, chosen: npt.NDArray[np.bool_]) -> Paired:
        """Some of the items."""
        documents = [self.documents[place] for place in np.nonzero(chosen)[0]]
        return Paired(self.candidate[chosen], self.baseline[chosen], self.weights[chosen], documents)

    @property
    def n(self) -> int:
        return len(self.candidate)

    @property
    def is_clustered(self) -> bool:
        return len(set(self.documents)) < self.n


@dataclass(frozen=True)
class Finding:
    """A gate's numbers, oriented so that more is better whatever the metric."""

    improvement: float
    interval: Interval
    p: float | None
    standard_error: float
    discordant: int | None


def decide(gate: Gate, paired: Paired, promotions: int, seed: int) -> tuple[GateResult, str]:
    """The gate's result, and what would make an Inconclusive one conclusive ("" otherwise)."""
    alpha = gate.alpha / promotions
    sign = _sign(gate.metric)
    finding = _find(gate.metric, paired, gate.rule, alpha, seed)
    verdict, advice = _verdict(gate, paired.n, finding, alpha)
    ends = _ends(sign, finding)
    result = GateResult(
        suite=gate.suite,
        metric=gate.metric,
        rule=gate.rule,
        verdict=verdict,
        candidate=_rounded(float(np.average(paired.candidate, weights=paired.weights))),
        baseline=_rounded(float(np.average(paired.baseline, weights=paired.weights))),
        difference=_rounded(sign * finding.improvement),
        lower=_rounded(ends.lower),
        upper=_rounded(ends.upper),
        n=paired.n,
        p=None if finding.p is None else float(f"{finding.p:.3g}"),
        discordant=finding.discordant,
        detectable=_rounded(statistics.detectable(finding.standard_error, alpha)),
    )
    return result, advice


def difference(metric: GateMetric, paired: Paired, alpha: float, seed: int = 0) -> Interval:
    """The interval of candidate less baseline, alpha on each side, by which a gate decides."""
    return _ends(_sign(metric), _find(metric, paired, "NonInferior", alpha, seed))


def _sign(metric: GateMetric) -> float:
    return -1.0 if metric == "Loss" else 1.0


def _ends(sign: float, finding: Finding) -> Interval:
    lower, upper = sorted(sign * end for end in finding.interval)
    return Interval(lower, upper)


def _find(metric: GateMetric, paired: Paired, rule: str, alpha: float, seed: int) -> Finding:
    if metric in MEANS:
        return _compare_means(paired, _sign(metric), rule, alpha, seed)
    return _compare_accuracy(paired, rule, alpha, seed)


def overall(verdicts: Sequence[Verdict]) -> Literal["Pass", "Fail", "Inconclusive", "NoGates"]:
    """All gates must pass; one that fails decides."""
    if not verdicts:
        return "NoGates"
    if "Fail" in verdicts:
        return "Fail"
    return "Inconclusive" if "Inconclusive" in verdicts else "Pass"


def _verdict(gate: Gate, n: int, finding: Finding, alpha: float) -> tuple[Verdict, str]:
    bound = 0.0 if gate.rule == "Superior" else -gate.margin
    if n < gate.min_items:
        return "Inconclusive", f"{gate.suite}/{gate.metric} has {n} items and needs {gate.min_items}."
    if _is_shown(gate, finding, alpha):
        return "Pass", ""
    if finding.interval.upper <= bound or statistics.power(gate.margin, finding.standard_error, alpha) >= MIN_POWER:
        return "Fail", ""
    needed = statistics.items_needed(gate.margin, finding.standard_error, n, alpha)
    return "Inconclusive", f"{gate.suite}/{gate.metric} has {n} items; a difference of {gate.margin:g} needs about {needed}."


def _is_shown(gate: Gate, finding: Finding, alpha: float) -> bool:
    if gate.rule == "Superior":
        return finding.p is not None and finding.p <= alpha
    return finding.interval.lower > -gate.margin


def _compare_accuracy(paired: Paired, rule: str, alpha: float, seed: int) -> Finding:
    """Exact McNemar and Tango's interval; over documents with several items the sign-flip test and the bootstrap."""
    differences = paired.candidate - paired.baseline
    wins, losses, n = int((differences > 0).sum()), int((differences < 0).sum()), paired.n
    p = None
    if paired.is_clustered:
        means = statistics.bootstrap_means(differences, paired.weights, paired.documents, seed)
        interval, error = statistics.bootstrap_interval(means, alpha), float(means.std())
        if rule == "Superior":
            by_document: dict[str, int] = defaultdict(int)
            for document, difference in zip(paired.documents, differences, strict=True):
                by_document[document] += int(difference)
            p = statistics.sign_flip_p(list(by_document.values()))
    else:
        interval = statistics.tango_interval(wins, losses, n, alpha)
        # Without effect the difference scatters by the discordance alone, as in McNemar's test.
        error = float(np.sqrt(wins + losses)) / n
        p = statistics.exact_mcnemar(wins, losses) if rule == "Superior" else None
    return Finding((wins - losses) / n, interval, p, error, wins + losses)


def _compare_means(paired: Paired, sign: float, rule: str, alpha: float, seed: int) -> Finding:
    """Paired bootstrap over documents; improvement is a higher mean, or with a negative sign a lower one."""
    improvements = sign * (paired.candidate - paired.baseline)
    means = statistics.bootstrap_means(improvements, paired.weights, paired.documents, seed)
    p = statistics.bootstrap_p(means) if rule == "Superior" else None
    improvement = float(np.average(improvements, weights=paired.weights))
    return Finding(improvement, statistics.bootstrap_interval(means, alpha), p, float(means.std()), None)


def _rounded(value: float) -> float:
    return round(value, 5)
