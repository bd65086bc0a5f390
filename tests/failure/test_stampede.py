"""Many readers that miss one session: one loads it in each process, and nobody hangs on one that hangs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from app.coherence.ports import CacheState
from app.postgres.engine import Database, create_engine
from app.redis_sessions.keys import session_key
from tests.factories import new_append
from tests.servers import Servers
from tests.stores import Hybrid, new_hybrid

pytestmark = pytest.mark.anyio

READERS = 500


@pytest.fixture
async def instances(
    servers: Servers, database_url: str, database: Database, state: CacheState
) -> AsyncIterator[list[Hybrid]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(2):
            own = Database(create_engine(database_url, application_name="stampede"))
            stack.push_async_callback(own.close)
            made.append(new_hybrid(stack, own, servers.redis_url, state=state))
        yield made


async def test_a_thousand_misses_on_two_instances_are_two_fills_at_most(
    instances: list[Hybrid], redis: Redis
) -> None:
    store = instances[0].store
    session_id = (await store.create_session("user123")).session.session_id
    await store.append(new_append(session_id, "a", "b"))
    await redis.delete(session_key(session_id))

    histories = await asyncio.gather(
        *(
            instance.store.read_history(session_id, max_messages=10)
            for instance in instances
            for _ in range(READERS)
        )
    )

    assert [len(history.lines) for history in histories] == [2] * (2 * READERS)
    assert 1 <= sum(instance.counts.cache_fills for instance in instances) <= 2
    assert await redis.exists(session_key(session_id))


async def test_a_stampede_on_an_older_epoch_is_one_validation_in_each_process_at_most(
    instances: list[Hybrid], redis: Redis
) -> None:
    a = instances[0]
    session_id = (await a.store.create_session("user123")).session.session_id
    await a.store.append(new_append(session_id, "a", "b"))
    state = await a.keeper.read()
    state = await a.keeper.change(state, state)
    for instance in instances:
        instance.lease.learn(state, asked_at=instance.lease.now() + 3600)

    await asyncio.gather(
        *(
            instance.store.read_history(session_id, max_messages=10)
            for instance in instances
            for _ in range(READERS)
        )
    )

    assert 1 <= sum(instance.counts.cache_validations for instance in instances) <= 2
    assert sum(instance.counts.cache_fills for instance in instances) == 0


async def test_a_reader_does_not_wait_for_a_lock_holder_that_hangs(
    instances: list[Hybrid], database: Database, redis: Redis
) -> None:
    store = instances[0].store
    session_id = (await store.create_session("user123")).session.session_id
    await store.append(new_append(session_id, "a", "b"))
    await redis.delete(session_key(session_id))

    # A process that was frozen in the middle of a fill.
    async with database.transaction() as conn:
        await conn.execute("SELECT 1 FROM chat.chat_sessions WHERE session_id = $1 FOR UPDATE", session_id)
        histories = await asyncio.gather(
            *(
                instance.store.read_history(session_id, max_messages=10)
                for instance in instances
                for _ in range(20)
            )
        )

    assert {(len(history.lines), history.source) for history in histories} == {(2, "postgres")}


async def test_whoever_asks_after_a_write_is_not_given_a_fill_from_before_it(
    instances: list[Hybrid], redis: Redis
) -> None:
    """A fill that has left its row lock behind may be older than a write that was acknowledged since."""
    a, b = instances
    session_id = (await a.store.create_session("user123")).session.session_id
    for number in range(1, 40):
        await redis.delete(session_key(session_id))
        early = [asyncio.create_task(b.store.read_history(session_id, max_messages=50)) for _ in range(3)]
        await a.store.append(new_append(session_id, str(number)))
        late = await b.store.read_history(session_id, max_messages=50)
        await asyncio.gather(*early)

        assert len(late.lines) == number
