"""Entries in Redis: what the cache's steps do to a value, on a real server."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from redis.asyncio import Redis

from app.chat import NewMessage
from app.coherence.ports import EPOCH_ZERO, CacheOutage, Committed, Entry, GuideEntry, Row
from app.embedded import embedded_servers
from app.errors import CacheFull
from app.redis_sessions.cache import RedisSessionCache, newest_that_fit
from app.redis_sessions.client import BoundedRedis, create_redis
from app.redis_sessions.codec import FIELDS, USER_ID_OFFSET, encode
from app.redis_sessions.keys import session_key
from app.redis_sessions.store import RedisChatSessionStore
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

OTHER_EPOCH = "f" * 16

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


@pytest.fixture
async def make_cache(servers: Servers, redis: Redis) -> AsyncIterator[Callable[..., RedisSessionCache]]:
    async with AsyncExitStack() as stack:

        def make(
            *,
            ttl_seconds: int = 100,
            messages_max: int = 100,
            bytes_max: int = 1024 * 1024,
            url: str = servers.redis_url,
        ) -> RedisSessionCache:
            client = create_redis(url, database=1, timeout_seconds=2)
            stack.push_async_callback(client.aclose)
            return RedisSessionCache(
                BoundedRedis(client, timeout_seconds=2),
                ttl_seconds=ttl_seconds,
                messages_max=messages_max,
                bytes_max=bytes_max,
            )

        yield make


@pytest.fixture
def cache(make_cache: Callable[..., RedisSessionCache]) -> RedisSessionCache:
    return make_cache()


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


async def fill(cache: RedisSessionCache, row: Row, lines: Sequence[str] = ()) -> bool:
    async with cache.watch(row.session.session_id) as watch:
        return await watch.fill(row, EPOCH_ZERO, lines)


async def publish(cache: RedisSessionCache, committed: Committed, epoch: str = EPOCH_ZERO) -> str:
    return (await cache.publish(committed, epoch, want_entry=False)).outcome


async def raw(redis: Redis, row: Row) -> bytes:
    value = await redis.get(session_key(row.session.session_id))
    assert isinstance(value, bytes)
    return value


async def filled_row(cache: RedisSessionCache, *contents: str, user_id: str = "user123") -> Row:
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
    make_cache: Callable[..., RedisSessionCache], redis: Redis, messages_max: int
) -> None:
    rng = random.Random(messages_max)
    cache = make_cache(messages_max=messages_max, bytes_max=30_000)
    row = await filled_row(cache, user_id='"]}\\\n Đ🙂')
    lines: list[str] = []

    for _ in range(150):
        committed = committed_append(row, random_messages(rng))
        published = await cache.publish(committed, EPOCH_ZERO, want_entry=True)
        row, lines = committed.after, [*lines, *committed.lines]

        value = await raw(redis, row)
        parsed, entry = json.loads(value), published.entry
        expected = list(newest_that_fit(lines[-messages_max:], 30_000))
        assert parsed["session_id"] == str(row.session.session_id)
        assert parsed["user_id"] == row.session.user_id
        assert [message["seq"] for message in parsed["messages"]] == list(
            range(row.session.message_count - len(expected) + 1, row.session.message_count + 1)
        )
        assert entry is not None
        assert entry.equals(row)
        assert entry.body.decode() == ",\n".join(expected)
        assert blanks_of(value) * 12 <= len(value)

    assert await cache.get(row.session.session_id) == entry


async def test_a_published_value_equals_a_filled_one(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    cache = make_cache()
    row = await filled_row(cache, "a", "b")
    committed = committed_append(row, [new_message("c"), new_message("d")])

    outcome = await publish(cache, committed)

    published = await raw(redis, row)
    lines = [*(line.decode() for line in published.splitlines()[1:3])]
    lines = [line.removesuffix(",") for line in lines] + list(committed.lines)
    assert outcome == "published"
    assert published == encode(committed.after, epoch=EPOCH_ZERO, lines=lines)


async def test_the_window_ends_at_its_count(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    cache = make_cache(messages_max=3)
    row = await filled_row(cache, "a", "b")

    await publish(cache, committed_append(row, [new_message(text) for text in "cde"]))

    value = await raw(redis, row)
    assert contents(value) == ["c", "d", "e"]
    assert (number(value, "first_seq"), number(value, "seq")) == (3, 5)


async def test_the_window_ends_at_its_bytes(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    cache = make_cache(bytes_max=1000)
    row = await filled_row(cache, "a" * 300)

    for text in ("b" * 300, "c" * 300):
        committed = committed_append(row, [new_message(text)])
        await publish(cache, committed)
        row = committed.after

    assert [text[0] for text in contents(await raw(redis, row))] == ["b", "c"]


async def test_published_and_filled_windows_end_at_the_same_byte(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    line = len(new_message("a" * 200).line(10))
    for bytes_max in (3 * (line + 2) - 1, 3 * (line + 2)):
        cache = make_cache(bytes_max=bytes_max)
        committed = committed_append(
            new_row(message_count=9, chain=bytes(8)), [new_message("a" * 200) for _ in range(10)]
        )
        await fill(cache, new_row(committed.after.session.session_id, message_count=9), [])
        await publish(cache, committed)
        published = number(await raw(redis, committed.after), "first_seq")

        await fill(cache, committed.after, committed.lines)

        assert number(await raw(redis, committed.after), "first_seq") == published
        assert published == 20 - bytes_max // (line + 2)


async def test_a_message_beyond_the_byte_window_leaves_an_empty_window(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    cache = make_cache(bytes_max=1000)
    row = await filled_row(cache, "a")
    huge = committed_append(row, [new_message("b" * 2000)])
    small = committed_append(huge.after, [new_message("c")])

    published = await cache.publish(huge, EPOCH_ZERO, want_entry=True)
    emptied = await raw(redis, row)
    await publish(cache, small)

    assert published.entry is not None
    assert published.entry.equals(huge.after)
    assert published.entry.newest(1, None) is None
    assert (contents(emptied), number(emptied, "first_seq"), len(emptied) < 400) == ([], 3, True)
    assert contents(await raw(redis, row)) == ["c"]


async def test_a_fill_beyond_the_byte_window_leaves_an_empty_window(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    cache = make_cache(bytes_max=1000)

    row = await filled_row(cache, "a", "b" * 2000)

    entry = await cache.get(row.session.session_id)
    assert isinstance(entry, Entry)
    assert (entry.first_seq, entry.body, entry.equals(row)) == (3, b"", True)


async def test_a_full_window_is_compacted_once_in_many_appends(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    cache = make_cache(messages_max=100)
    row = await filled_row(cache, *["x" * 100] * 100)
    await redis.config_resetstat()

    sizes = []
    for _ in range(600):
        committed = committed_append(row, [new_message("x" * 100)])
        await publish(cache, committed)
        row = committed.after
        sizes.append(await redis.strlen(session_key(row.session.session_id)))

    compactions = (await redis.info("commandstats"))["cmdstat_set"]["calls"]
    assert 600 // 12 <= compactions <= 600 // 8
    assert max(sizes) <= min(sizes) * 12 / 11 + 500


async def test_an_append_into_an_open_window_rewrites_nothing(cache: RedisSessionCache, redis: Redis) -> None:
    row = await filled_row(cache)
    await redis.config_resetstat()

    for _ in range(100):
        committed = committed_append(row, [new_message("x" * 100)])
        await publish(cache, committed)
        row = committed.after

    stats = await redis.info("commandstats")
    assert "cmdstat_set" not in stats
    assert "cmdstat_get" not in stats


# The time to live


async def test_the_steps_that_use_an_entry_slide_its_time_to_live(
    cache: RedisSessionCache, redis: Redis
) -> None:
    row = await filled_row(cache, "a")
    key = session_key(row.session.session_id)
    left = [await redis.pttl(key)]

    await redis.pexpire(key, 5000)
    await cache.get(row.session.session_id)
    left.append(await redis.pttl(key))
    await redis.pexpire(key, 5000)
    await publish(cache, committed_append(row, [new_message("b")]))
    left.append(await redis.pttl(key))

    assert min(left) > 95_000
    assert max(left) <= 100_000


async def test_a_publish_that_changes_nothing_slides_nothing(cache: RedisSessionCache, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    await redis.pexpire(session_key(row.session.session_id), 5000)

    await publish(cache, committed_append(row, [new_message("b")]), OTHER_EPOCH)

    assert await redis.pttl(session_key(row.session.session_id)) <= 5000


async def test_compaction_keeps_the_time_to_live(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    cache = make_cache(messages_max=2)
    row = await filled_row(cache, "a", "b")

    left = []
    for _ in range(20):
        committed = committed_append(row, [new_message("x" * 50)])
        await publish(cache, committed)
        row = committed.after
        left.append(await redis.pttl(session_key(row.session.session_id)))

    assert min(left) > 95_000


# Publish


@pytest.mark.parametrize(
    ("seq", "chain", "epoch"),
    [
        (1, bytes(8), EPOCH_ZERO),
        (3, bytes(8), EPOCH_ZERO),
        (2, b"another!", EPOCH_ZERO),
        (2, bytes(8), OTHER_EPOCH),
    ],
    ids=["shorter", "longer", "another history", "another epoch"],
)
async def test_a_publish_changes_only_an_entry_that_stands_exactly_before_it(
    cache: RedisSessionCache, redis: Redis, seq: int, chain: bytes, epoch: str
) -> None:
    lines = [new_message(text).line(at) for at, text in enumerate("abc"[:seq], 1)]
    entry = new_row(message_count=seq, chain=chain)
    await fill(cache, entry, lines)
    before = await raw(redis, entry)
    row = new_row(entry.session.session_id, message_count=2)

    outcome = await publish(cache, committed_append(row, [new_message("x")]), epoch)

    assert outcome == "behind"
    assert await raw(redis, entry) == before


async def test_a_publish_makes_no_entry(cache: RedisSessionCache, redis: Redis) -> None:
    row = new_row()

    outcome = await publish(cache, committed_append(row, [new_message()]))

    assert outcome == "absent"
    assert await redis.dbsize() == 0


async def test_a_publish_that_arrives_twice_or_late_changes_nothing_more(
    cache: RedisSessionCache, redis: Redis
) -> None:
    first = committed_append(await filled_row(cache, "a"), [new_message("b")])
    second = committed_append(first.after, [new_message("c")])
    await publish(cache, first)
    await publish(cache, second)
    before = await raw(redis, first.after)

    outcomes = [await publish(cache, committed) for committed in (second, first, second)]

    assert outcomes == ["behind"] * 3
    assert await raw(redis, first.after) == before
    assert contents(before) == ["a", "b", "c"]


async def test_a_publish_whose_predecessor_was_lost_changes_nothing(
    cache: RedisSessionCache, redis: Redis
) -> None:
    lost = committed_append(await filled_row(cache, "a"), [new_message("b")])
    before = await raw(redis, lost.before)

    outcome = await publish(cache, committed_append(lost.after, [new_message("c")]))

    assert outcome == "behind"
    assert await raw(redis, lost.before) == before


async def test_of_two_histories_of_one_length_only_its_own_publish_fits(
    cache: RedisSessionCache, redis: Redis
) -> None:
    row = await filled_row(cache, "a")
    one, other = (committed_append(row, [new_message(text)]) for text in ("b", "B"))
    await publish(cache, one)

    outcome = await publish(cache, committed_append(other.after, [new_message("c")]))

    assert outcome == "behind"
    assert contents(await raw(redis, row)) == ["a", "b"]


async def test_a_publish_answers_with_the_entry_that_it_left(cache: RedisSessionCache) -> None:
    row = await filled_row(cache, "a")
    committed = committed_append(row, [new_message("b"), new_message("c")])

    published = await cache.publish(committed, EPOCH_ZERO, want_entry=True)

    assert published.entry is not None
    assert published.entry.equals(committed.after)
    assert published.entry.session == committed.after.session
    assert published.entry.chain == committed.after.chain


# What Redis owns, what the guide wrote, what nobody knows


async def test_nothing_changes_an_entry_that_redis_owns(cache: RedisSessionCache, redis: Redis) -> None:
    row = new_row(owner="redis")
    await redis.set(session_key(row.session.session_id), encode(row, epoch=EPOCH_ZERO, lines=[]), ex=100)
    before = await raw(redis, row)

    published = await publish(cache, committed_append(row, [new_message()]))
    removed = await cache.remove(row.session.session_id)
    async with cache.watch(row.session.session_id) as watch:
        watched = watch.value

    assert (published, removed) == ("redis-owned", False)
    assert isinstance(watched, Entry)
    assert watched.owner == "redis"
    assert await raw(redis, row) == before


async def test_a_fill_loses_against_redis_taking_the_session(cache: RedisSessionCache, redis: Redis) -> None:
    row = new_row()
    async with cache.watch(row.session.session_id) as watch:
        owned = encode(new_row(row.session.session_id, owner="redis"), epoch=EPOCH_ZERO, lines=[])
        await redis.set(session_key(row.session.session_id), owned, ex=100)

        filled = await watch.fill(row, EPOCH_ZERO, [])

    assert not filled
    assert await raw(redis, row) == owned


async def test_an_entry_in_the_guides_format_is_told_apart_and_left_alone(
    cache: RedisSessionCache, redis: Redis
) -> None:
    row = new_row()
    value = guide_value(row.session.session_id, "a")
    await redis.set(session_key(row.session.session_id), value, ex=100)

    read = await cache.get(row.session.session_id)
    outcome = await publish(cache, committed_append(row, [new_message()]))

    assert (read, outcome) == (GuideEntry(session_id=row.session.session_id), "behind")
    assert await raw(redis, row) == value


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
async def test_garbage_is_a_miss_that_a_fill_replaces(
    cache: RedisSessionCache, redis: Redis, garbage: bytes
) -> None:
    row = new_row()
    await redis.set(session_key(row.session.session_id), garbage, ex=100)

    read = await cache.get(row.session.session_id)
    outcome = await publish(cache, committed_append(row, [new_message()]))
    filled = await fill(cache, row)

    assert (read, filled) == (None, True)
    assert outcome in {"behind", "absent"}
    assert isinstance(await cache.get(row.session.session_id), Entry)


async def test_a_torn_entry_is_never_spliced(cache: RedisSessionCache, redis: Redis) -> None:
    row = await filled_row(cache, "a", "b")
    value = await raw(redis, row)
    committed = committed_append(row, [new_message("c")])

    for length in range(1, len(value)):
        await redis.set(session_key(row.session.session_id), value[:length], ex=100)
        assert await publish(cache, committed) == "behind"
        assert await raw(redis, row) == value[:length]


async def test_a_key_of_another_type_is_a_miss_that_a_fill_or_a_remove_replaces(
    cache: RedisSessionCache, redis: Redis
) -> None:
    row = new_row()
    key = session_key(row.session.session_id)
    await redis.lpush(key, "a")

    read = await cache.get(row.session.session_id)
    outcome = await publish(cache, committed_append(row, [new_message()]))
    await fill(cache, row)
    filled = await redis.type(key)
    await redis.delete(key)
    await redis.lpush(key, "a")
    removed = await cache.remove(row.session.session_id)

    assert (read, outcome, filled, removed) == (None, "behind", b"string", True)
    assert await redis.exists(key) == 0


async def test_another_sessions_entry_is_a_miss(cache: RedisSessionCache, redis: Redis) -> None:
    row, other = await filled_row(cache, "a"), await filled_row(cache, "b")
    await redis.set(session_key(row.session.session_id), await raw(redis, other), ex=100)

    assert await cache.get(row.session.session_id) is None


# Fills that lose


async def test_a_fill_that_lost_to_a_remove_of_nothing_is_refused(
    cache: RedisSessionCache, redis: Redis
) -> None:
    row = new_row()
    async with cache.watch(row.session.session_id) as watch:
        await cache.remove(row.session.session_id)

        filled = await watch.fill(row, EPOCH_ZERO, [])

    assert not filled
    assert await redis.dbsize() == 0


async def test_a_fill_that_lost_to_a_remove_is_refused(cache: RedisSessionCache, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    async with cache.watch(row.session.session_id) as watch:
        await cache.remove(row.session.session_id)

        filled = await watch.fill(row, EPOCH_ZERO, [])

    assert not filled
    assert await redis.dbsize() == 0


async def test_a_fill_that_lost_to_another_fill_is_refused(cache: RedisSessionCache, redis: Redis) -> None:
    row = new_row()
    async with cache.watch(row.session.session_id) as slow:
        newer = committed_append(row, [new_message("a")])
        await fill(cache, newer.after, newer.lines)

        filled = await slow.fill(row, EPOCH_ZERO, [])

    assert not filled
    assert contents(await raw(redis, row)) == ["a"]


async def test_a_fill_that_lost_to_a_publish_is_refused(cache: RedisSessionCache, redis: Redis) -> None:
    row = await filled_row(cache, "a")
    async with cache.watch(row.session.session_id) as watch:
        await publish(cache, committed_append(row, [new_message("b")]))

        filled = await watch.fill(row, EPOCH_ZERO, [])

    assert not filled
    assert contents(await raw(redis, row)) == ["a", "b"]


async def test_a_watch_that_fills_nothing_leaves_its_connection_clean(
    make_cache: Callable[..., RedisSessionCache], redis: Redis
) -> None:
    cache = make_cache()
    row = await filled_row(cache, "a")

    for _ in range(50):
        async with cache.watch(row.session.session_id) as watch:
            assert isinstance(watch.value, Entry)

    assert await fill(cache, row, [])


async def test_removing_what_is_not_there_is_harmless(cache: RedisSessionCache, redis: Redis) -> None:
    row = new_row()

    assert [await cache.remove(row.session.session_id) for _ in range(2)] == [True, True]
    assert await redis.dbsize() == 0


# Memory, scripts, databases


async def test_a_cache_without_memory_is_out_and_keeps_its_entries_whole(
    make_cache: Callable[..., RedisSessionCache], private_url: str, full: Callable[[], Awaitable[None]]
) -> None:
    cache = make_cache(url=private_url, messages_max=2)
    row = await filled_row(cache, "a", "b")
    async with Redis.from_url(private_url, db=1) as redis:
        before = await raw(redis, row)
        await full()

        with pytest.raises(CacheOutage):
            await publish(cache, committed_append(row, [new_message("c" * 5000)]))
        with pytest.raises(CacheOutage):
            await fill(cache, row, [])

        assert await raw(redis, row) == before
    entry = await cache.get(row.session.session_id)
    assert isinstance(entry, Entry)
    assert entry.equals(row)


async def test_a_cache_without_memory_still_removes(
    make_cache: Callable[..., RedisSessionCache], private_url: str, full: Callable[[], Awaitable[None]]
) -> None:
    cache = make_cache(url=private_url)
    row, absent = await filled_row(cache, "a"), new_row()
    async with cache.watch(absent.session.session_id) as watch:
        await full()

        removed = [await cache.remove(one.session.session_id) for one in (row, absent)]
        async with Redis.from_url(private_url, db=1) as redis:
            await redis.config_set("maxmemory", 0)
            filled = await watch.fill(absent, EPOCH_ZERO, [])
            left = await redis.dbsize()

    assert (removed, filled, left) == ([True, True], False, 0)


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


async def test_a_server_that_forgot_the_scripts_is_given_them_again(
    cache: RedisSessionCache, redis: Redis
) -> None:
    row = await filled_row(cache, "a")

    await redis.script_flush()
    committed = committed_append(row, [new_message("b")])
    published = await publish(cache, committed)
    await redis.script_flush()
    removed = await cache.remove(row.session.session_id)

    assert (published, removed) == ("published", True)


async def test_steps_of_many_sessions_at_once_do_not_meet(cache: RedisSessionCache) -> None:
    rows = await asyncio.gather(*(filled_row(cache, f"{at}") for at in range(60)))

    entries = await asyncio.gather(*(cache.get(row.session.session_id) for row in rows))

    assert [
        isinstance(entry, Entry) and entry.equals(row) for entry, row in zip(entries, rows, strict=True)
    ] == [True] * 60


async def test_a_server_error_about_one_key_is_not_an_outage_for_the_others(
    cache: RedisSessionCache, redis: Redis
) -> None:
    row, listed = await filled_row(cache, "a"), new_row()
    await redis.lpush(session_key(listed.session.session_id), "a")

    await cache.get(listed.session.session_id)
    await publish(cache, committed_append(listed, [new_message()]))

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
