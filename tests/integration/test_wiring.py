"""What a start makes of settings and a database, and that an end closes all of it."""

import asyncio
import socket
import time
from contextlib import AsyncExitStack, suppress
from functools import partial

import pytest
from redis.asyncio import Redis
from sqlalchemy import make_url

from app import __version__, wiring
from app.chat import new_uuid, utc_now
from app.embedded import embedded_servers
from app.errors import RedisUnavailable, StartRefused
from app.postgres.cache_state import GONE_AFTER_SECONDS
from app.postgres.partitions import MONTHS_AHEAD, existing_partitions, months_from, partition_name
from app.redis_sessions.keys import session_key
from app.wiring import open_runtime
from tests.contract.suite import new_session, texts
from tests.databases import empty, migrate, new_database
from tests.factories import guide_value, new_append

pytestmark = pytest.mark.anyio

CLOSED_PORT = "127.0.0.1:1"


@pytest.fixture
async def fresh(database):
    """A migrated database that no service has started on."""
    await empty(database)
    return database


@pytest.fixture
async def unmigrated_url(servers):
    async with new_database(servers, "chat_wiring") as url:
        yield url


async def set_state(database, **columns):
    """Changes columns of the one row of chat.cache_state, behind the back of everybody."""
    async with database.connection() as conn:
        for name, value in columns.items():
            await conn.execute(f"UPDATE chat.cache_state SET {name} = $1", value)


async def state_row(database):
    async with database.connection() as conn:
        return await conn.fetchrow("SELECT * FROM chat.cache_state")


async def mode_row(database):
    return (await state_row(database) or {}).get("mode")


async def epoch_row(database):
    return (await state_row(database))["epoch"]


async def instances(database):
    async with database.connection() as conn:
        return await conn.fetch("SELECT instance_id, version, protocol FROM chat.instances")


async def note_instance(database, *, seconds_ago):
    """As a process that was killed leaves it."""
    async with database.connection() as conn:
        await conn.execute(
            "INSERT INTO chat.instances VALUES ($1, '0', 1, now(), clock_timestamp() - make_interval(secs => $2))",
            new_uuid(),
            seconds_ago,
        )


@pytest.fixture
async def memory(redis):
    """Sets how Redis deals with memory, and puts back what it was."""
    before = await redis.config_get("maxmemory*")

    async def set_memory(**values):
        for name, value in values.items():
            await redis.config_set(name.replace("_", "-"), value)

    yield set_memory
    for name in ("maxmemory", "maxmemory-policy"):
        await redis.config_set(name, before[name])


@pytest.fixture
async def evicts_nothing(memory):
    """A Redis that may become the only truth."""
    await memory(maxmemory_policy="noeviction")


@pytest.fixture
def impatient(monkeypatch):
    """A start that others stand against asks twice within a second, not for as long as a crashed one looks alive."""
    monkeypatch.setattr("app.maintenance.modes.GONE_AFTER_SECONDS", 0)


def opened(settings, **overrides):
    return open_runtime(settings.model_copy(update=overrides))


async def served_mode(settings, **overrides):
    """Starts and ends; the mode that was served in between."""
    async with opened(settings, **overrides) as runtime:
        return runtime.mode


async def refused(settings, **overrides):
    with pytest.raises(StartRefused) as caught:
        await served_mode(settings, **overrides)
    return str(caught.value)


async def health_of(runtime):
    return {one.name: one.status for one in await runtime.health()}


# The mode


async def test_a_fresh_database_becomes_hybrid(settings, fresh):
    assert await mode_row(fresh) is None

    assert await served_mode(settings) == "hybrid"

    assert await mode_row(fresh) == "hybrid"


async def test_a_fresh_database_becomes_redis_only_where_the_flag_says_so(settings, fresh):
    assert await served_mode(settings, redis_only_mode=True) == "redis-only"

    assert await mode_row(fresh) == "redis-only"


