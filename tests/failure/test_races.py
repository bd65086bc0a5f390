"""The races C1 to C15, each driven to its worst interleaving by gates; each again without the rule that stops it.

The product must answer with everything that was acknowledged. The mutant, the same code with one rule taken out,
must not: a race that the mutant survives would prove nothing. Two instances, A and B, on the same real servers.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from hashlib import sha1
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis

import app.redis_sessions.client as client_module
from app.chat import new_uuid
from app.coherence.heartbeat import next_state
from app.coherence.lease import Lease
from app.coherence.ports import CacheOutage, CacheState, Entry, Watch
from app.embedded import embedded_servers
from app.errors import ChatError, CommitUnknown
from app.hybrid import _Fence
from app.postgres import statements
from app.postgres.engine import Database, create_engine
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.cache import RedisSessionCache, _Watch
from app.redis_sessions.codec import decode, encode
from app.redis_sessions.keys import session_key
from app.store import Append
from app.tasks import stop
from tests.factories import keyed_append, new_append, new_message, new_row
from tests.servers import Servers
from tests.stores import Hybrid, new_hybrid

pytestmark = pytest.mark.anyio

LEASE_SECONDS = 0.3

versions = pytest.mark.parametrize("mutant", [False, True], ids=["product", "mutant"])


class Gate:
    """A failpoint: whoever comes first says so and waits."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        await self.open.wait()


