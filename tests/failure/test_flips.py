"""The mode, changed both ways under load, and every step of it broken off: nothing is lost, doubled or reordered.

Instances are the product's own stores on real servers; a crash is an error raised at one line, after which
another instance goes on. "Stale" is an instance that has not heard of a change yet: its heartbeat is stopped.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis.asyncio import Redis

from app import wiring
from app.chat import ChatSession
from app.coherence.lease import Lease
from app.coherence.ports import EPOCH_ZERO, CacheOutage, Mode, ModeChanged
from app.errors import (
    AdoptionPending,
    ChatError,
    DurableStoreUnavailable,
    SessionNotFound,
    Unavailable,
)
from app.live import LiveChatSessionStore
from app.maintenance import backfill as backfill_module
from app.maintenance.backfill import Tally
from app.maintenance.modes import set_mode
from app.postgres.engine import Database
from app.postgres.store import _Locked
from app.redis_only import RedisOnlyChatSessionStore
from app.redis_sessions.cache import _Watch
from app.redis_sessions.codec import FIELDS, encode
from app.redis_sessions.keys import session_key
from app.redis_sessions.store import RedisChatSessionStore
from app.settings import Settings
from app.store import ChatSessionStore
from app.wiring import Stores, backfill_of, open_redis, open_runtime, open_stores
from tests.factories import guide_value, keyed_append, new_answer, new_append, new_row, turn_append
from tests.failure.checker import Log, Read, Write, violations

pytestmark = pytest.mark.anyio

CLOSED = "redis://127.0.0.1:1"


@dataclass(frozen=True)
class Instance:
    """What serves, without what serves in the background."""

    stores: Stores
    store: LiveChatSessionStore

    @property
    def redis_only(self) -> RedisOnlyChatSessionStore:
        store = self.store._redis_only
        assert isinstance(store, RedisOnlyChatSessionStore)
        return store

    async def to(self, mode: Mode) -> None:
        await set_mode(self.stores.keeper, self.stores.heartbeat, self.stores.lease, mode)

    async def hears(self, mode: Mode) -> None:
        """Of the mode, and that Redis may be trusted."""
        while self.store.mode != mode or not (mode == "redis-only" or self.stores.lease.current()):
            await self.stores.heartbeat.beat()
            await asyncio.sleep(0.01)

    def go_deaf(self) -> None:
        async def hears_nothing() -> None:
            pass

        self.stores.heartbeat.beat = hears_nothing  # type: ignore[method-assign]


Start = Callable[..., Awaitable[Instance]]


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the mode takes as long as a lease."""
    monkeypatch.setattr(wiring, "Lease", partial(Lease, seconds=0.2))


@pytest.fixture
async def start(settings: Settings) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start(**overrides: Any) -> Instance:
            ours = settings.model_copy(update={"session_max_messages": 1000} | overrides)
            stores = await stack.enter_async_context(open_stores(ours))
            return Instance(stores, wiring._live(stack, ours, stores))

        yield start


@pytest.fixture
async def a(start: Start) -> Instance:
    return await start()


@pytest.fixture
async def b(start: Start, a: Instance) -> Instance:
    return await start()


@pytest.fixture
def drain(settings: Settings) -> Callable[[Instance], Awaitable[Tally]]:
    async def drain(instance: Instance) -> Tally:
        async with open_redis(settings) as redis:
            return await backfill_of(instance.stores, redis).drain()

    return drain


Drain = Callable[[Instance], Awaitable[Tally]]


async def texts(store: ChatSessionStore, session_id: UUID) -> list[str]:
    history = await store.read_history(session_id, max_messages=1000)
    return [message.content for message in history.messages]


async def session_of(store: ChatSessionStore, *contents: str, user_id: str = "user123") -> UUID:
    session_id = (await store.create_session(user_id)).session.session_id
    for content in contents:
        await store.append(new_append(session_id, content))
    return session_id


async def owner_of(database: Database, session_id: UUID) -> str | None:
    async with database.connection() as conn:
        owner: str | None = await conn.fetchval(
            "SELECT owner FROM chat.chat_sessions WHERE session_id = $1", session_id
        )
    return owner


async def letter_of(redis: Redis, session_id: UUID) -> bytes:
    at = FIELDS["owner"][0]
    letter: bytes = await redis.getrange(session_key(session_id), at, at)
    return letter


