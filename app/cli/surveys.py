"""What `verify` and `repair` share: both walk through Redis while services serve, and say what they found."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from app.cli.output import print_table, progress
from app.cli.targets import required_database_url
from app.coherence.ports import CacheMoved
from app.errors import StartRefused
from app.maintenance.survey import (
    AT_ONCE,
    Examine,
    Outcome,
    Survey,
    random_entries,
    survey,
)
from app.redis_sessions.scan import key_count, scan_sessions
from app.settings import Settings
from app.wiring import Stores, open_stores

#: Neither "differs" nor "does not": nobody could look.
EXIT_OUT = 2

#: What to make of an outcome; in this order they are printed.
MEANING: Mapping[Outcome, str] = {
    "same": "trusted, and what PostgreSQL has",
    "older": "of an older epoch, and equal: validated when it is read",
    "dirty": "marked by a write: validated when it is read",
    "different": "not what PostgreSQL has, and not trusted: filled anew when it is read",
    "absent": "gone from Redis before it was looked at",
    "redis-owned": "Redis holds it for itself: adopted when it is touched, or by `chat-sessions repair`",
    "guide": "in the guide's format: adopted when it is touched, or by `chat-sessions repair`",
    "violation": "TRUSTED, AND NOT WHAT POSTGRESQL HAS: keep this, run `chat-sessions repair`, report it",
    "incomplete": "POSTGRESQL LACKS MESSAGES THAT ITS ROW COUNTS: save the entry, restore them from a backup",
    "without-row": "no such session in PostgreSQL: `chat-sessions repair` removes it",
    "unreadable": "no session's value: `chat-sessions repair` replaces it where PostgreSQL has the session",
    "no-ttl": "would never leave Redis: `chat-sessions repair` gives it a time to live",
    "stranger": "a key that is no session's: find out who writes to this database of Redis",
    "busy": "its row was locked all the time: run it again",
    "failed": "could not be looked at",
}


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Stores]:
    """Both stores, for a command that leaves the epoch to the services."""
    required_database_url(settings)
    # Rows that are locked together, and one for what an adoption or a page of rows needs beside them.
    settings = settings.model_copy(update={"database_pool_size": AT_ONCE + 1})
    try:
        async with open_stores(settings, follows=False) as stores:
            yield stores
    except CacheMoved as exc:
        raise StartRefused(
            "REDIS_URL leads to another Redis than the one that the services trust",
            hint="correct it; or wait a second, if that one was just restarted",
        ) from exc


async def walk(stores: Stores, examine: Examine, *, sample: int | None = None) -> Survey:
    """Examines every entry, or so many random ones."""
    assert stores.cache is not None  # noqa: S101 - the caller has an auditor from the same place
    state = await stores.keeper.read()
    redis = stores.cache.reach(state)
    entries = scan_sessions(redis) if sample is None else random_entries(redis, sample)
    with progress("entries in Redis", sample or await key_count(redis)) as advance:
        return await survey(entries, examine, advance=advance)


def as_json(entries: Survey) -> dict[str, Any]:
    return {
        "entries": entries.outcomes.total(),
        "outcomes": {name: entries.outcomes[name] for name in MEANING if entries.outcomes[name]},
        "named": [
            {"outcome": one.outcome, "session_id": one.what, "difference": one.difference}
            for one in entries.named
        ],
        "wrong": entries.left,
    }


def print_survey(entries: Survey) -> None:
    print_table(
        ["entries", "count", "meaning"],
        [
            ("all", entries.outcomes.total(), ""),
            *(
                (name, entries.outcomes[name], text)
                for name, text in MEANING.items()
                if entries.outcomes[name]
            ),
        ],
    )
    if entries.named:
        print_table(
            ["look at", "session", "difference"],
            [(one.outcome, one.what, one.difference) for one in entries.named],
        )
