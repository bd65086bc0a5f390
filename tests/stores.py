"""Hybrid stores on the test's servers, part by part, with a lease that a test can end."""

import math
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from app.coherence.counts import Counts
from app.coherence.heartbeat import Heartbeat, next_state
from app.coherence.lease import Lease
from app.coherence.ports import CacheState
from app.hybrid import HybridChatSessionStore
from app.postgres.cache_state import PostgresStateKeeper
from app.postgres.engine import Database
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.cache import RedisSessionCache


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    store: HybridChatSessionStore
    durable: PostgresChatSessionStore
    cache: RedisSessionCache
    keeper: PostgresStateKeeper
    lease: Lease
    heartbeat: Heartbeat
    counts: Counts


async def trust(database: Database, redis_url: str, *, number: int = 1) -> CacheState:
    """The state of the database once this Redis is the one that is trusted, settled."""
    keeper = PostgresStateKeeper(database)
    cache = RedisSessionCache(
        redis_url, database=number, timeout_seconds=2, ttl_seconds=1, messages_max=1, bytes_max=1
    )
    try:
        identity = await cache.probe()
    finally:
        await cache.close()
    state = await keeper.read()
    state = await keeper.change(state, next_state(state, mode="hybrid", cache="on", redis_identity=identity))
    await keeper.settle(state)
    return await keeper.read()


def new_hybrid(
    stack: AsyncExitStack,
    database: Database,
    redis_url: str,
    *,
    state: CacheState | None,
    ttl_seconds: int = 3600,
    messages_max: int = 100,
    bytes_max: int = 1024 * 1024,
    timeout_seconds: float = 2,
    serve_unverified: bool = True,
    verify: str = "lease",
    lease: Lease | None = None,
    cache_class: type[RedisSessionCache] = RedisSessionCache,
    durable: PostgresChatSessionStore | None = None,
    keeper_database: Database | None = None,
    **cache_options: Any,
) -> Hybrid:
    """An instance without a heartbeat of its own. With a `state`, a lease on it that does not end by itself."""
    lease = lease or Lease()
    if state is not None:
        lease.learn(state, asked_at=math.inf)
    cache = cache_class(
        redis_url,
        database=1,
        timeout_seconds=timeout_seconds,
        ttl_seconds=ttl_seconds,
        messages_max=messages_max,
        bytes_max=bytes_max,
        **cache_options,
    )
    stack.push_async_callback(cache.close)
    counts = Counts()
    keeper = PostgresStateKeeper(keeper_database or database)
    heartbeat = Heartbeat(lease, keeper, cache.probe, counts)
    durable = durable or PostgresChatSessionStore(database, ttl_seconds=ttl_seconds)
    store = HybridChatSessionStore(
        durable,
        cache,
        lease=lease,
        heartbeat=heartbeat,
        counts=counts,
        messages_max=messages_max,
        serve_unverified=serve_unverified,
        verify=verify,
    )
    return Hybrid(
        store=store,
        durable=durable,
        cache=cache,
        keeper=keeper,
        lease=lease,
        heartbeat=heartbeat,
        counts=counts,
    )
