"""Counts what was written into the roll-ups that reports read: exactly, a bounded piece at a time.

Whoever writes leaves a mark in the same transaction (triggers, migration 0003). A round takes some marks, counts their
sessions, and commits both: what a crash takes back, the next round finds again. Rounds are one after the other, of
however many workers; `rollups.sql` says how each is one. A session that can't be counted is set aside, for others not to
wait for it. `docs/decisions/0009-roll-ups.md` has the argument.
"""

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from app.analytics.statements import parse_statements
from app.chat import format_time
from app.errors import ChatError, StartRefused
from app.postgres.engine import Database, outage_or_same

log = logging.getLogger("chat_sessions.rollups")

#: Two rounds are never counted at once: this advisory lock, for one transaction.
_LOCK = 7311520260004

#: Of one round.
_MARKS = 5_000
_BACKFILLED_SESSIONS = 500
_MESSAGES = 20_000
_MESSAGES_OF_SESSION_MIN = 10

#: A round takes a second or two; deleting one session of a million messages longer.
_ROUND_TIMEOUT_SECONDS = 120

#: After this, what a round with failures has not come to is left to the next one.
_FAILING_ROUND_SECONDS = 20.0

_ERROR_CHARACTERS = 500

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
    """What is not in the roll-ups yet. `marks` counts up to `MARKS_TOLD_MAX`, `lag_seconds` is the oldest one's age.

    `set_aside`: sessions that can't be counted; `retries`, whether it is time to try one of them again.
    """

    marks: int
    lag_seconds: float
    backfills: bool
    timezone: str | None
    set_aside: int
    retries: bool

    @property
    def waits(self) -> bool:
        """Whether a round has anything to do."""
        return self.marks > 0 or self.backfills or self.retries


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A session that the roll-ups are without, since when, and when it is tried again."""

    session_id: UUID
    error: str
    failures: int
    since: datetime
    retry_at: datetime


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
            aside = await conn.fetch(_SQL["find_aside"], list(marked.union(before)))
            due = [record["session_id"] for record in aside if record["is_due"]]
            good = marked.union(before).difference(record["session_id"] for record in aside)
            failed = await _count_apart(conn, list(good), state["timezone"])
            # Not together with the good ones, which would have to be counted again for each that fails.
            failed |= await _count_apart(conn, due, state["timezone"])
            await conn.execute(_SQL["take_back"], [session for session in due if session not in failed])
            put_aside = await _set_aside(conn, failed)
        # Once they are: a round that was rolled back has set nothing aside.
        for one in put_aside:
            _tell(one, failed[one.session_id])
        complete = state["complete"] or len(before) < _BACKFILLED_SESSIONS
        counted = len(marked) - len(marked.intersection(failed))
        return Round(sessions=counted, backfilled=len(before), complete=complete)

    async def set_aside(self, limit: int) -> list[SetAside]:
        """The sessions that can't be counted, up to `limit`, the oldest first."""
        async with self._database.connection() as conn:
            return [SetAside(**record) for record in await conn.fetch(_SQL["list_aside"], limit)]

    async def retry(self) -> None:
        """Those that are set aside are tried again by the next rounds, whatever the pauses."""
        async with self._database.connection() as conn:
            await conn.execute(_SQL["retry"])

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
            await conn.execute(_SQL["retry"])
            await conn.execute(_SQL["begin_anew"], self.timezone)


async def _next_backfilled(conn: asyncpg.Connection, counted_from: UUID | None) -> list[UUID]:
    records = await conn.fetch(_SQL["next_backfilled"], counted_from, _BACKFILLED_SESSIONS)
    found = [record["session_id"] for record in records]
    await conn.execute(
        _SQL["backfilled"], found[-1] if found else None, len(found), len(found) < _BACKFILLED_SESSIONS
    )
    return found


async def _count_apart(
    conn: asyncpg.Connection, sessions: Sequence[UUID], timezone: str
) -> dict[UUID, Exception]:
    """Counts the sessions, and returns those that failed: in halves, until what fails does so alone."""
    failed: dict[UUID, Exception] = {}
    at_most = max(_MESSAGES_OF_SESSION_MIN, _MESSAGES // max(1, len(sessions)))
    until = time.monotonic() + _FAILING_ROUND_SECONDS
    parts = [sessions] if sessions else []
    while parts:
        part = parts.pop()
        if failed and time.monotonic() > until:
            await conn.execute(_SQL["mark"], part)
            continue
        await conn.execute("SAVEPOINT part")
        try:
            await _count(conn, part, timezone, at_most)
        except Exception as exc:
            if _concerns_all(exc):
                raise
            await conn.execute("ROLLBACK TO SAVEPOINT part")
            if len(part) == 1:
                failed[part[0]] = exc
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
        await conn.execute("RELEASE SAVEPOINT part")
    return failed


def _concerns_all(exc: Exception) -> bool:
    """An outage, or a statement (42) that no session could pass: not about one of the sessions."""
    return isinstance(outage_or_same(exc), ChatError) or str(getattr(exc, "sqlstate", "")).startswith("42")


async def _set_aside(conn: asyncpg.Connection, failed: Mapping[UUID, Exception]) -> list[SetAside]:
    if not failed:
        return []
    errors = [_error(exc) for exc in failed.values()]
    return [SetAside(**record) for record in await conn.fetch(_SQL["set_aside"], list(failed), errors)]


def _error(exc: Exception) -> str:
    """Its first line: in the others PostgreSQL shows the row."""
    first = next(iter(str(exc).splitlines()), "")
    return f"{type(exc).__name__}: {first}".replace("\0", "")[:_ERROR_CHARACTERS]


def _tell(one: SetAside, exc: Exception) -> None:
    log.error(
        "session %s can't be counted, so reports are without it (try %d, again at %s): %s",
        *(one.session_id, one.failures, format_time(one.retry_at), one.error),
        # Where PostgreSQL says what is the matter, a traceback says no more.
        exc_info=None if isinstance(exc, asyncpg.PostgresError) else exc,
    )


async def _count(conn: asyncpg.Connection, sessions: Sequence[UUID], timezone: str, at_most: int) -> None:
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
        if not self.pending.waits:
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
