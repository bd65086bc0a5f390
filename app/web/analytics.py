"""`/analytics`: the reports of `queries.sql` to look at, over one range of time.

Each panel is one report, asked as its call asks it: its numbers, its CSV and its SQL are the same. Charts are drawn by a
script from the numbers that also stand in a table; all else is HTML.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import Request, Response
from pydantic import Field

from app.analytics import reports
from app.analytics.reports import AskedGranularity, Report
from app.api.reports import FIELDS, refusal, turn
from app.api.requests import only_user
from app.chat import format_time, utc_now
from app.errors import ChatError, Unavailable
from app.postgres.engine import Database
from app.web.forms import SinceDay, UntilDay, UserId
from app.web.frame import render
from app.web.languages import language_of
from app.web.routing import Asked, Pages
from app.wiring import Runtime

pages = Pages()

#: Days that one click leads to.
RANGES = (7, 30, 90)

_HEAT_STEPS = 6
_RANKED = 8
_COHORT_WEEKS_MAX = 12

# Made of days: by the hour there are none.
_OF_DAYS = ("active_users",)

_WEEKDAYS = range(1, 8)
_HOURS = range(24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A report as lines over time. `area`: the first is filled."""

    report: str
    lines: tuple[str, ...]
    unit: Literal["count", "milliseconds", "ratio"] = "count"
    area: bool = False


CHARTS = (
    Chart(report="traffic", lines=("messages", "sessions"), area=True),
    Chart(report="active_users", lines=("mau", "wau", "dau")),
    Chart(report="response_time_percentiles", lines=("p50_ms", "p95_ms", "p99_ms"), unit="milliseconds"),
    Chart(report="unanswered_rate", lines=("unanswered_rate", "fallback_rate"), unit="ratio"),
)

