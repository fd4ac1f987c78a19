"""Votes on answers become rows of KTO and DPO, with safeguards."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from tests.unit.gateway.conftest import INTERNAL, Running, Start, make_config
from tests.unit.gateway.engines import FakeEngine, Reply, chat_answer
from tests.unit.gateway.test_feedback import KEYS, export, say, token_of, train_text

from tuneloop_gateway.contract import FEEDBACK_HEADER
from tuneloop_gateway.curation import document_of, split_of

ON_BOTH_STORES = True


@pytest.fixture
async def keyed(start: Start, engine: FakeEngine) -> Running:
    return await start(make_config(maxShareOfOneSubject=1.0), {"svc": (engine.address,)}, KEYS)


def saying(text: str, finish_reason: str = "stop") -> Reply:
    async def reply(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(chat_answer(text, finish_reason))

    return reply


async def answers(gateway: Running, engine: FakeEngine, *texts: str, to: str | None = None) -> list[str]:
    """Feedback tokens of these answers to one text."""
    engine.replies.extend(map(saying, texts))
    return [await token_of(gateway, to or train_text()) for _ in texts]


async def test_an_answer_is_good_or_bad_by_the_majority_of_votes(keyed: Running, engine: FakeEngine) -> None:
    liked, disliked, disputed = await answers(keyed, engine, "one", "two", "three")
    await keyed.captured()
    for who, token, rating in (
        ("ann", liked, "up"), ("bob", liked, "up"), ("cem", liked, "down"), ("bob", disliked, "down"), ("ann", disputed, "up"),
        ("bob", disputed, "down"),
    ):  # fmt: skip
        assert (await say(keyed, who, token=token, rating=rating))[0] == 200
    rows = await export(keyed, rows="Ratings")
    assert sorted((row.completion, row.desirable) for row in rows) == [("one", True), ("two", False)]
    assert {(row.text, row.kind, row.document) for row in rows} == {(train_text(), "Rating", document_of(train_text()))}
    assert await export(keyed) == [], "a vote is no label"


async def test_where_reviewers_vote_they_alone_decide(keyed: Running, engine: FakeEngine) -> None:
    (token,) = await answers(keyed, engine, "one")
    await keyed.captured()
    for who, rating in (("ann", "up"), ("bob", "up"), ("rita", "down")):
        await say(keyed, who, token=token, rating=rating)
    assert [row.desirable for row in await export(keyed, rows="Ratings")] == [False]


async def test_the_preferred_of_two_answers_is_the_chosen_one(keyed: Running, engine: FakeEngine) -> None:
    first, second = await answers(keyed, engine, "worse", "better")
    await keyed.captured()
    assert (await say(keyed, "ann", token=second, preference={"over": first}))[0] == 200
    (row,) = await export(keyed, rows="Preferences")
    assert (row.text, row.chosen, row.rejected, row.kind) == (train_text(), "better", "worse", "Preference")
    await say(keyed, "bob", token=first, preference={"over": second})
    assert await export(keyed, rows="Preferences") == [], "one against one"
    await say(keyed, "cem", token=first, preference={"over": second})
    assert [(row.chosen, row.rejected) for row in await export(keyed, rows="Preferences")] == [("worse", "better")]


async def test_answers_to_different_texts_and_equal_answers_are_no_pair(keyed: Running, engine: FakeEngine) -> None:
    first, same = await answers(keyed, engine, "one", "one")
    (other,) = await answers(keyed, engine, "two", to=train_text(1))
    await keyed.captured()
    for token in (same, other):
        assert (await say(keyed, "ann", token=token, preference={"over": first}))[0] == 200
    assert await export(keyed, rows="Preferences") == []


async def test_an_answer_that_was_cut_off_teaches_nothing(keyed: Running, engine: FakeEngine) -> None:
    engine.replies.append(saying("a long st", "length"))
    token = await token_of(keyed, train_text())
    await keyed.captured()
    await say(keyed, "ann", token=token, rating="up")
    assert await export(keyed, rows="Ratings") == []


async def test_votes_without_a_key_are_counted_and_teach_nothing(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(), {"svc": (engine.address,)})
    _, _, headers = await gateway.ask(train_text())
    await gateway.captured()
    await say(gateway, None, token=headers[FEEDBACK_HEADER], rating="up")
    assert (await gateway.state()).feedback.up == 1
    assert await export(gateway, rows="Ratings") == []


async def test_no_subject_stands_behind_more_than_its_share(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(maxShareOfOneSubject=0.5), {"svc": (engine.address,)}, KEYS)
    for number in range(6):
        (token,) = await answers(gateway, engine, f"answer {number}", to=train_text(number))
        await gateway.captured()
        await say(gateway, "ann" if number else "bob", token=token, rating="up")
    assert len(await export(gateway, rows="Ratings")) == 4, "one of bob, three of ann's five"


async def test_texts_of_the_gates_half_never_train(keyed: Running, engine: FakeEngine) -> None:
    held_out = next(text for text in (f"text {number}" for number in range(100)) if split_of(document_of(text)) == "gate")
    (token,) = await answers(keyed, engine, "one", to=held_out)
    await keyed.captured()
    await say(keyed, "ann", token=token, rating="up")
    assert await export(keyed, rows="Ratings") == []
    assert len(await export(keyed, "gate", rows="Ratings")) == 1


async def test_an_unknown_kind_of_rows_is_refused(keyed: Running) -> None:
    async with keyed.session.get(f"{keyed.internal_url}/internal/export", params={"rows": "Thumbs"}, headers=INTERNAL) as response:
        assert response.status == 400
        assert "'rows' must be Labels, Ratings or Preferences." in await response.text()
