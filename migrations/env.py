"""Runs migrations in one transaction each, with bounded waits, on the database of DATABASE_URL."""

import asyncio
from logging.config import fileConfig

from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.errors import StartRefused
from app.postgres.engine import sqlalchemy_url
from app.postgres.tables import SCHEMA, metadata
from app.settings import migration_database_url

config = context.config

# A migration that waits for a lock blocks everybody who comes after it: better to fail and be run again.
LOCK_TIMEOUT = "4s"
STATEMENT_TIMEOUT = "60s"
TURN_TIMEOUT = "15min"


def run(connection: Connection) -> None:
    # Two that start together would both create the schema; the second one waits here for the whole of the
    # first one, which blocks nobody else.
    connection.execute(text(f"SET statement_timeout = '{TURN_TIMEOUT}'"))
    connection.execute(text("SELECT pg_advisory_lock(7311520260001)"))
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"))
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    connection.commit()
    # An account that is called like the schema has it first in its search path, and Alembic would take its
    # tables for those of the default schema.
    connection.dialect.default_schema_name = "public"
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table_schema=SCHEMA,
        include_schemas=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_with_engine() -> None:
    try:
        url = config.attributes.get("database_url") or migration_database_url()
    except StartRefused as exc:
        raise SystemExit(str(exc)) from exc
    engine = create_async_engine(sqlalchemy_url(url), poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()


if context.is_offline_mode():
    raise SystemExit("migrations need a database: set DATABASE_URL and leave out --sql")
if config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)
asyncio.run(run_with_engine())
