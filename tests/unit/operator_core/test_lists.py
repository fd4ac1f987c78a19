"""What is listed before anything is watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.errors import NotFound
from tuneloop_operator.runtime import lists
from tuneloop_operator.runtime.lists import prime
from tuneloop_operator.settings import Settings


class Server:
    """Serves nothing."""

    def __init__(self) -> None:
        self.settings, self.cache, self.unserved = Settings(), Cache(), set[str]()

    async def pages(self, kind: str, *_: Any) -> AsyncIterator[Any]:
        raise NotFound(404, "404", "404 page not found")
        yield


def test_kind_of_somebody_else_that_is_not_installed_is_done_without() -> None:
    server = Server()
    asyncio.run(prime(cast(Cluster, server), ("JobSet",)))
    assert server.unserved == {"JobSet"}


def test_own_kind_that_is_not_installed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "RETRY_SECONDS", 0.01)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(prime(cast(Cluster, Server()), ("FineTuneJob",)), 0.1))