async def test_without_a_flag_the_databases_mode_is_served(settings, fresh):
    await served_mode(settings, redis_only_mode=True)

    assert await served_mode(settings) == "redis-only"


async def test_a_flag_that_agrees_with_the_database_starts(settings, fresh):
    await served_mode(settings)

    assert await served_mode(settings, redis_only_mode=False) == "hybrid"


async def test_the_only_instance_changes_the_mode_as_it_starts_and_back_and_loses_nothing(
    settings, fresh, evicts_nothing
):
    async with opened(settings) as runtime:
        first = await new_session(runtime.store, "a")
        assert runtime.mode == "hybrid"

    async with opened(settings, redis_only_mode=True) as runtime:
        assert (runtime.mode, await mode_row(fresh)) == ("redis-only", "redis-only")
        assert await texts(runtime.store, first) == ["a"]
        await runtime.store.append(new_append(first, "b"))
        second = await new_session(runtime.store, "c")

    async with opened(settings, redis_only_mode=False) as runtime:
        # PostgreSQL takes over what is left while this one serves.
        assert runtime.mode in {"draining", "hybrid"}
        assert await texts(runtime.store, first) == ["a", "b"]
        assert await texts(runtime.store, second) == ["c"]
        assert await texts(runtime.stores.durable, first) == ["a", "b"]
        assert await texts(runtime.stores.durable, second) == ["c"]


@pytest.mark.parametrize(
    ("seed", "flag", "message", "hint"),
    [
        (
            False,
            True,
            "REDIS_ONLY_MODE=true asks for another mode than hybrid, and other instances are serving this database",
            "run `chat-sessions mode redis-only`: it changes the mode of all",
        ),
        (
            True,
            False,
            "REDIS_ONLY_MODE=false asks for another mode than redis-only, and other instances are serving this database",
            "run `chat-sessions mode hybrid`: it changes the mode of all",
        ),
    ],
)
async def test_a_flag_that_disagrees_with_what_others_serve_is_refused_with_the_command_to_run(
    settings, fresh, impatient, seed, flag, message, hint
):
    async with opened(settings, redis_only_mode=seed) as runtime:
        mode = runtime.mode

        assert await refused(settings, redis_only_mode=flag) == f"{message} ({hint})"

        assert (runtime.mode, await mode_row(fresh)) == (mode, mode)
        assert len(await instances(fresh)) == 1


async def test_a_redis_that_evicts_sessions_does_not_become_the_only_truth_by_a_flag(settings, fresh, memory):
    await memory(maxmemory="1gb", maxmemory_policy="volatile-ttl")
    await served_mode(settings)

    message = await refused(settings, redis_only_mode=True)

    assert message.startswith("REDIS_ONLY_MODE=true: maxmemory-policy is volatile-ttl: ")
    assert "--accept-eviction" in message
    assert await mode_row(fresh) == "hybrid"


async def test_a_redis_with_sessions_that_postgres_lacks_does_not_become_the_only_truth_by_a_flag(
    settings, fresh, evicts_nothing, redis
):
    await served_mode(settings)
    session_id = new_uuid()
    await redis.set(session_key(session_id), guide_value(session_id, "a"), ex=1000)

    message = await refused(settings, redis_only_mode=True)

    assert "PostgreSQL is still taking sessions over" in message
    assert "chat-sessions mode redis-only" in message
    assert await mode_row(fresh) == "hybrid"


async def test_an_instance_that_was_killed_a_moment_ago_is_waited_for_and_then_counts_as_gone(
    settings, fresh, evicts_nothing
):
    await served_mode(settings)
    await note_instance(fresh, seconds_ago=GONE_AFTER_SECONDS - 1)

    assert await served_mode(settings, redis_only_mode=True) == "redis-only"


