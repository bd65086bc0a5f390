"""The named reports of `queries.sql`: what there is, and how one is run.

A report reads the views of schema `analytics`, in one statement, over a range of time that is always bounded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.chat import format_time
from app.errors import RangeRefused, UnknownReport
from app.postgres.engine import STATEMENT_TIMEOUT_SECONDS, Database

#: Reports by the day have a row for each: this bounds them.
RANGE_DAYS_MAX = 3660

_QUERY_CANCELED = "57014"

# Read only against a mistake in queries.sql. For one transaction, because a pooler keeps no more.
_BOUNDS = text(
    "SELECT set_config('transaction_read_only', 'on', true), set_config('statement_timeout', "
    # The engine's plans are made once for all parameters; a report's range decides its plan.
    f"'{STATEMENT_TIMEOUT_SECONDS:g}s', true), set_config('plan_cache_mode', 'auto', true)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A named statement. `definition` is the sentence that says what its numbers mean."""

    name: str
    definition: str
    sql: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Rows in the order of the report; a value is text, a number, a date, or None for not known."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def parse_queries(source: str) -> dict[str, Query]:
    """Queries by name: `-- name --`, then comment lines with the definition, then one statement.

    What stands before the first name is a preamble. Raises `ValueError` for a file that is not so made.
    """
    queries: dict[str, Query] = {}
    parts = re.split(r"^-- (\w+) --$", source, flags=re.MULTILINE)[1:]
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        found = re.fullmatch(r"\n((?:-- .+\n)+)([^;]+);\s*", body)
        if found is None:
            raise ValueError(f"query {name}: expected its definition, then one statement that ends in ;")
        if name in queries:
            raise ValueError(f"query {name} is there twice")
        definition = " ".join(line.removeprefix("-- ") for line in found[1].splitlines())
        queries[name] = Query(name=name, definition=definition, sql=found[2].strip())
    return queries


REPORTS: Mapping[str, Query] = parse_queries(
    Path(__file__).with_name("queries.sql").read_text(encoding="utf-8")
)


def last_days(days: int, *, until: datetime) -> datetime:
    """The midnight (UTC) that begins the last `days` days before `until`, its own day included."""
    last = (until - timedelta(microseconds=1)).astimezone(UTC)
    return last.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=days - 1)


async def run(database: Database, name: str, *, since: datetime, until: datetime, limit: int) -> Report:
    """Report `name` over what happened from `since` on and before `until`.

    `limit` bounds the rows of a ranking. Raises `UnknownReport`, and `RangeRefused` for a range that is the
    wrong way round, too wide, or not read within the time that a statement has.
    """
    query = REPORTS.get(name)
    if query is None:
        raise UnknownReport(f"there is no report {name!r}", hint=f"there are {', '.join(REPORTS)}")
    _refuse_wrong_range(since, until)
    async with database.core() as conn:
        await conn.execute(_BOUNDS)
        try:
            result = await conn.execute(text(query.sql), {"since": since, "until": until, "limit": limit})
        except DBAPIError as exc:
            if getattr(exc.orig, "sqlstate", None) == _QUERY_CANCELED:
                raise RangeRefused(
                    f"report {name} takes longer than {STATEMENT_TIMEOUT_SECONDS:g} s over this range",
                    hint="ask for a shorter one",
                ) from exc
            raise
        return Report(columns=tuple(result.keys()), rows=tuple(tuple(row) for row in result))


def _refuse_wrong_range(since: datetime, until: datetime) -> None:
    if since >= until:
        raise RangeRefused(
            f"the range ends at {format_time(until)}, which is not after its begin at {format_time(since)}",
            hint="since must be earlier than until",
        )
    if until - since > timedelta(days=RANGE_DAYS_MAX):
        raise RangeRefused(
            f"the range has {(until - since).days} days, at most {RANGE_DAYS_MAX} are reported on at once",
            hint="ask for a shorter one",
        )