_TABLES = ("summary", "traffic_heatmap", "retention", "top_sources", "longest_sessions", "slowest_sessions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A report's answer, or why there is none; and where the same is to be had as CSV."""

    name: str
    definition: str
    found: Report | None
    refusal: ChatError | None
    csv: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.found.records if self.found is not None else []


class AnalyticsAsked(Asked):
    days: Annotated[int, Field(ge=1, le=reports.RANGE_DAYS_MAX)] = 30
    since: SinceDay = None
    until: UntilDay = None
    granularity: AskedGranularity = "auto"
    timezone: Annotated[str, Field(max_length=64)] = ""
    user_id: UserId = ""


@pages.get("/analytics", AnalyticsAsked)
async def analytics(request: Request, runtime: Runtime, asked: AnalyticsAsked) -> Response:
    user = await only_user(runtime, asked.user_id or None)
    given = {
        "from": asked.since,
        "to": asked.until,
        "days": asked.days if asked.since is None else None,
        "granularity": asked.granularity if asked.granularity != "auto" else None,
        "timezone": asked.timezone or None,
        "user_id": user,
    }
    state = {name: str(value) for name, value in given.items() if value is not None}
    if runtime.database is None:
        return render(request, "analytics.html", panels=None)
    panels = await panels_of(
        runtime.database,
        request.app.state.reports,
        since=asked.since,
        until=asked.until,
        days=asked.days,
        granularity=asked.granularity,
        timezone=asked.timezone or None,
        user_id=user,
    )
    text = language_of(request).text
    shown = next(one.found for one in panels.values() if one.found is not None)
    return render(
        request,
        "analytics.html",
        panels=panels,
        charts=[(chart, panels[chart.report], series(chart, panels[chart.report], text)) for chart in CHARTS],
        heat=heatmap(panels["traffic_heatmap"].rows),
        hours=_HOURS,
        cohorts=cohorts(panels["retention"].rows, shown.until.date()),
        days=asked.days,
        now=utc_now(),
        range=shown,
        ranges=[(one, urlencode({**_without_range(state), "days": one})) for one in RANGES],
        state=state,
        transcripts=urlencode(
            {"from": format_time(shown.since), "to": format_time(shown.until)}
            | ({"user_id": user} if user else {})
        ),
        weekdays=_WEEKDAYS,
    )


def _without_range(state: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in state.items() if name not in {"from", "to", "days"}}


async def panels_of(database: Database, at_once: asyncio.Semaphore, **asked: Any) -> Mapping[str, Panel]:
    """Every panel by its report. Raises what is the matter with all of them."""
    names = (*_TABLES, *(chart.report for chart in CHARTS))
    panels = await asyncio.gather(*(_panel(database, at_once, name, **asked) for name in names))
    refusals = [one.refusal for one in panels if one.refusal is not None]
    for one in refusals:
        if isinstance(one, Unavailable):
            raise one
    if len(refusals) == len(panels):
        raise refusal(refusals[0]) from refusals[0]
    return {panel.name: panel for panel in panels}


async def _panel(database: Database, at_once: asyncio.Semaphore, name: str, **asked: Any) -> Panel:
    query = reports.find(name)
    wanted = {**asked, "limit": _RANKED}
    if name in _OF_DAYS and asked["granularity"] == "hour":
        wanted["granularity"] = "day"
    found, why = None, None
    try:
        async with turn(at_once):
            found = await reports.run(database, name, **wanted)
    except tuple(FIELDS) as exc:
        why = exc
    return Panel(
        name=name, definition=query.definition, found=found, refusal=why, csv=_csv(name, query, found, asked)
    )


def _csv(name: str, query: reports.Query, found: Report | None, asked: Mapping[str, Any]) -> str:
    """Where the same rows are to be had: with the ends of the range as they were taken, so that it stays the same."""
    wanted = {
        "format": "csv",
        "granularity": asked["granularity"],
        "timezone": asked["timezone"],
        "user_id": asked["user_id"],
    }
    if found is not None:
        wanted |= {
            "from": format_time(found.since),
            "to": format_time(found.until),
            "timezone": found.timezone,
        }
    parameters = {*query.parameters, "format"}
    kept = {field: value for field, value in wanted.items() if value is not None and field in parameters}
    return f"/api/analytics/{name}?{urlencode(kept)}"


def series(chart: Chart, panel: Panel, text: Callable[[str], str]) -> dict[str, Any]:
    """What the script draws: local times of the report's zone as if they were UTC, in seconds since 1970; a list a line."""
    rows = panel.rows
    return {
        "labels": [text(f"analytics.line.{line}") for line in chart.lines],
        "times": [_seconds(next(iter(row.values()))) for row in rows],
        "lines": [[row[line] for row in rows] for line in chart.lines],
        "unit": chart.unit,
        "area": chart.area,
        "hours": panel.found is not None and panel.found.granularity == "hour",
    }


def _seconds(local: date | datetime) -> int:
    moment = local if isinstance(local, datetime) else datetime.combine(local, time())
    return round(moment.replace(tzinfo=UTC).timestamp())


def heatmap(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], tuple[int, int]]:
    """By weekday and hour: messages, and the step of the scale from 0 to 6. What has none is left out."""
    most = max((row["messages"] for row in rows), default=0)
    return {
        (row["weekday"], row["hour"]): (row["messages"], step_of(row["messages"], most))
        for row in rows
        if row["messages"]
    }


def step_of(value: float, most: float) -> int:
    """0 for nothing, 1 for little, 6 for the most."""
    return min(_HEAT_STEPS, 1 + int(_HEAT_STEPS * value / most)) if value else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Users who wrote first in a week. `weeks`: the share who wrote so many weeks later, and its step; None: not yet."""

    week: date
    users: int
    weeks: tuple[tuple[float, int] | None, ...]


def cohorts(rows: Sequence[Mapping[str, Any]], until: date) -> list[Cohort]:
    """Newest last. A week in which nobody of them wrote has no row: 0 where it has begun before `until`."""
    weeks = min(max((row["weeks_later"] for row in rows), default=0), _COHORT_WEEKS_MAX) + 1
    found: dict[date, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["cohort_week"], {})[row["weeks_later"]] = row
    return [
        Cohort(
            week=week,
            users=by_week[0]["cohort_users"],
            weeks=tuple(
                _retained(by_week.get(later)) if week + timedelta(weeks=later) < until else None
                for later in range(weeks)
            ),
        )
        for week, by_week in found.items()
    ]


def _retained(row: Mapping[str, Any] | None) -> tuple[float, int]:
    share = row["retention_rate"] or 0.0 if row is not None else 0.0
    return share, step_of(share, 1)
