"""`GET /api/analytics` and `/api/analytics/{report}`: the reports, as JSON or CSV."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from app.analytics import reports
from app.api.moments import DAY_OR_MOMENT
from app.api.problems import RequestRefused, no_archive, refused_field
from app.api.requests import WHOLE_NUMBER, OnlyUser, Served, known_query, readable_query
from app.api.schemas import Problem, ReportListOut, ReportOut
from app.chat import format_time
from app.errors import (
    ChatError,
    GranularityRefused,
    Overloaded,
    RangeRefused,
    TimezoneRefused,
    UnknownReport,
    UnknownTimezone,
    UserRefused,
)

router = APIRouter(
    prefix="/api/analytics", tags=["analytics"], dependencies=[Depends(readable_query), Depends(known_query)]
)

#: Of one process: they share its connections with the chats.
REPORTS_AT_ONCE = 2

#: So long a report waits for its turn.
WAIT_SECONDS = 3.0

#: What is wrong where a report is refused.
FIELDS: dict[type[ChatError], str] = {
    UnknownReport: "path.report",
    UnknownTimezone: "query.timezone",
    TimezoneRefused: "query.timezone",
    GranularityRefused: "query.granularity",
    UserRefused: "query.user_id",
    RangeRefused: "query.from",
}


@router.get("", response_model=ReportListOut, summary="List the reports, each with what it says")
async def list_reports() -> Response:
    """Each with its definition, and the parameters that it takes."""
    return JSONResponse(
        {
            "reports": [
                {"name": one.name, "definition": one.definition, "parameters": list(one.parameters)}
                for one in reports.REPORTS.values()
            ]
        }
    )


@router.get(
    "/{report}",
    response_model=ReportOut,
    summary="Report numbers over a range of time, as JSON or CSV",
    responses={
        200: {"content": {"text/csv": {"schema": {"type": "string"}}}},
        **{
            status: {"model": Problem, "description": described}
            for status, described in {
                409: "there is no archive: the service runs on Redis alone",
                422: "bad input: each field is named",
                503: "PostgreSQL can't be reached, or two reports are under way; see `Retry-After`",
            }.items()
        },
    },
)
async def report(
    request: Request,
    runtime: Served,
    user_id: OnlyUser,
    report: Annotated[str, Path(description="its name", examples=["sessions_per_day"])],
    since: Annotated[
        datetime | date | None,
        Query(
            alias="from",
            description="a day of the time zone, or RFC 3339; default: the 30 days before `to`, of questions 7",
            examples=["2025-11-14"],
        ),
        *DAY_OR_MOMENT,
    ] = None,
    until: Annotated[
        datetime | date | None,
        Query(alias="to", description="exclusive; default: the end of today", examples=["2025-11-21"]),
        *DAY_OR_MOMENT,
    ] = None,
    granularity: Annotated[
        reports.AskedGranularity,
        Query(description="how long a period of a series is; auto: some 50 of them", examples=["day"]),
    ] = "auto",
    timezone: Annotated[
        str | None,
        Query(
            description="whose days; default: that of the roll-ups (ANALYTICS_TIMEZONE)",
            examples=["Asia/Ho_Chi_Minh"],
            max_length=64,
        ),
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=1000, description="rows of a ranking", examples=[20]), WHOLE_NUMBER
    ] = 20,
    form: Annotated[
        Literal["json", "csv"] | None,
        Query(alias="format", description="default: by `Accept`, which may be text/csv", examples=["csv"]),
    ] = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """Read from roll-ups where they say exactly what is asked for, else from the messages (`source`), else refused. What was
    written is counted within seconds: `complete` and `lag_seconds` say how far the roll-ups are.
    """
    if runtime.database is None:
        raise no_archive()
    try:
        async with turn(request.app.state.reports):
            found = await reports.run(
                runtime.database,
                report,
                since=since,
                until=until,
                granularity=granularity,
                timezone=timezone,
                user_id=user_id,
                limit=limit,
            )
    except tuple(FIELDS) as exc:
        raise refusal(exc) from exc
    if (form or ("csv" if "text/csv" in accept.lower() else "json")) == "csv":
        return _as_csv(report, found)
    return JSONResponse(_as_json(report, found), headers={"Vary": "Accept"})


def refusal(exc: ChatError) -> RequestRefused:
    """One of `FIELDS` as the refusal of the field that it is about."""
    detail = exc.detail if exc.hint is None else f"{exc.detail} ({exc.hint})"
    return refused_field(exc.code, FIELDS[type(exc)], detail)


@asynccontextmanager
async def turn(at_once: asyncio.Semaphore) -> AsyncIterator[None]:
    """A page asks for many reports at once: they wait for each other, for some time."""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await at_once.acquire()
    except TimeoutError as exc:
        raise Overloaded(f"{REPORTS_AT_ONCE} reports are under way already", retry_after_seconds=1) from exc
    try:
        yield
    finally:
        at_once.release()


def _as_json(name: str, found: reports.Report) -> dict[str, Any]:
    return {
        "report": name,
        "definition": reports.REPORTS[name].definition,
        "from": format_time(found.since),
        "to": format_time(found.until),
        "timezone": found.timezone,
        "granularity": found.granularity,
        "source": found.source,
        "complete": found.complete,
        "lag_seconds": found.lag_seconds,
        "columns": [{"name": column, "unit": reports.unit_of(column)} for column in found.columns],
        "rows": found.json_rows,
        "sql": found.sql,
    }


def _as_csv(name: str, found: reports.Report) -> Response:
    written = io.StringIO()
    found.write_csv(written)
    return Response(
        written.getvalue(),
        media_type="text/csv; charset=utf-8",
        headers={
            "Content-Disposition": f'attachment; filename="{name}.csv"',
            "Vary": "Accept",
            "X-Rollups-Complete": str(found.complete).lower(),
            "X-Rollups-Lag-Seconds": f"{found.lag_seconds:.1f}",
        },
    )
