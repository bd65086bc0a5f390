"""Each page against what it asks of the stores, in one process.

    .venv/bin/python -m benchmarks.pages [--rounds N] [--calls N] [--only PAGE ...]

Hypothesis: a page costs at most 1.5 times its queries. What is above them is the framework, the template and gzip.
Control: the queries of each page a second time in each round.

150,000 messages over three months. Transcripts are those of sessions that fill a page, and Redis has them; `archived` are
those that it has not, as after an hour. Pages are asked as a browser asks them, without a socket; each transcript is another
one than that before. Exit status 1 where a goal is missed.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import uvloop
from fastapi import FastAPI, Request

from app.analytics.rollups import Rollups
from app.api.metrics import of_all_workers
from app.application import create_app
from app.embedded import EmbeddedServers
from app.postgres.engine import Database, create_engine
from app.settings import Settings
from app.web import analytics, chat, sessions, stores
from app.wiring import Runtime
from benchmarks.growth.archive import Plan, sections_of
from benchmarks.growth.databases import fresh_database, served
from benchmarks.growth.fill import connected, fill, midnight
from benchmarks.growth.series import Measure, Timed, digits, in_turns, milliseconds, table

_MESSAGES, _MESSAGES_OF_SESSION, _MONTHS = 150_000, 20, 3
_DAYS = 90
_TRANSCRIPTS = 200

_GOAL = 1.5
_PAGE, _QUERIES, _AGAIN = range(3)

_BROWSER = [
    (b"host", b"127.0.0.1:8000"),
    (
        b"user-agent",
        b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0 Safari/537.36",
    ),
    (b"accept", b"text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
    (b"accept-encoding", b"gzip, deflate, br, zstd"),
    (b"accept-language", b"en-US,en;q=0.9,vi;q=0.8"),
]

Call = Callable[[], Awaitable[Any]]


async def _nothing() -> None: ...


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A page, and what it asks. `before` each of them, outside of its time."""

    name: str
    page: Call
    queries: Call
    before: Call = _nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One of the archive."""

    session_id: UUID
    user_id: str


async def ask(app: FastAPI, address: str) -> int:
    """A page as a server hands it to a socket: its bytes. Raises `RuntimeError` where it is an error."""
    path, _, query = address.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": _BROWSER,
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    size = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal size
        if message.get("status", 200) != 200:
            raise RuntimeError(f"{address}: {message['status']}")
        size += len(message.get("body", b""))

    await app(scope, receive, send)
    return size


def compared(app: FastAPI, picked: Sequence[Session]) -> list[Compared]:
    """Every page, and its queries as its function asks them."""
    runtime: Runtime = app.state.runtime
    assert runtime.database is not None
    database = runtime.database
    shown, asked = cycle(picked), cycle(picked)
    request = Request({"type": "http", "app": app, "headers": [], "query_string": b"", "path": "/stores"})

    async def the_list() -> None:
        await sessions.archived(runtime, database, sessions.ListAsked(), None)

    async def of_a_transcript() -> None:
        session_id = next(asked).session_id
        await sessions.in_redis(runtime, session_id)
        await runtime.store.read_history(session_id, max_messages=sessions.MESSAGES_OF_PAGE)

    async def of_the_chat() -> None:
        one = next(asked)
        await asyncio.gather(
            chat.history_of(runtime, one.session_id, one.user_id), chat.past_of(runtime, one.user_id)
        )

    async def of_the_panels() -> None:
        await analytics.panels_of(
            database,
            app.state.reports,
            since=None,
            until=None,
            days=_DAYS,
            granularity="auto",
            timezone=None,
            user_id=None,
        )

    async def of_the_stores() -> None:
        await asyncio.gather(stores.standing(runtime), of_all_workers(request, runtime))

    async def forget() -> None:
        assert runtime.redis is not None
        async with runtime.redis.step() as redis:
            await redis.flushdb()

    def transcript() -> Awaitable[int]:
        return ask(app, f"/sessions/{next(shown).session_id}")

    def talk() -> Awaitable[int]:
        one = next(shown)
        return ask(app, f"/?user_id={one.user_id}&session={one.session_id}")

    return [
        Compared(name="list", page=lambda: ask(app, "/sessions"), queries=the_list),
        Compared(name="transcript", page=transcript, queries=of_a_transcript),
        Compared(name="chat", page=talk, queries=of_the_chat),
        Compared(name="analytics", page=lambda: ask(app, f"/analytics?days={_DAYS}"), queries=of_the_panels),
        Compared(name="stores", page=lambda: ask(app, "/stores"), queries=of_the_stores),
        Compared(name="archived", page=transcript, queries=of_a_transcript, before=forget),
    ]


@asynccontextmanager
async def opened(servers: EmbeddedServers, url: str) -> AsyncIterator[FastAPI]:
    app = create_app(Settings(_env_file=None, database_url=url, redis_url=servers.redis_url))
    async with app.router.lifespan_context(app):
        yield app


async def prepare(app: FastAPI) -> list[Session]:
    """Counts the archive, and has Redis hold the transcripts that will be looked at."""
    runtime: Runtime = app.state.runtime
    assert runtime.database is not None
    async with runtime.database.connection() as conn:
        records = await conn.fetch(
            "SELECT session_id, user_id FROM chat.chat_sessions WHERE message_count >= $1 AND user_id LIKE 'user%' "
            "ORDER BY random() LIMIT $2",
            sessions.MESSAGES_OF_PAGE,
            _TRANSCRIPTS,
        )
    picked = [Session(**record) for record in records]
    for one in picked:
        for _ in range(2):
            await runtime.store.read_history(one.session_id, max_messages=sessions.MESSAGES_OF_PAGE)
    found = await runtime.store.read_history(picked[0].session_id, max_messages=sessions.MESSAGES_OF_PAGE)
    assert found.source == "redis", "a transcript is not read from Redis"
    return picked


async def count(url: str) -> None:
    database = Database(create_engine(url, application_name="benchmark", pool_size=1))
    counting = Rollups(database, timezone="UTC")
    try:
        while (now := await counting.pending()).marks or now.backfills:
            await counting.round()
    finally:
        await database.close()
    async with connected(url) as conn:
        await conn.execute("VACUUM (ANALYZE)")


def _timed(before: Call, call: Call) -> Timed:
    async def timed() -> float:
        await before()
        return await milliseconds(call())

    return timed


async def measure(
    servers: EmbeddedServers, url: str, *, only: Sequence[str], calls: int, rounds: int
) -> bool:
    await count(url)
    measures: list[Measure] = []
    rows = [("page", "its time, ms", "its queries, ms", "bytes, packed")]
    async with opened(servers, url) as app:
        for one in compared(app, await prepare(app)):
            if only and one.name not in only:
                continue
            size = await one.page()
            of_one = {_PAGE: one.page, _QUERIES: one.queries, _AGAIN: one.queries}
            curve = await in_turns(
                one.name,
                {point: _timed(one.before, call) for point, call in of_one.items()},
                calls=calls,
                rounds=rounds,
            )
            rows.append((one.name, digits(curve.p50(_PAGE)), digits(curve.p50(_QUERIES)), f"{size:,}"))
            measures += [
                Measure(
                    name=f"{one.name} / its queries", values=curve.ratios(_PAGE, _QUERIES), at_most=_GOAL
                ),
                Measure(name="control: queries again / queries", values=curve.ratios(_AGAIN, _QUERIES)),
            ]
    print(f"{table(rows)}\n")
    print(table([("measure", "got", "goal"), *(measure.row() for measure in measures)]))
    return all(measure.met for measure in measures)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--calls", type=int, default=100, metavar="N", help="of a page in a round")
    parser.add_argument("--only", nargs="+", default=[], metavar="PAGE")
    wanted = parser.parse_args()
    with (
        TemporaryDirectory(prefix="chat-bench-", ignore_cleanup_errors=True) as folder,
        served(Path(folder)) as servers,
    ):
        assert servers.database_url is not None
        url = fresh_database(servers.database_url, "pages")
        plan = Plan(
            messages=_MESSAGES, sessions=_MESSAGES // _MESSAGES_OF_SESSION, months=_MONTHS, until=midnight()
        )
        fill(url, sections_of(plan))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            met = runner.run(
                measure(servers, url, only=wanted.only, calls=wanted.calls, rounds=wanted.rounds)
            )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
