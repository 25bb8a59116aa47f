"""Runs the migrations on the connection, and in the transaction, of `gateway.store.Store.open`."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
