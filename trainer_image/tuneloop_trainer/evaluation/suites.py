"""One suite, ready to be scored: its items as tokens, and how a model is scored on them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from tuneloop_trainer.chat import Encoded, Formatter
from tuneloop_trainer.contract import RunConfig, Suite, SuiteScore
from tuneloop_trainer.data.suites import Item, labels_of, needs_labels, read_items
from tuneloop_trainer.evaluation.baselines import SuiteScores, cache_key
from tuneloop_trainer.evaluation.gates import Paired
from tuneloop_trainer.evaluation.statistics import macro_f1
from tuneloop_trainer.models import Model
from tuneloop_trainer.objectives import Objective
from tuneloop_trainer.progress import ProgressWriter

WHOLE = 1 << 20
"""Tokens that no item has."""
ANSWERS = ("chosen", "rejected")
"""The labels of a suite of preferences."""


@dataclass(frozen=True)
class PreparedSuite:
    suite: Suite
    digest: str
    items: list[Item]
    encoded: list[Encoded]
    labels: tuple[str, ...]
    label_tokens: list[list[list[int]]]
    prompt_hash: str
    """Over every rendered prompt and label: two tokenizers or templates that differ never share scores."""
    limit: int
    objective: Objective
    formatter: Formatter
    by_bytes: bool = False
    """Whether a loss counts for each byte of the text and not for each token: the models that are compared cut it differently."""

    @property
    def prefers(self) -> bool:
        """Whether an item's labels are its own two answers, the chosen one first."""
        return "Preference" in self.suite.metrics

    @property
    def expected(self) -> list[int]:
        if self.prefers:
            return [0] * len(self.items)
        return [self.labels.index(item.completion) for item in self.items]

    @property
    def longest_label(self) -> int:
        return max((len(tokens) for choices in self.label_tokens for tokens in choices), default=0)

    def key(self, model_digest: str, dtype: str) -> str:
        from tuneloop_trainer.evaluation import scoring

        return cache_key(
            model=model_digest, suite=self.digest, prompt=self.prompt_hash, dtype=dtype, rule=scoring.LABEL_SCORING,
            metrics=",".join(sorted(self.suite.metrics)), limit=self.limit,
            **self.objective.scoring, **({"unit": "byte"} if self.by_bytes else {}),
            **({"rewards": self.objective.reward_key()} if "Reward" in self.suite.metrics else {}),
        )  # fmt: skip

    def score(self, model: Model, progress: ProgressWriter, who: str) -> SuiteScores:
        """The model's scores on every item."""
        label_scores: list[list[float]] = []
        losses: list[tuple[float, int]] = []
        rewards: list[float] = []
        if self.labels:
            done = progress.counter(f"Scoring {who}", len(self.items))
            label_scores = self.objective.label_scores(model, self, done)
        if "Loss" in self.suite.metrics:
            done = progress.counter(f"Loss {who}", len(self.items))
            losses = self.objective.losses(model, self, done)
            if self.by_bytes and self.objective.answers:
                losses = [(loss, len(item.completion.encode())) for (loss, _), item in zip(losses, self.items, strict=True)]
        if "Reward" in self.suite.metrics:
            done = progress.counter(f"Rewarding {who}", len(self.items))
            rewards = self.objective.rewards(model, self, done)
        texts: list[str] = []
        if "ChrF" in self.suite.metrics:
            texts = self.objective.texts(model, self, self.formatter, progress.counter(f"Answering {who}", len(self.items)))
        scores = tuple(map(tuple, label_scores))
        return SuiteScores(labels=self.labels, label_scores=scores, losses=tuple(losses), rewards=tuple(rewards), texts=tuple(texts))

    def paired(self, metric: str, candidate: SuiteScores, baseline: SuiteScores) -> Paired:
        """Both models' values for a gate, item by item. Items without a token to predict are left out of Loss."""
        documents = [item.document for item in self.items]
        if metric == "Reward":
            return Paired(np.array(candidate.rewards), np.array(baseline.rewards), np.ones(len(documents)), documents)
        if metric == "ChrF":
            likeness = [np.array(self.chrf(scores)) for scores in (candidate, baseline)]
            return Paired(likeness[0], likeness[1], np.ones(len(likeness[0])), documents[: len(likeness[0])])
        if metric != "Loss":
            hits = [np.equal(scores.chosen(), self.expected).astype(float) for scores in (candidate, baseline)]
            return Paired(hits[0], hits[1], np.ones(len(documents)), documents)
        tokens = np.array([count for _, count in baseline.losses])
        kept = np.nonzero(tokens)[0]
        values = [np.array([loss for loss, _ in scores.losses])[kept] / tokens[kept] for scores in (candidate, baseline)]
        return Paired(values[0], values[1], tokens[kept].astype(float), [documents[place] for place in kept], kept.tolist())

    def chrf(self, scores: SuiteScores) -> list[float]:
        from tuneloop_trainer.evaluation import written

        return written.chrf(scores.texts, self.written[: len(scores.texts)])

    @property
    def written(self) -> list[str]:
        """What the items' answers should be."""
        return [item.completion for item in self.items]

    def summary(self, candidate: SuiteScores, baseline: SuiteScores, parse_rate: float | None) -> SuiteScore:
        """The point estimates that stand beside the gates."""
        score = SuiteScore(n=len(self.items), parse_rate=parse_rate)
        if self.labels:
            expected, chosen = self.expected, candidate.chosen()
            score = score.model_copy(
                update={
                    "accuracy": _rounded(np.mean(np.equal(chosen, expected))),
                    "baseline_accuracy": _rounded(np.mean(np.equal(baseline.chosen(), expected))),
                    "macro_f1": None if self.prefers else _rounded(macro_f1(expected, chosen, len(self.labels))),
                    "majority_rate": None if self.prefers else _rounded(Counter(expected).most_common(1)[0][1] / len(expected)),
                }
            )
        if candidate.losses:
            total = sum(count for _, count in candidate.losses)
            score = score.model_copy(update={"loss": _rounded(sum(loss for loss, _ in candidate.losses) / max(total, 1))})
        if candidate.rewards:
            means = {"reward": _rounded(fmean(candidate.rewards)), "baseline_reward": _rounded(fmean(baseline.rewards))}
            score = score.model_copy(update=means)
        if candidate.texts:
            chrf = {
                name: _rounded(float(np.mean(self.chrf(scores)))) for name, scores in (("chrf", candidate), ("baseline_chrf", baseline))
            }
            from tuneloop_trainer.evaluation import written

            bleu = _rounded(written.bleu(candidate.texts, self.written[: len(candidate.texts)]))
            score = score.model_copy(update={**chrf, "bleu": bleu})
        return score


