"""Counts what was written into the roll-ups that reports read: exactly, a bounded piece at a time.

Whoever writes leaves a mark in the same transaction (triggers, migration 0003). A round takes some marks, counts their
sessions, and commits both: what a crash takes back, the next round finds again. Rounds are one after the other, of
however many workers; `rollups.sql` says how each is one. `docs/decisions/0009-roll-ups.md` has the argument.
"""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from app.analytics.statements import parse_statements
from app.errors import ChatError, StartRefused
from app.postgres.engine import Database

log = logging.getLogger("chat_sessions.rollups")

#: Two rounds are never counted at once: this advisory lock, for one transaction.
_LOCK = 7311520260004

#: Of one round.
_MARKS = 5_000
_BACKFILLED_SESSIONS = 500
_MESSAGES = 20_000
_MESSAGES_OF_SESSION_MIN = 10

#: A round takes a second at most; deleting one session of a million messages longer.
_ROUND_TIMEOUT_SECONDS = 120

#: Marks are counted up to here.
MARKS_TOLD_MAX = 100_000

_EVERY_SECONDS = 1.0

#: Reports are promised what is older than five.
_HURRIES_FROM_SECONDS = 2.0

_SQL = parse_statements(Path(__file__).with_name("rollups.sql").read_text(encoding="utf-8"))

# No JIT: it takes longer to compile the statement than it takes to run.
_BEGIN = f"""
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ;
SET LOCAL statement_timeout = '{_ROUND_TIMEOUT_SECONDS}s';
SET LOCAL idle_in_transaction_session_timeout = '{_ROUND_TIMEOUT_SECONDS}s';
SET LOCAL work_mem = '32MB';
SET LOCAL jit = off
"""

