"""Entries in Redis: what the cache's steps do to a value, on a real server."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest
from redis.asyncio import Redis

from app.chat import NewMessage, new_uuid
from app.coherence.ports import (
    EPOCH_ZERO,
    PROTOCOL,
    TOKEN_ZERO,
    CachedValue,
    CacheMoved,
    CacheOutage,
    CacheState,
    Committed,
    Entry,
    GuideEntry,
    MarkOutcome,
    Row,
    Watch,
)
from app.embedded import embedded_servers
from app.errors import CacheFull
from app.redis_sessions.cache import RedisSessionCache, newest_that_fit
from app.redis_sessions.client import BoundedRedis, create_redis
from app.redis_sessions.codec import FIELDS, USER_ID_OFFSET, encode
from app.redis_sessions.keys import session_key
from app.redis_sessions.store import RedisChatSessionStore
from tests.contract.suite import until
from tests.factories import (
    committed_append,
    guide_value,
    keyed_append,
    new_append,
    new_message,
    new_row,
    turn_append,
)
from tests.servers import Servers

pytestmark = pytest.mark.anyio

EPOCH, OTHER_EPOCH = "e" * 16, "f" * 16
TOKEN, OTHER_TOKEN = "a" * 16, "b" * 16

# Text that looks like the layout itself, in one byte and in four.
AWKWARD = [
    "",
    "]}",
    ',\n{"message_id":"',
    '\n"messages":[\n',
    "Điều",
    "🙂" * 50,
    '"\\"',
    "x" * 4096,
    "\u2028",
]


@dataclass(frozen=True)
class Steps:
    """A cache's steps under one state."""

    cache: RedisSessionCache
    state: CacheState

    async def get(self, session_id: UUID) -> CachedValue:
        return await self.cache.get(session_id, self.state)

    async def mark(self, committed: Committed, *, token: str = TOKEN, epoch: str = EPOCH) -> MarkOutcome:
        state = replace(self.state, epoch=epoch)
        return (await self.cache.mark([(committed.before, committed.after)], state, token=token))[0]

    async def publish(self, committed: Committed, epoch: str = EPOCH) -> str:
        state = replace(self.state, epoch=epoch)
        return (await self.cache.publish([committed], state, want_entries=[False]))[0].outcome

    async def published(self, committed: Committed) -> Entry | None:
        return (await self.cache.publish([committed], self.state, want_entries=[True]))[0].entry

    async def skeleton(self, row: Row, *, token: str = TOKEN) -> None:
        await self.cache.skeleton([row], self.state, token=token)

    async def settle(self, row: Row, *, token: str = TOKEN) -> None:
        await self.cache.settle([row.session.session_id], self.state, token=token)

    async def remove(self, session_id: UUID) -> bool:
        return await self.cache.remove(session_id, self.state)

    def watch(self, session_id: UUID) -> AbstractAsyncContextManager[Watch]:
        return self.cache.watch(session_id, self.state)


MakeCache = Callable[..., Awaitable[Steps]]


def state_of(identity: str | None, *, epoch: str = EPOCH) -> CacheState:
    return CacheState(protocol=PROTOCOL, epoch=epoch, mode="hybrid", cache="on", redis_identity=identity)


@pytest.fixture
async def make_cache(servers: Servers, redis: Redis) -> AsyncIterator[MakeCache]:
    async with AsyncExitStack() as stack:

        async def make(
            *,
            ttl_seconds: int = 100,
            messages_max: int = 100,
            bytes_max: int = 1024 * 1024,
            timeout_seconds: float = 2,
            url: str = servers.redis_url,
        ) -> Steps:
            cache = RedisSessionCache(
                url,
                database=1,
                timeout_seconds=timeout_seconds,
                ttl_seconds=ttl_seconds,
                messages_max=messages_max,
                bytes_max=bytes_max,
            )
            stack.push_async_callback(cache.close)
            return Steps(cache, state_of(await cache.probe()))

        yield make


@pytest.fixture
async def cache(make_cache: MakeCache) -> Steps:
    return await make_cache()


@pytest.fixture(scope="module")
def private_url() -> Iterator[str]:
    """A server whose memory may be taken away."""
    with (
        TemporaryDirectory(prefix="chat-tests-") as folder,
        embedded_servers(Path(folder), postgres=False, durable=False, redis_port=0) as servers,
    ):
        assert servers.redis_url is not None
        yield servers.redis_url


