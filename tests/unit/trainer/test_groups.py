"""Groups of a suite's items: what a mean hides is told, and what is too small to say is told as one."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from tuneloop_trainer.contract import Metric, Suite
from tuneloop_trainer.data.suites import Item
from tuneloop_trainer.evaluation.baselines import SuiteScores
from tuneloop_trainer.evaluation.groups import LEAST, MOST, OTHERS, Group, groupings
from tuneloop_trainer.evaluation.suites import PreparedSuite

GERMAN = "Der Hund lief nach Hause, weil es den ganzen Tag regnete und er nass war."
ENGLISH = "The dog went home because it had been raining all day and it was wet."


def prepared(items: list[tuple[str, str]], metrics: tuple[Metric, ...], labels: tuple[str, ...] = ()) -> PreparedSuite:
    """Of prompts and completions, each a document of its own."""
    suite = Suite(name="s", type="Dataset", metrics=metrics)
    made = [Item(number, str(number), prompt, completion) for number, (prompt, completion) in enumerate(items)]
    return PreparedSuite(suite, "", made, [], labels, [], "", 0, cast(Any, None), cast(Any, None))


def chose(labels: tuple[str, ...], chosen: list[str]) -> SuiteScores:
    scores = tuple(tuple(float(label == choice) for label in labels) for choice in chosen)
    return SuiteScores(labels=labels, label_scores=scores, losses=())


def named(groups: tuple[Group, ...]) -> dict[str, Group]:
    return {group.name: group for group in groups}


def test_mean_that_stays_hides_no_label_that_loses() -> None:
    labels = ("no", "yes")
    right = ["yes"] * 50 + ["no"] * 50
    suite = prepared([("?", label) for label in right], ("MacroF1",), labels)
    before = ["yes"] * 40 + ["no"] * 10 + ["no"] * 20 + ["yes"] * 30
    after = ["yes"] * 20 + ["no"] * 30 + ["no"] * 40 + ["yes"] * 10

    (by_label,) = groupings(suite, chose(labels, after), chose(labels, before))

    assert (by_label.kind, by_label.metric) == ("label", "Accuracy")
    groups = named(by_label.groups)
    assert (groups["yes"].n, groups["yes"].baseline, groups["yes"].candidate) == (50, 0.8, 0.4)
    assert groups["yes"].lower < -0.4 < groups["yes"].upper < 0
    assert 0 < groups["no"].lower < 0.4 < groups["no"].upper


def test_languages_are_compared_by_the_loss_of_their_tokens() -> None:
    suite = prepared([(GERMAN, "ja")] * LEAST + [("", "x")] * 3 + [(ENGLISH, "yes")] * 30, ("Loss",))
    counts = [2] * LEAST + [0] * 3 + [4] * 30  # what predicts nothing is of no group
    candidate = [3.0 * count for count in counts[:LEAST]] + [0.0] * 3 + [1.0 * count for count in counts[-30:]]
    baseline = [1.0 * count for count in counts[:LEAST]] + [0.0] * 3 + [2.0 * count for count in counts[-30:]]
    told = [SuiteScores(labels=(), label_scores=(), losses=tuple(zip(losses, counts, strict=True))) for losses in (candidate, baseline)]

    (by_language,) = groupings(suite, *told)

    assert by_language.kind == "language"
    assert by_language.groups == (Group("en", 30, 1.0, 2.0, -1.0, -1.0), Group("de", LEAST, 3.0, 1.0, 2.0, 2.0))


@pytest.mark.parametrize(("kinds", "each"), [(MOST + 3, LEAST), (3, LEAST - 1)])
def test_small_groups_and_those_beyond_the_most_are_told_as_one(kinds: int, each: int) -> None:
    labels = tuple(f"l{number:02}" for number in range(kinds))
    right = ["big"] * 100 + [label for label in labels for _ in range(each)]
    suite = prepared([("?", label) for label in right], ("Accuracy",), ("big", *labels))
    scores = chose(suite.labels, right)

    (by_label,) = groupings(suite, scores, scores)

    assert by_label.groups[0].name == "big"
    assert by_label.groups[-1].name == OTHERS
    assert len(by_label.groups) <= MOST + 1
    assert sum(group.n for group in by_label.groups) == len(right), "every item once"
    assert by_label.groups[0].lower < 0 < by_label.groups[0].upper, "no difference among few items says little"


def test_suite_of_one_group_is_not_divided() -> None:
    rewards = tuple(np.linspace(0, 1, 60).tolist())
    suite = prepared([("?", "")] * 60, ("Reward",))
    scores = SuiteScores(labels=(), label_scores=(), losses=(), rewards=rewards)
    assert groupings(suite, scores, scores) == ()
