"""What a served model is asked is what the evaluated model was sure of."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tuneloop_trainer.chat import Encoded
from tuneloop_trainer.contract import DataSource, Gate, Suite, Template
from tuneloop_trainer.data.suites import Item
from tuneloop_trainer.evaluation import probes
from tuneloop_trainer.evaluation.baselines import SuiteScores
from tuneloop_trainer.evaluation.probes import Answer, answer_freely, parse_rate, probes_of
from tuneloop_trainer.evaluation.suites import PreparedSuite

SURE = Answer("good", True, "good", 2)
WORDS = ("zero", "one", "two", "three", "four")


class Words:
    """Decodes token n to the nth word."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[number] for number in ids)


def sources(*prompts: str | None) -> Any:
    """An objective whose training rows were made with these templates."""
    made = [
        DataSource(uri=f"pvc://d/{n}", path="/d", template=Template(prompt=prompt) if prompt else None) for n, prompt in enumerate(prompts)
    ]
    return SimpleNamespace(config=SimpleNamespace(train=made))


def suite(count: int, labels: tuple[str, ...] = (), limit: int = 100, **item: Any) -> PreparedSuite:
    items = [Item(number, "d", f"q {number}", "good", None, f"{number}") for number in range(count)]
    items = [replace(one, **item) for one in items]
    metrics: Any = ("Accuracy",) if labels else ("Loss",)
    tokens = [[[1, 2], [3, 2]] for _ in items] if labels else []
    kind = Suite(name="s", type="Validation", metrics=metrics)
    encoded = [Encoded([1, 2, 3], [4]) for _ in items]
    formatter: Any = Words()
    return PreparedSuite(kind, "digest", items, encoded, labels, tokens, "hash", limit, sources(None, "q {{ text }}", "other"), formatter)


def asked(one: PreparedSuite, answers: dict[int, Answer], scores: tuple[tuple[float, ...], ...] = ()) -> list[tuple[str, str, int]]:
    gate = Gate(suite="s", metric="Accuracy", rule="Superior")
    found = probes_of((gate,), {"s": one}, {"s": SuiteScores(label_scores=scores)}, {"s": answers})
    return [(probe.prompt, probe.answer, probe.max_tokens) for probe in found]


def test_labels_that_lie_close_are_left_out_and_later_items_take_their_place() -> None:
    scores = tuple((-1.0, -1.375) if number % 2 else (-1.0, -1.5) for number in range(100))

    found = asked(suite(100, ("good", "bad")), dict.fromkeys(range(100), SURE), scores)

    assert found == [(str(number), "good", 2) for number in range(0, 100, 2)], "in their order, up to fifty"


def test_answer_with_a_token_that_barely_won_is_left_out_where_labels_are_expected() -> None:
    unsure = Answer("good", False, "go", 1)

    assert asked(suite(2, ("good", "bad")), {0: unsure, 1: SURE}, ((0.0, -9.0),) * 2) == [("1", "good", 2)]


def test_free_answer_is_asked_up_to_the_first_token_that_barely_won() -> None:
    one = suite(3)
    answers = {0: Answer("a long answer", False, "a long", 2), 1: Answer("or", False, "", 0), 2: Answer("x\ufffd", True, "x\ufffd", 3)}

    assert asked(one, answers) == [("0", "a long", 2)], "nothing certain, and half a character, are no answers to compare"


@pytest.mark.parametrize("item", [{"system": "be brief"}, {"user": None}, {"user": ""}, {"user": "x" * 8001}, {"prompt": "Q: 1"}])
def test_item_that_no_user_could_send_is_no_probe(item: dict[str, Any]) -> None:
    assert asked(suite(2, **item), dict.fromkeys(range(2), SURE)) == []
    assert asked(suite(2, ("good", "bad"), **item), dict.fromkeys(range(2), SURE), ((0.0, -9.0),) * 2) == []


def test_text_without_a_template_is_asked_as_it_is() -> None:
    plain = replace(suite(1, prompt="0"), objective=sources(None))

    assert asked(plain, {0: SURE}) == [("0", "good", 2)]
    assert asked(replace(plain, objective=sources("{{ text }} {{ more }}")), {0: SURE}) == [], "the gateway has no more than the text"


def test_suite_without_a_sure_answer_leaves_the_probes_to_the_next() -> None:
    suites = {"first": suite(2), "second": suite(1)}
    answers = {"first": {0: Answer("", False, "", 0)}, "second": {0: SURE}}

    assert [probe.answer for probe in probes_of((), suites, dict.fromkeys(suites, SuiteScores()), answers)] == ["good"]


def answered(one: PreparedSuite, monkeypatch: pytest.MonkeyPatch, leads: list[float]) -> tuple[dict[int, Answer], list[int]]:
    from tuneloop_trainer.evaluation import scoring

    limits = []

    def greedy(model: Any, prompts: list[list[int]], tokens: int, *_: Any) -> list[Any]:
        limits.append(tokens)
        return [scoring.Greedy([1, 2], leads) for _ in prompts]

    monkeypatch.setattr(scoring, "greedy_answers", greedy)
    progress: Any = SimpleNamespace(counter=lambda *_: None)
    return answer_freely(None, {"s": one}, Words(), frozenset(), progress).get("s", {}), limits  # type: ignore[arg-type]


def test_items_without_labels_are_answered_with_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, limits = answered(suite(70), monkeypatch, [3.0, 0.4, 3.0])

    assert answers == dict.fromkeys(range(50), Answer("one two", False, "one", 1))
    assert limits == [16]


def test_end_that_barely_came_is_not_part_of_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered(suite(1), monkeypatch, [3.0, 3.0, 0.4])[0][0] == Answer("one two", False, "one two", 2)
    assert answered(suite(1), monkeypatch, [3.0, 3.0, 0.5])[0][0] == Answer("one two", True, "one two", 3)


def test_questions_that_are_longer_than_the_limit_are_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered(suite(1, limit=18), monkeypatch, [3.0])[0] == {}
    assert answered(suite(1, limit=19), monkeypatch, [3.0])[0].keys() == {0}


def test_share_of_answers_that_are_labels_is_over_the_first_fifty() -> None:
    labelled = suite(100, ("good", "bad"))
    answers = {place: SURE if place < 25 else Answer("hm", True, "hm", 1) for place in range(100)}

    assert parse_rate(labelled, answers) == 0.5
    assert parse_rate(suite(100), answers) is None
    assert probes.ASKED == 100
