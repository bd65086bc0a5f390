"""The named reports of `queries.sql`: what there is, and how one is run.

A report reads the views of schema `analytics`, in one statement, over a range of time that is always bounded. It is read
from roll-ups where they can say exactly what is asked for; else from the messages, over a short range; else it is refused.
"""

import asyncio
import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TextIO
from zoneinfo import available_timezones

from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.analytics.questions import most_asked
from app.chat import format_time
from app.errors import (
    GranularityRefused,
    RangeRefused,
    TimezoneRefused,
    UnknownReport,
    UnknownTimezone,
    UserRefused,
)
from app.postgres.engine import STATEMENT_TIMEOUT_SECONDS, Database

Granularity = Literal["hour", "day", "week", "month"]
AskedGranularity = Literal["auto", Granularity]
Variant = Literal["days", "hours", "plain", "folded"]

#: Reports by the day have a row for each: this bounds them.
RANGE_DAYS_MAX = 3660
_YEAR_MIN = 1900
#: A zone away from the end of the next one is no time that Python has.
_YEAR_MAX = 9998
#: Of a report that is read from the messages.
PLAIN_DAYS_MAX = 92
#: Of one whose rows are folded here.
FOLDED_DAYS_MAX = 7
PERIODS_MAX = 10_000

# Of 200 characters each, that are added up in memory.
_SPELLINGS_MAX = 100_000

_AUTO_PERIODS = 62
_PERIOD: Mapping[Granularity, timedelta] = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(days=7),
    "month": timedelta(days=30),
}

# What reads nothing finer can as well read the other.
_BY_HOUR = "analytics.messages_hourly AS t(at)"
_BY_5_MINUTES = "analytics.messages_5_minutes AS t(at)"

_QUERY_CANCELED = "57014"
_NO_SUCH_ZONE = "22023"

# Read only against a mistake in queries.sql. For one transaction, because a pooler keeps no more.
_BOUNDS = (
    "set_config('transaction_read_only', 'on', true), set_config('statement_timeout', "
    # The engine's plans are made once for all parameters, and for few rows; a report's range decides its plan.
    f"'{STATEMENT_TIMEOUT_SECONDS:g}s', true), set_config('plan_cache_mode', 'auto', true), "
    "set_config('enable_seqscan', 'on', true), "
    # It takes longer to compile a report than to run it.
    "set_config('jit', 'off', true)"
)

# A question finds its answer by key, in the one month that can have it. The planner takes that for a look into each
# month, and would read the answers of all of them (measured at 10 M: 6 s in place of 0.3 s).
_BY_KEY = text(
    "SELECT set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)"
)

# All that must be known before a report: bounds for its transaction, how roll-ups stand, both ends of the range as
# instants and as local times, and whether the zone is whole hours, or whole five minutes, from UTC all the time between.
# In one statement: each takes as long as a report of days.
_PROLOGUE = f"""
WITH state AS (
    SELECT timezone, complete, lag_seconds FROM analytics.rollup_state
), zone AS (
    SELECT coalesce(CAST(:timezone AS text), (SELECT timezone FROM state), 'UTC') AS zone
), ending AS (
    SELECT zone, coalesce(CAST(:until_day AS date)::timestamp AT TIME ZONE zone, CAST(:until AS timestamptz),
                          (date_trunc('day', now() AT TIME ZONE zone) + interval '1 day') AT TIME ZONE zone) AS until
    FROM zone
), span AS (
    SELECT zone, until, coalesce(
        CAST(:since_day AS date)::timestamp AT TIME ZONE zone, CAST(:since AS timestamptz),
        (date_trunc('day', until AT TIME ZONE zone - interval '1 microsecond') - make_interval(days => CAST(:days AS integer) - 1))
            AT TIME ZONE zone
    ) AS since
    FROM ending
)
SELECT s.timezone, coalesce(s.complete, false) AS complete, coalesce(s.lag_seconds, 0) AS lag_seconds,
       zone, since, until, since AT TIME ZONE zone AS local_since, until AT TIME ZONE zone AS local_until,
       whole_hours, whole_five_minutes, {_BOUNDS}
FROM span
LEFT JOIN state s ON true
CROSS JOIN LATERAL (
    SELECT bool_and(seconds % 3600 = 0) AS whole_hours, bool_and(seconds % 300 = 0) AS whole_five_minutes
    FROM (
        SELECT extract(epoch FROM at AT TIME ZONE zone - at AT TIME ZONE 'UTC') AS seconds
        FROM (
            -- A wider range is refused.
            SELECT generate_series(since, least(until, since + make_interval(days => {RANGE_DAYS_MAX + 1})), interval '7 days') AS at
            UNION ALL
            SELECT until
        ) AS instants
    ) AS offsets
) AS place
"""  # noqa: S608 - of what stands above

