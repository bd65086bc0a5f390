"""`/sessions`: everybody's sessions, and each one's transcript with where it lives at this moment.

What people and assistants wrote is only ever text. Pages of a list and of a transcript are places, not numbers: nothing is
given twice when more is written meanwhile, and the last one costs what the first one does.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from typing import Annotated
from urllib.parse import urlencode, urlsplit
from uuid import UUID

from fastapi import Request, Response
from pydantic import Field
from starlette.responses import RedirectResponse

from app.analytics.browse import browse_sessions, first_questions
from app.analytics.search import DEFAULT_RANGE, Hit
from app.api.problems import RequestRefused, refused_field
from app.api.requests import cursor_text, only_user, place_of
from app.api.search import search_cursor, search_page
from app.api.sessions import SEQ_MAX
from app.chat import ChatSession, SessionStatus
from app.coherence.ports import CacheOutage, Entry, GuideEntry
from app.errors import SessionNotFound
from app.postgres.engine import Database
from app.redis_sessions.inspect import find_session
from app.web.forms import Since, Until, UserId
from app.web.frame import render
from app.web.pieces import TITLE_CHARACTERS
from app.web.routing import Asked, Pages
from app.wiring import Runtime

pages = Pages()

SESSIONS_OF_PAGE = 50
MESSAGES_OF_PAGE = 50

Seq = Annotated[int, Field(ge=1, le=SEQ_MAX)]


# The list


class ListAsked(Asked):
    user_id: UserId = ""
    since: Since = None
    until: Until = None
    status: SessionStatus = "all"
    words: Annotated[str, Field(max_length=200)] = ""
    after: str | None = None
    before: str | None = None
    deleted: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A page of sessions with what was asked first in them, and the cursors of the pages beside it."""

    sessions: Sequence[ChatSession] = ()
    titles: Mapping[UUID, str] = field(default_factory=dict)
    newer: str | None = None
    older: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """A page of hits, each with its snippet in pieces; and the cursor of the next one."""

    hits: list[tuple[Hit, list[tuple[str, bool]]]]
    since: datetime
    partial: bool
    older: str | None
    newer: None = None


@pages.get("/sessions", ListAsked)
async def sessions(request: Request, runtime: Runtime, asked: ListAsked) -> Response:
    if asked.after is not None and asked.before is not None:
        raise refused_field("contradicting_parameters", "query.before", "is another way than query.after")
    user = await only_user(runtime, asked.user_id or None)
    given = {name: request.query_params.get(name) for name in ("user_id", "from", "to", "status", "words")}
    state = {name: value for name, value in given.items() if value}
    searched: Searched | None = None
    listed = Listed()
    if runtime.database is None:
        listed = await _held_by_redis(runtime, asked, user)
    elif asked.words.strip():
        searched = await _searched(runtime, request.app.state.searches, asked, user)
    else:
        listed = await archived(runtime, runtime.database, asked, user)
    newer, older = listed.newer, (searched or listed).older
    return render(
        request,
        "sessions.html",
        archive=runtime.database is not None,
        default_days=DEFAULT_RANGE.days,
        deleted=asked.deleted
        if asked.deleted is not None and await _is_gone(runtime, asked.deleted)
        else None,
        first=f"/sessions?{urlencode(state)}",
        newer=f"/sessions?{urlencode({**state, 'before': newer})}" if newer else None,
        older=f"/sessions?{urlencode({**state, 'after': older})}" if older else None,
        paged=asked.after is not None or newer is not None,
        searched=searched,
        sessions=listed.sessions,
        state=state,
        titles=listed.titles,
        wanted=asked.status,
    )


async def archived(runtime: Runtime, database: Database, asked: ListAsked, user: str | None) -> Listed:
    page = await browse_sessions(
        database,
        user_id=user,
        since=asked.since,
        until=asked.until,
        status=asked.status,
        ttl_seconds=runtime.settings.session_ttl_seconds,
        limit=SESSIONS_OF_PAGE,
        after=place_of(asked.after, "query.after"),
        before=place_of(asked.before, "query.before"),
    )
    ids = [one.session_id for one in page.sessions]
    return Listed(
        sessions=page.sessions,
        titles=await first_questions(database, ids, characters=TITLE_CHARACTERS),
        newer=cursor_text(page.newer) if page.newer is not None else None,
        older=cursor_text(page.older) if page.older is not None else None,
    )


async def _held_by_redis(runtime: Runtime, asked: ListAsked, user: str | None) -> Listed:
    """Without a database, a user's alone can be listed."""
    if user is None:
        return Listed()
    page = await runtime.store.list_sessions(
        user, status=asked.status, limit=SESSIONS_OF_PAGE, after=place_of(asked.after, "query.after")
    )
    return Listed(sessions=page.sessions, older=cursor_text(page.next) if page.next is not None else None)


async def _searched(
    runtime: Runtime, at_once: asyncio.Semaphore, asked: ListAsked, user: str | None
) -> Searched:
    page, since = await search_page(
        runtime,
        at_once,
        asked.words,
        since=asked.since,
        until=asked.until,
        after=asked.after,
        user_id=user,
        limit=SESSIONS_OF_PAGE,
    )
    return Searched(
        hits=[(hit, list(marked(hit))) for hit in page.hits],
        since=since,
        partial=page.partial,
        older=search_cursor(since, page.next) if page.next is not None else None,
    )


