"""What keys use is counted once, over replicas, restarts and databases that go away; and each request has its line in the log."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import unused_port
from prometheus_client import generate_latest
from tests.unit.gateway.conftest import INTERNAL, Running, Start, eventually, make_config, on_sqlite_alone
from tests.unit.gateway.engines import FakeEngine, chat_events, status, stream_of

from tuneloop_gateway import access_log
from tuneloop_gateway.access_log import AccessLog, Entry
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.database import Database, Unavailable, database_url
from tuneloop_gateway.database import usage as usage_table
from tuneloop_gateway.ledger import Ledger
from tuneloop_gateway.metrics import Metrics
from tuneloop_gateway.retention import Retention

ON_BOTH_STORES = True
KEYS = {"app": "key-app", "team": "key-team"}
APP, TEAM = ({"Authorization": f"Bearer {key}"} for key in KEYS.values())


async def usage(gateway: Running, since: str = "2020-01-01", until: str = "2999-12-31") -> dict[str | None, tuple[int, ...]]:
    """By key: requests, prompt and completion tokens, and failures where there were any."""
    url = f"{gateway.internal_url}/internal/usage?since={since}&until={until}"
    async with gateway.session.get(url, headers=INTERNAL) as response:
        assert response.status == 200
        rows = [json.loads(line) for line in (await response.text()).splitlines()]
    assert all(set(row) <= {"day", "key", "subject", "requests", "failed", "promptTokens", "completionTokens"} for row in rows)
    return {row.get("key"): (row["requests"], row["promptTokens"], row["completionTokens"], *filter(None, [row["failed"]])) for row in rows}


async def test_requests_and_tokens_are_counted_by_key_streamed_or_not(start: Start, engine: FakeEngine) -> None:
    gateway = await start(endpoints={"svc": (engine.address,)}, keys=KEYS)
    await gateway.ask(headers=APP)
    async with gateway.chat(headers=APP, stream=True) as response:
        assert b"usage" not in await response.read(), "its client did not ask for it"
    await gateway.ask(headers=TEAM)
    await gateway.ask()
    assert (await gateway.ask(headers=APP, n=99))[0] == 400
    engine.replies = [status(400), status(500)]
    await gateway.ask(headers=APP)
    await gateway.ask(headers=APP)
    assert await usage(gateway) == {"app": (2, 14, 6, 1), "team": (1, 7, 3), "anonymous": (1, 7, 3)}
    assert await usage(gateway, until="2020-01-31") == {}
    shown = await gateway.metrics()
    own = 'deployment="tweets",key="app"'
    assert f'tuneloop_gateway_key_requests_total{{{own},namespace="team",outcome="answered"}} 2.0' in shown
    assert f'tuneloop_gateway_key_requests_total{{{own},namespace="team",outcome="failed"}} 1.0' in shown
    assert f'tuneloop_gateway_key_tokens_total{{{own},kind="prompt",namespace="team"}} 14.0' in shown
    assert f'tuneloop_gateway_key_tokens_total{{{own},kind="completion",namespace="team"}} 6.0' in shown


async def test_an_answer_that_its_client_cut_off_counts_by_what_came(start: Start, engine: FakeEngine) -> None:
    engine.replies = [stream_of(*chat_events("a", "b", "c"), gate=asyncio.Event(), first=2)]
    gateway = await start(endpoints={"svc": (engine.address,)}, keys=KEYS)
    response = await gateway.chat("x" * 40, headers=APP, stream=True)
    await response.content.readany()
    response.close()
    await eventually(lambda: gateway.gateway.public.in_flight == 0)
    requests, prompt, completion = (await usage(gateway))["app"]
    assert (requests, prompt) == (1, 10)
    assert completion >= 1


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_two_replicas_and_a_restart_count_each_request_once(start: Start, engine: FakeEngine) -> None:
    one, two = [await start(endpoints={"svc": (engine.address,)}, keys=KEYS, pod_uid=uid) for uid in ("one", "two")]
    await asyncio.gather(*(gateway.ask(headers=APP) for gateway in (one, two) for _ in range(20)))
    await one.gateway.stop()
    three = await start(endpoints={"svc": (engine.address,)}, keys=KEYS, pod_uid="one")
    await three.ask(headers=APP)
    await two.gateway.ledger.write()
    assert await usage(three) == {"app": (41, 287, 123)}
    assert await usage(two) == {"app": (40, 280, 120)} or await usage(two) == {"app": (41, 287, 123)}


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_what_was_written_though_nobody_said_so_is_not_counted_twice(start: Start, engine: FakeEngine, monkeypatch: Any) -> None:
    gateway = await start(endpoints={"svc": (engine.address,)}, keys=KEYS)
    await gateway.ask(headers=APP)
    ledger, begin = gateway.gateway.ledger, Database.begin

    @asynccontextmanager
    async def silent(database: Database) -> AsyncIterator[Any]:
        """Commits, and fails to say so."""
        async with begin(database) as connection:
            yield connection
        raise Unavailable("TimeoutError")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "begin", silent)
        with pytest.raises(Unavailable):
            await ledger.write()
    await gateway.ask(headers=APP)
    assert await usage(gateway) == {"app": (2, 14, 6)}


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_a_key_that_is_gone_is_named_by_its_pseudonym_and_no_table_holds_a_name(start: Start, engine: FakeEngine) -> None:
    gateway = await start(endpoints={"svc": (engine.address,)}, keys=KEYS)
    await gateway.ask(headers=APP)
    assert set(await usage(gateway)) == {"app"}
    (gateway.folder / "keys" / "app").unlink()
    gateway.gateway.keys.reload()
    assert set(await usage(gateway)) == {None}


@on_sqlite_alone
@pytest.mark.parametrize("day", ["", "2026", "20260101", "2026-W01-1", "2026-02-30", "%25"])
async def test_a_day_that_is_none_is_refused_and_nobody_reads_usage_without_the_token(gateway: Running, day: str) -> None:
    url = f"{gateway.internal_url}/internal/usage?since=2026-01-01&until={day}"
    for headers, code in ((INTERNAL, 400), ({}, 401)):
        async with gateway.session.get(url, headers=headers) as response:
            assert response.status == code


@asynccontextmanager
async def away(_: Database) -> AsyncIterator[Any]:
    """A database that does nothing."""
    raise Unavailable("ConnectionRefusedError")
    yield


async def test_while_the_database_is_away_requests_are_answered_and_counted_to_be_written_later(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(endpoints={"svc": (engine.address,)}, keys=KEYS)
    with monkeypatch.context() as patch:
        patch.setattr(Database, "begin", away)
        for _ in range(3):
            assert (await gateway.ask(headers=APP))[0] == 200
            with pytest.raises(Unavailable):
                await gateway.gateway.ledger.write()
        async with gateway.session.get(
            f"{gateway.internal_url}/internal/usage?since=2026-01-01&until=2026-01-02", headers=INTERNAL
        ) as response:
            assert response.status == 503
    assert await usage(gateway) == {"app": (3, 21, 9)}


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_what_is_counted_at_the_end_is_written(start: Start, engine: FakeEngine) -> None:
    one = await start(endpoints={"svc": (engine.address,)}, keys=KEYS)
    await one.ask(headers=APP)
    await one.gateway.stop()
    assert await usage(await start(endpoints={"svc": (engine.address,)}, keys=KEYS)) == {"app": (1, 7, 3)}


@on_sqlite_alone
async def test_what_cannot_be_written_at_the_end_is_told(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await start(endpoints={"svc": (engine.address,)}, keys=KEYS)
    await gateway.ask(headers=APP)
    monkeypatch.setattr(Database, "begin", away)
    await gateway.gateway.ledger.close()
    assert "'requests': 1, 'failed': 0, 'prompt_tokens': 7, 'completion_tokens': 3" in caplog.text


async def test_a_day_is_that_of_the_answers_end_and_an_old_one_is_forgotten_once_written(store: str, tmp_path: Path) -> None:
    now = [86400.0 * 20000 - 1]
    database = Database(database_url(tmp_path / "url", tmp_path), "team/tweets")
    ledger = Ledger(database, lambda: now[0])
    for _ in range(2):
        ledger.add("s", requests=1)
        now[0] += 1
    assert [(row.day, row.requests) for row in await ledger.report("2024-01-01", "2024-12-31", lambda _: None)] == [
        ("2024-10-03", 1),
        ("2024-10-04", 1),
    ]
    assert [day for day, _ in ledger._totals] == ["2024-10-04"]
    await Retention(Configuration(tmp_path), database, Metrics("team", "tweets"))._delete(
        usage_table, usage_table.c.day < "2024-10-04", None
    )
    assert len(await ledger.report("2024-01-01", "2024-12-31", lambda _: None)) == 1
    await database.close()


def test_keys_beyond_some_share_their_metrics() -> None:
    metrics = Metrics("team", "tweets")
    for number in range(300):
        metrics.used(f"key-{number}", 1, 2)
    counted = [
        line for line in generate_latest(metrics.registry).decode().splitlines() if line.startswith("tuneloop_gateway_key_requests_total")
    ]
    assert len(counted) == 2 * 201
    assert any('key="other"' in line and line.endswith(" 100.0") for line in counted)


# --- the log ---------------------------------------------------------------------


class Written(io.BytesIO):
    """Takes the place of standard output."""

    is_full = False

    def take(self, data: bytes) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.write(data)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Written:
    written = Written()
    monkeypatch.setattr(access_log, "_put", written.take)
    return written


async def lines(gateway: Running, log: Written) -> list[dict[str, Any]]:
    await gateway.gateway.access_log.write()
    return log.lines()


@on_sqlite_alone
async def test_each_request_has_a_line_without_what_was_said(start: Start, engine: FakeEngine, log: Written) -> None:
    gateway = await start(make_config(requireKey=True), {"svc": (engine.address,)}, KEYS)
    await gateway.ask("a secret question", headers={**APP, "x-request-id": "mine-1"})
    async with gateway.chat("a secret question", headers=TEAM, stream=True) as response:
        await response.read()
    await gateway.ask("a secret question")
    whole, streamed, refused = await lines(gateway, log)
    expected = {
        "requestId": "mine-1", "route": "/v1/chat/completions", "key": "app", "status": 200, "stream": False,
        "revision": "r1", "version": 1, "finishReason": "stop",
    }  # fmt: skip
    assert {key: whole[key] for key in expected} == expected
    assert (whole["promptTokens"], whole["completionTokens"]) == (7, 3)
    assert (streamed["key"], streamed["stream"], streamed["completionTokens"]) == ("team", True, 3)
    assert 0 < streamed["firstByteSeconds"] <= streamed["seconds"]
    assert (refused["status"], refused["error"], refused["key"]) == (401, "invalid_api_key", "")
    shown = log.getvalue().decode()
    assert "secret" not in shown
    assert not any(key in shown for key in KEYS.values())


@on_sqlite_alone
async def test_a_client_that_went_away_and_an_engine_that_was_not_there_are_lines_too(
    start: Start, engine: FakeEngine, log: Written
) -> None:
    gateway = await start(endpoints={"svc": (engine.address,)})
    engine.replies = [stream_of(*chat_events("a", "b"), gate=asyncio.Event(), first=2)]
    response = await gateway.chat(stream=True)
    response.close()
    await eventually(lambda: gateway.gateway.public.in_flight == 0)
    absent = await start(endpoints={"svc": (f"127.0.0.1:{unused_port()}",)})
    assert (await absent.ask())[0] == 503
    await lines(gateway, log)
    said = {line["status"]: line for line in await lines(absent, log)}
    assert (said[499]["finishReason"], said[503]["error"]) == ("cancelled", "upstream_unavailable")


@on_sqlite_alone
async def test_every_answer_carries_a_request_id_and_a_bad_one_is_replaced(gateway: Running) -> None:
    for path, given, same in (("/v1/models", "a.b:c-1", True), ("/healthz", "x" * 129, False), ("/nowhere", "a b", False)):
        async with gateway.session.get(gateway.url + path, headers={"x-request-id": given}) as response:
            answered = response.headers["x-request-id"]
            assert answered
            assert (answered == given) is same


async def test_lines_that_nobody_writes_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch, log: Written) -> None:
    monkeypatch.setattr(access_log, "MAX_LINES", 3)
    ours = AccessLog()
    for number in range(5):
        ours.add(Entry(f"id-{number}", "/v1/completions"))
    await ours.write()
    assert [line.get("requestId") for line in log.lines()] == ["id-0", "id-1", "id-2", None]
    assert log.lines()[-1] == {"droppedLines": 2}


async def test_a_full_disk_costs_lines_and_nothing_else(log: Written) -> None:
    ours = AccessLog()
    log.is_full = True
    ours.add(Entry("a", "/v1/models"))
    await ours.write()
    log.is_full = False
    ours.add(Entry("b", "/v1/models"))
    await ours.write()
    assert log.lines()[0]["requestId"] == "b"
    assert log.lines()[1:] == [{"droppedLines": 1}]


async def test_a_reader_that_stands_still_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    monkeypatch.setattr(access_log, "STANDARD_OUTPUT", write)
    ours = AccessLog()
    for number in range(2000):  # a pipe holds 64 KiB
        ours.add(Entry(f"id-{number}", "/v1/completions"))
    await ours.close(0.05)
    os.close(read)
    os.close(write)


@on_sqlite_alone
async def test_a_request_id_is_the_engines_too(gateway: Running, engine: FakeEngine) -> None:
    _, _, headers = await gateway.ask(headers={"x-request-id": "mine-2"})
    assert headers["x-request-id"] == "mine-2"
    assert engine.headers[-1]["x-request-id"] == "mine-2"