_UNITS = {"_ms": "milliseconds", "_rate": "ratio", "share": "ratio", "stickiness": "ratio", "change": "ratio"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A named statement. `definition` says what its numbers mean, `hours` and `plain` are the same from other views.

    `folded`: its rows are spellings of questions, which are then added up.
    """

    name: str
    definition: str
    sql: str
    hours: str | None = None
    plain: str | None = None
    folded: bool = False

    @property
    def variants(self) -> dict[Variant, str]:
        """By what they are read from, the fastest first."""
        if self.folded:
            return {"folded": self.sql}
        found: dict[Variant, str] = {"days" if ":first_day" in self.sql else "hours": self.sql}
        if self.hours is not None:
            found["hours"] = self.hours
        if self.plain is not None:
            found["plain"] = self.plain
        return found

    @property
    def by_period(self) -> bool:
        return ":granularity" in self.sql

    @property
    def parameters(self) -> tuple[str, ...]:
        return (
            *("from", "to", "timezone"),
            *(("granularity",) if self.by_period else ()),
            *(("user_id",) if self.of_users else ()),
            *(("limit",) if ":limit" in self.sql or self.folded else ()),
        )

    @property
    def of_users(self) -> bool:
        """Whether it can be of one user: only the messages are."""
        return self.plain is not None or self.folded


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Rows in the order of the report; a value is text, a number, a date, a local time, an id, or None for not known.

    `source`: what it was read from. `complete` and `lag_seconds` are those of `analytics.rollup_state`, and only of
    interest where that is not the messages. `sql` is the statement as it could be typed.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    since: datetime
    until: datetime
    timezone: str
    granularity: Granularity | None
    source: Literal["roll-ups", "messages"]
    complete: bool
    lag_seconds: float
    sql: str

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows, by the columns' names."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    @property
    def json_rows(self) -> list[dict[str, object]]:
        """The same as JSON has them."""
        return [{name: cell_of(value) for name, value in record.items()} for record in self.records]

    def write_csv(self, file: TextIO) -> None:
        """For a spreadsheet, too, which would run a text that begins like a formula: behind an apostrophe it is shown."""
        lines = csv.writer(file)
        lines.writerow(self.columns)
        lines.writerows([_spreadsheet_cell(value) for value in row] for row in self.rows)


def unit_of(column: str) -> str:
    """What the numbers of a column count; text and times have none of their own."""
    if column in {"source", "role", "metric", "question", "session_id", "user_id"}:
        return "text"
    if column in {"day", "period", "cohort_week", "started_at", "last_cited", "last_asked"}:
        return "time"
    if column == "percent":
        return "percent"
    return next((unit for suffix, unit in _UNITS.items() if column.endswith(suffix)), "count")


def cell_of(value: object) -> object:
    """A value as JSON and CSV have it: local times as they are, instants in UTC."""
    if isinstance(value, datetime):
        if value.tzinfo is not None:
            return format_time(value)
        return value.isoformat(timespec="minutes")
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _spreadsheet_cell(value: object) -> object:
    cell = cell_of(value)
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in _FORMULA else cell


_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def parse_queries(source: str) -> dict[str, Query]:
    """Queries by name: `-- name --`, then comment lines with the definition, then one statement.

    `-- name folded --` is such a one, too. `-- name hours --` and `-- name plain --` follow it, with a statement only. What
    stands before the first name is a preamble. Raises `ValueError` for a file that is not so made.
    """
    made: dict[str, dict[str, Any]] = {}
    parts = re.split(r"^-- (\w+(?: (?:hours|plain|folded))?) --$", source, flags=re.MULTILINE)[1:]
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        name, _, variant = heading.partition(" ")
        folded = variant == "folded"
        variant = "" if folded else variant
        found = re.fullmatch(r"\n((?:-- .+\n)*)([^;]+);\s*", body)
        if found is None or bool(found[1]) == bool(variant):
            raise ValueError(f"query {heading}: expected its definition, then one statement that ends in ;")
        if (name in made) != bool(variant) or variant in made.get(name, {}):
            raise ValueError(f"query {heading} is there twice, or stands before its first")
        if variant:
            made[name][variant] = found[2].strip()
        else:
            definition = " ".join(line.removeprefix("-- ") for line in found[1].splitlines())
            made[name] = {"name": name, "definition": definition, "sql": found[2].strip(), "folded": folded}
    return {name: Query(**fields) for name, fields in made.items()}


REPORTS: Mapping[str, Query] = parse_queries(
    Path(__file__).with_name("queries.sql").read_text(encoding="utf-8")
)


async def run(
    database: Database,
    name: str,
    *,
    since: datetime | date | None = None,
    until: datetime | date | None = None,
    days: int = 30,
    granularity: AskedGranularity = "auto",
    timezone: str | None = None,
    user_id: str | None = None,
    limit: int = 20,
    plain: bool = False,
) -> Report:
    """Report `name` over what happened from `since` on and before `until`.

    A date is its midnight in `timezone`, by default that of the roll-ups. Without `until`: to the end of today; without
    `since`: the `days` before, or as many as the report takes. `limit` bounds the rows of a ranking; `plain` asks for the messages themselves.
    Raises `UnknownReport`, `UnknownTimezone`, `GranularityRefused`, `UserRefused`, `TimezoneRefused`, and `RangeRefused`
    for a range that is the wrong way round, too wide, cut where no roll-up is, or not read within a statement's time.
    """
    query = find(name)
    if timezone is not None:
        _refuse_unknown_zone(timezone)
    if user_id is not None and not query.of_users:
        raise UserRefused(f"report {name} is not made of one user", hint=_hint("user_id"))
    if query.folded:
        days = min(days, FOLDED_DAYS_MAX)
    async with database.core() as conn:
        place = await _placed(conn, since, until, days, timezone)
        begin, end, zone = place.since, place.until, place.zone
        _refuse_wrong_range(query, begin, end)
        if query.folded:
            await conn.execute(_BY_KEY)
        step = _granularity(query, granularity, end - begin)
        variant, sql = _variant(query, place, step, of_messages=plain or user_id is not None)
        values = {
            "since": begin,
            "until": end,
            "first_day": place.local_since.date(),
            "end_day": place.local_until.date(),
            "timezone": zone,
            "granularity": step,
            "user_id": user_id,
            "limit": limit,
            "different": _SPELLINGS_MAX + 1,
        }
        statement, parameters = _statement(sql)
        used = {name: values[name] for name in parameters}
        try:
            result = await conn.execute(statement, used)
            rows = [tuple(_as_day(value, step) for value in row) for row in result]
        except DBAPIError as exc:
            if getattr(exc.orig, "sqlstate", None) == _QUERY_CANCELED:
                raise RangeRefused(
                    f"report {name} takes longer than {STATEMENT_TIMEOUT_SECONDS:g} s over this range",
                    hint="ask for a shorter one",
                ) from exc
            raise
        if query.folded:
            rows = await _folded(name, rows, limit)
        return Report(
            columns=tuple(result.keys()),
            rows=tuple(rows),
            since=begin,
            until=end,
            timezone=zone,
            granularity=step if query.by_period else None,
            source="messages" if variant in {"plain", "folded"} else "roll-ups",
            complete=place.complete,
            lag_seconds=place.lag_seconds,
            sql=_as_typed(sql, used),
        )


@lru_cache
def _statement(sql: str) -> tuple[TextClause, tuple[str, ...]]:
    """It with the names of its parameters. Kept, for to find them takes longer than some reports do."""
    statement = text(sql)
    return statement, tuple(statement.compile().params)


async def _folded(name: str, spellings: list[Any], limit: int) -> list[Any]:
    if len(spellings) > _SPELLINGS_MAX:
        raise RangeRefused(
            f"report {name} has more than {_SPELLINGS_MAX} different texts in this range",
            hint="ask for a shorter one",
        )
    # In a thread: a week of them takes some tenths of a second, in which others are served.
    return await asyncio.to_thread(most_asked, spellings, limit)


def _as_day(value: object, step: Granularity) -> object:
    """The begin of a period is a local time, of which only hours need more than the day."""
    return value.date() if step != "hour" and isinstance(value, datetime) and value.tzinfo is None else value


def find(name: str) -> Query:
    query = REPORTS.get(name)
    if query is None:
        raise UnknownReport(f"there is no report {name!r}", hint=f"there are {', '.join(REPORTS)}")
    return query


def _hint(parameter: str) -> str:
    able = [one.name for one in REPORTS.values() if parameter in one.parameters]
    return f"these are: {', '.join(able)}"


@lru_cache
def _known_zones() -> frozenset[str]:
    """Empty where Python has no list of them. Kept, for it is read from hundreds of files."""
    return frozenset(available_timezones())


def _refuse_unknown_zone(timezone: str) -> None:
    # PostgreSQL would also take POSIX rules, in which a slip is a zone of its own.
    known = _known_zones()
    if (known and timezone not in known) or not re.fullmatch(r"[A-Za-z0-9_+/-]{1,64}", timezone):
        raise UnknownTimezone(f"there is no time zone {timezone!r}", hint="a name like Asia/Ho_Chi_Minh")


async def _placed(
    conn: AsyncConnection,
    since: datetime | date | None,
    until: datetime | date | None,
    days: int,
    timezone: str | None,
) -> Any:
    """The row of `_PROLOGUE`. Days, and what was not said, are the zone's midnights."""
    for end in (since, until):
        if end is not None and not _YEAR_MIN <= end.year <= _YEAR_MAX:
            raise RangeRefused(
                f"the range begins or ends in the year {end.year}, {_YEAR_MIN} to {_YEAR_MAX} are reported on",
                hint="begin and end within them",
            )
    # A datetime is a date, too.
    since_at, until_at = (end if isinstance(end, datetime) else None for end in (since, until))
    try:
        found = await conn.execute(
            _statement(_PROLOGUE)[0],
            {
                "timezone": timezone,
                "since_day": since if since_at is None else None,
                "since": since_at,
                "until_day": until if until_at is None else None,
                "until": until_at,
                "days": days,
            },
        )
    except DBAPIError as exc:
        if timezone is not None and getattr(exc.orig, "sqlstate", None) == _NO_SUCH_ZONE:
            raise UnknownTimezone(
                f"PostgreSQL knows no time zone {timezone!r}", hint="a name like Asia/Ho_Chi_Minh"
            ) from exc
        raise
    return found.one()


def _refuse_wrong_range(query: Query, since: datetime, until: datetime) -> None:
    if since >= until:
        raise RangeRefused(
            f"the range ends at {format_time(until)}, which is not after its begin at {format_time(since)}",
            hint="from must be earlier than to",
        )
    if until - since > timedelta(days=RANGE_DAYS_MAX):
        raise RangeRefused(
            f"the range has {(until - since).days} days, at most {RANGE_DAYS_MAX} are reported on at once",
            hint="ask for a shorter one",
        )
    if query.folded and until - since > timedelta(days=FOLDED_DAYS_MAX):
        raise RangeRefused(
            f"the range has {(until - since) / timedelta(days=1):.1f} days; report {query.name} reads the messages "
            f"themselves, of at most {FOLDED_DAYS_MAX}",
            hint="ask for a shorter one",
        )


def _granularity(query: Query, asked: AskedGranularity, width: timedelta) -> Granularity:
    """The one asked for; `auto`: the finest that the report has, with `_AUTO_PERIODS` at most."""
    if not query.by_period:
        return "day"
    of_days = "hours" not in query.variants and query.plain is None
    if asked == "hour" and of_days:
        raise GranularityRefused(f"report {query.name} is made of days", hint="ask for day, week, or month")
    if asked != "auto":
        if width / _PERIOD[asked] > PERIODS_MAX:
            raise GranularityRefused(
                f"the range has more than {PERIODS_MAX} periods of a{'n' * (asked == 'hour')} {asked}",
                hint="ask for longer periods, or a shorter range",
            )
        return asked
    for step in list(_PERIOD)[of_days:]:
        if width / _PERIOD[step] <= _AUTO_PERIODS:
            return step
    return "month"


def _variant(query: Query, place: Any, step: Granularity, *, of_messages: bool) -> tuple[Variant, str]:
    """The fastest statement that says exactly what is asked for. Raises `RangeRefused` or `TimezoneRefused`."""
    if query.folded:
        return "folded", query.sql
    if not of_messages and (found := _of_rollups(query.variants, place, step)) is not None:
        return found
    if query.plain is not None and place.until - place.since <= timedelta(days=PLAIN_DAYS_MAX):
        return "plain", query.plain
    raise _made_otherwise(query, place)


def _of_rollups(variants: Mapping[Variant, str], place: Any, step: Granularity) -> tuple[Variant, str] | None:
    if "days" in variants and place.zone == _counted_zone(place) and step != "hour" and _are_midnights(place):
        return "days", variants["days"]
    if (hourly := variants.get("hours")) is None:
        return None
    ends = place.since, place.until
    if _divides(timedelta(hours=1), *ends) and (place.whole_hours or ":timezone" not in hourly):
        return "hours", hourly
    if _BY_HOUR in hourly and _divides(timedelta(minutes=5), *ends) and place.whole_five_minutes:
        return "hours", hourly.replace(_BY_HOUR, _BY_5_MINUTES)
    return None


def _made_otherwise(query: Query, place: Any) -> RangeRefused | TimezoneRefused:
    """Why no statement says exactly what is asked for."""
    since, until, counted_zone = place.since, place.until, _counted_zone(place)
    made_of = f"days of {counted_zone}"
    if (hourly := query.variants.get("hours")) is not None:
        made_of += ", or UTC hours" if _BY_HOUR not in hourly else ", or UTC hours or five minutes"
    if query.plain is not None:
        return RangeRefused(
            f"the range has {(until - since).days} days; at most {PLAIN_DAYS_MAX} are read message by message, as one user, "
            f"or a range or a zone that is not made of {made_of}, takes",
            hint="ask for a shorter one",
        )
    if place.zone != counted_zone and hourly is None:
        return TimezoneRefused(
            f"report {query.name} is made of {made_of}, not of {place.zone}",
            hint=f"ask for {counted_zone}; ANALYTICS_TIMEZONE and `chat-sessions rollup --rebuild` change it",
        )
    return RangeRefused(
        f"report {query.name} is made of {made_of}, and the range is from {format_time(since)} to {format_time(until)}",
        hint="begin and end with one",
    )


def _counted_zone(place: Any) -> str:
    return place.timezone or "UTC"


def _are_midnights(place: Any) -> bool:
    return bool(place.local_since.time() == place.local_until.time() == time())


def _divides(step: timedelta, *moments: datetime) -> bool:
    return not any((moment - datetime(2000, 1, 1, tzinfo=UTC)) % step for moment in moments)


def _as_typed(sql: str, values: Mapping[str, object]) -> str:
    """The statement with its values in it, for `psql`."""
    return re.sub(r"(?<!:):(\w+)", lambda found: _literal(values[found[1]]), sql)


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(value)
    quoted = (value.isoformat() if isinstance(value, date) else str(value)).replace("'", "''")
    # The user's id is compared with text; a backslash is one whatever the server's settings say.
    return f"'{quoted}'" if "\\" not in quoted else "E'" + quoted.replace("\\", "\\\\") + "'"
