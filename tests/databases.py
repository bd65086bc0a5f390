"""Databases of a test's own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg

from app.postgres.engine import Database
from app.postgres.schema import upgrade
from tests.servers import Servers


@asynccontextmanager
async def new_database(servers: Servers, name: str) -> AsyncIterator[str]:
    """An empty database, dropped at the end."""
    admin = await asyncpg.connect(servers.database_url)
    try:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        yield urlsplit(servers.database_url)._replace(path=f"/{name}").geturl()
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@asynccontextmanager
async def taken_away(servers: Servers, name: str) -> AsyncIterator[None]:
    """An outage of a database of `new_database`: nobody can reach it until the end of the block."""
    admin = await asyncpg.connect(servers.database_url)
    try:
        await admin.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        await admin.execute(f"ALTER DATABASE {name} RENAME TO {name}_away")
        try:
            yield
        finally:
            await admin.execute(f"ALTER DATABASE {name}_away RENAME TO {name}")
    finally:
        await admin.close()


async def migrate(url: str, revision: str = "head") -> None:
    """In a thread: Alembic runs an event loop of its own."""
    await asyncio.to_thread(upgrade, url, revision)


_TABLES = ("chat_sessions", "chat_messages", "chat_turns", "cache_state", "instances")
# Last: what is deleted above leaves marks.
_ROLLUPS = (
    *("sessions", "times", "latencies", "latency_days", "session_days", "session_histograms", "user_days"),
    *(
        "users",
        "lifecycles",
        "visits",
        "retention",
        "sources",
        "source_days",
        "source_again",
        "gone",
        "dirty",
        "set_aside",
        "state",
    ),
)


async def empty(database: Database) -> None:
    """By DELETE: a TRUNCATE makes new files for every partition, which takes longer than most tests."""
    async with database.connection() as conn:
        tables = [*_TABLES, *(f"rollup_{table}" for table in _ROLLUPS)]
        await conn.execute("; ".join(f"DELETE FROM chat.{table}" for table in tables))
        await conn.execute("INSERT INTO chat.rollup_state DEFAULT VALUES")


async def shrink(database: Database) -> None:
    """Takes back the pages that deleted rows have left, for who looks at plans."""
    async with database.connection() as conn:
        await conn.execute("TRUNCATE chat.chat_sessions, chat.chat_messages, chat.chat_turns")


async def forget_state(database: Database) -> None:
    """As before the first start: whoever starts now claims it, and need wait for nobody."""
    async with database.connection() as conn:
        await conn.execute("TRUNCATE chat.cache_state")
