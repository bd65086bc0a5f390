"""Builds everything in one place and closes it in reverse: for the API, the commands, and the tests."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from app import __version__
from app.analytics.rollups import BackgroundRollups, Rollups
from app.assistants import Assistant, load_assistant
from app.chat import new_uuid, utc_now
from app.coherence.counts import Counts
from app.coherence.heartbeat import BEATS_PER_LEASE, Heartbeat, next_state
from app.coherence.lease import Lease
from app.coherence.ports import CacheOutage, Mode
from app.errors import ChatError, DurableStoreUnavailable, StartRefused
from app.hybrid import HybridChatSessionStore
from app.live import LiveChatSessionStore
from app.maintenance.audit import Auditor
from app.maintenance.backfill import Backfill, BackgroundBackfill
from app.maintenance.modes import settle_mode
from app.maintenance.sampler import Sampler
from app.postgres.cache_state import PostgresStateKeeper, claim_state, spoken
from app.postgres.engine import Database, create_engine
from app.postgres.partitions import MONTHS_AHEAD, make_partitions, months_from
from app.postgres.schema import REVISION, current_revision, require_revision
from app.postgres.store import PostgresChatSessionStore
from app.redis_only import RedisOnlyChatSessionStore
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.client import BoundedRedis, create_redis
from app.redis_sessions.store import RedisChatSessionStore
from app.settings import Settings
from app.store import ChatSessionStore, StoreHealth
from app.tasks import stop

log = logging.getLogger("chat_sessions.wiring")

ServedMode = Literal["hybrid", "draining", "redis-only", "postgres"]

#: One for the pulse, one for a writer that changes the epoch.
PULSE_CONNECTIONS = 2

_CLAIMS_AGAIN_SECONDS = 5.0
_PARTITIONS_EVERY_SECONDS = 6 * 3600


@dataclass(frozen=True, kw_only=True)
class Stores:
    """Both stores of a database and what keeps them one: for serving, and for the commands that look after them."""

    database: Database
    keeper: PostgresStateKeeper
    lease: Lease
    heartbeat: Heartbeat
    counts: Counts
    durable: PostgresChatSessionStore
    cache: RedisSessionCache | None
    hybrid: HybridChatSessionStore | None
    auditor: Auditor | None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a request needs. `stores` is None where there is no database.

    `redis` is for a look at the server, in every mode that has one; chats have connections of their own.
    """

    settings: Settings
    store: ChatSessionStore
    assistant: Assistant
    stores: Stores | None
    redis: BoundedRedis | None = None
    rollups: BackgroundRollups | None = None
    embedded: bool = False

    @property
    def database(self) -> Database | None:
        return self.stores.database if self.stores is not None else None

    @property
    def mode(self) -> ServedMode:
        """The mode of this moment: it may change while requests are served."""
        if self.stores is None:
            return "redis-only"
        mode: Mode = self.stores.lease.state.mode if self.stores.lease.state is not None else "hybrid"
        return "postgres" if self.stores.cache is None and mode != "redis-only" else mode

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
async def open_database(settings: Settings, *, remembers_outages: bool = False) -> AsyncIterator[Database]:
    """The database alone, closed at the end. Raises `StartRefused` without DATABASE_URL.

    With `remembers_outages` one that hangs is not waited for by everybody (`Database`).
    """
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
        ),
        pooler=settings.database_pooler,
        remembers_outages=remembers_outages,
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
        if settings.database_url is not None or not settings.redis_only_mode:
            async with open_database(settings) as database:
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
        stores = rollups = redis = None
        if settings.enable_redis_sessions:
            redis = await stack.enter_async_context(open_redis(settings))
        if settings.database_url is None and settings.redis_only_mode:
            alone = _open_redis_only(stack, settings, claims=True)
            stack.push_async_callback(stop, asyncio.create_task(_claim_guides(alone)))
            store: ChatSessionStore = alone
        else:
            stores = await stack.enter_async_context(
                open_stores(settings, instance_id=new_uuid(), redis_only=settings.redis_only_mode)
            )
            with _outage_refuses():
                await settle_mode(
                    stores.keeper,
                    stores.heartbeat,
                    stores.lease,
                    redis_only=settings.redis_only_mode,
                    redis=redis,
                )
                # Without this month's no message could be kept; the next ones have time.
                await make_partitions(stores.database, months_from(utc_now().date(), 0))
            await _make_partitions(stores.database)
            store = _live(stack, settings, stores)
            upkeep = asyncio.create_task(_keep_partitions(stores.database))
            stack.push_async_callback(stop, upkeep)
            rollups = BackgroundRollups(Rollups(stores.database, timezone=settings.analytics_timezone))
            stack.push_async_callback(stop, asyncio.create_task(rollups.run()))
            if redis is not None:
                adopter = _background_backfill(settings, stores, redis)
                stack.push_async_callback(stop, asyncio.create_task(adopter.run()))
            if stores.cache is not None and stores.auditor is not None:
                sampler = Sampler(stores.auditor, stores.cache, stores.lease, stores.counts)
                stack.push_async_callback(stop, asyncio.create_task(sampler.run()))
        yield Runtime(
            settings=settings,
            store=store,
            assistant=assistant,
            stores=stores,
            redis=redis,
            rollups=rollups,
            embedded=embedded,
        )


