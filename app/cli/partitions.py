"""`chat-sessions partitions`: the months of messages, made ahead of time."""

import asyncio
from typing import Annotated

import typer

from app.chat import utc_now
from app.cli.output import Json, print_json, print_table, refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.postgres.partitions import MONTHS_AHEAD, existing_partitions, make_partitions, months_from
from app.settings import Settings
from app.wiring import open_database


def partitions(
    ahead: Annotated[
        int, typer.Option(min=0, max=120, help="how many months after this one to make")
    ] = MONTHS_AHEAD,
    json: Json = False,
) -> None:
    """Make the partitions of this month and the next ones, and list all. The service does so by itself."""
    with refusals_are_lines():
        settings = command_settings()
        required_database_url(settings)
        made, all_of_them = asyncio.run(_make(settings, ahead))
    if json:
        print_json({"made": made, "partitions": all_of_them})
    else:
        print_table(["partition", "state"], [(one, "made" if one in made else "") for one in all_of_them])


async def _make(settings: Settings, ahead: int) -> tuple[list[str], list[str]]:
    async with open_database(settings) as database:
        made = await make_partitions(database, months_from(utc_now().date(), ahead))
        return made, await existing_partitions(database)
