"""Reports and panels over 90 days, at two sizes of the archive and against the plain queries, and how late roll-ups are.

    .venv/bin/python -m benchmarks.analytics --data-dir DIR [--messages N N] [--rounds N] [--seconds N]

Hypothesis: each takes at most 150 ms on 10 M messages and at most 1.3 times as long as on 1 M; those that replace a scan
of the messages (the control) are 100 times faster; a write is in the reports within five seconds.
The archives are those of benchmarks/growth, kept below `--data-dir`, brought to our schema and counted there.
"""

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import text

from app.analytics import reports
from app.analytics.rollups import BackgroundRollups, Rollups
from app.chat import NewMessage, json_text, new_uuid, utc_now
from app.postgres.cache_state import claim_state
from app.postgres.engine import Database, create_engine
from app.postgres.schema import upgrade
from app.postgres.store import PostgresChatSessionStore
from app.store import Append
from benchmarks.growth.databases import archive_of, served
from benchmarks.growth.fill import connected

_DAYS = 90
_ZONE = "Asia/Ho_Chi_Minh"
_DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards" / "chat-sessions.json"

#: Writes a second of the load under which the lag is measured, each a question and an answer.
_TURNS_A_SECOND = 100


def panels(since: datetime, until: datetime) -> dict[str, str]:
    """The statements of the Grafana dashboard, with its macros as its data source for PostgreSQL writes them."""
    found = json.loads(_DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return {panel["title"]: _expanded(panel["targets"][0]["rawSql"], since, until) for panel in found}


def _expanded(sql: str, since: datetime, until: datetime) -> str:
    begin, end = (f"'{moment:%Y-%m-%dT%H:%M:%SZ}'" for moment in (since, until))
    sql = re.sub(r"\$__timeFilter\((\w+)\)", rf"\1 BETWEEN {begin} AND {end}", sql)
    sql = re.sub(
        r"\$__timeGroupAlias\((\w+), '1h'\)", r'floor(extract(epoch from \1)/3600)*3600 AS "time"', sql
    )
    return sql.replace("$__timeFrom()", begin).replace("$__timeTo()", end)


async def count(url: str) -> None:
    database = Database(create_engine(url, application_name="benchmark", pool_size=1))
    counting, began, counted = Rollups(database, timezone=_ZONE), time.monotonic(), 0
    try:
        while (now := await counting.pending()).marks or now.backfills:
            done = await counting.round()
            counted += done.sessions + done.backfilled if done else 0
        async with connected(url) as conn:
            await conn.execute("VACUUM (ANALYZE)")
    finally:
        await database.close()
    if counted:
        print(f"counted {counted:,} sessions in {time.monotonic() - began:,.0f} s", flush=True)


@dataclass(frozen=True, slots=True)
class _Archive:
    database: Database
    conn: Any


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[_Archive]:
    database = Database(create_engine(url, application_name="benchmark", pool_size=1))
    try:
        async with connected(url) as conn:
            yield _Archive(database, conn)
    finally:
        await database.close()


async def _last_day(archive: _Archive) -> datetime:
    """The midnight before the last message."""
    last: datetime = await archive.conn.fetchval("SELECT max(created_at) FROM chat.chat_messages")
    return last.astimezone(ZoneInfo(_ZONE)).replace(hour=0, minute=0, second=0, microsecond=0)


async def measure(urls: Mapping[int, str], rounds: int) -> dict[int, dict[str, tuple[float, float | None]]]:
    """By messages of the archive, by report or panel: its median in seconds; of the largest, the plain query's, too."""
    found: dict[int, dict[str, tuple[float, float | None]]] = {messages: {} for messages in urls}
    async with AsyncExitStack() as opened:
        archives = {
            messages: await opened.enter_async_context(_opened(url)) for messages, url in urls.items()
        }
        largest = archives[max(archives)]
        # The same days of each: to begin on another weekday is other work.
        until = min([await _last_day(one) for one in archives.values()])
        since = until - timedelta(days=_DAYS)
        for name, query in reports.REPORTS.items():
            plain = None
            if query.plain:
                call = _plain(largest.database, query.plain, since, until)
                plain = (await _medians({0: call}, 3))[0]
            calls = {
                messages: _report(one.database, name, since, until) for messages, one in archives.items()
            }
            for messages, seconds in (await _medians(calls, rounds)).items():
                found[messages][name] = seconds, plain
        for title, sql in panels(since, until).items():
            calls = {messages: _fetch(one.conn, sql) for messages, one in archives.items()}
            for messages, seconds in (await _medians(calls, rounds)).items():
                found[messages][f"panel: {title}"] = seconds, None
    return found


async def _medians(calls: Mapping[int, Callable[[], Awaitable[Any]]], rounds: int) -> dict[int, float]:
    """What is compared takes turns: whatever else the machine does, it does to each."""
    taken: dict[int, list[float]] = {key: [] for key in calls}
    # The first round loads the pages.
    for number in range(rounds + 1):
        for key in calls if number % 2 == 0 else reversed(calls):
            began = time.perf_counter()
            await calls[key]()
            taken[key].append(time.perf_counter() - began)
    return {key: statistics.median(its[1:]) for key, its in taken.items()}


def _report(database: Database, name: str, since: datetime, until: datetime) -> Callable[[], Awaitable[Any]]:
    folded = reports.REPORTS[name].folded
    if folded:
        since = until - timedelta(days=reports.FOLDED_DAYS_MAX)

    async def call() -> None:
        found = await reports.run(database, name, since=since, until=until, timezone=_ZONE, granularity="day")
        assert found.source == ("messages" if folded else "roll-ups")
        assert found.complete

    return call


def _plain(database: Database, sql: str, since: datetime, until: datetime) -> Callable[[], Awaitable[Any]]:
    values = {
        "since": since,
        "until": until,
        "timezone": _ZONE,
        "granularity": "day",
        "user_id": None,
        "limit": 20,
    }
    used = {name: value for name, value in values.items() if re.search(rf":{name}\b", sql)}

    async def call() -> None:
        # Longer than the client's limit: then the control is at least so slow.
        with suppress(TimeoutError):
            await ask()

    async def ask() -> None:
        async with database.engine.connect() as conn:
            await conn.execute(
                text(
                    "SELECT set_config('statement_timeout', '0', true), set_config('plan_cache_mode', 'auto', true)"
                )
            )
            (await conn.execute(text(sql), used)).all()

    return call


def _fetch(conn: Any, sql: str) -> Callable[[], Awaitable[Any]]:
    async def call() -> None:
        await conn.fetch(sql)

    return call


async def lags(url: str, seconds: float) -> list[float]:
    """How long after a write was acknowledged a report has it, under load, in seconds."""
    database = Database(create_engine(url, application_name="benchmark"))
    await claim_state(database, redis_only=None)
    # Nobody serves the archive, so nobody believes what this does not mark.
    async with database.transaction() as conn:
        await conn.execute("UPDATE chat.cache_state SET cache = 'off', settled = true")
    store = PostgresChatSessionStore(database, ttl_seconds=3600)
    session = (await store.create_session("benchmark")).session.session_id
    counting = asyncio.create_task(BackgroundRollups(Rollups(database, timezone=_ZONE)).run())
    writing = asyncio.create_task(_write(store))
    taken, today = [], datetime.now(ZoneInfo(_ZONE)).replace(hour=0, minute=0, second=0, microsecond=0)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            question = _message("user", {})
            source = f"lag {new_uuid()}"
            answer = _message("assistant", {"sources": [source]})
            await store.append(Append(session_id=session, messages=(question, answer)))
            acknowledged = time.monotonic()
            while not await _shows(database, today, source):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
            taken.append(time.monotonic() - acknowledged)
    finally:
        for task in (counting, writing):
            task.cancel()
        await asyncio.gather(counting, writing, return_exceptions=True)
        await store.delete_session(session)
        await database.close()
    return taken


async def _shows(database: Database, today: datetime, source: str) -> bool:
    found = await reports.run(
        database, "top_sources", since=today, until=today + timedelta(days=1), timezone=_ZONE, limit=1000
    )
    return any(row[0] == source for row in found.rows)


async def _write(store: PostgresChatSessionStore) -> None:
    sessions = [(await store.create_session(f"load {number}")).session.session_id for number in range(50)]
    number = 0
    while True:
        number += 1
        messages = (
            _message("user", {}),
            _message("assistant", {"processing_time_ms": 900, "sources": ["a"]}),
        )
        await store.append(Append(session_id=sessions[number % len(sessions)], messages=messages))
        await asyncio.sleep(1 / _TURNS_A_SECOND)


def _message(role: Any, metadata: dict[str, Any]) -> NewMessage:
    return NewMessage(
        message_id=new_uuid(), role=role, content="lag", created_at=utc_now(), metadata=json_text(metadata)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.analytics", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--messages", type=int, nargs="+", default=[1_000_000, 10_000_000], metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument(
        "--seconds", type=float, default=20, metavar="N", help="of the lag; 0: it is left out"
    )
    wanted = parser.parse_args()
    with served(wanted.data_dir) as servers:
        assert servers.database_url is not None
        urls = {}
        for messages in sorted(wanted.messages):
            urls[messages] = url = archive_of(servers.database_url, messages)
            upgrade(url)
            asyncio.run(count(url))
        _print(asyncio.run(measure(urls, wanted.rounds)))
        if wanted.seconds:
            taken = asyncio.run(lags(url, wanted.seconds))
            print(
                f"lag under {_TURNS_A_SECOND} turns a second: median {statistics.median(taken):.2f} s, "
                f"most {max(taken):.2f} s, of {len(taken)} writes"
            )
    return 0


def _print(found: dict[int, dict[str, tuple[float, float | None]]]) -> None:
    least, most = min(found), max(found)
    print(f"90 days, medians; {most:,} messages against {least:,}, and the plain query on {most:,}")
    for name, (seconds, plain) in found[most].items():
        against = f"{plain * 1000:9.0f} ms plain, {plain / seconds:6.0f}x faster" if plain is not None else ""
        print(f"{name:<48}{seconds * 1000:7.1f} ms  {seconds / found[least][name][0]:5.2f}x{against}")


if __name__ == "__main__":
    sys.exit(main())
