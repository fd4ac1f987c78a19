"""What the requests of one window say of a canary beside the stable revision: each check with its level, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from typing import Any

from tuneloop_gateway.contract import LATENCY_BUCKETS, LATENCY_EDGE_RATIO, LATENCY_LEAST_SECONDS, Outcomes
from tuneloop_operator.domain.modeldeployment.evidence import Finding, Share, compare_latencies, compare_shares

MISS = 0.1
"""A canary at its limit, or beyond, passes a check with at most this probability in a step: the power is 90 %."""
MAX_ANSWER_INCREASE = 0.1
"""Answers that are empty, refused, repetitive or cut short may grow by this share: another model may answer otherwise."""
MAX_INCREASE = 1e6
RELEVANT = 0.05
"""A latency that so small a share of the stable's requests has is not waited for."""


class Check(StrEnum):
    ERRORS = "Errors"
    TIME_TO_FIRST_TOKEN = "TimeToFirstToken"
    INTER_TOKEN_LATENCY = "InterTokenLatency"
    WHOLE_ANSWER_LATENCY = "WholeAnswerLatency"
    EMPTY = "Empty"
    REFUSED = "Refused"
    REPETITIVE = "Repetitive"
    CUT_SHORT = "CutShort"
    HARM = "Harm"


LATENCIES = (Check.TIME_TO_FIRST_TOKEN, Check.INTER_TOKEN_LATENCY, Check.WHOLE_ANSWER_LATENCY)


@dataclass(frozen=True)
class Limits:
    """How much worse a canary may be, and how often chance may stop one that is not."""

    false_rollback_probability: float = 0.05
    max_error_ratio_increase: float = 0.01
    max_time_to_first_token_increase: float = 0.2
    max_inter_token_latency_increase: float = 0.2
    max_harm_increase: float = 0.02
    min_feedback: int = 50
    steps: int = 1
    """Each step is a window of its own, so the level is split over them as it is over the checks."""

    @property
    def level(self) -> float:
        """Of one check in one step."""
        return self.false_rollback_probability / (len(Check) * self.steps)


@dataclass(frozen=True)
class Checked:
    """One check: its finding, and the two figures that it compares."""

    check: Check
    finding: Finding
    canary: str
    stable: str


@dataclass(frozen=True)
class Analysis:
    """All checks of a window."""

    requests: int
    """Of the canary."""
    checks: tuple[Checked, ...]
    finding: Finding
    """Fail: a check failed. Pass: there are enough requests, and errors and latency pass. Too little traffic is neither."""

    @property
    def failed(self) -> tuple[Checked, ...]:
        return tuple(checked for checked in self.checks if checked.finding is Finding.FAIL)


def analyse(canary: Outcomes, stable: Outcomes, limits: Limits, min_requests: int) -> Analysis:
    """Holds however often it is asked while the window grows."""
    checks = (
        _shares(Check.ERRORS, _errors(canary), _errors(stable), limits.max_error_ratio_increase, limits),
        *(_latency(check, canary, stable, limits) for check in LATENCIES),
        *(_answers(check, canary, stable, limits) for check in (Check.EMPTY, Check.REFUSED, Check.REPETITIVE, Check.CUT_SHORT)),
        _harm(canary, stable, limits),
    )
    return Analysis(canary.requests, checks, _finding(checks, canary, stable, min_requests))


def _finding(checks: tuple[Checked, ...], canary: Outcomes, stable: Outcomes, min_requests: int) -> Finding:
    if any(checked.finding is Finding.FAIL for checked in checks):
        return Finding.FAIL
    needed = {Check.ERRORS, *_relevant_latencies(stable)}
    has_passed = all(checked.finding is Finding.PASS for checked in checks if checked.check in needed)
    return Finding.PASS if has_passed and canary.requests >= min_requests else Finding.INCONCLUSIVE


def _relevant_latencies(stable: Outcomes) -> tuple[Check, ...]:
    """Those that this deployment's traffic has: without streams there is no inter-token latency to wait for. One at least."""
    found = tuple(check for check in LATENCIES if sum(_buckets(check, stable)) >= max(1.0, RELEVANT * stable.requests))
    return found or LATENCIES[:1]


# --- shares ------------------------------------------------------------------


def _shares(check: Check, canary: Share, stable: Share, margin: float, limits: Limits) -> Checked:
    finding = compare_shares(canary, stable, margin, level=limits.level, miss=MISS)
    return Checked(check, finding, _share_text(canary), _share_text(stable))


