"""What a client may have of the fleet: its weight among the others, and how many of its requests run at once."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("clients", sa.Column("weight", sa.Float, nullable=False, server_default="1"))
    op.add_column("clients", sa.Column("running_max", sa.Integer, nullable=False, server_default="0"))