# Under load


SESSIONS = 4
CLIENTS = 6


async def test_nothing_is_lost_doubled_or_reordered_while_the_mode_changes_under_load(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfill_module, "_EVERY_SECONDS", 0.3)
    monkeypatch.setattr(wiring, "Lease", Lease)
    ours = settings.model_copy(update={"session_max_messages": 10_000})
    async with AsyncExitStack() as stack:
        runtimes = [await stack.enter_async_context(open_runtime(ours)) for _ in range(2)]
        stores = [runtime.store for runtime in runtimes]
        logs = {await session_of(stores[0]): Log() for _ in range(SESSIONS)}
        seen: set[tuple[str, ...]] = set()
        stop = asyncio.Event()
        clients = [asyncio.create_task(client(stores, logs, stop, number)) for number in range(CLIENTS)]
        operator = await stack.enter_async_context(open_stores(ours, follows=False))
        bounded = await stack.enter_async_context(open_redis(ours))
        for _ in range(2):
            await asyncio.sleep(0.4)
            await set_mode(operator.keeper, operator.heartbeat, operator.lease, "redis-only")
            await asyncio.sleep(0.6)
            seen.add(tuple(runtime.mode for runtime in runtimes))
            tally = await backfill_of(operator, bounded).drain()
            assert not tally.conflicts.count
        await asyncio.sleep(0.4)
        stop.set()
        answered = await asyncio.gather(*clients)

        assert seen == {("redis-only", "redis-only")}
        assert sum(answered) > 100
        for session_id, log in logs.items():
            history = await runtimes[0].stores.durable.read_history(session_id, max_messages=10_000)
            assert violations(log, [message.message_id for message in history.messages]) == []


async def client(
    stores: list[ChatSessionStore], logs: dict[UUID, Log], stop: asyncio.Event, number: int
) -> int:
    """How many of its calls were answered. One may be refused: what Redis holds alone waits while a busy machine keeps
    Redis from answering in time.
    """
    done = answered = 0
    while not stop.is_set():
        store, (session_id, log) = stores[done % 2], list(logs.items())[(done * 7 + number) % len(logs)]
        began = time.monotonic()
        if (done + number) % 3:
            with suppress(Unavailable):
                history = await store.read_history(session_id, max_messages=10_000)
                ids = tuple(message.message_id for message in history.messages)
                log.reads.append(Read(ids, began, time.monotonic()))
                answered += 1
        else:
            append = new_append(session_id, "a")
            acked = None
            with suppress(Unavailable):
                await store.append(append)
                acked = time.monotonic()
                answered += 1
            log.writes.append(Write(append.messages[0].message_id, began, acked))
        done += 1
        await asyncio.sleep(0.005)
    return answered


# To Redis-only


async def test_a_session_that_only_postgresql_has_is_imported_when_it_is_first_touched(
    a: Instance, redis: Redis, database: Database
) -> None:
    """Never started empty: Redis has lost every copy meanwhile."""
    read, written, kept = [await session_of(a.store, "1", "2") for _ in range(3)]
    await a.to("redis-only")
    await redis.flushdb()

    assert await texts(a.store, read) == ["1", "2"]
    await a.store.append(new_append(written, "3"))

    assert await texts(a.store, written) == ["1", "2", "3"]
    assert [await owner_of(database, one) for one in (read, written, kept)] == ["redis", "redis", "postgres"]


async def test_of_two_that_touch_it_first_at_once_both_find_it(a: Instance, b: Instance) -> None:
    """The later one has seen no entry, and meets a session that was handed over meanwhile."""
    session_id = await session_of(a.store, "1")
    await a.to("redis-only")
    await b.hears("redis-only")
    hand_over, met = a.redis_only._hand_over, []

    async def overtaken(of: UUID) -> str:
        met.append(of)
        if len(met) == 1:
            await b.store.append(new_append(of, "2"))
        return await hand_over(of)

    a.redis_only._hand_over = overtaken  # type: ignore[method-assign]

    appended = await a.store.append(new_append(session_id, "3"))
    with pytest.raises(SessionNotFound):
        await a.store.get_session(session_id, user_id="somebody else")

    assert appended.last_seq == 3
    assert met == [session_id] * 2
    assert await texts(a.store, session_id) == ["1", "2", "3"]


