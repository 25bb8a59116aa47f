"""Names that stand for models."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(512), primary_key=True),
        sa.Column("target", sa.String(512), nullable=False),
        sa.Column("previous", sa.String(512)),
    )
