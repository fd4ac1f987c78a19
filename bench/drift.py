"""Shows that the drift detector keeps its promise: on average at least c sampled requests between false alarms.

`python -m bench.drift` runs the detector of the gateway, unchanged, on independent random orders of texts of one domain (the demo's tweets
where their package is at hand, else synthetic token streams), each text used once in a run, one half live and one half reference. Runs
that need more texts than there are (`--pairs 11000`) draw each request, live or reference, from all of them, independently. It prints
for each c the mean run length, cut at the run's end (so it can only be too small), with its 95 % lower bound, and the share of runs with an
alarm, with its 95 % upper bound. Then it lets another domain in and prints how soon that is noticed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tuneloop_gateway.drift.detector import BURN_IN, Detector
from tuneloop_gateway.drift.features import Features, features

THRESHOLDS = (100.0, 1000.0, 10_000.0)
CONFIDENCE = 0.95
MAX_DETECTION_PAIRS = 1000


@dataclass(frozen=True)
class Domains:
    """Hashed texts of two domains."""

    name: str
    home: Sequence[Features]
    other: Sequence[Features]


@dataclass(frozen=True)
class RunLength:
    """Run lengths at one c, counted from the first bet on."""

    c: float
    mean: float
    lower: float
    """95 % lower bound of the mean."""
    alarms: int
    alarm_share_upper: float
    """95 % upper bound of the share of runs with an alarm (Clopper-Pearson)."""


def read_domains(rng: random.Random) -> Domains:
    """Tweets and Amazon reviews, or made-up ones."""
    try:
        from dev.demo.data import read_corpus
        from dev.demo.packages import TEXTS, packages_folder

        corpus = read_corpus(packages_folder() / TEXTS.file)
    except (ImportError, OSError):
        return Domains("synthetic", _synthetic(rng, 4200, "bcdfg"), _synthetic(rng, 1500, "klmnp"))
    return Domains("tweets", [features(r.text) for r in corpus.tweets], [features(r.text) for r in corpus.reviews])


def _synthetic(rng: random.Random, rows: int, letters: str) -> list[Features]:
    words = ["".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(2000)]
    weights = [1 / (i + 3) for i in range(len(words))]
    return [features(" ".join(rng.choices(words, weights, k=rng.randint(5, 25)))) for _ in range(rows)]


def run_once(rows: Sequence[Features], pairs: int, rng: random.Random) -> list[int | None]:
    """Bets until the first alarm, for each threshold; None where there was none. Every row is used at most once while they suffice; else
    each request is an independent draw, so that live and reference are of one distribution all the same."""
    needed = 2 * (pairs + BURN_IN)
    order = rng.sample(rows, needed) if needed <= len(rows) else rng.choices(rows, k=needed)
    detector = Detector()
    result: list[int | None] = [None] * len(THRESHOLDS)
    limits = [math.log(c) for c in THRESHOLDS]
    for number in range(pairs + BURN_IN):
        detector.pair(order[2 * number], order[2 * number + 1])
        evidence = detector.log_evidence
        for at, limit in enumerate(limits):
            if result[at] is None and evidence >= limit:
                result[at] = number + 1 - BURN_IN
        if result[-1] is not None:
            break
    return result


def summarise(c: float, lengths: Sequence[int | None], pairs: int) -> RunLength:
    """Mean of min(run length, pairs) with an empirical Bernstein bound (Maurer and Pontil 2009), which needs no normality."""
    cut = [pairs if length is None else length for length in lengths]
    n, delta = len(cut), 1 - CONFIDENCE
    spread = statistics.variance(cut)
    slack = math.sqrt(2 * spread * math.log(2 / delta) / n) + 7 * pairs * math.log(2 / delta) / (3 * (n - 1))
    alarms = sum(length is not None for length in lengths)
    return RunLength(c, statistics.fmean(cut), statistics.fmean(cut) - slack, alarms, clopper_pearson_upper(alarms, n))


def clopper_pearson_upper(successes: int, n: int) -> float:
    """The largest share that would give so few successes with 5 % probability, by bisection over the binomial distribution."""
    low, high = successes / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        logs = [_log_binomial(k, n, middle) for k in range(successes + 1)]
        low, high = (middle, high) if sum(map(math.exp, logs)) > 1 - CONFIDENCE else (low, middle)
    return high


def _log_binomial(k: int, n: int, p: float) -> float:
    if p in (0.0, 1.0):
        return 0.0 if k == p * n else -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)


def delay(domains: Domains, share: float, c: float, rng: random.Random) -> int | None:
    """Requests from a sharp change, of which `share` are of the other domain, to the alarm (burn-in included)."""
    home = rng.sample(domains.home, min(len(domains.home), 2 * MAX_DETECTION_PAIRS))
    other = rng.sample(domains.other, min(len(domains.other), MAX_DETECTION_PAIRS))
    detector = Detector()
    for number in range(min(MAX_DETECTION_PAIRS, len(home) // 2, len(other))):
        live = other[number] if rng.random() < share else home[2 * number]
        detector.pair(live, home[2 * number + 1])
        if detector.log_evidence >= math.log(c):
            return number + 1
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=1500, help="pairs with a bet in each run")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    domains = read_domains(rng)
    pairs = options.pairs
    started = time.monotonic()
    lengths = []
    for number in range(1, options.runs + 1):
        lengths.append(run_once(domains.home, pairs, rng))
        if number % 100 == 0:
            print(f"{time.monotonic() - started:6.0f} s  {number} runs of {pairs} pairs of {domains.name}", file=sys.stderr, flush=True)
    summaries = [summarise(c, [row[at] for row in lengths], pairs) for at, c in enumerate(THRESHOLDS)]
    for s in summaries:
        held = "holds" if s.lower >= s.c else f"cannot show more with runs of {pairs}" if s.c > pairs else "DOES NOT HOLD"
        print(f"c = {s.c:>6.0f}: mean run length {s.mean:.0f} (95 % lower bound {s.lower:.0f}): {held};"
              f" {s.alarms} of {options.runs} runs alarmed (95 % upper bound {s.alarm_share_upper:.2%})")  # fmt: skip
    delays = {share: [delay(domains, share, 10_000.0, rng) for _ in range(20)] for share in (1.0, 0.5)}
    medians = {share: statistics.median(d if d is not None else math.inf for d in found) for share, found in delays.items()}
    print(f"Another domain, c = 10000: requests to the alarm (median) {medians[1.0]:.0f} where all change, {medians[0.5]:.0f} at half.")
    result = {"source": domains.name, "runs": options.runs, "pairs": pairs, "seconds": round(time.monotonic() - started, 1)}
    for s in summaries:
        name = f"c{s.c:.0f}"
        result |= {f"{name}_run_length_lower": round(s.lower, 1), f"{name}_alarm_share_upper": round(s.alarm_share_upper, 5)}
    print(json.dumps(result | {"delay_median_all": medians[1.0], "delay_median_half": medians[0.5]}))
    return 0 if all(s.lower >= s.c for s in summaries if s.c < pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
