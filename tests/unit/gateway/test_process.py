"""The gateway as the process that runs in its container."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import unused_port
from tests.unit.gateway.conftest import make_config
from tests.unit.gateway.engines import FakeEngine, chat_events, stream_of

from tuneloop_gateway.__main__ import run
from tuneloop_gateway.contract import DriftStatus, GatewayState
from tuneloop_gateway.database import Database, database_url
from tuneloop_gateway.ledger import Ledger
from tuneloop_gateway.settings import Settings

pytestmark = pytest.mark.process

REFERENCE, HELD_OUT = 1600, 1000


class Process:
    """`python -m tuneloop_gateway` with its files in a folder."""

    def __init__(self, folder: Path, config: dict[str, Any], engine: FakeEngine) -> None:
        self.port, self.internal_port = unused_port(), unused_port()
        for name, content in (("engine-key", engine.key), ("internal-token", "t"), ("feedback-key", "f")):
            (folder / "secrets").mkdir(exist_ok=True)
            (folder / "secrets" / name).write_text(content)
        (folder / "config.json").write_text(json.dumps(config))
        paths = {"CONFIG": "config.json", "SECRETS": "secrets", "KEYS": "keys", "DATA": ".", "DATABASE_URL_FILE": "url"}
        settings: dict[str, Any] = {
            "HOST": "127.0.0.1", "PUBLIC_PORT": self.port, "INTERNAL_PORT": self.internal_port, "DRAIN_DELAY_SECONDS": 0.3,
            "ENDPOINTS": json.dumps({"svc": [engine.address]}), **{name: folder / path for name, path in paths.items()},
        }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._environment = {**inherited, **{f"TUNELOOP_GATEWAY_{name}": str(value) for name, value in settings.items()}}

    async def start(self) -> None:
        command = (sys.executable, "-m", "tuneloop_gateway")
        self.process = await asyncio.create_subprocess_exec(*command, env=self._environment)

    async def until_ready(self, session: aiohttp.ClientSession) -> None:
        async with asyncio.timeout(30):
            while True:
                try:
                    async with session.get(f"http://127.0.0.1:{self.port}/readyz") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)

    def chat(self, session: aiohttp.ClientSession, text: str, **more: Any) -> Any:
        body = {"model": "sentiment", "messages": [{"role": "user", "content": text}], **more}
        return session.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body)

    async def ask(self, session: aiohttp.ClientSession, text: str, **more: Any) -> bytes:
        async with self.chat(session, text, **more) as response:
            assert response.status == 200
            return bytes(await response.read())

    async def state(self, session: aiohttp.ClientSession) -> GatewayState:
        async with session.get(f"http://127.0.0.1:{self.internal_port}/internal/state") as response:
            return GatewayState.model_validate_json(await response.read())


def has_reference(state: GatewayState) -> bool:
    return state.drift is not None and state.drift.status is not DriftStatus.COLLECTING


@asynccontextmanager
async def running(folder: Path, config: dict[str, Any], engine: FakeEngine) -> AsyncIterator[tuple[Process, aiohttp.ClientSession]]:
    process = Process(folder, config, engine)
    await process.start()
    try:
        async with aiohttp.ClientSession() as session:
            await process.until_ready(session)
            yield process, session
    finally:
        if process.process.returncode is None:
            process.process.kill()
        await process.process.wait()


async def test_sigterm_ends_the_process_after_its_last_request(tmp_path: Path, engine: FakeEngine) -> None:
    gate = asyncio.Event()
    engine.replies = [stream_of(*chat_events("a", "b"), gate=gate)]
    async with running(tmp_path, make_config(), engine) as (process, session):
        request = asyncio.create_task(process.ask(session, "hello", stream=True))
        while not engine.requests:  # noqa: ASYNC110 - another process does what is waited for
            await asyncio.sleep(0.01)
        process.process.send_signal(signal.SIGTERM)
        while not request.done():
            gate.set()
            await asyncio.sleep(0.02)
        assert b"[DONE]" in await request
        async with asyncio.timeout(10):
            assert await process.process.wait() == 0


async def test_a_process_without_its_secrets_does_not_start(tmp_path: Path, engine: FakeEngine) -> None:
    Process(tmp_path, make_config(), engine)
    (tmp_path / "secrets" / "feedback-key").unlink()
    settings = Settings(config_path=tmp_path / "config.json", secrets_path=tmp_path / "secrets", data_path=tmp_path)
    assert await run(settings) == 1


async def test_what_was_captured_survives_a_crash(tmp_path: Path, engine: FakeEngine) -> None:
    drift = {"size": 30, "horizonDays": 1e-9, "mixOverSeconds": 0}
    async with running(tmp_path, make_config(drift=drift), engine) as (process, session):
        async with asyncio.timeout(20):
            while not has_reference(await process.state(session)):
                await process.ask(session, f"text {random.random()}")
        await asyncio.sleep(0.5)  # one batch's time
        captured = (await process.state(session)).capture.captured
        process.process.kill()
        await process.process.wait()
    async with running(tmp_path, make_config(drift=drift), engine) as (process, session):
        url = f"http://127.0.0.1:{process.internal_port}/internal/labels?limit=9999"
        response = await session.get(url, headers={"x-tuneloop-token": "t"})
        assert len((await response.text()).splitlines()) >= captured > 0


def synthetic_tweets(rows: int, seed: int = 7) -> list[str]:
    """Short posts with a skewed vocabulary, hash tags, names, links, numbers and now and then personal data."""
    rng = random.Random(seed)
    words = [f"{rng.choice('bcdfgklmnprstvw')}{rng.choice('aeiou')}{rng.choice('bdglmnrst')}{i % 97:x}" for i in range(3000)]
    weights = [1 / (i + 3) for i in range(len(words))]
    extras = ["#love", "@someone", "http://t.co/{0}", "lol", "!!!", ":)", "{0}", "me{0}@mail.example", "+1 555 010 {0}"]
    texts = []
    for i in range(rows):
        text = rng.choices(words, weights, k=rng.randint(4, 22))
        text.insert(rng.randrange(len(text)), rng.choice(extras).format(1000 + rng.randrange(9000)))
        texts.append(" ".join(text) + f" {i}")
    return texts


def tweets(rows: int) -> list[str]:
    """The demo's tweets where its package is at hand, else made-up ones."""
    data = pytest.importorskip("dev.demo.data")
    packages = pytest.importorskip("dev.demo.packages")
    package = packages.packages_folder() / packages.TEXTS.file
    if not package.exists():
        return synthetic_tweets(rows)
    texts = [row.text for row in data.read_corpus(package).tweets]
    random.Random(7).shuffle(texts)
    return texts[:rows]


