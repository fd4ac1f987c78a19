"""What each key has used of its requests and tokens a minute, for all replicas."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "allowances",
        sa.Column("subject", sa.String(64), primary_key=True),
        sa.Column("requests_until", sa.Double, nullable=False),
        sa.Column("tokens_until", sa.Double, nullable=False),
    )
