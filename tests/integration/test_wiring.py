"""What a start makes of settings and a database, and that an end closes all of it."""

import asyncio
import time
from contextlib import AsyncExitStack

import pytest

from app.chat import utc_now
from app.errors import StartRefused
from app.postgres.partitions import MONTHS_AHEAD, existing_partitions, months_from, partition_name
from app.store import Append
from app.wiring import open_runtime
from tests.databases import empty, migrate, new_database
from tests.factories import new_message

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
        return await conn.fetchrow("SELECT mode, protocol FROM chat.cache_state")


async def mode_row(database):
    return (await state_row(database) or {}).get("mode")


async def served_mode(settings, **overrides):
    """Starts and ends; the mode that was served in between."""
    async with open_runtime(settings.model_copy(update=overrides)) as runtime:
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


@pytest.mark.parametrize(
    ("seed", "flag", "message"),
    [
        (False, True, "REDIS_ONLY_MODE=true asks for mode redis-only, but this database is in mode hybrid"),
        (True, False, "REDIS_ONLY_MODE=false asks for mode hybrid, but this database is in mode redis-only"),
    ],
)
async def test_a_flag_that_disagrees_with_the_database_is_refused(settings, fresh, seed, flag, message):
    await served_mode(settings, redis_only_mode=seed)
    before = await mode_row(fresh)

    assert (await refused(settings, redis_only_mode=flag)).startswith(message)

    assert await mode_row(fresh) == before


@pytest.mark.parametrize("flag", [None, True, False])
async def test_a_database_that_is_draining_is_refused_whatever_the_flag(settings, database, flag):
    await set_state(database, mode="draining")

    message = await refused(settings, redis_only_mode=flag)

    assert message.startswith("this database is in mode draining")
    assert "REDIS_ONLY_MODE" not in message


async def test_a_database_of_another_protocol_is_refused(settings, database):
    await set_state(database, protocol=7)

    message = await refused(settings)

    assert message.startswith("the database is served by coherence protocol 7, this version speaks 0")


async def test_without_redis_sessions_postgresql_serves_alone_and_the_database_stays_hybrid(settings, fresh):
    assert await served_mode(settings, enable_redis_sessions=False, redis_url=None) == "postgres"

    assert await mode_row(fresh) == "hybrid"


async def test_without_redis_sessions_a_redis_only_database_is_refused(settings, fresh):
    await served_mode(settings, redis_only_mode=True)

    message = await refused(settings, enable_redis_sessions=False, redis_url=None)

    assert message == (
        "ENABLE_REDIS_SESSIONS=false, but this database is in mode redis-only (set ENABLE_REDIS_SESSIONS=true)"
    )


async def test_redis_only_without_a_database_opens_none(settings):
    async with open_runtime(
        settings.model_copy(update={"database_url": None, "redis_only_mode": True})
    ) as runtime:
        assert (runtime.mode, runtime.database) == ("redis-only", None)
        assert await health_of(runtime) == {"redis": "pass"}


@pytest.mark.parametrize("name", ["database_url", "redis_url"])
async def test_a_store_without_a_url_is_refused_and_named(settings, name):
    message = await refused(settings, **{name: None})

    assert message.startswith(f"{name.upper()} is not set (export {name.upper()}=")


async def test_starts_at_once_agree_on_the_mode_of_a_fresh_database(settings, fresh):
    async def start(flag):
        return await served_mode(settings, redis_only_mode=flag)

    results = await asyncio.gather(*map(start, (True, False) * 3), return_exceptions=True)

    mode = await mode_row(fresh)
    assert sorted(map(type, results), key=str) == sorted([str] * 3 + [StartRefused] * 3, key=str)
    assert {one for one in results if isinstance(one, str)} == {mode}


# The schema


async def test_an_unmigrated_database_is_refused_with_the_command_to_run(settings, unmigrated_url):
    message = await refused(settings, database_url=unmigrated_url)

    assert message.startswith("the database is at schema revision none, this version needs ")
    assert "run `chat-sessions migrate`" in message


async def test_a_database_of_another_version_is_refused_with_the_command_to_run(settings, unmigrated_url):
    await migrate(unmigrated_url)
    async with open_runtime(settings.model_copy(update={"database_url": unmigrated_url})) as runtime:
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
    async with open_runtime(settings.model_copy(update={"redis_url": f"redis://{CLOSED_PORT}"})) as runtime:
        session_id = (await runtime.store.create_session("an")).session.session_id
        await runtime.store.append(Append(session_id=session_id, messages=(new_message("Xin chào"),)))
        history = await runtime.store.read_history(session_id, max_messages=10)
        health = await health_of(runtime)

    assert (history.session.message_count, history.source) == (1, "postgres")
    assert health == {"postgres": "pass", "redis": "warn"}


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

    async with open_runtime(settings.model_copy(update={"redis_only_mode": redis_only_mode})) as runtime:
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
