"""`chat-sessions import`: what `export` wrote, or the guide's backup, into PostgreSQL while services serve."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from app.archive.importing import Imported, Restore, import_sessions, sources_of
from app.archive.reading import Bounds, Problem
from app.cli.adoption import opened, others
from app.cli.output import (
    Json,
    interruptible,
    print_json,
    print_table,
    progress_of_unknown,
    refusals_are_lines,
)
from app.cli.targets import command_settings, required_database_url
from app.settings import Settings
from app.wiring import open_stores


def import_(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="folders that `export` wrote, files of them, or a sessions_backup.json"
        ),
    ],
    json: Json = False,
) -> None:
    """Import sessions from an export, or from the guide's `sessions_backup.json`, while services serve or before.

    Nothing that is stored is changed: a session that is there grows where the stored history is the beginning of the
    file's, and is left alone and named where they differ. Run it as often as you like.

    Ends with 0 where all is there now, with 1 where it is refused or something was left out: each with file and line.
    """
    began = time.monotonic()
    with refusals_are_lines(), interruptible("what was imported stays. The same command goes on."):
        done = asyncio.run(_import(command_settings(), paths))
    seconds = time.monotonic() - began
    if json:
        print_json(asdict(done) | {"seconds": round(seconds, 3)})
    else:
        print_table(
            ["imported", "count", "meaning"],
            [
                ("sessions made", done.sessions_made, "that were not there"),
                ("sessions grown", done.sessions_grown, "by messages that the stored history had not yet"),
                ("sessions known", done.sessions_known, "with every message: left as they are"),
                ("messages added", done.messages_added, ""),
                ("messages known", done.messages_known, "that were there already"),
                ("left out", done.problems, "named above, with file and line"),
            ],
        )
        print(f"{done.messages_added + done.messages_known} messages in {seconds:.1f} s")
    if done.problems:
        raise typer.Exit(1)


async def _import(settings: Settings, paths: list[Path]) -> Imported:
    required_database_url(settings)
    sources = sources_of(paths)
    async with _restorer(settings) as restore:
        with progress_of_unknown("messages") as (begin, advance):
            known = [source.messages for source in sources]
            begin(sum(filter(None, known)) if None not in known else None)
            return await import_sessions(restore, sources, bounds_of(settings), tell=_tell, advance=advance)


def bounds_of(settings: Settings) -> Bounds:
    return Bounds(
        content_bytes_max=settings.message_content_bytes_max,
        metadata_bytes_max=settings.message_metadata_bytes_max,
        metadata_levels_max=settings.message_metadata_levels_max,
        user_id_characters_max=settings.user_id_characters_max,
    )


def _tell(problem: Problem) -> None:
    typer.echo(f"left out: {problem}", err=True)


@asynccontextmanager
async def _restorer(settings: Settings) -> AsyncIterator[Restore]:
    """Through the cache where services have one: a session that stands in Redis is marked before it grows."""
    if settings.enable_redis_sessions:
        async with opened(settings) as both:
            assert both.stores.hybrid is not None  # noqa: S101 - ENABLE_REDIS_SESSIONS is set
            yield both.stores.hybrid.restore
    else:
        async with open_stores(settings, follows=not await others(settings)) as stores:
            yield stores.durable.restore_unfenced
