"""`chat-sessions rollup`: what reports read, brought up to date by hand, or counted anew."""

import asyncio
from collections.abc import Callable
from typing import Annotated

import typer

from app.analytics.rollups import Rollups
from app.cli.output import progress, refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.errors import DurableStoreUnavailable, StartRefused
from app.postgres.engine import Database
from app.postgres.schema import require_revision
from app.settings import Settings
from app.wiring import open_database

#: While the service counts, too.
_TURN_SECONDS = 0.05

#: An outage is waited out for so many attempts; losing a turn to the service looks like one.
_ATTEMPTS = 20


def rollup(
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="forget all and count anew, with the days of ANALYTICS_TIMEZONE")
    ] = False,
) -> None:
    """Count all that reports do not have yet. The service does so by itself; it may go on meanwhile."""
    with refusals_are_lines():
        settings = command_settings()
        required_database_url(settings)
        print(asyncio.run(_run(settings, rebuild=rebuild)))


async def _run(settings: Settings, *, rebuild: bool) -> str:
    async with open_database(settings) as database:
        await require_revision(database)
        rollups = Rollups(database, timezone=settings.analytics_timezone)
        now = await rollups.pending()
        if rebuild:
            await rollups.forget()
        elif now.timezone not in {None, settings.analytics_timezone}:
            raise StartRefused(
                f"the roll-ups have days of {now.timezone}, and ANALYTICS_TIMEZONE is {settings.analytics_timezone}",
                hint="`chat-sessions rollup --rebuild` counts all anew; reports are not whole meanwhile",
            )
        with progress("counting sessions", await _sessions(database)) as advance:
            counted = await _count(rollups, advance)
    return f"{counted} sessions counted, days of {settings.analytics_timezone}"


async def _sessions(database: Database) -> int:
    async with database.connection() as conn:
        sessions: int = await conn.fetchval(
            "SELECT greatest(0, reltuples)::bigint FROM pg_class WHERE oid = 'chat.chat_sessions'::regclass"
        )
    return sessions


async def _count(rollups: Rollups, advance: Callable[[int], None]) -> int:
    counted = failures = 0
    while (now := await rollups.pending()).marks or now.backfills:
        try:
            done = await rollups.round()
        except DurableStoreUnavailable:
            failures += 1
            if failures == _ATTEMPTS:
                raise
            done = None
        if done is None:
            await asyncio.sleep(_TURN_SECONDS)
            continue
        failures = 0
        counted += done.sessions + done.backfilled
        advance(done.backfilled)
    return counted
