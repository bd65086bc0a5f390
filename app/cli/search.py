"""`chat-sessions search WORDS`: messages of the archive that say something."""

import asyncio
from datetime import datetime
from typing import Annotated, Any

import typer

from app.analytics import search as searching
from app.analytics.search import DEFAULT_RANGE, LIMIT_MAX, Hit, Match, Page, Place, parse_query
from app.chat import Role, cut_to_milliseconds, format_time, utc_now
from app.cli.moments import moment
from app.cli.output import Json, print_json, print_table, refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.cli.texts import text
from app.errors import QueryRefused
from app.wiring import open_database

# A terminal shows the words and little around them.
_AROUND_CHARACTERS = 40


def search(
    words: Annotated[
        list[str],
        typer.Argument(
            parser=text,
            metavar="WORDS...",
            help="""all must occur, in any order; a phrase: '"điều kiện tham gia"'""",
        ),
    ],
    since: Annotated[
        datetime | None,
        typer.Option(
            "--from",
            parser=moment,
            metavar="TIME",
            help="from this moment on: 2026-01-31, or 2026-01-31T09:30+07:00; UTC unless it says otherwise "
            rf"\[default: {DEFAULT_RANGE.days} days before the end]",
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option("--to", parser=moment, metavar="TIME", help=r"before this moment \[default: now]"),
    ] = None,
    user: Annotated[
        str | None, typer.Option(parser=text, metavar="USER_ID", help="only this user's sessions")
    ] = None,
    role: Annotated[Role | None, typer.Option(help="only messages of this role")] = None,
    substring: Annotated[
        bool, typer.Option("--substring", help="the text as it is, not whole words")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=LIMIT_MAX, help="the newest so many")] = 20,
    json: Json = False,
) -> None:
    """Search in the transcripts in PostgreSQL, newest first. Case and accents do not matter."""
    until = cut_to_milliseconds(until or utc_now())
    since = cut_to_milliseconds(since) if since else until - DEFAULT_RANGE
    match: Match = "substring" if substring else "words"
    with refusals_are_lines():
        query = _query(" ".join(words), match)
        found = asyncio.run(_search(query, since, until, user_id=user, role=role, limit=limit))
    more = found.next is not None
    if json:
        print_json(
            {
                "from": format_time(since),
                "to": format_time(until),
                "hits": [hit.to_json() for hit in found.hits],
                "more": more,
            }
        )
        return
    title = f"{since:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC" + (", the newest" if more else "")
    print_table(
        ["at", "session", "seq", "role", "user", "text"],
        [
            (
                format_time(hit.place.created_at),
                hit.place.session_id,
                hit.place.seq,
                hit.role,
                hit.user_id,
                _around(hit),
            )
            for hit in found.hits
        ],
        title=title,
    )


def _query(words: str, match: Match) -> searching.Query:
    try:
        return parse_query(words, match)
    except QueryRefused as exc:
        raise QueryRefused(f"what is searched for {exc.detail}", hint=exc.hint) from exc


async def _search(
    query: searching.Query, since: datetime, until: datetime, *, limit: int, **filters: Any
) -> Page:
    """Goes on until the page is full or the range is searched: who waits in a terminal can press Ctrl-C."""
    settings = command_settings()
    required_database_url(settings)
    hits: list[Hit] = []
    place: Place | None = Place(until)
    async with open_database(settings) as database:
        while place is not None and len(hits) < limit:
            page = await searching.search(
                database, query, since=since, before=place, limit=limit - len(hits), **filters
            )
            hits += page.hits
            place = page.next
    return Page(hits=tuple(hits), next=place, partial=False)


def _around(hit: Hit) -> str:
    begin, end = hit.marks[0]
    first, last = max(0, begin - _AROUND_CHARACTERS), end + _AROUND_CHARACTERS
    return (
        ("…" if hit.snippet_start + first else "")
        + hit.snippet[first:last]
        + ("…" if hit.snippet_start + last < hit.content_characters else "")
    )
