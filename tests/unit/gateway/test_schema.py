"""A database of any earlier release is brought up to date at start; one of a later release is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, select, text
from tests.unit.gateway.conftest import Start, eventually
from tests.unit.gateway.engines import FakeEngine

from tuneloop_gateway import capture as capture_module
from tuneloop_gateway.database import Database, Unavailable, captured, corrections, database_url, labels, metadata
from tuneloop_gateway.schema import MIGRATIONS

ON_BOTH_STORES = True
Open = Callable[[], Database]


@pytest.fixture
async def open_store(store: str, tmp_path: Path) -> AsyncIterator[Open]:
    """Each call is a gateway of its own on the same store."""
    opened: list[Database] = []

    def open_one() -> Database:
        opened.append(Database(database_url(tmp_path / "url", tmp_path), "team/tweets"))
        return opened[-1]

    yield open_one
    for database in opened:
        await database.close()


def config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


async def make_first_release(database: Database) -> None:
    """As its gateway left it: the first tables with a few rows, and nothing that says which migration they are of."""

    def make(connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(text('CREATE SCHEMA IF NOT EXISTS "team_tweets"'))
        command.upgrade(config(connection), "0001")
        connection.execute(text("DROP TABLE alembic_version"))
        for id_ in ("a", "b"):
            connection.execute(text(f"INSERT INTO captured VALUES ('{id_}', 1, 'r1', 1, 'text {id_}', 'yes', 'stop', 'subject-{id_}')"))
        for id_ in ("a", "gone"):
            connection.execute(text(f"INSERT INTO labels VALUES ('{id_}', 'd', 'text {id_}', 'x', 'train', '0', 1)"))
        connection.execute(text("INSERT INTO corrections VALUES ('b', 'rita', 'd', 'text b', 'no', true, 'train', '0', 1)"))

    async with database.engine.begin() as connection:
        await connection.run_sync(make)


async def test_the_migrations_lead_to_the_tables_that_the_code_uses(open_store: Open) -> None:
    database = open_store()
    async with database.begin() as connection:
        differences = await connection.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), metadata))
    assert differences == []


async def test_the_first_releases_database_keeps_its_rows_and_learns_who_asked(open_store: Open) -> None:
    await make_first_release(open_store())
    async with open_store().begin() as connection:
        assert [row.text for row in await connection.execute(select(captured).order_by(captured.c.id))] == ["text a", "text b"]
        assert dict([tuple(row) for row in await connection.execute(select(labels.c.id, labels.c.asked_by))]) == {
            "a": "subject-a",
            "gone": None,
        }
        assert (await connection.execute(select(corrections.c.asked_by))).scalars().all() == ["subject-b"]


async def test_replicas_that_start_at_once_migrate_once(open_store: Open) -> None:
    await make_first_release(open_store())
    replicas = [open_store() for _ in range(4)]

    async def count(database: Database) -> int:
        async with database.begin() as connection:
            return len((await connection.execute(select(captured))).all())

    assert await asyncio.gather(*map(count, replicas)) == [2] * 4


async def test_a_migration_that_fails_leaves_the_database_as_it_was(open_store: Open) -> None:
    old = open_store()
    await make_first_release(old)
    async with old.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE allowances (other integer)"))  # in the way of the last migration
    with pytest.raises(Unavailable):
        await asyncio.shield(_use(open_store()))
    async with old.engine.begin() as connection:
        columns = await connection.run_sync(_columns_of_labels)
        assert "asked_by" not in columns
        await connection.execute(text("DROP TABLE allowances"))
    await _use(open_store())


def _columns_of_labels(connection: Connection) -> set[str]:
    return set(connection.execute(text("SELECT * FROM labels")).keys())


async def _use(database: Database) -> None:
    async with database.begin() as connection:
        await connection.execute(select(labels))


async def test_a_later_releases_database_is_refused_with_a_sentence_and_not_touched(open_store: Open) -> None:
    database = open_store()
    await _use(database)
    async with database.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Unavailable, match=r"The database has schema 9999, which a newer gateway made; this one knows \d+ at most\."):
        await _use(open_store())
    async with database.begin() as connection:
        assert (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalars().all() == ["9999"]


async def test_with_a_later_releases_database_requests_are_answered_and_captures_counted_as_dropped(
    start: Start, engine: FakeEngine, open_store: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capture_module, "TRIES", 1)
    database = open_store()
    async with database.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    gateway = await start(endpoints={"svc": (engine.address,)})
    assert (await gateway.ask())[0] == 200
    await eventually(lambda: gateway.gateway.capture.report().dropped == 1)
    assert "Run that gateway's image again" in caplog.text


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_a_database_that_is_replaced_by_an_empty_one_gets_its_tables_again(open_store: Open) -> None:
    database = open_store()
    await _use(database)
    async with database.begin() as connection:
        await connection.execute(text('DROP SCHEMA "team_tweets" CASCADE'))
    with pytest.raises(Unavailable):
        await _use(database)
    await _use(database)


def test_migrations_are_a_line_with_one_end() -> None:
    scripts = ScriptDirectory(str(MIGRATIONS))
    revisions: list[Any] = list(scripts.walk_revisions())
    assert scripts.get_heads() == [f"{len(revisions):04}"]
