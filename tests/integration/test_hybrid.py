"""Where the two stores meet: hands in Redis, sessions that wait for adoption, races, and outages of both."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from redis.asyncio import Redis

from app.coherence.ports import EPOCH_ZERO, Entry, Row, Watch
from app.embedded import embedded_servers
from app.errors import (
    AdoptionPending,
    DurableStoreUnavailable,
    FreshnessUnknown,
    NotYetVisible,
    SessionNotFound,
)
from app.hybrid import HybridChatSessionStore
from app.postgres.engine import Database, create_engine
from app.postgres.schema import claim_state
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.client import BoundedRedis, create_redis
from app.redis_sessions.codec import FIELDS, encode
from app.redis_sessions.keys import session_key
from app.store import ChatSessionStore
from tests.contract.suite import Call, every_call, new_session, outcomes, texts, until
from tests.databases import migrate
from tests.factories import (
    guide_value,
    keyed_append,
    new_answer,
    new_append,
    new_message,
    new_row,
    turn_append,
)
from tests.servers import Servers

pytestmark = pytest.mark.anyio

MESSAGES_MAX = 10


class GatedCache(RedisSessionCache):
    """A cache whose next publish, watch or fill waits at a gate that the test opens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.publish_gates: list[Gate] = []
        self.watch_gates: list[Gate] = []
        self.fill_gates: list[Gate] = []

    async def publish(self, *args: Any, **kwargs: Any) -> Any:
        for gate in self.publish_gates[:1]:
            self.publish_gates.remove(gate)
            await gate.passed()
        return await super().publish(*args, **kwargs)

    @asynccontextmanager
    async def watch(self, session_id: UUID) -> AsyncIterator[Watch]:
        for gate in self.watch_gates[:1]:
            self.watch_gates.remove(gate)
            await gate.passed()
        async with super().watch(session_id) as watch:
            yield GatedWatch(watch, self.fill_gates)


@dataclass
class GatedWatch:
    _watch: Watch
    _gates: "list[Gate]"

    @property
    def value(self) -> Any:
        return self._watch.value

    async def fill(self, row: Row, epoch: str, lines: Sequence[str]) -> bool:
        for gate in self._gates[:1]:
            self._gates.remove(gate)
            await gate.passed()
        return await self._watch.fill(row, epoch, lines)


class Gate:
    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def passed(self) -> None:
        self.reached.set()
        await self.open.wait()


@dataclass(frozen=True)
class Hybrid:
    store: HybridChatSessionStore
    cache: GatedCache


MakeHybrid = Callable[..., Hybrid]


@pytest.fixture
async def make_hybrid(servers: Servers, database: Database, redis: Redis) -> AsyncIterator[MakeHybrid]:
    async with AsyncExitStack() as stack:

        def make(
            *,
            url: str = servers.redis_url,
            database: Database = database,
            messages_max: int = MESSAGES_MAX,
            bytes_max: int = 1024 * 1024,
            timeout_seconds: float = 2,
            serve_unverified: bool = True,
        ) -> Hybrid:
            client = create_redis(url, database=1, timeout_seconds=timeout_seconds)
            stack.push_async_callback(client.aclose)
            cache = GatedCache(
                BoundedRedis(client, timeout_seconds=timeout_seconds),
                ttl_seconds=3600,
                messages_max=messages_max,
                bytes_max=bytes_max,
            )
            store = HybridChatSessionStore(
                PostgresChatSessionStore(database, ttl_seconds=3600),
                cache,
                messages_max=messages_max,
                serve_unverified=serve_unverified,
            )
            return Hybrid(store, cache)

        yield make


@pytest.fixture
def hybrid(make_hybrid: MakeHybrid) -> Hybrid:
    return make_hybrid()


@pytest.fixture
def store(hybrid: Hybrid) -> HybridChatSessionStore:
    return hybrid.store


async def sources(store: ChatSessionStore, session_id: UUID, times: int = 2) -> list[str]:
    return [(await store.read_history(session_id, max_messages=2)).source for _ in range(times)]


# What operators do by hand


