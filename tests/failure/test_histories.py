"""Random histories on two instances while Redis is emptied, rolled back, refused and cut off.

Method: clients append to and read a few sessions through two hybrid stores with pools of their own, on the same
real servers; a nemesis does to Redis and to PostgreSQL's connections what operators and networks do; at the end
every history is checked. The seed is printed and changes by the day; CHAOS_SEED sets it.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from uuid import UUID

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.coherence.ports import Entry
from app.errors import ChatError, CommitUnknown
from app.hybrid import HybridChatSessionStore
from app.postgres.engine import Database, create_engine
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.client import BoundedRedis, create_redis
from app.redis_sessions.codec import USER_ID_OFFSET
from app.redis_sessions.keys import session_key
from tests.factories import new_append
from tests.failure.checker import Log, Read, Write, violations
from tests.servers import Servers

pytestmark = [
    pytest.mark.anyio,
    # redis-py leaves the socket of a connection that is cancelled while it is made to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS = 6
SESSIONS = 3
CLIENTS = 8
WINDOW = 1000


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED") or datetime.now(UTC).strftime("%Y%m%d"))
    print(f"CHAOS_SEED={chosen}")  # noqa: T201 - pytest shows it where the test fails
    return chosen


@pytest.fixture
async def instances(
    servers: Servers, database_url: str, database: Database, redis: Redis
) -> AsyncIterator[list[HybridChatSessionStore]]:
    """Two instances: nothing in common but the servers."""
    async with AsyncExitStack() as stack:
        stores = []
        for _ in range(2):
            own = Database(create_engine(database_url, application_name="chaos", pool_size=6))
            stack.push_async_callback(own.close)
            client = create_redis(servers.redis_url, database=1, timeout_seconds=0.25)
            stack.push_async_callback(client.aclose)
            cache = RedisSessionCache(
                BoundedRedis(client, timeout_seconds=0.25),
                ttl_seconds=3600,
                messages_max=WINDOW,
                bytes_max=8 * 1024 * 1024,
            )
            stores.append(
                HybridChatSessionStore(
                    PostgresChatSessionStore(own, ttl_seconds=3600),
                    cache,
                    messages_max=WINDOW,
                    serve_unverified=False,
                )
            )
        yield stores


async def run_clients(
    instances: list[HybridChatSessionStore],
    logs: dict[UUID, Log],
    chance: random.Random,
    until: float,
    outcomes: Counter[str],
) -> None:
    """One client after another's fashion: mostly reads, at times one that gives up in the middle."""
    while time.monotonic() < until:
        store, (session_id, log) = chance.choice(instances), chance.choice(list(logs.items()))
        patience = chance.choice([None, None, None, chance.uniform(0.0005, 0.01)])
        began = time.monotonic()
        with suppress(ChatError, TimeoutError):
            async with asyncio.timeout(patience):
                await (write if chance.random() < 0.4 else read)(store, session_id, log, began, outcomes)


async def write(
    store: HybridChatSessionStore, session_id: UUID, log: Log, began: float, outcomes: Counter[str]
) -> None:
    append = new_append(session_id, "a")
    message_id = append.messages[0].message_id
    try:
        await store.append(append)
    except (CommitUnknown, asyncio.CancelledError):
        log.writes.append(Write(message_id, began, None))
        outcomes["unknown writes"] += 1
        raise
    except ChatError:
        log.writes.append(Write(message_id, began, None))
        outcomes["refused writes"] += 1
        raise
    log.writes.append(Write(message_id, began, time.monotonic()))
    outcomes["writes"] += 1


async def read(
    store: HybridChatSessionStore, session_id: UUID, log: Log, began: float, outcomes: Counter[str]
) -> None:
    history = await store.read_history(session_id, max_messages=WINDOW)
    ended = time.monotonic()
    log.reads.append(Read(tuple(message.message_id for message in history.messages), began, ended))
    outcomes[f"reads from {history.source}"] += 1