async def _is_gone(runtime: Runtime, session_id: UUID) -> bool:
    """Anybody can write an address."""
    try:
        await runtime.store.get_session(session_id)
    except SessionNotFound:
        return True
    return False


def marked(hit: Hit) -> Iterator[tuple[str, bool]]:
    """The snippet in pieces, each with whether it is a hit."""
    end = 0
    for begin, until in hit.marks:
        yield hit.snippet[end:begin], False
        yield hit.snippet[begin:until], True
        end = until
    yield hit.snippet[end:], False


# A transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class InRedis:
    """What stands in Redis. `state`: trusted; dirty (a write has not published), stale (of another epoch) and untrusted (no
    lease now), which are compared with PostgreSQL at the next read; compared (at every read, by the setting); owner, guide,
    foreign.
    """

    state: str
    ttl_seconds: int
    size_bytes: int
    messages: int | None = None


async def in_redis(runtime: Runtime, session_id: UUID) -> InRedis | str:
    """Looks without touching the time to live. `none`: nothing there; `out`: no answer; `unused`: there is no Redis."""
    if runtime.redis is None:
        return "unused"
    try:
        found = await find_session(runtime.redis, session_id)
    except CacheOutage:
        return "out"
    if not found.there:
        return "none"
    return InRedis(
        state=_standing(runtime, found.value),
        ttl_seconds=found.ttl_seconds,
        size_bytes=found.size_bytes,
        messages=found.value.session.message_count - found.value.first_seq + 1
        if isinstance(found.value, Entry)
        else None,
    )


def _standing(runtime: Runtime, value: object) -> str:
    if isinstance(value, GuideEntry):
        return "guide"
    if not isinstance(value, Entry):
        return "foreign"
    if value.owner == "redis":
        return "owner"
    if value.dirty:
        return "dirty"
    if runtime.settings.cache_verify == "always":
        return "compared"
    state = runtime.stores.lease.current() if runtime.stores is not None else None
    if state is None:
        return "untrusted"
    return "trusted" if value.epoch == state.epoch else "stale"


class TranscriptAsked(Asked):
    """The newest messages; `before` one; or those around `at`. `whole` is shown whatever its length."""

    session_id: UUID
    before: Seq | None = None
    at: Seq | None = None
    whole: Seq | None = None


class OlderAsked(Asked):
    session_id: UUID
    before: Seq


class SessionAsked(Asked):
    session_id: UUID


@pages.get("/sessions/{session_id}", TranscriptAsked)
async def transcript(request: Request, runtime: Runtime, asked: TranscriptAsked) -> Response:
    session_id, before, at = asked.session_id, asked.before, asked.at
    # Before the history: that read slides the time to live.
    redis = await in_redis(runtime, session_id)
    if at is not None:
        before = min(at + MESSAGES_OF_PAGE // 2, SEQ_MAX)
    history = await runtime.store.read_history(session_id, max_messages=MESSAGES_OF_PAGE, before_seq=before)
    last = history.last_seq if history.body else 0
    newer = last + MESSAGES_OF_PAGE + 1 if last < history.session.message_count else None
    return render(
        request,
        "transcript.html",
        at=at,
        history=history,
        last=last,
        newer=newer,
        postgres=runtime.database is not None,
        redis=redis,
        session=history.session,
        whole=asked.whole,
    )


@pages.get("/sessions/{session_id}/messages", OlderAsked)
async def older_messages(request: Request, runtime: Runtime, asked: OlderAsked) -> Response:
    """The page of a transcript before one, for a script that puts it above that one."""
    history = await runtime.store.read_history(
        asked.session_id, max_messages=MESSAGES_OF_PAGE, before_seq=asked.before
    )
    return render(
        request,
        "transcript_messages.html",
        at=None,
        history=history,
        session=history.session,
        whole=None,
    )


# Deletion


@pages.get("/sessions/{session_id}/delete", SessionAsked)
async def ask_to_delete(request: Request, runtime: Runtime, asked: SessionAsked) -> Response:
    read = await runtime.store.get_session(asked.session_id)
    return render(request, "delete.html", session=read.session)


@pages.post("/sessions/{session_id}/delete", SessionAsked)
async def delete(request: Request, runtime: Runtime, asked: SessionAsked) -> Response:
    _refuse_other_sites(request)
    await runtime.store.delete_session(asked.session_id)
    return RedirectResponse(f"/sessions?deleted={asked.session_id}", HTTPStatus.SEE_OTHER)


def _refuse_other_sites(request: Request) -> None:
    """A page of somebody else's could post this form: browsers say whose it was. Not by Origin where they say it by Fetch
    Metadata: behind a proxy the service may know itself by another name than they do.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        ours = site in {"same-origin", "none"}
    else:
        ours = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not ours:
        raise RequestRefused(
            "cross_site",
            "header.Origin: this is deleted from a page of this service only, or by the API's DELETE",
            status=HTTPStatus.FORBIDDEN,
        )
