"""Two gateway processes on one PostgreSQL: what they store, count, detect and allow is what one would."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import select, update
from tests.unit.gateway.conftest import Start, make_config
from tests.unit.gateway.engines import FakeEngine, chat_events, stream_of
from tests.unit.gateway.postgresql import Server
from tests.unit.gateway.test_process import Process, has_reference

from tuneloop_gateway.contract import FEEDBACK_HEADER, GatewayState
from tuneloop_gateway.database import Database, allowances, database_url, drift_state

pytestmark = pytest.mark.parametrize("store", ["postgresql"], indirect=True)
INTERNAL = {"x-tuneloop-token": "t"}
Pair = tuple[Process, Process]


@asynccontextmanager
async def two(folder: Path, config: dict[str, Any], engine: FakeEngine) -> AsyncIterator[tuple[Pair, aiohttp.ClientSession]]:
    """Both are started at once, on a database without tables."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        processes = []
        for name in ("one", "two"):
            (folder / name).mkdir()
            (folder / name / "url").write_text((folder / "url").read_text())
            processes.append(Process(folder / name, config, engine))
        for process in processes:
            await process.start()
            stack.push_async_callback(_end, process)
        for process in processes:
            await process.until_ready(session)
        yield (processes[0], processes[1]), session


async def _end(process: Process) -> None:
    if process.process.returncode is None:
        process.process.kill()
    await process.process.wait()


