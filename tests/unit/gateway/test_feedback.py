"""Feedback is proven by a token, counted once per subject, and curated before anything learns from it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import ANY

import pytest
from tests.unit.gateway.conftest import INTERNAL, Running, Start, make_config, on_sqlite_alone
from tests.unit.gateway.engines import FakeEngine

from tuneloop_gateway.contract import FEEDBACK_HEADER, ExportRow
from tuneloop_gateway.curation import Curated, document_of, limit_shares, split_of
from tuneloop_gateway.tokens import FeedbackToken, sign, verify

KEYS = {"ann": "key-ann", "bob": "key-bob", "cem": "key-cem", "reviewer.rita": "key-rita"}

ON_BOTH_STORES = True


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-{name}"}


async def token_of(gateway: Running, text: str = "hello", who: str = "ann") -> str:
    _, _, headers = await gateway.ask(text, headers=as_(who))
    return headers[FEEDBACK_HEADER]


async def say(gateway: Running, who: str | None = "ann", **body: Any) -> tuple[int, Any]:
    async with gateway.session.post(f"{gateway.url}/v1/feedback", json=body, headers=as_(who) if who else None) as response:
        return response.status, await response.json()


async def export(gateway: Running, split: str = "train", **query: str) -> list[ExportRow]:
    url = f"{gateway.internal_url}/internal/export"
    async with gateway.session.get(url, params={"split": split, **query}, headers=INTERNAL) as response:
        assert response.status == 200
        return [ExportRow.model_validate_json(line) for line in (await response.text()).splitlines()]


@pytest.fixture
async def keyed(start: Start, engine: FakeEngine) -> Running:
    return await start(make_config(maxShareOfOneSubject=1.0), {"svc": (engine.address,)}, KEYS)


def train_text(number: int = 0) -> str:
    """A text whose document goes to the training half."""
    return [t for t in (f"text {i}" for i in range(100)) if split_of(document_of(t)) == "train"][number]


# --- tokens ----------------------------------------------------------------------


@on_sqlite_alone
async def test_a_token_that_is_forged_changed_or_absent_is_refused(keyed: Running) -> None:
    token = await token_of(keyed)
    forged = sign(FeedbackToken("r1", "s", int(time.time())), b"another key")
    for bad, status in ((forged, 403), ("r" + token, 403), (token[:-1], 403), ("", 400), (7, 400), ("a.b.c.d", 403), ("é.b.c.d", 403)):
        assert (await say(keyed, token=bad, rating=5))[0] == status
    assert (await keyed.state()).feedback.up == 0


def test_a_token_expires() -> None:
    token = FeedbackToken("r1", "s1", 1000)
    text = sign(token, b"key")
    assert verify(text, b"key", now=1000 + 86400, max_age_seconds=86400) == token
    assert verify(text, b"key", now=1001 + 86400, max_age_seconds=86400) is None
    assert verify(text, b"key", now=900, max_age_seconds=86400) is None


# --- ratings ---------------------------------------------------------------------


@on_sqlite_alone
@pytest.mark.parametrize("rating", [0, 6, 2.5, True, "great", [5]])
async def test_a_rating_that_is_none_is_refused(keyed: Running, rating: Any) -> None:
    code, body = await say(keyed, token=await token_of(keyed), rating=rating)
    assert (code, "message" in body["error"]) == (400, True)


async def test_a_later_vote_of_the_same_subject_replaces_the_earlier(keyed: Running) -> None:
    token = await token_of(keyed)
    for rating in (5, 4, 1):
        assert (await say(keyed, token=token, rating=rating))[0] == 200
    assert (await say(keyed, "bob", token=token, thumbs="up"))[0] == 200
    feedback = (await keyed.state()).feedback
    assert (feedback.up, feedback.down) == (1, 1)
    assert 'tuneloop_feedback_total{deployment="tweets",kind="rating",namespace="team",value="up"} 2.0' in await keyed.metrics()


async def test_a_caller_without_a_key_speaks_as_the_one_who_got_the_answer(keyed: Running) -> None:
    token = await token_of(keyed)
    await say(keyed, "ann", token=token, rating=5)
    await say(keyed, None, token=token, rating=1)
    feedback = (await keyed.state()).feedback
    assert (feedback.up, feedback.down) == (0, 1)


@on_sqlite_alone
async def test_a_preference_names_two_answers_that_were_given(keyed: Running) -> None:
    better, worse = await token_of(keyed), await token_of(keyed)
    assert (await say(keyed, token=better, preference={"over": worse}))[0] == 200
    assert (await say(keyed, token=better, preference={"over": "made up"}))[0] == 400


@on_sqlite_alone
async def test_feedback_that_cannot_be_stored_is_not_lost_silently(keyed: Running) -> None:
    token = await token_of(keyed)
    keyed.gateway.database._seconds = 0.1
    async with keyed.gateway.database.quiet():
        code, body = await say(keyed, token=token, rating=5)
    assert (code, body["error"]["code"]) == (503, "store_unavailable")


# --- corrections -----------------------------------------------------------------


async def test_only_a_reviewers_correction_is_learnt_from_at_once(keyed: Running) -> None:
    token = await token_of(keyed, train_text())
    await keyed.captured()
    await say(keyed, "ann", token=token, correction="negative")
    assert await export(keyed) == []
    await say(keyed, "rita", token=token, correction="positive")
    rows = await export(keyed)
    assert [(r.text, r.label, r.kind) for r in rows] == [(train_text(), "positive", "Correction")]
    state = await keyed.state()
    assert (state.feedback.corrections, state.feedback.labelled_train, state.feedback.labelled_gate) == (2, 1, 0)


async def test_two_subjects_who_agree_count_and_one_who_repeats_himself_does_not(keyed: Running) -> None:
    first, second = await token_of(keyed, train_text(), "ann"), await token_of(keyed, train_text(), "bob")
    await keyed.captured()
    for token in (first, second):
        await say(keyed, "ann", token=token, correction="negative")
    assert await export(keyed) == []
    await say(keyed, "bob", token=second, correction=" negative")
    assert [r.label for r in await export(keyed)] == ["negative"]


async def test_a_correction_sent_right_after_the_answer_is_kept(keyed: Running) -> None:
    """The request is stored off the request path: the correction waits for it."""
    token = await token_of(keyed, train_text())
    assert await say(keyed, "rita", token=token, correction="positive") == (200, ANY)
    assert [(row.text, row.label) for row in await export(keyed)] == [(train_text(), "positive")]


async def test_a_correction_of_an_answer_that_is_not_captured_is_refused_whole(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloop_gateway.feedback.CAPTURE_SECONDS", 0.2)
    gateway = await start(make_config(capture={"sampleRate": 0.0}), {"svc": (engine.address,)}, KEYS)
    token = await token_of(gateway)
    status, body = await say(gateway, "rita", token=token, correction="positive", thumbs="down")
    assert (status, body["error"]["code"]) == (409, "not_captured")
    assert (await gateway.state()).feedback.down == 0
    assert (await say(gateway, "rita", token=token, thumbs="down"))[0] == 200


async def test_corrections_never_judge_a_model(keyed: Running) -> None:
    gate_text = next(t for t in (f"text {i}" for i in range(100)) if split_of(document_of(t)) == "gate")
    token = await token_of(keyed, gate_text)
    await keyed.captured()
    await say(keyed, "rita", token=token, correction="positive")
    assert await export(keyed, "gate") == await export(keyed, "train") == []


def make_curated(number: int, *subjects: str) -> Curated:
    row = ExportRow(id=f"r{number:03}", document=f"d{number}", text="t", label="l", kind="Correction")
    return Curated(row, frozenset(subjects))


def test_no_subject_stands_behind_more_than_its_share() -> None:
    flood = [make_curated(i, "mallory", f"friend{i}") for i in range(100)]
    assert len(limit_shares(flood, others=0, max_share=0.02)) == 2
    assert len(limit_shares(flood, others=900, max_share=0.02)) == 20
    reviewers = [make_curated(i) for i in range(100)]
    assert len(limit_shares(reviewers, others=0, max_share=0.02)) == 100


# --- labels ----------------------------------------------------------------------


async def sample(gateway: Running, **query: str) -> list[dict[str, Any]]:
    async with gateway.session.get(f"{gateway.internal_url}/internal/labels", params=query, headers=INTERNAL) as response:
        assert response.status == 200
        return [json.loads(line) for line in (await response.text()).splitlines()]


async def label(gateway: Running, rows: Sequence[dict[str, Any]]) -> tuple[int, Any]:
    data = "\n".join(json.dumps(row) for row in rows)
    async with gateway.session.post(f"{gateway.internal_url}/internal/labels", data=data, headers=INTERNAL) as response:
        return response.status, await response.json()


async def test_labels_go_round_from_captured_rows_to_both_splits(keyed: Running) -> None:
    for number in range(40):
        await keyed.ask(f"text {number}")
    await keyed.captured()
    rows = await sample(keyed, limit="30", uniform="1")
    assert len({row["id"] for row in rows}) == 30
    assert set(rows[0]) == {"id", "text", "answer", "capturedAt"}
    labels = [{"id": row["id"], "label": "positive", "document": f"doc{i // 2}"} for i, row in enumerate(rows)]
    code, receipt = await label(keyed, [*labels, {"id": "unknown", "label": "x"}])
    assert (code, receipt["accepted"], receipt["unknown"]) == (200, 30, 1)
    train, gate = await export(keyed, "train"), await export(keyed, "gate")
    assert (len(train), len(gate)) == (receipt["train"], receipt["gate"])
    assert not {r.document for r in train} & {r.document for r in gate}
    assert [r.id for r in train] == sorted(r.id for r in train)
    assert {row["id"] for row in await sample(keyed, limit="100")}.isdisjoint(row["id"] for row in rows)
    assert (await keyed.state()).feedback.labelled_train == len(train)


async def test_a_later_label_replaces_the_earlier_and_a_label_beats_a_correction(keyed: Running) -> None:
    token = await token_of(keyed, train_text())
    await keyed.captured()
    await say(keyed, "rita", token=token, correction="from a correction")
    (row,) = await sample(keyed)
    for word in ("first", "second"):
        await label(keyed, [{"id": row["id"], "label": word}])
    assert [(r.label, r.kind) for r in await export(keyed)] == [("second", "Label")]


async def test_rows_of_another_epoch_are_exported_only_when_asked_for(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(drift={"epoch": "1"}), {"svc": (engine.address,)})
    await gateway.ask(train_text())
    await gateway.captured()
    await label(gateway, [{"id": row["id"], "label": "x"} for row in await sample(gateway, since_alarm="0")])
    gateway.configure(make_config(drift={"epoch": "2"}, generation=2))
    assert await export(gateway) == []
    assert len(await export(gateway, epoch="1")) == len(await export(gateway, epoch="all")) == 1
    assert (await gateway.state()).feedback.labelled_train == 0


async def test_a_batch_with_a_bad_row_is_refused_whole_with_its_number(keyed: Running) -> None:
    await keyed.ask("a text")
    await keyed.captured()
    (row,) = await sample(keyed)
    good = {"id": row["id"], "label": "x"}
    for bad in ({"id": row["id"]}, {**good, "extra": 1}, {**good, "label": " "}, {**good, "label": "x" * 9000}):
        code, body = await label(keyed, [good, bad])
        assert (code, "Row 2" in body["error"]["message"]) == (400, True)
    assert await export(keyed) == await export(keyed, "gate") == []


@on_sqlite_alone
async def test_too_many_labels_at_once_are_refused(keyed: Running) -> None:
    assert (await label(keyed, [{"id": "a", "label": "b"}] * 10_001))[0] == 413


@on_sqlite_alone
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"x-tuneloop-token": "internal-secre"}])
async def test_rows_are_given_to_holders_of_the_token_alone(keyed: Running, headers: dict[str, str]) -> None:
    for method, path in (("GET", "export?split=train"), ("GET", "labels"), ("POST", "labels")):
        async with keyed.session.request(method, f"{keyed.internal_url}/internal/{path}", headers=headers) as response:
            assert response.status == 401


@on_sqlite_alone
async def test_the_token_may_come_in_its_own_header(keyed: Running) -> None:
    async with keyed.session.get(f"{keyed.internal_url}/internal/export", headers={"x-tuneloop-token": "internal-secret"}) as response:
        assert response.status == 200


def test_the_split_is_even_and_stable() -> None:
    splits = [split_of(f"document {i}") for i in range(2000)]
    assert 900 < splits.count("train") < 1100
    assert [split_of(document) for document in "abcdef"] == ["train", "train", "gate", "train", "train", "gate"]
