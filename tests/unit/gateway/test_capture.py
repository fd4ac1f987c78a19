"""What was asked and answered is stored off the request path; a database that is full, slow or away costs rows, never answers."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy import text as sql
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision, on_sqlite_alone
from tests.unit.gateway.engines import FakeEngine, chat_events, stream_of
from tests.unit.gateway.postgresql import Server

from tuneloop_gateway import app as app_module
from tuneloop_gateway import capture as capture_module
from tuneloop_gateway.database import Database, Unavailable, captured

ON_BOTH_STORES = True


async def rows(gateway: Running) -> list[Any]:
    columns = (captured.c.text, captured.c.answer, captured.c.revision, captured.c.finish_reason, captured.c.subject)
    async with gateway.gateway.database.begin() as connection:
        return list(await connection.execute(select(*columns).order_by(captured.c.captured_at)))


async def test_the_last_user_message_before_the_prompt_and_the_answer_are_stored(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(make_revision(prompt={"template": "Q: {{ text }}"})), {"svc": (engine.address,)})
    messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "ok"}, {"role": "user", "content": " the\n\tlast "}]
    await gateway.ask(messages=messages)
    await gateway.captured()
    text, answer, revision, reason, subject = (await rows(gateway))[0]
    assert (text, answer, revision, reason) == ("the last", "echo: Q:  the\n\tlast ", "r1", "stop")
    assert len(subject) == 24


@on_sqlite_alone
async def test_a_streams_whole_text_is_stored(gateway: Running, engine: FakeEngine) -> None:
    engine.replies = [stream_of(*chat_events("Once ", "upon ", "a time", finish_reason="length"))]
    async with gateway.chat(stream=True) as response:
        await response.read()
    await gateway.captured()
    assert (await rows(gateway))[0][1:4] == ("Once upon a time", "r1", "length")


@pytest.mark.parametrize(("personal_data", "stored"), [("Redact", "mail [EMAIL]"), ("Keep", "mail me@example.org")])
async def test_personal_data_is_redacted_before_it_is_stored_unless_kept(
    start: Start, engine: FakeEngine, personal_data: str, stored: str
) -> None:
    gateway = await start(make_config(capture={"personalData": personal_data}), {"svc": (engine.address,)})
    await gateway.ask("mail me@example.org")
    await gateway.captured()
    assert (await rows(gateway))[0][:2] == (stored, f"echo: {stored}")


@on_sqlite_alone
@pytest.mark.parametrize("personal_data", ["Redact", "Keep"])
async def test_no_byte_of_the_file_holds_personal_data_unless_kept(start: Start, engine: FakeEngine, personal_data: str) -> None:
    gateway = await start(make_config(capture={"personalData": personal_data}), {"svc": (engine.address,)})
    await gateway.ask("mail me@example.org")
    await gateway.captured()
    assert (b"me@example.org" in (gateway.folder / "tuneloop.db").read_bytes() + _log(gateway)) == (personal_data == "Keep")


def _log(gateway: Running) -> bytes:
    log = gateway.folder / "tuneloop.db-wal"
    return log.read_bytes() if log.exists() else b""


@on_sqlite_alone
async def test_the_engine_gets_the_text_unredacted(gateway: Running, engine: FakeEngine) -> None:
    await gateway.ask("mail me@example.org")
    assert engine.requests[0]["messages"][0]["content"] == "mail me@example.org"


@on_sqlite_alone
async def test_failed_requests_are_not_captured_and_sampling_out_is_not_dropping(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(capture={"sampleRate": 0}), {"svc": (engine.address,)})
    await gateway.ask()
    await gateway.captured()
    state = await gateway.state()
    assert (state.capture.captured, state.capture.dropped) == (0, 0)


@on_sqlite_alone
async def test_a_locked_database_drops_and_counts_and_answers_go_on_and_it_recovers(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "TRIES", 1)
    gateway = await start(endpoints={"svc": (engine.address,)})
    await gateway.ask("before")
    await gateway.captured()
    gateway.gateway.database._seconds = 0.6
    lock = sqlite3.connect(gateway.folder / "tuneloop.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    assert [(await gateway.ask("during"))[0] for _ in range(5)] == [200] * 5
    assert time.monotonic() - started < 2.5, "none of the five waited for it"
    await eventually(lambda: gateway.gateway.capture.report().dropped == 5)
    lock.execute("ROLLBACK")
    lock.close()
    async with asyncio.timeout(10):
        while "after" not in [row[0] for row in await rows(gateway)]:
            await gateway.ask("after")
            await gateway.captured()
    assert 'tuneloop_gateway_capture_dropped_total{deployment="tweets",namespace="team",reason="database"}' in await gateway.metrics()
    assert "during" not in [row[0] for row in await rows(gateway)]


@on_sqlite_alone
async def test_a_full_database_drops_and_counts(start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "TRIES", 1)
    gateway = await start(endpoints={"svc": (engine.address,)})
    await gateway.ask("before")
    await gateway.captured()
    async with gateway.gateway.database.begin() as connection:
        await connection.exec_driver_sql("PRAGMA max_page_count=1")  # raised by SQLite to what is used already
    assert (await gateway.ask("x" * 15_000))[0] == 200
    await eventually(lambda: gateway.gateway.capture.report().dropped == 1)
    async with gateway.gateway.database.begin() as connection:
        await connection.exec_driver_sql("PRAGMA max_page_count=10000")
    assert (await gateway.ask("after"))[0] == 200
    await gateway.captured()
    assert [row.text for row in await rows(gateway)] == ["before", "after"]


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_a_server_that_dies_and_comes_back_costs_the_rows_of_that_time_and_no_answer(
    start: Start, engine: FakeEngine, postgresql: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "TRIES", 1)
    gateway = await start(endpoints={"svc": (engine.address,)})
    await gateway.ask("before")
    await gateway.captured()
    postgresql.kill()
    try:
        assert [(await gateway.ask("during"))[0] for _ in range(5)] == [200] * 5
        await eventually(lambda: gateway.gateway.capture.report().dropped == 5)
    finally:
        postgresql.start()
    assert (await gateway.ask("after"))[0] == 200
    await gateway.captured()
    assert [row.text for row in await rows(gateway)] == ["before", "after"]
    assert 'capture_dropped_total{deployment="tweets",namespace="team",reason="database"} 5.0' in await gateway.metrics()


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_connections_that_a_server_closes_are_opened_again_without_a_loss(start: Start, engine: FakeEngine) -> None:
    gateway = await start(endpoints={"svc": (engine.address,)})
    for text in ("before", "after"):
        await gateway.ask(text)
        await gateway.captured()
        other = Database(gateway.gateway.database.engine.url, "other/one")
        async with other.begin() as connection:
            await connection.execute(sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"))
        await other.close()
    assert [row.text for row in await rows(gateway)] == ["before", "after"]
    assert gateway.gateway.capture.report().dropped == 0


async def _fill(gateway: Running) -> None:
    fill = "INSERT INTO captured SELECT md5(random()::text), 0, 'filler', 1, repeat('x', 1500), '', '', '' FROM generate_series(1, 100)"
    for _ in range(100):
        async with gateway.gateway.database.begin() as connection:
            await connection.execute(sql(fill))


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_a_server_with_a_full_disk_drops_and_counts_until_there_is_room_again(
    start: Start, engine: FakeEngine, postgresql: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is on the size of its files: the system refuses to extend one, as a full disk would."""
    monkeypatch.setattr(capture_module, "TRIES", 1)
    gateway = await start(endpoints={"svc": (engine.address,)})
    await gateway.ask("before")
    await gateway.captured()
    with postgresql.largest_file(2 << 20):
        with pytest.raises(Unavailable):
            await _fill(gateway)
        assert (await gateway.ask("x" * 1500))[0] == 200
        await eventually(lambda: gateway.gateway.capture.report().dropped == 1)
    assert (await gateway.ask("after"))[0] == 200
    await gateway.captured()
    assert [row.text for row in await rows(gateway) if row.revision != "filler"] == ["before", "after"]


