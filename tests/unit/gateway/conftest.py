"""A gateway in the test's own loop: real servers on 127.0.0.1, a real SQLite file.

The tests of modules with `ON_BOTH_STORES = True` run on that and on a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import unused_port
from sqlalchemy.schema import DropSchema
from tests.unit.gateway.engines import FakeEngine
from tests.unit.gateway.postgresql import Missing, Server

from tuneloop_gateway.app import Gateway
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import DriftReport, GatewayConfig, GatewayState
from tuneloop_gateway.database import Database, database_url
from tuneloop_gateway.settings import Settings

TOKEN = "internal-secret"
INTERNAL = {"Authorization": f"Bearer {TOKEN}"}


def make_revision(name: str = "r1", service: str = "svc", **more: Any) -> dict[str, Any]:
    return {"name": name, "version": 1, "service": service, "modelId": f"id-{name}", "state": "Stable", "weight": 100, **more}


def make_config(*revisions: dict[str, Any], generation: int = 1, **more: Any) -> dict[str, Any]:
    own = {"generation": generation, "namespace": "team", "deployment": "tweets", "model": "sentiment"}
    return {**own, "revisions": list(revisions or (make_revision(),)), **more}


def on_sqlite_alone(test: Callable[..., Any]) -> Callable[..., Any]:
    """For a test that looks at SQLite itself, in a module whose others run on both stores."""
    test.on_sqlite_alone = True  # type: ignore[attr-defined]
    return test


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    both = getattr(metafunc.module, "ON_BOTH_STORES", False) and not hasattr(metafunc.function, "on_sqlite_alone")
    chosen = any("store" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if both and not chosen and "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs the server, so that `-m` can leave it out. Before pytest itself looks at `-m`."""
    for item in items:
        if isinstance(item, pytest.Function) and "store" in item.fixturenames and _store(item) == "postgresql":
            item.add_marker("postgresql")


def _store(item: pytest.Function) -> Any:
    return item.callspec.params.get("store") if hasattr(item, "callspec") else None


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A real server, started when first asked for."""
    server = Server()
    try:
        yield server.start()
    except Missing as missing:
        pytest.skip(str(missing))
    finally:
        server.remove()


@pytest.fixture
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store: a SQLite file in the test's folder, or a PostgreSQL whose URL lies there."""
    name = str(getattr(request, "param", "sqlite"))
    if name == "postgresql":
        server: Server = request.getfixturevalue("postgresql")
        (tmp_path / "url").write_text(server.url)
        database = Database(database_url(tmp_path / "url", tmp_path), "team/tweets")
        async with database.engine.begin() as connection:
            await connection.execute(DropSchema("team_tweets", cascade=True, if_exists=True))
        await database.close()
    return name


async def eventually(holds: Callable[[], object], seconds: float = 10) -> None:
    """Waits until it holds. Fails with TimeoutError."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what is waited for is in the code under test
            await asyncio.sleep(0.01)


@dataclass
class Running:
    """A started gateway and ways to talk to it."""

    gateway: Gateway
    folder: Path
    session: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.settings.public_port}"

    @property
    def internal_url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.settings.internal_port}"

    def chat(self, text: str = "hello", *, headers: Mapping[str, str] | None = None, **more: Any) -> Any:
        body = {"model": "sentiment", "messages": [{"role": "user", "content": text}], **more}
        return self.session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)

    async def ask(self, text: str = "hello", **more: Any) -> tuple[int, Any, Mapping[str, str]]:
        """(status, JSON, headers) of one request that is not streamed."""
        async with self.chat(text, **more) as response:
            return response.status, await response.json(), response.headers

    async def drift(self) -> DriftReport:
        """What it says of drift, once it says anything."""
        report = (await self.state()).drift
        assert report is not None
        return report

    async def state(self) -> GatewayState:
        async with self.session.get(f"{self.internal_url}/internal/state") as response:
            return GatewayState.model_validate_json(await response.read())

    async def metrics(self) -> str:
        async with self.session.get(f"{self.internal_url}/metrics") as response:
            return await response.text()

    def configure(self, config: dict[str, Any]) -> None:
        assert self.gateway.configuration.apply(GatewayConfig.model_validate(config))

    async def captured(self) -> None:
        """Waits until nothing is pending."""
        await self.gateway.capture.flush(30)
        assert self.gateway.capture.pending == 0


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start(tmp_path: Path, store: str) -> AsyncIterator[Start]:
    """`await start(config, endpoints)` starts a gateway; all are stopped at the end."""
    running: list[Running] = []

    async def start_one(
        config: dict[str, Any] | None = None, endpoints: Mapping[str, tuple[str, ...]] | None = None, keys: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Running:  # fmt: skip
        folder = tmp_path
        for name, content in (("engine-key", "engine-secret"), ("internal-token", TOKEN), ("feedback-key", "feedback-secret")):
            (folder / "secrets").mkdir(exist_ok=True)
            (folder / "secrets" / name).write_text(content + "\n")
        (folder / "keys").mkdir(exist_ok=True)
        for name, content in (keys or {}).items():
            (folder / "keys" / name).write_text(content)
        (folder / "config.json").write_text(json.dumps(config or make_config()))
        values: dict[str, Any] = {
            "config_path": folder / "config.json", "secrets_path": folder / "secrets", "keys_path": folder / "keys", "data_path": folder,
            "database_url_path": folder / "url", "host": "127.0.0.1", "public_port": unused_port(), "internal_port": unused_port(),
            "endpoints": endpoints, "pod_uid": "uid-1", "wait_seconds": 0.3, "drain_delay_seconds": 0.0, "drain_seconds": 2.0,
        }  # fmt: skip
        configuration = Configuration(folder / "config.json")
        assert configuration.load()
        gateway = Gateway(Settings(**{**values, **settings}), configuration)
        await gateway.start()
        running.append(Running(gateway, folder, aiohttp.ClientSession(auto_decompress=False)))
        return running[-1]

    yield start_one
    for one in running:
        await one.session.close()
        await one.gateway.stop()


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    fake = await FakeEngine().start()
    yield fake
    await fake.stop()


@pytest.fixture
async def second_engine() -> AsyncIterator[FakeEngine]:
    fake = await FakeEngine().start()
    yield fake
    await fake.stop()


@pytest.fixture
async def gateway(start: Start, engine: FakeEngine) -> Running:
    """One revision, one replica, no frills."""
    return await start(endpoints={"svc": (engine.address,)})
