"""Where the two stores meet: hands in Redis, leases, adoption, races, and outages of both."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest
from redis.asyncio import Redis

from app.chat import NewMessage
from app.coherence.heartbeat import next_state
from app.coherence.lease import Lease
from app.coherence.ports import (
    EPOCH_ZERO,
    TOKEN_ZERO,
    CacheOutage,
    CacheState,
    Entry,
    Mode,
    ModeChanged,
    Row,
    Watch,
)
from app.embedded import embedded_servers
from app.errors import (
    AdoptionPending,
    ChatError,
    DurableStoreUnavailable,
    FreshnessUnknown,
    NotYetVisible,
    SeqMismatch,
    SessionNotFound,
    TurnTakenOver,
)
from app.hybrid import HybridChatSessionStore
from app.postgres.cache_state import PostgresStateKeeper, claim_state
from app.postgres.engine import Database, create_engine
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.codec import FIELDS, encode
from app.redis_sessions.keys import session_key
from app.store import Append, ChatSessionStore
from tests.contract.suite import CALLS, Call, every_call, new_session, outcomes, texts, until
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
from tests.stores import Hybrid, new_hybrid, trust

pytestmark = pytest.mark.anyio

MESSAGES_MAX = 10


class GatedCache(RedisSessionCache):
    """A cache whose next step of a kind waits at a gate that the test opens, or fails as the test says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before_get_gates: list[Gate] = []
        #: Passed when Redis has answered.
        self.get_gates: list[Gate] = []
        self.settle_gates: list[Gate] = []
        self.publish_gates: list[Gate] = []
        self.watch_gates: list[Gate] = []
        self.fill_gates: list[Gate] = []
        self.mark_failures: list[float] = []
        self.lost_publishes = 0

    async def get(self, *args: Any) -> Any:
        await pass_next(self.before_get_gates)
        value = await super().get(*args)
        await pass_next(self.get_gates)
        return value

    async def mark(self, *args: Any, **kwargs: Any) -> Any:
        for seconds in self.mark_failures[:1]:
            self.mark_failures.remove(seconds)
            await asyncio.sleep(seconds)
            raise CacheOutage("as the test says")
        return await super().mark(*args, **kwargs)

    async def publish(self, *args: Any, **kwargs: Any) -> Any:
        if self.lost_publishes:
            self.lost_publishes -= 1
            raise CacheOutage("as the test says")
        await pass_next(self.publish_gates)
        return await super().publish(*args, **kwargs)

    async def settle(self, *args: Any, **kwargs: Any) -> None:
        await pass_next(self.settle_gates)
        await super().settle(*args, **kwargs)

    @asynccontextmanager
    async def watch(self, session_id: UUID, state: CacheState) -> AsyncIterator[Watch]:
        await pass_next(self.watch_gates)
        async with super().watch(session_id, state) as watch:
            yield GatedWatch(watch, self.fill_gates)


@dataclass
class GatedWatch:
    _watch: Watch
    _gates: "list[Gate]"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watch, name)

    async def fill(self, row: Row, epoch: str, lines: Sequence[str]) -> bool:
        await pass_next(self._gates)
        return await self._watch.fill(row, epoch, lines)


class Gate:
    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def passed(self) -> None:
        self.reached.set()
        await self.open.wait()


async def pass_next(gates: list[Gate]) -> None:
    for gate in gates[:1]:
        gates.remove(gate)
        await gate.passed()


MakeHybrid = Callable[..., Hybrid]


@pytest.fixture
async def make_hybrid(servers: Servers, database: Database, state: CacheState) -> AsyncIterator[MakeHybrid]:
    async with AsyncExitStack() as stack:

        def make(*, url: str = servers.redis_url, database: Database = database, **options: Any) -> Hybrid:
            options = {"state": state, "messages_max": MESSAGES_MAX, "cache_class": GatedCache} | options
            return new_hybrid(stack, database, url, **options)

        yield make


@pytest.fixture(params=["lease", "always"])
def verify(request: pytest.FixtureRequest) -> str:
    """What is said with this fixture holds whether a read trusts its lease or compares the row."""
    return request.param


@pytest.fixture
def hybrid(make_hybrid: MakeHybrid, verify: str) -> Hybrid:
    return make_hybrid(verify=verify)


@pytest.fixture
def store(hybrid: Hybrid) -> HybridChatSessionStore:
    return hybrid.store


@pytest.fixture
def keeper(database: Database) -> PostgresStateKeeper:
    return PostgresStateKeeper(database)


@pytest.fixture
def durable(database: Database) -> PostgresChatSessionStore:
    """What PostgreSQL says by itself."""
    return PostgresChatSessionStore(database, ttl_seconds=3600)


ChangeEpoch = Callable[..., Awaitable[CacheState]]


@pytest.fixture
def change_epoch(servers: Servers, database: Database) -> ChangeEpoch:
    """Changes the epoch, to one that has settled, and tells the instances given."""

    async def change(*hybrids: Hybrid) -> CacheState:
        state = await trust(database, servers.redis_url)
        for one in hybrids:
            one.lease.learn(state, asked_at=float("inf"))
        return state

    return change


def of_epoch_zero(value: bytes) -> bytes:
    """The value as an era that nobody trusts would have left it."""
    offset, width = FIELDS["epoch"]
    return value[:offset] + EPOCH_ZERO.encode() + value[offset + width :]


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


async def test_what_a_hand_writes_about_a_session_is_not_shown_where_rows_are_compared(
    make_hybrid: MakeHybrid, redis: Redis
) -> None:
    """The user and the times stand in the row that was read beside the entry."""
    store = make_hybrid(verify="always").store
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


async def test_an_older_copy_of_the_session_is_not_served_where_rows_are_compared(
    make_hybrid: MakeHybrid, redis: Redis
) -> None:
    store = make_hybrid(verify="always").store
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


async def test_an_older_copy_from_before_the_epoch_changed_is_not_served(
    hybrid: Hybrid, redis: Redis, change_epoch: ChangeEpoch
) -> None:
    store = hybrid.store
    session_id = await new_session(store, "a", "b")
    key = session_key(session_id)
    dump, value = await redis.dump(key), await redis.get(key)
    await change_epoch(hybrid)
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


async def test_an_older_copy_of_the_same_epoch_set_by_hand_is_believed_until_the_next_write(
    make_hybrid: MakeHybrid, redis: Redis
) -> None:
    """What leases can't see, and `CACHE_VERIFY=always` is for."""
    store = make_hybrid(verify="lease").store
    session_id = await new_session(store, "a", "b")
    value = await redis.get(session_key(session_id))
    await store.append(new_append(session_id, "c"))

    await redis.set(session_key(session_id), value)
    believed = await texts(store, session_id)
    await store.append(new_append(session_id, "d"))

    assert believed == ["a", "b"]
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

    await redis.set(session_key(session_id), of_epoch_zero(shorter))

    assert await texts(store, session_id) == ["a", "b"]


async def roll_back(database: Database, session_id: UUID, *, to_seq: int, chain: bytes) -> None:
    """As a backup would bring the session back."""
    async with database.connection() as conn:
        await conn.execute(
            "UPDATE chat.chat_sessions SET message_count = $2, chain = $3 WHERE session_id = $1",
            *(session_id, to_seq, chain),
        )
        await conn.execute(
            "DELETE FROM chat.chat_messages WHERE session_id = $1 AND seq > $2", session_id, to_seq
        )


