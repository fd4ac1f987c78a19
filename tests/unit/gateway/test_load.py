"""Not one failed request: the story of `bench.load`, told quickly."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.load import Timing, run_load
from tests.unit.gateway.postgresql import Server

pytestmark = [pytest.mark.process, pytest.mark.parametrize("store", ["postgresql"], indirect=True)]
QUICK = Timing(settle=0.2, endpoints=0, pre_stop=0.5, drain_delay=2, step=0.3, idle=0.5)


async def test_no_request_fails_through_all_that_ends_gateways_and_engines(tmp_path: Path, store: str, postgresql: Server) -> None:
    result = await run_load(postgresql.url, tmp_path, rate=60, timing=QUICK)
    assert (result["failed"], result["truncated"]) == (0, 0), result
    cut = {name: phase["cut"] for name, phase in result["phases"].items() if phase["cut"]}
    assert set(cut) <= {"kill -9 of an engine"}, "only what a killed engine had begun to stream may break"
    assert result["sent"] == sum(phase["answered"] for phase in result["phases"].values()) + result["cut"]
    assert all(phase["streamed"] for phase in result["phases"].values())