@contextmanager
def _outage_refuses() -> Iterator[None]:
    try:
        yield
    except DurableStoreUnavailable as exc:
        raise StartRefused(exc.detail, hint=exc.hint or "start PostgreSQL, or correct DATABASE_URL") from exc


@asynccontextmanager
async def open_stores(
    settings: Settings,
    *,
    instance_id: UUID | None = None,
    redis_only: bool | None = None,
    follows: bool = True,
) -> AsyncIterator[Stores]:
    """The database and, unless ENABLE_REDIS_SESSIONS=false, Redis in front of it, with a heartbeat that runs.

    `instance_id` is noted in `chat.instances` while it lasts. `redis_only` is the mode of a first start. What does
    not serve need not follow: then the state is only read, and the epoch stays that of the services' Redis.
    Raises `StartRefused` where the URLs, the schema, or the database's protocol do not fit.
    """
    async with AsyncExitStack() as stack:
        if settings.enable_redis_sessions:
            required_redis_url(settings)
        # Who serves has others waiting; a command has time, and nobody beside it.
        database = await stack.enter_async_context(
            open_database(settings, remembers_outages=instance_id is not None)
        )
        with _outage_refuses():
            await require_revision(database)
        # Of its own: when requests have taken all connections, the lease must not end.
        pulse = await stack.enter_async_context(
            open_database(settings.model_copy(update={"database_pool_size": PULSE_CONNECTIONS}))
        )
        keeper = PostgresStateKeeper(
            pulse, instance_id=instance_id, version=__version__, on_answer=database.answers_again
        )
        counts, lease = Counts(), Lease()
        cache = _open_cache(stack, settings) if settings.enable_redis_sessions else None
        probe = cache.probe if cache is not None and follows else None
        identity = None
        if probe is not None:
            with suppress(CacheOutage):
                identity = await probe()
        with _outage_refuses():
            if follows:
                lease.learn(await claim_state(database, redis_only=redis_only, redis_identity=identity))
            else:
                lease.learn(spoken(await keeper.read()))
        heartbeat = Heartbeat(lease, keeper, probe, counts)
        if instance_id is not None:
            # Before the first beat says that this one is here: of two that start at once, each would see the other.
            await _begin_anew_if_alone(keeper, heartbeat, lease, identity)
        await heartbeat.beat()
        pulse_task = asyncio.create_task(_pulse(heartbeat, lease))
        stack.push_async_callback(_leave, keeper, instance_id)
        stack.push_async_callback(stop, pulse_task)
        durable = PostgresChatSessionStore(database, ttl_seconds=settings.session_ttl_seconds)
        hybrid = auditor = None
        if cache is not None:
            hybrid = HybridChatSessionStore(
                durable,
                cache,
                lease=lease,
                heartbeat=heartbeat,
                counts=counts,
                messages_max=settings.session_max_messages,
                serve_unverified=settings.pg_outage_reads == "serve",
                verify=settings.cache_verify,
            )
            stack.push_async_callback(hybrid.close)
            auditor = Auditor(durable, cache, hybrid, messages_max=settings.session_max_messages)
        yield Stores(
            database=database,
            keeper=keeper,
            lease=lease,
            heartbeat=heartbeat,
            counts=counts,
            durable=durable,
            cache=cache,
            hybrid=hybrid,
            auditor=auditor,
        )


async def _pulse(heartbeat: Heartbeat, lease: Lease) -> None:
    # The first beat was made already. One right after it needs a second connection, and a start that is refused
    # then would break that off half made.
    await asyncio.sleep(lease.seconds / BEATS_PER_LEASE)
    await heartbeat.run()


