"""Where captured traffic is stored."""

from __future__ import annotations

from pathlib import Path

from tuneloop_gateway.database import Database, database_url, schema_of


def test_deployments_that_share_a_database_have_schemas_of_their_own() -> None:
    long = "n" * 63
    names = ["team/tweets", "team/mails", "other/tweets", f"{long}/{'a' * 52}", f"{long}/{'b' * 52}"]
    schemas = [schema_of(name) for name in names]
    assert len(set(schemas)) == len(names)
    assert max(map(len, schemas)) <= 63
    assert schemas[0] == "team_tweets"


def test_a_configured_url_gets_an_async_driver_and_no_url_means_a_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    assert database_url(file, tmp_path).database == str(tmp_path / "tuneloop.db")
    for url in ("postgres://u:p@db/x", "postgresql://u:p@db/x", "postgresql+asyncpg://u:p@db/x\n"):
        file.write_text(url)
        assert database_url(file, tmp_path).drivername == "postgresql+asyncpg"


async def test_the_tables_of_a_deployment_are_looked_for_in_its_schema(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:p@127.0.0.1:1/x")
    database = Database(database_url(tmp_path / "url", tmp_path), "team/my-tweets")
    assert database.search_path == '"team_my-tweets"'
    await database.close()