_TABLES = (
    *("sessions", "times", "latencies", "latency_days", "session_days", "session_histograms", "user_days"),
    *("users", "lifecycles", "visits", "retention", "sources", "source_days", "source_again"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """What is not in the roll-ups yet. `marks` counts up to `MARKS_TOLD_MAX`, `lag_seconds` is the oldest one's age."""

    marks: int
    lag_seconds: float
    backfills: bool
    timezone: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """How many sessions a round has counted, of what was there before the marks, and whether that is now complete."""

    sessions: int
    backfilled: int
    complete: bool


class Rollups:
    """Counts into the roll-ups of `database`. Its days are those of `timezone`, unless others have been counted."""

    def __init__(self, database: Database, *, timezone: str) -> None:
        self._database = database
        self.timezone = timezone

    async def pending(self) -> Pending:
        async with self._database.connection() as conn:
            [record] = await conn.fetch(_SQL["pending"], MARKS_TOLD_MAX)
        return Pending(**record)

    async def round(self) -> Round | None:
        """Counts some of what is pending. None: another worker is at it.

        Raises `DurableStoreUnavailable` also where it lost to another worker: then nothing was counted.
        """
        async with self._database.transaction() as conn:
            await conn.execute(_BEGIN)
            if not await conn.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK):
                return None
            [state] = await conn.fetch(_SQL["take_turn"], self.timezone)
            marked = {record["session_id"] for record in await conn.fetch(_SQL["take_marks"], _MARKS)}
            before: list[UUID] = []
            if not state["complete"]:
                before = await _next_backfilled(conn, state["backfilled_from"])
            await _count(conn, list(marked.union(before)), state["timezone"])
        complete = state["complete"] or len(before) < _BACKFILLED_SESSIONS
        return Round(sessions=len(marked), backfilled=len(before), complete=complete)

    async def forget(self) -> None:
        """Empties the roll-ups. All is counted anew, with days of `timezone`, by the rounds that follow.

        Raises `StartRefused` for a time zone that PostgreSQL doesn't know.
        """
        async with self._database.transaction(lock_timeout_ms=2_000) as conn:
            await conn.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            try:
                await conn.execute("SELECT now() AT TIME ZONE $1", self.timezone)
            except asyncpg.InvalidParameterValueError as exc:
                raise StartRefused(
                    f"PostgreSQL knows no time zone {self.timezone!r}",
                    hint="set ANALYTICS_TIMEZONE to a name of pg_timezone_names, like Asia/Ho_Chi_Minh",
                ) from exc
            await conn.execute(f"TRUNCATE {', '.join(f'chat.rollup_{table}' for table in _TABLES)}")
            await conn.execute(_SQL["begin_anew"], self.timezone)


async def _next_backfilled(conn: asyncpg.Connection, counted_from: UUID | None) -> list[UUID]:
    records = await conn.fetch(_SQL["next_backfilled"], counted_from, _BACKFILLED_SESSIONS)
    found = [record["session_id"] for record in records]
    await conn.execute(
        _SQL["backfilled"], found[-1] if found else None, len(found), len(found) < _BACKFILLED_SESSIONS
    )
    return found


async def _count(conn: asyncpg.Connection, sessions: Sequence[UUID], timezone: str) -> None:
    if not sessions:
        return
    at_most = max(_MESSAGES_OF_SESSION_MIN, _MESSAGES // len(sessions))
    found = await _fetch(conn, "count_sessions", sessions, timezone, at_most)
    by_what: dict[str, list[asyncpg.Record]] = {"wrote": [], "moved": [], "left": []}
    for record in found:
        by_what[record["what"]].append(record)
    if wrote := by_what["wrote"]:
        await _fetch(conn, "count_users", *(_column(wrote, name) for name in ("user_id", "day", "change")))
    if moved := by_what["moved"]:
        places = (_column(moved, name) for name in ("user_id", "started_at", "session_id"))
        await _fetch(conn, "count_repeats", *places)
    if left := by_what["left"]:
        await conn.execute(_SQL["mark"], _column(left, "session_id"))


async def _fetch(conn: asyncpg.Connection, name: str, *arguments: Any) -> list[asyncpg.Record]:
    found: list[asyncpg.Record] = await conn.fetch(_SQL[name], *arguments, timeout=_ROUND_TIMEOUT_SECONDS)
    return found


def _column(records: Sequence[asyncpg.Record], name: str) -> list[Any]:
    return [record[name] for record in records]


class BackgroundRollups:
    """Counts while a process serves. `pending` is what it saw last; None before it could look."""

    def __init__(self, rollups: Rollups) -> None:
        self._rollups = rollups
        self._told_zone = False
        self.pending: Pending | None = None

    async def run(self) -> None:
        """Until it is cancelled. An outage ends an attempt; the next one goes on where it was."""
        dice = random.Random()  # noqa: S311 - no secret
        pause = _EVERY_SECONDS
        while True:
            # Jitter: processes that started at once.
            await asyncio.sleep(pause * dice.uniform(0.5, 1.5))
            pause = _EVERY_SECONDS
            began = time.monotonic()
            try:
                if await self._once():
                    # There is more. Half of the time is the requests', as long as reports are current.
                    pause = min(pause, time.monotonic() - began) if self._is_current() else 0.0
            except ChatError as exc:
                log.info("nothing was counted into the roll-ups now, will try again: %s", exc)
            except Exception:
                # It must not end silently: reports would stand still for ever.
                log.exception("the roll-ups failed, will try again")

    async def _once(self) -> bool:
        """Whether there is more to do at once."""
        self.pending = await self._rollups.pending()
        self._tell_zone(self.pending.timezone)
        if not self.pending.marks and not self.pending.backfills:
            return False
        done = await self._rollups.round()
        if done is None:
            return False
        return not done.complete or self.pending.marks > _MARKS

    def _is_current(self) -> bool:
        return self.pending is None or self.pending.lag_seconds < _HURRIES_FROM_SECONDS

    def _tell_zone(self, timezone: str | None) -> None:
        if timezone in {None, self._rollups.timezone} or self._told_zone:
            return
        self._told_zone = True
        log.warning(
            "the roll-ups have days of %s, and ANALYTICS_TIMEZONE is %s: "
            "run `chat-sessions rollup --rebuild` to count all anew",
            *(timezone, self._rollups.timezone),
        )
