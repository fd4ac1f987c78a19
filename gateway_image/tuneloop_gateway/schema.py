"""Brings the capture database to the tables of this release: alembic's migrations, by one process at a time.

A migration adds; it changes nothing that the release before reads or writes. While replicas are replaced both run on one database.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateSchema

logger = logging.getLogger(__name__)
MIGRATIONS = Path(__file__).parent / "migrations"


class Newer(Exception):
    """A later release made the tables; the message says what to do."""


def upgrade(connection: Connection, schema: str) -> None:
    """Within the caller's transaction: all migrations that are missing, or none. Raises Newer."""
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    _wait_for_turn(connection, schema)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    found = MigrationContext.configure(connection).get_current_revision()
    head = scripts.get_current_head()
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise Newer(
            f"The database has schema {found}, which a newer gateway made; this one knows {head} at most. "
            "Run that gateway's image again, or give this one another database."
        )
    if found != head:
        command.upgrade(config, "head")
        logger.info("The capture database went from schema %s to %s.", found or "none", head)


def _wait_for_turn(connection: Connection, schema: str) -> None:
    """Replicas that start at once come one after another, until the end of the transaction."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    key = int.from_bytes(hashlib.sha256(schema.encode()).digest()[:8], signed=True)
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
    connection.execute(CreateSchema(schema, if_not_exists=True))
