"""Whichever store the mode of the moment asks for: the contract is kept."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from app.coherence.heartbeat import next_state
from app.coherence.ports import CacheState
from app.live import LiveChatSessionStore
from app.postgres.cache_state import PostgresStateKeeper
from app.postgres.engine import Database
from app.redis_only import RedisOnlyChatSessionStore
from app.redis_sessions.store import RedisChatSessionStore
from tests.contract.suite import ChatSessionStoreContract, MakeStore, SlidingTtlContract
from tests.servers import Servers
from tests.stores import new_hybrid

pytestmark = pytest.mark.anyio


class TestLiveStore(ChatSessionStoreContract, SlidingTtlContract):
    @pytest.fixture(params=["hybrid", "draining", "redis-only"])
    async def make_store(
        self, request: pytest.FixtureRequest, servers: Servers, database: Database, state: CacheState
    ) -> AsyncIterator[MakeStore]:
        keeper = PostgresStateKeeper(database)
        changed = await keeper.change(state, next_state(state, mode=request.param))
        await keeper.settle(changed)
        now = await keeper.read()
        async with AsyncExitStack() as stack:

            def make(*, ttl_seconds: int = 3600, messages_max: int = 100) -> LiveChatSessionStore:
                hybrid = new_hybrid(
                    stack,
                    database,
                    servers.redis_url,
                    state=now,
                    ttl_seconds=ttl_seconds,
                    messages_max=messages_max,
                )
                redis = RedisChatSessionStore(
                    redis_url=servers.redis_url,
                    session_ttl=ttl_seconds,
                    messages_max=messages_max,
                    claims=False,
                )
                stack.push_async_callback(redis.close)
                return LiveChatSessionStore(
                    with_database=hybrid.store,
                    redis_only=RedisOnlyChatSessionStore(
                        redis, hybrid.durable, lease=hybrid.lease, messages_max=messages_max
                    ),
                    lease=hybrid.lease,
                    heartbeat=hybrid.heartbeat,
                )

            yield make