async def torment(  # noqa: C901 - a list of faults
    servers: Servers, database: Database, logs: dict[UUID, Log], chance: random.Random, until: float
) -> Counter[str]:
    """Faults until the end, and how many of each kind."""
    faults: Counter[str] = Counter()
    old: dict[str, bytes] = {}
    async with Redis.from_url(servers.redis_url, db=1) as redis:

        async def forget(key: str) -> None:
            await redis.delete(key)

        async def forget_all(_: str) -> None:
            await redis.flushdb()

        async def keep(key: str) -> None:
            if (value := await redis.get(key)) is not None:
                old[key] = value

        async def roll_back(key: str) -> None:
            if key in old:
                await redis.set(key, old[key], px=3_600_000)

        async def expire(key: str) -> None:
            await redis.pexpire(key, 1)

        async def tear(key: str) -> None:
            # In the head: what somebody writes into a message's own words looks like words.
            await redis.setrange(key, chance.randrange(USER_ID_OFFSET), b"x")

        async def cut_connections(_: str) -> None:
            await redis.client_kill_filter(_type="normal", skipme=True)

        async def pause(_: str) -> None:
            await redis.client_pause(chance.randrange(100, 400))

        async def forget_scripts(_: str) -> None:
            await redis.script_flush()

        async def end_backends(_: str) -> None:
            async with database.connection() as conn:
                await conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'chaos' AND random() < 0.3"
                )

        kinds: list[Callable[[str], Awaitable[None]]] = [
            *(forget, forget_all, keep, keep, roll_back, roll_back, expire, tear),
            *(cut_connections, pause, forget_scripts, end_backends),
        ]
        while time.monotonic() < until:
            fault = chance.choice(kinds)
            with suppress(RedisError, ChatError):
                await fault(session_key(chance.choice(list(logs))))
                faults[fault.__name__] += 1
            await asyncio.sleep(chance.uniform(0.002, 0.04))
    return faults


async def history_of_a_run(
    instances: list[HybridChatSessionStore], servers: Servers, database: Database, seed: int, seconds: float
) -> list[str]:
    chance = random.Random(seed)
    asyncio.get_running_loop().set_exception_handler(_unless_the_driver_says_that_it_was_cut)
    logs = {(await instances[0].create_session("user123")).session.session_id: Log() for _ in range(SESSIONS)}
    until = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()
    faults, *_ = await asyncio.gather(
        torment(servers, database, logs, random.Random(seed + 1), until),
        *(
            run_clients(instances, logs, random.Random(chance.random()), until, outcomes)
            for _ in range(CLIENTS)
        ),
    )
    # Writes whose caller gave up go on to their end.
    for store in instances:
        await asyncio.gather(*store._writes, return_exceptions=True)
    truth = PostgresChatSessionStore(database, ttl_seconds=3600)
    found = []
    for session_id, log in logs.items():
        final: list[UUID] = []
        before: int | None = None
        while before is None or before > 1:
            page = await truth.read_history(session_id, max_messages=1000, before_seq=before)
            final[:0] = [message.message_id for message in page.messages]
            before = page.first_seq
        found += violations(log, final)
    print(f"operations: {dict(outcomes)}; faults: {dict(faults)}")  # noqa: T201 - see the seed
    # Else there was nothing to check.
    assert outcomes["writes"] > 10
    assert outcomes["reads from redis"] > 10
    return found


def _unless_the_driver_says_that_it_was_cut(
    loop: asyncio.AbstractEventLoop, context: dict[str, object]
) -> None:
    """Asyncpg leaves a future behind for a statement whose connection was cut while it was cancelled."""
    if "connection_lost" not in str(context.get("exception")):
        loop.default_exception_handler(context)


async def test_no_acknowledged_write_is_lost_and_no_read_is_stale(
    instances: list[HybridChatSessionStore], servers: Servers, database: Database, seed: int
) -> None:
    found = await history_of_a_run(instances, servers, database, seed, SECONDS)

    async with Redis.from_url(servers.redis_url, db=1) as redis:
        keys = await redis.keys("*")
        values = {key: await redis.get(key) for key in keys}
        lives = [await redis.pttl(key) for key in keys]
    assert found == [], f"CHAOS_SEED={seed}"
    assert all(key.startswith(b"session:") for key in keys)
    assert [json.loads(value)["session_id"] for value in values.values()] == [
        key.decode().removeprefix("session:") for key in values
    ]
    assert all(0 < life <= 3_600_000 for life in lives)


async def test_the_checker_finds_a_store_that_believes_its_cache(
    instances: list[HybridChatSessionStore],
    servers: Servers,
    database: Database,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: level 0 without its comparison. A checker that finds nothing in it is at fault."""
    monkeypatch.setattr(Entry, "equals", lambda _self, _row: True)

    runs = iter(range(5))
    found: list[str] = []
    while not any(one.startswith("stale") for one in found) and (run := next(runs, None)) is not None:
        found += await history_of_a_run(instances, servers, database, seed + run, 2)

    assert any(one.startswith("stale") for one in found)
