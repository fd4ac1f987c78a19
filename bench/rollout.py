"""Shows what the analysis of a canary promises: how often chance stops a good one, how soon and after how much harm a worse one is stopped.

`python -m bench.rollout` plays canaries against a stable revision through the operator's own analysis, unchanged: three steps
(5, 25 and 50 % of the traffic), requests with a base error ratio and log-normal latencies, one true effect for each row. The analysis is
asked again and again while a step's window grows, as the operator does. A row tells the share of canaries that were rolled back and
promoted, the requests (all of the deployment's, and the canary's alone) up to the rollback, and the requests harmed: those of the canary
that failed beyond the usual, or were slower than they would have been. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from tuneloop_gateway.contract import LATENCY_BUCKETS, LATENCY_EDGE_RATIO, LATENCY_LEAST_SECONDS, Outcomes
from tuneloop_operator.domain.modeldeployment.analysis import Limits, analyse
from tuneloop_operator.domain.modeldeployment.evidence import Finding

STEPS = ((0.05, 200), (0.25, 500), (0.5, 1000))
"""Weight, and the canary's requests at least."""
LIMITS = Limits(steps=len(STEPS))
MAX_CANARY_REQUESTS = 3000
"""Of a step: one that is still undecided then is Inconclusive, as by `timeoutSeconds`."""
FIRST_TOKEN, INTER_TOKEN = (0.25, 0.5), (0.02, 0.3)
"""Median in seconds, and the standard deviation of its logarithm."""


@dataclass(frozen=True)
class Effect:
    """What is wrong with a canary."""

    name: str
    errors: float = 0.0
    """Added to the ratio of errors."""
    first_token: float = 1.0
    """Factor."""
    inter_token: float = 1.0
    sessions: int = 1
    """Requests of one session, which fail or succeed together; one failure of it counts, and its requests 1, 2, 4, 8 ..."""
    base: float = 0.005
    """Usual ratio of errors."""

    @property
    def is_within_limits(self) -> bool:
        """A rollback of it is a false one."""
        ok = self.first_token <= 1 + LIMITS.max_time_to_first_token_increase
        ok = ok and self.inter_token <= 1 + LIMITS.max_inter_token_latency_increase
        return ok and self.errors <= LIMITS.max_error_ratio_increase


EFFECTS = (
    Effect("none"),
    Effect("none, no errors at all", base=0.0),
    Effect("none, sessions of 5", sessions=5),
    Effect("errors +1 points (the limit)", errors=0.01),
    Effect("first token x 1.2 (the limit)", first_token=1.2),
    Effect("between tokens x 1.2 (the limit)", inter_token=1.2),
    Effect("errors +3 points", errors=0.03),
    Effect("errors +5 points", errors=0.05),
    Effect("errors +20 points", errors=0.2),
    Effect("errors +50 points", errors=0.5),
    Effect("first token x 1.5", first_token=1.5),
    Effect("first token x 2", first_token=2.0),
    Effect("between tokens x 1.5", inter_token=1.5),
    Effect("between tokens x 2", inter_token=2.0),
)


@dataclass(frozen=True)
class Played:
    """How one canary ended."""

    finding: Finding
    """Pass: promoted."""
    requests: int
    """Of the deployment, since the canary had its first one."""
    canary_requests: int
    harmed: int


