"""`chat-sessions mode` and `adopt`, starts with another flag, and what a service does by itself."""

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner

from app import wiring
from app.cli.main import app
from app.coherence.lease import Lease
from app.coherence.ports import EPOCH_ZERO, CacheOutage
from app.embedded import embedded_servers
from app.errors import (
    AdoptionPending,
    DurableStoreUnavailable,
    ModeRefused,
    RedisUnavailable,
    SessionNotFound,
    StartRefused,
)
from app.maintenance import backfill as backfill_module
from app.maintenance import modes as modes_module
from app.maintenance.backfill import Tally, elected
from app.maintenance.modes import permit_redis_only, set_mode
from app.postgres.engine import Database
from app.redis_sessions.codec import FIELDS, encode
from app.redis_sessions.keys import session_key
from app.redis_sessions.scan import scan_sessions
from app.settings import Settings
from app.store import Append, ChatSessionStore
from app.tasks import stop
from app.wiring import Runtime, backfill_of, open_database, open_redis, open_runtime, open_stores
from tests.factories import guide_value, new_append, new_message, new_row
from tests.integration.processes import command, environment, eventually, one_line, run

pytestmark = pytest.mark.anyio

CLOSED = "redis://127.0.0.1:1"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter leases, which a change of the mode waits out, and shorter pauses of what runs in the background."""
    monkeypatch.setattr(wiring, "Lease", partial(Lease, seconds=0.2))
    monkeypatch.setattr(backfill_module, "_EVERY_SECONDS", 0.2)


@pytest.fixture
async def noeviction(redis: Redis) -> AsyncIterator[None]:
    """The policy with which Redis may be the only truth."""
    async with configured(redis, {"maxmemory-policy": "noeviction"}):
        yield


@pytest.fixture
async def eviction(redis: Redis) -> AsyncIterator[None]:
    """A cache, bounded and on no disk, which a Redis that was given to the tests may not be."""
    cache = {"maxmemory-policy": "volatile-ttl", "maxmemory": "256mb", "appendonly": "no"}
    async with configured(redis, cache):
        yield


@asynccontextmanager
async def configured(redis: Redis, wanted: Mapping[str, str]) -> AsyncIterator[None]:
    before = {name: (await redis.config_get(name))[name] for name in wanted}
    for name, value in wanted.items():
        await redis.config_set(name, value)
    yield
    for name, value in before.items():
        await redis.config_set(name, value)


@pytest.fixture
def environ(settings: Settings, tmp_path: Any) -> dict[str, str]:
    return {
        "DATABASE_URL": settings.database_url or "",
        "REDIS_URL": settings.redis_url or "",
        "DATA_DIR": str(tmp_path),
    }


class Done:
    def __init__(self, result: Any) -> None:
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Awaitable[Done]]


@pytest.fixture
def call(environ: dict[str, str]) -> Call:
    """A command as from a shell, but in a thread of ours: a process of its own takes a second to import."""

    async def call(*words: str, **settings: str) -> Done:
        return Done(await asyncio.to_thread(CliRunner().invoke, app, words, env=environ | settings))

    return call


@asynccontextmanager
async def two(settings: Settings) -> AsyncIterator[list[Runtime]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_runtime(settings)) for _ in range(2)]


async def texts(store: ChatSessionStore, session_id: UUID) -> list[str]:
    history = await store.read_history(session_id, max_messages=1000)
    return [message.content for message in history.messages]


async def session_of(store: ChatSessionStore, *contents: str, user_id: str = "user123") -> UUID:
    session_id = (await store.create_session(user_id)).session.session_id
    for content in contents:
        await store.append(new_append(session_id, content))
    return session_id


async def put_redis_owned(redis: Redis, *contents: str, first_seq: int = 1) -> UUID:
    """A session as Redis-only mode without a database leaves it."""
    row = new_row(owner="redis", message_count=first_seq + len(contents) - 1)
    lines = [new_message(text).line(seq) for seq, text in enumerate(contents, first_seq)]
    await redis.set(session_key(row.session.session_id), encode(row, epoch=EPOCH_ZERO, lines=lines), ex=1000)
    return row.session.session_id


async def put_guides(redis: Redis, *contents: str) -> UUID:
    session_id = uuid4()
    await redis.set(session_key(session_id), guide_value(session_id, *contents), ex=1000)
    return session_id


async def put_unadoptable(redis: Redis) -> UUID:
    return await put_guides(redis, "a\0b")


async def owners(redis: Redis) -> set[bytes]:
    at = FIELDS["owner"][0]
    return {await redis.getrange(key, at, at) for key in await redis.keys("session:*")}


async def mode_row(database: Database) -> str | None:
    async with database.connection() as conn:
        mode: str | None = await conn.fetchval("SELECT mode FROM chat.cache_state")
    return mode


async def reaches(probe: Callable[[], Awaitable[Any]], seconds_max: float = 15) -> Any:
    deadline = time.monotonic() + seconds_max
    while not (value := await probe()) and time.monotonic() < deadline:  # noqa: ASYNC110 - others have no event of ours
        await asyncio.sleep(0.02)
    return value


# `mode`


async def test_mode_says_what_is_and_changes_nothing(
    call: Call, settings: Settings, database: Database
) -> None:
    unset = await call("mode", "--json")
    assert (unset.code, await mode_row(database)) == (0, None)
    assert unset.json["mode"].startswith("not set yet")

    async with open_runtime(settings):
        said = await call("mode", "--json")
        plain = await call("mode")

    assert (said.code, said.json["mode"], said.json["cache"], said.json["instances"]) == (
        0,
        "hybrid",
        "on",
        1,
    )
    assert "mode\thybrid\n" in plain.out


@pytest.mark.usefixtures("eviction")
async def test_redis_only_is_refused_on_a_redis_that_evicts(
    call: Call, settings: Settings, database: Database
) -> None:
    before = await state_row(database)

    done = await call("mode", "redis-only")

    assert (done.code, done.out) == (1, "")
    assert "maxmemory-policy is volatile-ttl" in done.err
    assert "--accept-eviction" in done.err
    assert await state_row(database) == before


async def state_row(database: Database) -> Any:
    async with database.connection() as conn:
        return await conn.fetchrow("SELECT * FROM chat.cache_state")


@pytest.mark.usefixtures("eviction")
async def test_eviction_can_be_accepted_and_is_warned_of(
    call: Call, database: Database, settings: Settings
) -> None:
    done = await call("mode", "redis-only", "--accept-eviction", "--json")

    assert (done.code, done.json["mode"], done.json["before"]) == (0, "redis-only", "hybrid")
    assert len(done.json["warnings"]) == 2
    assert "append-only file is off" in done.err
    assert await mode_row(database) == "redis-only"


def test_what_redis_must_be_to_be_the_only_truth() -> None:
    well = {"role": "master", "maxmemory": 1, "maxmemory_policy": "noeviction", "aof_enabled": 1}

    assert permit_redis_only(well, accept_eviction=False) == []
    assert (
        permit_redis_only(well | {"maxmemory": 0, "maxmemory_policy": "allkeys-lru"}, accept_eviction=False)
        == []
    )
    for wrong in (
        {"role": "slave"},
        {"maxmemory_policy": "allkeys-lru"},
        {"maxmemory_policy": "volatile-lru"},
    ):
        with pytest.raises(ModeRefused):
            permit_redis_only(well | wrong, accept_eviction=False)
    with pytest.raises(ModeRefused):
        permit_redis_only(well | {"role": "slave"}, accept_eviction=True)


async def test_a_redis_that_is_out_is_refused_and_nothing_changes(
    call: Call, settings: Settings, database: Database
) -> None:
    async with open_runtime(settings):
        before = await state_row(database)

        done = await call("mode", "redis-only", REDIS_URL=CLOSED)

        assert (done.code, done.out) == (1, "")
        assert "does not answer" in done.err
        assert "start Redis" in done.err
        assert await state_row(database) == before


async def test_hybrid_where_it_is_hybrid_says_so(call: Call, settings: Settings, redis: Redis) -> None:
    async with open_runtime(settings) as runtime:
        await session_of(runtime.store, "a")

        done = await call("mode", "hybrid")

    assert (done.code, done.out, done.err) == (0, "mode hybrid, as before\n", "")


async def test_both_ways_while_two_instances_serve(
    call: Call, settings: Settings, redis: Redis, database: Database, noeviction: None
) -> None:
    async with two(settings) as (a, b):
        old = await session_of(a.store, "1", "2")
        there = await call("mode", "redis-only")
        await reaches(lambda: all_in([a, b], "redis-only"))
        await b.store.append(new_append(old, "3"))
        new = await session_of(b.store, "x")
        in_redis = await owners(redis)

        back = await call("mode", "hybrid", "--json")
        await reaches(lambda: all_in([a, b], "hybrid"))

        assert (there.code, there.out) == (0, "mode redis-only, was hybrid\n")
        assert in_redis == {b"r"}
        assert back.code == 0, back.err
        assert (back.json["mode"], back.json["before"]) == ("hybrid", "redis-only")
        assert (back.json["sessions_adopted"], back.json["messages_added"]) == (2, 2)
        assert await texts(a.store, old) == ["1", "2", "3"]
        assert await texts(a.store, new) == ["x"]
        assert await owners(redis) == {b"p"}
        assert await owned_by_redis(database) == 0


@pytest.mark.usefixtures("noeviction", "database")
async def test_a_process_without_redis_refuses_in_redis_only_mode_and_writes_again_after_it(
    call: Call, settings: Settings
) -> None:
    without_redis = settings.model_copy(update={"enable_redis_sessions": False})
    async with open_runtime(settings) as with_redis, open_runtime(without_redis) as without:
        session_id = await session_of(with_redis.store, "1")
        for turn in (2, 3):
            # It is the cache of the other one that has to be given up before this is durable.
            await reaches(partial(is_read_from_redis, with_redis, session_id))
            await without.store.append(new_append(session_id, str(turn)))
            assert len(await texts(with_redis.store, session_id)) == turn

        assert (await call("mode", "redis-only")).code == 0
        with pytest.raises(DurableStoreUnavailable, match="this process serves without Redis") as refused:
            await without.store.append(new_append(session_id, "refused"))
        assert refused.value.hint == "set ENABLE_REDIS_SESSIONS=true and restart it"

        assert (await call("mode", "hybrid")).code == 0
        await without.store.append(new_append(session_id, "4"))
        assert await texts(with_redis.store, session_id) == ["1", "2", "3", "4"]


async def is_read_from_redis(runtime: Runtime, session_id: UUID) -> bool:
    return (await runtime.store.read_history(session_id, max_messages=5)).source == "redis"


async def all_in(runtimes: list[Runtime], mode: str) -> bool:
    return {runtime.mode for runtime in runtimes} == {mode}


async def owned_by_redis(database: Database) -> int:
    async with database.connection() as conn:
        count: int = await conn.fetchval("SELECT count(*) FROM chat.chat_sessions WHERE owner = 'redis'")
    return count


async def test_what_can_not_be_adopted_holds_the_mode_and_is_named_and_left_alone(
    call: Call, redis: Redis, database: Database, settings: Settings
) -> None:
    nul, torn, well = (
        await put_unadoptable(redis),
        await put_redis_owned(redis, "a"),
        await put_guides(redis, "a"),
    )
    await redis.setrange(session_key(torn), FIELDS["seq"][0], "0000000009")
    junk = uuid4()
    await redis.set(session_key(junk), '{"a": 1}', ex=1000)
    before = [await redis.get(session_key(one)) for one in (nul, torn, junk)]

    done = await call("mode", "hybrid", "--json")
    plain = await call("adopt")

    conflicts = done.json["conflicts"]
    assert (done.code, plain.code, done.json["mode"], done.json["sessions_adopted"]) == (1, 1, "draining", 1)
    assert set(conflicts["sessions"]) == {str(nul), str(torn), str(junk)}
    assert "0x00" in conflicts["sessions"][str(nul)]
    assert str(nul) in plain.out
    assert "Traceback" not in done.err + plain.err
    assert [await redis.get(session_key(one)) for one in (nul, torn, junk)] == before
    assert await mode_row(database) == "draining"

    await redis.delete(*(session_key(one) for one in (nul, torn, junk)))
    mended = await call("mode", "hybrid")

    assert (mended.code, mended.out) == (0, "mode hybrid, was draining\n")
    async with open_runtime(settings) as runtime:
        assert await texts(runtime.store, well) == ["a"]


async def test_what_window_and_time_took_is_reported_by_session(
    call: Call, settings: Settings, redis: Redis, noeviction: None
) -> None:
    ours = settings.model_copy(update={"session_max_messages": 2})
    async with open_runtime(ours) as runtime:
        kept, expired = await session_of(runtime.store, "1"), await session_of(runtime.store, "1", "2")
        await call("mode", "redis-only", SESSION_MAX_MESSAGES="2")
        await reaches(lambda: all_in([runtime], "redis-only"))
        for text in "2345":
            await runtime.store.append(new_append(kept, text))
        await runtime.store.append(new_append(expired, "3"))
        await redis.delete(session_key(expired))

        done = await call("mode", "hybrid", "--json", SESSION_MAX_MESSAGES="2")
        await reaches(lambda: all_in([runtime], "hybrid"))

        assert (done.code, done.json["messages_gone"]) == (0, 2)
        assert done.json["gone"] == {"count": 1, "sessions": {str(kept): "2 messages"}}
        assert done.json["expired"] == {"count": 1, "sessions": {str(expired): "2 messages in PostgreSQL"}}
        assert await texts(runtime.store, kept) == ["1", "4", "5"]
        assert await texts(runtime.store, expired) == ["1", "2"]


@pytest.fixture
def another_redis() -> Iterator[str]:
    with TemporaryDirectory(prefix="chat-modes-") as name:
        Path(name).chmod(0o711)
        with embedded_servers(Path(name), durable=False, postgres=False, redis_port=0) as servers:
            yield servers.redis_url or ""


async def test_a_command_with_another_redis_is_refused_and_nothing_is_given_up(
    call: Call, settings: Settings, database: Database, another_redis: str, noeviction: None
) -> None:
    """There every session that Redis owns would look expired."""
    other = settings.model_copy(update={"redis_url": another_redis})
    async with open_runtime(settings) as runtime:
        session_id = await session_of(runtime.store, "1")
        hybrid = [
            await call(*words, REDIS_URL=another_redis)
            for words in (("mode", "hybrid"), ("adopt",), ("mode", "redis-only", "--accept-eviction"))
        ]
        assert await mode_row(database) == "hybrid"
        await call("mode", "redis-only")
        await reaches(lambda: all_in([runtime], "redis-only"))
        await runtime.store.append(new_append(session_id, "2"))
        async with open_stores(other, follows=False) as stores, open_redis(other) as bounded:
            with pytest.raises(RedisUnavailable, match="leads to another Redis"):
                await backfill_of(stores, bounded, patience_seconds=1).drain()
        back = await call("mode", "hybrid")
        await reaches(lambda: all_in([runtime], "hybrid"))

        assert [done.code for done in hybrid] == [1, 1, 1]
        assert all("leads to another Redis" in done.err for done in hybrid)
        assert back.code == 0, back.err
        assert await texts(runtime.store, session_id) == ["1", "2"]


async def test_a_return_to_redis_only_first_ends_the_drain(
    call: Call, settings: Settings, redis: Redis, database: Database, noeviction: None
) -> None:
    """An entry that Redis owned before, as an old snapshot has it, would hide what PostgreSQL was told since."""
    async with open_runtime(settings) as runtime:
        session_id = await session_of(runtime.store, "a", "b")
        history = await runtime.store.read_history(session_id, max_messages=2)
        row = new_row(session_id, owner="redis", message_count=1)
        old = encode(row, epoch=EPOCH_ZERO, lines=history.lines[:1])
        await redis.set(session_key(session_id), old, ex=1000)

        done = await call("mode", "redis-only", "--json")
        await reaches(lambda: all_in([runtime], "redis-only"))

        assert (done.code, done.json["mode"]) == (0, "redis-only")
        await runtime.store.append(new_append(session_id, "c"))
        assert await texts(runtime.store, session_id) == ["a", "b", "c"]


# `adopt`


async def test_a_guides_deployment_is_adopted_and_adopting_it_again_changes_nothing(
    call: Call, settings: Settings, redis: Redis, database: Database
) -> None:
    guides = [await put_guides(redis, "a", "b", str(number)) for number in range(30)]

    first = await call("adopt", "--json")
    again = await call("adopt", "--json")
    for session_id in guides[:5]:
        await redis.set(session_key(session_id), guide_value(session_id, "a", "b", "new"), ex=1000)
    more = await call("adopt", "--json")

    assert (first.code, first.json["mode"], first.json["sessions_adopted"]) == (0, "hybrid", 30)
    assert (first.json["messages_added"], first.json["messages_known"]) == (90, 0)
    assert (again.code, again.json["sessions_adopted"], again.json["messages_added"]) == (0, 0, 0)
    assert (more.code, more.json["sessions_adopted"]) == (0, 5)
    async with open_runtime(settings) as runtime:
        assert runtime.mode == "hybrid"
        assert await texts(runtime.store, guides[7]) == ["a", "b", "7"]


async def test_adopt_is_refused_in_redis_only_mode_and_on_a_database_without_the_schema(
    call: Call, settings: Settings, noeviction: None, unmigrated_url: str
) -> None:
    await call("mode", "redis-only")

    refused = await call("adopt")
    unmigrated = await call("adopt", DATABASE_URL=unmigrated_url)

    assert (refused.code, unmigrated.code) == (1, 1)
    assert "chat-sessions mode hybrid" in refused.err
    assert "chat-sessions migrate" in unmigrated.err


@pytest.fixture
async def unmigrated_url(servers: Any) -> AsyncIterator[str]:
    from tests.databases import new_database

    async with new_database(servers, "chat_modes") as url:
        yield url


async def test_an_adoption_that_is_stopped_goes_on_where_it_was(
    settings: Settings, redis: Redis, database: Database
) -> None:
    for number in range(40):
        await put_guides(redis, str(number))
    async with open_stores(settings) as stores, open_redis(settings) as bounded:
        slow = backfill_of(stores, bounded, per_second=100)
        enough = asyncio.Event()

        def stop_after_some(tally: Tally) -> None:
            if tally.sessions_adopted >= 10:
                enough.set()

        adopting = asyncio.create_task(slow.drain(report=stop_after_some))
        await enough.wait()
        await stop(adopting)
        left_in = await mode_row(database)

        tally = await backfill_of(stores, bounded).drain()

        assert left_in == "draining"
        assert 0 < tally.sessions_adopted <= 30
        assert tally.messages_known <= 4
        assert await owners(redis) == {b"p"}
        assert await mode_row(database) == "hybrid"
        async with database.connection() as conn:
            assert await conn.fetchval("SELECT count(*) FROM chat.chat_messages") == 40


async def test_a_ctrl_c_leaves_a_mode_that_serves_and_says_how_to_go_on(
    environ: dict[str, str], redis: Redis, database: Database, tmp_path: Any
) -> None:
    for number in range(60):
        await put_guides(redis, str(number))

    def interrupted() -> tuple[int, str, str]:
        words = command("mode", "hybrid", "--per-second", "20")
        with subprocess.Popen(
            words,
            cwd=tmp_path,
            env=environment(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            eventually(lambda: asyncio.run(some_adopted(environ["REDIS_URL"])))
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    code, out, err = await asyncio.to_thread(interrupted)
    assert (code, out) == (130, ""), err
    assert "`chat-sessions mode hybrid`" in err
    assert "Traceback" not in err
    assert await mode_row(database) == "draining"

    done = await asyncio.to_thread(run, "mode", "hybrid", "--json", cwd=tmp_path, **environ)
    assert (done.returncode, json.loads(done.stdout)["mode"]) == (0, "hybrid")
    assert await owners(redis) == {b"p"}


async def some_adopted(redis_url: str) -> bool:
    async with Redis.from_url(redis_url, db=1) as redis:
        return b"p" in await owners(redis)


@pytest.mark.usefixtures("eviction")
async def test_a_refusal_is_one_line_from_a_shell_too(environ: dict[str, str], tmp_path: Any) -> None:
    done = await asyncio.to_thread(run, "mode", "redis-only", cwd=tmp_path, **environ)

    assert "maxmemory-policy is volatile-ttl" in one_line(done)


# A start


async def test_a_start_with_another_flag_changes_the_mode_where_nobody_else_serves(
    settings: Settings, database: Database, redis: Redis, noeviction: None
) -> None:
    off, on = (settings.model_copy(update={"redis_only_mode": flag}) for flag in (False, True))
    async with open_runtime(off) as runtime:
        session_id = await session_of(runtime.store, "1")
    async with open_runtime(on) as runtime:
        assert runtime.mode == "redis-only"
        await runtime.store.append(new_append(session_id, "2"))
    async with open_runtime(off) as runtime:
        assert runtime.mode == "draining"
        assert await texts(runtime.store, session_id) == ["1", "2"]
        assert await reaches(lambda: all_in([runtime], "hybrid"))
    assert await mode_row(database) == "hybrid"


async def test_a_start_with_another_flag_is_refused_while_others_serve(
    settings: Settings, database: Database, noeviction: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes_module, "GONE_AFTER_SECONDS", 0)
    async with open_runtime(settings):
        with pytest.raises(StartRefused, match="run `chat-sessions mode redis-only`"):
            async with open_runtime(settings.model_copy(update={"redis_only_mode": True})):
                pass

        assert await mode_row(database) == "hybrid"


@pytest.mark.usefixtures("eviction")
async def test_a_start_does_not_go_to_redis_only_on_a_redis_that_evicts(
    settings: Settings, database: Database
) -> None:
    async with open_runtime(settings):
        pass

    with pytest.raises(StartRefused, match="--accept-eviction"):
        async with open_runtime(settings.model_copy(update={"redis_only_mode": True})):
            pass

    assert await mode_row(database) == "hybrid"


async def test_a_start_that_finds_sessions_of_redis_drains_while_it_serves(
    settings: Settings, database: Database, redis: Redis
) -> None:
    """The flag was toggled by a restart, without a database in between; and a guide's deployment."""
    without = settings.model_copy(update={"database_url": None, "redis_only_mode": True})
    async with open_runtime(without) as runtime:
        toggled = await session_of(runtime.store, "a", "b")
    guides = await put_guides(redis, "c")

    async with open_runtime(settings) as runtime:
        assert await mode_row(database) == "draining"
        assert await texts(runtime.store, toggled) == ["a", "b"]
        assert await reaches(lambda: all_in([runtime], "hybrid"))

    assert await owners(redis) == {b"p"}
    async with database.connection() as conn:
        found = await conn.fetch("SELECT session_id FROM chat.chat_sessions WHERE owner = 'postgres'")
    assert {one["session_id"] for one in found} == {toggled, guides}


