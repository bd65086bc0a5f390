"""`GET /api/analytics/search`: what was said, found in the transcripts."""

import asyncio
import re
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from app import strict_json
from app.analytics import search as searching
from app.api.moments import MOMENT
from app.api.problems import no_archive, refused_field
from app.api.requests import WHOLE_NUMBER, OnlyUser, Served, known_query, readable_query
from app.api.schemas import FoundOut, Problem
from app.chat import Role, format_time, from_milliseconds, milliseconds_of, utc_now
from app.errors import Overloaded, QueryRefused, RangeRefused
from app.wiring import Runtime

router = APIRouter(
    prefix="/api/analytics", tags=["analytics"], dependencies=[Depends(readable_query), Depends(known_query)]
)

#: Of one process: they take long, and share its connections with the chats.
SEARCHES_AT_ONCE = 2

# The begin of the range and the place, in milliseconds since 1970, the session and the seq.
_CURSOR = re.compile(r"([0-9]{1,14})\.([0-9]{1,14})\.([0-9a-f]{32})\.([0-9]{1,10})", re.ASCII)
_SEQ_MAX = 2**31 - 1


def search_cursor(since: datetime, place: searching.Place) -> str:
    """Where the next page of a search begins, for `after`."""
    return f"{milliseconds_of(since)}.{milliseconds_of(place.created_at)}.{place.session_id.hex}.{place.seq}"


def _cursor(after: str) -> tuple[datetime, searching.Place]:
    if not (place := _CURSOR.fullmatch(after)) or int(place[4]) > _SEQ_MAX:
        raise refused_field(
            "unknown_cursor", "query.after", "is no cursor of a search: take it from `next` of a page"
        )
    since, at = (from_milliseconds(int(digits)) for digits in (place[1], place[2]))
    return since, searching.Place(at, UUID(place[3]), int(place[4]))


@router.get(
    "/search",
    response_model=FoundOut,
    response_model_exclude_none=True,
    summary="Search the transcripts, newest first",
    responses={
        status: {"model": Problem, "description": described}
        for status, described in {
            409: "there is no archive: the service runs on Redis alone",
            422: "bad input: each field is named",
            503: "PostgreSQL can't be reached, or two searches are under way; see `Retry-After`",
        }.items()
    },
)
async def search(
    request: Request,
    runtime: Served,
    user_id: OnlyUser,
    q: Annotated[
        str,
        Query(
            description="case and accents never matter, in any Unicode form",
            examples=["điều kiện"],
            min_length=searching.CHARACTERS_MIN,
            max_length=searching.CHARACTERS_MAX,
        ),
    ],
    match: Annotated[
        searching.Match,
        Query(
            description='words: all of them, whole, in any order; in "quotation marks": one after the other. '
            "substring: the text as it is",
            examples=["words"],
        ),
    ] = "words",
    since: Annotated[
        datetime | None,
        Query(alias="from", description="default: 7 days before `to`", examples=["2025-11-14"]),
        *MOMENT,
    ] = None,
    until: Annotated[
        datetime | None,
        Query(alias="to", description="exclusive; default: now", examples=["2025-11-21T00:00:00+07:00"]),
        *MOMENT,
    ] = None,
    role: Annotated[Role | None, Query(description="only messages of this role", examples=["user"])] = None,
    limit: Annotated[
        int, Query(ge=1, le=searching.LIMIT_MAX, description="hits of a page", examples=[20]), WHOLE_NUMBER
    ] = 20,
    after: Annotated[
        str | None,
        Query(
            description="the `next` of the page before, with the same other parameters; it holds the range, so "
            "`from` and `to` are not looked at",
            examples=["1762502400000.1763116200123.01998f2e5b7c7d3a9f102b6d4c8e1a55.2"],
            json_schema_extra={"pattern": f"^{_CURSOR.pattern}$"},
        ),
    ] = None,
) -> Response:
    """At most 92 days at once. Follow `next` until it is absent: then the whole range has been searched. A page with
    `partial` ended because it took long: it may hold few hits, or none, and `next` goes on.
    """
    page, begin = await search_page(
        runtime,
        request.app.state.searches,
        q,
        match=match,
        since=since,
        until=until,
        after=after,
        user_id=user_id,
        role=role,
        limit=limit,
    )
    return JSONResponse(_found(page, begin))


async def search_page(
    runtime: Runtime,
    at_once: asyncio.Semaphore,
    q: str,
    *,
    match: searching.Match = "words",
    since: datetime | None = None,
    until: datetime | None = None,
    after: str | None = None,
    **filters: Any,
) -> tuple[searching.Page, datetime]:
    """A page of hits, and where the range begins. Raises `RequestRefused` that names the field, or `Overloaded`."""
    if runtime.database is None:
        raise no_archive()
    if flaw := strict_json.text_flaw(q):
        raise refused_field("text_not_storable", "query.q", flaw)
    if after is not None:
        begin, before = _cursor(after)
    else:
        before = searching.Place(until or utc_now())
        begin = since or before.created_at - searching.DEFAULT_RANGE
    try:
        query = searching.parse_query(q, match)
    except QueryRefused as exc:
        raise refused_field(exc.code, "query.q", str(exc)) from exc
    if at_once.locked():
        raise Overloaded(f"{SEARCHES_AT_ONCE} searches are under way already", retry_after_seconds=2)
    try:
        async with at_once:
            page = await searching.search(runtime.database, query, since=begin, before=before, **filters)
    except RangeRefused as exc:
        raise refused_field(exc.code, "query.after" if after is not None else "query.from", str(exc)) from exc
    return page, begin


def _found(page: searching.Page, since: datetime) -> dict[str, Any]:
    return {
        "hits": [hit.to_json() for hit in page.hits],
        "searched_from": format_time(since if page.next is None else page.next.created_at),
        "partial": page.partial,
        **({"next": search_cursor(since, page.next)} if page.next is not None else {}),
    }
