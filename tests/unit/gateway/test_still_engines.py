"""An engine that stands still while requests wait is told by its `/health`; a busy, idle or loading one never is."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tuneloop_gateway.engine_guard import Guard

HEADERS = [(b"authorization", b"Bearer the-key")]
BODY = {"type": "http.request", "body": b"{}", "more_body": False}


class Engine:
    """vLLM's metrics as they stand, and requests that are answered when the test says so; the clock is the test's."""

    def __init__(self, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        key_file.write_text("the-key")
        monkeypatch.setenv("TUNELOOP_ENGINE_KEY_FILE", str(key_file))
        self.now = 1000.0
        # The gauges are written after a step: 0 where the first one hangs.
        self.metrics = dict.fromkeys(
            ("num_requests_running", "kv_cache_usage_perc", "iteration_tokens_total_count", "admission_rejections_total"), 0.0
        )
        self.looked = 0
        self.guard = Guard(self._app, lambda: self.now)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/metrics":
            self.looked += 1
            lines = [f'vllm:{name}{{engine="0",model_name="m"}} {value}' for name, value in self.metrics.items()]
            await _say(send, "\n".join(["# HELP vllm:x of vLLM", *lines, f"process_cpu_seconds_total {self.now}", ""]).encode())
        elif scope["path"] == "/health":
            await _say(send, b"")
        else:
            await scope["served"](receive, send)

    async def health(self) -> int:
        return await self._ask("GET", "/health")

    async def _ask(self, method: str, path: str) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await self.guard({"type": "http", "method": method, "path": path, "headers": []}, _never, send)
        return int(sent[0]["status"])

    @asynccontextmanager
    async def request(self, served: Callable[[Any, Any], Any], receive: Any = None, send: Any = None) -> AsyncIterator[None]:
        """A request that is there for the time of the block, and given up then."""
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": HEADERS, "served": served}
        task = asyncio.ensure_future(self.guard(scope, receive or _body, send or _drop))
        await _turn()
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def watch(self, seconds: float, *moves: str) -> list[int]:
        """What `/health` says every 2 s, as the readiness probe asks; the named metrics move meanwhile."""
        said = []
        for _ in range(int(seconds / 2)):
            self.now += 2
            for name in moves:
                self.metrics[name] += 0.001
            said.append(await self.health())
            await _turn()
        return said


async def _turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def _body() -> Any:
    return BODY


async def _never() -> Any:
    await asyncio.Event().wait()


async def _drop(message: Any) -> None:
    pass


async def _say(send: Any, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def _hangs(receive: Any, send: Any) -> None:
    await receive()
    await asyncio.Event().wait()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(tmp_path / "engine-key", monkeypatch)


async def test_an_engine_whose_first_step_hangs_is_told_after_45_seconds_and_before_60(engine: Engine) -> None:
    assert set(await engine.watch(600)) == {200}
    async with engine.request(_hangs):
        said = await engine.watch(90)
    assert 45 <= 2 * said.index(503) + 2 <= 60
    assert set(said[said.index(503) :]) == {503}


async def test_one_that_hangs_in_the_middle_of_its_work_is_told_too(engine: Engine) -> None:
    async with engine.request(_hangs):
        assert set(await engine.watch(120, "iteration_tokens_total_count", "kv_cache_usage_perc")) == {200}
        said = await engine.watch(90)
    assert 45 <= 2 * said.index(503) + 2 <= 60


@pytest.mark.parametrize("moves", ["iteration_tokens_total_count", "kv_cache_usage_perc"])
async def test_a_busy_one_is_left_alone_for_ten_minutes_of_one_answer_or_one_long_prompt(engine: Engine, moves: str) -> None:
    async with engine.request(_hangs):
        assert set(await engine.watch(600, moves)) == {200}


async def test_a_step_of_44_seconds_is_none_that_hangs(engine: Engine) -> None:
    async with engine.request(_hangs):
        for _ in range(10):
            assert set(await engine.watch(42)) == {200}
            assert await engine.watch(2, "iteration_tokens_total_count") == [200]


async def test_requests_that_are_refused_for_a_full_queue_do_not_make_it_look_busy(engine: Engine) -> None:
    async with engine.request(_hangs):
        assert 503 in await engine.watch(60, "admission_rejections_total")


async def test_an_engine_that_goes_on_is_healthy_again(engine: Engine) -> None:
    async with engine.request(_hangs):
        assert (await engine.watch(60))[-1] == 503
        assert (await engine.watch(10, "iteration_tokens_total_count"))[-1] == 200


async def test_one_whose_clients_give_up_after_30_seconds_is_told_all_the_same(engine: Engine) -> None:
    said = []
    for _ in range(3):
        async with engine.request(_hangs):
            said += await engine.watch(30)
    assert 503 in said
    assert (await engine.watch(20))[-1] == 503


async def test_clients_that_come_and_go_leave_an_idle_one_in_peace(engine: Engine) -> None:
    for _ in range(20):
        async with engine.request(_hangs):
            engine.now += 1
        assert set(await engine.watch(20)) == {200}
    async with engine.request(_hangs):
        await engine.watch(12, "iteration_tokens_total_count")
    assert set(await engine.watch(10, "iteration_tokens_total_count")) == {200}
    assert set(await engine.watch(300)) == {200}


async def test_one_who_left_before_the_engine_began_says_nothing_of_an_idle_one(engine: Engine) -> None:
    async with engine.request(_hangs):  # its grammar is compiled, or its image fetched: nothing moves
        await engine.watch(12)
    assert set(await engine.watch(120)) == {200}
    async with engine.request(_hangs):
        assert set(await engine.watch(6)) == {200}, "the next one has only begun"


async def test_a_slow_reader_is_not_the_engines_fault(engine: Engine) -> None:
    async def streams(receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1", "more_body": True})

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async with engine.request(streams, send=stuck):
        assert set(await engine.watch(300)) == {200}


async def test_a_stream_that_stops_in_its_middle_is(engine: Engine) -> None:
    async def streams(receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1", "more_body": True})
        await asyncio.Event().wait()

    async with engine.request(streams):
        assert 503 in await engine.watch(60)


async def test_a_body_that_does_not_arrive_is_not_the_engines_fault(engine: Engine) -> None:
    async def reads(receive: Any, send: Any) -> None:
        while True:
            await receive()

    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def slow() -> Any:
        for part in parts:
            return part
        await asyncio.Event().wait()

    async with engine.request(reads, receive=slow):
        assert set(await engine.watch(300)) == {200}


async def test_an_answered_request_leaves_nothing_behind(engine: Engine) -> None:
    async def answers(receive: Any, send: Any) -> None:
        await receive()
        await _say(send, b"{}")

    async with engine.request(answers):
        pass
    assert set(await engine.watch(300)) == {200}


@pytest.mark.parametrize("missing", ["iteration_tokens_total_count", None])
async def test_without_its_metrics_nothing_is_said_against_an_engine(engine: Engine, missing: str | None) -> None:
    if missing is None:
        engine.metrics = None  # type: ignore[assignment]
    else:
        del engine.metrics[missing]
    async with engine.request(_hangs):
        assert set(await engine.watch(300)) == {200}


async def test_metrics_are_read_no_more_than_every_5_seconds(engine: Engine) -> None:
    await engine.watch(60)
    assert 8 <= engine.looked <= 12


# --- a process -------------------------------------------------------------------

SERVER = """
import asyncio, sys
import prometheus_client, uvicorn
from tuneloop_gateway import engine_guard
engine_guard.STILL_SECONDS, engine_guard.LOOK_SECONDS, engine_guard.GIVEN_UP_SECONDS = 1.0, 0.1, 0.2
steps = prometheus_client.Histogram("vllm:iteration_tokens_total", "Of each step.")
metrics = prometheus_client.make_asgi_app()
async def engine(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/metrics":
        return await metrics(scope, receive, send)
    if scope["path"] == "/v1/chat/completions":
        await receive()
        for _ in range(20):
            await asyncio.sleep(0.1)
            steps.observe(1)
        await asyncio.Event().wait()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})
uvicorn.run(engine_guard.Guard(engine), fd=int(sys.argv[1]), log_level="error", lifespan="off")
"""


@pytest.mark.process
async def test_in_a_process_a_request_is_served_for_long_and_then_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("the-key")
    monkeypatch.setenv("TUNELOOP_ENGINE_KEY_FILE", str(tmp_path / "key"))
    clock = asyncio.get_running_loop().time
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url, number = f"http://127.0.0.1:{listener.getsockname()[1]}", listener.fileno()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(number), pass_fds=[number])
    try:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer the-key"}) as session, asyncio.timeout(30):
            assert await _health(session, url) == 200
            began, hanging = clock(), asyncio.ensure_future(_chat(session, url))
            while await _health(session, url) == 200:
                await _turn()
            # Two seconds of steps, and one of none.
            assert 2.5 < clock() - began < 10
            assert not hanging.done()
            hanging.cancel()
    finally:
        process.kill()
        await process.wait()


async def _health(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(f"{url}/health") as response:
        return response.status


async def _chat(session: aiohttp.ClientSession, url: str) -> None:
    async with session.post(f"{url}/v1/chat/completions", json={}) as response:
        await response.read()
