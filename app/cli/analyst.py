"""`chat-sessions analyst`: accounts that read schema `analytics`, for people and for tools."""

import asyncio
from typing import Annotated
from urllib.parse import urlsplit

import typer

from app.cli.output import Json, print_json, refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.postgres.analysts import Analyst, add_analyst
from app.postgres.schema import require_revision
from app.settings import Settings
from app.wiring import open_database

analyst = typer.Typer(
    no_args_is_help=True, help="Accounts that may read the views of schema analytics, no more."
)


@analyst.callback()
def _analyst() -> None:
    """Without it, the one command would be the whole of `analyst`."""


@analyst.command()
def add(
    name: Annotated[str, typer.Argument(help="the account's name in PostgreSQL")],
    pii: Annotated[bool, typer.Option("--pii", help="let it read what people wrote, too")] = False,
    json: Json = False,
) -> None:
    """Make an account, and print its URL: its password is shown this once. On one that is there: its rights anew."""
    with refusals_are_lines():
        settings = command_settings()
        url = required_database_url(settings)
        made = asyncio.run(_add(settings, name, pii=pii))
    where = urlsplit(url)
    address = where.netloc.rpartition("@")[2]
    account = f"{name}:{made.password}" if made.password else name
    found = {
        "name": name,
        "role": made.role,
        "url": f"postgresql://{account}@{address}{where.path}",
        "temp_file_limit": made.limited,
    }
    if json:
        print_json(found)
        return
    print(found["url"])
    if made.password is None:
        print(f"{name} was there: it keeps its password, and has the rights of {made.role}")
    if not made.limited:
        print(
            "temp_file_limit is the server's: only a superuser may set it (ALTER ROLE ... SET temp_file_limit)"
        )


async def _add(settings: Settings, name: str, *, pii: bool) -> Analyst:
    async with open_database(settings) as database:
        await require_revision(database)
        return await add_analyst(database, name, pii=pii)
