"""`chat-sessions export`: the archive in files, for other tools and for `chat-sessions import`."""

import asyncio
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from app.archive.export import Exported, export_sessions
from app.archive.manifest import Format, Selection
from app.chat import LEGACY_MONTH
from app.cli.moments import moment
from app.cli.output import Json, interruptible, print_json, progress_of_unknown, refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.cli.texts import text
from app.wiring import open_database


def _month(text: str) -> date:
    if text == "legacy":
        return LEGACY_MONTH
    try:
        return datetime.strptime(text, "%Y-%m").replace(tzinfo=UTC).date()
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is no month like 2026-11, nor `legacy`") from exc


def export(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="a folder that is empty, or holds this export half done")
    ] = Path("chat-export"),
    kind: Annotated[
        Format,
        typer.Option(
            "--format", help=r"`parquet` needs the extra: python -m pip install 'chat-sessions\[export]'"
        ),
    ] = "jsonl",
    months: Annotated[
        list[date] | None,
        typer.Option(
            "--month",
            parser=_month,
            metavar="MONTH",
            help="sessions made in this month, as 2026-11 or `legacy` (ids without a time); may be repeated",
        ),
    ] = None,
    user_id: Annotated[
        str | None,
        typer.Option("--user", parser=text, metavar="USER_ID", help="only this user's sessions"),
    ] = None,
    session_ids: Annotated[
        list[UUID] | None, typer.Option("--session", help="only this session; may be repeated")
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            "--from", parser=moment, metavar="TIME", help="sessions created from this moment on; UTC"
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option("--to", parser=moment, metavar="TIME", help="sessions created before this moment"),
    ] = None,
    json: Json = False,
) -> None:
    """Export sessions with all their messages into files, one pair a month, with a manifest.

    Each month is one snapshot of the database. Stopped, or run again, it goes on: what is finished is verified and
    kept. `chat-sessions import DIR` takes it back.

    Ends with 0 where all is there, with 1 where it is refused.
    """
    if since is not None and until is not None and since >= until:
        raise typer.BadParameter("--from is not before --to: give the earlier moment first")
    selection = Selection(
        months=tuple(sorted(set(months or ()))),
        user_id=user_id,
        session_ids=tuple(sorted(set(session_ids or ()))),
        since=since,
        until=until,
    )
    with refusals_are_lines(), interruptible("what is finished stays. The same command goes on with it."):
        done = asyncio.run(_export(folder, selection, kind))
    if json:
        print_json(
            {
                "folder": str(folder),
                "sessions": done.sessions,
                "messages": done.messages,
                "months": done.months,
                "months_kept": done.kept,
            }
        )
        return
    print(
        f"{_counted(done.sessions, 'session')} with {_counted(done.messages, 'message')} "
        f"in {_counted(done.months, 'month')}: {folder}"
    )
    if done.kept:
        print(f"{done.kept} of the months were finished before, and are as they were written")


async def _export(folder: Path, selection: Selection, kind: Format) -> Exported:
    settings = command_settings()
    required_database_url(settings)
    async with open_database(settings) as database:
        with progress_of_unknown("messages") as (begin, advance):
            return await export_sessions(database, folder, selection, kind=kind, begin=begin, advance=advance)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
