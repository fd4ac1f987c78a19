"""Sends a deployment the requests of the demo, and counts what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
from dev.demo.data import Row

CONCURRENCY = 16


@dataclass
class Outcome:
    """What a batch of requests gave."""

    asked: int = 0
    failed: int = 0
    right: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of the answers that equal the human label, failed requests counted as wrong."""
        return self.right / max(1, self.asked)


def send(url: str, model: str, rows: Sequence[Row], tick: Callable[[Outcome], None] | None = None) -> Outcome:
    """Asks for the sentiment of every row, `CONCURRENCY` at a time; `tick` is called about every five seconds."""
    return asyncio.run(_send(url, model, rows, tick))


async def _send(url: str, model: str, rows: Sequence[Row], tick: Callable[[Outcome], None] | None) -> Outcome:
    outcome, start, told = Outcome(), time.monotonic(), time.monotonic()
    waiting = iter(rows)

    async def worker(client: aiohttp.ClientSession) -> None:
        nonlocal told
        for row in waiting:
            await _ask(client, url, model, row, outcome)
            if tick and time.monotonic() - told >= 5:
                told = time.monotonic()
                await asyncio.to_thread(tick, outcome)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as client:
        await asyncio.gather(*(worker(client) for _ in range(CONCURRENCY)))
    outcome.seconds = time.monotonic() - start
    return outcome


async def _ask(client: aiohttp.ClientSession, url: str, model: str, row: Row, outcome: Outcome) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": row.text}], "max_tokens": 4, "temperature": 0}
    try:
        async with client.post(f"{url}/v1/chat/completions", json=body) as response:
            answer = await response.json(content_type=None)
            if response.status != 200:
                raise aiohttp.ClientError(f"{response.status} {answer}")
        outcome.right += answer["choices"][0]["message"]["content"].strip().lower() == row.label
    except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
        outcome.failed += 1
        outcome.errors.append(str(error)[:300])
    outcome.asked += 1


async def ask_once(url: str, model: str, text: str) -> tuple[str, dict[str, str]]:
    """One answer, and the headers that came with it."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
    async with aiohttp.ClientSession() as client, client.post(f"{url}/v1/chat/completions", json=body) as response:
        answer = await response.json()
        response.raise_for_status()
        return str(answer["choices"][0]["message"]["content"]).strip(), dict(response.headers)
