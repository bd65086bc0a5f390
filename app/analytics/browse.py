"""Sessions of everybody, newest first, for who looks through the archive."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import TextClause, text

from app.chat import ChatSession, SessionStatus, utc_now
from app.postgres.engine import Database
from app.store import Cursor

_COLUMNS = "SELECT session_id, user_id, created_at, last_activity, message_count FROM chat.chat_sessions"


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
) -> tuple[tuple[ChatSession, ...], Cursor | None]:
    """A page of the sessions created from `since` on and before `until`, and where the next page begins.

    Keyset: nothing is given twice when sessions are made meanwhile, and page 10,000 costs what the first one does.
    Active: created or appended to within `ttl_seconds`.
    """
    asked, values = listing(
        user_id=user_id, since=since, until=until, status=status, ttl_seconds=ttl_seconds, after=after
    )
    async with database.core() as conn:
        rows = (await conn.execute(asked, values | {"limit": limit + 1})).all()
    sessions = tuple(ChatSession(**row._mapping) for row in rows[:limit])  # noqa: SLF001 - its documented name
    more = len(rows) > limit
    return sessions, Cursor(
        created_at=sessions[-1].created_at, session_id=sessions[-1].session_id
    ) if more else None


def listing(
    *,
    user_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    status: SessionStatus = "all",
    ttl_seconds: int,
    after: Cursor | None = None,
) -> tuple[TextClause, dict[str, Any]]:
    """The statement with what it is asked for, but for its `limit`."""
    active_since = utc_now() - timedelta(seconds=ttl_seconds)
    conditions: dict[str, dict[str, Any]] = {}
    if user_id is not None:
        conditions["user_id = :user_id"] = {"user_id": user_id}
    if since is not None:
        conditions["created_at >= :since"] = {"since": since}
    if until is not None:
        conditions["created_at < :until"] = {"until": until}
    if status != "all":
        compared = ">" if status == "active" else "<="
        conditions[f"last_activity {compared} :active_since"] = {"active_since": active_since}
    if after is not None:
        conditions["(created_at, session_id) < (:created_at, :session_id)"] = {
            "created_at": after.created_at,
            "session_id": after.session_id,
        }
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    asked = text(f"{_COLUMNS}{where} ORDER BY created_at DESC, session_id DESC LIMIT :limit")
    values = {name: value for given in conditions.values() for name, value in given.items()}
    return asked, values