async def _begin_anew_if_alone(
    keeper: PostgresStateKeeper, heartbeat: Heartbeat, lease: Lease, redis_identity: str | None
) -> None:
    """A new epoch where nobody else serves: PostgreSQL may have been restored from a backup since the last one
    did, under an epoch that entries ahead of it carry. And of the Redis that answers, if one does.
    """
    here = {"cache": "on", "redis_identity": redis_identity} if redis_identity is not None else {}
    with suppress(DurableStoreUnavailable):
        if lease.state is not None and not await keeper.others():
            await heartbeat.change(lease.state, next_state(lease.state, **here))


def _open_cache(stack: AsyncExitStack, settings: Settings) -> RedisSessionCache:
    cache = RedisSessionCache(
        required_redis_url(settings),
        database=settings.redis_db_sessions,
        timeout_seconds=settings.redis_timeout_ms / 1000,
        ttl_seconds=settings.session_ttl_seconds,
        messages_max=settings.session_max_messages,
        bytes_max=settings.session_window_bytes_max,
    )
    stack.push_async_callback(cache.close)
    return cache


def _open_redis_only(stack: AsyncExitStack, settings: Settings, *, claims: bool) -> RedisChatSessionStore:
    store = RedisChatSessionStore(
        redis_url=required_redis_url(settings),
        redis_db=settings.redis_db_sessions,
        redis_db_aux=settings.redis_db_aux,
        session_ttl=settings.session_ttl_seconds,
        messages_max=settings.session_max_messages,
        session_bytes_max=settings.session_bytes_max,
        claims=claims,
    )
    stack.push_async_callback(store.close)
    return store


def _live(stack: AsyncExitStack, settings: Settings, stores: Stores) -> LiveChatSessionStore:
    redis_only = None
    if settings.enable_redis_sessions:
        redis_only = RedisOnlyChatSessionStore(
            _open_redis_only(stack, settings, claims=False),
            stores.durable,
            lease=stores.lease,
            messages_max=settings.session_max_messages,
        )
    return LiveChatSessionStore(
        with_database=stores.hybrid or stores.durable,
        redis_only=redis_only,
        lease=stores.lease,
        heartbeat=stores.heartbeat,
    )


def backfill_of(
    stores: Stores,
    redis: BoundedRedis,
    *,
    per_second: float | None = None,
    at_once: int = 4,
    patience_seconds: float = 20.0,
    batch_pause_seconds: float = 0.0,
) -> Backfill:
    """Takes over what Redis holds for itself. Raises `StartRefused` where the stores were opened without Redis."""
    if stores.hybrid is None:
        raise StartRefused("ENABLE_REDIS_SESSIONS=false", hint="set ENABLE_REDIS_SESSIONS=true")
    return Backfill(
        hybrid=stores.hybrid,
        database=stores.database,
        redis=redis,
        keeper=stores.keeper,
        heartbeat=stores.heartbeat,
        lease=stores.lease,
        per_second=per_second,
        at_once=at_once,
        patience_seconds=patience_seconds,
        batch_pause_seconds=batch_pause_seconds,
    )


def _background_backfill(settings: Settings, stores: Stores, redis: BoundedRedis) -> BackgroundBackfill:
    """Gentle: it shares this process, and its pool, with the requests."""
    return BackgroundBackfill(
        backfill_of(stores, redis, per_second=200, at_once=2, patience_seconds=0, batch_pause_seconds=0.02),
        keeper=stores.keeper,
        heartbeat=stores.heartbeat,
        lease=stores.lease,
        open_lock=lambda: open_database(settings.model_copy(update={"database_pool_size": 1})),
    )


async def _leave(keeper: PostgresStateKeeper, instance_id: UUID | None) -> None:
    if instance_id is not None:
        with suppress(DurableStoreUnavailable):
            await keeper.leave()


async def _claim_guides(store: RedisChatSessionStore) -> None:
    """What the guide's program left: a session that is touched is claimed at once, all others by this."""
    while True:
        try:
            if claimed := await store.claim_all():
                log.info("%d sessions in the guide's format were taken over", claimed)
        except ChatError as exc:
            log.warning("the sessions of the guide's program were not looked at, will try again: %s", exc)
            await asyncio.sleep(_CLAIMS_AGAIN_SECONDS)
        else:
            return


async def _keep_partitions(database: Database) -> None:
    """Makes next months' partitions long before they are needed, and again after a failure."""
    while True:
        await asyncio.sleep(_PARTITIONS_EVERY_SECONDS)
        await _make_partitions(database)


async def _make_partitions(database: Database) -> None:
    try:
        made = await make_partitions(database, months_from(utc_now().date(), MONTHS_AHEAD))
    except Exception as exc:  # noqa: BLE001 - whatever it is, it may be mended while this serves
        log.warning("partitions were not made, will try again: %s", exc)
    else:
        if made:
            log.info("partitions made: %s", ", ".join(made))
