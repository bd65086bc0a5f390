"""Which servers a command talks to: those of the settings, else those that a running `serve` has started."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app.errors import StartRefused
from app.postgres.engine import Database, create_engine
from app.postgres.schema import current_revision
from app.settings import Settings, read_settings

if TYPE_CHECKING:  # it needs a Unix, and the other commands do not
    from app.embedded import EmbeddedServers

_FILE = "urls.json"

#: A command waits longer for Redis than a request may: who runs one looks, or takes something over, and is not in a hurry.
_REDIS_TIMEOUT_MS = 5000


@contextmanager
def announced(settings: Settings, embedded: "EmbeddedServers") -> Iterator[None]:
    """While it lasts, commands that are given no URLs find the embedded servers."""
    path = settings.data_dir / _FILE
    path.touch(mode=0o600)
    path.write_text(
        json.dumps({"database_url": embedded.database_url, "redis_url": embedded.redis_url}), encoding="utf-8"
    )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def command_settings() -> Settings:
    """The settings, with the URLs of a running service's embedded servers where none are given."""
    settings = read_settings()
    try:
        found = json.loads((settings.data_dir / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return settings
    return settings.model_copy(
        update={name: url for name, url in found.items() if url and getattr(settings, name) is None}
    )


def patient(settings: Settings) -> Settings:
    """The settings for a command's own questions to Redis."""
    return settings.model_copy(update={"redis_timeout_ms": max(settings.redis_timeout_ms, _REDIS_TIMEOUT_MS)})


def required_database_url(settings: Settings) -> str:
    if settings.database_url is None:
        raise StartRefused(
            "there is no database to talk to: DATABASE_URL is not set, and no `chat-sessions serve` "
            f"with embedded servers runs on DATA_DIR={settings.data_dir}",
            hint="export DATABASE_URL=postgresql://user:password@host/db",
        )
    return settings.database_url


def revision_of(database_url: str) -> str | None:
    async def ask() -> str | None:
        database = Database(create_engine(database_url, application_name="chat-sessions", pool_size=1))
        try:
            return await current_revision(database)
        finally:
            await database.close()

    return asyncio.run(ask())
