"""The analysis of a canary: its level under constant looking, its power, and that too little is never a pass."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache

import pytest

from tuneloop_gateway.contract import LATENCY_BUCKETS, LATENCY_EDGE_RATIO, LATENCY_LEAST_SECONDS, Outcomes
from tuneloop_operator.domain.modeldeployment.analysis import Analysis, Check, Limits, analyse, quantile, summed
from tuneloop_operator.domain.modeldeployment.evidence import Finding, Share, compare_shares, evidence_above, evidence_below

LEVEL, MISS = 0.1, 0.1


@cache
def histogram(median: float, requests: int, sigma: float = 0.4) -> tuple[int, ...]:
    """Log-normal latencies, as expected counts."""
    buckets = [0] * LATENCY_BUCKETS
    for place in range(requests):
        normal = _normal_quantile((place + 0.5) / requests)
        seconds = median * math.exp(sigma * normal)
        buckets[max(0, math.ceil(math.log(seconds / LATENCY_LEAST_SECONDS) / math.log(LATENCY_EDGE_RATIO)))] += 1
    return tuple(buckets)


def _normal_quantile(p: float) -> float:
    low, high = -8.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2)) < p else (low, middle)
    return low


def outcomes(requests: int, *, errors: int = 0, first: float = 0.2, between: float = 0.02, **more: int) -> Outcomes:
    answers = requests - errors
    return Outcomes(
        requests=requests, errors=errors, answers=answers, first_token=histogram(first, answers), inter_token=histogram(between, answers)
    ).model_copy(update=more)  # fmt: skip


def finding_of(analysis: Analysis, check: Check) -> Finding:
    return next(checked.finding for checked in analysis.checks if checked.check is check)


# --- the statistics ----------------------------------------------------------


RUNS = 40


def runs_that_find(finding: Finding, usual: float, margin: float) -> int:
    """How many of RUNS canaries, each at its limit, are found so at any of 30 looks."""
    return sum(any(found is finding for found in looks(random.Random(run), usual, margin)) for run in range(RUNS))


def looks(rng: random.Random, usual: float, margin: float) -> Iterator[Finding]:
    canary = stable = Share(0, 0)
    for _ in range(30):
        canary += Share(sum(rng.random() < usual + margin for _ in range(10)), 10)
        stable += Share(sum(rng.random() < usual for _ in range(20)), 20)
        yield compare_shares(canary, stable, margin, level=LEVEL, miss=MISS)


@pytest.mark.parametrize("usual", [0.0, 0.02, 0.3])
def test_a_canary_at_its_limit_is_seldom_stopped_however_often_it_is_asked(usual: float) -> None:
    assert runs_that_find(Finding.FAIL, usual, margin=0.02) <= LEVEL * RUNS


@pytest.mark.parametrize("usual", [0.0, 0.02, 0.3])
def test_a_canary_beyond_its_limit_seldom_passes_however_often_it_is_asked(usual: float) -> None:
    assert runs_that_find(Finding.PASS, usual, margin=0.05) <= MISS * RUNS


def test_the_evidence_is_an_e_value_at_the_limit() -> None:
    """Its exact expectation over all outcomes of small samples is at most 1, at every point of the hypothesis' edge."""
    canary_total, stable_total, margin = 12, 15, 0.1
    for usual in (0.001, 0.05, 0.3, 0.6, 0.89):
        for evidence in (evidence_above, evidence_below):
            mean = 0.0
            for hits in range(canary_total + 1):
                for others in range(stable_total + 1):
                    weight = _binomial(hits, canary_total, usual + margin) * _binomial(others, stable_total, usual)
                    canary, stable = Share(hits, canary_total), Share(others, stable_total)
                    mean += weight * math.exp(evidence(canary, stable, margin))
            assert mean <= 1.0


def _binomial(hits: int, total: int, p: float) -> float:
    return math.comb(total, hits) * p**hits * (1 - p) ** (total - hits)


def test_a_finding_needs_evidence_of_one_over_its_level() -> None:
    worse, usual, margin = Share(6, 30), Share(6, 600), 0.01
    enough = math.exp(-evidence_above(worse, usual, margin))
    assert 0 < enough < 0.1
    assert compare_shares(worse, usual, margin, level=enough * 1.01, miss=MISS) is Finding.FAIL
    assert compare_shares(worse, usual, margin, level=enough * 0.99, miss=MISS) is Finding.INCONCLUSIVE
    good = Share(0, 500)
    enough = math.exp(-evidence_below(good, usual, margin))
    assert 0 < enough < 0.5
    assert compare_shares(good, usual, margin, level=LEVEL, miss=enough * 1.01) is Finding.PASS
    assert compare_shares(good, usual, margin, level=LEVEL, miss=enough * 0.99) is Finding.INCONCLUSIVE