async def test_an_entry_that_is_ahead_of_its_row_is_not_served(
    hybrid: Hybrid, redis: Redis, database: Database, change_epoch: ChangeEpoch
) -> None:
    """PostgreSQL was restored from a backup, and the epoch changed for it; Redis was not."""
    store = hybrid.store
    session_id = await new_session(store, "a")
    row, _ = await hybrid.durable.lookup(session_id)
    await store.append(new_append(session_id, "b"))
    await roll_back(database, session_id, to_seq=1, chain=row.chain)
    await change_epoch(hybrid)

    assert await texts(store, session_id) == ["a"]
    await store.append(new_append(session_id, "c"))
    assert await texts(store, session_id) == ["a", "c"]


async def test_a_write_takes_trust_from_an_entry_that_is_ahead_of_its_row(
    hybrid: Hybrid, redis: Redis, database: Database
) -> None:
    store = hybrid.store
    session_id = await new_session(store, "a")
    row, _ = await hybrid.durable.lookup(session_id)
    await store.append(new_append(session_id, "b", "c"))
    await roll_back(database, session_id, to_seq=1, chain=row.chain)

    await store.append(new_append(session_id, "d"))

    assert await texts(store, session_id) == ["a", "d"]
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_the_entry_of_a_deleted_session_is_not_served_and_goes(
    hybrid: Hybrid, redis: Redis, change_epoch: ChangeEpoch
) -> None:
    store = hybrid.store
    session_id = await new_session(store, "a")
    value = await redis.get(session_key(session_id))
    await store.delete_session(session_id)
    await change_epoch(hybrid)
    await redis.set(session_key(session_id), value, ex=100)

    with pytest.raises(SessionNotFound):
        await store.read_history(session_id, max_messages=10)

    assert await redis.exists(session_key(session_id)) == 0


async def test_the_entry_of_a_deleted_session_set_by_hand_is_not_served_where_rows_are_compared(
    make_hybrid: MakeHybrid, redis: Redis
) -> None:
    store = make_hybrid(verify="always").store
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
    make_hybrid: MakeHybrid, verify: str, redis: Redis
) -> None:
    store = make_hybrid(messages_max=3, verify=verify).store
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


async def test_a_window_of_bytes_leaves_the_older_messages_to_postgres(
    make_hybrid: MakeHybrid, verify: str
) -> None:
    store = make_hybrid(bytes_max=1500, verify=verify).store
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


async def test_a_read_that_asks_for_more_than_the_trusted_entry_has_is_answered_by_its_row(
    make_hybrid: MakeHybrid, redis: Redis
) -> None:
    store = make_hybrid(verify="lease").store
    session_id = await new_session(store, "a")
    value = await redis.get(session_key(session_id))
    await store.append(new_append(session_id, "b"))
    await redis.set(session_key(session_id), value)

    history = await store.read_history(session_id, max_messages=10, min_seq=2)
    with pytest.raises(NotYetVisible):
        await store.get_session(session_id, min_seq=3)

    assert [message.content for message in history.messages] == ["a", "b"]


# Adoption


#: Their answers are the contract's; here it matters that they are given at all.
REFUSALS = (NotYetVisible, SeqMismatch, TurnTakenOver)

KEEPING = {name: call for name, call in CALLS.items() if name != "delete_session"}
every_call_that_keeps = pytest.mark.parametrize("call", KEEPING.values(), ids=KEEPING)


async def put_redis_owned(
    redis: Redis, session_id: UUID, messages: Sequence[NewMessage], *, first_seq: int = 1
) -> bytes:
    """A session as Redis-only mode leaves it in Redis."""
    row = new_row(session_id, owner="redis", message_count=first_seq + len(messages) - 1)
    lines = [message.line(seq) for seq, message in enumerate(messages, first_seq)]
    value = encode(row, epoch=EPOCH_ZERO, lines=lines)
    await redis.set(session_key(session_id), value, ex=100)
    return value


async def owner_in_redis(redis: Redis, session_id: UUID) -> bytes:
    return await redis.getrange(session_key(session_id), FIELDS["owner"][0], FIELDS["owner"][0])


@every_call_that_keeps
async def test_a_session_that_redis_holds_alone_is_adopted_by_any_call(
    hybrid: Hybrid, redis: Redis, durable: PostgresChatSessionStore, call: Call
) -> None:
    session_id = new_row().session.session_id
    await put_redis_owned(redis, session_id, [new_message("a"), new_message("b")])

    with suppress(*REFUSALS):
        await call(hybrid.store, session_id, "user123")

    assert (await texts(durable, session_id))[:2] == ["a", "b"]
    assert await texts(hybrid.store, session_id) == await texts(durable, session_id)
    assert await sources(hybrid.store, session_id) == ["redis", "redis"]
    assert await owner_in_redis(redis, session_id) == b"p"
    assert hybrid.counts.sessions_adopted == 1


@every_call_that_keeps
async def test_a_session_in_the_guides_format_is_adopted_by_any_call(
    hybrid: Hybrid, redis: Redis, durable: PostgresChatSessionStore, call: Call
) -> None:
    session_id = uuid4()
    await redis.set(session_key(session_id), guide_value(session_id, "a", "b"), ex=100)

    with suppress(*REFUSALS):
        await call(hybrid.store, session_id, "user123")

    assert (await texts(durable, session_id))[:2] == ["a", "b"]
    assert await texts(hybrid.store, session_id) == await texts(durable, session_id)
    assert await sources(hybrid.store, session_id) == ["redis", "redis"]
    assert hybrid.counts.sessions_adopted == 1


