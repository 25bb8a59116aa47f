"""API tokens, clients without a public key, and one counter for the changes of both tables."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # SQLite can't alter a column: the table is copied, with its constraints.
    with op.batch_alter_table("clients") as clients:
        clients.alter_column("algorithm", existing_type=sa.String(16), nullable=True)
        clients.alter_column("public_key", existing_type=sa.Text, nullable=True)
        clients.alter_column("fingerprint", existing_type=sa.String(64), nullable=True)
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(8), primary_key=True),
        sa.Column("client_id", sa.String(64), sa.ForeignKey("clients.id"), nullable=False, index=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("models", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("expires_at", sa.DateTime),
        sa.Column("revoked_at", sa.DateTime),
        sa.Column("change", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table("changes", sa.Column("number", sa.BigInteger, nullable=False))
    op.execute("INSERT INTO changes (number) SELECT coalesce(max(change), 0) FROM clients")
