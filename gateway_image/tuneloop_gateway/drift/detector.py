"""Detector B: a sequential classifier two-sample test as an e-detector (CUSUM of e-values).

A logistic model learns online to tell live requests from reference requests. Before it sees a pair it bets on telling
them apart: where both come from one distribution the bet is fair, so the evidence reaches c at most once in c pairs on
average (average run length >= c; e-detectors: Shin, Ramdas and Rinaldo; classifier two-sample tests by betting: Podkopaev
and Ramdas, arXiv 2305.00143). No reference row is used twice.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from tuneloop_gateway.drift.features import BUCKETS, Features

LAMBDAS = (0.1, 0.3, 0.6, 0.9)
BURN_IN = 100
"""Pairs that are learnt from without betting."""
STEP = 0.3
FIRST_SQUARES = 0.01
EFFECT_PAIRS = 500
MIN_EFFECT_PAIRS = 20


class Detector:
    """State of one e-process: the classifier and ln M for each lambda."""

    def __init__(self) -> None:
        self.weights: NDArray[np.float64] = np.zeros(BUCKETS)
        self.squares: NDArray[np.float64] = np.full(BUCKETS, FIRST_SQUARES)
        self.log_m = [-math.inf] * len(LAMBDAS)
        self.pairs = 0
        self.scores: deque[tuple[float, float]] = deque(maxlen=EFFECT_PAIRS)

    def margin(self, x: Features) -> float:
        return float(self.weights[x].sum()) / math.sqrt(len(x))

    def pair(self, live: Features, reference: Features) -> None:
        """Bets on one pair, then learns from it."""
        g_live, g_reference = math.tanh(self.margin(live) / 2), math.tanh(self.margin(reference) / 2)
        self.scores.append((g_live, g_reference))
        if self.pairs >= BURN_IN:
            payoff = (g_live - g_reference) / 2
            self.log_m = [max(m, 0.0) + math.log1p(lam * payoff) for m, lam in zip(self.log_m, LAMBDAS, strict=True)]
        self.pairs += 1
        self._learn(reference, -1.0)
        self._learn(live, 1.0)

    def _learn(self, x: Features, y: float) -> None:
        """AdaGrad on the logistic loss; all features of a row weigh the same, so their gradients are one number."""
        scale = 1 / math.sqrt(len(x))
        gradient = -y * scale / (1 + math.exp(min(30.0, y * self.margin(x))))
        squares = self.squares[x] + gradient * gradient
        self.squares[x] = squares
        self.weights[x] -= STEP * gradient / np.sqrt(squares)

    @property
    def log_evidence(self) -> float:
        """ln of the mean over lambda; 0 before the first bet."""
        top = max(self.log_m)
        if top == -math.inf:
            return 0.0
        return top + math.log(sum(math.exp(m - top) for m in self.log_m) / len(self.log_m))

    def effect(self) -> float:
        """Area under the ROC curve of the last pairs' scores, each given before its pair was learnt, minus 0.5."""
        if len(self.scores) < MIN_EFFECT_PAIRS:
            return 0.0
        scores = np.array(self.scores)
        live, reference = scores[:, 0], np.sort(scores[:, 1])
        below = np.searchsorted(reference, live, "left").sum()
        equal = np.searchsorted(reference, live, "right").sum() - below
        return float((below + equal / 2) / len(live) ** 2) - 0.5
