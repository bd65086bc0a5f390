"""Which schema this version needs, which one a database has, and who owns its data."""

import os
from pathlib import Path
from secrets import token_hex

import asyncpg
from sqlalchemy.exc import DBAPIError

from app.coherence.ports import PROTOCOL, CacheState, Mode
from app.errors import StartRefused
from app.postgres.engine import Database
from app.postgres.rows import state_of

#: The newest revision in `migrations/`; a test keeps them equal. Known here, so that a start need not load
#: Alembic.
REVISION = "0001"

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


async def claim_state(database: Database, *, redis_only: bool | None) -> CacheState:
    """The state of the database's cache, seeded by the first start with the mode that it was given.

    Raises `StartRefused` where this process is set up for another mode or protocol: until a mode can be
    changed live, a flag that disagrees with the data would hide one part of it.
    """
    wanted: Mode = "redis-only" if redis_only else "hybrid"
    async with database.transaction() as conn:
        await conn.execute(
            "INSERT INTO chat.cache_state (protocol, epoch, mode, cache) VALUES ($1, $2, $3, 'on') "
            "ON CONFLICT ON CONSTRAINT cache_state_pkey DO NOTHING",
            PROTOCOL,
            token_hex(8),
            wanted,
        )
        record = await conn.fetchrow("SELECT protocol, epoch, mode, cache FROM chat.cache_state WHERE id = 1")
    if record is None:
        raise StartRefused(
            "chat.cache_state lost its only row while this process started", hint="start again"
        )
    state = state_of(record)
    if state.protocol != PROTOCOL:
        raise StartRefused(
            f"the database is served by coherence protocol {state.protocol}, this version speaks {PROTOCOL}",
            hint="run the same version everywhere",
        )
    if state.mode == "draining":
        raise StartRefused(
            "this database is in mode draining: its sessions are being taken over from Redis",
            hint="finish that with the version that began it",
        )
    if redis_only is not None and state.mode != wanted:
        raise StartRefused(
            f"REDIS_ONLY_MODE={str(bool(redis_only)).lower()} asks for mode {wanted}, "
            f"but this database is in mode {state.mode}",
            hint="set REDIS_ONLY_MODE to what the database says, or use another DATABASE_URL",
        )
    return state
