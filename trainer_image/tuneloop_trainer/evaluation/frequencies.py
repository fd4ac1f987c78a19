"""What can be known of a text without reading it: how often each token occurs in the training rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tuneloop_trainer.data.shards import read_table
from tuneloop_trainer.evaluation.baselines import SuiteScores
from tuneloop_trainer.evaluation.statistics import Floats
from tuneloop_trainer.evaluation.suites import PreparedSuite


def by_frequencies(suite: PreparedSuite, prepared: Path) -> SuiteScores:
    """The scores of a model that gives each token its share of the training rows, whatever stands before it."""
    highest = max((token for item in suite.encoded for token in item.prompt + item.completion), default=0)
    chances = log_shares(prepared, highest + 1)
    losses = []
    for item in suite.encoded:
        row = (item.prompt + item.completion)[: suite.limit]
        count = max(0, min(len(row) - len(item.prompt), len(row) - 1))  # as many as a model predicts of it
        losses.append((float(-chances[row[len(row) - count :]].sum()), count))
    labels = tuple(tuple(float(chances[tokens].sum()) for tokens in choices) for choices in suite.label_tokens)
    return SuiteScores(labels=suite.labels, label_scores=labels, losses=tuple(losses) if "Loss" in suite.suite.metrics else ())


def log_shares(prepared: Path, least: int) -> Floats:
    """Per token the logarithm of its share, each counted once more than it occurs: none is impossible."""
    counts = np.ones(least)
    for chunk in read_table(prepared, "train")["input_ids"].chunks:
        found = np.bincount(chunk.flatten().to_numpy(zero_copy_only=False), minlength=least)
        counts = np.pad(counts, (0, len(found) - len(counts)), constant_values=1) + found
    return np.asarray(np.log(counts / counts.sum()))