def prepare_suite(
    config: RunConfig, objective: Objective, suite: Suite, digest: str, folder: Path, formatter: Formatter, by_bytes: bool = False
) -> PreparedSuite:
    """Read the snapshot and turn it into tokens. By bytes, every token of a text without a prompt is predicted, the first one too."""
    items = read_items(folder, suite)
    if set(suite.metrics) == {"Reward"}:  # an item may have no completion
        encoded = [Encoded(formatter.prompt_ids(item.prompt, item.system, item.history), []) for item in items]
    else:
        encoded = [formatter.encode(item.prompt, item.completion, item.system, item.history) for item in items]
    if by_bytes:
        encoded = [Encoded(item.prompt or item.completion[-1:], item.completion) for item in encoded]
    if "Preference" in suite.metrics:
        labels: tuple[str, ...] = ANSWERS
        choices: list[tuple[str, ...]] = [(item.completion, item.rejected or "") for item in items]
    else:
        labels = labels_of(suite, items) if needs_labels(suite) else ()
        choices = [labels for _ in items] if labels else []
    tokens = [
        [formatter.encode(item.prompt, choice, item.system, item.history).completion for choice in options]
        for item, options in zip(items, choices, strict=bool(choices))
    ]
    content = repr([(item.prompt, item.completion) for item in encoded]) + repr(tokens)
    limit = WHOLE if by_bytes else _limit(config, suite) + len(formatter.before)
    prompt_hash = hashlib.sha256(content.encode()).hexdigest()
    return PreparedSuite(suite, digest, items, encoded, labels, tokens, prompt_hash, limit, objective, formatter, by_bytes)


def _limit(config: RunConfig, suite: Suite) -> int:
    """The validation split is cut as the training rows are; other suites are read whole."""
    return config.training.max_sequence_length if suite.type == "Validation" else WHOLE


def _rounded(value: float) -> float:
    return round(float(value), 5)
