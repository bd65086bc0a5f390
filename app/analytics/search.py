"""Search in transcripts: words or a substring, without accents and case, in a range of time that is always bounded.

PostgreSQL finds candidates by a regular expression, and `Query.hits_in` decides: it is the definition of what is found.
Nothing is needed for it but PostgreSQL itself. The range is read backwards, in windows that widen while they are read
fast, so that a frequent word fills a page from the last hours, and only a rare one has the whole range read.
"""

import re
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.analytics.folding import fold, phrase_pattern, places, substring_pattern
from app.chat import Role, cut_to_milliseconds, format_time
from app.errors import QueryRefused, RangeRefused
from app.postgres.engine import Database
from app.postgres.search_index import WORD_CHARACTERS_MAX, Months, months_for

Match = Literal["words", "substring"]

DEFAULT_RANGE = timedelta(days=7)
RANGE_DAYS_MAX = 92

CHARACTERS_MIN, CHARACTERS_MAX = 2, 200
TERMS_MAX = 10
LIMIT_MAX = 100

#: A search that has read for so long answers with what it found, and where to go on.
ENOUGH_SECONDS = 2.0

_SNIPPET_CHARACTERS, _BEFORE_CHARACTERS = 240, 80

# What a window may take: one that takes longer is read again in smaller ones.
_WINDOW_SECONDS = 1.5
_FIRST_WINDOW, _LEAST_WINDOW = timedelta(hours=1), timedelta(milliseconds=1)
_SPLIT = 16
# Candidates of a statement, at least: of a rare word's, which may be none.
_CANDIDATES_MIN = 20

_QUERY_CANCELED = "57014"
_NO_SESSION = UUID(int=0)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A place in the order of the messages of all sessions: before it is what is older."""

    created_at: datetime
    session_id: UUID = _NO_SESSION
    seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A message that was found. `marks` are the hits in `snippet`, as begin and end in characters (Unicode code
    points); the snippet is the content from character `snippet_start` on, as it was stored.
    """

    place: Place
    user_id: str | None
    role: Role
    snippet: str
    snippet_start: int
    content_characters: int
    marks: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "session_id": str(self.place.session_id),
            "user_id": self.user_id,
            "seq": self.place.seq,
            "role": self.role,
            "created_at": format_time(self.place.created_at),
            "snippet": self.snippet,
            "snippet_start": self.snippet_start,
            "content_characters": self.content_characters,
            "marks": [list(mark) for mark in self.marks],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Hits, newest first. `next` is where to go on, None where the whole range has been searched; `partial` where
    the page ended because it took long, not because it was full.
    """

    hits: tuple[Hit, ...]
    next: Place | None
    partial: bool


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched for: `patterns` for PostgreSQL, which no hit fails, and `terms` over folded text, which decide."""

    patterns: tuple[str, ...]
    terms: tuple[re.Pattern[str], ...]
    #: What an index has of every hit, see `app.postgres.search_index`; empty where it has nothing to say.
    index_words: tuple[str, ...] = ()

    def hits_in(self, content: str) -> list[tuple[int, int]]:
        """Begin and end of each hit in the content, in order; empty unless every term occurs."""
        folded = fold(content)
        found = [[match.span() for match in term.finditer(folded)] for term in self.terms]
        if not all(found):
            return []
        at = places(content)
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(span for spans in found for span in spans):
            if merged and begin < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        # The marks of the last letter are its own.
        return [(at[begin], at[end] if end < len(folded) else len(content)) for begin, end in merged]


