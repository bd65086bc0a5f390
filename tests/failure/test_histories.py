"""Random histories on three instances while Redis is emptied, rolled back, refused and cut off.

Method: clients append to and read a few sessions through hybrid stores with pools, leases and heartbeats of their own,
on the same real servers; a nemesis does to Redis, to the instances' links and to PostgreSQL's connections what
operators, networks and crashes do; at the end every history is checked. Leases are short, so that many of them fit.
The seed is printed and changes by the day; CHAOS_SEED sets it.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.coherence.lease import Lease
from app.coherence.ports import CacheOutage, CacheState, Entry
from app.errors import ChatError, CommitUnknown
from app.hybrid import HybridChatSessionStore, _Fence
from app.postgres.cache_state import PostgresStateKeeper
from app.postgres.engine import Database, create_engine
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.client import BoundedRedis
from app.redis_sessions.codec import USER_ID_OFFSET
from app.redis_sessions.keys import session_key
from app.tasks import stop
from tests.contract.suite import texts
from tests.factories import new_append
from tests.failure.checker import Log, Read, Write, violations
from tests.servers import Servers
from tests.stores import Hybrid, new_hybrid, trust

pytestmark = [
    pytest.mark.anyio,
    # redis-py leaves the socket of a connection that is cancelled while it is made to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS = 6
SESSIONS = 3
CLIENTS = 8
INSTANCES = 3
WINDOW = 1000
LEASE_SECONDS = 0.3

#: `by hand`: old values come back under the epoch that they were written in, which leases can't see.
Faults = Literal["all", "all and by hand", "late", "by hand"]


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED") or datetime.now(UTC).strftime("%Y%m%d"))
    print(f"CHAOS_SEED={chosen}")  # noqa: T201 - pytest shows it where the test fails
    return chosen


class CutCache(RedisSessionCache):
    """A cache whose link to Redis the nemesis holds: cut, or so slow that commands come after they were given up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cut_until = 0.0
        self.late_until = 0.0
        self._late: set[asyncio.Task[Any]] = set()

    def _to(self, state: CacheState) -> BoundedRedis:
        if time.monotonic() < self.cut_until:
            raise CacheOutage("the link is cut")
        return super()._to(state)

    async def probe(self) -> str:
        if time.monotonic() < self.cut_until:
            raise CacheOutage("the link is cut")
        return await super().probe()

    async def mark(self, *args: Any, **kwargs: Any) -> Any:
        return await self._in_time(super().mark, *args, **kwargs)

    async def publish(self, *args: Any, **kwargs: Any) -> Any:
        return await self._in_time(super().publish, *args, **kwargs)

    async def settle(self, *args: Any, **kwargs: Any) -> None:
        await self._in_time(super().settle, *args, **kwargs)

    async def remove(self, *args: Any) -> bool:
        return await self._in_time(super().remove, *args)

    async def _in_time(self, step: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() >= self.late_until:
            return await step(*args, **kwargs)

        async def late() -> None:
            await asyncio.sleep(random.uniform(0.01, 1.5 * LEASE_SECONDS))
            with suppress(CacheOutage):
                await step(*args, **kwargs)

        task = asyncio.create_task(late())
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        raise CacheOutage("given up, and carried out later")

    async def close(self) -> None:
        await asyncio.gather(*self._late, return_exceptions=True)
        await super().close()


class Fleet:
    """Instances that have nothing in common but the servers, and may crash."""

    def __init__(self, stack: AsyncExitStack, database_url: str, redis_url: str, *, verify: str) -> None:
        self._stack = stack
        self._database_url = database_url
        self._redis_url = redis_url
        self._verify = verify
        self.running: list[tuple[Hybrid, asyncio.Task[None]]] = []

    def start(self) -> None:
        hybrid = new_hybrid(
            self._stack,
            self._connections(6),
            self._redis_url,
            state=None,
            lease=Lease(seconds=LEASE_SECONDS),
            messages_max=WINDOW,
            bytes_max=8 * 1024 * 1024,
            timeout_seconds=0.25,
            serve_unverified=False,
            verify=self._verify,
            cache_class=CutCache,
            keeper_database=self._connections(2),
        )
        self.running.append((hybrid, asyncio.create_task(hybrid.heartbeat.run())))

    def _connections(self, count: int) -> Database:
        database = Database(create_engine(self._database_url, application_name="chaos", pool_size=count))
        self._stack.push_async_callback(database.close)
        return database

    async def crash(self, index: int) -> None:
        """Whatever it was about to do is not done, wherever it was."""
        hybrid, beating = self.running.pop(index)
        store = hybrid.store
        writes = [*store._batches.under_way, *store._creations.under_way, *store._to_their_end]
        await stop(beating, *writes)
        await asyncio.gather(beating, *writes, return_exceptions=True)

    async def stop(self) -> None:
        for hybrid, beating in self.running:
            await stop(beating)
            # Writes whose caller gave up go on to their end.
            await asyncio.gather(beating, hybrid.store.close(), return_exceptions=True)
        self.running.clear()


@pytest.fixture
async def fleet(
    request: pytest.FixtureRequest, servers: Servers, database_url: str, state: CacheState
) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, database_url, servers.redis_url, verify=request.param)
        for _ in range(INSTANCES):
            fleet.start()
        yield fleet
        await fleet.stop()


