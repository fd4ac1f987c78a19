"""The tables of the first release. Databases older than these migrations have them already."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "captured",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("captured_at", sa.Double, nullable=False),
        sa.Column("revision", sa.String(253), nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.String(32), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False),
        if_not_exists=True,
    )
    op.create_index("ix_captured_captured_at", "captured", ["captured_at"], if_not_exists=True)
    op.create_table(
        "feedback",
        sa.Column("response_id", sa.String(64), primary_key=True),
        sa.Column("subject", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("value", sa.Integer, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("reviewer", sa.Boolean, nullable=False),
        sa.Column("epoch", sa.String(64), nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        if_not_exists=True,
    )
    op.create_index("ix_feedback_updated_at", "feedback", ["updated_at"], if_not_exists=True)
    op.create_table(
        "labels",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("document", sa.String(256), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("split", sa.String(8), nullable=False),
        sa.Column("epoch", sa.String(64), nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "corrections",
        sa.Column("response_id", sa.String(64), primary_key=True),
        sa.Column("subject", sa.String(64), primary_key=True),
        sa.Column("document", sa.String(256), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("correction", sa.Text, nullable=False),
        sa.Column("reviewer", sa.Boolean, nullable=False),
        sa.Column("split", sa.String(8), nullable=False),
        sa.Column("epoch", sa.String(64), nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        if_not_exists=True,
    )
    op.create_index("corrections_by_document", "corrections", ["document"], if_not_exists=True)
    op.create_table(
        "drift_state",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("owner", sa.String(64)),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.Column("meta", sa.Text),
        if_not_exists=True,
    )
    op.create_table(
        "drift_parts",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
        if_not_exists=True,
    )