async def test_a_session_that_redis_held_for_itself_is_adopted_before_it_is_deleted(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    """And is gone from both: what a delete leaves in Redis would come back with the next touch."""
    owned, of_the_guide, with_a_row = new_row().session.session_id, uuid4(), await new_session(store, "a")
    await put_redis_owned(redis, owned, [new_message("a")])
    await redis.set(session_key(of_the_guide), guide_value(of_the_guide, "a"), ex=100)
    await put_redis_owned(redis, with_a_row, [new_message("b")])

    deleted = [await store.delete_session(one) for one in (owned, of_the_guide, with_a_row)]

    assert [one.message_count for one in deleted] == [1, 1, 2]
    assert await redis.dbsize() == 0
    for session_id in (owned, of_the_guide, with_a_row):
        with pytest.raises(SessionNotFound):
            await store.get_session(session_id)


async def test_adoption_merges_by_id_and_keeps_the_order_of_each_side(
    hybrid: Hybrid, redis: Redis, durable: PostgresChatSessionStore
) -> None:
    session_id = await new_session(hybrid.store)
    both, ours, theirs = (new_message(text) for text in ("both", "ours", "theirs"))
    await hybrid.store.append(Append(session_id=session_id, messages=(both, ours)))
    await put_redis_owned(redis, session_id, [both, theirs])

    await hybrid.store.append(new_append(session_id, "next"))

    assert await texts(hybrid.store, session_id) == ["both", "ours", "theirs", "next"]
    assert await texts(durable, session_id) == ["both", "ours", "theirs", "next"]


async def test_adoption_says_what_was_new_what_was_known_and_what_redis_had_dropped(
    hybrid: Hybrid, redis: Redis
) -> None:
    session_id = await new_session(hybrid.store)
    known, new = new_message("known"), new_message("new")
    await hybrid.store.append(Append(session_id=session_id, messages=(known,)))
    # Of eight messages its window kept the last two.
    await put_redis_owned(redis, session_id, [known, new], first_seq=7)

    adopted = await hybrid.store.adopt(session_id)
    again = await hybrid.store.adopt(session_id)

    assert adopted is not None
    assert (adopted.added, adopted.known, adopted.gone) == (1, 1, 6)
    assert (adopted.row.owner, adopted.row.session.message_count) == ("postgres", 2)
    assert again is None


async def test_an_adopted_session_keeps_its_user_its_times_and_its_messages(
    hybrid: Hybrid, redis: Redis
) -> None:
    session_id = uuid4()
    value = guide_value(session_id, "a", user_id="owner").replace(b'_at": "20', b'_at": "19')
    assert value.count(b'_at": "19') == 1
    await redis.set(session_key(session_id), value, ex=100)
    found = await hybrid.cache.get(session_id, hybrid.lease.state)

    history = await hybrid.store.read_history(session_id, max_messages=10, user_id="owner")

    assert history.session == found.session
    assert history.session.created_at.year < 2000
    assert history.messages == tuple(message.at(seq) for seq, message in enumerate(found.messages, 1))


async def test_a_row_that_redis_owned_and_let_expire_keeps_what_postgres_has(
    store: HybridChatSessionStore, redis: Redis, database: Database
) -> None:
    session_id = await new_session(store, "a")
    async with database.connection() as conn:
        await conn.execute("UPDATE chat.chat_sessions SET owner = 'redis'")
    await redis.delete(session_key(session_id))

    assert await texts(store, session_id) == ["a"]
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_a_message_that_comes_while_a_session_is_adopted_is_adopted_too(
    hybrid: Hybrid, redis: Redis, durable: PostgresChatSessionStore
) -> None:
    gate, session_id = Gate(), new_row().session.session_id
    messages = [new_message(text) for text in "ab"]
    await put_redis_owned(redis, session_id, messages[:1])
    hybrid.cache.fill_gates.append(gate)
    adopting = asyncio.create_task(hybrid.store.adopt(session_id))
    await gate.reached.wait()
    # An instance that still serves in Redis-only mode.
    await put_redis_owned(redis, session_id, messages)

    gate.open.set()
    await adopting

    assert await texts(durable, session_id) == ["a", "b"]
    assert await texts(hybrid.store, session_id) == ["a", "b"]
    assert await owner_in_redis(redis, session_id) == b"p"


async def test_adoptions_of_one_session_at_once_store_each_message_once(
    make_hybrid: MakeHybrid, redis: Redis, durable: PostgresChatSessionStore
) -> None:
    stores = [make_hybrid(verify=verify).store for verify in ("lease", "always", "lease")]
    session_id = uuid4()
    await redis.set(session_key(session_id), guide_value(session_id, *"abcde"), ex=100)

    found = await asyncio.gather(*(texts(store, session_id) for store in stores * 3))

    assert found == [list("abcde")] * 9
    assert await texts(durable, session_id) == list("abcde")


async def test_a_second_look_at_a_session_in_the_guides_format_adds_only_what_is_new(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    """The guide's program may still be running: it overwrites what was adopted."""
    session_id = uuid4()
    first = guide_value(session_id, "a", "b")
    await redis.set(session_key(session_id), first, ex=100)
    await texts(store, session_id)
    more = guide_value(session_id, "c")
    grown = first.removesuffix(b"]}") + b", " + more[more.index(b"[") + 1 :]

    await redis.set(session_key(session_id), grown, ex=100)

    assert await texts(store, session_id) == ["a", "b", "c"]


UNSTORABLE = {
    "a NUL in a message": lambda id_: guide_value(id_, "a\0b"),
    "a NUL in the user": lambda id_: guide_value(id_, "a", user_id="\0"),
    "a line that is no message": lambda id_: encode(
        new_row(id_, owner="redis", message_count=1), epoch=EPOCH_ZERO, lines=["{}"]
    ),
}


@pytest.mark.parametrize("value_of", UNSTORABLE.values(), ids=UNSTORABLE)
async def test_what_can_not_be_stored_waits_in_redis(
    store: HybridChatSessionStore, redis: Redis, value_of: Callable[[UUID], bytes]
) -> None:
    session_id = uuid4()
    value = value_of(session_id)
    await redis.set(session_key(session_id), value, ex=100)

    for call in (CALLS["read_history"], CALLS["append"], CALLS["delete_session"]):
        with pytest.raises(AdoptionPending):
            await call(store, session_id, "user123")

    assert await redis.get(session_key(session_id)) == value


async def test_a_session_of_a_month_without_a_partition_is_adopted(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    """Redis-only mode without a database makes sessions, and nobody makes partitions."""
    session_id = UUID("01700000-0000-7000-8000-000000000001")
    await put_redis_owned(redis, session_id, [new_message("a")])

    assert await texts(store, session_id) == ["a"]


async def test_a_read_whose_look_up_was_older_than_an_adoption_finds_the_session(
    make_hybrid: MakeHybrid, redis: Redis
) -> None:
    reader, other, gate = make_hybrid(verify="always"), make_hybrid(), Gate()
    session_id = new_row().session.session_id
    await put_redis_owned(redis, session_id, [new_message("a")])
    reader.cache.before_get_gates.append(gate)
    reading = asyncio.create_task(texts(reader.store, session_id))
    await gate.reached.wait()
    # Long enough for the look-up beside it.
    await reader.durable.lookup(session_id)
    await other.store.adopt(session_id)

    gate.open.set()

    assert await reading == ["a"]


@pytest.mark.parametrize("gates", ["before_get_gates", "watch_gates"])
async def test_a_write_that_found_no_row_before_another_instance_adopted_finds_the_session(
    make_hybrid: MakeHybrid, redis: Redis, durable: PostgresChatSessionStore, gates: str
) -> None:
    writer, other, gate = make_hybrid(), make_hybrid(), Gate()
    session_id = new_row().session.session_id
    await put_redis_owned(redis, session_id, [new_message("a")])
    getattr(writer.cache, gates).append(gate)
    writing = asyncio.create_task(writer.store.append(new_append(session_id, "b")))
    await gate.reached.wait()
    await other.store.adopt(session_id)

    gate.open.set()
    await writing

    assert await texts(durable, session_id) == ["a", "b"]


async def test_a_write_that_found_no_row_before_a_drain_finds_what_has_left_redis_since(
    make_hybrid: MakeHybrid,
    keeper: PostgresStateKeeper,
    state: CacheState,
    redis: Redis,
    durable: PostgresChatSessionStore,
) -> None:
    """As where Redis is full, and its entry is dropped. Nothing in Redis tells of the row that is there now."""
    draining = await keeper.change(state, next_state(state, mode="draining"))
    await keeper.settle(draining)
    draining = await keeper.read()
    writer, other, gate = make_hybrid(state=draining), make_hybrid(state=draining), Gate()
    session_id = new_row().session.session_id
    await put_redis_owned(redis, session_id, [new_message("a")])
    writer.cache.before_get_gates.append(gate)
    writing = asyncio.create_task(writer.store.append(new_append(session_id, "b")))
    await gate.reached.wait()
    await other.store.adopt(session_id)
    await redis.delete(session_key(session_id))

    gate.open.set()
    await writing

    assert await texts(durable, session_id) == ["a", "b"]


@every_call
async def test_a_row_that_redis_owns_waits_while_redis_is_out(
    make_hybrid: MakeHybrid, database: Database, closed_url: str, verify: str, call: Call
) -> None:
    store = make_hybrid(url=closed_url, verify=verify).store
    (row,) = await PostgresChatSessionStore(database, ttl_seconds=1).create(
        ["user123"], owner="redis", before_commit=nothing
    )
    session_id = row.session.session_id

    with pytest.raises(AdoptionPending):
        await call(store, session_id, "user123")


async def test_nothing_is_adopted_from_a_redis_that_is_not_the_epochs(
    make_hybrid: MakeHybrid,
    keeper: PostgresStateKeeper,
    state: CacheState,
    redis: Redis,
    durable: PostgresChatSessionStore,
) -> None:
    """Nor is half of it: the look at the state comes before the first commit."""
    store, session_id = make_hybrid().store, new_row().session.session_id
    await put_redis_owned(redis, session_id, [new_message("a")])
    await keeper.settle(await keeper.change(state, next_state(state, redis_identity="another/one")))

    with pytest.raises(AdoptionPending):
        await store.adopt(session_id)

    assert (await durable.lookup(session_id))[0] is None


async def test_a_row_that_redis_owns_waits_where_redis_goes_out_before_the_fill(
    hybrid: Hybrid, durable: PostgresChatSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL has what it had when it gave the session away."""

    def goes_out(*_args: object) -> None:
        raise CacheOutage("as the test says")

    (row,) = await durable.create(["user123"], owner="redis", before_commit=nothing)
    monkeypatch.setattr(hybrid.cache, "watch", goes_out)

    with pytest.raises(AdoptionPending):
        await hybrid.store.get_session(row.session.session_id)


async def nothing(_rows: Sequence[Row], _state: CacheState) -> None:
    pass


@pytest.mark.parametrize("call", ["get_session", "read_history", "append", "begin_turn", "delete_session"])
@pytest.mark.parametrize(("mode", "refusal"), [("draining", AdoptionPending), ("hybrid", SessionNotFound)])
async def test_a_session_without_a_row_waits_for_redis_only_during_a_drain(
    make_hybrid: MakeHybrid,
    keeper: PostgresStateKeeper,
    state: CacheState,
    closed_url: str,
    verify: str,
    mode: Mode,
    refusal: type[ChatError],
    call: str,
) -> None:
    state = await keeper.change(state, next_state(state, mode=mode))
    store = make_hybrid(url=closed_url, state=state, verify=verify).store

    with pytest.raises(refusal):
        await CALLS[call](store, new_row().session.session_id, "user123")


async def test_a_drain_deletes_nothing_while_redis_is_out(
    make_hybrid: MakeHybrid,
    keeper: PostgresStateKeeper,
    state: CacheState,
    closed_url: str,
    durable: PostgresChatSessionStore,
) -> None:
    """Redis may hold the session too, and would bring it back."""
    session_id = await new_session(make_hybrid().store, "a")
    state = await keeper.change(state, next_state(state, mode="draining"))
    store = make_hybrid(url=closed_url, state=state, lease=Lease(seconds=0.1)).store

    with pytest.raises(AdoptionPending):
        await store.delete_session(session_id)

    assert await texts(durable, session_id) == ["a"]


async def test_a_foreign_user_does_not_learn_of_a_session_that_is_adopted(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    with_a_row, alone = await new_session(store, "a"), new_row().session.session_id
    await put_redis_owned(redis, with_a_row, [new_message("b")])
    await put_redis_owned(redis, alone, [new_message("b")])

    for session_id in (with_a_row, alone):
        with pytest.raises(SessionNotFound):
            await store.get_session(session_id, user_id="mallory")
        with pytest.raises(SessionNotFound):
            await store.append(new_append(session_id, user_id="mallory"))


async def test_a_broken_value_that_looks_like_the_guides_is_replaced_where_there_is_a_row(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    read, written = await new_session(store, "a"), await new_session(store, "a")
    for session_id in (read, written):
        await redis.set(session_key(session_id), b'{"session_id":', ex=100)

    await store.append(new_append(written, "b"))

    assert await texts(store, read) == ["a"]
    assert await texts(store, written) == ["a", "b"]
    assert await sources(store, read) + await sources(store, written) == ["redis"] * 4


# Races


async def test_misses_at_once_cause_one_fill(store: HybridChatSessionStore, redis: Redis) -> None:
    session_id = await new_session(store, "a", "b")
    await redis.delete(session_key(session_id))
    await redis.config_resetstat()

    histories = await asyncio.gather(*(store.read_history(session_id, max_messages=2) for _ in range(30)))

    assert (await redis.info("commandstats"))["cmdstat_exec"]["calls"] == 1
    assert {history.lines for history in histories} == {histories[0].lines}
    assert len(histories[0].lines) == 2


async def test_a_fill_that_finds_redis_the_owner_adopts_what_it_found(hybrid: Hybrid, redis: Redis) -> None:
    store, gate = hybrid.store, Gate()
    session_id = await new_session(store, "a")
    await redis.delete(session_key(session_id))
    hybrid.cache.watch_gates.append(gate)
    reading = asyncio.create_task(texts(store, session_id))
    await gate.reached.wait()
    await put_redis_owned(redis, session_id, [new_message("b")])

    gate.open.set()

    assert await reading == ["a", "b"]


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


async def listed(store: ChatSessionStore) -> UUID:
    """The session that is there, though its maker was not told yet."""
    return (await store.list_sessions("user123", limit=1)).sessions[0].session_id


async def test_a_new_sessions_entry_is_dirty_until_its_commit_is_known(hybrid: Hybrid, redis: Redis) -> None:
    store, gate = hybrid.store, Gate()
    hybrid.cache.settle_gates.append(gate)
    creating = asyncio.create_task(store.create_session("user123"))
    await gate.reached.wait()
    session_id = await listed(store)
    skeleton = await hybrid.cache.get(session_id, hybrid.lease.state)
    between = await store.get_session(session_id)

    gate.open.set()
    created = await creating

    assert skeleton.dirty
    assert between.session == created.session
    assert not (await hybrid.cache.get(session_id, hybrid.lease.state)).dirty
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_a_write_is_acknowledged_whatever_becomes_of_the_fill_after_it(
    hybrid: Hybrid, make_hybrid: MakeHybrid, redis: Redis
) -> None:
    """It is durable. A refusal would be taken for "not stored"."""
    session_id, gate = await new_session(hybrid.store, "a"), Gate()
    await redis.delete(session_key(session_id))
    hybrid.cache.watch_gates.append(gate)
    writing = asyncio.create_task(hybrid.store.append(new_append(session_id, "b")))
    await gate.reached.wait()
    await make_hybrid().store.delete_session(session_id)

    gate.open.set()

    assert (await writing).last_seq == 2


async def test_a_reader_that_goes_away_takes_the_fill_from_nobody(hybrid: Hybrid, redis: Redis) -> None:
    session_id, gate = await new_session(hybrid.store, "a"), Gate()
    await redis.delete(session_key(session_id))
    hybrid.cache.watch_gates.append(gate)
    fills = hybrid.counts.cache_fills
    leaving = asyncio.create_task(texts(hybrid.store, session_id))
    await gate.reached.wait()
    staying = asyncio.create_task(hybrid.store._filled(session_id))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])

    gate.open.set()

    assert (await staying).session.session_id == session_id
    assert hybrid.counts.cache_fills == fills + 1


async def test_a_delete_whose_caller_goes_away_runs_to_its_end_and_is_waited_for_by_a_close(
    hybrid: Hybrid, durable: PostgresChatSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id, gate, remove = await new_session(hybrid.store, "a"), Gate(), hybrid.cache.remove

    async def gated(*args: Any) -> bool:
        await gate.passed()
        return await remove(*args)

    monkeypatch.setattr(hybrid.cache, "remove", gated)
    deleting = asyncio.create_task(hybrid.store.delete_session(session_id))
    await gate.reached.wait()
    deleting.cancel()
    await asyncio.wait([deleting])
    closing = asyncio.create_task(hybrid.store.close())
    for _ in range(20):
        await asyncio.sleep(0)
    waits = not closing.done()

    gate.open.set()
    await closing

    assert waits
    with pytest.raises(SessionNotFound):
        await durable.get_session(session_id)


async def test_a_fill_that_is_over_is_forgotten(hybrid: Hybrid, redis: Redis) -> None:
    session_id = await new_session(hybrid.store, "a")
    await redis.delete(session_key(session_id))
    assert await texts(hybrid.store, session_id) == ["a"]
    with pytest.raises(SessionNotFound):
        await hybrid.store.get_session(new_row().session.session_id)

    assert hybrid.store._fills == {}


async def test_a_session_whose_settling_is_lost_is_made_all_the_same(
    hybrid: Hybrid, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def goes_out(*_args: object, **_kwargs: object) -> None:
        raise CacheOutage("as the test says")

    monkeypatch.setattr(hybrid.cache, "settle", goes_out)

    session_id = (await hybrid.store.create_session("user123")).session.session_id

    assert await texts(hybrid.store, session_id) == []
    await hybrid.store.append(new_append(session_id, "a"))
    assert await texts(hybrid.store, session_id) == ["a"]


@pytest.mark.parametrize("read_between", [False, True])
async def test_the_late_settling_of_a_new_session_does_not_hide_its_first_message(
    hybrid: Hybrid, redis: Redis, read_between: bool
) -> None:
    """Neither where the message was published, nor where its publish was lost."""
    store, gate = hybrid.store, Gate()
    hybrid.cache.settle_gates.append(gate)
    creating = asyncio.create_task(store.create_session("user123"))
    await gate.reached.wait()
    session_id = await listed(store)
    for _ in range(read_between):
        await texts(store, session_id)
    hybrid.cache.lost_publishes = 1
    await store.append(new_append(session_id, "a"))

    gate.open.set()
    await creating

    assert await texts(store, session_id) == ["a"]
    assert await sources(store, session_id) == ["redis", "redis"]


async def test_the_late_skeleton_of_a_session_is_not_believed(hybrid: Hybrid, redis: Redis) -> None:
    """One whose SET timed out, and is carried out when the entry that came after it has been evicted."""
    store = hybrid.store
    session_id = await new_session(store, "a")
    row = replace(new_row(session_id), session=replace(new_row(session_id).session, message_count=0))
    await redis.delete(session_key(session_id))

    await hybrid.cache.skeleton([row], hybrid.lease.state, token="e" * 16)

    assert await texts(store, session_id) == ["a"]


async def test_a_create_waits_for_nobodys_lease(make_hybrid: MakeHybrid, closed_url: str) -> None:
    """Nobody can have a copy of what is only being made."""
    hybrid = make_hybrid(url=closed_url)

    await hybrid.store.create_session("user123")

    assert hybrid.counts.writes_held == 0
    assert (await hybrid.keeper.read()).cache == "on"


async def test_publishes_in_the_wrong_order_end_with_the_newest_history(
    hybrid: Hybrid, make_hybrid: MakeHybrid, verify: str
) -> None:
    """Of two instances: within one they keep their order."""
    store, other, gate = hybrid.store, make_hybrid(verify=verify).store, Gate()
    session_id = await new_session(store, "a")
    hybrid.cache.publish_gates.append(gate)
    first = asyncio.create_task(store.append(new_append(session_id, "b")))
    await gate.reached.wait()
    await other.append(new_append(session_id, "c"))

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
        entry = await hybrid.cache.get(session_id, hybrid.lease.state)
        return isinstance(entry, Entry) and entry.session.message_count == 2

    await until(published)
    assert outcomes(results) == {"CancelledError": 1}
    assert await texts(store, session_id) == ["a", "b"]


async def test_two_instances_see_each_others_writes(make_hybrid: MakeHybrid, verify: str) -> None:
    one, other = make_hybrid(verify=verify).store, make_hybrid(verify="lease").store
    session_id = await new_session(one)

    seen = []
    for number in range(10):
        await (one, other)[number % 2].append(new_append(session_id, str(number)))
        seen.append(len(await texts((other, one)[number % 2], session_id)))

    assert seen == list(range(1, 11))


async def test_reads_never_go_back_while_many_write(make_hybrid: MakeHybrid, verify: str) -> None:
    stores = [make_hybrid(verify=verify).store for _ in range(2)]
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


# Marks


async def test_a_write_whose_publish_was_lost_is_read_on_every_instance(
    make_hybrid: MakeHybrid, hybrid: Hybrid, redis: Redis
) -> None:
    """As a crash between commit and publish leaves it."""
    writer = make_hybrid()
    session_id = await new_session(writer.store, "a")
    writer.cache.lost_publishes = 1

    await writer.store.append(new_append(session_id, "b"))

    assert await texts(hybrid.store, session_id) == ["a", "b"]
    assert await sources(hybrid.store, session_id) == ["redis", "redis"]


async def test_a_repeated_write_whose_publish_was_lost_is_acknowledged_without_a_mark(
    make_hybrid: MakeHybrid, hybrid: Hybrid, redis: Redis
) -> None:
    writer = make_hybrid()
    session_id = await new_session(writer.store, "a")
    append = keyed_append(session_id, "key", "b")
    writer.cache.lost_publishes = 1
    await writer.store.append(append)
    marked = await redis.get(session_key(session_id))

    repeated = await hybrid.store.append(append)

    assert repeated.replayed
    assert await redis.get(session_key(session_id)) == marked
    assert await texts(hybrid.store, session_id) == ["a", "b"]


async def test_a_write_that_was_rolled_back_after_its_mark_leaves_what_was_there(
    hybrid: Hybrid, redis: Redis
) -> None:
    store = hybrid.store
    session_id = await new_session(store)
    message = new_message("a")
    await store.append(Append(session_id=session_id, messages=(message,)))
    with pytest.raises(asyncpg.UniqueViolationError):
        await store.append(Append(session_id=session_id, messages=(message,)))
    marked = await hybrid.cache.get(session_id, hybrid.lease.state)

    found = [await texts(store, session_id) for _ in range(3)]

    assert marked.dirty
    assert found == [["a"]] * 3
    assert hybrid.counts.cache_fills == 0


async def test_where_leases_trust_a_dirty_entry_is_validated_once_and_then_answers_alone(
    make_hybrid: MakeHybrid, redis: Redis
) -> None:
    hybrid = make_hybrid(verify="lease")
    session_id = await new_session(hybrid.store, "a")
    await redis.setrange(session_key(session_id), FIELDS["pending"][0], b"0000000009")

    assert await sources(hybrid.store, session_id, 4) == ["redis"] * 4

    assert (hybrid.counts.cache_validations, hybrid.counts.cache_hits, hybrid.counts.cache_fills) == (1, 3, 0)


async def test_an_entry_of_an_older_epoch_is_validated_once_and_then_trusted(
    make_hybrid: MakeHybrid, redis: Redis, change_epoch: ChangeEpoch
) -> None:
    hybrid = make_hybrid(verify="lease")
    session_id = await new_session(hybrid.store, "a")
    state = await change_epoch(hybrid)

    assert await sources(hybrid.store, session_id, 4) == ["redis"] * 4

    assert (hybrid.counts.cache_validations, hybrid.counts.cache_hits, hybrid.counts.cache_fills) == (1, 3, 0)
    assert (await hybrid.cache.get(session_id, state)).epoch == state.epoch


async def test_a_write_takes_an_entry_of_an_older_epoch_along(
    make_hybrid: MakeHybrid, redis: Redis, change_epoch: ChangeEpoch
) -> None:
    hybrid = make_hybrid(verify="lease")
    session_id = await new_session(hybrid.store, "a")
    await change_epoch(hybrid)

    await hybrid.store.append(new_append(session_id, "b"))

    assert await texts(hybrid.store, session_id) == ["a", "b"]
    assert (hybrid.counts.cache_validations, hybrid.counts.cache_hits, hybrid.counts.cache_fills) == (0, 1, 0)


async def test_a_mark_that_failed_at_once_is_tried_again(hybrid: Hybrid, state: CacheState) -> None:
    """A connection that was cut says so at once, and the next one may be whole."""
    session_id = await new_session(hybrid.store, "a")
    hybrid.cache.mark_failures = [0.0]

    await hybrid.store.append(new_append(session_id, "b"))

    assert await hybrid.keeper.read() == state
    assert hybrid.counts.writes_held == 0
    assert await texts(hybrid.store, session_id) == ["a", "b"]


@pytest.mark.parametrize("failures", [[0.1], [0.0, 0.0]], ids=["timed out", "failed twice"])
async def test_a_write_that_can_not_mark_turns_the_cache_off(
    make_hybrid: MakeHybrid, state: CacheState, failures: list[float]
) -> None:
    hybrid = make_hybrid(lease=Lease(seconds=0.2))
    session_id = await new_session(hybrid.store, "a")
    hybrid.cache.mark_failures = failures

    await hybrid.store.append(new_append(session_id, "b"))

    left = await hybrid.keeper.read()
    assert (left.cache, left.settled, left.redis_identity) == ("off", False, state.redis_identity)
    assert left.epoch != state.epoch
    assert (hybrid.counts.writes_held, hybrid.counts.epoch_changes) == (1, 1)


async def test_a_write_that_can_not_mark_is_not_committed_before_the_leases_have_ended(
    make_hybrid: MakeHybrid, durable: PostgresChatSessionStore
) -> None:
    hybrid = make_hybrid(lease=Lease(seconds=0.8))
    session_id = await new_session(hybrid.store, "a")
    hybrid.cache.mark_failures = [0.1]
    appending = asyncio.create_task(hybrid.store.append(new_append(session_id, "b")))

    async def off() -> bool:
        return (await hybrid.keeper.read()).cache == "off"

    await until(off)
    seen_at = time.monotonic()
    between = await texts(durable, session_id)
    await appending

    assert between == ["a"]
    assert time.monotonic() - seen_at > 0.4
    assert await texts(durable, session_id) == ["a", "b"]


WRITES: dict[str, Callable[[ChatSessionStore, UUID], Awaitable[Any]]] = {
    "append": lambda store, id_: store.append(new_append(id_, "b")),
    "delete": lambda store, id_: store.delete_session(id_),
}


@pytest.mark.parametrize("write", WRITES)
async def test_a_reader_with_a_lease_never_misses_a_write_that_redis_did_not_see(
    make_hybrid: MakeHybrid, closed_url: str, state: CacheState, write: str
) -> None:
    """One reaches Redis and has a lease, the other one can't mark: rule 5 waits until the lease has ended."""
    reader = make_hybrid(state=None, lease=Lease(seconds=0.5))
    cut_off = make_hybrid(url=closed_url, lease=Lease(seconds=0.5)).store
    session_id = await new_session(reader.store, "a")
    reader.lease.learn(state, asked_at=reader.lease.now())
    before = (await reader.store.read_history(session_id, max_messages=10)).source

    await WRITES[write](cut_off, session_id)
    after = await asyncio.gather(texts(reader.store, session_id), return_exceptions=True)

    assert before == "redis"
    assert reader.counts.cache_hits == 1
    assert (
        repr(after) == {"append": "[['a', 'b']]", "delete": "[SessionNotFound('Session not found')]"}[write]
    )


async def test_a_write_that_meets_another_redis_leaves_it_alone_until_a_heartbeat_names_it(
    make_hybrid: MakeHybrid, keeper: PostgresStateKeeper, state: CacheState, redis: Redis
) -> None:
    """Every socket proves which Redis it leads to: the one that was trusted is not there any more."""
    gone = await keeper.change(state, replace(state, redis_identity="gone/away"))
    await keeper.settle(gone)
    hybrid = make_hybrid(state=await keeper.read(), lease=Lease(seconds=0.2))
    session_id = (await hybrid.store.create_session("user123")).session.session_id

    await hybrid.store.append(new_append(session_id, "a"))

    off = await keeper.read()
    assert (off.cache, off.settled) == ("off", False)
    assert off.epoch not in {state.epoch, gone.epoch}
    assert hybrid.counts.writes_held == 1
    assert await redis.dbsize() == 0

    async def named() -> bool:
        await hybrid.heartbeat.beat()
        return (await keeper.read()).redis_identity == state.redis_identity

    await until(named)
    await hybrid.heartbeat.beat()
    await hybrid.store.append(new_append(session_id, "b"))
    assert await texts(hybrid.store, session_id) == ["a", "b"]
    assert await redis.dbsize() == 1


# Leases


def clock_at(now: list[float]) -> Callable[[], float]:
    return lambda: now[0]


async def test_a_lease_that_ended_while_redis_answered_is_not_used(
    make_hybrid: MakeHybrid, closed_url: str, state: CacheState
) -> None:
    now, gate = [100.0], Gate()
    reader = make_hybrid(state=None, lease=Lease(clock=clock_at(now)))
    reader.lease.learn(state, asked_at=now[0])
    cut_off = make_hybrid(url=closed_url, lease=Lease(seconds=0.1)).store
    session_id = await new_session(reader.store, "a")
    reader.cache.get_gates.append(gate)
    reading = asyncio.create_task(reader.store.read_history(session_id, max_messages=10))
    await gate.reached.wait()

    await cut_off.append(new_append(session_id, "b"))
    now[0] += 1.0
    gate.open.set()
    history = await reading

    assert [message.content for message in history.messages] == ["a", "b"]
    assert reader.counts.lease_expired_reads == 1


async def test_an_instance_without_a_lease_asks_postgres(
    make_hybrid: MakeHybrid, state: CacheState, redis: Redis
) -> None:
    now = [100.0]
    hybrid = make_hybrid(state=None, lease=Lease(clock=clock_at(now)))
    hybrid.lease.learn(state, asked_at=now[0])
    session_id = await new_session(hybrid.store, "a")
    old = await redis.get(session_key(session_id))
    await hybrid.store.append(new_append(session_id, "b"))
    await redis.set(session_key(session_id), old)

    trusted = await texts(hybrid.store, session_id)
    now[0] += 1.0
    compared = await texts(hybrid.store, session_id)

    assert (trusted, compared) == (["a"], ["a", "b"])


async def test_a_write_reads_the_epoch_after_its_row_lock_and_waits_where_that_is_new(
    hybrid: Hybrid, keeper: PostgresStateKeeper, state: CacheState, database: Database
) -> None:
    session_id = await new_session(hybrid.store, "a")
    hybrid.lease.seconds = 0.2
    async with database.transaction() as conn:
        await conn.execute("SELECT FROM chat.chat_sessions WHERE session_id = $1 FOR UPDATE", session_id)
        appending = asyncio.create_task(hybrid.store.append(new_append(session_id, "b")))

        async def waits() -> bool:
            return bool(
                await conn.fetchval(
                    "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
                )
            )

        await until(waits)
        changed = await keeper.change(state, replace(state, settled=False))
    await appending

    assert hybrid.counts.writes_held == 1
    assert 0.1 < hybrid.counts.hold_seconds <= 0.2
    assert (await hybrid.cache.get(session_id, changed)).epoch == changed.epoch


async def test_a_write_waits_for_no_lease_where_the_epoch_has_settled(
    make_hybrid: MakeHybrid, change_epoch: ChangeEpoch
) -> None:
    hybrid = make_hybrid()
    session_id = await new_session(hybrid.store, "a")
    await change_epoch()

    await hybrid.store.append(new_append(session_id, "b"))

    assert hybrid.counts.writes_held == 0


async def test_a_write_is_refused_after_so_many_changes_of_the_epoch(
    make_hybrid: MakeHybrid, keeper: PostgresStateKeeper, durable: PostgresChatSessionStore
) -> None:
    hybrid = make_hybrid(lease=Lease(seconds=0.05))
    session_id = await new_session(hybrid.store, "a")

    async def change() -> None:
        state = await keeper.read()
        await keeper.change(state, replace(state, settled=False))

    # Once before it begins: else it may be faster than the first change.
    await change()
    appending = asyncio.create_task(hybrid.store.append(new_append(session_id, "b")))
    while not appending.done():
        await change()

    with pytest.raises(DurableStoreUnavailable, match="held for too long"):
        await appending
    assert await texts(durable, session_id) == ["a"]


async def test_a_read_does_not_wait_for_a_writer_that_hangs(
    hybrid: Hybrid, redis: Redis, database: Database
) -> None:
    session_id = await new_session(hybrid.store, "a")
    await redis.delete(session_key(session_id))
    async with database.transaction() as conn:
        await conn.execute("SELECT FROM chat.chat_sessions WHERE session_id = $1 FOR UPDATE", session_id)

        async with asyncio.timeout(2):
            history = await hybrid.store.read_history(session_id, max_messages=10)

    assert [message.content for message in history.messages] == ["a"]
    assert history.source == "postgres"
    assert await redis.exists(session_key(session_id)) == 0


async def test_a_fill_carries_the_epoch_as_it_is_under_the_row_lock(
    hybrid: Hybrid, redis: Redis, change_epoch: ChangeEpoch
) -> None:
    session_id = await new_session(hybrid.store, "a")
    await redis.delete(session_key(session_id))
    # Nobody told this instance.
    changed = await change_epoch()

    await texts(hybrid.store, session_id)

    assert (await hybrid.cache.get(session_id, changed)).epoch == changed.epoch


async def test_nothing_is_filled_where_the_epoch_under_the_lock_belongs_to_another_redis(
    hybrid: Hybrid, redis: Redis, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    session_id = await new_session(hybrid.store, "a")
    await redis.delete(session_key(session_id))
    await keeper.change(state, replace(state, redis_identity="another/one"))

    assert await texts(hybrid.store, session_id) == ["a"]
    assert await redis.exists(session_key(session_id)) == 0


@every_call
async def test_in_redis_only_mode_nothing_is_read_or_written(
    hybrid: Hybrid, redis: Redis, keeper: PostgresStateKeeper, state: CacheState, call: Call
) -> None:
    session_id = await new_session(hybrid.store, "a")
    before = await redis.get(session_key(session_id))
    changed = await keeper.change(state, next_state(state, mode="redis-only"))
    hybrid.lease.learn(changed)

    with pytest.raises(ModeChanged):
        await call(hybrid.store, session_id, "user123")
    with pytest.raises(ModeChanged):
        await hybrid.store.create_session("user123")

    assert await redis.get(session_key(session_id)) == before
    assert await redis.dbsize() == 1


@pytest.mark.parametrize("call", [*CALLS, "create_session"])
async def test_nothing_is_served_beside_another_protocol(
    hybrid: Hybrid, redis: Redis, database: Database, keeper: PostgresStateKeeper, call: str
) -> None:
    session_id = await new_session(hybrid.store, "a")
    before = await redis.get(session_key(session_id))
    async with database.connection() as conn:
        await conn.execute("UPDATE chat.cache_state SET protocol = 2")
    hybrid.lease.learn(await keeper.read(), asked_at=float("inf"))
    calls = CALLS | {"create_session": lambda store, _, user: store.create_session(user)}

    with pytest.raises(DurableStoreUnavailable, match="protocol"):
        await calls[call](hybrid.store, session_id, "user123")

    assert await redis.get(session_key(session_id)) == before
    assert await redis.dbsize() == 1


# Redis out


@pytest.fixture
def closed_url() -> Iterator[str]:
    """A port that is ours, and that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{bound.getsockname()[1]}"


async def test_without_redis_every_call_is_answered_by_postgres(
    make_hybrid: MakeHybrid, closed_url: str, verify: str, caplog: pytest.LogCaptureFixture
) -> None:
    hybrid = make_hybrid(url=closed_url, verify=verify, lease=Lease(seconds=0.2))
    store = hybrid.store

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
    assert [one.partition(":")[0] for one in warned[:2]] == [
        "redis is out",
        "writes could not mark their entries",
    ]
    assert warned[2].startswith("cache off (was on)")
    assert len(warned) == 3
    assert (hybrid.counts.writes_held, hybrid.counts.epoch_changes) == (1, 1)


async def test_without_redis_the_health_says_so_and_is_no_failure(
    make_hybrid: MakeHybrid, closed_url: str
) -> None:
    store = make_hybrid(url=closed_url).store

    health = {one.name: one.status for one in await store.health()}

    assert health == {"postgres": "pass", "redis": "warn"}


async def test_a_redis_that_never_answers_is_waited_for_by_one_read_and_one_write(
    make_hybrid: MakeHybrid, verify: str
) -> None:
    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)

    connected: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    hybrid = make_hybrid(
        url=f"redis://127.0.0.1:{port}", timeout_seconds=0.1, verify=verify, lease=Lease(seconds=0.2)
    )
    store = hybrid.store
    session_id = await new_session(store)
    created = len(connected)
    read = await texts(store, session_id)
    waited = len(connected)

    await store.append(new_append(session_id, "a"))
    await store.append(new_append(session_id, "b"))

    assert (created, read, waited, len(connected)) == (1, [], 1, 2)
    assert await texts(store, session_id) == ["a", "b"]
    assert hybrid.counts.writes_held == 1
    for writer in connected:
        writer.close()
    server.close()


async def test_a_session_deleted_while_redis_was_out_does_not_come_back_with_it(
    make_hybrid: MakeHybrid, hybrid: Hybrid, closed_url: str, redis: Redis, change_epoch: ChangeEpoch
) -> None:
    cut_off = make_hybrid(url=closed_url, lease=Lease(seconds=0.1)).store
    session_id = await new_session(hybrid.store, "a")

    await cut_off.delete_session(session_id)
    left = await redis.exists(session_key(session_id))
    await hybrid.heartbeat.beat()
    with pytest.raises(SessionNotFound):
        await hybrid.store.read_history(session_id, max_messages=10)
    await change_epoch(hybrid)

    assert left == 1
    with pytest.raises(SessionNotFound):
        await hybrid.store.read_history(session_id, max_messages=10)
    assert await redis.exists(session_key(session_id)) == 0


async def test_a_write_while_redis_was_out_is_read_when_it_is_back(
    make_hybrid: MakeHybrid, hybrid: Hybrid, closed_url: str, change_epoch: ChangeEpoch
) -> None:
    cut_off = make_hybrid(url=closed_url, lease=Lease(seconds=0.1)).store
    session_id = await new_session(hybrid.store, "a")

    await cut_off.append(new_append(session_id, "b"))
    await hybrid.heartbeat.beat()
    off = await texts(hybrid.store, session_id), await sources(hybrid.store, session_id)
    await change_epoch(hybrid)

    assert off == (["a", "b"], ["postgres", "postgres"])
    assert await texts(hybrid.store, session_id) == ["a", "b"]
    assert await sources(hybrid.store, session_id) == ["redis", "redis"]


async def test_while_the_cache_is_off_writes_leave_redis_alone_and_wait_for_nobody(
    hybrid: Hybrid, redis: Redis, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    session_id, deleted = await new_session(hybrid.store, "a"), await new_session(hybrid.store, "a")
    off = await keeper.change(state, next_state(state, cache="off"))
    await keeper.settle(off)
    hybrid.lease.learn(off)
    before = await redis.get(session_key(session_id)), await redis.dbsize()

    await hybrid.store.append(new_append(session_id, "b"))
    await hybrid.store.create_session("user123")
    await hybrid.store.delete_session(deleted)

    assert await texts(hybrid.store, session_id) == ["a", "b"]
    assert (await redis.get(session_key(session_id)), await redis.dbsize()) == before
    assert hybrid.counts.writes_held == 0


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
    """PostgreSQL is out, and no lease is left; `cached` stands in Redis, `uncached` does not."""

    hybrid: Hybrid
    refusing: HybridChatSessionStore
    postgres: PrivatePostgres
    cached: UUID
    uncached: UUID
    value: bytes


@pytest.fixture
async def outage(
    servers: Servers,
    private_postgres: PrivatePostgres,
    private_database_url: str,
    make_hybrid: MakeHybrid,
    verify: str,
    redis: Redis,
) -> AsyncIterator[Outage]:
    database = Database(create_engine(private_database_url, application_name="tests"))
    await claim_state(database, redis_only=None)
    state = await trust(database, servers.redis_url)
    hybrid, refusing = (
        make_hybrid(database=database, state=None, verify=verify, serve_unverified=serve)
        for serve in (True, False)
    )
    for one in (hybrid, refusing):
        one.lease.learn(state)
    cached, uncached = (
        await new_session(hybrid.store, "a", "b", user_id="owner"),
        await new_session(hybrid.store, "c", user_id="owner"),
    )
    await redis.delete(session_key(uncached))
    value = await redis.get(session_key(cached))
    private_postgres.stop()
    yield Outage(hybrid, refusing.store, private_postgres, cached, uncached, value)
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


async def test_without_postgres_a_reader_goes_on_unlabelled_until_its_lease_ends(outage: Outage) -> None:
    now = [100.0]
    lease = outage.hybrid.lease
    lease.now = clock_at(now)
    lease.learn(lease.state, asked_at=now[0])

    history = await outage.hybrid.store.read_history(outage.cached, max_messages=10)
    now[0] += 1.0
    later = await outage.hybrid.store.read_history(outage.cached, max_messages=10)

    trusts = outage.hybrid.store._verify == "lease"
    assert (history.freshness.age_seconds is None, later.freshness.age_seconds is None) == (trusts, False)
    assert [message.content for message in later.messages] == ["a", "b"]


async def test_without_postgres_nothing_that_was_not_trusted_under_the_last_known_state_is_served(
    outage: Outage, redis: Redis
) -> None:
    key = session_key(outage.cached)
    dirty = outage.value[:51] + b"0000000003" + outage.value[61:]
    owned = outage.value[:8] + b"r" + outage.value[9:]
    older = of_epoch_zero(outage.value)

    for value in (dirty, owned, older, guide_value(outage.cached, "x"), b"garbage"):
        await redis.set(key, value, ex=100)
        with pytest.raises(DurableStoreUnavailable):
            await outage.hybrid.store.read_history(outage.cached, max_messages=10)
        assert await redis.get(key) == value


async def test_without_postgres_nothing_is_served_of_a_cache_that_was_off_when_it_was_last_heard_from(
    outage: Outage,
) -> None:
    lease = outage.hybrid.lease
    lease.learn(replace(lease.state, cache="off"))

    with pytest.raises(DurableStoreUnavailable):
        await outage.hybrid.store.read_history(outage.cached, max_messages=10)


async def test_without_postgres_a_page_beyond_the_window_is_refused(outage: Outage, redis: Redis) -> None:
    row = new_row(message_count=9)
    lines = [new_message(str(seq)).line(seq) for seq in (8, 9)]
    value = encode(row, epoch=outage.hybrid.lease.state.epoch, lines=lines)
    await redis.set(session_key(row.session.session_id), value, ex=100)

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


def test_the_fields_are_where_these_tests_put_them() -> None:
    value = encode(new_row(owner="redis"), epoch=EPOCH_ZERO, lines=[])

    assert value.startswith(b'{"_c":"1r')
    assert FIELDS["pending"] == (51, 10)
    assert value[FIELDS["token"][0] :].startswith(TOKEN_ZERO.encode())
