"""What was asked and answered is stored off the request path; a database that is full, slow or away costs rows, never answers."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine, chat_events, stream_of

from tuneloop_gateway import app as app_module
from tuneloop_gateway import capture as capture_module


def rows(
    folder: Path, query: str = "SELECT text, answer, revision, finish_reason, subject FROM captured ORDER BY captured_at"
) -> list[Any]:
    with sqlite3.connect(folder / "tuneloop.db") as connection:
        return connection.execute(query).fetchall()


async def test_the_last_user_message_before_the_prompt_and_the_answer_are_stored(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(make_revision(prompt={"template": "Q: {{ text }}"})), {"svc": (engine.address,)})
    messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "ok"}, {"role": "user", "content": " the\n\tlast "}]
    await gateway.ask(messages=messages)
    await gateway.captured()
    text, answer, revision, reason, subject = rows(gateway.folder)[0]
    assert (text, answer, revision, reason) == ("the last", "echo: Q:  the\n\tlast ", "r1", "stop")
    assert len(subject) == 24


async def test_a_streams_whole_text_is_stored(gateway: Running, engine: FakeEngine) -> None:
    engine.replies = [stream_of(*chat_events("Once ", "upon ", "a time", finish_reason="length"))]
    async with gateway.chat(stream=True) as response:
        await response.read()
    await gateway.captured()
    assert rows(gateway.folder)[0][1:4] == ("Once upon a time", "r1", "length")


@pytest.mark.parametrize(("personal_data", "stored"), [("Redact", "mail [EMAIL]"), ("Keep", "mail me@example.org")])
async def test_personal_data_is_redacted_before_it_is_stored_unless_kept(
    start: Start, engine: FakeEngine, personal_data: str, stored: str
) -> None:
    gateway = await start(make_config(capture={"personalData": personal_data}), {"svc": (engine.address,)})
    await gateway.ask("mail me@example.org")
    await gateway.captured()
    assert rows(gateway.folder)[0][:2] == (stored, f"echo: {stored}")
    assert (b"me@example.org" in (gateway.folder / "tuneloop.db").read_bytes() + _log(gateway)) == (personal_data == "Keep")


def _log(gateway: Running) -> bytes:
    log = gateway.folder / "tuneloop.db-wal"
    return log.read_bytes() if log.exists() else b""


async def test_the_engine_gets_the_text_unredacted(gateway: Running, engine: FakeEngine) -> None:
    await gateway.ask("mail me@example.org")
    assert engine.requests[0]["messages"][0]["content"] == "mail me@example.org"


async def test_failed_requests_are_not_captured_and_sampling_out_is_not_dropping(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(capture={"sampleRate": 0}), {"svc": (engine.address,)})
    await gateway.ask()
    await gateway.captured()
    state = await gateway.state()
    assert (state.capture.captured, state.capture.dropped) == (0, 0)


async def test_a_locked_database_drops_and_counts_and_answers_go_on_and_it_recovers(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "TRIES", 1)
    gateway = await start(endpoints={"svc": (engine.address,)})
    await gateway.ask("before")
    await gateway.captured()
    gateway.gateway.database._seconds = 0.3
    lock = sqlite3.connect(gateway.folder / "tuneloop.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    assert [(await gateway.ask("during"))[0] for _ in range(5)] == [200] * 5
    assert time.monotonic() - started < 1
    await eventually(lambda: gateway.gateway.capture.report().dropped == 5)
    lock.execute("ROLLBACK")
    lock.close()
    async with asyncio.timeout(10):
        while "after" not in [row[0] for row in rows(gateway.folder)]:
            await gateway.ask("after")
            await gateway.captured()
    assert 'tuneloop_gateway_capture_dropped_total{deployment="tweets",namespace="team",reason="database"}' in await gateway.metrics()
    assert "during" not in [row[0] for row in rows(gateway.folder)]


async def test_a_full_database_drops_and_counts(start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "TRIES", 1)
    gateway = await start(endpoints={"svc": (engine.address,)})
    await gateway.ask("before")
    await gateway.captured()
    async with gateway.gateway.database.begin() as connection:
        await connection.exec_driver_sql("PRAGMA max_page_count=1")  # raised by SQLite to what is used already
    assert (await gateway.ask("x" * 15_000))[0] == 200
    await eventually(lambda: gateway.gateway.capture.report().dropped == 1)


async def test_a_database_that_was_never_there_costs_no_answer(
    start: Start, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "FLUSH_SECONDS", 0.1)
    (tmp_path / "url").write_text("postgresql://nobody:hidden@127.0.0.1:1/none")
    gateway = await start(endpoints={"svc": (engine.address,)})
    assert (await gateway.ask())[0] == 200
    state = await gateway.state()
    assert state.capture.captured == 0
    assert state.capture.pending + state.capture.dropped == 1
    await gateway.gateway.stop()


async def test_a_full_queue_drops_and_counts(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(capture={"queueSize": 3}), {"svc": (engine.address,)})
    async with gateway.gateway.database.quiet():
        for _ in range(10):
            assert (await gateway.ask())[0] == 200
        state = gateway.gateway.capture.report()
    assert (state.pending, state.dropped) == (3, 7)
    await gateway.captured()
    assert len(rows(gateway.folder)) == 3
    assert 'capture_dropped_total{deployment="tweets",namespace="team",reason="queue_full"} 7.0' in await gateway.metrics()


async def test_large_texts_in_the_queue_are_bounded_by_their_bytes(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "MAX_QUEUED_BYTES", 20_000)
    gateway = await start(endpoints={"svc": (engine.address,)})
    await asyncio.gather(*(gateway.ask("x" * 15_000) for _ in range(4)))
    await gateway.captured()
    report = gateway.gateway.capture.report()
    assert (report.captured + report.dropped, report.captured) == (4, 0)


async def test_what_is_past_its_retention_is_deleted(gateway: Running) -> None:
    for text in ("old", "new"):
        await gateway.ask(text)
    await gateway.captured()
    with sqlite3.connect(gateway.folder / "tuneloop.db") as connection:
        connection.execute("UPDATE captured SET captured_at = captured_at - 31 * 86400 WHERE text = 'old'")
    assert await gateway.gateway.capture.sweep_once(time.time()) == 1
    assert [row[0] for row in rows(gateway.folder)] == ["new"]