def _share_text(share: Share) -> str:
    return f"{share.hits}/{share.total}" + (f" ({100 * share.ratio:.1f} %)" if share.total else "")


def _share(hits: int, total: int) -> Share:
    """Counts come from other processes: more hits than requests are as many."""
    return Share(min(hits, total), total)


def _errors(outcomes: Outcomes) -> Share:
    return _share(outcomes.errors, outcomes.requests)


def _answers(check: Check, canary: Outcomes, stable: Outcomes, limits: Limits) -> Checked:
    def share(outcomes: Outcomes) -> Share:
        hits = {
            Check.EMPTY: outcomes.empty,
            Check.REFUSED: outcomes.refused,
            Check.REPETITIVE: outcomes.repetitive,
            Check.CUT_SHORT: outcomes.cut_short,
        }
        return _share(hits[check], outcomes.answers)

    return _shares(check, share(canary), share(stable), MAX_ANSWER_INCREASE, limits)


def _harm(canary: Outcomes, stable: Outcomes, limits: Limits) -> Checked:
    """Thumbs down of all thumbs; not before both have enough of them."""
    bad, usual = _share(canary.down, canary.up + canary.down), _share(stable.down, stable.up + stable.down)
    if min(bad.total, usual.total) < limits.min_feedback:
        return Checked(Check.HARM, Finding.INCONCLUSIVE, _share_text(bad), _share_text(usual))
    return _shares(Check.HARM, bad, usual, limits.max_harm_increase, limits)


# --- latencies ---------------------------------------------------------------


def _latency(check: Check, canary: Outcomes, stable: Outcomes, limits: Limits) -> Checked:
    late, usual = _padded(_buckets(check, canary)), _padded(_buckets(check, stable))
    finding = compare_latencies(late, usual, _shift(_limit(check, limits)), level=limits.level, miss=MISS)
    return Checked(check, finding, _latency_text(late), _latency_text(usual))


def _buckets(check: Check, outcomes: Outcomes) -> tuple[int, ...]:
    of_stream = outcomes.first_token if check is Check.TIME_TO_FIRST_TOKEN else outcomes.inter_token
    return outcomes.whole_answer if check is Check.WHOLE_ANSWER_LATENCY else of_stream


def _limit(check: Check, limits: Limits) -> float:
    """An answer in one piece is made of a first token and of others: the wider of the two limits holds."""
    first, others = limits.max_time_to_first_token_increase, limits.max_inter_token_latency_increase
    return {Check.TIME_TO_FIRST_TOKEN: first, Check.INTER_TOKEN_LATENCY: others}.get(check, max(first, others))


def _shift(increase: float) -> int:
    """The limit in buckets, rounded up: 0.2 is 4 buckets of 5 %, a limit of 21.6 %."""
    steps = math.ceil(math.log1p(min(increase, MAX_INCREASE)) / math.log(LATENCY_EDGE_RATIO) - 1e-9)
    return min(steps, LATENCY_BUCKETS)


def _padded(buckets: tuple[int, ...]) -> tuple[int, ...]:
    return buckets + (0,) * (LATENCY_BUCKETS - len(buckets))


def _latency_text(buckets: Sequence[int]) -> str:
    return f"p50 {quantile(buckets, 0.5):.3g} s, p95 {quantile(buckets, 0.95):.3g} s" if sum(buckets) else "none"


def quantile(buckets: Sequence[int], share: float) -> float:
    """Upper edge, in seconds, of the bucket that holds it."""
    wanted, seen = share * sum(buckets), 0
    for place, count in enumerate(buckets):
        seen += count
        if seen >= wanted:
            return float(LATENCY_LEAST_SECONDS * LATENCY_EDGE_RATIO**place)
    return math.nan


# --- over several gateways ---------------------------------------------------


def summed(parts: Iterable[Outcomes]) -> Outcomes:
    """The counts of all gateways together."""
    dumped = [part.model_dump() for part in parts]
    return Outcomes.model_validate({name: _added([part[name] for part in dumped]) for name in Outcomes.model_fields if dumped})


def _added(values: list[Any]) -> Any:  # an int or a tuple of them, as the field is
    if isinstance(values[0], int):
        return sum(values)
    return tuple(map(sum, zip_longest(*values, fillvalue=0)))