class GatedCache(RedisSessionCache):
    """The product's cache with failpoints. One that is set is used once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before_exec: Gate | None = None
        self.publishes = True

    async def publish(self, *args: Any, **kwargs: Any) -> Any:
        if not self.publishes:
            raise CacheOutage("the process died here")
        return await super().publish(*args, **kwargs)

    @asynccontextmanager
    async def watch(self, session_id: UUID, state: CacheState) -> AsyncIterator[Watch]:
        async with super().watch(session_id, state) as watch:
            execute = watch._exec

            async def gated() -> bool:
                gate, self.before_exec = self.before_exec, None
                if gate is not None:
                    await gate.pass_through()
                return await execute()

            watch._exec = gated
            yield watch


MakeInstance = Callable[..., Hybrid]


@pytest.fixture
async def make_instance(
    servers: Servers, database_url: str, database: Database, state: CacheState
) -> AsyncIterator[MakeInstance]:
    async with AsyncExitStack() as stack:

        def make(name: str, *, redis_url: str = servers.redis_url, lasting: bool = True) -> Hybrid:
            """`lasting`: a lease that does not end, as after a heartbeat a moment ago."""
            own = Database(create_engine(database_url, application_name=name, pool_size=4))
            stack.push_async_callback(own.close)
            lease = Lease(seconds=LEASE_SECONDS)
            lease.learn(state, asked_at=math.inf if lasting else lease.now())
            return new_hybrid(
                stack,
                own,
                redis_url,
                state=None,
                lease=lease,
                timeout_seconds=0.25,
                cache_class=GatedCache,
                keeper_database=database,
            )

        yield make


@pytest.fixture
def a(make_instance: MakeInstance) -> Hybrid:
    return make_instance("A")


@pytest.fixture
def b(make_instance: MakeInstance) -> Hybrid:
    return make_instance("B")


@pytest.fixture(scope="module")
def other_redis() -> Iterator[str]:
    """A second Redis, to fail over to."""
    with (
        TemporaryDirectory(prefix="chat-tests-") as folder,
        embedded_servers(Path(folder), postgres=False, durable=False, redis_port=0) as servers,
    ):
        assert servers.redis_url is not None
        yield servers.redis_url


async def said(instance: Hybrid, session_id: UUID) -> list[str]:
    history = await instance.store.read_history(session_id, max_messages=100)
    assert history.freshness.age_seconds is None
    return [message.content for message in history.messages]


async def session_of(instance: Hybrid, *contents: str) -> UUID:
    session_id = (await instance.store.create_session("user123")).session.session_id
    for content in contents:
        await instance.store.append(new_append(session_id, content))
    return session_id


async def follow(instance: Hybrid) -> None:
    """Beats until the Redis of this instance is the one that may be trusted."""
    identity = await instance.cache.probe()
    while not (state := instance.lease.current()) or state.redis_identity != identity:
        await asyncio.sleep(LEASE_SECONDS / 5)
        await instance.heartbeat.beat()


async def end_transactions_of(name: str, database: Database) -> None:
    """What PostgreSQL does to the transaction of a process that froze."""
    async with database.connection() as conn:
        await conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name
        )


@asynccontextmanager
async def beating(instance: Hybrid) -> AsyncIterator[None]:
    task = asyncio.create_task(instance.heartbeat.run())
    try:
        yield
    finally:
        await stop(task)


def without_row_locks(patch: pytest.MonkeyPatch) -> None:
    for name in ("LOCK_SESSIONS", "LOCK_FREE_SESSIONS"):
        unlocked = getattr(statements, name).replace("FOR NO KEY UPDATE", "").replace("SKIP LOCKED", "")
        patch.setattr(statements, name, unlocked)


def without_watch(patch: pytest.MonkeyPatch) -> None:
    async def unwatched(self: _Watch) -> bool:
        await self._pipe.immediate_execute_command("UNWATCH")
        self._pipe.watching = False
        await self._pipe.execute()
        return True

    patch.setattr(_Watch, "_exec", unwatched)


def without_marks(patch: pytest.MonkeyPatch) -> None:
    async def nothing(_fence: _Fence, writes: Sequence[Any], _state: CacheState) -> list[None]:
        return [None] * len(writes)

    patch.setattr(_Fence, "mark", nothing)


@versions
async def test_c1_a_writer_that_cannot_reach_redis_is_not_overtaken_by_readers_that_can(
    make_instance: MakeInstance, b: Hybrid, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acknowledge before repair: stale until somebody comes by."""
    session_id = await session_of(b, "1")
    cut_off = make_instance("A", redis_url="redis://127.0.0.1:1")
    if mutant:
        without_marks(monkeypatch)
    async with beating(b):
        await cut_off.store.append(new_append(session_id, "2"))

        assert (await said(b, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c2_a_process_that_dies_between_commit_and_publish_leaves_nothing_that_is_believed(
    a: Hybrid, b: Hybrid, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sliding time to live it would be stale for ever. And its client comes back, and is acknowledged."""
    session_id = await session_of(a, "1")
    if mutant:
        without_marks(monkeypatch)
    a.cache.publishes = False
    await a.store.append(keyed_append(session_id, "key", "2"))
    retried = await b.store.append(keyed_append(session_id, "key", "2"))

    assert retried.replayed
    assert (await said(b, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c3_a_fill_never_brings_an_older_state_than_somebody_has_seen(
    a: Hybrid, b: Hybrid, redis: Redis, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fault at all: a fill with its snapshot in hand, a write, then the fill."""
    session_id = await session_of(a, "1")
    await redis.delete(session_key(session_id))
    if mutant:
        without_row_locks(monkeypatch)
        without_watch(monkeypatch)
    b.cache.before_exec = gate = Gate()
    filling = asyncio.create_task(said(b, session_id))
    await gate.reached.wait()
    writing = asyncio.create_task(a.store.append(new_append(session_id, "2")))
    # The write either waits for the row lock that the fill holds, or, in the mutant, is done now.
    await asyncio.wait([writing], timeout=0.2)
    gate.open.set()
    await filling
    await writing

    assert (await said(b, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c4_what_was_cached_before_redis_was_lost_is_looked_at_again_when_it_is_back(
    make_instance: MakeInstance, a: Hybrid, b: Hybrid, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await session_of(b, "1")
    if mutant:
        # Back under the epoch from before, as if nothing had been.
        monkeypatch.setattr("app.postgres.cache_state.token_hex", lambda _: state_before.epoch)
    state_before = b.lease.state
    assert state_before is not None
    off = await a.keeper.change(state_before, next_state(state_before, cache="off"))
    a.lease.learn(off)
    await a.keeper.settle(off)
    await a.store.append(new_append(session_id, "2"))
    off = await a.keeper.read()
    for instance in (a, b):
        instance.lease.learn(await a.keeper.change(off, next_state(off, cache="on")), asked_at=math.inf)

    assert (await said(b, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c5_a_reader_left_on_the_old_primary_does_not_believe_it_beyond_its_lease(
    make_instance: MakeInstance,
    a: Hybrid,
    other_redis: str,
    mutant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Split brain: B's connection never broke, and its Redis is what it always was."""
    session_id = await session_of(a, "1")
    left_behind = make_instance("B", lasting=False)
    if mutant:
        monkeypatch.setattr(
            Lease, "current", lambda lease: lease.state if lease.state and lease.state.trusting else None
        )
    moved = make_instance("A2", redis_url=other_redis)
    await moved.heartbeat.beat()
    await moved.store.append(new_append(session_id, "2"))

    assert (await said(left_behind, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c5_a_writer_waits_until_the_leases_on_the_old_primary_have_ended(
    make_instance: MakeInstance,
    a: Hybrid,
    other_redis: str,
    mutant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session_id = await session_of(a, "1")
    left_behind = make_instance("B", lasting=False)
    if mutant:
        monkeypatch.setattr(Lease, "hold_seconds", lambda _lease, _state: 0.0)
    moved = make_instance("A2", redis_url=other_redis)
    await moved.heartbeat.beat()
    await moved.store.append(new_append(session_id, "2"))

    assert (await said(left_behind, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c6_an_old_entry_is_validated_against_a_row_that_nobody_writes_to_meanwhile(
    a: Hybrid, b: Hybrid, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look, and then to bless: a write in between is blessed away."""
    session_id = await session_of(a, "1")
    state = a.lease.state
    assert state is not None
    new = await a.keeper.change(state, state)
    for instance in (a, b):
        instance.lease.learn(new, asked_at=math.inf)
    if mutant:
        without_row_locks(monkeypatch)
        without_watch(monkeypatch)
    b.cache.before_exec = gate = Gate()
    a.cache.publishes = False
    validating = asyncio.create_task(said(b, session_id))
    await gate.reached.wait()
    writing = asyncio.create_task(a.store.append(new_append(session_id, "2")))
    await asyncio.wait([writing], timeout=0.2)
    gate.open.set()
    await validating
    await writing

    assert (await said(b, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c7_a_primary_whose_content_went_back_is_another_redis_though_its_connections_live(
    make_instance: MakeInstance,
    database: Database,
    other_redis: str,
    mutant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """REPLICAOF and back: the run id and every TCP connection stay, the words do not."""
    if mutant:
        original = client_module._identity

        async def run_id_only(connection: Any) -> str | None:
            found = await original(connection)
            return found.partition("/")[0] if found else None

        monkeypatch.setattr(client_module, "_identity", run_id_only)
    with (
        TemporaryDirectory(prefix="chat-tests-") as folder,
        embedded_servers(Path(folder), postgres=False, durable=False, redis_port=0) as private,
    ):
        assert private.redis_url is not None
        reader, writer = (
            make_instance("B", redis_url=private.redis_url),
            make_instance("A", redis_url=private.redis_url),
        )
        await follow(writer)
        await reader.heartbeat.beat()
        session_id = await session_of(writer, "1")
        async with (
            Redis.from_url(private.redis_url, db=1) as primary,
            Redis.from_url(other_redis, db=1) as other,
        ):
            value = await primary.get(session_key(session_id))
            await other.set(session_key(session_id), value, px=100_000)
            await writer.store.append(new_append(session_id, "2"))
            host, _, port = other_redis.removeprefix("redis://").partition(":")
            await primary.execute_command("REPLICAOF", host, port)
            while (await primary.info("replication"))["master_link_status"] != "up":  # noqa: ASYNC110 - a server's
                await asyncio.sleep(0.01)
            await primary.execute_command("REPLICAOF", "NO", "ONE")
            await other.flushdb()
        await reader.heartbeat.beat()

        assert (await said(reader, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c8_a_new_socket_of_an_old_pool_proves_which_redis_it_leads_to(
    a: Hybrid,
    b: Hybrid,
    redis: Redis,
    other_redis: str,
    mutant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A verdict on the pool would be that of another socket."""
    create_redis = client_module.create_redis
    if mutant:
        monkeypatch.setattr(
            "app.redis_sessions.cache.create_redis",
            lambda url, *, identity, **options: create_redis(url, **options),  # noqa: PLW0108 - no identity
        )
    session_id = await session_of(a, "1")
    await said(b, session_id)
    async with Redis.from_url(other_redis, db=1) as other:
        await other.set(session_key(session_id), await redis.get(session_key(session_id)), px=100_000)
    await a.store.append(new_append(session_id, "2"))
    state = b.lease.state
    assert state is not None
    # The address leads elsewhere from now on, and the connections break.
    pool = b.cache._to(state).redis.connection_pool
    pool.connection_kwargs["port"] = int(other_redis.rpartition(":")[2])
    await pool.disconnect()
    for connection in (*pool._available_connections, *pool._in_use_connections):
        connection.port = pool.connection_kwargs["port"]

    assert (await said(b, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c9_a_fill_that_comes_late_loses_against_the_write_that_it_did_not_see(
    a: Hybrid, b: Hybrid, redis: Redis, database: Database, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row lock is gone with its transaction; its EXEC is still on the way."""
    session_id = await session_of(a, "1")
    await redis.delete(session_key(session_id))
    if mutant:
        without_watch(monkeypatch)
    b.cache.before_exec = gate = Gate()
    filling = asyncio.create_task(said(b, session_id))
    await gate.reached.wait()
    await end_transactions_of("B", database)
    a.cache.publishes = False
    await a.store.append(new_append(session_id, "2"))
    gate.open.set()
    with suppress(ChatError):
        await filling

    assert (await said(a, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c10_two_writers_that_marked_the_same_number_are_told_apart(
    a: Hybrid, b: Hybrid, redis: Redis, database: Database, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validator saw the first one's mark, rolled back; it must not clear the second one's."""
    session_id = await session_of(a, "1")
    state = a.lease.state
    assert state is not None
    row, _ = await a.durable.lookup(session_id)
    assert row is not None
    marked = replace(row, session=replace(row.session, message_count=2))
    await a.cache.mark([(row, marked)], state, token="1" * 16)
    if mutant:
        without_watch(monkeypatch)
    b.cache.before_exec = gate = Gate()
    validating = asyncio.create_task(said(b, session_id))
    await gate.reached.wait()
    await end_transactions_of("B", database)
    a.cache.publishes = False
    await a.store.append(new_append(session_id, "2"))
    gate.open.set()
    with suppress(ChatError):
        await validating

    assert (await said(a, session_id) == ["1", "2"]) is not mutant


class ForgetfulStore(PostgresChatSessionStore):
    """The commit is done, its reply is lost."""

    async def commit(self, appends: Sequence[Append], fence: Any, *, waits: bool) -> Any:
        await super().commit(appends, fence, waits=waits)
        raise CommitUnknown


@versions
async def test_c11_a_commit_whose_reply_was_lost_is_seen_by_all_or_by_none(
    a: Hybrid, b: Hybrid, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await session_of(a, "1")
    if mutant:
        without_marks(monkeypatch)
    a.store._durable = ForgetfulStore(a.durable._database, ttl_seconds=3600)
    with pytest.raises(CommitUnknown):
        await a.store.append(keyed_append(session_id, "key", "2"))
    retried = await b.store.append(keyed_append(session_id, "key", "2"))

    assert retried.replayed
    assert (await said(b, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c12_what_redis_holds_alone_is_adopted_not_thrown_away(
    a: Hybrid, b: Hybrid, redis: Redis, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that was acknowledged in Redis-only mode, and a write in hybrid mode that finds another seq."""
    session_id = await session_of(a, "1")
    row, _ = await a.durable.lookup(session_id)
    assert row is not None
    known = (await a.store.read_history(session_id, max_messages=1)).lines[0]
    theirs = replace(row, owner="redis", session=replace(row.session, message_count=2))
    lines = (known, new_message("in Redis alone").line(2))
    await redis.set(session_key(session_id), encode(theirs, epoch="0" * 16, lines=lines), px=100_000)
    if mutant:
        text = client_module.script_text
        patched = {name: text(name).replace("return 'redis-owned'", "") for name in ("mark", "publish")}
        monkeypatch.setattr(
            client_module, "_script", lambda name: (patched[name], sha1(patched[name].encode()).hexdigest())
        )
    await b.store.append(new_append(session_id, "3"))

    assert (await said(a, session_id) == ["1", "in Redis alone", "3"]) is not mutant


@versions
async def test_c13_messages_are_adopted_by_their_ids_not_by_their_numbers(
    a: Hybrid, redis: Redis, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis began at 1 again, PostgreSQL has a 1 and a 2 of its own."""
    session_id = await session_of(a, "1", "2")
    theirs = new_row(session_id, message_count=2, owner="redis")
    lines = [new_message(text).line(seq) for seq, text in enumerate(("x", "y"), 1)]
    await redis.set(session_key(session_id), encode(theirs, epoch="0" * 16, lines=lines), px=100_000)
    if mutant:
        by_id = statements.MESSAGES_BY_ID
        monkeypatch.setattr(
            statements,
            "MESSAGES_BY_ID",
            by_id.replace("SELECT message_id", "SELECT ($3::uuid[])[seq] AS message_id").replace(
                "message_id = ANY($3::uuid[])", "seq <= cardinality($3::uuid[])"
            ),
        )

    assert (await said(a, session_id) == ["1", "2", "x", "y"]) is not mutant


@versions
async def test_c13_histories_of_equal_length_are_told_apart(
    a: Hybrid, redis: Redis, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failover of PostgreSQL that lost a commit: Redis has another second message."""
    session_id = await session_of(a, "1", "2")
    row, _ = await a.durable.lookup(session_id)
    assert row is not None
    known = (await a.store.read_history(session_id, max_messages=2)).lines[0]
    lost = replace(row, chain=b"another!")
    await redis.set(
        session_key(session_id),
        encode(lost, epoch="0" * 16, lines=(known, new_message("lost").line(2))),
        px=100_000,
    )
    if mutant:
        monkeypatch.setattr(
            Entry, "equals", lambda entry, row: entry.session.message_count == row.session.message_count
        )

    assert (await said(a, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c14_a_retry_that_crosses_from_redis_to_postgresql_is_recognised(
    a: Hybrid, redis: Redis, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt was acknowledged in Redis-only mode."""
    session_id = await session_of(a, "1")
    append = keyed_append(session_id, "key", "2")
    row, _ = await a.durable.lookup(session_id)
    assert row is not None
    known = (await a.store.read_history(session_id, max_messages=1)).lines[0]
    theirs = replace(row, owner="redis", session=replace(row.session, message_count=2))
    await redis.set(
        session_key(session_id),
        encode(theirs, epoch="0" * 16, lines=(known, append.messages[0].line(2))),
        px=100_000,
    )
    if mutant:
        # Ids of the store's own in place of those that the key gives.
        append = replace(
            append, messages=tuple(replace(one, message_id=new_uuid()) for one in append.messages)
        )
    await a.store.append(append)

    assert (await said(a, session_id) == ["1", "2"]) is not mutant


@versions
async def test_c15_a_session_that_is_being_created_can_hide_no_append(
    a: Hybrid, b: Hybrid, redis: Redis, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that caches the new session is late: it comes after the first message and an eviction."""
    late: list[bytes] = []

    async def to_be_late(self: RedisSessionCache, rows: Any, state: CacheState, *, token: str) -> None:
        (row,) = rows
        pending = 0 if mutant else row.session.message_count + 1
        late.append(encode(row, epoch=state.epoch, lines=(), pending=pending, token=token))
        raise CacheOutage("no answer in time")

    real = RedisSessionCache.skeleton
    monkeypatch.setattr(RedisSessionCache, "skeleton", to_be_late)
    session_id = await session_of(a, "1")
    monkeypatch.setattr(RedisSessionCache, "skeleton", real)
    await redis.delete(session_key(session_id))
    await redis.set(session_key(session_id), late[0], px=100_000, nx=True)

    assert (await said(b, session_id) == ["1"]) is not mutant
    # What is late here is what the product sends.
    created = await a.store.create_session("user123")
    state = a.lease.state
    assert state is not None
    await a.cache.remove(created.session.session_id, state)
    row, _ = await a.durable.lookup(created.session.session_id)
    assert row is not None
    await a.cache.skeleton([row], state, token="1" * 16)
    value = await redis.get(session_key(created.session.session_id))
    skeleton = decode(value, created.session.session_id)
    assert isinstance(skeleton, Entry)
    assert skeleton.dirty
