"""`chat-sessions search-index`: an index over the words of closed months, for searches that go far back."""

import asyncio
from typing import Literal

import typer

from app.chat import utc_now
from app.cli.output import Json, print_json, print_table, progress, refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.errors import StartRefused
from app.postgres.search_index import PartitionState, build_indexes, drop_indexes, partition_states
from app.settings import Settings
from app.wiring import open_database


def search_index(
    what: Literal["status", "build", "drop"] = typer.Argument(help="build: of each month that has ended"),
    json: Json = False,
) -> None:
    """Build, drop or show the search index of the months that have ended. Searches find the same without it."""
    with refusals_are_lines():
        settings = command_settings()
        required_database_url(settings)
        if what != "status" and settings.database_pooler != "none":
            raise StartRefused(
                "an index is not built or dropped through a transaction pooler",
                hint="set DATABASE_POOLER=none, and DATABASE_URL to PostgreSQL itself",
            )
        changed, states = asyncio.run(_do(settings, what))
    if json:
        print_json(
            {
                "built" if what == "build" else "dropped": changed,
                "partitions": [
                    {"partition": one.name, "indexed": one.indexed, "index_bytes": one.index_bytes}
                    for one in states
                ],
            }
        )
        return
    print_table(
        ["partition", "search index", "MB"],
        [
            (
                one.name,
                "yes" if one.indexed else "broken: build it again" if one.begun else "",
                round(one.index_bytes / 1e6, 1) if one.index_bytes else None,
            )
            for one in states
        ],
    )


async def _do(settings: Settings, what: str) -> tuple[list[str], list[PartitionState]]:
    async with open_database(settings) as database:
        changed: list[str] = []
        if what == "build":
            with progress("months") as advance:
                changed = await build_indexes(
                    database, before=utc_now().date().replace(day=1), advance=advance
                )
        elif what == "drop":
            changed = await drop_indexes(database)
        return changed, await partition_states(database)
