"""Groups of a suite's items: what a mean hides is told, and what is too small to say is told as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tests.unit.trainer.builders import make_rows, make_source, write_jsonl

from tuneloop_trainer.contract import Metric, Suite
from tuneloop_trainer.data.records import CONVERSED, MAX_GROUP, Record, RowReader
from tuneloop_trainer.data.spool import Spool
from tuneloop_trainer.data.suites import Item, items_of, read_items, write_items
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.evaluation.baselines import SuiteScores
from tuneloop_trainer.evaluation.gates import Paired
from tuneloop_trainer.evaluation.groups import LEAST, MOST, OTHERS, UNSAID, Group, gap_of, groupings, grown
from tuneloop_trainer.evaluation.suites import PreparedSuite

GERMAN = "Der Hund lief nach Hause, weil es den ganzen Tag regnete und er nass war."
ENGLISH = "The dog went home because it had been raining all day and it was wet."


def prepared(
    items: list[tuple[str, str]], metrics: tuple[Metric, ...], labels: tuple[str, ...] = (), by: Sequence[str | None] = ()
) -> PreparedSuite:
    """Of prompts and completions, each a document of its own, and where they are said, the groups of the column `dialect`."""
    source = make_source(Path("rows.jsonl"), columns={"group": "dialect"})
    suite = Suite(name="s", type="Dataset", source=source, metrics=metrics)
    who = by or [None] * len(items)
    made = [Item(number, str(number), *texts, group=group) for number, (texts, group) in enumerate(zip(items, who, strict=True))]
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


def hits(*shares: tuple[int, float]) -> SuiteScores:
    """Right and wrong choices of `prepared` items whose label is "yes": of each (items, share) that share is right."""
    right = [place < share * n for n, share in shares for place in range(n)]
    return chose(("no", "yes"), ["yes" if is_right else "no" for is_right in right])


def test_column_divides_a_suite_and_its_gap_is_told() -> None:
    by = ["north"] * 100 + ["south"] * 100 + [None] * 30 + ["isle"] * 5
    suite = prepared([("?", "yes")] * 235, ("Accuracy",), ("no", "yes"), by)

    (by_dialect,) = groupings(suite, hits((100, 0.9), (100, 0.5), (30, 0), (5, 0)), hits((100, 0.9), (100, 0.9), (30, 1), (5, 1)))

    groups = named(by_dialect.groups)
    assert by_dialect.kind == "dialect"
    assert {name: group.n for name, group in groups.items()} == {"north": 100, "south": 100, UNSAID: 30, OTHERS: 5}
    assert (groups["south"].baseline, groups["south"].candidate) == (0.9, 0.5)
    gap = by_dialect.gap
    assert gap is not None
    assert (gap.baseline, gap.candidate) == (0, 0.4), "of rows that say nothing, and of few, there is no gap"
    assert 0.2 < gap.lower < 0.4 < gap.upper < 0.6
    assert 0 < gap.growth_lower < 0.4 < gap.growth_upper
    assert grown("s", [by_dialect]) == ["s: Accuracy of the best and the worst dialect differ by 0.4, the baseline's by 0."]


def test_group_that_bears_the_name_of_the_rest_is_counted_with_it() -> None:
    suite = prepared([("?", "yes")] * 75, ("Accuracy",), ("no", "yes"), ["a"] * 30 + [OTHERS] * 40 + ["b"] * 5)
    (told,) = groupings(suite, hits((75, 1)), hits((75, 1)))
    assert {group.name: group.n for group in told.groups} == {"a": 30, OTHERS: 45}


def test_gap_of_groups_of_few_documents_is_not_told() -> None:
    values = np.linspace(0, 1, 80)
    places = np.arange(80)
    parts = [places < 40, places >= 40]
    one_each, few = [str(place) for place in places], [str(place // 20) for place in places]
    assert gap_of(Paired(values, values, np.ones(80), one_each), parts) is not None
    assert gap_of(Paired(values, values, np.ones(80), few), parts) is None


@pytest.mark.parametrize("accuracy", [0.95, 0.7], ids=["as before", "worse, and so noisier, in all alike"])
def test_groups_that_do_not_differ_are_seldom_said_to(accuracy: float) -> None:
    random = np.random.default_rng(0)
    of = np.arange(240) % 6
    parts = [of == group for group in range(6)]
    documents = [str(place) for place in range(240)]
    drawn = [[(random.random(240) < share).astype(float) for share in (accuracy, 0.95)] for _ in range(60)]
    gaps = [gap_of(Paired(candidate, baseline, np.ones(240), documents), parts, 200) for candidate, baseline in drawn]
    assert sum(gap is not None and gap.growth_lower > 0 for gap in gaps) <= 3
    assert sum(gap is not None and gap.lower > 0 for gap in gaps) <= 6


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


TALK = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize(
    ("row", "columns", "group"),
    [
        ({"site": " Ward  7 "}, {"group": "site"}, "Ward 7"),
        ({"site": 7}, {"group": "site"}, "7"),
        ({"site": "x" * 1000}, {"group": "site"}, "x" * MAX_GROUP),
        ({"site": " "}, {"group": "site"}, None),
        ({"site": ["a"]}, {"group": "site"}, None),
        ({"group": "north"}, {"group": "group"}, "north"),
        ({"group": "north"}, {}, None),
    ],
    ids=["a text", "a number", "a long text", "nothing", "a list", "of the same name", "of the same name, not named"],
)
@pytest.mark.parametrize("kind", ["conversation", "prompt"])
def test_rows_say_who_wrote_them_where_their_column_is_named(
    kind: str, row: dict[str, object], columns: dict[str, str], group: str | None, tmp_path: Path
) -> None:
    said = TALK if kind == "conversation" else {"prompt": "Hi?", "completion": "Yes."}
    source = make_source(write_jsonl(tmp_path / "rows.jsonl", [row | said]), template=None, columns=columns)

    (record,) = RowReader(source, "data.train[0]", CONVERSED).records()

    assert record.group == group


def test_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    source = make_source(write_jsonl(tmp_path / "rows.jsonl", make_rows(5)), columns={"group": "site"})
    with pytest.raises(Invalid, match="has no column 'site'; it has id, text, label"):
        list(RowReader(source, "data.train[0]").records())


def test_naming_a_column_of_groups_makes_no_other_suite(tmp_path: Path) -> None:
    suite = Suite(name="s", type="Validation", metrics=("Loss",))
    records = [Record("q", str(place), str(place), "q", place) for place in range(3)]
    without = write_items(tmp_path, suite, items_of(records))
    told = items_of([replace(record, group="north") for record in records])

    assert write_items(tmp_path, suite, told) == without, "promotions are counted, and scores kept, by this digest"
    assert read_items(tmp_path, suite) == told


def test_held_out_rows_keep_their_group(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 0)
    spool.add(0, Record("q", "a", "d", "q", 1, group="north"))
    assert [record.group for record in spool.train(0)] == ["north"]
    spool.close()