@pytest.mark.parametrize("flag", [None, False])
async def test_a_database_that_is_draining_is_served_and_drained(settings, fresh, flag):
    async with opened(settings, redis_only_mode=True) as runtime:
        session_id = await new_session(runtime.store, "a")
    await set_state(fresh, mode="draining")

    async with opened(settings, redis_only_mode=flag) as runtime:
        assert runtime.mode in {"draining", "hybrid"}
        assert await texts(runtime.store, session_id) == ["a"]
        assert await texts(runtime.stores.durable, session_id) == ["a"]


async def test_a_database_that_is_draining_is_not_turned_round_by_a_flag(settings, fresh, evicts_nothing):
    await served_mode(settings)
    await set_state(fresh, mode="draining")

    message = await refused(settings, redis_only_mode=True)

    assert message.startswith("REDIS_ONLY_MODE=true, but PostgreSQL is still taking sessions over from Redis")
    assert "chat-sessions mode redis-only" in message
    assert await mode_row(fresh) == "draining"


async def test_a_newer_protocol_is_refused(settings, fresh):
    await served_mode(settings)
    await set_state(fresh, protocol=7)

    message = await refused(settings)

    assert message.startswith("the database is served by coherence protocol 7, this version speaks 1")
    assert (await state_row(fresh))["protocol"] == 7


async def test_an_older_protocol_is_taken_over(settings, fresh):
    await served_mode(settings)
    await set_state(fresh, protocol=0, cache="on", redis_identity=None)

    async with opened(settings) as runtime, asyncio.timeout(10):
        # At once, unless the machine keeps Redis from answering in time: then when the heartbeat has seen it well.
        while runtime.stores.lease.current() is None:  # noqa: ASYNC110 - time has no event of ours
            await asyncio.sleep(0.05)

    assert (await state_row(fresh))["protocol"] == 1


async def test_without_redis_sessions_postgresql_serves_alone_and_the_database_stays_hybrid(settings, fresh):
    assert await served_mode(settings, enable_redis_sessions=False, redis_url=None) == "postgres"

    assert await mode_row(fresh) == "hybrid"


@pytest.mark.parametrize("mode", ["redis-only", "draining"])
async def test_without_redis_sessions_a_database_that_needs_redis_is_refused(settings, fresh, mode):
    await served_mode(settings)
    await set_state(fresh, mode=mode)

    message = await refused(settings, enable_redis_sessions=False, redis_url=None)

    assert message == (
        f"ENABLE_REDIS_SESSIONS=false, but this database is in mode {mode} (set ENABLE_REDIS_SESSIONS=true)"
    )
    assert await mode_row(fresh) == mode


async def test_redis_only_without_a_database_opens_none(settings):
    async with opened(settings, database_url=None, redis_only_mode=True) as runtime:
        assert (runtime.mode, runtime.database) == ("redis-only", None)
        assert await health_of(runtime) == {"redis": "pass"}


@pytest.mark.parametrize("name", ["database_url", "redis_url"])
async def test_a_store_without_a_url_is_refused_and_named(settings, name):
    message = await refused(settings, **{name: None})

    assert message.startswith(f"{name.upper()} is not set (export {name.upper()}=")


async def test_starts_at_once_agree_on_the_mode_of_a_fresh_database(
    settings, fresh, impatient, evicts_nothing
):
    """Whoever is alone when he looks may still change it: then it is changed for all."""
    tried = asyncio.Barrier(6)

    async def start(flag):
        try:
            async with opened(settings, redis_only_mode=flag) as runtime:
                await tried.wait()
                return runtime.mode == "redis-only"
        except StartRefused:
            await tried.wait()
            return None
        except BaseException:
            await tried.abort()
            raise

    results = await asyncio.gather(*map(start, (True, False) * 3))

    assert set(results) - {None} == {await mode_row(fresh) == "redis-only"}


# The epoch


async def test_the_redis_of_the_first_start_is_trusted_at_once(settings, fresh):
    async with opened(settings) as runtime:
        session_id = await new_session(runtime.store, "a")
        history = await runtime.store.read_history(session_id, max_messages=10)
        counts = runtime.stores.counts
        assert (history.source, counts.cache_hits, counts.cache_fills, counts.writes_held) == (
            "redis",
            1,
            0,
            0,
        )


