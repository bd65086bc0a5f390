"""Redis in front of PostgreSQL keeps the contract."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from app.coherence.ports import CacheState
from app.hybrid import HybridChatSessionStore
from app.postgres.engine import Database
from app.redis_sessions.keys import session_key
from tests.contract.suite import (
    ChatSessionStoreContract,
    MakeStore,
    SlidingTtlContract,
    new_session,
    texts,
    until,
)
from tests.factories import new_append
from tests.servers import Servers
from tests.stores import new_hybrid

pytestmark = pytest.mark.anyio


class TestHybridStore(ChatSessionStoreContract, SlidingTtlContract):
    @pytest.fixture(params=["lease", "always"])
    async def make_store(
        self, request: pytest.FixtureRequest, servers: Servers, database: Database, state: CacheState
    ) -> AsyncIterator[MakeStore]:
        async with AsyncExitStack() as stack:

            def make(*, ttl_seconds: int = 3600, messages_max: int = 100) -> HybridChatSessionStore:
                return new_hybrid(
                    stack,
                    database,
                    servers.redis_url,
                    state=state,
                    ttl_seconds=ttl_seconds,
                    messages_max=messages_max,
                    verify=request.param,
                ).store

            yield make

    async def test_an_expired_session_is_readable_and_revived_by_its_next_message(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        store = make_store(ttl_seconds=1)
        session_id = await new_session(store, "a")

        async def expired() -> bool:
            return not await redis.exists(session_key(session_id))

        await until(expired)
        archived = await store.list_sessions("user123", status="archived", limit=10)
        await store.append(new_append(session_id, "b"))

        revived = await redis.pttl(session_key(session_id))
        history = await store.read_history(session_id, max_messages=10)
        active = await store.list_sessions("user123", status="active", limit=10)
        assert [session.session_id for session in archived.sessions] == [session_id]
        assert 0 < revived <= 1000
        assert [message.content for message in history.messages] == ["a", "b"]
        assert [session.session_id for session in active.sessions] == [session_id]

    async def test_an_expired_session_is_filled_again_by_its_next_read(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        store = make_store()
        session_id = await new_session(store, "a", "b")
        await redis.pexpire(session_key(session_id), 1)

        async def expired() -> bool:
            return not await redis.exists(session_key(session_id))

        await until(expired)
        missed = await store.read_history(session_id, max_messages=10)
        hit = await store.read_history(session_id, max_messages=10)

        assert (missed.source, hit.source) == ("postgres", "redis")
        assert missed.lines == hit.lines
        assert len(hit.lines) == 2

    async def test_all_messages_stay_available(self, make_store: MakeStore) -> None:
        store = make_store(messages_max=2)

        session_id = await new_session(store, *"abcde")

        assert (await store.get_session(session_id)).session.first_available_seq == 1
        assert await texts(store, session_id) == list("abcde")

    async def test_a_session_is_read_from_redis_after_each_write(self, make_store: MakeStore) -> None:
        store = make_store(messages_max=3)
        session_id = await new_session(store)

        sources = []
        for number in range(10):
            await store.append(new_append(session_id, str(number)))
            sources.append((await store.read_history(session_id, max_messages=3)).source)

        assert set(sources[2:]) == {"redis"}

    async def test_a_new_session_is_read_from_redis(self, make_store: MakeStore) -> None:
        store = make_store()
        session_id = await new_session(store)

        assert (await store.get_session(session_id)).source == "redis"