async def test_what_expired_in_redis_only_mode_is_gone_there_and_comes_back_in_hybrid_mode(
    a: Instance, b: Instance, redis: Redis, drain: Drain
) -> None:
    old, new = await session_of(a.store, "1"), None
    await a.to("redis-only")
    await b.hears("redis-only")
    await b.store.append(new_append(old, "2"))
    new = await session_of(b.store, "x")
    await redis.delete(session_key(old), session_key(new))

    for session_id in (old, new):
        for call in (
            a.store.get_session(session_id),
            b.store.append(new_append(session_id)),
            b.store.delete_session(session_id),
        ):
            with pytest.raises(SessionNotFound):
                await call

    tally = await drain(a)
    assert (await texts(a.store, old), await texts(b.store, new)) == (["1"], [])
    assert set(tally.expired.shown) == {str(old), str(new)}


async def test_lists_in_redis_only_mode_know_every_session(a: Instance, redis: Redis) -> None:
    imported, untouched, expired = [await session_of(a.store, text) for text in ("i", "u", "e")]
    await session_of(a.store, "o", user_id="other")
    await a.to("redis-only")
    await texts(a.store, imported)
    await texts(a.store, expired)
    await redis.delete(session_key(expired))
    created = await session_of(a.store)
    deleted = await session_of(a.store)
    await a.store.delete_session(deleted)

    page = await a.store.list_sessions("user123", limit=10)
    first = await a.store.list_sessions("user123", limit=2)

    assert [one.session_id for one in page.sessions] == [created, untouched, imported]
    assert (page.total, first.total, len(first.sessions)) == (3, 3, 2)


