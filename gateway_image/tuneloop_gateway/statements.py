"""Single statements on PostgreSQL as fast as its protocol allows: for what stands in the way of every request."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
from sqlalchemy.engine import URL

FAILURES: tuple[type[Exception], ...] = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
OF_SQLALCHEMY = ("prepared_statement_cache_size", "prepared_statement_name_func", "async_fallback", "async_creator_fn")
Row = Any  # asyncpg is not typed


class Connections:
    """A few connections of their own, so that nothing waits behind a long transaction. A failure closes the one it happened on."""

    def __init__(self, url: URL, search_path: str, seconds: float, most: int) -> None:
        arguments = url.get_dialect()().create_connect_args(url)[1]
        cached = arguments.get("prepared_statement_cache_size", 100)
        self._arguments: dict[str, Any] = {
            **{name: value for name, value in arguments.items() if name not in OF_SQLALCHEMY},
            "server_settings": {"search_path": search_path}, "statement_cache_size": cached, "timeout": seconds, "command_timeout": seconds,
        }  # fmt: skip
        self._seconds, self._most = seconds, most
        self._idle: list[Any] = []
        self._turn = asyncio.Semaphore(most)

    async def row(self, statement: str, *values: Any) -> Row | None:
        """The first row of one statement, which is a transaction of its own. Raises one of FAILURES."""
        async with asyncio.timeout(self._seconds), self._turn:
            connection = self._idle.pop() if self._idle else await asyncpg.connect(**self._arguments)
            try:
                found = await connection.fetchrow(statement, *values)
            except BaseException:
                connection.terminate()  # what it was doing is not known
                raise
            self._idle.append(connection)
            return found

    async def open(self) -> None:
        """All connections at once. Raises one of FAILURES."""
        await asyncio.gather(*(self.row("SELECT pg_sleep(0.01)") for _ in range(self._most)))

    def close(self) -> None:
        for connection in self._idle:
            connection.terminate()
        self._idle.clear()
