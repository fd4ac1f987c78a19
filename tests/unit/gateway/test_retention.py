"""What is past its retention goes by itself; what one subject asked and said goes when somebody says so."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from sqlalchemy import select, text, update
from tests.unit.gateway.conftest import INTERNAL, Running, Start, make_config, on_sqlite_alone
from tests.unit.gateway.engines import FakeEngine
from tests.unit.gateway.test_feedback import KEYS, as_, label, sample, say, token_of

from tuneloop_gateway import retention
from tuneloop_gateway.contract import ForgetReceipt
from tuneloop_gateway.database import captured, corrections, feedback, labels
from tuneloop_gateway.inbound import CHAT_PATH, Inbound
from tuneloop_gateway.keys import subject_of
from tuneloop_gateway.proxy import Exchange

ON_BOTH_STORES = True


@pytest.fixture
async def keyed(start: Start, engine: FakeEngine) -> Running:
    return await start(make_config(maxShareOfOneSubject=1.0, capture={"retentionDays": 30}), {"svc": (engine.address,)}, KEYS)


async def counts(gateway: Running) -> dict[str, int]:
    found = {}
    async with gateway.gateway.database.begin() as connection:
        for table in (captured, feedback, labels, corrections):
            found[table.name] = len((await connection.execute(select(table))).all())
    return found


async def live(gateway: Running) -> None:
    """Ann and Bob ask; both say something; a reviewer corrects and labels what they asked."""
    for who in ("ann", "bob"):
        token = await token_of(gateway, f"the text of {who}", who)
        await gateway.captured()
        await say(gateway, who, token=token, rating=5)
        await say(gateway, who, token=token, correction="negative")
        await say(gateway, "rita", token=token, correction="positive")
    await label(gateway, [{"id": row["id"], "label": "positive"} for row in await sample(gateway)])


async def forget(gateway: Running, body: Any, headers: dict[str, str] = INTERNAL) -> tuple[int, Any]:
    async with gateway.session.post(f"{gateway.internal_url}/internal/forget", data=json.dumps(body), headers=headers) as response:
        return response.status, await response.json()


async def test_old_rows_go_in_steps_and_are_counted(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "STEP_ROWS", 2)
    await live(keyed)
    for number in range(5):
        await keyed.ask(f"old {number}", headers=as_("ann"))
    await keyed.captured()
    async with keyed.gateway.database.begin() as connection:
        await connection.execute(update(captured).where(captured.c.text.like("old%")).values(captured_at=time.time() - 31 * 86400))
    assert await keyed.gateway.retention.sweep(time.time()) == 5
    assert await counts(keyed) == {"captured": 2, "feedback": 6, "labels": 2, "corrections": 4}
    assert 'rows_deleted_total{deployment="tweets",namespace="team",reason="retention",table="captured"} 5.0' in await keyed.metrics()
    assert await keyed.gateway.retention.sweep(time.time() + 31 * 86400) == 8  # raw rows and votes; curated rows stay
    assert await counts(keyed) == {"captured": 0, "feedback": 0, "labels": 2, "corrections": 4}
    await keyed.gateway.retention.sweep(time.time() + 181 * 86400)
    assert await counts(keyed) == {"captured": 0, "feedback": 0, "labels": 0, "corrections": 0}


async def test_a_subjects_rows_go_and_nobody_elses(keyed: Running) -> None:
    await live(keyed)
    code, receipt = await forget(keyed, {"key": "ann"})
    subject = subject_of("ann", b"feedback-secret")
    assert (code, receipt) == (200, {"subject": subject, "captured": 1, "feedback": 2, "labels": 1, "corrections": 2})
    assert await counts(keyed) == {"captured": 1, "feedback": 4, "labels": 1, "corrections": 2}
    async with keyed.gateway.database.begin() as connection:
        left = [str(row) for table in (captured, labels, corrections) for row in await connection.execute(select(table))]
    assert left
    assert not [row for row in left if "the text of ann" in row]
    assert 'reason="subject",table="captured"} 1.0' in await keyed.metrics()
    assert ForgetReceipt.model_validate((await forget(keyed, {"subject": subject}))[1]) == ForgetReceipt(subject=subject)


async def test_curated_rows_are_found_when_the_raw_row_is_gone(keyed: Running) -> None:
    await live(keyed)
    async with keyed.gateway.database.begin() as connection:
        await connection.execute(text("DELETE FROM captured"))
    receipt = (await forget(keyed, {"key": "bob"}))[1]
    assert (receipt["captured"], receipt["labels"], receipt["corrections"]) == (0, 1, 2)


@on_sqlite_alone
async def test_what_still_waits_to_be_stored_is_forgotten_too(keyed: Running) -> None:
    async with keyed.gateway.database.quiet():
        for who in ("ann", "bob"):
            await keyed.ask("a text", headers=as_(who))
        ann = subject_of("ann", b"feedback-secret")
        keyed.gateway.capture.offer(Exchange(Inbound(CHAT_PATH, {}, "text", False), "r1", ann, {}, keep=True, status=200))
        keyed.gateway.capture.forget(ann)
    await keyed.captured()
    async with keyed.gateway.database.begin() as connection:
        assert (await connection.execute(select(captured.c.subject))).scalars().all() == [subject_of("bob", b"feedback-secret")]
    assert keyed.gateway.capture.report().dropped == 0


@on_sqlite_alone
@pytest.mark.parametrize("body", [{}, {"key": "ann", "subject": "0" * 24}, {"subject": "ann"}, {"key": ""}, {"name": "ann"}, [], "ann"])
async def test_a_request_that_names_nobody_or_too_many_is_refused(keyed: Running, body: Any) -> None:
    assert (await forget(keyed, body))[0] == 400


@on_sqlite_alone
async def test_only_holders_of_the_token_may_delete(keyed: Running) -> None:
    assert (await forget(keyed, {"key": "ann"}, headers={}))[0] == 401