@on_sqlite_alone
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


@on_sqlite_alone
async def test_a_full_queue_drops_and_counts(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(capture={"queueSize": 3}), {"svc": (engine.address,)})
    async with gateway.gateway.database.quiet():
        for _ in range(10):
            assert (await gateway.ask())[0] == 200
        state = gateway.gateway.capture.report()
    assert (state.pending, state.dropped) == (3, 7)
    await gateway.captured()
    assert len(await rows(gateway)) == 3
    assert 'capture_dropped_total{deployment="tweets",namespace="team",reason="queue_full"} 7.0' in await gateway.metrics()


@on_sqlite_alone
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
    async with gateway.gateway.database.begin() as connection:
        await connection.execute(sql("UPDATE captured SET captured_at = captured_at - 31 * 86400 WHERE text = 'old'"))
    assert await gateway.gateway.retention.sweep(time.time()) == 1
    assert [row[0] for row in await rows(gateway)] == ["new"]


async def test_rows_that_cannot_be_stored_for_any_reason_are_counted(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = gateway.gateway.capture

    async def fail(batch: object) -> None:
        raise ValueError("a value that the driver does not take")

    with monkeypatch.context() as patch:
        patch.setattr(capture, "_store", fail)
        await gateway.ask("one")
        await eventually(lambda: capture.report().dropped == 1)
    await gateway.ask("two")
    await eventually(lambda: capture.report().captured == 1)


async def test_an_attempt_that_failed_after_it_was_stored_is_not_counted_as_lost(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, failed = gateway.gateway.capture, list[object]()
    store = capture._store

    async def store_and_fail(batch: list[Any]) -> None:
        await store(batch)
        if not failed:
            failed.append(batch)
            raise Unavailable("TimeoutError")

    monkeypatch.setattr(capture, "_store", store_and_fail)
    await gateway.ask("once")
    await gateway.captured()
    assert failed
    assert [row.text for row in await rows(gateway)] == ["once"]
    assert capture.report().dropped == 0
