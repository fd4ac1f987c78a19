"""Curated rows remember who asked, so that a subject's rows are found when the raw row is long gone."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for table, key in (("labels", "id"), ("corrections", "response_id")):
        op.add_column(table, sa.Column("asked_by", sa.String(64)))
        op.create_index(f"ix_{table}_asked_by", table, ["asked_by"])
        op.create_index(f"ix_{table}_updated_at", table, ["updated_at"])
        op.execute(f"UPDATE {table} SET asked_by = (SELECT subject FROM captured WHERE captured.id = {table}.{key})")
    op.create_index("ix_captured_subject", "captured", ["subject"])
    op.create_index("ix_feedback_subject", "feedback", ["subject"])
