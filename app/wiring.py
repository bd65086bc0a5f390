"""Builds everything in one place and closes it in reverse: for the API, the commands, and the tests."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal

from app.assistants import Assistant, load_assistant
from app.chat import utc_now
from app.errors import ChatError, DurableStoreUnavailable, StartRefused
from app.hybrid import HybridChatSessionStore
from app.postgres.engine import Database, create_engine
from app.postgres.partitions import MONTHS_AHEAD, make_partitions, months_from
from app.postgres.schema import REVISION, claim_state, current_revision, require_revision
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.client import BoundedRedis, create_redis
from app.redis_sessions.store import RedisChatSessionStore
from app.settings import Settings
from app.store import ChatSessionStore, StoreHealth

log = logging.getLogger("chat_sessions.wiring")

ServedMode = Literal["hybrid", "redis-only", "postgres"]

_PARTITIONS_EVERY_SECONDS = 6 * 3600


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a request needs. `database` and `redis` are None where the mode has none."""

    settings: Settings
    mode: ServedMode
    store: ChatSessionStore
    assistant: Assistant
    database: Database | None
    embedded: bool = False

    async def health(self) -> tuple[StoreHealth, ...]:
        """Each store's state, and the schema's where there is a database."""
        stores = await self.store.health()
        if self.database is None:
            return stores
        try:
            revision = await current_revision(self.database)
        except DurableStoreUnavailable:
            return stores
        if revision == REVISION:
            return stores
        wrong = f"schema revision {revision or 'none'}, this version needs {REVISION}"
        return tuple(
            StoreHealth(name=one.name, status="fail", state=wrong) if one.name == "postgres" else one
            for one in stores
        )


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """The database alone, for commands. Raises `StartRefused` without DATABASE_URL."""
    if settings.database_url is None:
        raise StartRefused(
            "DATABASE_URL is not set", hint="export DATABASE_URL=postgresql://user:password@host/db"
        )
    database = Database(
        create_engine(
            settings.database_url,
            application_name="chat-sessions",
            pool_size=settings.database_pool_size,
            pooler=settings.database_pooler,
        )
    )
    try:
        yield database
    finally:
        await database.close()


def required_redis_url(settings: Settings) -> str:
    if settings.redis_url is None:
        raise StartRefused("REDIS_URL is not set", hint="export REDIS_URL=redis://host:6379")
    return settings.redis_url


@asynccontextmanager
async def open_redis(settings: Settings) -> AsyncIterator[BoundedRedis]:
    """The sessions' database of Redis. Raises `StartRefused` without REDIS_URL."""
    timeout_seconds = settings.redis_timeout_ms / 1000
    redis = create_redis(
        required_redis_url(settings), database=settings.redis_db_sessions, timeout_seconds=timeout_seconds
    )
    try:
        yield BoundedRedis(redis, timeout_seconds=timeout_seconds)
    finally:
        await redis.aclose()


@asynccontextmanager
async def open_runtime(settings: Settings, *, embedded: bool = False) -> AsyncIterator[Runtime]:
    """Everything that serving takes, for URLs that are set. Closed in reverse, background work first.

    Raises `StartRefused` where the settings, the schema, or the database's mode do not fit together.
    """
    async with AsyncExitStack() as stack:
        # First what only looks: a start that is refused must not have claimed the database for its mode.
        if settings.enable_redis_sessions:
            required_redis_url(settings)
        database = None
        if settings.database_url is not None or not settings.redis_only_mode:
            database = await stack.enter_async_context(open_database(settings))
            with _outage_refuses():
                await require_revision(database)
        assistant = load_assistant(
            settings.assistant,
            documents_dir=settings.documents_dir,
            openai_base_url=settings.openai_base_url,
            openai_api_key=settings.openai_api_key,
            openai_model=settings.openai_model,
            openai_system_prompt=settings.openai_system_prompt,
            openai_history_characters_max=settings.openai_history_characters_max,
            openai_retries_max=settings.openai_retries_max,
            deadline_seconds=settings.assistant_timeout_seconds,
        )
        stack.push_async_callback(assistant.close)
        mode: ServedMode = "redis-only"
        if database is not None:
            with _outage_refuses():
                mode = await _served_mode(settings, database)
                await make_partitions(database, months_from(utc_now().date(), MONTHS_AHEAD))
        store = await _open_store(stack, settings, mode, database)
        if database is not None:
            upkeep = asyncio.create_task(_keep_partitions(database))
            stack.push_async_callback(_stop, upkeep)
        yield Runtime(
            settings=settings,
            mode=mode,
            store=store,
            assistant=assistant,
            database=database,
            embedded=embedded,
        )


@contextmanager
def _outage_refuses() -> Iterator[None]:
    try:
        yield
    except DurableStoreUnavailable as exc:
        raise StartRefused(str(exc), hint="start PostgreSQL, or correct DATABASE_URL") from exc


async def _served_mode(settings: Settings, database: Database) -> ServedMode:
    state = await claim_state(database, redis_only=settings.redis_only_mode)
    if state.mode == "redis-only":
        if not settings.enable_redis_sessions:
            raise StartRefused(
                "ENABLE_REDIS_SESSIONS=false, but this database is in mode redis-only",
                hint="set ENABLE_REDIS_SESSIONS=true",
            )
        return "redis-only"
    return "hybrid" if settings.enable_redis_sessions else "postgres"


async def _open_store(
    stack: AsyncExitStack, settings: Settings, mode: ServedMode, database: Database | None
) -> ChatSessionStore:
    if mode == "redis-only":
        store = RedisChatSessionStore(
            redis_url=required_redis_url(settings),
            redis_db=settings.redis_db_sessions,
            redis_db_aux=settings.redis_db_aux,
            session_ttl=settings.session_ttl_seconds,
            messages_max=settings.session_max_messages,
            session_bytes_max=settings.session_bytes_max,
        )
        stack.push_async_callback(store.close)
        return store
    assert database is not None  # noqa: S101 - both other modes were read from it
    durable = PostgresChatSessionStore(database, ttl_seconds=settings.session_ttl_seconds)
    if mode == "postgres":
        return durable
    cache = RedisSessionCache(
        await stack.enter_async_context(open_redis(settings)),
        ttl_seconds=settings.session_ttl_seconds,
        messages_max=settings.session_max_messages,
        bytes_max=settings.session_window_bytes_max,
    )
    return HybridChatSessionStore(
        durable,
        cache,
        messages_max=settings.session_max_messages,
        serve_unverified=settings.pg_outage_reads == "serve",
    )


async def _keep_partitions(database: Database) -> None:
    """Makes next months' partitions long before they are needed, and again after an outage."""
    while True:
        await asyncio.sleep(_PARTITIONS_EVERY_SECONDS)
        try:
            made = await make_partitions(database, months_from(utc_now().date(), MONTHS_AHEAD))
        except ChatError as exc:
            log.warning("partitions were not made, will try again: %s", exc)
        else:
            if made:
                log.info("partitions made: %s", ", ".join(made))


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
