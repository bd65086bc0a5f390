"""Partitions of `chat.chat_messages`: one a month of session ids, made ahead of time.

A partition is made as a table of its own and then attached: attaching takes no lock that a reader or a
writer of the other months would wait for.
"""

from datetime import date

import asyncpg

from app.chat import LEGACY_MONTH
from app.postgres.engine import Database

#: Whoever makes partitions holds this advisory lock, for one transaction.
_LOCK = 7311520260002

#: How far ahead: a service whose maintenance failed goes on for so many months.
MONTHS_AHEAD = 3


def next_month(month: date) -> date:
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)


def months_from(month: date, count: int) -> list[date]:
    """`month` and the `count` after it."""
    months = [month.replace(day=1)]
    for _ in range(count):
        months.append(next_month(months[-1]))
    return months


def partition_name(month: date) -> str:
    return "chat_messages_legacy" if month == LEGACY_MONTH else f"chat_messages_{month:%Y_%m}"


def partition_month(name: str) -> date:
    """The month that `partition_name` has named."""
    year, _, month = name.removeprefix("chat_messages_").partition("_")
    return date(int(year), int(month), 1) if month else LEGACY_MONTH


async def existing_partitions(database: Database) -> list[str]:
    async with database.connection() as conn:
        rows = await conn.fetch(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits "
            "WHERE inhparent = 'chat.chat_messages'::regclass ORDER BY 1"
        )
    return [row["name"].removeprefix("chat.") for row in rows]


async def make_partitions(database: Database, months: list[date]) -> list[str]:
    """Makes the partitions that are missing and returns their names. Safe to run from anywhere, any time."""
    present = set(await existing_partitions(database))
    missing = [month for month in months if partition_name(month) not in present]
    return [partition_name(month) for month in missing if await _make(database, month)]


async def _make(database: Database, month: date) -> bool:
    # As text: the month after the last one that a UUIDv7 has here is beyond Python's calendar.
    name, until = partition_name(month), f"{month.year + month.month // 12:04}-{month.month % 12 + 1:02}-01"
    async with database.transaction() as conn:
        await conn.execute("SET LOCAL lock_timeout = '2s'")
        await conn.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        if await conn.fetchval("SELECT to_regclass($1)", f"chat.{name}"):
            return False
        await conn.execute(f"CREATE TABLE chat.{name} (LIKE chat.chat_messages INCLUDING ALL)")
        # With the bound as a constraint, attaching need not scan.
        await conn.execute(
            f"ALTER TABLE chat.{name} ADD CONSTRAINT bound "
            f"CHECK (session_month >= '{month}' AND session_month < '{until}')"
        )
        await conn.execute(
            f"ALTER TABLE chat.chat_messages ATTACH PARTITION chat.{name} "
            f"FOR VALUES FROM ('{month}') TO ('{until}')"
        )
        await conn.execute(f"ALTER TABLE chat.{name} DROP CONSTRAINT bound")
    return True


def is_missing_partition(exc: asyncpg.CheckViolationError) -> bool:
    """A check that has no name is the partitioned table's own. (The message is in the server's language.)"""
    return exc.constraint_name is None