def parse_query(words: str, match: Match) -> Query:
    """What the words ask for; raises `QueryRefused`.

    `words`: each word must occur, whole, in any order; words in "quotation marks", or joined by other characters than
    white space, must follow each other. `substring`: the text must occur as it is, white space included.
    """
    if len(words) > CHARACTERS_MAX:
        raise QueryRefused(f"has {len(words)} characters, at most {CHARACTERS_MAX} are searched for")
    folded = fold(words)
    if len(folded.strip()) < CHARACTERS_MIN:
        raise QueryRefused(
            f"has {len(folded.strip())} characters without accents and space around, at least {CHARACTERS_MIN} "
            "are searched for"
        )
    if match == "substring":
        return Query((substring_pattern(folded),), (re.compile(re.escape(folded)),))
    terms = [
        re.findall(r"\w+", quoted or bare) for quoted, bare in re.findall(r'"([^"]*)"?|([^\s"]+)', folded)
    ]
    phrases = sorted({tuple(term) for term in terms if term}, key=lambda term: (-len("".join(term)), term))
    if not phrases:
        raise QueryRefused("holds no letter or digit", hint="search for a substring instead")
    if len(phrases) > TERMS_MAX:
        raise QueryRefused(f"has {len(phrases)} words, at most {TERMS_MAX} are searched for at once")
    return Query(
        tuple(phrase_pattern(phrase) for phrase in phrases),
        tuple(re.compile(r"(?<!\w)" + r"\W+".join(phrase) + r"(?!\w)") for phrase in phrases),
        tuple(
            sorted(
                {
                    part[:WORD_CHARACTERS_MAX]
                    for phrase in phrases
                    for word in phrase
                    for part in re.findall("[a-z0-9_]+", word)
                }
            )
        ),
    )


def check_range(since: datetime, before: Place) -> None:
    """Raises `RangeRefused` for a range that is the wrong way round or too wide."""
    until = before.created_at
    if before <= Place(since):
        raise RangeRefused(
            f"the range ends at {format_time(until)}, which is not after its begin at {format_time(since)}",
            hint="it must begin earlier than it ends",
        )
    if until - since > timedelta(days=RANGE_DAYS_MAX):
        raise RangeRefused(
            f"the range has {(until - since) / timedelta(days=1):.1f} days, at most {RANGE_DAYS_MAX} are searched "
            "at once",
            hint="ask for a shorter one",
        )


async def search(
    database: Database,
    query: Query,
    *,
    since: datetime,
    before: Place,
    user_id: str | None = None,
    role: Role | None = None,
    limit: int = 20,
) -> Page:
    """The newest `limit` hits from `since` on and before a place: `Place(until)`, or the `next` of a page.

    A hit is on one page, whatever is written or deleted meanwhile. Raises `RangeRefused`.
    """
    check_range(since, before)
    filters = {"user_id": user_id, "role": role}
    months = await months_for(database, query.index_words)
    start, began, width, hits = before, time.monotonic(), _FIRST_WINDOW, list[Hit]()
    while before > Place(since):
        begin = max(since, cut_to_milliseconds(before.created_at - width))
        asked = max(limit - len(hits), _CANDIDATES_MIN)
        asked_at = time.monotonic()
        rows = await _candidates(database, query, months, begin, before, filters, asked)
        if rows is None and width <= _LEAST_WINDOW:
            raise RangeRefused(f"the messages of {format_time(begin)} take too long to read")
        for row in rows or ():
            before = Place(row.created_at, row.session_id, row.seq)
            if spans := query.hits_in(row.content):
                hits.append(_hit(row, before, spans))
                if len(hits) == limit:
                    return Page(hits=tuple(hits), next=before, partial=False)
        if rows is None:
            width = max(_LEAST_WINDOW, width / _SPLIT)
        else:
            width = _next_width(width, time.monotonic() - asked_at)
            if len(rows) < asked:
                before = Place(begin)
        if Place(since) < before != start and time.monotonic() - began > ENOUGH_SECONDS:
            return Page(hits=tuple(hits), next=before, partial=True)
    return Page(hits=tuple(hits), next=None, partial=False)