HANDS: dict[str, Callable[[Redis, str], Awaitable[Any]]] = {
    "DEL": lambda redis, key: redis.delete(key),
    "FLUSHDB": lambda redis, _: redis.flushdb(),
    "PEXPIRE": lambda redis, key: redis.pexpire(key, 0),
    "SET garbage": lambda redis, key: redis.set(key, b"garbage"),
    "SET empty": lambda redis, key: redis.set(key, b""),
    "SET {}": lambda redis, key: redis.set(key, b"{}"),
    "APPEND": lambda redis, key: redis.append(key, b"x"),
    "SETRANGE seq": lambda redis, key: redis.setrange(key, 25, b"0000000009"),
    "SETRANGE head": lambda redis, key: redis.setrange(key, 7, b"2"),
    "RENAME": lambda redis, key: redis.rename(key, "session:elsewhere"),
    "SET NX of another type": lambda redis, key: redis.pipeline().delete(key).lpush(key, "a").execute(),
}


@pytest.mark.parametrize("hand", HANDS.values(), ids=HANDS)
async def test_a_hand_in_redis_is_harmless_for_reads(
    store: HybridChatSessionStore, redis: Redis, hand: Callable[[Redis, str], Awaitable[Any]]
) -> None:
    session_id = await new_session(store, "a", "b")

    await hand(redis, session_key(session_id))

    assert await texts(store, session_id) == ["a", "b"]
    assert await texts(store, session_id) == ["a", "b"]
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_what_a_hand_writes_about_a_session_is_not_shown(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    """The user and the times stand in the row that was read beside the entry."""
    session_id = await new_session(store, "a", user_id="owner")
    before = await store.get_session(session_id)
    value = await redis.get(session_key(session_id))

    await redis.set(session_key(session_id), value.replace(b'"owner"', b'"thief"'), px=60_000)
    await redis.setrange(session_key(session_id), FIELDS["last_activity"][0], b"2001-01-01T00:00:00.000Z")

    assert await store.get_session(session_id) == before
    assert before.source == "redis"


@pytest.mark.parametrize("hand", HANDS.values(), ids=HANDS)
async def test_a_hand_in_redis_is_harmless_for_writes(
    store: HybridChatSessionStore, redis: Redis, hand: Callable[[Redis, str], Awaitable[Any]]
) -> None:
    session_id = await new_session(store, "a", "b")

    await hand(redis, session_key(session_id))
    await store.append(new_append(session_id, "c"))

    assert await sources(store, session_id) == ["redis", "redis"]
    assert await texts(store, session_id) == ["a", "b", "c"]
    assert 0 < await redis.pttl(session_key(session_id)) <= 3_600_000


@pytest.mark.parametrize("hand", HANDS.values(), ids=HANDS)
async def test_a_hand_in_redis_is_harmless_for_deletes(
    store: HybridChatSessionStore, redis: Redis, hand: Callable[[Redis, str], Awaitable[Any]]
) -> None:
    session_id = await new_session(store, "a", "b")

    await hand(redis, session_key(session_id))
    await store.delete_session(session_id)

    assert await redis.exists(session_key(session_id)) == 0
    with pytest.raises(SessionNotFound):
        await store.get_session(session_id)


async def test_an_older_copy_of_the_session_is_not_served(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    session_id = await new_session(store, "a", "b")
    key = session_key(session_id)
    dump, value = await redis.dump(key), await redis.get(key)
    await store.append(new_append(session_id, "c"))

    await redis.restore(key, 0, dump, replace=True)
    restored = await store.read_history(session_id, max_messages=10)
    await redis.set(key, value)
    session = await store.get_session(session_id)
    await redis.set(key, value)
    await store.append(new_append(session_id, "d"))

    assert [message.content for message in restored.messages] == ["a", "b", "c"]
    assert session.session.message_count == 3
    assert await texts(store, session_id) == ["a", "b", "c", "d"]


async def test_an_entry_of_the_same_length_with_another_history_is_not_served(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    session_id = await new_session(store, "a", "b")
    forged = new_row(session_id, message_count=2, chain=b"another!")
    lines = [new_message(text).line(seq) for seq, text in enumerate("xy", 1)]

    await redis.set(session_key(session_id), encode(forged, epoch=EPOCH_ZERO, lines=lines))

    assert await texts(store, session_id) == ["a", "b"]


async def test_an_entry_of_another_length_under_the_rows_chain_is_not_served(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    session_id = await new_session(store, "a", "b")
    value = await redis.get(session_key(session_id))
    shorter = value.replace(b"0000000002", b"0000000001", 1)
    shorter = shorter[: shorter.rindex(b",\n")] + b"]}"

    await redis.set(session_key(session_id), shorter)

    assert await texts(store, session_id) == ["a", "b"]


async def test_an_entry_that_is_ahead_of_its_row_is_not_served(
    store: HybridChatSessionStore, redis: Redis, database: Database
) -> None:
    """PostgreSQL was restored from a backup; Redis was not."""
    session_id = await new_session(store, "a")
    async with database.connection() as conn:
        row = await conn.fetchrow("SELECT * FROM chat.chat_sessions WHERE session_id = $1", session_id)
        await store.append(new_append(session_id, "b"))
        await conn.execute(
            "UPDATE chat.chat_sessions SET message_count = $2, chain = $3 WHERE session_id = $1",
            session_id,
            row["message_count"],
            row["chain"],
        )
        await conn.execute("DELETE FROM chat.chat_messages WHERE session_id = $1 AND seq > 1", session_id)

    assert await texts(store, session_id) == ["a"]
    await store.append(new_append(session_id, "c"))
    assert await texts(store, session_id) == ["a", "c"]


async def test_the_entry_of_a_deleted_session_is_not_served_and_goes(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    session_id = await new_session(store, "a")
    value = await redis.get(session_key(session_id))
    await store.delete_session(session_id)
    await redis.set(session_key(session_id), value, ex=100)

    with pytest.raises(SessionNotFound):
        await store.read_history(session_id, max_messages=10)

    assert await redis.exists(session_key(session_id)) == 0


async def test_the_guides_commands_show_what_the_guide_says(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    session_id = await new_session(store, "Điều kiện?")
    key = session_key(session_id)

    assert await redis.keys("session:*") == [key.encode()]
    assert await redis.exists(key) == 1
    assert 3590 < await redis.ttl(key) <= 3600
    assert await redis.dbsize() == 1
    assert "Điều kiện?" in (await redis.get(key)).decode()


# Windows


async def test_a_window_that_holds_fewer_than_asked_is_read_from_postgres(
    make_hybrid: MakeHybrid, redis: Redis
) -> None:
    store = make_hybrid(messages_max=3).store
    session_id = await new_session(store, *"abcde")
    before = await redis.get(session_key(session_id))

    within = await store.read_history(session_id, max_messages=3)
    beyond = await store.read_history(session_id, max_messages=4)
    older = await store.read_history(session_id, max_messages=2, before_seq=3)
    inside = await store.read_history(session_id, max_messages=1, before_seq=5)

    assert [one.source for one in (within, beyond, older, inside)] == [
        "redis",
        "postgres",
        "postgres",
        "redis",
    ]
    assert [[message.content for message in one.messages] for one in (within, beyond, older, inside)] == [
        ["c", "d", "e"],
        ["b", "c", "d", "e"],
        ["a", "b"],
        ["d"],
    ]
    assert await redis.get(session_key(session_id)) == before


async def test_a_window_of_bytes_leaves_the_older_messages_to_postgres(make_hybrid: MakeHybrid) -> None:
    store = make_hybrid(bytes_max=1500).store
    session_id = await new_session(store, "a" * 500, "b" * 500, "c" * 500)

    newest = await store.read_history(session_id, max_messages=2)
    older = await store.read_history(session_id, max_messages=3)

    assert (newest.source, older.source) == ("redis", "postgres")
    assert [message.content[0] for message in older.messages] == ["a", "b", "c"]


async def test_a_turn_beyond_the_window_has_its_whole_history(make_hybrid: MakeHybrid) -> None:
    store = make_hybrid(messages_max=2).store
    session_id = await new_session(store, "a", "b", "c")

    turn = await store.begin_turn(turn_append(session_id, "question"), window=4)

    assert [message.content for message in turn.history] == ["a", "b", "c", "question"]


async def test_an_answer_is_the_same_from_redis_and_from_postgres(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    session_id = await new_session(store)
    await store.append(keyed_append(session_id, "key", "Điều", "]}", "\u2028"))
    from_redis = await store.read_history(session_id, max_messages=10)
    await redis.delete(session_key(session_id))
    from_postgres = await store.read_history(session_id, max_messages=10)

    assert (from_redis.source, from_postgres.source) == ("redis", "postgres")
    assert from_redis.lines == from_postgres.lines
    assert from_redis.session == from_postgres.session


# Adoption


@every_call
async def test_a_session_that_redis_holds_alone_waits_for_adoption(
    store: HybridChatSessionStore, redis: Redis, call: Call
) -> None:
    row = new_row(owner="redis")
    value = encode(row, epoch=EPOCH_ZERO, lines=[])
    await redis.set(session_key(row.session.session_id), value, ex=100)

    with pytest.raises(AdoptionPending):
        await call(store, row.session.session_id, "user123")

    assert await redis.get(session_key(row.session.session_id)) == value


@every_call
async def test_a_session_in_the_guides_format_without_a_row_waits_for_adoption(
    store: HybridChatSessionStore, redis: Redis, call: Call
) -> None:
    session_id = new_row().session.session_id
    value = guide_value(session_id, "a")
    await redis.set(session_key(session_id), value, ex=100)

    with pytest.raises(AdoptionPending):
        await call(store, session_id, "user123")

    assert await redis.get(session_key(session_id)) == value


@every_call
async def test_a_row_that_redis_owns_waits_for_adoption(
    store: HybridChatSessionStore, database: Database, redis: Redis, call: Call
) -> None:
    session_id = await new_session(store, "a")
    async with database.connection() as conn:
        await conn.execute("UPDATE chat.chat_sessions SET owner = 'redis'")
    await redis.delete(session_key(session_id))

    with pytest.raises(AdoptionPending):
        await call(store, session_id, "user123")

    assert await redis.exists(session_key(session_id)) == 0


async def owned_by_redis(store: ChatSessionStore, redis: Redis) -> tuple[UUID, bytes]:
    """A session with a row, which Redis-only mode went on with while the database was away."""
    session_id = await new_session(store, "a")
    value = await redis.get(session_key(session_id))
    owned = value[:8] + b"r" + value[9:]
    await redis.set(session_key(session_id), owned, ex=100)
    return session_id, owned


@pytest.mark.parametrize(
    "call",
    [
        lambda store, id_: store.get_session(id_),
        lambda store, id_: store.read_history(id_, max_messages=10),
        lambda store, id_: store.delete_session(id_),
    ],
    ids=["get_session", "read_history", "delete_session"],
)
async def test_a_row_whose_entry_redis_owns_waits_for_adoption(
    store: HybridChatSessionStore, redis: Redis, call: Callable[[ChatSessionStore, UUID], Awaitable[Any]]
) -> None:
    session_id, owned = await owned_by_redis(store, redis)

    with pytest.raises(AdoptionPending):
        await call(store, session_id)

    assert await redis.get(session_key(session_id)) == owned


async def test_a_write_to_a_row_whose_entry_redis_owns_is_durable_and_leaves_the_entry(
    store: HybridChatSessionStore, redis: Redis, database: Database
) -> None:
    """One script an append, after its commit: the write has no look at Redis before. Adoption merges both."""
    session_id, owned = await owned_by_redis(store, redis)

    await store.append(new_append(session_id, "b"))
    turn = await store.begin_turn(turn_append(session_id, "c"), window=10)

    durable = PostgresChatSessionStore(database, ttl_seconds=3600)
    assert [message.content for message in turn.history] == ["a", "b", "c"]
    assert await texts(durable, session_id) == ["a", "b", "c"]
    assert await redis.get(session_key(session_id)) == owned


async def test_a_value_in_the_guides_format_with_a_row_is_replaced(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    session_id = await new_session(store, "a")
    await redis.set(session_key(session_id), guide_value(session_id, "x"), ex=100)

    assert await texts(store, session_id) == ["a"]
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_a_foreign_user_does_not_learn_that_a_session_waits_for_adoption(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    session_id, _ = await owned_by_redis(store, redis)

    with pytest.raises(SessionNotFound):
        await store.get_session(session_id, user_id="mallory")


# Races


async def test_misses_at_once_cause_one_fill(store: HybridChatSessionStore, redis: Redis) -> None:
    session_id = await new_session(store, "a", "b")
    await redis.delete(session_key(session_id))
    await redis.config_resetstat()

    histories = await asyncio.gather(*(store.read_history(session_id, max_messages=2) for _ in range(30)))

    assert (await redis.info("commandstats"))["cmdstat_exec"]["calls"] == 1
    assert {history.lines for history in histories} == {histories[0].lines}
    assert len(histories[0].lines) == 2


async def test_a_fill_that_finds_redis_the_owner_leaves_the_entry(hybrid: Hybrid, redis: Redis) -> None:
    store, gate = hybrid.store, Gate()
    session_id, owned = await owned_by_redis(store, redis)
    await redis.delete(session_key(session_id))
    hybrid.cache.watch_gates.append(gate)
    reading = asyncio.create_task(store.read_history(session_id, max_messages=10))
    await gate.reached.wait()
    await redis.set(session_key(session_id), owned, ex=100)

    gate.open.set()
    with pytest.raises(AdoptionPending):
        await reading

    assert await redis.get(session_key(session_id)) == owned


async def test_a_reader_whose_fill_began_before_an_append_sees_the_append(
    hybrid: Hybrid, redis: Redis
) -> None:
    store, gate = hybrid.store, Gate()
    session_id = await new_session(store, "a")
    await redis.delete(session_key(session_id))
    hybrid.cache.fill_gates.append(gate)
    filling = asyncio.create_task(store.read_history(session_id, max_messages=10))
    await gate.reached.wait()
    appending = asyncio.create_task(store.append(new_append(session_id, "b")))

    gate.open.set()
    await asyncio.gather(filling, appending)

    assert await texts(store, session_id) == ["a", "b"]
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_a_fill_holds_writers_of_its_session_back_and_no_others(hybrid: Hybrid, redis: Redis) -> None:
    store, gate = hybrid.store, Gate()
    session_id, other = await new_session(store, "a"), await new_session(store)
    await redis.delete(session_key(session_id))
    hybrid.cache.fill_gates.append(gate)
    filling = asyncio.create_task(store.read_history(session_id, max_messages=10))
    await gate.reached.wait()

    appending = asyncio.create_task(store.append(new_append(session_id, "b")))
    await store.append(new_append(other, "c"))
    waited = not appending.done()
    gate.open.set()
    await asyncio.gather(filling, appending)

    assert waited


async def test_a_fill_that_began_before_a_delete_does_not_bring_the_session_back(
    hybrid: Hybrid, redis: Redis
) -> None:
    store, gate = hybrid.store, Gate()
    session_id = await new_session(store, "a")
    await redis.delete(session_key(session_id))
    hybrid.cache.fill_gates.append(gate)
    filling = asyncio.create_task(store.read_history(session_id, max_messages=10))
    await gate.reached.wait()
    deleting = asyncio.create_task(store.delete_session(session_id))

    gate.open.set()
    await asyncio.gather(filling, deleting)

    assert await redis.exists(session_key(session_id)) == 0
    with pytest.raises(SessionNotFound):
        await store.get_session(session_id)


async def test_the_late_fill_of_a_new_session_does_not_hide_its_first_message(
    hybrid: Hybrid, redis: Redis, database: Database
) -> None:
    store, gate = hybrid.store, Gate()
    hybrid.cache.fill_gates.append(gate)
    creating = asyncio.create_task(store.create_session("user123"))
    await gate.reached.wait()
    listed = await store.list_sessions("user123", limit=1)
    session_id = listed.sessions[0].session_id
    await store.append(new_append(session_id, "a"))

    gate.open.set()
    await creating

    assert await texts(store, session_id) == ["a"]
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_publishes_in_the_wrong_order_end_with_the_newest_history(hybrid: Hybrid, redis: Redis) -> None:
    store, gate = hybrid.store, Gate()
    session_id = await new_session(store, "a")
    hybrid.cache.publish_gates.append(gate)
    first = asyncio.create_task(store.append(new_append(session_id, "b")))
    await gate.reached.wait()
    await store.append(new_append(session_id, "c"))

    gate.open.set()
    await first

    assert await texts(store, session_id) == ["a", "b", "c"]
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_a_read_between_commit_and_publish_has_the_write(hybrid: Hybrid) -> None:
    store, gate = hybrid.store, Gate()
    session_id = await new_session(store, "a")
    hybrid.cache.publish_gates.append(gate)
    appending = asyncio.create_task(store.append(new_append(session_id, "b")))
    await gate.reached.wait()

    between = await texts(store, session_id)

    gate.open.set()
    await appending
    assert between == ["a", "b"]
    assert await texts(store, session_id) == ["a", "b"]


async def test_a_caller_that_goes_away_leaves_its_write_whole(hybrid: Hybrid, redis: Redis) -> None:
    store, gate = hybrid.store, Gate()
    session_id = await new_session(store, "a")
    hybrid.cache.publish_gates.append(gate)
    appending = asyncio.create_task(store.append(new_append(session_id, "b")))
    await gate.reached.wait()

    appending.cancel()
    results = await asyncio.gather(appending, return_exceptions=True)
    gate.open.set()

    async def published() -> bool:
        entry = await hybrid.cache.get(session_id)
        return isinstance(entry, Entry) and entry.session.message_count == 2

    await until(published)
    assert outcomes(results) == {"CancelledError": 1}
    assert await texts(store, session_id) == ["a", "b"]


async def test_two_instances_see_each_others_writes(make_hybrid: MakeHybrid) -> None:
    one, other = make_hybrid().store, make_hybrid().store
    session_id = await new_session(one)

    seen = []
    for number in range(10):
        await (one, other)[number % 2].append(new_append(session_id, str(number)))
        seen.append(len(await texts((other, one)[number % 2], session_id)))

    assert seen == list(range(1, 11))


async def test_reads_never_go_back_while_many_write(make_hybrid: MakeHybrid) -> None:
    stores = [make_hybrid().store for _ in range(2)]
    session_id = await new_session(stores[0])

    async def write(store: ChatSessionStore) -> None:
        for _ in range(15):
            await store.append(new_append(session_id))

    async def counts(store: ChatSessionStore) -> list[int]:
        histories = [await store.read_history(session_id, max_messages=5) for _ in range(30)]
        return [history.session.message_count for history in histories]

    *seen, _, _ = await asyncio.gather(*map(counts, stores), *map(write, stores))

    assert [found == sorted(found) for found in seen] == [True, True]
    assert (await stores[0].get_session(session_id)).session.message_count == 30


# Redis out


@pytest.fixture
def closed_url() -> Iterator[str]:
    """A port that is ours, and that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{bound.getsockname()[1]}"


async def test_without_redis_every_call_is_answered_by_postgres(
    make_hybrid: MakeHybrid, closed_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_hybrid(url=closed_url).store

    made = await store.create_session("user123")
    session_id = made.session.session_id
    appended = await store.append(keyed_append(session_id, "key", "a"))
    replayed = await store.append(keyed_append(session_id, "key", "a"))
    turn = await store.begin_turn(turn_append(session_id, "question", key="turn"), window=10)
    finished = await store.finish_turn(turn, new_answer(turn, "answer"))
    history = await store.read_history(session_id, max_messages=10)
    session = await store.get_session(session_id)
    listed = await store.list_sessions("user123", limit=10)
    with pytest.raises(NotYetVisible):
        await store.get_session(session_id, min_seq=9)
    with pytest.raises(SessionNotFound):
        await store.get_session(session_id, user_id="mallory")
    deleted = await store.delete_session(session_id)
    with pytest.raises(SessionNotFound):
        await store.get_session(session_id)

    assert [message.content for message in turn.history] == ["a", "question"]
    assert [message.content for message in history.messages] == ["a", "question", "answer"]
    assert (appended.last_seq, replayed.replayed, finished.last_seq) == (1, True, 3)
    assert {one.source for one in (made, appended, finished, history, session, listed)} == {"postgres"}
    assert history.freshness.age_seconds is None
    assert deleted.message_count == 3
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert warned[0].startswith("redis is out")


async def test_without_redis_the_health_says_so_and_is_no_failure(
    make_hybrid: MakeHybrid, closed_url: str
) -> None:
    store = make_hybrid(url=closed_url).store

    health = {one.name: one.status for one in await store.health()}

    assert health == {"postgres": "pass", "redis": "warn"}


async def test_a_redis_that_never_answers_is_waited_for_once(make_hybrid: MakeHybrid) -> None:
    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)

    connected: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = make_hybrid(url=f"redis://127.0.0.1:{port}", timeout_seconds=0.1).store
    session_id = await new_session(store, "a", "b")
    waited = len(connected)

    assert await texts(store, session_id) == ["a", "b"]

    assert waited == 1
    for writer in connected:
        writer.close()
    server.close()


async def test_a_session_deleted_while_redis_was_out_does_not_come_back_with_it(
    make_hybrid: MakeHybrid, closed_url: str, redis: Redis
) -> None:
    store, cut_off = make_hybrid().store, make_hybrid(url=closed_url).store
    session_id = await new_session(store, "a")

    await cut_off.delete_session(session_id)
    left = await redis.exists(session_key(session_id))

    assert left == 1
    with pytest.raises(SessionNotFound):
        await store.read_history(session_id, max_messages=10)
    assert await redis.exists(session_key(session_id)) == 0


async def test_a_write_while_redis_was_out_is_read_when_it_is_back(
    make_hybrid: MakeHybrid, closed_url: str
) -> None:
    store, cut_off = make_hybrid().store, make_hybrid(url=closed_url).store
    session_id = await new_session(store, "a")

    await cut_off.append(new_append(session_id, "b"))

    assert await texts(store, session_id) == ["a", "b"]
    assert await sources(store, session_id) == ["redis", "redis"]


# PostgreSQL out


class PrivatePostgres:
    """A PostgreSQL that may be stopped, and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self._running = ExitStack()
        self.url = ""

    def start(self) -> None:
        self.stop()
        servers = self._running.enter_context(
            embedded_servers(self._folder, redis=False, durable=False, postgres_port=self._port)
        )
        self.url = str(servers.database_url)
        self._port = urlsplit(self.url).port or 0

    def stop(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def private_postgres() -> Iterator[PrivatePostgres]:
    with TemporaryDirectory(prefix="chat-tests-") as folder:
        postgres = PrivatePostgres(Path(folder))
        postgres.start()
        yield postgres
        postgres.stop()


@pytest.fixture(scope="module")
async def private_database_url(private_postgres: PrivatePostgres, anyio_backend: str) -> str:
    await migrate(private_postgres.url)
    return private_postgres.url


@dataclass(frozen=True)
class Outage:
    """PostgreSQL is out; `cached` stands in Redis, `uncached` does not."""

    hybrid: Hybrid
    refusing: HybridChatSessionStore
    postgres: PrivatePostgres
    cached: UUID
    uncached: UUID
    value: bytes


@pytest.fixture
async def outage(
    private_postgres: PrivatePostgres, private_database_url: str, make_hybrid: MakeHybrid, redis: Redis
) -> AsyncIterator[Outage]:
    database = Database(create_engine(private_database_url, application_name="tests"))
    await claim_state(database, redis_only=None)
    hybrid = make_hybrid(database=database)
    refusing = make_hybrid(database=database, serve_unverified=False).store
    cached, uncached = (
        await new_session(hybrid.store, "a", "b", user_id="owner"),
        await new_session(hybrid.store, "c", user_id="owner"),
    )
    await redis.delete(session_key(uncached))
    value = await redis.get(session_key(cached))
    private_postgres.stop()
    yield Outage(hybrid, refusing, private_postgres, cached, uncached, value)
    await database.close()
    private_postgres.start()


async def test_without_postgres_every_write_is_refused_and_redis_unchanged(
    outage: Outage, redis: Redis
) -> None:
    store = outage.hybrid.store

    for write in (
        store.create_session("user123"),
        store.append(new_append(outage.cached, "x")),
        store.append(keyed_append(outage.cached, "key", "x")),
        store.append(new_append(outage.uncached, "x")),
        store.begin_turn(turn_append(outage.cached, "x", key="turn"), window=10),
        store.delete_session(outage.cached),
    ):
        with pytest.raises(DurableStoreUnavailable):
            await write

    assert await redis.get(session_key(outage.cached)) == outage.value
    assert await redis.dbsize() == 1


async def test_without_postgres_a_cached_session_is_served_with_its_age(outage: Outage) -> None:
    history = await outage.hybrid.store.read_history(outage.cached, max_messages=10)
    session = await outage.hybrid.store.get_session(outage.cached, user_id="owner", min_seq=2)

    assert [message.content for message in history.messages] == ["a", "b"]
    assert (history.source, session.source) == ("redis", "redis")
    ages = history.freshness.age_seconds, session.freshness.age_seconds
    assert [age is not None and 0 < age < 60 for age in ages] == [True, True]
    assert session.session.message_count == 2


async def test_without_postgres_a_cached_session_is_refused_where_that_is_set(outage: Outage) -> None:
    with pytest.raises(FreshnessUnknown):
        await outage.refusing.read_history(outage.cached, max_messages=10)
    with pytest.raises(FreshnessUnknown):
        await outage.refusing.get_session(outage.cached)


async def test_without_postgres_nothing_reads_as_not_found_or_empty(outage: Outage) -> None:
    store = outage.hybrid.store

    for read in (
        store.get_session(outage.uncached),
        store.read_history(outage.uncached, max_messages=10),
        store.read_history(new_row().session.session_id, max_messages=10),
        store.list_sessions("owner", limit=10),
        store.get_session(outage.cached, min_seq=3),
        store.read_history(outage.cached, max_messages=10, min_seq=3),
        outage.refusing.list_sessions("owner", limit=10),
        outage.refusing.get_session(outage.uncached),
    ):
        with pytest.raises(DurableStoreUnavailable):
            await read


async def test_without_postgres_a_cached_session_is_still_its_owners_alone(outage: Outage) -> None:
    with pytest.raises(SessionNotFound):
        await outage.hybrid.store.read_history(outage.cached, max_messages=10, user_id="mallory")


async def test_without_postgres_nothing_that_is_not_ours_and_clean_is_served(
    outage: Outage, redis: Redis
) -> None:
    key = session_key(outage.cached)
    dirty = outage.value[:51] + b"0000000003" + outage.value[61:]
    owned = outage.value[:8] + b"r" + outage.value[9:]

    for value in (dirty, owned, guide_value(outage.cached, "x"), b"garbage"):
        await redis.set(key, value, ex=100)
        with pytest.raises(DurableStoreUnavailable):
            await outage.hybrid.store.read_history(outage.cached, max_messages=10)
        assert await redis.get(key) == value


async def test_without_postgres_a_page_beyond_the_window_is_refused(
    outage: Outage, make_hybrid: MakeHybrid, redis: Redis
) -> None:
    row = new_row(message_count=9)
    lines = [new_message(str(seq)).line(seq) for seq in (8, 9)]
    await redis.set(session_key(row.session.session_id), encode(row, epoch=EPOCH_ZERO, lines=lines), ex=100)

    within = await outage.hybrid.store.read_history(row.session.session_id, max_messages=2)
    with pytest.raises(DurableStoreUnavailable):
        await outage.hybrid.store.read_history(row.session.session_id, max_messages=3)

    assert [message.seq for message in within.messages] == [8, 9]


async def test_without_postgres_the_health_is_a_warning_or_a_failure_as_set(outage: Outage) -> None:
    serving = {one.name: one.status for one in await outage.hybrid.store.health()}
    refusing = {one.name: one.status for one in await outage.refusing.health()}

    assert serving == {"postgres": "warn", "redis": "pass"}
    assert refusing == {"postgres": "fail", "redis": "pass"}


async def test_postgres_that_comes_back_needs_no_restart_of_ours(outage: Outage) -> None:
    store = outage.hybrid.store
    with pytest.raises(DurableStoreUnavailable):
        await store.append(new_append(outage.cached, "refused"))

    outage.postgres.start()
    results = await asyncio.gather(*(store.append(new_append(outage.cached, "c")) for _ in range(10)))
    history = await store.read_history(outage.cached, max_messages=100)

    assert sorted(result.last_seq for result in results) == list(range(3, 13))
    assert [message.content for message in history.messages] == ["a", "b", *["c"] * 10]
    assert history.freshness.age_seconds is None
    assert await texts(store, outage.uncached) == ["c"]


async def test_an_abandoned_turn_raises_nothing_without_postgres(outage: Outage) -> None:
    outage.postgres.start()
    turn = await outage.hybrid.store.begin_turn(turn_append(outage.cached, key="turn"), window=10)
    outage.postgres.stop()

    assert await outage.hybrid.store.abandon_turn(turn) is None
    outage.postgres.start()


def test_the_mark_of_a_redis_owned_entry_is_where_these_tests_put_it() -> None:
    value = encode(new_row(owner="redis"), epoch=EPOCH_ZERO, lines=[])

    assert value.startswith(b'{"_c":"1r')
