"""What PostgreSQL does for the calls that the curves measure, on archives beside each other.

    python -m benchmarks.growth.explain --data-dir DIR [--messages N ...]

EXPLAIN (ANALYZE, BUFFERS) of the store's own statements with their own settings, on sessions at random: time and
pages, of which `read` were not in PostgreSQL's buffers, each a median over some dozens of them. Nothing is changed:
what writes is rolled back.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from app.chat import session_month, utc_now
from app.postgres import statements
from benchmarks.growth.databases import archive_of, served
from benchmarks.growth.fill import connected
from benchmarks.growth.series import digits, short, table
from benchmarks.growth.subjects import PAGE

_SESSIONS = 60
_SEQ_MAX = 2**31 - 1

_PAGE_OF_USER = """
SELECT * FROM chat.chat_sessions WHERE user_id = $1 ORDER BY created_at DESC, session_id DESC LIMIT $2
"""


@dataclass(frozen=True, slots=True)
class _Cost:
    milliseconds: float
    planning: float
    hit: int
    read: int
    reading: float


async def costs(url: str) -> dict[str, list[_Cost]]:
    """Of each statement, over sessions at random."""
    found: dict[str, list[_Cost]] = {}
    async with connected(url) as conn:
        await conn.execute("SET plan_cache_mode = force_generic_plan; SET track_io_timing = on")
        for record in await conn.fetch(
            "SELECT session_id, user_id, message_count, chain FROM chat.chat_sessions "
            "WHERE message_count BETWEEN 20 AND 24 ORDER BY random() LIMIT $1",
            _SESSIONS,
        ):
            for name, statement, arguments in _statements(record):
                async with conn.transaction():
                    found.setdefault(name, []).append(await _explained(conn, statement, arguments))
                    await conn.execute("ROLLBACK; BEGIN")
    return found


def _statements(record: asyncpg.Record) -> list[tuple[str, str, Sequence[Any]]]:
    session_id: UUID = record["session_id"]
    month, count, now = session_month(session_id), record["message_count"], utc_now()
    row = ([session_id], [month], [count + 1], [session_id], ["user"], ["Xin chào"], [now], [None], [None])
    return [
        ("lock of an append", statements.LOCK_SESSIONS, ([session_id],)),
        (
            "append",
            statements.APPEND,
            ([session_id], [count + 1], [record["chain"]], [now], *row, ["{}"], [None], [None]),
        ),
        ("messages of a fill", statements.MESSAGES, (session_id, month, 1, count)),
        ("history", statements.HISTORY, (session_id, month, _SEQ_MAX, PAGE)),
        ("page of a list", _PAGE_OF_USER, (record["user_id"], PAGE + 1)),
        ("delete of the messages", statements.DELETE_MESSAGES, (session_id, month)),
    ]


async def _explained(conn: asyncpg.Connection, statement: str, arguments: Sequence[Any]) -> _Cost:
    text = await conn.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", *arguments)
    plan = json.loads(text)[0]
    top = plan["Plan"]
    return _Cost(
        milliseconds=plan["Execution Time"],
        planning=plan["Planning Time"],
        hit=top["Shared Hit Blocks"],
        read=top["Shared Read Blocks"],
        # Its name until PostgreSQL 16 was another one.
        reading=top.get("Shared I/O Read Time", top.get("I/O Read Time", 0.0)),
    )


def _rows(name: str, size: int, its: Sequence[_Cost]) -> tuple[str, str, str, str, str, str, str]:
    return (
        name,
        short(size),
        digits(statistics.median(cost.milliseconds for cost in its)),
        digits(statistics.median(cost.planning for cost in its)),
        digits(statistics.median(cost.hit for cost in its)),
        digits(statistics.median(cost.read for cost in its)),
        digits(statistics.median(cost.reading for cost in its)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth.explain", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--messages", type=int, nargs="+", default=[10_000, 10_000_000], metavar="N")
    wanted = parser.parse_args()
    with served(wanted.data_dir) as servers:
        assert servers.database_url is not None
        found = {size: asyncio.run(costs(archive_of(servers.database_url, size))) for size in wanted.messages}
    rows = [("statement", "messages", "ms", "planning", "pages hit", "pages read", "ms of reading")]
    names = list(next(iter(found.values())))
    rows += [_rows(name, size, its[name]) for name in names for size, its in found.items()]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