leases_trust = pytest.mark.parametrize("fleet", ["lease"], indirect=True)
rows_are_compared = pytest.mark.parametrize("fleet", ["always"], indirect=True)


async def run_client(
    fleet: Fleet, logs: dict[UUID, Log], chance: random.Random, until: float, outcomes: Counter[str]
) -> None:
    """One call after the other, mostly reads; at times it gives up in the middle."""
    while time.monotonic() < until:
        (hybrid, _), (session_id, log) = chance.choice(fleet.running), chance.choice(list(logs.items()))
        patience = chance.choice([None, None, None, chance.uniform(0.0005, 0.01)])
        began = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                await (write if chance.random() < 0.4 else read)(
                    hybrid.store, session_id, log, began, outcomes
                )
        except (ChatError, TimeoutError):
            pass
        except asyncio.CancelledError:
            # The instance's, when it crashes: the client hears no more of it.
            outcomes["crashed under a client"] += 1


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


async def torment(  # noqa: C901, PLR0915 - a list of faults
    fleet: Fleet,
    servers: Servers,
    database: Database,
    logs: dict[UUID, Log],
    chance: random.Random,
    until: float,
    which: Faults,
) -> Counter[str]:
    """Faults until the end, and how many of each kind."""
    faults: Counter[str] = Counter()
    old: dict[str, bytes] = {}
    keeper = PostgresStateKeeper(database)
    rolling_back: set[asyncio.Task[None]] = set()
    async with Redis.from_url(servers.redis_url, db=1) as redis:

        async def forget(key: str) -> None:
            await redis.delete(key)

        async def forget_all(_: str) -> None:
            await redis.flushdb()

        async def keep(key: str) -> None:
            if (value := await redis.get(key)) is not None:
                old[key] = value

        async def roll_back_by_hand(key: str) -> None:
            if key in old:
                await redis.set(key, old[key], px=3_600_000)

        async def roll_back(_: str) -> None:
            """As a restart from an old snapshot does: under another epoch, on which no lease was given yet."""
            values = dict(old)

            async def when_no_lease_is_left() -> None:
                await change_epoch("")
                await asyncio.sleep(1.2 * LEASE_SECONDS)
                for key, value in values.items():
                    await redis.set(key, value, px=3_600_000)

            task = asyncio.create_task(when_no_lease_is_left())
            rolling_back.add(task)
            task.add_done_callback(rolling_back.discard)

        async def change_epoch(_: str) -> None:
            state = await keeper.read()
            await keeper.change(state, replace(state, settled=state.settled and chance.random() < 0.5))

        async def expire(key: str) -> None:
            await redis.pexpire(key, 1)

        async def tear(key: str) -> None:
            # In the head: what somebody writes into a message's own words looks like words.
            await redis.setrange(key, chance.randrange(USER_ID_OFFSET), b"x")

        async def cut_connections(_: str) -> None:
            await redis.client_kill_filter(_type="normal", skipme=True)

        async def pause(_: str) -> None:
            await redis.client_pause(chance.randrange(100, 400))

        async def cut_off(_: str) -> None:
            hybrid, _ = chance.choice(fleet.running)
            hybrid.cache.cut_until = time.monotonic() + chance.uniform(0.1, 2 * LEASE_SECONDS)

        async def be_late(_: str) -> None:
            hybrid, _ = chance.choice(fleet.running)
            hybrid.cache.late_until = time.monotonic() + chance.uniform(0.0, 0.1)

        async def forget_scripts(_: str) -> None:
            await redis.script_flush()

        async def crash(_: str) -> None:
            fleet.start()
            await fleet.crash(chance.randrange(INSTANCES))

        async def end_backends(_: str) -> None:
            async with database.connection() as conn:
                await conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'chaos' AND random() < 0.3"
                )

        often = [forget, forget_all, keep, keep, expire, tear, forget_scripts]
        # Each of them costs an epoch or a while without a cache: nothing would be left to go wrong.
        rarely = [roll_back, cut_connections, pause, cut_off, cut_off, be_late, be_late, crash, end_backends]
        kinds: dict[Faults, list[Callable[[str], Awaitable[None]]]] = {
            "all": often * 15 + rarely,
            "all and by hand": (often + [roll_back_by_hand] * 2) * 15 + rarely,
            "late": [be_late],
            "by hand": [keep, roll_back_by_hand],
        }
        while time.monotonic() < until:
            fault = chance.choice(kinds[which])
            with suppress(RedisError, ChatError):
                await fault(session_key(chance.choice(list(logs))))
                faults[fault.__name__] += 1
            await asyncio.sleep(chance.uniform(0.002, 0.04))
        await asyncio.gather(*rolling_back, return_exceptions=True)
    return faults