def test_one_in_five_failing_is_stopped_within_forty_requests() -> None:
    level = Limits(steps=3).level
    needed = next(
        n
        for n in range(5, 200, 5)
        if compare_shares(Share(n // 5, n), Share(n // 10, 19 * n), 0.01, level=level, miss=MISS) is Finding.FAIL
    )
    assert needed <= 40


def test_nothing_seen_says_nothing() -> None:
    assert compare_shares(Share(0, 0), Share(0, 100), 0.01, level=LEVEL, miss=MISS) is Finding.INCONCLUSIVE
    assert compare_shares(Share(0, 100), Share(0, 0), 0.01, level=LEVEL, miss=MISS) is Finding.INCONCLUSIVE
    assert compare_shares(Share(5, 5), Share(0, 0), 0.01, level=LEVEL, miss=MISS) is Finding.INCONCLUSIVE


# --- the checks together -----------------------------------------------------


def test_a_canary_like_the_stable_passes_when_there_are_enough_requests() -> None:
    analysis = analyse(outcomes(800, errors=1), outcomes(4000, errors=8), Limits(), 200)
    assert analysis.finding is Finding.PASS
    assert analysis.failed == ()
    assert analyse(outcomes(800, errors=1), outcomes(4000, errors=8), Limits(), 900).finding is Finding.INCONCLUSIVE


def test_too_little_traffic_is_never_a_pass() -> None:
    assert analyse(outcomes(30), outcomes(4000), Limits(), 1).finding is Finding.INCONCLUSIVE
    assert analyse(outcomes(800), Outcomes(), Limits(), 1).finding is Finding.INCONCLUSIVE
    assert analyse(Outcomes(), Outcomes(), Limits(), 0).finding is Finding.INCONCLUSIVE


@pytest.mark.parametrize(
    ("canary", "failing"),
    [
        (outcomes(100, errors=20), Check.ERRORS),
        (outcomes(200, first=0.4), Check.TIME_TO_FIRST_TOKEN),
        (outcomes(200, between=0.04), Check.INTER_TOKEN_LATENCY),
        (outcomes(200, empty=60), Check.EMPTY),
        (outcomes(200, refused=60), Check.REFUSED),
        (outcomes(200, repetitive=60), Check.REPETITIVE),
        (outcomes(200, cut_short=60), Check.CUT_SHORT),
        (outcomes(200, up=30, down=70), Check.HARM),
    ],
)
def test_each_way_of_being_worse_fails_its_own_check(canary: Outcomes, failing: Check) -> None:
    analysis = analyse(canary, outcomes(4000, errors=8, up=900, down=100), Limits(steps=3), 1)
    assert analysis.finding is Finding.FAIL
    assert [checked.check for checked in analysis.failed] == [failing]


def test_a_failure_needs_no_number_of_requests() -> None:
    assert analyse(outcomes(60, errors=30), outcomes(400), Limits(steps=3), 1000).finding is Finding.FAIL


def test_a_faster_canary_is_no_worse_one() -> None:
    assert analyse(outcomes(900, first=0.1, between=0.01), outcomes(4000), Limits(), 200).finding is Finding.PASS


def test_a_latency_within_the_limit_is_no_reason_to_stop() -> None:
    analysis = analyse(outcomes(3000, first=0.23), outcomes(9000, first=0.2), Limits(), 200)
    assert finding_of(analysis, Check.TIME_TO_FIRST_TOKEN) is not Finding.FAIL


def test_without_streams_whole_answers_are_waited_for() -> None:
    def whole(requests: int, seconds: float) -> Outcomes:
        return Outcomes(requests=requests, answers=requests, whole_answer=histogram(seconds, requests))

    assert analyse(whole(800, 0.1), whole(4000, 0.1), Limits(), 200).finding is Finding.PASS
    slow = analyse(whole(200, 0.2), whole(4000, 0.1), Limits(), 200)
    assert [checked.check for checked in slow.failed] == [Check.WHOLE_ANSWER_LATENCY]
    assert analyse(Outcomes(requests=800, answers=800), whole(4000, 0.1), Limits(), 200).finding is Finding.INCONCLUSIVE


def test_limits_without_a_bound_are_limits() -> None:
    wide = Limits(1.0, max_error_ratio_increase=1.0, max_time_to_first_token_increase=math.inf, max_inter_token_latency_increase=0.0)
    analysis = analyse(outcomes(900, errors=500, first=5.0), outcomes(4000), wide, 200)
    assert analysis.failed == ()


def test_counts_that_cannot_be_are_survived() -> None:
    assert analyse(Outcomes(requests=60, errors=90, empty=5), outcomes(4000), Limits(), 1).finding is Finding.FAIL
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Outcomes(requests=-1)


def test_few_votes_say_nothing() -> None:
    analysis = analyse(outcomes(800, down=40), outcomes(4000, up=900), Limits(), 200)
    assert finding_of(analysis, Check.HARM) is Finding.INCONCLUSIVE
    assert analysis.finding is Finding.PASS, "harm is not waited for"


def test_the_level_is_split_over_checks_and_steps() -> None:
    assert Limits(false_rollback_probability=0.05, steps=3).level == pytest.approx(0.05 / (len(Check) * 3))


def test_the_counts_of_all_gateways_are_added() -> None:
    one, other = outcomes(40, errors=1), Outcomes(requests=2, errors=1, first_token=(1, 1), up=3)
    both = summed([one, other])
    assert (both.requests, both.errors, both.up) == (42, 2, 3)
    assert sum(both.first_token) == sum(one.first_token) + 2
    assert both == summed([other, one])
    assert summed([]) == Outcomes()


def test_a_quantile_is_the_edge_above_it() -> None:
    assert quantile(histogram(0.2, 1000), 0.5) == pytest.approx(0.2, rel=0.06)
