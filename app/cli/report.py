"""`chat-sessions report NAME`: numbers about the archived chats, by SQL that anybody can read."""

import asyncio
import sys
from collections.abc import Sequence
from datetime import date, datetime
from typing import Annotated, Any

import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from app.analytics.reports import REPORTS, AskedGranularity, Report, cell_of, run
from app.chat import format_time
from app.cli.moments import day_or_moment
from app.cli.output import Json, fail, print_json, print_table, refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.cli.texts import text
from app.wiring import open_database

_DAYS = 30
_BAR_CELLS = 40
_BAR_CELLS_MIN = 5
# Of a column: a line, and a blank on each side.
_FRAME_CELLS = 3
_LAG_TOLD_SECONDS = 10


def report(
    name: Annotated[str | None, typer.Argument(help="which report; without it, all are listed")] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            "--from",
            parser=day_or_moment,
            metavar="TIME",
            help="from this moment on: 2026-01-31, a day of the time zone, or 2026-01-31T09:30+07:00, UTC unless it says "
            rf"otherwise \[default: {_DAYS} days, the last one included; 7 of questions]",
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(
            "--to",
            parser=day_or_moment,
            metavar="TIME",
            help=r"before this moment \[default: the end of today]",
        ),
    ] = None,
    granularity: Annotated[
        AskedGranularity,
        typer.Option(help="how long a period of a series is; auto: some 50 of them"),
    ] = "auto",
    timezone: Annotated[
        str | None,
        typer.Option(help=r"whose days, like Asia/Ho_Chi_Minh \[default: that of the roll-ups]"),
    ] = None,
    user: Annotated[
        str | None, typer.Option(parser=text, metavar="USER_ID", help="only what this user did")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="how many rows of a ranking")] = 20,
    json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV, for spreadsheets")] = False,
) -> None:
    """Report on the sessions in PostgreSQL: how many, by whom, how fast, on which sources."""
    if name is None:
        _list(json=json)
        return
    if name not in REPORTS:
        fail(
            f"there is no report {name!r}; there are {', '.join(REPORTS)} "
            "(`chat-sessions report` says what each is)",
            code=2,
        )
    if json and as_csv:
        fail("--json and --csv are two forms of the same: choose one", code=2)
    with refusals_are_lines():
        found = asyncio.run(
            _run(
                name,
                since=since,
                until=until,
                granularity=granularity,
                timezone=timezone,
                user_id=user,
                limit=limit,
            )
        )
    if found.source == "roll-ups":
        _tell_lag(found)
    if json:
        print_json(
            {
                "report": name,
                "from": format_time(found.since),
                "to": format_time(found.until),
                "timezone": found.timezone,
                "granularity": found.granularity,
                "complete": found.complete,
                "lag_seconds": found.lag_seconds,
                "rows": found.json_rows,
            }
        )
    elif as_csv:
        found.write_csv(sys.stdout)
    else:
        _print(found)


async def _run(name: str, **asked: Any) -> Report:
    settings = command_settings()
    required_database_url(settings)
    async with open_database(settings) as database:
        return await run(database, name, days=_DAYS, **asked)


def _tell_lag(found: Report) -> None:
    """On standard error: who reads the numbers must know what is not in them."""
    if found.complete and found.lag_seconds < _LAG_TOLD_SECONDS:
        return
    behind = "sessions are still being counted" if not found.complete else f"{found.lag_seconds:.0f} s behind"
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"not whole yet, {behind}: `chat-sessions rollup` counts at full speed, a running service by itself"
    )


def _list(*, json: bool) -> None:
    if json:
        print_json([{"name": one.name, "definition": one.definition} for one in REPORTS.values()])
    else:
        print_table(["report", "what it says"], [(one.name, one.definition) for one in REPORTS.values()])


def _print(found: Report) -> None:
    zoned = f"{found.since:%Y-%m-%d %H:%M} to {found.until:%Y-%m-%d %H:%M} UTC, days of {found.timezone}"
    rows = [[_shown(value) for value in row] for row in found.rows]
    if sys.stdout.isatty() and found.columns[0] in {"day", "period"} and rows:
        console = Console(highlight=False, markup=False)
        cells = [["" if value is None else str(value) for value in row] for row in rows]
        lengths = [max(map(len, column)) for column in zip(found.columns, *cells, strict=True)]
        # Bars have the room that numbers leave: cut to it they would all look alike.
        room = console.width - sum(length + _FRAME_CELLS for length in (*lengths, 0)) - 1
        if room >= _BAR_CELLS_MIN:
            console.print(_plot(found, cells, min(room, _BAR_CELLS), zoned))
            return
    print_table(found.columns, rows, title=zoned)


def _plot(found: Report, cells: Sequence[Sequence[str]], bar_cells: int, title: str) -> Table:
    """A series as a table whose first number is a bar, too."""
    heights = [float(row[1] or 0) for row in found.rows]
    top = max(heights) or 1
    # An eighth of a cell is the least that shows.
    least = top / bar_cells / 8
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in (*found.columns[:2], "", *found.columns[2:]):
        table.add_column(column, no_wrap=True)
    for row, height in zip(cells, heights, strict=True):
        table.add_row(*row[:2], Bar(top, 0, max(height, least) if height else 0, width=bar_cells), *row[2:])
    return table


def _shown(value: object) -> object:
    """A tenth of a millisecond or of a percent is enough to read, and three figures of a share; JSON has it all."""
    if isinstance(value, float):
        return round(value, 1 if abs(value) >= 1 else 3)
    return cell_of(value) if isinstance(value, date) else value