async def test_cache_verify_always_trusts_no_lease(settings, fresh):
    async with opened(settings, cache_verify="always") as runtime:
        session_id = await new_session(runtime.store, "a")
        history = await runtime.store.read_history(session_id, max_messages=10)

        assert (history.source, runtime.stores.counts.cache_hits) == ("redis", 0)


async def test_a_start_beside_nobody_begins_an_epoch_and_one_beside_others_joins_theirs(settings, fresh):
    """Alone: PostgreSQL may have been restored from a backup since anybody served it."""
    await served_mode(settings)
    before = await epoch_row(fresh)

    async with opened(settings) as runtime:
        alone = await epoch_row(fresh)
        async with opened(settings) as second:
            assert second.stores.lease.state.epoch == alone == runtime.stores.lease.state.epoch
        assert await epoch_row(fresh) == alone

    assert alone != before


async def test_starts_at_once_beside_nobody_begin_an_epoch(settings, fresh):
    await served_mode(settings)
    before = await epoch_row(fresh)

    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(opened(settings)) for _ in range(3)))
        assert await epoch_row(fresh) != before


async def test_the_lease_does_not_end_when_requests_have_taken_every_connection(settings, fresh):
    async with opened(settings, database_pool_size=1) as runtime:
        lease = runtime.stores.lease
        async with runtime.database.connection():
            deadline = lease.now() + 1.5 * lease.seconds
            while lease.now() < deadline:
                await asyncio.sleep(0.05)
                assert lease.current() is not None


async def test_an_instance_is_listed_while_it_serves(settings, fresh):
    async with opened(settings), opened(settings):
        listed = await instances(fresh)

    assert [(one["version"], one["protocol"]) for one in listed] == [(__version__, 1)] * 2
    assert await instances(fresh) == []


# The schema


async def test_an_unmigrated_database_is_refused_with_the_command_to_run(settings, unmigrated_url):
    message = await refused(settings, database_url=unmigrated_url)

    assert message.startswith("the database is at schema revision none, this version needs ")
    assert "run `chat-sessions migrate`" in message


async def test_a_database_of_another_version_is_refused_with_the_command_to_run(settings, unmigrated_url):
    await migrate(unmigrated_url)
    async with opened(settings, database_url=unmigrated_url) as runtime:
        async with runtime.database.connection() as conn:
            await conn.execute("UPDATE chat.alembic_version SET version_num = '9999'")
        assert await health_of(runtime) == {"postgres": "fail", "redis": "pass"}

    message = await refused(settings, database_url=unmigrated_url)

    assert message.startswith("the database is at schema revision 9999, this version needs ")
    assert "run `chat-sessions migrate`" in message


async def test_services_that_start_at_once_make_the_partitions_once(settings, unmigrated_url):
    await migrate(unmigrated_url)
    ours = settings.model_copy(update={"database_url": unmigrated_url})

    async with AsyncExitStack() as stack:
        first, *_ = await asyncio.gather(*(stack.enter_async_context(open_runtime(ours)) for _ in range(3)))
        made = await existing_partitions(first.database)

    months = months_from(utc_now().date(), MONTHS_AHEAD)
    assert made == [*(partition_name(month) for month in months), "chat_messages_legacy"]


# Outages


async def test_postgresql_that_is_out_at_the_start_is_refused_with_a_hint(settings):
    message = await refused(settings, database_url=f"postgresql://chat:sesame@{CLOSED_PORT}/chat")

    assert message.startswith("PostgreSQL can't be reached: ")
    assert message.endswith("(start PostgreSQL, or correct DATABASE_URL)")
    assert "sesame" not in message


async def test_a_database_that_does_not_exist_is_refused_with_a_hint(settings, database_url):
    message = await refused(settings, database_url=f"{database_url}_not")

    assert message.startswith("PostgreSQL can't serve now: database ")
    assert message.endswith("(start PostgreSQL, or correct DATABASE_URL)")


