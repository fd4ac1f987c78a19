"""What is listed before anything is watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.errors import Forbidden, NotFound
from tuneloop_operator.cluster.kinds import KINDS
from tuneloop_operator.runtime import lists
from tuneloop_operator.runtime.lists import prime
from tuneloop_operator.settings import Settings


class Server:
    """Serves nothing, but what `discovered` has; and of that it lists nothing."""

    def __init__(self, *discovered: str) -> None:
        self.settings, self.cache, self.unserved = Settings(), Cache(), set[str]()
        self.discovered = discovered

    async def serves(self, kind: str) -> bool:
        return kind in self.discovered

    async def pages(self, kind: str, *_: Any) -> AsyncIterator[Any]:
        if KINDS[kind].is_optional:  # authorisation comes before everything else
            raise Forbidden(403, "Forbidden", f'cannot list resource "{kind}"')
        raise NotFound(404, "404", "404 page not found")
        yield


def test_kind_of_somebody_else_that_is_not_installed_is_done_without() -> None:
    server = Server()
    asyncio.run(prime(cast(Cluster, server), ("JobSet",)))
    assert server.unserved == {"JobSet"}


def test_kind_of_somebody_else_that_may_not_be_listed_is_done_without_and_told(caplog: pytest.LogCaptureFixture) -> None:
    server = Server("ScaledObject")
    asyncio.run(prime(cast(Cluster, server), ("JobSet", "ScaledObject")))
    assert server.unserved == {"JobSet", "ScaledObject"}
    assert "cannot list ScaledObject" in caplog.text
    assert "JobSet" not in caplog.text


def test_own_kind_that_is_not_installed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "RETRY_SECONDS", 0.01)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(prime(cast(Cluster, Server()), ("FineTuneJob",)), 0.1))