class Arm:
    """The requests of one revision in one window, drawn in portions."""

    def __init__(self, rng: np.random.Generator, effect: Effect, *, is_canary: bool) -> None:
        self._rng, self._sessions = rng, effect.sessions
        self._errors = effect.base + (effect.errors if is_canary else 0.0)
        self._first = (FIRST_TOKEN[0] * (effect.first_token if is_canary else 1.0), FIRST_TOKEN[1])
        self._between = (INTER_TOKEN[0] * (effect.inter_token if is_canary else 1.0), INTER_TOKEN[1])
        self.requests = self.counted = self.errors = 0
        self._first_buckets = np.zeros(LATENCY_BUCKETS, dtype=np.int64)
        self._between_buckets = np.zeros(LATENCY_BUCKETS, dtype=np.int64)

    def add(self, requests: int) -> None:
        if requests < 1:
            return
        failed_sessions = int(self._rng.binomial(requests // self._sessions, self._errors))
        self.requests += requests
        self.counted += requests // self._sessions * self._sessions.bit_length()
        self.errors += failed_sessions
        answered = requests - failed_sessions * self._sessions
        self._first_buckets += _histogram(self._rng, answered, *self._first)
        self._between_buckets += _histogram(self._rng, answered, *self._between)

    def outcomes(self) -> Outcomes:
        return Outcomes.model_construct(
            requests=self.counted,
            errors=self.errors,
            answers=self.counted - self.errors,
            first_token=tuple(self._first_buckets.tolist()),
            inter_token=tuple(self._between_buckets.tolist()),
        )


def _histogram(rng: np.random.Generator, size: int, median: float, sigma: float) -> np.ndarray:
    seconds = rng.lognormal(math.log(median), sigma, size)
    places = np.ceil(np.log(seconds / LATENCY_LEAST_SECONDS) / math.log(LATENCY_EDGE_RATIO)).astype(int)
    return np.bincount(np.clip(places, 0, LATENCY_BUCKETS - 1), minlength=LATENCY_BUCKETS)


def play(effect: Effect, rng: np.random.Generator) -> Played:
    """One canary, step by step."""
    total = of_canary = failed = 0
    for weight, least in STEPS:
        finding, canary, requests = _step(effect, weight, least, rng)
        total, of_canary, failed = total + requests, of_canary + canary.requests, failed + canary.errors
        if finding is not Finding.PASS:
            break
    is_slower = effect.first_token > 1 or effect.inter_token > 1
    harmed = of_canary if is_slower else max(0, round(failed - effect.base * of_canary))
    return Played(finding, total, of_canary, harmed)


def _step(effect: Effect, weight: float, least: int, rng: np.random.Generator) -> tuple[Finding, Arm, int]:
    canary, stable = Arm(rng, effect, is_canary=True), Arm(rng, effect, is_canary=False)
    while canary.requests < MAX_CANARY_REQUESTS:
        portion = max(5, canary.requests // 25 // 5 * 5)
        canary.add(portion)
        stable.add(int(rng.binomial(round(portion / weight), 1 - weight)) // 5 * 5)
        finding = analyse(canary.outcomes(), stable.outcomes(), LIMITS, least).finding
        if finding is not Finding.INCONCLUSIVE:
            return finding, canary, canary.requests + stable.requests
    return Finding.INCONCLUSIVE, canary, canary.requests + stable.requests


def _median(values: list[int]) -> int | None:
    return round(statistics.median(values)) if values else None


def _share_upper(hits: int, runs: int) -> float:
    """95 % upper bound by Wilson's score."""
    return float(binomtest(hits, runs, alternative="less").proportion_ci(0.95, method="wilson").high)


def measure(effect: Effect, runs: int, seed: int) -> dict[str, object]:
    played = [play(effect, np.random.default_rng((seed, run))) for run in range(runs)]
    stopped = [each for each in played if each.finding is Finding.FAIL]
    promoted = [each for each in played if each.finding is Finding.PASS]
    return {
        "effect": effect.name,
        "rolled_back": len(stopped) / runs,
        "rolled_back_upper": round(_share_upper(len(stopped), runs), 4),
        "promoted": len(promoted) / runs,
        "requests_to_rollback": _median([each.requests for each in stopped]),
        "canary_requests_to_rollback": _median([each.canary_requests for each in stopped]),
        "harmed_requests": _median([each.harmed for each in stopped]),
        "canary_requests_to_promotion": _median([each.canary_requests for each in promoted]),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=200, help="canaries for each effect")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    print(f"{options.runs} canaries for each effect; level {LIMITS.false_rollback_probability}, steps {STEPS}.")
    print(f"{'effect':34} {'rolled back':>18} {'promoted':>9} {'requests':>9} {'of canary':>9} {'harmed':>7} {'to promotion':>12}")
    rows = []
    for effect in EFFECTS:
        row = measure(effect, options.runs, options.seed)
        rows.append((effect, row))
        stopped = f"{row['rolled_back']:.3f} (<= {row['rolled_back_upper']:.3f})"
        figures = [row[name] if row[name] is not None else "-" for name in list(row)[4:]]
        print(f"{effect.name:34} {stopped:>18} {row['promoted']:>9.3f} {figures[0]:>9} {figures[1]:>9} {figures[2]:>7} {figures[3]:>12}")
    worse = [row for effect, row in rows if not effect.is_within_limits]
    result = {
        "false_rollback_rate": max(float(str(row["rolled_back"])) for effect, row in rows if effect.is_within_limits),
        "false_promotion_rate": max(float(str(row["promoted"])) for row in worse),
        "median_requests_to_rollback": {str(row["effect"]): row["requests_to_rollback"] for row in worse},
        "median_canary_requests_to_rollback": {str(row["effect"]): row["canary_requests_to_rollback"] for row in worse},
        "harmed_requests": {str(row["effect"]): row["harmed_requests"] for row in worse},
        "runs": options.runs,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