def _next_width(width: timedelta, seconds: float) -> timedelta:
    """Wider by what leaves a window well below its time."""
    return min(
        width * min(4.0, max(0.25, _WINDOW_SECONDS / 3 / max(seconds, 0.001))), timedelta(days=RANGE_DAYS_MAX)
    )


async def _candidates(
    database: Database,
    query: Query,
    months: Months,
    since: datetime,
    before: Place,
    filters: dict[str, str | None],
    limit: int,
) -> list[Any] | None:
    """The newest messages of a window that may be hits; None where they were not found in time."""
    values: dict[str, Any] = {
        "since": since,
        "at": before.created_at,
        "session_id": before.session_id,
        "seq": before.seq,
        "limit": limit,
        "months": list(months.others),
        **{name: value for name, value in filters.items() if value is not None},
        **{f"pattern{index}": pattern for index, pattern in enumerate(query.patterns)},
    }
    conditions = [_FILTERS[name] for name, value in filters.items() if value is not None]
    conditions += [f'm.content COLLATE "C" ~ :pattern{index}' for index in range(len(query.patterns))]
    selects = [_SELECT.format("".join(f" AND {one}" for one in conditions))]
    if months.indexed:
        values |= {"indexed_months": list(months.indexed), "words": list(query.index_words)}
        selects.append(selects[0].replace(":months", ":indexed_months") + _BY_INDEX)
    async with database.core() as conn:
        await conn.execute(_BOUNDS)
        try:
            found = await conn.execute(text(_NEWEST.format(" UNION ALL ".join(selects))), values)
        except DBAPIError as exc:
            if getattr(exc.orig, "sqlstate", None) == _QUERY_CANCELED:
                return None
            raise
        return list(found)


# Read only against a mistake of ours. For one transaction, because a pooler keeps no more. The engine's plans are
# made once for all parameters, and for few rows; here the window decides the plan.
_BOUNDS = text(
    "SELECT set_config('transaction_read_only', 'on', true), set_config('plan_cache_mode', 'force_custom_plan', true), "
    f"set_config('enable_seqscan', 'on', true), set_config('statement_timeout', '{_WINDOW_SECONDS:g}s', true)"
)

_FILTERS = {
    "role": "m.role = :role",
    "user_id": "m.session_id IN (SELECT session_id FROM chat.chat_sessions WHERE user_id = :user_id)",
}

_SELECT = """
SELECT m.session_id, m.seq, m.role, m.created_at, m.content
FROM chat.chat_messages m
WHERE m.session_month = ANY(CAST(:months AS date[])) AND m.created_at >= :since AND m.created_at <= :at
  AND (m.created_at, m.session_id, m.seq) < (:at, :session_id, :seq){}
"""

_BY_INDEX = " AND chat.search_words(m.content) @> CAST(:words AS text[])"

# The owners of those that are given, not of all that match. Not from schema analytics: below a security barrier a
# regular expression would be tried on every message of every month, before the range is.
_NEWEST = """
SELECT m.session_id, s.user_id, m.seq, m.role, m.created_at, m.content
FROM (
    SELECT * FROM ({}) m ORDER BY created_at DESC, session_id DESC, seq DESC LIMIT :limit
) m
LEFT JOIN chat.chat_sessions s USING (session_id)
ORDER BY m.created_at DESC, m.session_id DESC, m.seq DESC
"""


def _hit(row: Any, place: Place, spans: list[tuple[int, int]]) -> Hit:
    content: str = row.content
    start = max(0, spans[0][0] - _BEFORE_CHARACTERS)
    # A cut is before a letter, not before the marks of one.
    while 0 < start < spans[0][0] and "\u0300" <= content[start] <= "\u036f":
        start += 1
    end = max(start + _SNIPPET_CHARACTERS, spans[0][1])
    return Hit(
        place=place,
        user_id=row.user_id,
        role=row.role,
        snippet=content[start:end],
        snippet_start=start,
        content_characters=len(content),
        marks=tuple((begin - start, until - start) for begin, until in spans if until <= end),
    )
