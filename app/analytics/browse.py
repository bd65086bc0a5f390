"""Sessions for who looks through the archive: everybody's, newest first, and what each is about."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg

from app.chat import ChatSession, SessionStatus, session_month, utc_now
from app.postgres.engine import Database
from app.store import Cursor

_COLUMNS = "SELECT session_id, user_id, created_at, last_activity, message_count FROM chat.chat_sessions"

# The second where the assistant begins. Months as values: else it is planned for each that there is.
_FIRST_QUESTIONS = """
SELECT DISTINCT ON (session_id) session_id, left(content, $3) AS question
FROM chat.chat_messages
WHERE session_id = ANY($1::uuid[]) AND session_month = ANY($2::date[]) AND seq <= 2 AND role = 'user'
ORDER BY session_id, seq
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Browsed:
    """A page of a list, and the places at which the pages beside it begin: `newer` is None on the first, `older` on the last."""

    sessions: tuple[ChatSession, ...]
    newer: Cursor | None
    older: Cursor | None


async def browse_sessions(
    database: Database,
    *,
    user_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    status: SessionStatus = "all",
    ttl_seconds: int,
    limit: int,
    after: Cursor | None = None,
    before: Cursor | None = None,
) -> Browsed:
    """A page of the sessions created from `since` on and before `until`: the newest, those `after` a place in the list, or
    those right `before` one. Where less than a page is before it, the first page: that one is always as full as it can be.

    Keyset: nothing is given twice when sessions are made meanwhile, and page 10,000 costs what the first one does.
    Active: created or appended to within `ttl_seconds`.
    """
    asked = partial(
        listing,
        user_id=user_id,
        since=since,
        until=until,
        status=status,
        ttl_seconds=ttl_seconds,
        limit=limit + 1,
    )
    async with database.connection() as conn:
        if before is not None:
            statement, values = asked(before=before)
            rows = await conn.fetch(statement, *values)
            if len(rows) > limit:
                page = _sessions(rows[:limit][::-1])
                return Browsed(sessions=page, newer=_place(page[0]), older=_place(page[-1]))
        statement, values = asked(after=after)
        rows = await conn.fetch(statement, *values)
    page = _sessions(rows[:limit])
    return Browsed(
        sessions=page,
        newer=_place(page[0]) if after is not None and page else None,
        older=_place(page[-1]) if len(rows) > limit else None,
    )


async def first_questions(
    database: Database, session_ids: Sequence[UUID], *, characters: int
) -> dict[UUID, str]:
    """How the user began each session, cut to `characters`. Those without a question, and those not in PostgreSQL, are left out."""
    if not session_ids:
        return {}
    months = {session_month(session_id) for session_id in session_ids}
    async with database.connection() as conn:
        rows = await conn.fetch(_FIRST_QUESTIONS, session_ids, list(months), characters)
    return {row["session_id"]: row["question"] for row in rows}


def _sessions(rows: Sequence[asyncpg.Record]) -> tuple[ChatSession, ...]:
    return tuple(ChatSession(**row) for row in rows)


def _place(session: ChatSession) -> Cursor:
    return Cursor(created_at=session.created_at, session_id=session.session_id)


def listing(
    *,
    user_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    status: SessionStatus = "all",
    ttl_seconds: int,
    limit: int,
    after: Cursor | None = None,
    before: Cursor | None = None,
) -> tuple[str, list[Any]]:
    """The statement, and the values of its parameters. Newest first; `before` a place: the nearest to it first."""
    conditions: dict[str, tuple[Any, ...]] = {}
    if user_id is not None:
        conditions["user_id = {}"] = (user_id,)
    if since is not None:
        conditions["created_at >= {}"] = (since,)
    if until is not None:
        conditions["created_at < {}"] = (until,)
    if status != "all":
        compared = ">" if status == "active" else "<="
        conditions[f"last_activity {compared} {{}}"] = (utc_now() - timedelta(seconds=ttl_seconds),)
    if after is not None:
        conditions["(created_at, session_id) < ({}, {})"] = (after.created_at, after.session_id)
    if before is not None:
        conditions["(created_at, session_id) > ({}, {})"] = (before.created_at, before.session_id)
    values = [limit, *(value for given in conditions.values() for value in given)]
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    numbered = where.format(*(f"${number}" for number in range(2, len(values) + 1)))
    way = "DESC" if before is None else "ASC"
    return f"{_COLUMNS}{numbered} ORDER BY created_at {way}, session_id {way} LIMIT $1", values
