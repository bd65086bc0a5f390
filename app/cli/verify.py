"""`chat-sessions verify`: both stores compared, session by session, while services serve."""

import asyncio
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Annotated
from uuid import UUID

import typer

from app.cli.output import Json, print_json, print_table, progress, refusals_are_lines
from app.cli.surveys import EXIT_OUT, as_json, opened, print_survey, walk
from app.cli.targets import command_settings
from app.maintenance.audit import Finding, Mending
from app.maintenance.survey import Survey
from app.postgres.counters import Flaw, WrongRow, compare_counters
from app.settings import Settings
from app.wiring import Stores

#: Of each flaw, so many rows are named.
_NAMED_MAX = 5


@dataclass(slots=True)
class _Rows:
    checked: int = 0
    wrong: Counter[Flaw] = field(default_factory=Counter)
    named: list[WrongRow] = field(default_factory=list)


def verify(
    sample: Annotated[
        int | None, typer.Option(min=1, help="only so many random entries, and no rows; else all of both")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="compute each row's chain again from its messages")
    ] = False,
    json: Json = False,
) -> None:
    """Compare both stores, session by session, while services serve. Changes nothing.

    Ends with 0 where nothing is wrong, with 1 where something is, with 2 where a store could not be asked.
    """
    with refusals_are_lines(code=EXIT_OUT):
        entries, rows = asyncio.run(_verify(command_settings(), sample, deep=deep))
    if json:
        of_rows = {
            "rows": {"checked": rows.checked, "wrong": dict(rows.wrong)},
            "wrong_rows": [asdict(one) for one in rows.named],
        }
        print_json(as_json(entries) | of_rows)
    else:
        print_survey(entries)
        if sample is None:
            _print_rows(rows)
    if entries.left or rows.wrong.total():
        raise typer.Exit(1)


async def _verify(settings: Settings, sample: int | None, *, deep: bool) -> tuple[Survey, _Rows]:
    async with opened(settings) as stores:
        entries = Survey()
        if (auditor := stores.auditor) is not None:

            async def examine(session_id: UUID) -> tuple[Finding, Mending | None]:
                return await auditor.audit(session_id), None

            entries = await walk(stores, examine, sample=sample)
        return entries, await _rows(stores, deep=deep) if sample is None else _Rows()


async def _rows(stores: Stores, *, deep: bool) -> _Rows:
    rows = _Rows()
    with progress("rows in PostgreSQL") as advance:
        async for count, wrong in compare_counters(stores.database, deep=deep):
            rows.checked += count
            for one in wrong:
                rows.wrong[one.flaw] += 1
                if rows.wrong[one.flaw] <= _NAMED_MAX:
                    rows.named.append(one)
            advance(count)
    return rows


def _print_rows(rows: _Rows) -> None:
    meaning = {
        "miscounted": "message_count is not the number of messages",
        "wrong-chain": "chain is not that of the messages",
    }
    print_table(
        ["rows", "count", "meaning"],
        [("all", rows.checked, ""), *((flaw, count, meaning[flaw]) for flaw, count in rows.wrong.items())],
    )
    if rows.named:
        print_table(
            ["look at", "session", "difference"],
            [(one.flaw, one.session_id, one.difference) for one in rows.named],
        )
