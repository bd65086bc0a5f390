"""`chat-sessions report NAME`: numbers about the archived chats, by SQL that anybody can read."""

import asyncio
from datetime import datetime
from typing import Annotated

import typer

from app.analytics.reports import REPORTS, Report, last_days, run
from app.chat import format_time, utc_now
from app.cli.moments import moment
from app.cli.output import Json, fail, print_json, print_table, refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.wiring import open_database

_DAYS = 30


def report(
    name: Annotated[str | None, typer.Argument(help="which report; without it, all are listed")] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=moment,
            metavar="TIME",
            help="from this moment on: 2026-01-31, or 2026-01-31T09:30+07:00; UTC unless it says otherwise "
            rf"\[default: {_DAYS} days, the last one included]",
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(parser=moment, metavar="TIME", help=r"before this moment \[default: now]"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="how many rows of a ranking")] = 20,
    json: Json = False,
) -> None:
    """Report on the sessions in PostgreSQL: how many, by whom, how fast, on which sources. Days are UTC."""
    if name is None:
        _list(json=json)
        return
    if name not in REPORTS:
        listed = "\n".join(f"  {one.name}: {one.definition}" for one in REPORTS.values())
        fail(f"there is no report {name!r}; there are:\n{listed}", code=2)
    until = until or utc_now()
    since = since or last_days(_DAYS, until=until)
    with refusals_are_lines():
        found = asyncio.run(_run(name, since, until, limit))
    if json:
        rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
        print_json({"report": name, "since": format_time(since), "until": format_time(until), "rows": rows})
    else:
        title = f"{since:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC"
        print_table(found.columns, [[_shown(value) for value in row] for row in found.rows], title=title)


async def _run(name: str, since: datetime, until: datetime, limit: int) -> Report:
    settings = command_settings()
    required_database_url(settings)
    async with open_database(settings) as database:
        return await run(database, name, since=since, until=until, limit=limit)


def _list(*, json: bool) -> None:
    if json:
        print_json([{"name": one.name, "definition": one.definition} for one in REPORTS.values()])
    else:
        print_table(["report", "what it says"], [(one.name, one.definition) for one in REPORTS.values()])


def _shown(value: object) -> object:
    """A tenth of a millisecond or of a percent is enough to read; JSON has it all."""
    return round(value, 1) if isinstance(value, float) else value
