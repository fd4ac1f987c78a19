"""The capture database: its tables, and one bounded way to use it that never takes the process down."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, String, Table, Text, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tuneloop_gateway.schema import Newer, upgrade
from tuneloop_gateway.statements import Connections

logger = logging.getLogger(__name__)
SECONDS = 8.0
"""No operation takes longer."""
MIGRATION_SECONDS = 600.0

metadata = MetaData()
"""As the newest migration leaves them (a test compares)."""

captured = Table(
    "captured",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("captured_at", Double, nullable=False, index=True),
    Column("revision", String(253), nullable=False),
    Column("version", Integer),
    Column("text", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("finish_reason", String(32), nullable=False),
    Column("subject", String(64), nullable=False, index=True),
)
feedback = Table(
    "feedback",
    metadata,
    Column("response_id", String(64), primary_key=True),
    Column("subject", String(64), primary_key=True, index=True),
    Column("kind", String(16), primary_key=True),
    Column("value", Integer, nullable=False),
    Column("text", Text),
    Column("reviewer", Boolean, nullable=False),
    Column("epoch", String(64), nullable=False),
    Column("updated_at", Double, nullable=False, index=True),
)
"""value: 1 up, -1 down, 0 neither."""
labels = Table(
    "labels",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("document", String(256), nullable=False),
    Column("text", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("split", String(8), nullable=False),
    Column("epoch", String(64), nullable=False),
    Column("updated_at", Double, nullable=False, index=True),
    Column("asked_by", String(64), index=True),
)
"""asked_by: the subject whose request it was; None where the label is older than that column and the raw row was gone."""
corrections = Table(
    "corrections",
    metadata,
    Column("response_id", String(64), primary_key=True),
    Column("subject", String(64), primary_key=True),
    Column("document", String(256), nullable=False),
    Column("text", Text, nullable=False),
    Column("correction", Text, nullable=False),
    Column("reviewer", Boolean, nullable=False),
    Column("split", String(8), nullable=False),
    Column("epoch", String(64), nullable=False),
    Column("updated_at", Double, nullable=False, index=True),
    Column("asked_by", String(64), index=True),
    Index("corrections_by_document", "document"),
)
"""subject: who corrects; asked_by: whose request it was."""
drift_state = Table(
    "drift_state",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("owner", String(64)),
    Column("lease_until", Double, nullable=False),
    Column("meta", Text),
)
"""One row: which replica of the gateway runs the detector, and what it found."""
drift_parts = Table(
    "drift_parts",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

allowances = Table(
    "allowances",
    metadata,
    Column("subject", String(64), primary_key=True),
    Column("requests_until", Double, nullable=False),
    Column("tokens_until", Double, nullable=False),
)
"""What each key has used of its minute: the times (the server's) from which on it has all of it again."""

usage = Table(
    "usage",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("subject", String(64), primary_key=True),
    Column("writer", String(32), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)
"""Of one process each: it writes what it counted of a day in all, so that writing it twice changes nothing. The sum over writers counts."""


class Unavailable(Exception):
    """The database did not do it; the message names the error's class, never its parameters."""


def database_url(url_file: Path, data_path: Path) -> URL:
    """The configured URL with an async driver, or SQLite in the data folder."""
    try:
        url = make_url(url_file.read_text().strip())
    except FileNotFoundError:
        return URL.create("sqlite+aiosqlite", database=str(data_path / "tuneloop.db"))
    drivers = {"postgres": "postgresql+asyncpg", "postgresql": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite"}
    return url.set(drivername=drivers.get(url.drivername, url.drivername))


def schema_of(deployment: str) -> str:
    """A PostgreSQL name (63 bytes) for `<namespace>/<name>`; both are made of letters, digits, hyphens and dots."""
    name = deployment.replace("/", "_")
    return name if len(name) <= 63 else f"{name[:46]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class Database:
    """Connections, opened when first needed and again after any failure. The tables are made, or brought up to date, before the first use.

    On PostgreSQL they lie in a schema of the deployment's own, so that several deployments may share one database.
    """

    def __init__(self, url: URL, deployment: str, *, seconds: float = SECONDS) -> None:
        self._sqlite, self._seconds = url.get_backend_name() == "sqlite", seconds
        self._schema = schema_of(deployment)
        self.search_path = f'"{self._schema}"'
        arguments: dict[str, Any] = {"timeout": 2.0} if self._sqlite else {"timeout": 5.0, "command_timeout": seconds}
        pool: dict[str, Any] = {} if self._sqlite else {"pool_size": 3, "max_overflow": 2, "pool_timeout": 3, "pool_pre_ping": True}
        self.engine = self._open(url, arguments, pool)
        # A migration may take longer than any other operation.
        self._for_migrations = self._open(url, {"timeout": 5.0}, {"poolclass": NullPool})
        self._ready = False
        self._making: asyncio.Task[None] | None = None
        # SQLite has one writer; waiting for it here is cheaper and fairer than its own busy loop.
        self._turn: asyncio.Lock | asyncio.Semaphore = asyncio.Lock() if self._sqlite else asyncio.Semaphore(5)

    @property
    def is_shared(self) -> bool:
        """Other replicas may use it too."""
        return not self._sqlite

    def _open(self, url: URL, arguments: dict[str, Any], pool: dict[str, Any]) -> AsyncEngine:
        if not self._sqlite:
            arguments = {**arguments, "server_settings": {"search_path": self.search_path}}
        engine = create_async_engine(url, connect_args=arguments, **pool)
        if self._sqlite:
            event.listen(engine.sync_engine, "connect", _set_pragmas)
        return engine

    def beside(self, seconds: float, connections: int) -> Connections:
        """For what may not wait behind anything else. PostgreSQL alone."""
        return Connections(self.engine.url, self.search_path, seconds, connections)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """A transaction. Raises Unavailable for whatever goes wrong with the database."""
        try:
            async with asyncio.timeout(self._seconds), self._turn:
                await self.prepare()
                async with self.engine.begin() as connection:
                    yield connection
        except ProgrammingError as error:
            self.look_again()
            raise Unavailable(f"{type(error.orig or error).__name__}") from error
        except Newer as error:
            raise Unavailable(str(error)) from error
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            cause = getattr(error, "orig", None) or error
            raise Unavailable(f"{type(cause).__name__}") from error

    def look_again(self) -> None:
        """Somebody put another database in its place: before the next use the tables are made again."""
        self._ready = False

    async def prepare(self) -> None:
        """Returns once the tables are those of this release. Who gives up waiting does not stop a migration that runs."""
        if self._ready:
            return
        if self._making is None:
            self._making = asyncio.create_task(self._make())
            self._making.add_done_callback(self._made)
        await asyncio.shield(self._making)

    async def _make(self) -> None:
        async with asyncio.timeout(MIGRATION_SECONDS), self._for_migrations.begin() as connection:
            await connection.run_sync(upgrade, self._schema)

    def _made(self, task: asyncio.Task[None]) -> None:
        self._making = None
        self._ready = not task.cancelled() and task.exception() is None
        if self._ready:
            logger.info("The capture database is ready.")

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """While SQLite is in no transaction: one that is cancelled half-way keeps its lock for seconds."""
        async with self._turn:
            yield

    async def close(self) -> None:
        """A migration that is not done is undone, and left to the next to come."""
        if self._making is not None:
            self._making.cancel()
            await asyncio.wait((self._making,), timeout=self._seconds)
        await self.engine.dispose()
        await self._for_migrations.dispose()


def _set_pragmas(connection: Any, _: Any) -> None:
    """Readers do not wait for the writer, and a commit costs no disk flush (a power cut may cost the last seconds)."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=2000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def upsert(connection: AsyncConnection, table: Table) -> Any:
    """An INSERT that replaces the row of the same primary key."""
    statement = _insert(connection, table)
    keys = [c.name for c in table.primary_key]
    new = {c.name: statement.excluded[c.name] for c in table.columns if c.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=new)


def insert_unless_there(connection: AsyncConnection, table: Table) -> Any:
    """An INSERT that does nothing (row count 0) where there is a row of the same primary key."""
    return _insert(connection, table).on_conflict_do_nothing(index_elements=[c.name for c in table.primary_key])


def _insert(connection: AsyncConnection, table: Table) -> Any:
    """Both dialects spell it alike, in different modules."""
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert

        return sqlite_insert(table)
    from sqlalchemy.dialects.postgresql import insert as postgresql_insert

    return postgresql_insert(table)