@pytest.fixture
async def database(store: str, tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(database_url(tmp_path / "url", tmp_path), "team/tweets")
    yield database
    await database.close()


async def until(session: aiohttp.ClientSession, process: Process, holds: Callable[[GatewayState], bool]) -> GatewayState:
    async with asyncio.timeout(20):
        while not holds(state := await process.state(session)):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    return state


async def internal(session: aiohttp.ClientSession, process: Process, path: str, body: str | None = None) -> list[Any]:
    url = f"http://127.0.0.1:{process.internal_port}/internal/{path}"
    async with session.request("GET" if body is None else "POST", url, data=body, headers=INTERNAL) as response:
        assert response.status == 200
        return [json.loads(line) for line in (await response.text()).splitlines()]


async def say_at_once(session: aiohttp.ClientSession, pair: Pair, token: str) -> None:
    """The same vote at both replicas at the same moment."""

    async def say(process: Process) -> None:
        async with session.post(f"http://127.0.0.1:{process.port}/v1/feedback", json={"token": token, "rating": 5}) as response:
            assert response.status == 200

    await asyncio.gather(*map(say, pair))


async def counted(session: aiohttp.ClientSession, pair: Pair, name: str) -> float:
    """A counter over all its series and both replicas, as Prometheus would add them up."""
    total = 0.0
    for process in pair:
        async with session.get(f"http://127.0.0.1:{process.internal_port}/metrics") as response:
            total += sum(float(v) for v in re.findall(rf"^{name}_total{{.*}} (\S+)$", await response.text(), re.MULTILINE))
    return total


async def test_rows_votes_labels_and_the_detector_are_those_of_one_gateway(tmp_path: Path, engine: FakeEngine, database: Database) -> None:
    drift = {"size": 40, "horizonDays": 1e-9, "mixOverSeconds": 0, "falseAlarmEveryRequests": 1000}
    rng = random.Random(3)
    async with two(tmp_path, make_config(drift=drift, maxShareOfOneSubject=1.0), engine) as (pair, session):
        tokens = []
        for number in range(60):
            async with pair[number % 2].chat(session, " ".join(rng.choices([f"w{i}" for i in range(40)], k=10))) as response:
                assert response.status == 200
                tokens.append(response.headers[FEEDBACK_HEADER])
        for process in pair:
            await until(session, process, lambda s: s.capture.pending == 0 and s.capture.captured == 30)
        for token in tokens[:8]:
            await say_at_once(session, pair, token)
        rows = await internal(session, pair[0], "labels?limit=100&since_alarm=0")
        assert len(rows) == 60
        halves = ["\n".join(json.dumps({"id": row["id"], "label": "x"}) for row in rows[i::2]) for i in (0, 1)]
        await asyncio.gather(*(internal(session, process, "labels", half) for process, half in zip(pair, halves, strict=True)))
        for split in ("train", "gate"):
            assert await internal(session, pair[0], f"export?split={split}") == await internal(session, pair[1], f"export?split={split}")
        for process in pair:
            state = await until(session, process, lambda s: s.feedback.labelled_train + s.feedback.labelled_gate == 60)
            assert state.feedback.up == 8
        assert await counted(session, pair, "tuneloop_feedback") == 8
        assert await counted(session, pair, "tuneloop_gateway_captured") == 60
        await _hand_over(session, pair, database)


async def _hand_over(session: aiohttp.ClientSession, pair: Pair, database: Database) -> None:
    """One detects and both report it. It is killed; when its lease is over the other goes on where it was saved."""
    for number in range(60):  # whichever detects gets enough
        for process in pair:
            await process.ask(session, f"w1 w2 w3 {number}")
    for process in pair:
        await until(session, process, has_reference)
    async with database.begin() as connection:
        owner_uid = (await connection.execute(select(drift_state.c.owner))).scalar_one()
    states = [await process.state(session) for process in pair]
    owner = next(p for p, s in zip(pair, states, strict=True) if s.pod_uid == owner_uid)
    other = pair[1 - pair.index(owner)]
    owner.process.send_signal(signal.SIGKILL)
    await owner.process.wait()
    async with database.begin() as connection:
        await connection.execute(update(drift_state).values(lease_until=time.time() - 1))
        saved = json.loads((await connection.execute(select(drift_state.c.meta))).scalar_one())
    async with asyncio.timeout(20):
        while True:
            async with database.begin() as connection:
                if (await connection.execute(select(drift_state.c.owner))).scalar_one() != owner_uid:
                    break
            await asyncio.sleep(0.05)
    state = await until(session, other, lambda s: s.drift is not None and s.drift.pairs >= saved["pairs"])
    assert has_reference(state)


Ask = Callable[[int], Any]


async def spend(ask: Ask, allowed: int) -> None:
    """Three times what is allowed, in turn at both replicas, ten at a time."""
    started, statuses = time.monotonic(), Counter[int]()

    async def one(number: int) -> int:
        async with ask(number) as response:
            if response.status == 429:
                error = (await response.json())["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
                assert error["message"].startswith(f"This key has used its {allowed} requests a minute; wait ")
                assert 1 <= int(response.headers["Retry-After"]) <= 60 / allowed + 1
            return int(response.status)

    for first in range(0, 3 * allowed, 10):
        statuses.update(await asyncio.gather(*map(one, range(first, first + 10))))
    refilled = (time.monotonic() - started) * allowed / 60
    assert allowed <= statuses[200] <= allowed + refilled + 1
    assert statuses[200] + statuses[429] == 3 * allowed


async def test_a_keys_requests_are_counted_over_both_replicas(start: Start, engine: FakeEngine) -> None:
    config = make_config(limits={"requestsPerMinute": 30})
    pair = [await start(config, {"svc": (engine.address,)}, pod_uid=name) for name in ("one", "two")]
    await spend(lambda number: pair[number % 2].chat(f"text {number}"), 30)


@pytest.mark.long
async def test_a_keys_requests_are_counted_over_two_processes(tmp_path: Path, engine: FakeEngine, store: str) -> None:
    async with two(tmp_path, make_config(limits={"requestsPerMinute": 30}), engine) as (pair, session):
        for process in pair:  # both have found the database
            assert await internal(session, process, "labels") == []
        await spend(lambda number: pair[number % 2].chat(session, f"text {number}"), 30)


async def test_a_keys_tokens_are_counted_over_both_replicas_streams_included(start: Start, engine: FakeEngine, database: Database) -> None:
    config = make_config(limits={"tokensPerMinute": 100})
    pair = [await start(config, {"svc": (engine.address,)}, pod_uid=name) for name in ("one", "two")]
    started, passed = time.time(), 0
    async with asyncio.timeout(20):
        while True:
            async with pair[passed % 2].chat("text", stream=passed % 3 == 0) as response:
                if response.status == 429:
                    assert "used its 100 tokens a minute" in (await response.json())["error"]["message"]
                    break
                assert (b'"usage"' in await response.read()) == bool(passed % 3)
            passed += 1
            await _charged(database, passed * 10, started)
    assert 11 <= passed <= 12  # ten tokens each, and the bucket fills a little meanwhile
    metrics = "".join([await gateway.metrics() for gateway in pair])
    assert sum(float(n) for n in re.findall(r"^tuneloop_gateway_tokens_total{.*} (\S+)$", metrics, re.MULTILINE)) == passed * 10


async def _charged(database: Database, tokens: int, started: float) -> None:
    """Waits until the key's bucket lacks as much: nothing is lost between the replicas."""
    async with asyncio.timeout(5):
        while True:
            async with database.begin() as connection:
                until = (await connection.execute(select(allowances.c.tokens_until))).scalar()
            if until is not None and until >= started + tokens * 0.6:
                return
            await asyncio.sleep(0.005)


async def test_while_the_database_is_away_each_replica_counts_for_itself(start: Start, engine: FakeEngine, postgresql: Server) -> None:
    config = make_config(limits={"requestsPerMinute": 5})
    pair = [await start(config, {"svc": (engine.address,)}, pod_uid=name) for name in ("one", "two")]
    postgresql.kill()
    try:
        statuses = [(await pair[number % 2].ask())[0] for number in range(16)]
    finally:
        postgresql.start()
    assert statuses == [200] * 10 + [429] * 6


async def test_a_client_that_asks_for_the_usage_of_a_stream_gets_it(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(limits={"tokensPerMinute": 100}), {"svc": (engine.address,)})
    async with gateway.chat("text", stream=True, stream_options={"include_usage": True}) as response:
        assert (await response.read()).count(b'"usage"') == 1


async def test_an_answer_that_its_client_cut_off_is_charged_by_its_events(start: Start, engine: FakeEngine, database: Database) -> None:
    gateway = await start(make_config(limits={"tokensPerMinute": 600}), {"svc": (engine.address,)})
    gate = asyncio.Event()
    engine.replies = [stream_of(*chat_events(*"abcdef"), gate=gate, first=5)]
    started = time.time()
    response = await gateway.chat("x" * 400, stream=True)
    while b'"d"' not in await response.content.readany():
        pass
    response.close()
    await _charged(database, 0, started + (5 + 100) / 10)  # five events and a quarter of the bytes, at ten tokens a second