async def test_redis_that_is_out_at_the_start_is_no_reason_not_to_serve(settings):
    async with opened(settings, redis_url=f"redis://{CLOSED_PORT}") as runtime:
        session_id = await new_session(runtime.store, "Xin chào")
        history = await runtime.store.read_history(session_id, max_messages=10)
        health = await health_of(runtime)

    assert (history.session.message_count, history.source) == (1, "postgres")
    assert health == {"postgres": "pass", "redis": "warn"}


# While it serves


async def comes_true(probe, seconds_max=20):
    deadline = time.monotonic() + seconds_max
    while not (value := await probe()) and time.monotonic() < deadline:  # noqa: ASYNC110 - other processes have no event of ours
        await asyncio.sleep(0.02)
    return value


async def test_partitions_are_made_while_it_serves_and_after_a_failure_too(
    settings, fresh, monkeypatch, caplog
):
    monkeypatch.setattr(wiring, "_PARTITIONS_EVERY_SECONDS", 0.05)
    *_, last = map(partition_name, months_from(utc_now().date(), MONTHS_AHEAD))
    async with opened(settings):
        async with fresh.connection() as conn:
            # The one that is missed then can't be attached beside it.
            await conn.execute(f"ALTER TABLE chat.{last} RENAME TO chat_messages_in_its_place")
        failed = await comes_true(partial(logged, caplog, "partitions were not made, will try again"))
        async with fresh.connection() as conn:
            await conn.execute("DROP TABLE chat.chat_messages_in_its_place")
        made = await comes_true(partial(exists, fresh, last))

    assert failed
    assert made


@pytest.fixture
async def url_without_ddl(fresh, database_url):
    """An account that reads and writes what is there, and makes nothing."""
    async with fresh.connection() as conn:
        await conn.execute(
            "CREATE ROLE chat_writes LOGIN PASSWORD 'chat_writes'; GRANT USAGE ON SCHEMA chat, analytics TO chat_writes;"
            "GRANT ALL ON ALL TABLES IN SCHEMA chat, analytics TO chat_writes;"
            "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA chat, analytics TO chat_writes;"
            "GRANT SELECT ON alembic_version TO chat_writes"
        )
    yield (
        make_url(database_url)
        .set(username="chat_writes", password="chat_writes")
        .render_as_string(hide_password=False)
    )
    async with fresh.connection() as conn:
        await conn.execute("DROP OWNED BY chat_writes; DROP ROLE chat_writes")


async def test_an_account_that_may_not_make_partitions_serves_while_those_of_this_month_are_there(
    settings, fresh, url_without_ddl, caplog
):
    this, *_, last = map(partition_name, months_from(utc_now().date(), MONTHS_AHEAD))
    await drop(fresh, last)
    async with opened(settings, database_url=url_without_ddl) as runtime:
        assert await texts(runtime.store, await new_session(runtime.store, "một")) == ["một"]
    assert (
        "partitions were not made, will try again: PostgreSQL can't serve now: permission denied"
        in caplog.text
    )

    await drop(fresh, this)
    assert await refused(settings, database_url=url_without_ddl) == (
        "PostgreSQL can't serve now: permission denied for schema chat (give the account of DATABASE_URL this right; "
        "what makes tables, such as `chat-sessions partitions`, may be run as another account)"
    )
    async with opened(settings):
        assert {this, last} <= set(await existing_partitions(fresh))
    async with opened(settings, database_url=url_without_ddl) as runtime:
        assert await texts(runtime.store, await new_session(runtime.store, "hai")) == ["hai"]


async def drop(database, partition):
    async with database.connection() as conn:
        await conn.execute(f"DROP TABLE chat.{partition}")


async def logged(caplog, words):
    return words in caplog.text


async def exists(database, partition):
    return partition in await existing_partitions(database)