async def send(process: Process, session: aiohttp.ClientSession, texts: Sequence[str]) -> None:
    """Eight at a time."""

    async def worker(queue: Iterable[str]) -> None:
        for text in queue:
            await process.ask(session, text)

    queue = iter(texts)
    await asyncio.gather(*(worker(queue) for _ in range(8)))


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_two_processes_account_for_every_request_and_lose_none_at_their_end(store: str, tmp_path: Path, engine: FakeEngine) -> None:
    async with running(tmp_path, make_config(), engine) as (one, session), running(tmp_path, make_config(), engine) as (two, _):
        await asyncio.gather(*(process.ask(session, "hello", stream=n % 2 == 0) for process in (one, two) for n in range(50)))
        for process in (one, two):
            process.process.send_signal(signal.SIGTERM)
        assert [await process.process.wait() for process in (one, two)] == [0, 0]
    database = Database(database_url(tmp_path / "url", tmp_path), "team/tweets")
    (row,) = await Ledger(database).report("2020-01-01", "2999-12-31", lambda _: None)
    assert (row.requests, row.failed, row.prompt_tokens, row.completion_tokens) == (100, 0, 700, 300)
    await database.close()


@pytest.mark.long
@pytest.mark.parametrize("personal_data", ["Redact", "Keep"])
async def test_a_thousand_held_out_requests_of_the_domain_raise_no_alarm(tmp_path: Path, engine: FakeEngine, personal_data: str) -> None:
    drift = {"size": REFERENCE, "falseAlarmEveryRequests": 10_000, "horizonDays": 1e-9, "mixOverSeconds": 0}
    config = make_config(drift=drift, capture={"personalData": personal_data})
    texts = tweets(REFERENCE + HELD_OUT + 200)
    async with running(tmp_path, config, engine) as (process, session):
        sent = 0
        async with asyncio.timeout(120):
            while not has_reference(state := await process.state(session)):
                missing = max(REFERENCE - (state.drift.reference_rows if state.drift else 0), 1)
                await send(process, session, texts[sent : sent + missing])
                sent += missing
                await asyncio.sleep(0.05)
            await send(process, session, texts[sent : sent + HELD_OUT])
            while (state := await process.state(session)).capture.pending:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
    print(f"\n{personal_data}: {state.drift}")
    assert state.drift is not None
    assert state.drift.status is DriftStatus.MONITORING
    assert state.drift.pairs >= HELD_OUT
    assert state.drift.log_evidence < state.drift.log_threshold
    assert abs(state.drift.effect) < 0.1
