"""`chat-sessions repair`: what is wrong in Redis, mended from PostgreSQL while services serve."""

import asyncio
from collections.abc import Mapping

import typer

from app.cli.output import Json, print_json, print_table, refusals_are_lines
from app.cli.surveys import EXIT_OUT, as_json, opened, print_survey, walk
from app.cli.targets import command_settings
from app.errors import StartRefused
from app.maintenance.audit import Mending
from app.maintenance.survey import Survey
from app.settings import Settings

_MEANING: Mapping[Mending, str] = {
    "filled": "written anew from PostgreSQL",
    "removed": "taken out of Redis",
    "adopted": "taken over into PostgreSQL, message by message",
    "left": "not mended: for a person to decide, or after Redis is trusted again",
}


def repair(json: Json = False) -> None:
    """Mend what `verify` finds wrong in Redis, and adopt what Redis holds for itself, while services serve.

    PostgreSQL decides, and nothing in it is changed but by an adoption. An entry that Redis owns, or in the guide's
    format, is never removed: PostgreSQL takes it over first. In Redis-only mode nothing is changed.

    Ends with 0 where nothing is wrong any more, with 1 where something is, with 2 where a store could not be asked.
    """
    with refusals_are_lines(code=EXIT_OUT):
        entries = asyncio.run(_repair(command_settings()))
    if json:
        print_json(as_json(entries) | {"mended": dict(entries.mended)})
    else:
        print_survey(entries)
        print_table(
            ["mended", "count", "meaning"],
            [(name, entries.mended[name], text) for name, text in _MEANING.items() if entries.mended[name]],
        )
    if entries.left:
        raise typer.Exit(1)


async def _repair(settings: Settings) -> Survey:
    async with opened(settings) as stores:
        if stores.auditor is None:
            raise StartRefused(
                "ENABLE_REDIS_SESSIONS=false: there is no Redis to repair",
                hint="set it as the services have it",
            )
        return await walk(stores, stores.auditor.repair)
