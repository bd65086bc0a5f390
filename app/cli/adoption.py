"""What `mode` and `adopt` share: both take sessions over from Redis while services serve, and say what they did."""

import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.cli.output import print_table
from app.cli.targets import patient, required_database_url
from app.errors import ModeRefused, StartRefused
from app.maintenance.backfill import Backfill, Named, Tally, elected
from app.postgres.cache_state import alive
from app.postgres.schema import require_revision
from app.redis_sessions.client import BoundedRedis
from app.settings import Settings
from app.wiring import Stores, backfill_of, open_database, open_redis, open_stores

_PLAIN_EVERY_SECONDS = 2.0

PerSecond = Annotated[
    float | None,
    typer.Option(
        "--per-second", min=0.1, help="take over at most so many sessions a second", show_default="no limit"
    ),
]


@dataclass(frozen=True, kw_only=True)
class Opened:
    stores: Stores
    redis: BoundedRedis
    backfill: Backfill


@asynccontextmanager
async def opened(settings: Settings, *, per_second: float | None = None) -> AsyncIterator[Opened]:
    """Both stores, and what takes sessions over. The epoch is left to the services, where there are any.

    Raises `ModeRefused` where Redis is another one than theirs.
    """
    required_database_url(settings)
    if not settings.enable_redis_sessions:
        raise StartRefused(
            "ENABLE_REDIS_SESSIONS=false: there is no Redis", hint="set it as the services have it"
        )
    async with (
        open_redis(patient(settings)) as redis,
        # Services leave it to this command then, and all that is taken over is in one report.
        elected(lambda: open_database(settings.model_copy(update={"database_pool_size": 1}))),
        open_stores(settings, follows=not await others(settings)) as stores,
    ):
        state = await stores.keeper.read()
        if state.trusting and await redis.identity() != state.redis_identity:
            raise ModeRefused(
                "REDIS_URL leads to another Redis than the one that the services trust",
                hint="give this command their REDIS_URL; or wait a second, if that one was just restarted",
            )
        yield Opened(stores=stores, redis=redis, backfill=backfill_of(stores, redis, per_second=per_second))


async def others(settings: Settings) -> int:
    """How many instances are serving the database."""
    async with open_database(settings) as database:
        await require_revision(database)
        return len(await alive(database))


@contextmanager
def shown() -> Iterator[Callable[[Tally], None]]:
    """A bar on a terminal's standard error; in a pipe now and then a line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plainly()
        return
    with Progress(
        TextColumn("keys in Redis"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[adopted]} sessions taken over"),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", adopted=0)
        yield lambda tally: bar.update(
            task, total=tally.total, completed=tally.scanned, adopted=tally.sessions_adopted
        )


def _plainly() -> Callable[[Tally], None]:
    next_at = time.monotonic() + _PLAIN_EVERY_SECONDS

    def say(tally: Tally) -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + _PLAIN_EVERY_SECONDS
            sys.stderr.write(
                f"{tally.scanned} of {tally.total} keys, {tally.sessions_adopted} sessions taken over\n"
            )
            sys.stderr.flush()

    return say


def left_behind(command: str) -> str:
    """What a Ctrl-C leaves is a mode that serves."""
    return (
        "what was taken over stays so. In mode draining everything is served, and a running service "
        f"goes on in the background. To go on here: `chat-sessions {command}`"
    )


def as_json(tally: Tally) -> dict[str, Any]:
    return {
        "keys": tally.scanned,
        "sessions_adopted": tally.sessions_adopted,
        "messages_added": tally.messages_added,
        "messages_known": tally.messages_known,
        "messages_gone": tally.messages_gone,
        "gone": _named(tally.gone),
        "expired": _named(tally.expired),
        "conflicts": _named(tally.conflicts),
    }


def _named(named: Named) -> dict[str, Any]:
    return {"count": named.count, "sessions": named.shown}


def print_tally(tally: Tally) -> None:
    print_table(
        ["taken over", "count", "meaning"],
        [
            ("sessions", tally.sessions_adopted, "now in PostgreSQL, with all that Redis held of them"),
            ("messages added", tally.messages_added, "that PostgreSQL did not have"),
            ("messages known", tally.messages_known, "that it had already"),
            ("messages gone", tally.messages_gone, "that Redis's window had dropped before: nobody has them"),
            ("expired", tally.expired.count, "sessions that ended in Redis: as PostgreSQL had them before"),
            ("conflicts", tally.conflicts.count, "sessions that stay in Redis: mend or remove them there"),
        ],
    )
    listed = [
        (title, session_id, what)
        for title, named in (
            ("messages gone", tally.gone),
            ("expired", tally.expired),
            ("conflict", tally.conflicts),
        )
        for session_id, what in named.shown.items()
    ]
    if listed:
        print_table(["look at", "session", "what"], listed)
    for title, named in (
        ("messages gone", tally.gone),
        ("expired", tally.expired),
        ("conflicts", tally.conflicts),
    ):
        if named.count > len(named.shown):
            print(f"{title}: {named.count - len(named.shown)} sessions more")