async def test_the_guides_sessions_are_taken_over_once_redis_answers(settings, tmp_path, monkeypatch):
    """Without a database; those that nobody touches, so that lists have them."""
    monkeypatch.setattr(wiring, "_CLAIMS_AGAIN_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with opened(
        settings, database_url=None, redis_url=f"redis://127.0.0.1:{port}", redis_only_mode=True
    ) as runtime:
        before = await health_of(runtime)
        with embedded_servers(tmp_path, durable=False, postgres=False, redis_port=port) as servers:
            session_id = new_uuid()
            async with Redis.from_url(f"{servers.redis_url}/1") as direct:
                await direct.set(session_key(session_id), guide_value(session_id, "một"), ex=100)

            async def listed():
                with suppress(RedisUnavailable):
                    return [
                        one.session_id
                        for one in (await runtime.store.list_sessions("user123", limit=5)).sessions
                    ]

            assert before == {"redis": "fail"}
            assert await comes_true(listed) == [session_id]


# The end


async def connections(database, redis):
    """How many PostgreSQL and Redis connections of the service there are."""
    async with database.connection() as conn:
        in_postgres = await conn.fetchval(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'chat-sessions'"
        )
    in_redis = sum(one["name"] == "chat-sessions" for one in await redis.client_list())
    return in_postgres, in_redis


async def connections_left(database, redis):
    """The servers notice a moment later that a client has gone."""
    deadline = time.monotonic() + 5
    while (left := await connections(database, redis)) != (0, 0) and time.monotonic() < deadline:  # noqa: ASYNC110 - other processes have no event of ours
        await asyncio.sleep(0.01)
    return left


@pytest.mark.parametrize("redis_only_mode", [None, True])
async def test_an_end_leaves_no_connection_and_no_task(settings, fresh, redis, redis_only_mode):
    tasks = asyncio.all_tasks()

    async with opened(settings, redis_only_mode=redis_only_mode) as runtime:
        await asyncio.gather(*(runtime.store.create_session("an") for _ in range(3)))
        while_open = await connections(fresh, redis)
        tasks_while_open = asyncio.all_tasks()

    assert min(while_open) >= 1
    assert tasks_while_open > tasks
    assert asyncio.all_tasks() == tasks
    assert await connections_left(fresh, redis) == (0, 0)


async def test_a_start_that_is_refused_halfway_leaves_no_connection_and_no_task(settings, fresh, redis):
    tasks = asyncio.all_tasks()

    assert (await refused(settings, assistant="nobody")).startswith("ASSISTANT is 'nobody'")

    assert asyncio.all_tasks() == tasks
    assert await connections_left(fresh, redis) == (0, 0)


async def test_a_failure_while_serving_closes_everything_too(settings, fresh, redis):
    tasks = asyncio.all_tasks()

    with pytest.raises(ZeroDivisionError):
        await fail_while_serving(settings)

    assert asyncio.all_tasks() == tasks
    assert await connections_left(fresh, redis) == (0, 0)


async def fail_while_serving(settings):
    async with open_runtime(settings) as runtime:
        await runtime.store.create_session("an")
        raise ZeroDivisionError


async def test_an_end_waits_for_a_write_whose_caller_has_gone(settings, fresh):
    lock = AsyncExitStack()

    async def release_soon():
        await asyncio.sleep(0.5)
        await lock.aclose()

    async with opened(settings) as runtime:
        session_id = await new_session(runtime.store)
        conn = await lock.enter_async_context(fresh.transaction())
        await conn.execute("SELECT FROM chat.chat_sessions WHERE session_id = $1 FOR UPDATE", session_id)
        append = asyncio.create_task(runtime.store.append(new_append(session_id, "một")))
        assert await comes_true(partial(waits_for_a_lock, fresh))
        append.cancel()
        releasing = asyncio.create_task(release_soon())

    assert append.cancelled()
    assert releasing.done()
    async with opened(settings) as runtime:
        assert await texts(runtime.store, session_id) == ["một"]


async def waits_for_a_lock(database):
    async with database.connection() as conn:
        return await conn.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