async def test_without_postgresql_redis_only_mode_reads_and_writes_what_redis_has_and_makes_nothing(
    a: Instance, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over, untouched = await session_of(a.store, "1"), await session_of(a.store, "1")
    await a.to("redis-only")
    await a.store.append(new_append(handed_over, "2"))

    def out(*_: object, **__: object) -> Any:
        raise DurableStoreUnavailable

    monkeypatch.setattr(a.stores.database, "connection", out)
    monkeypatch.setattr(a.stores.keeper._database, "connection", out)
    await a.store.append(new_append(handed_over, "3"))

    assert await texts(a.store, handed_over) == ["1", "2", "3"]
    for call in (
        a.store.create_session("user123"),
        a.store.delete_session(handed_over),
        a.store.list_sessions("user123", limit=1),
        texts(a.store, untouched),
    ):
        with pytest.raises(DurableStoreUnavailable):
            await call
    monkeypatch.undo()
    assert await texts(a.store, untouched) == ["1"]
    assert await texts(a.store, handed_over) == ["1", "2", "3"]


# To hybrid


async def test_of_two_deletes_in_redis_only_mode_one_finds_the_session(
    a: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a.to("redis-only")
    session_id = await session_of(a.store, "1")
    redis = a.redis_only._redis
    others: list[ChatSession] = []

    async def delete_after_another(*arguments: Any, **asked: Any) -> ChatSession:
        monkeypatch.undo()
        others.append(await a.store.delete_session(session_id))
        return await redis.delete_session(*arguments, **asked)

    monkeypatch.setattr(redis, "delete_session", delete_after_another)

    with pytest.raises(SessionNotFound):
        await a.store.delete_session(session_id)
    assert [one.message_count for one in others] == [1]


async def test_who_has_not_heard_of_the_end_of_redis_only_mode_makes_no_session_that_redis_owns(
    a: Instance, b: Instance, database: Database, redis: Redis, drain: Drain
) -> None:
    """Nobody would take it over any more."""
    await a.to("redis-only")
    await b.hears("redis-only")
    b.go_deaf()
    await drain(a)
    assert b.store.mode == "redis-only"

    session_id = await session_of(b.store, "1")

    assert await owner_of(database, session_id) == "postgres"
    assert await texts(a.store, session_id) == ["1"]


async def test_a_writer_that_has_not_heard_of_the_change_answers_by_the_new_mode(
    a: Instance, b: Instance, redis: Redis
) -> None:
    """Its entry was adopted meanwhile: the script refuses, and the row tells the mode."""
    written, read, deleted, untouched = [await session_of(a.store, "1") for _ in range(4)]
    await a.to("redis-only")
    await b.hears("redis-only")
    for session_id in (written, read, deleted, untouched):
        await b.store.append(new_append(session_id, "2"))
    b.go_deaf()
    await a.to("draining")
    await a.hears("draining")
    for session_id in (written, read, deleted):
        await a.store.append(new_append(session_id, "3"))

    # The one that nobody has adopted yet is still Redis's, and b may write to it.
    assert b.store.mode == "redis-only"
    await b.redis_only.append(new_append(untouched, "3"))
    for call in (
        b.redis_only.append(new_append(written, "never")),
        b.redis_only.read_history(written, max_messages=10),
    ):
        with pytest.raises(ModeChanged):
            await call
    assert await texts(b.store, read) == ["1", "2", "3"]
    assert b.store.mode == "draining"
    await b.store.append(new_append(written, "4"))
    await b.store.delete_session(deleted)

    assert await texts(a.store, written) == ["1", "2", "3", "4"]
    assert await texts(a.store, untouched) == ["1", "2", "3"]
    with pytest.raises(SessionNotFound):
        await a.store.get_session(deleted)


async def test_what_redis_may_hold_waits_for_it_in_a_drain_and_the_rest_goes_on(
    a: Instance, start: Start, database: Database
) -> None:
    ours, theirs = await session_of(a.store, "1"), await session_of(a.store, "1")
    await a.to("redis-only")
    await a.store.append(new_append(theirs, "2"))
    await a.to("draining")
    cut_off = await start(redis_url=CLOSED)

    for session_id in (theirs, uuid4()):
        for call in (
            cut_off.store.get_session(session_id),
            cut_off.store.append(new_append(session_id)),
            cut_off.store.delete_session(session_id),
        ):
            with pytest.raises(AdoptionPending) as refused:
                await call
            assert refused.value.retry_after_seconds >= 1
    # Redis might bring it back.
    with pytest.raises(AdoptionPending):
        await cut_off.store.delete_session(ours)
    await cut_off.store.append(new_append(ours, "2"))

    assert await texts(cut_off.store, ours) == ["1", "2"]
    assert await owner_of(database, theirs) == "redis"
    created = await session_of(cut_off.store, "x")
    assert await texts(cut_off.store, created) == ["x"]


@pytest.mark.parametrize("there", ["hybrid", "redis-only", "draining"])
async def test_a_delete_in_any_mode_is_a_delete_in_every_mode(
    a: Instance, redis: Redis, drain: Drain, there: Mode
) -> None:
    owned_by_postgres, owned_by_redis = await session_of(a.store, "1"), await session_of(a.store, "1")
    await a.to("redis-only")
    await a.store.append(new_append(owned_by_redis, "2"))
    guides = uuid4()
    await redis.set(session_key(guides), guide_value(guides, "a"), ex=1000)
    await a.to(there)
    await a.hears(there)

    for session_id in (owned_by_postgres, owned_by_redis):
        await a.store.delete_session(session_id)
    if there != "redis-only":
        await a.store.delete_session(guides)

    for mode in ("redis-only", "draining"):
        await a.to(mode)
        await a.hears(mode)
        for session_id in (owned_by_postgres, owned_by_redis):
            with pytest.raises(SessionNotFound):
                await a.store.get_session(session_id)
    await drain(a)
    for session_id in (owned_by_postgres, owned_by_redis):
        with pytest.raises(SessionNotFound):
            await a.store.get_session(session_id)


# Idempotent requests


async def test_a_retry_that_crosses_the_changes_appends_once(a: Instance, drain: Drain) -> None:
    session_id = await session_of(a.store)
    appends = [keyed_append(session_id, key, key) for key in ("hybrid", "redis-only", "draining")]

    await a.store.append(appends[0])
    await a.to("redis-only")
    first = await a.store.append(appends[0])
    await a.store.append(appends[1])
    await a.to("draining")
    await a.hears("draining")
    second = await a.store.append(appends[1])
    await a.store.append(appends[2])
    await drain(a)
    third = await a.store.append(appends[2])

    assert (first.replayed, second.replayed, third.replayed) == (True, True, True)
    assert await texts(a.store, session_id) == ["hybrid", "redis-only", "draining"]


async def test_a_turn_that_crosses_a_change_is_answered_once_by_its_retry(a: Instance, drain: Drain) -> None:
    """The lease of a turn stays in the store that gave it: the answer is refused, the retry's is stored."""
    session_id = await session_of(a.store)
    for mode, question in (("redis-only", "q1"), ("draining", "q2")):
        before = await a.store.begin_turn(turn_append(session_id, question, key=question), window=10)
        await a.to(mode)
        await a.hears(mode)
        with pytest.raises(ChatError):
            await a.store.finish_turn(before, new_answer(before, "too late"))
        retried = await a.store.begin_turn(turn_append(session_id, question, key=question), window=10)
        await a.store.finish_turn(retried, new_answer(retried, f"answer to {question}"))

    assert await texts(a.store, session_id) == ["q1", "answer to q1", "q2", "answer to q2"]


# Crashes


class Crash(Exception):
    """A process that died at this line."""


def dies(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, after: bool) -> None:
    """The next call of a method does its work, or not, and then the process is gone. Used once."""
    method = getattr(owner, name)

    async def dying(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, method)
        if after:
            await method(*args, **kwargs)
        raise Crash

    monkeypatch.setattr(owner, name, dying)


HAND_OVER = {
    "before the entry is set": (RedisChatSessionStore, "offer", False),
    "after the entry was set": (RedisChatSessionStore, "offer", True),
    "after the row was given, before the commit": (_Locked, "give_to", True),
    "after the commit, before the entry is clean": (RedisChatSessionStore, "settle", False),
    "after the entry was clean": (RedisChatSessionStore, "settle", True),
}


@pytest.mark.parametrize("point", HAND_OVER.values(), ids=HAND_OVER)
@pytest.mark.parametrize("then", ["goes on", "goes back"])
async def test_a_crash_while_a_session_is_handed_over_loses_nothing(
    a: Instance,
    b: Instance,
    redis: Redis,
    drain: Drain,
    monkeypatch: pytest.MonkeyPatch,
    point: tuple[type, str, bool],
    then: str,
) -> None:
    session_id = await session_of(a.store, "1", "2")
    await a.to("redis-only")
    await b.hears("redis-only")
    dies(monkeypatch, point[0], point[1], after=point[2])
    with pytest.raises(Crash):
        await a.store.append(new_append(session_id, "never"))

    expected = ["1", "2"]
    if then == "goes on":
        assert await texts(b.store, session_id) == expected
        await b.store.append(new_append(session_id, "3"))
        expected.append("3")
        assert await texts(b.store, session_id) == expected
    tally = await drain(b)

    assert await texts(b.store, session_id) == expected
    assert await texts(b.stores.durable, session_id) == expected
    assert await letter_of(redis, session_id) == b"p"
    assert not tally.expired.count


async def test_a_session_whose_creation_was_broken_off_is_no_session(
    a: Instance, redis: Redis, drain: Drain, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a.to("redis-only")
    dies(monkeypatch, RedisChatSessionStore, "offer", after=True)
    with pytest.raises(Crash):
        await a.store.create_session("user123")
    [key] = await redis.keys("session:*")
    left = UUID(key.decode().partition(":")[2])

    with pytest.raises(SessionNotFound):
        await a.store.get_session(left)
    await drain(a)

    with pytest.raises(SessionNotFound):
        await a.store.get_session(left)
    assert await redis.keys("session:*") == []
    assert (await a.store.list_sessions("user123", limit=10)).total == 0


ADOPTION = {
    "before PostgreSQL has it": (_Locked, "adopt", False),
    "after it was stored, before the commit": (_Locked, "adopt", True),
    "after the commit, before the entry is replaced": (_Watch, "fill", False),
    "after the entry was replaced, before the row is given": (_Watch, "fill", True),
    "after the row was given, before that commit": (_Locked, "give_to", True),
}


@pytest.mark.parametrize("point", ADOPTION.values(), ids=ADOPTION)
@pytest.mark.parametrize("kind", ["owned by redis", "redis alone", "guide"])
async def test_a_crash_while_a_session_is_adopted_loses_nothing(
    a: Instance,
    b: Instance,
    redis: Redis,
    drain: Drain,
    monkeypatch: pytest.MonkeyPatch,
    point: tuple[type, str, bool],
    kind: str,
) -> None:
    session_id = await session_of(a.store, "1")
    await a.to("redis-only")
    await a.store.append(new_append(session_id, "2"))
    if kind != "owned by redis":
        value = await redis.get(session_key(session_id))
        await redis.delete(session_key(session_id))
        await a.to("draining")
        await a.hears("draining")
        await a.store.delete_session(session_id)
        if kind == "guide":
            session_id = uuid4()
            value = guide_value(session_id, "1", "2")
        await redis.set(session_key(session_id), value, ex=1000)
    await a.to("draining")
    await a.hears("draining")
    await b.hears("draining")
    dies(monkeypatch, point[0], point[1], after=point[2])
    with pytest.raises(Crash):
        await a.store.append(new_append(session_id, "never"))

    assert await texts(b.store, session_id) == ["1", "2"]
    await b.store.append(new_append(session_id, "3"))
    tally = await drain(b)

    assert await texts(b.store, session_id) == ["1", "2", "3"]
    assert await texts(b.stores.durable, session_id) == ["1", "2", "3"]
    assert await letter_of(redis, session_id) == b"p"
    assert not tally.expired.count


async def written_before_a_deaf_drain(a: Instance, b: Instance) -> UUID:
    """A session of "1" and "2" that Redis owns, while `a` drains and `b` has not heard of it."""
    session_id = await session_of(a.store, "1")
    await a.to("redis-only")
    await b.hears("redis-only")
    await b.store.append(new_append(session_id, "2"))
    b.go_deaf()
    await a.to("draining")
    await a.hears("draining")
    return session_id


async def test_a_row_stays_redis_s_until_its_entry_is_replaced(
    a: Instance, b: Instance, database: Database, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has not heard of the drain writes to the entry just before that. The next attempt finds its words."""
    session_id = await written_before_a_deaf_drain(a, b)
    fill, owners = _Watch.fill, list[str | None]()

    async def after_a_write(self: _Watch, *args: Any) -> bool:
        owners.append(await owner_of(database, session_id))
        if len(owners) == 1:
            await b.store.append(new_append(session_id, "3"))
        return await fill(self, *args)

    monkeypatch.setattr(_Watch, "fill", after_a_write)

    await a.store.append(new_append(session_id, "4"))

    assert owners[:2] == ["redis", "redis"]
    assert await texts(a.stores.durable, session_id) == ["1", "2", "3", "4"]


async def test_between_the_two_steps_of_an_adoption_nobody_writes_past_redis(
    a: Instance, b: Instance, start: Start, redis: Redis, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry is still Redis's, and one that has not heard of the change writes to it: so nobody else may."""
    session_id = await written_before_a_deaf_drain(a, b)
    dies(monkeypatch, _Watch, "fill", after=False)
    with pytest.raises(Crash):
        await a.store.append(new_append(session_id, "never"))
    without_redis = await start(redis_url=CLOSED)

    await b.store.append(new_append(session_id, "3"))
    for call in (
        texts(without_redis.store, session_id),
        without_redis.store.append(new_append(session_id, "past redis")),
    ):
        with pytest.raises(AdoptionPending):
            await call
    await drain(a)

    assert await texts(a.store, session_id) == ["1", "2", "3"]


# Hostile leftovers


async def test_a_late_hand_over_does_not_bring_a_deleted_session_back(
    a: Instance, b: Instance, redis: Redis, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that sets the entry was given up by its caller, and is carried out after the delete."""
    session_id = await session_of(a.store, "1")
    await a.to("redis-only")
    await b.hears("redis-only")
    late: list[Callable[[], Awaitable[Any]]] = []
    offer = RedisChatSessionStore.offer

    async def out(self: RedisChatSessionStore, *args: Any, **kwargs: Any) -> bool:
        late.append(lambda: offer(self, *args, **kwargs))
        raise CacheOutage("no answer in time")

    monkeypatch.setattr(RedisChatSessionStore, "offer", out)
    with pytest.raises((ChatError, CacheOutage)):
        await a.store.append(new_append(session_id, "never"))
    monkeypatch.undo()
    await b.store.delete_session(session_id)
    await late[0]()

    with pytest.raises(SessionNotFound):
        await b.store.get_session(session_id)
    await a.to("draining")
    for instance in (a, b):
        await instance.hears("draining")
        with pytest.raises(SessionNotFound):
            await texts(instance.store, session_id)
    await drain(a)
    with pytest.raises(SessionNotFound):
        await texts(a.store, session_id)
    assert await redis.exists(session_key(session_id)) == 0


async def test_sessions_are_adopted_from_a_redis_that_is_full(
    a: Instance, redis: Redis, drain: Drain
) -> None:
    """Which is when somebody wants to leave Redis-only mode."""
    session_id = await session_of(a.store, "1")
    await a.to("redis-only")
    await a.store.append(new_append(session_id, "2"))
    await a.to("draining")
    await a.hears("draining")
    before = await redis.config_get("maxmemory*")
    await redis.config_set("maxmemory-policy", "noeviction")
    await redis.config_set("maxmemory", 1)
    try:
        tally = await drain(a)
        read = await texts(a.store, session_id)
    finally:
        await redis.config_set("maxmemory", before["maxmemory"])
        await redis.config_set("maxmemory-policy", before["maxmemory-policy"])

    assert (tally.sessions_adopted, tally.messages_added, tally.messages_known) == (1, 1, 1)
    assert read == ["1", "2"]
    assert await texts(a.stores.durable, session_id) == ["1", "2"]


async def test_a_walk_through_a_redis_that_another_one_took_the_place_of_ends_no_drain(
    a: Instance, redis: Redis, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = uuid4()
    await a.to("redis-only")
    await redis.set(session_key(session_id), guide_value(session_id, "1"), ex=1000)

    async def nothing_and_then_another_redis(_: object) -> AsyncIterator[list[object]]:
        monkeypatch.undo()
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        await redis.execute_command("REPLICAOF", "NO", "ONE")
        for batch in ():
            yield batch

    monkeypatch.setattr(backfill_module, "scan_sessions", nothing_and_then_another_redis)
    tally = await drain(a)

    assert tally.sessions_adopted == 1
    assert await texts(a.stores.durable, session_id) == ["1"]


async def test_a_torn_entry_that_redis_owns_is_not_overwritten(
    a: Instance, redis: Redis, drain: Drain
) -> None:
    session_id = await session_of(a.store, "1")
    await a.to("redis-only")
    await a.store.append(new_append(session_id, "2"))
    await a.to("draining")
    await a.hears("draining")
    await redis.append(session_key(session_id), " ")
    torn = await redis.get(session_key(session_id))

    for call in (
        texts(a.store, session_id),
        a.store.append(new_append(session_id)),
        a.store.delete_session(session_id),
    ):
        with pytest.raises(AdoptionPending, match="can't be read back"):
            await call
    tally = await drain(a)

    assert list(tally.conflicts.shown) == [str(session_id)]
    assert await redis.get(session_key(session_id)) == torn
    await redis.set(session_key(session_id), torn[:-1], ex=1000)
    await drain(a)
    assert await texts(a.store, session_id) == ["1", "2"]


async def test_redis_going_out_between_two_looks_is_no_reason_to_say_not_found(
    a: Instance, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = uuid4()
    row = new_row(session_id, owner="redis")
    await redis.set(session_key(session_id), encode(row, epoch=EPOCH_ZERO, lines=()), ex=1000)
    await a.to("draining")
    await a.hears("draining")

    def out(*_: object) -> Any:
        raise CacheOutage("cut off")

    monkeypatch.setattr(a.stores.cache, "watch", out)
    with pytest.raises(AdoptionPending):
        await a.store.get_session(session_id)


async def test_a_guides_program_that_still_runs_doubles_nothing(a: Instance, redis: Redis) -> None:
    """During a rolling start: it reads an entry of ours, appends, and writes all of it back in its own way."""
    session_id = await session_of(a.store, "1", "2")
    value = json.loads(await redis.get(session_key(session_id)))
    value["messages"].append(
        {"role": "user", "content": "3", "timestamp": "2026-01-01T00:00:00", "metadata": {}}
    )
    await redis.set(session_key(session_id), json.dumps(value), ex=1000)

    assert await texts(a.store, session_id) == ["1", "2", "3"]
