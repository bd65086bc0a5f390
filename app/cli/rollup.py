"""`chat-sessions rollup`: what reports read, brought up to date by hand, or counted anew."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from app.analytics.rollups import Pending, Rollups, SetAside
from app.chat import format_time
from app.cli.output import Json, fail, print_json, print_table, progress, refusals_are_lines
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

#: Of the sessions that are set aside.
_SHOWN = 100


def rollup(
    what: Annotated[
        Literal["status"] | None, typer.Argument(help="say what is not counted, and why; without it, count")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="forget all and count anew, with the days of ANALYTICS_TIMEZONE")
    ] = False,
    json: Json = False,
) -> None:
    """Count all that reports do not have yet. The service does so by itself; it may go on meanwhile.

    A session that can't be counted is set aside, so that others do not wait for it, and tried again: with pauses by the
    service, now by this command. Ends with 0 where all is counted, with 1 where sessions are set aside.
    """
    if what and rebuild:
        fail("`rollup status` looks and --rebuild counts: choose one", code=2)
    with refusals_are_lines():
        settings = command_settings()
        required_database_url(settings)
        if what:
            _print_status(*asyncio.run(_status(settings)), json=json)
            return
        counted, set_aside = asyncio.run(_run(settings, rebuild=rebuild))
    if json:
        print_json({"counted": counted, "timezone": settings.analytics_timezone, "set_aside": set_aside})
    else:
        print(f"{counted} sessions counted, days of {settings.analytics_timezone}")
    if set_aside:
        fail(
            f"{set_aside} of the sessions can't be counted and are in no report: `chat-sessions rollup status` says why; "
            "mend what it names and run this again"
        )


async def _status(settings: Settings) -> tuple[Pending, list[SetAside]]:
    async with open_database(settings) as database:
        await require_revision(database)
        rollups = Rollups(database, timezone=settings.analytics_timezone)
        return await rollups.pending(), await rollups.set_aside(_SHOWN)


def _print_status(now: Pending, set_aside: list[SetAside], *, json: bool) -> None:
    facts = {
        "timezone": now.timezone,
        "complete": not now.backfills and not now.set_aside,
        "waiting": now.marks,
        "lag_seconds": round(now.lag_seconds, 1),
        "set_aside": now.set_aside,
    }
    sessions: list[dict[str, Any]] = [
        {
            "session_id": str(one.session_id),
            "since": format_time(one.since),
            "failures": one.failures,
            "retry_at": format_time(one.retry_at),
            "error": one.error,
        }
        for one in set_aside
    ]
    if json:
        print_json({**facts, "sessions": sessions})
        return
    print_table(["roll-ups", ""], list(facts.items()))
    if sessions:
        print_table(list(sessions[0]), [list(one.values()) for one in sessions])


async def _run(settings: Settings, *, rebuild: bool) -> tuple[int, int]:
    """How many sessions were counted, and how many can't be."""
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
        await rollups.retry()
        with progress("counting sessions", await _sessions(database)) as advance:
            counted = await _count(rollups, advance)
        return counted, (await rollups.pending()).set_aside


async def _sessions(database: Database) -> int:
    async with database.connection() as conn:
        sessions: int = await conn.fetchval(
            "SELECT greatest(0, reltuples)::bigint FROM pg_class WHERE oid = 'chat.chat_sessions'::regclass"
        )
    return sessions


async def _count(rollups: Rollups, advance: Callable[[int], None]) -> int:
    counted = failures = 0
    while (await rollups.pending()).waits:
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