@pytest.fixture
async def full(private_url: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Makes the private server refuse every write that needs memory."""
    async with Redis.from_url(private_url, db=1) as redis:
        await redis.config_set("maxmemory", 0)
        await redis.flushall()

        async def fill_memory() -> None:
            await redis.config_set("maxmemory-policy", "noeviction")
            await redis.config_set("maxmemory", 1)

        yield fill_memory
        await redis.config_set("maxmemory", 0)


async def fill(cache: Steps, row: Row, lines: Sequence[str] = (), *, epoch: str = EPOCH) -> bool:
    async with cache.watch(row.session.session_id) as watch:
        return await watch.fill(row, epoch, lines)


async def raw(redis: Redis, row: Row) -> bytes:
    value = await redis.get(session_key(row.session.session_id))
    assert isinstance(value, bytes)
    return value


async def filled_row(cache: Steps, *contents: str, user_id: str = "user123") -> Row:
    """A session whose messages are all in its entry."""
    committed = committed_append(new_row(user_id=user_id), [new_message(text) for text in contents])
    assert await fill(cache, committed.after, committed.lines)
    return committed.after


def number(value: bytes, name: str) -> int:
    offset, width = FIELDS[name]
    return int(value[offset : offset + width])


def contents(value: bytes) -> list[str]:
    return [message["content"] for message in json.loads(value)["messages"]]


def blanks_of(value: bytes) -> int:
    """How many bytes of a value are lines that fell out of its window."""
    return number(value, "first_offset") - (value.index(b"\n", USER_ID_OFFSET) + 1)


def random_messages(rng: random.Random) -> list[NewMessage]:
    return [
        new_message(rng.choice(AWKWARD) * rng.randint(1, 3), metadata={"n": rng.choice([[], {}, 1e16, "]}"])})
        for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 7]))
    ]


# The value


@pytest.mark.parametrize("messages_max", [1, 2, 10, 100])
async def test_a_value_is_the_sessions_json_after_every_append(
    make_cache: MakeCache, redis: Redis, messages_max: int
) -> None:
    rng = random.Random(messages_max)
    cache = await make_cache(messages_max=messages_max, bytes_max=30_000)
    row = await filled_row(cache, user_id='"]}\\\n Đ🙂')
    lines: list[str] = []

    for _ in range(150):
        committed = committed_append(row, random_messages(rng))
        entry = await cache.published(committed)
        row, lines = committed.after, [*lines, *committed.lines]

        value = await raw(redis, row)
        parsed = json.loads(value)
        expected = list(newest_that_fit(lines[-messages_max:], 30_000))
        assert parsed["session_id"] == str(row.session.session_id)
        assert parsed["user_id"] == row.session.user_id
        assert [message["seq"] for message in parsed["messages"]] == list(
            range(row.session.message_count - len(expected) + 1, row.session.message_count + 1)
        )
        assert entry is not None
        assert entry.equals(row)
        assert entry.body.decode() == ",\n".join(expected)
        assert blanks_of(value) * 4 <= len(value)

    assert await cache.get(row.session.session_id) == entry


async def test_a_published_value_equals_a_filled_one(make_cache: MakeCache, redis: Redis) -> None:
    cache = await make_cache()
    row = await filled_row(cache, "a", "b")
    committed = committed_append(row, [new_message("c"), new_message("d")])

    outcome = await cache.publish(committed)

    published = await raw(redis, row)
    lines = [*(line.decode() for line in published.splitlines()[1:3])]
    lines = [line.removesuffix(",") for line in lines] + list(committed.lines)
    assert outcome == "published"
    assert published == encode(committed.after, epoch=EPOCH, lines=lines)


async def test_the_window_ends_at_its_count(make_cache: MakeCache, redis: Redis) -> None:
    cache = await make_cache(messages_max=3)
    row = await filled_row(cache, "a", "b")

    await cache.publish(committed_append(row, [new_message(text) for text in "cde"]))

    value = await raw(redis, row)
    assert contents(value) == ["c", "d", "e"]
    assert (number(value, "first_seq"), number(value, "seq")) == (3, 5)


async def test_the_window_ends_at_its_bytes(make_cache: MakeCache, redis: Redis) -> None:
    cache = await make_cache(bytes_max=1000)
    row = await filled_row(cache, "a" * 300)

    for text in ("b" * 300, "c" * 300):
        committed = committed_append(row, [new_message(text)])
        await cache.publish(committed)
        row = committed.after

    assert [text[0] for text in contents(await raw(redis, row))] == ["b", "c"]


async def test_published_and_filled_windows_end_at_the_same_byte(make_cache: MakeCache, redis: Redis) -> None:
    line = len(new_message("a" * 200).line(10))
    for bytes_max in (3 * (line + 2) - 1, 3 * (line + 2)):
        cache = await make_cache(bytes_max=bytes_max)
        committed = committed_append(
            new_row(message_count=9, chain=bytes(8)), [new_message("a" * 200) for _ in range(10)]
        )
        await fill(cache, new_row(committed.after.session.session_id, message_count=9), [])
        await cache.publish(committed)
        published = number(await raw(redis, committed.after), "first_seq")

        await fill(cache, committed.after, committed.lines)

        assert number(await raw(redis, committed.after), "first_seq") == published
        assert published == 20 - bytes_max // (line + 2)


async def test_a_message_beyond_the_byte_window_leaves_an_empty_window(
    make_cache: MakeCache, redis: Redis
) -> None:
    cache = await make_cache(bytes_max=1000)
    row = await filled_row(cache, "a")
    huge = committed_append(row, [new_message("b" * 2000)])
    small = committed_append(huge.after, [new_message("c")])

    published = await cache.published(huge)
    emptied = await raw(redis, row)
    await cache.publish(small)

    assert published is not None
    assert published.equals(huge.after)
    assert published.newest(1, None) is None
    assert (contents(emptied), number(emptied, "first_seq"), len(emptied) < 400) == ([], 3, True)
    assert contents(await raw(redis, row)) == ["c"]


async def test_a_fill_beyond_the_byte_window_leaves_an_empty_window(
    make_cache: MakeCache, redis: Redis
) -> None:
    cache = await make_cache(bytes_max=1000)

    row = await filled_row(cache, "a", "b" * 2000)

    entry = await cache.get(row.session.session_id)
    assert isinstance(entry, Entry)
    assert (entry.first_seq, entry.body, entry.equals(row)) == (3, b"", True)


async def test_a_full_window_is_compacted_once_in_many_appends(make_cache: MakeCache, redis: Redis) -> None:
    cache = await make_cache(messages_max=100)
    row = await filled_row(cache, *["x" * 100] * 100)
    await redis.config_resetstat()

    sizes = []
    for _ in range(600):
        committed = committed_append(row, [new_message("x" * 100)])
        await cache.publish(committed)
        row = committed.after
        sizes.append(await redis.strlen(session_key(row.session.session_id)))

    compactions = (await redis.info("commandstats"))["cmdstat_set"]["calls"]
    assert 600 // 40 <= compactions <= 600 // 30
    assert max(sizes) <= min(sizes) * 4 / 3 + 500


async def test_an_append_into_an_open_window_rewrites_nothing(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache)
    await redis.config_resetstat()

    for _ in range(100):
        committed = committed_append(row, [new_message("x" * 100)])
        await cache.publish(committed)
        row = committed.after

    stats = await redis.info("commandstats")
    assert "cmdstat_set" not in stats
    assert "cmdstat_get" not in stats


# The time to live


async def test_the_steps_that_use_an_entry_slide_its_time_to_live(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    key = session_key(row.session.session_id)
    left = [await redis.pttl(key)]

    await redis.pexpire(key, 5000)
    await cache.get(row.session.session_id)
    left.append(await redis.pttl(key))
    await redis.pexpire(key, 5000)
    await cache.publish(committed_append(row, [new_message("b")]))
    left.append(await redis.pttl(key))

    assert min(left) > 95_000
    assert max(left) <= 100_000


async def test_a_publish_that_changes_nothing_slides_nothing(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    await redis.pexpire(session_key(row.session.session_id), 5000)

    await cache.publish(committed_append(row, [new_message("b")]), OTHER_EPOCH)

    assert await redis.pttl(session_key(row.session.session_id)) <= 5000


async def test_compaction_keeps_the_time_to_live(make_cache: MakeCache, redis: Redis) -> None:
    cache = await make_cache(messages_max=2)
    row = await filled_row(cache, "a", "b")

    left = []
    for _ in range(20):
        committed = committed_append(row, [new_message("x" * 50)])
        await cache.publish(committed)
        row = committed.after
        left.append(await redis.pttl(session_key(row.session.session_id)))

    assert min(left) > 95_000


# Publish


@pytest.mark.parametrize(
    ("seq", "chain", "epoch"),
    [
        (1, bytes(8), EPOCH),
        (3, bytes(8), EPOCH),
        (2, b"another!", EPOCH),
        (2, bytes(8), OTHER_EPOCH),
    ],
    ids=["shorter", "longer", "another history", "another epoch"],
)
async def test_a_publish_changes_only_an_entry_that_stands_exactly_before_it(
    cache: Steps, redis: Redis, seq: int, chain: bytes, epoch: str
) -> None:
    lines = [new_message(text).line(at) for at, text in enumerate("abc"[:seq], 1)]
    entry = new_row(message_count=seq, chain=chain)
    await fill(cache, entry, lines)
    before = await raw(redis, entry)
    row = new_row(entry.session.session_id, message_count=2)

    outcome = await cache.publish(committed_append(row, [new_message("x")]), epoch)

    assert outcome == "behind"
    assert await raw(redis, entry) == before


async def test_a_publish_makes_no_entry(cache: Steps, redis: Redis) -> None:
    row = new_row()

    outcome = await cache.publish(committed_append(row, [new_message()]))

    assert outcome == "absent"
    assert await redis.dbsize() == 0


async def test_a_publish_that_arrives_twice_or_late_changes_nothing_more(cache: Steps, redis: Redis) -> None:
    first = committed_append(await filled_row(cache, "a"), [new_message("b")])
    second = committed_append(first.after, [new_message("c")])
    await cache.publish(first)
    await cache.publish(second)
    before = await raw(redis, first.after)

    outcomes = [await cache.publish(committed) for committed in (second, first, second)]

    assert outcomes == ["behind"] * 3
    assert await raw(redis, first.after) == before
    assert contents(before) == ["a", "b", "c"]


async def test_a_publish_whose_predecessor_was_lost_changes_nothing(cache: Steps, redis: Redis) -> None:
    lost = committed_append(await filled_row(cache, "a"), [new_message("b")])
    before = await raw(redis, lost.before)

    outcome = await cache.publish(committed_append(lost.after, [new_message("c")]))

    assert outcome == "behind"
    assert await raw(redis, lost.before) == before


async def test_of_two_histories_of_one_length_only_its_own_publish_fits(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    one, other = (committed_append(row, [new_message(text)]) for text in ("b", "B"))
    await cache.publish(one)

    outcome = await cache.publish(committed_append(other.after, [new_message("c")]))

    assert outcome == "behind"
    assert contents(await raw(redis, row)) == ["a", "b"]


async def test_a_publish_answers_with_the_entry_that_it_left(cache: Steps) -> None:
    row = await filled_row(cache, "a")
    committed = committed_append(row, [new_message("b"), new_message("c")])

    published = await cache.published(committed)

    assert published is not None
    assert published.equals(committed.after)
    assert published.session == committed.after.session
    assert published.chain == committed.after.chain


# What Redis owns, what the guide wrote, what nobody knows


async def test_nothing_changes_an_entry_that_redis_owns(cache: Steps, redis: Redis) -> None:
    row = new_row(owner="redis")
    await redis.set(session_key(row.session.session_id), encode(row, epoch=EPOCH, lines=[]), ex=100)
    before = await raw(redis, row)
    committed = committed_append(row, [new_message()])

    outcomes = await cache.mark(committed), await cache.publish(committed)
    await cache.skeleton(row)
    await cache.settle(row)
    removed = await cache.remove(row.session.session_id)
    async with cache.watch(row.session.session_id) as watch:
        watched = watch.value

    assert (outcomes, removed) == (("redis-owned", "redis-owned"), False)
    assert isinstance(watched, Entry)
    assert watched.owner == "redis"
    assert await raw(redis, row) == before
    assert await redis.pttl(session_key(row.session.session_id)) <= 100_000


async def test_a_fill_loses_against_redis_taking_the_session(cache: Steps, redis: Redis) -> None:
    row = new_row()
    async with cache.watch(row.session.session_id) as watch:
        owned = encode(new_row(row.session.session_id, owner="redis"), epoch=EPOCH_ZERO, lines=[])
        await redis.set(session_key(row.session.session_id), owned, ex=100)

        filled = await watch.fill(row, EPOCH, [])

    assert not filled
    assert await raw(redis, row) == owned


async def test_a_session_in_the_guides_format_is_told_apart_and_left_alone(
    cache: Steps, redis: Redis
) -> None:
    row = new_row()
    value = guide_value(row.session.session_id, "a")
    await redis.set(session_key(row.session.session_id), value, ex=100)

    read = await cache.get(row.session.session_id)
    committed = committed_append(row, [new_message()])
    outcomes = await cache.mark(committed), await cache.publish(committed)
    await cache.skeleton(row)
    await cache.settle(row)

    assert isinstance(read, GuideEntry)
    assert [message.content for message in read.messages] == ["a"]
    assert outcomes == ("foreign", "behind")
    assert await raw(redis, row) == value


async def test_a_mark_leaves_every_json_object_that_is_not_ours_alone(cache: Steps, redis: Redis) -> None:
    """One of another version of ours, too: a rolling deployment goes both ways."""
    row = new_row()
    key = session_key(row.session.session_id)
    values = [b"{", b"{}", b'{"session_id":', encode(row, epoch=EPOCH, lines=[]).replace(b'"1p', b'"2p')]

    for value in values:
        await redis.set(key, value, ex=100)
        assert await cache.mark(committed_append(row, [new_message()])) == "foreign"
        assert await raw(redis, row) == value


@pytest.mark.parametrize("garbage", [b"garbage", b'{"_c":"1p', b"\xff" * 300, b"[]"])
async def test_a_mark_takes_garbage_away(cache: Steps, redis: Redis, garbage: bytes) -> None:
    row = new_row()
    await redis.set(session_key(row.session.session_id), garbage, ex=100)

    outcome = await cache.mark(committed_append(row, [new_message()]))

    assert outcome == "touched"
    assert await redis.dbsize() == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"garbage",
        b"{}",
        b'{"_c":"1p',
        b'{"_c":"' + b"9" * 500,
        b"\xff" * 300,
        b'{"_c":"1p' + b"\n" * 300,
    ],
)
async def test_garbage_is_a_miss_that_a_fill_replaces(cache: Steps, redis: Redis, garbage: bytes) -> None:
    row = new_row()
    await redis.set(session_key(row.session.session_id), garbage, ex=100)

    read = await cache.get(row.session.session_id)
    outcome = await cache.publish(committed_append(row, [new_message()]))
    filled = await fill(cache, row)

    assert (read, filled) == (None, True)
    assert outcome in {"behind", "absent"}
    assert isinstance(await cache.get(row.session.session_id), Entry)


async def test_a_torn_entry_is_never_spliced(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a", "b")
    value = await raw(redis, row)
    committed = committed_append(row, [new_message("c")])

    for length in range(1, len(value)):
        await redis.set(session_key(row.session.session_id), value[:length], ex=100)
        assert await cache.publish(committed) == "behind"
        assert await raw(redis, row) == value[:length]


async def test_a_torn_entry_is_never_marked_as_if_it_were_whole(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a", "b")
    value = await raw(redis, row)
    committed = committed_append(row, [new_message("c")])

    outcomes = set()
    for length in range(1, len(value), 7):
        await redis.set(session_key(row.session.session_id), value[:length], ex=100)
        outcomes.add(await cache.mark(committed))
        assert await cache.get(row.session.session_id) is None

    assert outcomes == {"touched", "foreign"}


async def test_a_key_of_another_type_is_a_miss_that_a_fill_a_mark_or_a_remove_replaces(
    cache: Steps, redis: Redis
) -> None:
    row = new_row()
    key = session_key(row.session.session_id)
    committed = committed_append(row, [new_message()])
    await redis.lpush(key, "a")

    read = await cache.get(row.session.session_id)
    outcome = await cache.publish(committed)
    await fill(cache, row)
    filled = await redis.type(key)
    await redis.delete(key)
    await redis.lpush(key, "a")
    marked, left = await cache.mark(committed), await redis.exists(key)
    await redis.lpush(key, "a")
    removed = await cache.remove(row.session.session_id)

    assert (read, outcome, filled, removed) == (None, "behind", b"string", True)
    assert (marked, left) == ("touched", 0)
    assert await redis.exists(key) == 0


async def test_another_sessions_entry_is_a_miss(cache: Steps, redis: Redis) -> None:
    row, other = await filled_row(cache, "a"), await filled_row(cache, "b")
    await redis.set(session_key(row.session.session_id), await raw(redis, other), ex=100)

    assert await cache.get(row.session.session_id) is None


# Fills that lose


async def test_a_fill_that_lost_to_a_remove_of_nothing_is_refused(cache: Steps, redis: Redis) -> None:
    row = new_row()
    async with cache.watch(row.session.session_id) as watch:
        await cache.remove(row.session.session_id)

        filled = await watch.fill(row, EPOCH, [])

    assert not filled
    assert await redis.dbsize() == 0


async def test_a_fill_that_lost_to_a_remove_is_refused(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    async with cache.watch(row.session.session_id) as watch:
        await cache.remove(row.session.session_id)

        filled = await watch.fill(row, EPOCH, [])

    assert not filled
    assert await redis.dbsize() == 0


async def test_a_fill_that_lost_to_another_fill_is_refused(cache: Steps, redis: Redis) -> None:
    row = new_row()
    async with cache.watch(row.session.session_id) as slow:
        newer = committed_append(row, [new_message("a")])
        await fill(cache, newer.after, newer.lines)

        filled = await slow.fill(row, EPOCH, [])

    assert not filled
    assert contents(await raw(redis, row)) == ["a"]


async def test_a_fill_that_lost_to_a_publish_is_refused(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    async with cache.watch(row.session.session_id) as watch:
        await cache.publish(committed_append(row, [new_message("b")]))

        filled = await watch.fill(row, EPOCH, [])

    assert not filled
    assert contents(await raw(redis, row)) == ["a", "b"]


async def test_a_watch_that_fills_nothing_leaves_its_connection_clean(
    make_cache: MakeCache, redis: Redis
) -> None:
    cache = await make_cache()
    row = await filled_row(cache, "a")

    for _ in range(50):
        async with cache.watch(row.session.session_id) as watch:
            assert isinstance(watch.value, Entry)

    assert await fill(cache, row, [])


async def test_a_torn_entry_that_redis_owns_is_not_removed(cache: Steps, redis: Redis) -> None:
    """Dirty as it says it is: that is told by a head that can't be trusted."""
    row = replace(new_row(), owner="redis")
    key = session_key(row.session.session_id)
    torn = encode(row, epoch=EPOCH, lines=[], pending=1)[:-1]
    await redis.set(key, torn)

    assert await cache.remove(row.session.session_id) is False
    assert await redis.get(key) == torn


async def test_an_offer_that_nobody_took_up_is_removed(cache: Steps, redis: Redis) -> None:
    """PostgreSQL never said that Redis owns it: whoever holds the row may clear it away."""
    row = new_row(owner="redis")
    offered = encode(row, epoch=EPOCH_ZERO, lines=[], pending=1, token=TOKEN)
    await redis.set(session_key(row.session.session_id), offered)

    assert await cache.remove(row.session.session_id) is True
    assert await redis.dbsize() == 0


async def test_removing_what_is_not_there_is_harmless(cache: Steps, redis: Redis) -> None:
    row = new_row()

    assert [await cache.remove(row.session.session_id) for _ in range(2)] == [True, True]
    assert await redis.dbsize() == 0


# Marks


async def at(cache: Steps, row: Row) -> Entry:
    """The row's entry, which is there and ours."""
    entry = await cache.get(row.session.session_id)
    assert isinstance(entry, Entry)
    return entry


async def test_a_mark_makes_an_entry_dirty_and_changes_nothing_else(cache: Steps) -> None:
    row = await filled_row(cache, "a")
    before = await at(cache, row)

    outcome = await cache.mark(committed_append(row, [new_message(), new_message()]))

    after = await at(cache, row)
    assert outcome == "marked"
    assert (before.dirty, after.dirty) == (False, True)
    assert after == replace(before, pending=3, token=TOKEN)


async def test_a_publish_makes_the_entry_clean_that_was_marked_for_it(cache: Steps) -> None:
    committed = committed_append(await filled_row(cache, "a"), [new_message("b")])
    await cache.mark(committed)

    outcome = await cache.publish(committed)

    entry = await at(cache, committed.after)
    assert (outcome, entry.dirty) == ("published", False)
    assert entry.equals(committed.after)


async def test_a_publish_leaves_the_entry_dirty_that_was_marked_for_more(cache: Steps) -> None:
    """The next write has marked already, or one of more messages was rolled back."""
    first = committed_append(await filled_row(cache, "a"), [new_message("b")])
    second = committed_append(first.after, [new_message("c")])
    await cache.mark(first)
    await cache.mark(second, token=OTHER_TOKEN)

    outcomes = [await cache.publish(first)]
    between = await at(cache, first.after)
    outcomes.append(await cache.publish(second))

    assert outcomes == ["published", "published"]
    assert (between.dirty, between.session.message_count, between.token) == (True, 2, OTHER_TOKEN)
    assert not (await at(cache, second.after)).dirty


@pytest.mark.parametrize(
    ("epoch", "change"),
    [
        (OTHER_EPOCH, {}),
        (EPOCH, {"chain": b"another!"}),
        (EPOCH, {"message_count": 0}),
    ],
    ids=["another epoch", "another history", "another length"],
)
async def test_a_publish_that_does_not_fit_leaves_the_mark(
    cache: Steps, redis: Redis, epoch: str, change: dict[str, object]
) -> None:
    row = await filled_row(cache, "a")
    await cache.mark(committed_append(row, [new_message("b")]))
    before = await raw(redis, row)
    length = change.get("message_count", 1)
    other = new_row(row.session.session_id, message_count=length, chain=change.get("chain", row.chain))

    outcome = await cache.publish(committed_append(other, [new_message("x")]), epoch)

    assert outcome == "behind"
    assert await raw(redis, row) == before


async def test_a_mark_of_an_absent_key_leaves_nothing_and_aborts_the_fill_under_way(
    cache: Steps, redis: Redis
) -> None:
    row = new_row()
    async with cache.watch(row.session.session_id) as watch:
        outcome = await cache.mark(committed_append(row, [new_message()]))

        filled = await watch.fill(row, EPOCH, [])

    assert (outcome, filled) == ("touched", False)
    assert await redis.dbsize() == 0


async def test_a_mark_aborts_the_fill_and_the_stamp_under_way(cache: Steps) -> None:
    row = await filled_row(cache, "a")
    async with cache.watch(row.session.session_id) as fills, cache.watch(row.session.session_id) as stamps:
        await cache.mark(committed_append(row, [new_message("b")]))

        done = [await fills.fill(row, EPOCH, []), await stamps.stamp(EPOCH)]

    assert done == [False, False]
    assert (await at(cache, row)).dirty


async def test_a_mark_of_an_entry_whose_last_publish_was_lost_keeps_it_dirty(cache: Steps) -> None:
    lost = committed_append(await filled_row(cache, "a"), [new_message("b")])
    await cache.mark(lost)
    committed = committed_append(lost.after, [new_message("c")])

    marked, published = await cache.mark(committed), await cache.publish(committed)

    entry = await at(cache, committed.after)
    assert (marked, published) == ("marked", "behind")
    assert (entry.dirty, entry.pending, entry.session.message_count) == (True, 3, 1)


async def test_an_entry_of_an_older_epoch_that_stands_where_the_row_does_comes_along(cache: Steps) -> None:
    row = await filled_row(cache, "a")
    await fill(cache, row, [new_message("a").line(1)], epoch=OTHER_EPOCH)
    committed = committed_append(row, [new_message("b")])

    marked = await cache.mark(committed)
    between = await at(cache, row)
    published = await cache.publish(committed)

    after = await at(cache, committed.after)
    assert (marked, published) == ("marked", "published")
    assert (between.epoch, between.dirty) == (EPOCH, True)
    assert (after.epoch, after.dirty, after.equals(committed.after)) == (EPOCH, False, True)


@pytest.mark.parametrize(
    ("epoch", "seq", "chain"),
    [
        (OTHER_EPOCH, 1, bytes(8)),
        (OTHER_EPOCH, 2, b"another!"),
        (OTHER_EPOCH, 3, bytes(8)),
        (EPOCH, 2, b"another!"),
        (EPOCH, 3, bytes(8)),
    ],
    ids=["older behind", "older another history", "older ahead", "another history", "ahead"],
)
async def test_a_mark_takes_an_entry_away_that_can_not_be_the_rows(
    cache: Steps, redis: Redis, epoch: str, seq: int, chain: bytes
) -> None:
    lines = [new_message(text).line(at) for at, text in enumerate("abc"[:seq], 1)]
    entry = new_row(message_count=seq, chain=chain)
    await fill(cache, entry, lines, epoch=epoch)
    row = new_row(entry.session.session_id, message_count=2)

    async with cache.watch(row.session.session_id) as watch:
        outcome = await cache.mark(committed_append(row, [new_message("x")]))
        filled = await watch.fill(row, EPOCH, [])

    assert (outcome, filled) == ("touched", False)
    assert await redis.dbsize() == 0


@pytest.mark.parametrize("epoch", [EPOCH, OTHER_EPOCH])
async def test_a_mark_that_arrives_after_its_publish_only_takes_trust_away(
    cache: Steps, redis: Redis, epoch: str
) -> None:
    committed = committed_append(await filled_row(cache, "a"), [new_message("b")])
    await cache.mark(committed)
    await cache.publish(committed)

    outcome = await cache.mark(committed, token=OTHER_TOKEN, epoch=epoch)

    assert outcome == "touched"
    assert await redis.dbsize() == 0


async def test_a_mark_of_an_older_epoch_takes_trust_away_too(cache: Steps) -> None:
    """A writer's whose transaction is long rolled back."""
    row = await filled_row(cache, "a")

    outcome = await cache.mark(committed_append(row, [new_message()]), epoch=OTHER_EPOCH)

    entry = await at(cache, row)
    assert (outcome, entry.epoch, entry.dirty) == ("marked", OTHER_EPOCH, True)


async def test_no_mark_leaves_a_clean_entry_behind(cache: Steps, redis: Redis) -> None:
    """Whatever stands there, and whenever the mark arrives."""
    rng = random.Random(1)
    session_id = new_row().session.session_id
    left = set()
    for _ in range(400):
        seq, before = rng.randrange(4), rng.randrange(4)
        entry = new_row(session_id, message_count=seq, chain=rng.choice([bytes(8), b"another!"]))
        value = encode(
            entry,
            epoch=rng.choice([EPOCH, OTHER_EPOCH]),
            lines=[new_message().line(at) for at in range(1, seq + 1)],
            pending=rng.randrange(6),
            token=OTHER_TOKEN,
        )
        await redis.set(session_key(session_id), value, ex=100)
        row = new_row(session_id, message_count=before)

        await cache.mark(committed_append(row, [new_message()] * rng.randint(1, 3)))

        found = await cache.get(session_id)
        left.add("absent" if found is None else "dirty" if found.dirty else "clean")

    assert left == {"absent", "dirty"}


async def test_each_mark_gives_its_token_and_none_makes_pending_less(cache: Steps) -> None:
    row = await filled_row(cache, "a")
    one, three = (committed_append(row, [new_message()] * count) for count in (1, 3))

    seen = []
    for committed, token in ((one, "1"), (one, "2"), (three, "3"), (one, "4")):
        await cache.mark(committed, token=token * 16)
        entry = await at(cache, row)
        seen.append((entry.pending, entry.token[0]))

    assert seen == [(2, "1"), (2, "2"), (4, "3"), (4, "4")]


# Skeletons


async def test_a_skeleton_is_a_dirty_entry_that_its_own_settling_makes_clean(
    cache: Steps, redis: Redis
) -> None:
    row = new_row()
    await cache.skeleton(row)
    life = await redis.pttl(session_key(row.session.session_id))
    skeleton = await at(cache, row)

    await cache.settle(row)

    settled = await at(cache, row)
    assert (skeleton.dirty, skeleton.token, skeleton.epoch) == (True, TOKEN, EPOCH)
    assert skeleton.equals(row)
    assert 95_000 < life <= 100_000
    assert settled == replace(skeleton, pending=0, token=TOKEN_ZERO)
    assert await raw(redis, row) == encode(row, epoch=EPOCH, lines=[])


@pytest.mark.parametrize("value", [b"", b"garbage", b'{"session_id":1}'])
async def test_a_skeleton_replaces_nothing(cache: Steps, redis: Redis, value: bytes) -> None:
    row = new_row()
    await redis.set(session_key(row.session.session_id), value, ex=100)

    await cache.skeleton(row)

    assert await raw(redis, row) == value


async def test_a_late_skeleton_does_not_hide_what_was_written_meanwhile(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    before = await raw(redis, row)

    await cache.skeleton(new_row(row.session.session_id))
    await cache.settle(row)

    assert await raw(redis, row) == before


async def test_only_its_own_token_settles_a_skeleton(cache: Steps, redis: Redis) -> None:
    row = new_row()
    await cache.settle(row)
    await cache.skeleton(row)
    before = await raw(redis, row)

    await cache.settle(row, token=OTHER_TOKEN)
    await cache.settle(row, token=TOKEN_ZERO)

    assert await raw(redis, row) == before


async def test_a_late_settling_does_not_clean_what_a_write_has_marked(cache: Steps, redis: Redis) -> None:
    row = new_row()
    committed = committed_append(row, [new_message("a")])
    await cache.skeleton(row)
    await cache.mark(committed, token=OTHER_TOKEN)
    marked = await raw(redis, row)

    await cache.settle(row)
    between = await raw(redis, row)
    await cache.publish(committed)
    published = await raw(redis, row)
    await cache.settle(row)

    assert between == marked
    assert await raw(redis, row) == published
    assert contents(published) == ["a"]


async def test_no_publish_makes_a_skeleton_clean(cache: Steps) -> None:
    """One whose SET was carried out late, when the next write had marked the absent key already: what fits the
    first write's publish is outdated by the second one's commit.
    """
    row = new_row()
    first = committed_append(row, [new_message("a")])
    second = committed_append(first.after, [new_message("b")])
    marked = [await cache.mark(first), await cache.mark(second)]
    await cache.skeleton(row)

    published = await cache.publish(first)

    assert (marked, published) == (["touched", "touched"], "published")
    assert (await at(cache, first.after)).dirty


# Stamps


async def test_a_stamp_makes_an_entry_a_clean_one_of_its_epoch(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a", "b")
    await cache.mark(committed_append(row, [new_message()]))
    before = await at(cache, row)
    await redis.pexpire(session_key(row.session.session_id), 5000)

    async with cache.watch(row.session.session_id) as watch:
        stamped = await watch.stamp(OTHER_EPOCH)

    life = await redis.pttl(session_key(row.session.session_id))
    after = await at(cache, row)
    assert (stamped, life > 95_000) == (True, True)
    assert after == replace(before, epoch=OTHER_EPOCH, pending=0)
    assert not after.dirty


async def test_a_stamp_that_lost_is_refused(cache: Steps, redis: Redis) -> None:
    """To a write, to a delete, to a fill, to another stamp."""
    row = await filled_row(cache, "a")
    committed = committed_append(row, [new_message("b")])

    async def stamp_elsewhere() -> None:
        async with cache.watch(row.session.session_id) as other:
            await other.stamp(EPOCH)

    stamped = []
    for step in (
        lambda: cache.mark(committed),
        lambda: cache.publish(committed),
        stamp_elsewhere,
        lambda: fill(cache, row, []),
        lambda: cache.remove(row.session.session_id),
    ):
        async with cache.watch(row.session.session_id) as watch:
            await step()
            left = await redis.get(session_key(row.session.session_id))
            stamped.append(await watch.stamp(OTHER_EPOCH))
            assert await redis.get(session_key(row.session.session_id)) == left

    assert stamped == [False] * 5


async def test_a_touch_and_a_drop_are_refused_where_somebody_was_there_before(
    cache: Steps, redis: Redis
) -> None:
    """Adoption's: what was read must still stand there when it is said to be PostgreSQL's."""
    row = new_row(owner="redis")
    key = session_key(row.session.session_id)
    value, newer = (encode(row, epoch=epoch, lines=[]) for epoch in (EPOCH, OTHER_EPOCH))

    done = []
    for name in ("touch", "drop"):
        await redis.set(key, value, px=5000)
        async with cache.watch(row.session.session_id) as lost:
            await redis.set(key, newer, px=5000)
            done.append(await getattr(lost, name)())
        async with cache.watch(row.session.session_id) as won:
            done.append(await getattr(won, name)())
        done.append(await redis.pttl(key) > 95_000)

    assert done == [False, True, True, False, True, False]
    assert await redis.exists(key) == 0


# Which Redis it is


async def test_the_identity_is_the_servers_run_and_its_history(cache: Steps, redis: Redis) -> None:
    server, replication = await redis.info("server"), await redis.info("replication")

    assert await cache.cache.probe() == f"{server['run_id']}/{replication['master_replid']}"


async def test_every_step_refuses_a_redis_that_is_not_the_epochs(cache: Steps, redis: Redis) -> None:
    moved = Steps(cache.cache, state_of("another/one"))
    row = new_row()
    committed = committed_append(row, [new_message()])

    async def watched() -> None:
        async with moved.watch(row.session.session_id) as watch:
            await watch.fill(row, EPOCH, [])

    for step in (
        lambda: moved.get(row.session.session_id),
        lambda: moved.mark(committed),
        lambda: moved.publish(committed),
        lambda: moved.skeleton(row),
        lambda: moved.settle(row),
        lambda: moved.remove(row.session.session_id),
        watched,
    ):
        with pytest.raises(CacheMoved) as raised:
            await step()
        assert raised.value.identity == cache.state.redis_identity

    assert await redis.dbsize() == 0
    assert await cache.get(row.session.session_id) is None


async def test_where_no_redis_is_known_none_is_asked(cache: Steps) -> None:
    nowhere = Steps(cache.cache, state_of(None))

    with pytest.raises(CacheMoved) as raised:
        await nowhere.get(new_row().session.session_id)

    assert raised.value.identity is None


@pytest.fixture
async def private(private_url: str) -> AsyncIterator[Redis]:
    """The private server, empty and a primary before and after."""
    async with Redis.from_url(private_url, db=1) as redis:
        await redis.flushall()
        yield redis
        await redis.slaveof()


async def replicate_nobody(redis: Redis) -> None:
    """It serves what it has, as a replica whose primary is away."""
    await redis.slaveof("127.0.0.1", 1)


async def test_a_replica_is_nobodys_redis(make_cache: MakeCache, private: Redis, private_url: str) -> None:
    cache = await make_cache(url=private_url)
    row = await filled_row(cache, "a")
    fresh = await make_cache(url=private_url)
    await replicate_nobody(private)

    with pytest.raises(CacheMoved) as probed:
        await cache.cache.probe()
    with pytest.raises(CacheMoved) as connected:
        await fresh.get(row.session.session_id)

    assert (probed.value.identity, connected.value.identity) == (None, None)


async def test_a_replica_does_not_answer_from_the_past_on_a_socket_that_it_had_as_a_primary(
    make_cache: MakeCache, private: Redis, private_url: str
) -> None:
    cache = await make_cache(url=private_url)
    row = await filled_row(cache, "a")
    await replicate_nobody(private)

    with pytest.raises(CacheOutage):
        await cache.get(row.session.session_id)
    with pytest.raises(CacheOutage):
        await cache.mark(committed_append(row, [new_message()]))


async def test_a_primary_that_was_a_replica_for_a_while_is_another_one(
    make_cache: MakeCache, private: Redis, private_url: str
) -> None:
    """Its run is the same, and so may its sockets be: its data need not."""
    cache = await make_cache(url=private_url)
    run_id = (await private.info("server"))["run_id"]
    await replicate_nobody(private)
    await private.slaveof()

    identity = await cache.cache.probe()

    assert identity != cache.state.redis_identity
    assert identity.startswith(f"{run_id}/")
    fresh = await make_cache(url=private_url)
    with pytest.raises(CacheMoved) as raised:
        await Steps(fresh.cache, cache.state).get(new_row().session.session_id)
    assert raised.value.identity == identity


async def connections(redis: Redis) -> list[str]:
    return [one["id"] for one in await redis.client_list() if one["name"] == "chat-sessions"]


async def test_a_probe_is_asked_on_a_connection_of_its_own_that_it_closes(
    make_cache: MakeCache, private: Redis, private_url: str
) -> None:
    cache = await make_cache(url=private_url)

    async def closed() -> bool:
        return await connections(private) == []

    await until(closed)
    received = (await private.info("stats"))["total_connections_received"]
    for _ in range(3):
        await cache.cache.probe()

    assert (await private.info("stats"))["total_connections_received"] == received + 3
    await until(closed)


async def test_a_cache_keeps_the_connections_to_two_redises_and_closes_those_to_older_ones(
    make_cache: MakeCache, private: Redis, private_url: str
) -> None:
    cache = await make_cache(url=private_url)
    session_id = new_row().session.session_id
    await cache.get(session_id)
    opened = await connections(private)

    async def meet(identity: str) -> None:
        with pytest.raises(CacheMoved):
            await Steps(cache.cache, state_of(identity)).get(session_id)

    await meet("the/second")
    await cache.get(session_id)
    kept = await connections(private)
    await meet("the/third")

    async def closed() -> bool:
        return await connections(private) == []

    await until(closed)
    assert len(opened) == 1
    assert kept == opened
    assert await cache.get(session_id) is None


async def test_a_server_that_is_not_there_is_an_outage() -> None:
    cache = RedisSessionCache(
        "redis://127.0.0.1:1",
        database=1,
        timeout_seconds=1,
        ttl_seconds=1,
        messages_max=1,
        bytes_max=1,
    )

    with pytest.raises(CacheOutage):
        await cache.probe()

    assert (await cache.health()).status == "warn"
    await cache.close()


# Memory, scripts, databases


async def test_a_cache_without_memory_is_out_and_keeps_its_entries_whole(
    make_cache: MakeCache, private_url: str, full: Callable[[], Awaitable[None]]
) -> None:
    cache = await make_cache(url=private_url, messages_max=2)
    row = await filled_row(cache, "a", "b")
    async with Redis.from_url(private_url, db=1) as redis:
        before = await raw(redis, row)
        await full()

        assert await cache.publish(committed_append(row, [new_message("c" * 5000)])) == "refused"
        with pytest.raises(CacheOutage):
            await fill(cache, row, [])

        assert await raw(redis, row) == before
    entry = await cache.get(row.session.session_id)
    assert isinstance(entry, Entry)
    assert entry.equals(row)


async def test_a_cache_without_memory_still_removes(
    make_cache: MakeCache, private_url: str, full: Callable[[], Awaitable[None]]
) -> None:
    cache = await make_cache(url=private_url)
    row, absent = await filled_row(cache, "a"), new_row()
    async with cache.watch(absent.session.session_id) as watch:
        await full()

        removed = [await cache.remove(one.session.session_id) for one in (row, absent)]
        async with Redis.from_url(private_url, db=1) as redis:
            await redis.config_set("maxmemory", 0)
            filled = await watch.fill(absent, EPOCH, [])
            left = await redis.dbsize()

    assert (removed, filled, left) == ([True, True], False, 0)


async def test_a_cache_without_memory_still_marks(
    make_cache: MakeCache, private_url: str, full: Callable[[], Awaitable[None]]
) -> None:
    """Or each write would cost an epoch, and the wait that goes with it."""
    cache = await make_cache(url=private_url)
    row, absent = await filled_row(cache, "a"), new_row()
    async with cache.watch(absent.session.session_id) as watch:
        await full()

        outcomes = [await cache.mark(committed_append(one, [new_message()])) for one in (row, absent)]
        async with Redis.from_url(private_url, db=1) as redis:
            await redis.config_set("maxmemory", 0)
            filled = await watch.fill(absent, EPOCH, [])

    assert (outcomes, filled) == (["marked", "touched"], False)
    assert (await at(cache, row)).dirty


async def test_redis_alone_without_memory_refuses_writes_whole(
    private_url: str, full: Callable[[], Awaitable[None]]
) -> None:
    store = RedisChatSessionStore(redis_url=private_url, messages_max=2)
    session_id = (await store.create_session("user123")).session.session_id
    await store.append(keyed_append(session_id, "stored", "a", "b"))
    async with Redis.from_url(private_url, db=1) as redis, Redis.from_url(private_url, db=2) as aux:
        before = await redis.get(session_key(session_id)), await redis.dbsize(), await aux.dbsize()
        await full()

        for write in (
            store.append(new_append(session_id, "c")),
            store.append(keyed_append(session_id, "key", "c", "d", "e")),
            store.begin_turn(turn_append(session_id, key="turn"), window=10),
            store.create_session("somebody else"),
        ):
            with pytest.raises(CacheFull):
                await write
        replay = await store.append(keyed_append(session_id, "stored", "a", "b"))
        history = await store.read_history(session_id, max_messages=10)

        assert (await redis.get(session_key(session_id)), await redis.dbsize(), await aux.dbsize()) == before
        assert replay.replayed
        assert [message.content for message in history.messages] == ["a", "b"]
        assert (await store.delete_session(session_id)).message_count == 2
        assert await redis.dbsize() == 0
    await store.close()


async def test_a_server_that_forgot_the_scripts_is_given_them_again(cache: Steps, redis: Redis) -> None:
    row = await filled_row(cache, "a")

    await redis.script_flush()
    committed = committed_append(row, [new_message("b")])
    published = await cache.publish(committed)
    await redis.script_flush()
    removed = await cache.remove(row.session.session_id)

    assert (published, removed) == ("published", True)


async def test_steps_of_many_sessions_at_once_do_not_meet(cache: Steps) -> None:
    rows = await asyncio.gather(*(filled_row(cache, f"{at}") for at in range(60)))

    entries = await asyncio.gather(*(cache.get(row.session.session_id) for row in rows))

    assert [
        isinstance(entry, Entry) and entry.equals(row) for entry, row in zip(entries, rows, strict=True)
    ] == [True] * 60


async def test_a_server_error_about_one_key_is_not_an_outage_for_the_others(
    cache: Steps, redis: Redis
) -> None:
    row, listed = await filled_row(cache, "a"), new_row()
    await redis.lpush(session_key(listed.session.session_id), "a")

    await cache.get(listed.session.session_id)
    await cache.publish(committed_append(listed, [new_message()]))

    assert isinstance(await cache.get(row.session.session_id), Entry)


async def test_a_command_cancelled_while_it_gives_its_connection_back_leaves_no_hole_in_the_pool(
    servers: Servers,
) -> None:
    """Method: the pool's lock is held from outside, so that the command waits in its release."""
    redis = create_redis(servers.redis_url, database=1, timeout_seconds=1)
    pool = redis.connection_pool
    command = asyncio.create_task(redis.ping())
    while not pool._in_use_connections:  # noqa: ASYNC110 - the pool has no event to wait for
        await asyncio.sleep(0)
    async with pool._condition:
        await asyncio.sleep(0.05)
        command.cancel()
        await asyncio.gather(command, return_exceptions=True)

    async with asyncio.timeout(5):
        while pool._in_use_connections:  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)

    assert command.cancelled()
    await redis.aclose()


async def test_a_connection_at_hand_that_the_server_has_closed_is_not_used(
    servers: Servers, redis: Redis
) -> None:
    bounded = BoundedRedis(create_redis(servers.redis_url, database=1, timeout_seconds=1), timeout_seconds=1)
    assert await asyncio.gather(*(bounded.commands([("PING",)]) for _ in range(3))) == [[b"PONG"]] * 3
    await redis.client_kill_filter(_type="normal", skipme=True)
    # The loop hears of it by itself, before anybody asks.
    await asyncio.sleep(0.05)

    assert await asyncio.gather(*(bounded.commands([("PING",)]) for _ in range(3))) == [[b"PONG"]] * 3
    await bounded.redis.aclose()


async def test_a_connection_that_owes_a_reply_is_not_kept_at_hand(servers: Servers, redis: Redis) -> None:
    await redis.set("mine", "1")
    bounded = BoundedRedis(
        create_redis(servers.redis_url, database=1, timeout_seconds=0.2), timeout_seconds=0.2
    )
    await bounded.commands([("PING",)])
    with pytest.raises(CacheOutage):
        await bounded.commands([("GET", "mine"), ("BLPOP", "nothing", "0.5")])

    assert await bounded.commands([("GET", "mine"), ("PING",)], urgent=True) == [b"1", b"PONG"]
    await asyncio.sleep(0.5)
    assert await bounded.commands([("PING",)], urgent=True) == [b"PONG"]
    await bounded.redis.aclose()


async def test_an_error_of_the_connection_among_the_replies_is_an_outage(private_url: str) -> None:
    """Method: RESET logs the connection out in the middle of a round trip."""
    async with Redis.from_url(private_url) as before:
        bounded = BoundedRedis(create_redis(private_url, database=1, timeout_seconds=2), timeout_seconds=2)
        assert await bounded.commands([("PING",), ("PING",)]) == [b"PONG", b"PONG"]
        await before.config_set("requirepass", "secret")
        try:
            with pytest.raises(CacheOutage, match="Authentication required"):
                await bounded.commands([("PING",), ("RESET",), ("GET", "mine")])
        finally:
            await before.config_set("requirepass", "")
        assert await bounded.commands([("PING",)], urgent=True) == [b"PONG"]
        await bounded.redis.aclose()


async def test_of_many_connections_few_are_kept_at_hand(servers: Servers) -> None:
    bounded = BoundedRedis(create_redis(servers.redis_url, database=1, timeout_seconds=2), timeout_seconds=2)
    await asyncio.gather(*(bounded.commands([("PING",)]) for _ in range(30)))
    pool = bounded.redis.connection_pool

    # All that is left is there for who takes one out of the pool.
    assert 1 <= len(pool._in_use_connections) <= 16
    await asyncio.gather(*(bounded.redis.ping() for _ in range(16)))
    await bounded.redis.aclose()
    assert not [one for one in pool._in_use_connections if one.is_connected]


async def test_a_queue_for_connections_is_no_outage(servers: Servers) -> None:
    bounded = BoundedRedis(create_redis(servers.redis_url, database=1, timeout_seconds=1), timeout_seconds=1)
    # In twenty turns: the last of them wait at least twice as long as Redis may take for one.
    replies = await asyncio.gather(*(bounded.commands([("BLPOP", "nothing", "0.1")]) for _ in range(320)))
    assert replies == [[None]] * 320
    await bounded.redis.aclose()


async def test_many_fills_at_once_are_no_outage(make_cache: MakeCache) -> None:
    cache = await make_cache(timeout_seconds=0.1)

    async def fill() -> None:
        async with cache.watch(new_uuid()):
            await asyncio.sleep(0.02)

    fills = asyncio.gather(*(fill() for _ in range(200)))
    while not fills.done():
        await cache.get(new_uuid())
        await asyncio.sleep(0.01)
    await fills


async def test_who_has_waited_for_his_turn_while_redis_answered_others_is_not_told_that_it_is_out(
    servers: Servers, redis: Redis
) -> None:
    bounded = BoundedRedis(create_redis(servers.redis_url, database=1, timeout_seconds=5), timeout_seconds=1)
    waiting_since = time.monotonic() - 2
    await bounded.commands([("PING",)])
    await redis.client_pause(200)
    assert await bounded.commands([("PING",)], since=waiting_since) == [b"PONG"]

    # Had it answered nobody meanwhile, it would have been out all the time.
    bounded._answered_at -= 10
    await redis.client_pause(200)
    with pytest.raises(CacheOutage):
        await bounded.commands([("PING",)], since=waiting_since)
    await redis.client_unpause()
    await bounded.redis.aclose()
