"""Fills a database with chats, fast: COPY straight into each month's partition, by several processes.

    python -m benchmarks.growth.fill --database-url URL [--messages N] [--sessions M] [--seed S]

The schema must be there (`chat-sessions migrate`). The same arguments give the same archive, so one that is there
already is refused by its keys; another seed adds to it. An interrupted run leaves whole sections: whole sessions.
"""

import argparse
import asyncio
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, zip_longest

import asyncpg

from app.postgres.engine import Database, create_engine
from app.postgres.partitions import make_partitions, partition_name
from benchmarks.growth.archive import (
    COPY_BEGIN,
    COPY_END,
    MESSAGE_COLUMNS,
    SESSION_COLUMNS,
    Plan,
    Section,
    pieces_of,
    sections_of,
)

MESSAGES = 10_000_000
MESSAGES_OF_SESSION = 20
PROCESSES = 2
_SAY_EVERY_SECONDS = 5.0
_SAY_AFTER_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Filled:
    messages: int
    seconds: float

    @property
    def per_second(self) -> float:
        return self.messages / self.seconds


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(url)
    try:
        yield conn
    finally:
        await conn.close()


async def make_partitions_of(url: str, sections: Sequence[Section]) -> None:
    database = Database(create_engine(url, application_name="growth", pool_size=1))
    try:
        await make_partitions(database, sorted({section.month for section in sections}))
    finally:
        await database.close()


async def copy_sections(url: str, sections: Sequence[Section]) -> int:
    """Each section in a transaction of its own; the number of messages. Their partitions must be there."""
    async with connected(url) as conn:
        # What a crash of the server takes back is whole sections.
        await conn.execute("SET synchronous_commit = off")
        for section in sections:
            async with conn.transaction():
                await _copy(conn, section)
    return sum(section.messages for section in sections)


async def _copy(conn: asyncpg.Connection, section: Section) -> None:
    sessions: list[bytes] = []

    async def messages() -> AsyncIterator[bytes]:
        yield COPY_BEGIN
        for piece in pieces_of(section):
            sessions.append(piece.sessions)
            yield piece.messages
        yield COPY_END

    async def rows() -> AsyncIterator[bytes]:
        yield COPY_BEGIN
        for some in sessions:
            yield some
        yield COPY_END

    await conn.copy_to_table(
        # The partition itself: nothing is left to route.
        partition_name(section.month),
        schema_name="chat",
        columns=MESSAGE_COLUMNS,
        source=messages(),
        format="binary",
    )
    await conn.copy_to_table(
        "chat_sessions", schema_name="chat", columns=SESSION_COLUMNS, source=rows(), format="binary"
    )


async def settle(url: str) -> None:
    """As autovacuum and the checkpointer would leave it by and by."""
    async with connected(url) as conn:
        await conn.execute("VACUUM (ANALYZE) chat.chat_sessions, chat.chat_messages")
        await conn.execute("CHECKPOINT")


def fill(
    url: str, sections: Sequence[Section], *, processes: int = PROCESSES, say: Callable[[str], None] = print
) -> Filled:
    """Blocking, and not for a running event loop. `say` hears of the progress."""
    began = said = time.monotonic()
    total, done = sum(section.messages for section in sections), 0
    asyncio.run(make_partitions_of(url, sections))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        jobs = [pool.submit(_work, url, section) for section in _apart(sections, processes)]
        try:
            for job in as_completed(jobs):
                done += job.result()
                now = time.monotonic()
                if now - said >= _SAY_EVERY_SECONDS and now - began >= _SAY_AFTER_SECONDS:
                    said = now
                    say(f"{done:,} of {total:,} messages, {done / (now - began):,.0f} a second")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    filled = Filled(messages=done, seconds=time.monotonic() - began)
    asyncio.run(settle(url))
    return filled


def _apart(sections: Sequence[Section], processes: int) -> list[Section]:
    """In an order in which the processes work in different months: each index has one writer at a time."""
    each = -(-len(sections) // processes)
    parts = [sections[first : first + each] for first in range(0, len(sections), each)]
    return [section for section in chain.from_iterable(zip_longest(*parts)) if section is not None]


def _work(url: str, section: Section) -> int:
    return asyncio.run(copy_sections(url, [section]))


def midnight() -> datetime:
    """The end of an archive, unless it is said otherwise."""
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth.fill", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--database-url", required=True, metavar="URL")
    parser.add_argument("--messages", type=int, default=MESSAGES, metavar="N")
    parser.add_argument("--sessions", type=int, metavar="M", help="default: one for 20 messages")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument(
        "--months", type=int, default=24, help="how many months before --until sessions begin"
    )
    parser.add_argument(
        "--until",
        type=lambda text: datetime.fromisoformat(text).replace(tzinfo=UTC),
        default=midnight(),
        metavar="DATE",
        help="when the last message was written, UTC; default: today at midnight",
    )
    parser.add_argument("--processes", type=int, default=PROCESSES)
    wanted = parser.parse_args()
    try:
        plan = Plan(
            messages=wanted.messages,
            sessions=wanted.sessions or max(1, wanted.messages // MESSAGES_OF_SESSION),
            seed=wanted.seed,
            months=wanted.months,
            until=wanted.until,
        )
    except ValueError as exc:
        parser.error(str(exc))
    filled = fill(wanted.database_url, sections_of(plan), processes=wanted.processes)
    print(
        f"{filled.messages:,} messages in {plan.sessions:,} sessions in {filled.seconds:,.1f} s: "
        f"{filled.per_second:,.0f} rows a second"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
