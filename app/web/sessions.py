"""`/sessions`: everybody's sessions, and each one's transcript with where it lives at this moment.

What people and assistants wrote is only ever text. Pages of a list and of a transcript are places, not numbers: nothing is
given twice when more is written meanwhile, and the last one costs what the first one does.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated
from urllib.parse import urlencode, urlsplit
from uuid import UUID

from fastapi import Path, Query, Request, Response
from starlette.responses import RedirectResponse

from app.analytics.browse import browse_sessions
from app.analytics.search import DEFAULT_RANGE, Hit
from app.api.problems import RequestRefused, refused_field
from app.api.requests import Served, cursor_text, only_user, place_of
from app.api.search import search_cursor, search_page
from app.api.sessions import SEQ_MAX
from app.chat import ChatSession, SessionStatus
from app.coherence.ports import CacheOutage, Entry, GuideEntry
from app.errors import SessionNotFound
from app.redis_sessions.inspect import find_session
from app.web.forms import Since, Until, UserId
from app.web.frame import page_router, render
from app.wiring import Runtime

router = page_router()

SESSIONS_OF_PAGE = 50
MESSAGES_OF_PAGE = 50

#: What is longer is cut, with a link to all of it: 50 messages of 256 KiB would be a page of 12 MiB.
CHARACTERS_SHOWN = 8_000

SessionId = Annotated[UUID, Path()]
Seq = Annotated[int | None, Query(ge=1, le=SEQ_MAX)]


# The list


@router.get("/sessions")
async def sessions(
    request: Request,
    runtime: Served,
    user_id: UserId = "",
    since: Since = None,
    until: Until = None,
    status: SessionStatus = "all",
    words: Annotated[str, Query(max_length=200)] = "",
    after: str | None = None,
    before: str | None = None,
    deleted: UUID | None = None,
) -> Response:
    if after is not None and before is not None:
        raise refused_field("contradicting_parameters", "query.before", "is another way than query.after")
    user = await only_user(runtime, user_id or None)
    asked = {name: request.query_params.get(name) for name in ("user_id", "from", "to", "status", "words")}
    state = {name: value for name, value in asked.items() if value}
    found: Sequence[ChatSession] = ()
    hits: list[tuple[Hit, list[tuple[str, bool]]]] = []
    newer: str | None = None
    older: str | None = None
    searched_from = None
    partial = False
    if words.strip() and runtime.database is not None:
        page, searched_from = await search_page(
            runtime,
            request.app.state.searches,
            words,
            since=since,
            until=until,
            after=after,
            user_id=user,
            limit=SESSIONS_OF_PAGE,
        )
        hits = [(hit, list(marked(hit))) for hit in page.hits]
        partial = page.partial
        older = search_cursor(searched_from, page.next) if page.next is not None else None
    elif runtime.database is not None:
        listed = await browse_sessions(
            runtime.database,
            user_id=user,
            since=since,
            until=until,
            status=status,
            ttl_seconds=runtime.settings.session_ttl_seconds,
            limit=SESSIONS_OF_PAGE,
            after=place_of(after, "query.after"),
            before=place_of(before, "query.before"),
        )
        found = listed.sessions
        newer = cursor_text(listed.newer) if listed.newer is not None else None
        older = cursor_text(listed.older) if listed.older is not None else None
    elif user is not None:
        answer = await runtime.store.list_sessions(
            user, status=status, limit=SESSIONS_OF_PAGE, after=place_of(after, "query.after")
        )
        found = answer.sessions
        older = cursor_text(answer.next) if answer.next is not None else None
    return render(
        request,
        "sessions.html",
        archive=runtime.database is not None,
        default_days=DEFAULT_RANGE.days,
        deleted=deleted if deleted is not None and await _is_gone(runtime, deleted) else None,
        first=f"/sessions?{urlencode(state)}",
        hits=hits,
        newer=f"/sessions?{urlencode({**state, 'before': newer})}" if newer else None,
        older=f"/sessions?{urlencode({**state, 'after': older})}" if older else None,
        paged=after is not None or newer is not None,
        partial=partial,
        searched=bool(words.strip()),
        searched_from=searched_from,
        sessions=found,
        state=state,
        wanted=status,
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
class Shown:
    """A message as it is shown: `text` may be its beginning only, of so many `characters`. `written_at` as stores keep it."""

    seq: int
    role: str
    written_at: str
    text: str
    characters: int
    sources: Sequence[str]
    processing_time_ms: float | None

    @classmethod
    def of(cls, line: str, *, whole: int | None = None) -> "Shown":
        """Out of a store's line, which is read once. `whole`: the seq of the one that is not cut."""
        fields = json.loads(line)
        content, metadata = fields["content"], fields["metadata"]
        sources, took = metadata.get("sources"), metadata.get("processing_time_ms")
        return cls(
            seq=fields["seq"],
            role=fields["role"],
            written_at=fields["timestamp"],
            text=content if fields["seq"] == whole else content[:CHARACTERS_SHOWN],
            characters=len(content),
            sources=tuple(map(_source, sources)) if isinstance(sources, list) else (),
            # True is an int of Python's.
            processing_time_ms=took if isinstance(took, int | float) and not isinstance(took, bool) else None,
        )

    @property
    def is_cut(self) -> bool:
        return len(self.text) < self.characters


def _source(source: object) -> str:
    return source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)


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


@router.get("/sessions/{session_id}")
async def transcript(
    request: Request,
    runtime: Served,
    session_id: SessionId,
    before: Seq = None,
    at: Seq = None,
    whole: Seq = None,
) -> Response:
    """The newest messages; `before` one; or those around `at`. `whole` is shown whatever its length."""
    # Before the history: that read slides the time to live.
    redis = await in_redis(runtime, session_id)
    if at is not None:
        before = min(at + MESSAGES_OF_PAGE // 2, SEQ_MAX)
    history = await runtime.store.read_history(session_id, max_messages=MESSAGES_OF_PAGE, before_seq=before)
    messages = [Shown.of(line, whole=whole) for line in history.lines]
    last = messages[-1].seq if messages else 0
    newer = last + MESSAGES_OF_PAGE + 1 if last < history.session.message_count else None
    return render(
        request,
        "transcript.html",
        at=at,
        history=history,
        last=last,
        messages=messages,
        newer=newer,
        older=history.next_before_seq,
        postgres=runtime.database is not None,
        redis=redis,
        session=history.session,
    )


@router.get("/sessions/{session_id}/messages")
async def older_messages(
    request: Request, runtime: Served, session_id: SessionId, before: Annotated[int, Query(ge=1, le=SEQ_MAX)]
) -> Response:
    """The page of a transcript before one, for a script that puts it above that one."""
    history = await runtime.store.read_history(session_id, max_messages=MESSAGES_OF_PAGE, before_seq=before)
    return render(
        request,
        "transcript_messages.html",
        at=None,
        messages=[Shown.of(line) for line in history.lines],
        older=history.next_before_seq,
        session=history.session,
    )


# Deletion


@router.get("/sessions/{session_id}/delete")
async def ask_to_delete(request: Request, runtime: Served, session_id: SessionId) -> Response:
    read = await runtime.store.get_session(session_id)
    return render(request, "delete.html", session=read.session)


@router.post("/sessions/{session_id}/delete")
async def delete(request: Request, runtime: Served, session_id: SessionId) -> Response:
    _refuse_other_sites(request)
    await runtime.store.delete_session(session_id)
    return RedirectResponse(f"/sessions?deleted={session_id}", HTTPStatus.SEE_OTHER)


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