async def history_of_a_run(
    fleet: Fleet,
    servers: Servers,
    database: Database,
    seed: int,
    seconds: float,
    which: Faults,
) -> tuple[list[str], dict[UUID, int], Counter[str]]:
    """What is wrong with a run, how many messages each of its sessions has, and what was done."""
    chance = random.Random(seed)
    asyncio.get_running_loop().set_exception_handler(_unless_the_driver_says_that_it_was_cut)
    maker = fleet.running[0][0].store
    logs = {(await maker.create_session("user123")).session.session_id: Log() for _ in range(SESSIONS)}
    until = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()
    faults, *_ = await asyncio.gather(
        torment(fleet, servers, database, logs, random.Random(seed + 1), until, which),
        *(run_client(fleet, logs, random.Random(chance.random()), until, outcomes) for _ in range(CLIENTS)),
    )
    for hybrid, _ in fleet.running:
        await hybrid.store.close()
    truth = PostgresChatSessionStore(database, ttl_seconds=3600)
    found, lengths = [], {}
    for session_id, log in logs.items():
        final: list[UUID] = []
        before: int | None = None
        while before is None or before > 1:
            page = await truth.read_history(session_id, max_messages=1000, before_seq=before)
            final[:0] = [message.message_id for message in page.messages]
            before = page.first_seq
        found += violations(log, final)
        lengths[session_id] = len(final)
    print(f"operations: {dict(outcomes)}; faults: {dict(faults)}")  # noqa: T201 - see the seed
    return found, lengths, outcomes


def _unless_the_driver_says_that_it_was_cut(
    loop: asyncio.AbstractEventLoop, context: dict[str, object]
) -> None:
    """Asyncpg leaves a future behind for a statement whose connection was cut while it was cancelled."""
    if "connection_lost" not in str(context.get("exception")):
        loop.default_exception_handler(context)


async def check_what_is_left(
    fleet: Fleet, servers: Servers, database: Database, lengths: dict[UUID, int]
) -> None:
    """Once the faults are over, an instance that starts now finds all of it, and leaves what people can read."""
    await fleet.stop()
    await trust(database, servers.redis_url)
    fleet.start()
    started, _ = fleet.running[0]
    await started.heartbeat.beat()
    for session_id, length in lengths.items():
        assert len(await texts(started.store, session_id)) == min(length, 1000)
        again = await started.store.read_history(session_id, max_messages=10)
        assert again.source == "redis"
    async with Redis.from_url(servers.redis_url, db=1) as redis:
        keys = await redis.keys("*")
        named = [json.loads(await redis.get(key))["session_id"] for key in keys]
        lives = [await redis.pttl(key) for key in keys]
    assert sorted(keys) == sorted(session_key(session_id).encode() for session_id in lengths)
    assert named == [key.decode().removeprefix("session:") for key in keys]
    assert all(0 < life <= 3_600_000 for life in lives)


@leases_trust
async def test_where_leases_trust_no_write_is_lost_and_no_read_is_stale(
    fleet: Fleet, servers: Servers, database: Database, seed: int
) -> None:
    found, lengths, outcomes = await history_of_a_run(fleet, servers, database, seed, SECONDS, "all")

    assert found == [], f"CHAOS_SEED={seed}"
    # Else there was nothing to check.
    assert outcomes["writes"] > 10
    assert outcomes["reads from redis"] > 10
    await check_what_is_left(fleet, servers, database, lengths)


@rows_are_compared
async def test_where_rows_are_compared_that_holds_with_old_values_set_by_hand_too(
    fleet: Fleet, servers: Servers, database: Database, seed: int
) -> None:
    found, lengths, outcomes = await history_of_a_run(
        fleet, servers, database, seed, SECONDS, "all and by hand"
    )

    assert found == [], f"CHAOS_SEED={seed}"
    # Else there was nothing to check.
    assert outcomes["writes"] > 10
    assert outcomes["reads from redis"] > 10
    await check_what_is_left(fleet, servers, database, lengths)


async def stale_reads(fleet: Fleet, servers: Servers, database: Database, seed: int, which: Faults) -> bool:
    """Whether the checker finds one in a few short runs."""
    for run in range(5):
        found, _, _ = await history_of_a_run(fleet, servers, database, seed + run, 2, which)
        if any(one.startswith("stale") for one in found):
            return True
    return False


@leases_trust
async def test_the_checker_finds_a_store_that_commits_without_a_mark(
    fleet: Fleet, servers: Servers, database: Database, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant: a checker that finds nothing in it is at fault."""

    async def no_mark(_fence: _Fence, writes: Sequence[object], _state: object) -> list[None]:
        return [None] * len(writes)

    monkeypatch.setattr(_Fence, "mark", no_mark)

    assert await stale_reads(fleet, servers, database, seed, "late")


@rows_are_compared
async def test_the_checker_finds_a_store_that_compares_nothing(
    fleet: Fleet, servers: Servers, database: Database, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one."""
    monkeypatch.setattr(Entry, "equals", lambda _self, _row: True)

    assert await stale_reads(fleet, servers, database, seed, "by hand")