async def test_a_cached_session_goes_on_without_a_database_and_comes_back_to_it(
    settings: Settings, database: Database, redis: Redis
) -> None:
    async with open_runtime(settings) as runtime:
        session_id = await session_of(runtime.store, "a")
        assert await reaches(lambda: is_cached(runtime, session_id))
    without = settings.model_copy(update={"database_url": None, "redis_only_mode": True})
    async with open_runtime(without) as runtime:
        assert await texts(runtime.store, session_id) == ["a"]
        await runtime.store.append(new_append(session_id, "b"))
        assert await texts(runtime.store, session_id) == ["a", "b"]
        assert await owners(redis) == {b"r"}

    async with open_runtime(settings) as runtime:
        assert await reaches(lambda: all_in([runtime], "hybrid"))
        assert await texts(runtime.store, session_id) == ["a", "b"]
    async with database.connection() as conn:
        assert await conn.fetchval("SELECT message_count FROM chat.chat_sessions") == 2


async def is_cached(runtime: Runtime, session_id: UUID) -> bool:
    return (await runtime.store.read_history(session_id, max_messages=1)).source == "redis"


async def test_what_the_first_look_did_not_see_is_found_while_serving(
    settings: Settings, database: Database, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sees_nothing(_redis: Any) -> bool:
        return False

    monkeypatch.setattr(modes_module, "holds_some_for_itself", sees_nothing)
    await put_guides(redis, "c")

    async with open_runtime(settings) as runtime:
        assert await mode_row(database) == "hybrid"
        assert await reaches(lambda: adopted_and_hybrid(runtime, redis, database))


async def adopted_and_hybrid(runtime: Runtime, redis: Redis, database: Database) -> bool:
    return await owners(redis) == {b"p"} and await mode_row(database) == "hybrid"


async def test_conflicts_hold_a_drain_that_a_start_began_and_the_log_names_them(
    settings: Settings, database: Database, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    nul, well = await put_unadoptable(redis), await put_guides(redis, "a")

    async with open_runtime(settings) as runtime:
        assert await reaches(lambda: logged(caplog, "can't be taken over"))
        assert await mode_row(database) == "draining"
        with pytest.raises(AdoptionPending, match="can't store it"):
            await texts(runtime.store, nul)
        assert await texts(runtime.store, well) == ["a"]

    assert str(nul) in caplog.text
    assert all(record.levelname != "ERROR" for record in caplog.records)


async def logged(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text


async def test_one_instance_at_a_time_is_elected(settings: Settings) -> None:
    def open_lock() -> Any:
        return open_database(settings)

    async with elected(open_lock) as first, elected(open_lock) as second:
        assert (first, second) == (True, False)
    async with elected(open_lock) as third:
        assert third


async def test_the_holder_of_the_election_may_idle_longer_than_other_transactions(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.postgres import engine

    monkeypatch.setitem(
        engine._BEGIN, "none", "BEGIN; SET LOCAL idle_in_transaction_session_timeout = '100ms'"
    )
    async with elected(lambda: open_database(settings)) as first:
        await asyncio.sleep(0.3)
        async with elected(lambda: open_database(settings)) as second:
            assert (first, second) == (True, False)


# The walk


async def test_a_walk_sees_every_key_and_whose_it_is(settings: Settings, redis: Redis) -> None:
    owned = {await put_redis_owned(redis, "a") for _ in range(3)}
    guides = {await put_guides(redis, "a") for _ in range(1200)}
    async with open_runtime(settings.model_copy(update={"redis_only_mode": None})) as runtime:
        ours = {await session_of(runtime.store, "a")}
    upper = f"session:{str(uuid4()).upper()}"
    await redis.set(upper, '{"a": 1}')
    await redis.set("session:abc", '{"a": 1}')
    await redis.lpush(session_key(uuid4()), "a")
    await redis.set("other:key", '{"a": 1}')

    seen, biggest = [], 0
    async with open_redis(settings) as bounded:
        async for batch in scan_sessions(bounded, keys_per_step=100):
            seen += batch
            biggest = max(biggest, len(batch))

    by_kind: dict[str, set[UUID | None]] = {}
    for one in seen:
        by_kind.setdefault(one.kind, set()).add(one.session_id)
    assert by_kind["postgres"] >= ours
    assert by_kind["redis"] | by_kind["postgres"] >= owned
    assert by_kind["guide"] | by_kind["postgres"] >= guides
    assert {one.key for one in seen if not one.adoptable} >= {upper, "session:abc"}
    assert "other:key" not in {one.key for one in seen}
    assert biggest <= 100


async def test_a_session_that_keeps_failing_is_a_conflict_and_the_others_are_adopted(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = await put_guides(redis, "a"), await put_guides(redis, "b")
    async with open_stores(settings) as stores, open_redis(settings) as bounded:
        hybrid = stores.hybrid
        adopt = hybrid.adopt

        async def fails(session_id: UUID) -> Any:
            if session_id == bad:
                raise AdoptionPending("its row hangs")
            return await adopt(session_id)

        monkeypatch.setattr(hybrid, "adopt", fails)
        tally = await backfill_of(stores, bounded).drain()
        monkeypatch.undo()

        assert tally.conflicts.shown == {str(bad): "could not be taken over: its row hangs"}
        assert await texts(hybrid, good) == ["b"]
        assert await texts(hybrid, bad) == ["a"]


async def test_a_session_that_fails_once_is_no_conflict(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await put_guides(redis, "a")
    async with open_stores(settings) as stores, open_redis(settings) as bounded:
        hybrid = stores.hybrid
        adopt, failures = hybrid.adopt, [AdoptionPending("its row hangs")]

        async def fails_once(session_id: UUID) -> Any:
            if failures:
                raise failures.pop()
            return await adopt(session_id)

        monkeypatch.setattr(hybrid, "adopt", fails_once)
        tally = await backfill_of(stores, bounded).drain()

        assert (tally.sessions_adopted, tally.conflicts.count) == (1, 0)
        assert (await stores.keeper.read()).mode == "hybrid"
        assert await texts(hybrid, session_id) == ["a"]


async def test_a_drain_that_ends_after_somebody_has_changed_the_mode_leaves_it(
    settings: Settings, redis: Redis
) -> None:
    async with open_stores(settings) as stores, open_redis(settings) as bounded:
        backfill = backfill_of(stores, bounded)
        rows = backfill._rows

        async def rows_and_a_change(*args: Any) -> int:
            found = await rows(*args)
            await set_mode(stores.keeper, stores.heartbeat, stores.lease, "redis-only")
            return found

        backfill._rows = rows_and_a_change
        with pytest.raises(ModeRefused, match="somebody else has changed the mode to redis-only"):
            await backfill.drain()

        assert (await stores.keeper.read()).mode == "redis-only"


async def test_a_change_of_the_mode_ends_when_no_lease_on_what_was_before_is_left(settings: Settings) -> None:
    async with open_stores(settings) as stores:
        await set_mode(stores.keeper, stores.heartbeat, stores.lease, "redis-only")

        state = await stores.keeper.read()
        assert (state.mode, state.settled) == ("redis-only", True)


async def test_what_appears_behind_a_walk_is_found_by_the_next(settings: Settings, redis: Redis) -> None:
    """Only a walk that found nothing was the last one."""
    first = await put_guides(redis, "a")
    async with open_stores(settings) as stores, open_redis(settings) as bounded:
        late: list[UUID] = []
        behind: list[asyncio.Task[UUID]] = []

        def report(tally: Tally) -> None:
            if tally.scanned and not behind:
                behind.append(asyncio.create_task(put_guides(redis, "b")))

        backfill = backfill_of(stores, bounded)
        rows = backfill._rows

        async def rows_after_that(*args: Any) -> int:
            late.extend(await asyncio.gather(*behind))
            return await rows(*args)

        backfill._rows = rows_after_that
        tally = await backfill.drain(report=report)

        assert tally.sessions_adopted == 2
        assert [await texts(stores.durable, one) for one in (first, *late[:1])] == [["a"], ["b"]]


async def test_a_short_outage_is_waited_out_and_the_backfill_goes_on(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await put_guides(redis, str(number)) for number in range(6)]
    async with open_stores(settings) as stores, open_redis(settings) as bounded:
        adopt = stores.hybrid.adopt
        outages = iter([CacheOutage("cut"), DurableStoreUnavailable("restarts")])

        async def fails_at_first(session_id: UUID) -> Any:
            if (outage := next(outages, None)) is not None:
                # Not in the very step in which it was asked: the others are waited for then.
                await asyncio.sleep(0.01)
                raise outage
            return await adopt(session_id)

        monkeypatch.setattr(stores.hybrid, "adopt", fails_at_first)

        tally = await asyncio.create_task(backfill_of(stores, bounded).drain())

        assert tally.sessions_adopted == len(ids)
        assert not tally.conflicts.count


async def test_reports_name_a_bounded_number_of_sessions(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setattr(backfill_module, "NAMED_MAX", 3)
    for _ in range(5):
        await put_unadoptable(redis)

    done = await call("adopt", "--json")
    plain = await call("adopt")

    assert (done.code, done.json["conflicts"]["count"], len(done.json["conflicts"]["sessions"])) == (1, 5, 3)
    assert "conflicts: 2 sessions more" in plain.out


async def test_a_session_unknown_to_both_is_not_found_while_draining(
    settings: Settings, redis: Redis
) -> None:
    async with open_runtime(settings) as runtime:
        stores = runtime.stores
        await set_mode(stores.keeper, stores.heartbeat, stores.lease, "draining")
        with pytest.raises(SessionNotFound):
            await runtime.store.append(Append(session_id=uuid4(), messages=(new_message("a"),)))
