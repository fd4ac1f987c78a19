"""Requests nobody thought of, made from the gateway's own OpenAPI document, sent to its process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from tests.unit.gateway.conftest import make_config
from tests.unit.gateway.engines import FakeEngine
from tests.unit.gateway.test_process import running

pytestmark = pytest.mark.process

CHECKS: list[CheckFunction] = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection,
    unsupported_method,
]  # fmt: skip
REFUSED = SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": ["4xx"]}}})
"""413 as well: what is wrong may be large besides."""
DEADLINE_SECONDS = 60
"""Far above what a request takes: one that takes longer hangs."""
GROWTH_BYTES = 48 << 20


def fuzz(url: str, examples: int, number: int = 1) -> int:
    """Sends so many valid and so many invalid requests to each operation. Returns how many; raises what a check found."""
    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json", config=REFUSED)
    sent = 0
    for found in schema.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not found.ok().body:
                continue

            @seed(number)
            @settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
            @given(case=found.ok().as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                nonlocal sent
                sent += 1
                if isinstance(case.body, dict) and case.body.get("model"):
                    case.body["model"] = "sentiment"  # else nothing gets further than the name
                case.validate_response(case.call(timeout=DEADLINE_SECONDS), checks=CHECKS)

            send()
    return sent


async def test_whatever_the_document_allows_or_not_is_answered_as_it_says(tmp_path: Path, engine: FakeEngine) -> None:
    async with running(tmp_path, make_config(), engine) as (process, session):
        sent = await asyncio.to_thread(fuzz, f"http://127.0.0.1:{process.port}", 20)
        assert sent > 100
        assert engine.requests, "nothing came through to the engine"
        assert await process.ask(session, "still there?")


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_thousands_of_requests_leave_the_gateway_as_small_as_it_was(tmp_path: Path, engine: FakeEngine) -> None:
    async with running(tmp_path, make_config(), engine) as (process, session):
        url, memory = f"http://127.0.0.1:{process.port}", psutil.Process(process.process.pid).memory_info
        await asyncio.to_thread(fuzz, url, 100)
        before = memory().rss
        for number in range(2, 6):
            await asyncio.to_thread(fuzz, url, 200, number)
        assert memory().rss - before < GROWTH_BYTES
        assert await process.ask(session, "still there?")
