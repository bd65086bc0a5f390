"""Which schema this version needs, and which one a database has."""

import os
from pathlib import Path

import asyncpg
from sqlalchemy.exc import DBAPIError

from app.errors import StartRefused
from app.postgres.engine import Database

#: The newest revision in `migrations/`; a test keeps them equal. Known here, so that a start need not load
#: Alembic.
REVISION = "0011"

PROJECT = Path(__file__).parents[2]


async def current_revision(database: Database) -> str | None:
    """The revision that the database is at; None for one that was never migrated."""
    async with database.connection() as conn:
        try:
            revision: str | None = await conn.fetchval("SELECT version_num FROM chat.alembic_version")
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            return None
    return revision


async def require_revision(database: Database) -> None:
    revision = await current_revision(database)
    if revision != REVISION:
        raise StartRefused(
            f"the database is at schema revision {revision or 'none'}, this version needs {REVISION}",
            hint="run `chat-sessions migrate`, or `alembic upgrade head` with the same DATABASE_URL",
        )


def upgrade(database_url: str, revision: str = "head") -> None:
    """Brings a database to a revision. Blocking, and not for a running event loop: Alembic is both.

    Raises `StartRefused` where PostgreSQL or the database's own revision stands against it.
    """
    from alembic import command  # noqa: PLC0415 - 0.2 s that only a migration should pay
    from alembic.config import Config  # noqa: PLC0415 - see above
    from alembic.util import CommandError  # noqa: PLC0415 - see above

    config = Config(os.fspath(PROJECT / "alembic.ini"))
    # Keeps the logging of the process that called: alembic.ini's own is for its command line.
    config.config_file_name = None
    config.set_main_option("script_location", os.fspath(PROJECT / "migrations"))
    config.attributes["database_url"] = database_url
    try:
        command.upgrade(config, revision)
    except (CommandError, DBAPIError, OSError) as exc:
        cause = (exc.orig.__cause__ or exc.orig) if isinstance(exc, DBAPIError) and exc.orig else exc
        raise StartRefused(
            f"the schema was not upgraded: {cause}",
            hint="a revision is kept whole or not at all: settle this and run it again",
        ) from exc
