"""The schema: how a database comes by it, and what it promises to the statements that use it."""

import asyncio
import os
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid1, uuid3, uuid4, uuid5

import asyncpg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from redis.asyncio import Redis
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from app.analytics.rollups import Rollups
from app.chat import LEGACY_MONTH, new_uuid, session_month
from app.coherence.ports import EPOCH_ZERO, PROTOCOL, Entry, Mode, Row
from app.errors import DurableStoreUnavailable, StartRefused
from app.postgres import statements
from app.postgres.cache_state import PostgresStateKeeper, claim_state
from app.postgres.engine import Database, create_engine, sqlalchemy_url
from app.postgres.partitions import (
    existing_partitions,
    make_partitions,
    months_from,
    next_month,
    partition_name,
)
from app.postgres.schema import PROJECT, REVISION, current_revision
from app.postgres.store import PostgresChatSessionStore
from app.postgres.tables import metadata
from app.redis_sessions.codec import encode
from app.redis_sessions.keys import session_key
from tests.contract.suite import new_session, texts
from tests.databases import forget_state, migrate, new_database
from tests.factories import new_append
from tests.servers import Servers
from tests.stores import new_hybrid

pytestmark = pytest.mark.anyio

RELATIONS = "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
ROUTINES = "SELECT n.nspname || '.' || p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace"


@pytest.fixture
async def empty_url(servers: Servers) -> AsyncIterator[str]:
    async with new_database(servers, "chat_migrations") as url:
        yield url


@pytest.fixture(scope="module")
async def own_url(servers: Servers, anyio_backend: str) -> AsyncIterator[str]:
    """A migrated database whose partitions are these tests' own."""
    async with new_database(servers, "chat_schema") as url:
        await migrate(url)
        yield url


@pytest.fixture
async def own(own_url: str) -> AsyncIterator[Database]:
    database = Database(create_engine(own_url, application_name="tests"))
    await forget_state(database)
    await claim_state(database, redis_only=None)
    yield database
    await database.close()


@pytest.fixture
def store(own: Database) -> PostgresChatSessionStore:
    return PostgresChatSessionStore(own, ttl_seconds=3600)


async def downgrade(url: str, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", os.fspath(PROJECT / "migrations"))
    config.attributes["database_url"] = url
    await asyncio.to_thread(command.downgrade, config, revision)


async def everything(url: str) -> set[str]:
    """Every relation and routine that is not PostgreSQL's own."""
    conn = await asyncpg.connect(url)
    try:
        return {
            record[0]
            for query in (RELATIONS, ROUTINES)
            for record in await conn.fetch(
                f"{query} WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')"
            )
        }
    finally:
        await conn.close()


async def alembic(cwd: Path, **environment: str) -> tuple[int, str]:
    """`alembic upgrade head` from the command line: exit code and all that it printed."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "alembic", "-c", os.fspath(PROJECT / "alembic.ini"), "upgrade", "head"),
        cwd=cwd,
        env=inherited | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    return process.returncode or 0, printed.decode()


# Revisions


def test_the_newest_revision_is_the_one_that_the_code_needs() -> None:
    scripts = ScriptDirectory(os.fspath(PROJECT / "migrations"))

    assert scripts.get_heads() == [REVISION]


async def test_the_database_is_what_the_metadata_says(own_url: str) -> None:
    def is_in_metadata(thing: Any, name: str | None, kind: str, *_: object) -> bool:
        """Partitions are their parent's, the version table is Alembic's."""
        table = name if kind == "table" else thing.table.name
        return not re.match(r"alembic_version|chat_messages_(\d|legacy)", table or "")

    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": lambda name, kind, _: kind != "schema" or name == "chat",
                "include_object": is_in_metadata,
                "compare_type": True,
                "compare_server_default": True,
                "version_table_schema": "chat",
            },
        )
        found = compare_metadata(context, metadata)
        # Made on 16 and later only: there it leaves the counter's update HOT.
        old = connection.dialect.server_version_info < (16,)
        return [one for one in found if not (old and "chat_sessions_last_activity_idx" in repr(one))]

    # To Alembic the default schema has no name; that of an account called `chat` is `chat`.
    engine = create_async_engine(
        sqlalchemy_url(own_url), connect_args={"server_settings": {"search_path": "public"}}
    )
    async with engine.connect() as conn:
        found = await conn.run_sync(differences)
    await engine.dispose()

    assert found == []


async def test_constraints_have_the_names_that_the_metadata_gives_them(own: Database) -> None:
    named = {
        constraint.name
        for table in metadata.tables.values()
        for constraint in table.constraints
        if constraint.name is not None
    }

    async with own.connection() as conn:
        records = await conn.fetch(
            "SELECT conname FROM pg_constraint c JOIN pg_class r ON r.oid = conrelid "
            "WHERE connamespace = 'chat'::regnamespace AND contype <> 'n' AND NOT relispartition "
            "AND relname <> 'alembic_version'"
        )

    assert {record["conname"] for record in records} == named


async def test_down_leaves_nothing_and_up_again_makes_the_same(empty_url: str) -> None:
    await migrate(empty_url)
    first = await everything(empty_url)

    await downgrade(empty_url, "base")
    between = await everything(empty_url)
    await migrate(empty_url)

    assert between == {"chat.alembic_version", "chat.alembic_version_pkc"}
    assert await everything(empty_url) == first
    assert {"chat.chat_sessions", "chat.chat_messages", "chat.session_month", "analytics.turns"} <= first


async def test_nothing_is_made_in_schema_public(empty_url: str) -> None:
    await migrate(empty_url)

    names = await everything(empty_url)

    assert {name.partition(".")[0] for name in names} == {"chat", "analytics"}


async def test_an_upgrade_keeps_the_rows_that_are_there(
    own_url: str, store: PostgresChatSessionStore
) -> None:
    session_id = await new_session(store, "a", "b")
    before = await store.get_session(session_id)

    await migrate(own_url)

    assert await store.get_session(session_id) == before
    assert await texts(store, session_id) == ["a", "b"]


ROWS = {
    "sessions": "SELECT * FROM chat.chat_sessions",
    "messages": "SELECT * FROM chat.chat_messages",
    "turns": "SELECT * FROM chat.chat_turns",
    "state": "SELECT mode, cache, redis_identity FROM chat.cache_state",
}

#: A database as processes of protocol 0 left it, at revision 0001.
OF_PROTOCOL_0 = """
INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity, message_count, chain, owner, metadata)
VALUES ('01890000-0000-4000-8000-000000000001', 'an', '2026-03-10 12:00Z', '2026-03-10 12:01Z', 1, '\\x0102030405060708',
        'postgres', '{"a":1e+16}'),
       ('01890000-0000-4000-8000-000000000002', 'bình', '2026-03-10 12:00Z', '2026-03-10 12:00Z', 0, DEFAULT,
        'redis', '{}');
INSERT INTO chat.chat_messages (session_id, session_month, seq, message_id, role, content, created_at)
VALUES ('01890000-0000-4000-8000-000000000001', '0001-01-01', 1, gen_random_uuid(), 'user', 'Xin chào', now());
INSERT INTO chat.chat_turns VALUES ('01890000-0000-4000-8000-000000000001', gen_random_uuid(), gen_random_uuid(), now());
INSERT INTO chat.cache_state (protocol, epoch, mode, cache) VALUES (0, '00000000000000aa', 'redis-only', 'on')
"""


async def rows(conn: asyncpg.Connection) -> dict[str, list[tuple[object, ...]]]:
    return {name: [tuple(one) for one in await conn.fetch(query)] for name, query in ROWS.items()}


async def test_every_row_survives_0002_its_downgrade_and_0002_again(empty_url: str) -> None:
    await migrate(empty_url, "0001")
    conn = await asyncpg.connect(empty_url)
    await conn.execute(OF_PROTOCOL_0)
    before, relations = await rows(conn), await everything(empty_url)

    seen = []
    for step, revision in ((migrate, "0002"), (downgrade, "0001"), (migrate, "0002")):
        await step(empty_url, revision)
        await conn.reload_schema_state()
        seen.append((await rows(conn), await everything(empty_url)))

    assert seen == [(before, relations)] * 3
    assert [len(found) for found in before.values()] == [2, 1, 1, 1]
    assert await conn.fetchval("SELECT settled FROM chat.cache_state")
    await conn.close()


async def test_a_downgrade_to_0001_lets_processes_of_protocol_0_serve_again(empty_url: str) -> None:
    """They refuse another protocol, and nobody of a later one can use a row without `settled`."""
    await migrate(empty_url)
    database = Database(create_engine(empty_url, application_name="tests"))
    claimed = await claim_state(database, redis_only=None, redis_identity="a/b")
    await database.close()

    await downgrade(empty_url, "0001")

    conn = await asyncpg.connect(empty_url)
    state = await conn.fetchrow("SELECT protocol, epoch, mode FROM chat.cache_state")
    await conn.close()
    assert (state["protocol"], state["mode"]) == (0, "hybrid")
    assert state["epoch"] != claimed.epoch


async def described(url: str) -> list[tuple[Any, ...]]:
    """Columns of the views, with what is said of them, definitions of all but tables, and the triggers."""
    conn = await asyncpg.connect(url)
    try:
        columns = await conn.fetch(
            "SELECT c.relname, c.reloptions, obj_description(c.oid, 'pg_class'), a.attname, a.atttypid, "
            "col_description(c.oid, a.attnum) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
            "WHERE c.relnamespace = 'analytics'::regnamespace ORDER BY c.relname, a.attnum"
        )
        triggers = await conn.fetch("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1")
        made = await conn.fetch(
            "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index "
            "WHERE indrelid::regclass::text LIKE 'chat.rollup%' UNION ALL "
            "SELECT oid::regclass::text, pg_get_viewdef(oid) FROM pg_class "
            "WHERE relnamespace = 'analytics'::regnamespace AND relkind = 'v' UNION ALL "
            "SELECT oid::regprocedure::text, pg_get_functiondef(oid) FROM pg_proc "
            "WHERE pronamespace IN ('analytics'::regnamespace, 'chat'::regnamespace) ORDER BY 1, 2"
        )
        return [tuple(record) for record in (*columns, *triggers, *made)]
    finally:
        await conn.close()


@pytest.mark.parametrize("revision", ["0002", "0003", "0004", "0006", "0007", "0008", "0009"])
async def test_a_downgrade_leaves_views_and_triggers_as_they_were(empty_url: str, revision: str) -> None:
    await migrate(empty_url, revision)
    before = await described(empty_url)
    await migrate(empty_url)

    await downgrade(empty_url, revision)

    assert await described(empty_url) == before


async def test_what_was_there_before_the_roll_ups_is_counted_afterwards(
    empty_url: str,
) -> None:
    await migrate(empty_url, "0002")
    database = Database(create_engine(empty_url, application_name="tests"))
    await claim_state(database, redis_only=None)
    store = PostgresChatSessionStore(database, ttl_seconds=3600)
    gone = await new_session(store, "a", "b", "c")
    await new_session(store, "a", "b")
    await migrate(empty_url)
    rollups = Rollups(database, timezone="UTC")

    before = await rollups.pending()
    await store.delete_session(gone)
    done = await rollups.round()

    assert (before.marks, before.backfills) == (0, True)
    assert done is not None
    assert done.complete
    async with database.connection() as conn:
        assert await conn.fetchval("SELECT sum(messages) FROM analytics.messages_daily") == 2
        assert await conn.fetchval("SELECT complete FROM analytics.rollup_state")
    await database.close()


async def test_a_database_without_the_schema_has_no_revision(empty_url: str) -> None:
    database = Database(create_engine(empty_url, application_name="tests"))

    before = await current_revision(database)
    await migrate(empty_url)

    assert (before, await current_revision(database)) == (None, REVISION)
    await database.close()


# The command line


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+asyncpg"])
async def test_alembic_upgrades_the_database_of_the_environment(
    empty_url: str, tmp_path: Path, scheme: str
) -> None:
    code, printed = await alembic(tmp_path, DATABASE_URL=empty_url.replace("postgresql", scheme, 1))

    assert code == 0, printed
    assert "chat.chat_sessions" in await everything(empty_url)


async def test_alembic_without_a_database_says_what_to_set(tmp_path: Path) -> None:
    code, printed = await alembic(tmp_path)

    assert code != 0
    assert "DATABASE_URL is not set" in printed
    assert "export DATABASE_URL=postgresql://" in printed
    assert "Traceback" not in printed


async def test_upgrades_at_once_all_succeed(empty_url: str, tmp_path: Path) -> None:
    results = await asyncio.gather(*(alembic(tmp_path, DATABASE_URL=empty_url) for _ in range(2)))

    assert [code for code, _ in results] == [0, 0], results
    assert "chat.chat_sessions" in await everything(empty_url)


async def test_a_migration_does_not_wait_long_for_a_lock(empty_url: str) -> None:
    await migrate(empty_url)
    conn = await asyncpg.connect(empty_url)
    began = time.monotonic()

    async with conn.transaction():
        await conn.execute("LOCK TABLE chat.chat_sessions IN ACCESS SHARE MODE")
        with pytest.raises(DBAPIError, match="lock timeout"):
            await downgrade(empty_url, "base")

    assert time.monotonic() - began < 15
    await conn.close()
    assert "chat.chat_sessions" in await everything(empty_url)


# The state, claimed by the first start


async def set_state(database: Database, **columns: object) -> None:
    async with database.connection() as conn:
        for name, value in columns.items():
            await conn.execute(f"UPDATE chat.cache_state SET {name} = $1", value)


async def state_rows(database: Database) -> list[tuple[object, ...]]:
    async with database.connection() as conn:
        return [tuple(record) for record in await conn.fetch("SELECT * FROM chat.cache_state")]


@pytest.fixture
async def unclaimed(own: Database) -> Database:
    await forget_state(own)
    return own


@pytest.mark.parametrize(
    ("redis_only", "identity", "mode", "cache", "trusting"),
    [
        (None, "a/b", "hybrid", "on", True),
        (False, "a/b", "hybrid", "on", True),
        (True, "a/b", "redis-only", "on", False),
        (None, None, "hybrid", "off", False),
        (True, None, "redis-only", "off", False),
    ],
)
async def test_the_first_start_seeds_the_state(
    unclaimed: Database, redis_only: bool | None, identity: str | None, mode: Mode, cache: str, trusting: bool
) -> None:
    """A Redis that answers is trusted at once: nobody has written before, so no writer need wait."""
    state = await claim_state(unclaimed, redis_only=redis_only, redis_identity=identity)

    assert (state.protocol, state.mode, state.cache, state.redis_identity) == (
        PROTOCOL,
        mode,
        cache,
        identity,
    )
    assert (state.settled, state.trusting) == (True, trusting)
    assert re.fullmatch("[0-9a-f]{16}", state.epoch)
    assert state.epoch != EPOCH_ZERO


async def test_a_later_start_changes_nothing(unclaimed: Database) -> None:
    first = await claim_state(unclaimed, redis_only=None, redis_identity="a/b")

    for redis_only, identity in ((True, "c/d"), (False, None)):
        assert await claim_state(unclaimed, redis_only=redis_only, redis_identity=identity) == first


async def test_two_first_starts_at_once_agree_on_one_state(unclaimed: Database) -> None:
    claims = [
        claim_state(unclaimed, redis_only=redis_only, redis_identity=identity)
        for redis_only, identity in ((True, None), (False, "a/b"), (None, "c/d")) * 2
    ]

    states = await asyncio.gather(*claims)

    assert len(set(states)) == 1
    assert len(await state_rows(unclaimed)) == 1


@pytest.mark.parametrize("mode", ["hybrid", "draining", "redis-only"])
@pytest.mark.parametrize(("identity", "cache"), [("a/b", "on"), (None, "off")])
async def test_a_database_of_protocol_0_is_taken_over_with_its_mode(
    own: Database, mode: Mode, identity: str | None, cache: str
) -> None:
    """Its processes read the protocol after the row lock, and write no more. They held no leases to wait for."""
    await set_state(own, protocol=0, epoch="00000000000000aa", mode=mode, cache="on", settled=False)

    state = await claim_state(own, redis_only=None, redis_identity=identity)

    assert (state.protocol, state.mode, state.settled) == (PROTOCOL, mode, True)
    assert (state.cache, state.redis_identity) == (cache, identity)
    assert state.epoch not in {"00000000000000aa", EPOCH_ZERO}
    assert await claim_state(own, redis_only=None, redis_identity="c/d") == state


async def test_two_that_take_over_at_once_agree_on_one_state(own: Database) -> None:
    await set_state(own, protocol=0, epoch="00000000000000aa")

    states = await asyncio.gather(
        *(claim_state(own, redis_only=None, redis_identity=identity) for identity in ("a/b", "c/d", None) * 2)
    )

    assert len(set(states)) == 1
    assert states[0].epoch != "00000000000000aa"


async def test_what_protocol_0_cached_is_compared_with_its_row_before_it_is_believed(
    servers: Servers, own: Database, store: PostgresChatSessionStore, redis: Redis
) -> None:
    async with AsyncExitStack() as stack:
        probing = new_hybrid(stack, own, servers.redis_url, state=None)
        stale, current = await new_session(store, "a"), await new_session(store, "a")
        row, _ = await store.lookup(stale)
        await store.append(new_append(stale, "b"))
        for session_id, cached in ((stale, row), (current, (await store.lookup(current))[0])):
            value = cached_by_protocol_0(cached, await line_of(store, session_id))
            await redis.set(session_key(session_id), value, px=60_000)
        await set_state(own, protocol=0)
        state = await claim_state(own, redis_only=None, redis_identity=await probing.cache.probe())
        hybrid = new_hybrid(stack, own, servers.redis_url, state=state)

        assert await texts(hybrid.store, stale) == ["a", "b"]
        assert await texts(hybrid.store, current) == ["a"]

    counts = hybrid.counts
    assert (counts.cache_hits, counts.cache_fills, counts.cache_validations) == (0, 1, 1)


async def line_of(store: PostgresChatSessionStore, session_id: UUID) -> str:
    return (await store.read_history(session_id, max_messages=1, before_seq=2)).lines[0]


def cached_by_protocol_0(row: Row, line: str) -> bytes:
    entry = Entry.of(row, [line])
    assert (entry.epoch, entry.dirty) == (EPOCH_ZERO, False)
    return encode(row, epoch=entry.epoch, lines=[line])


async def test_a_newer_protocol_is_refused_and_left_as_it_is(own: Database) -> None:
    await set_state(own, protocol=PROTOCOL + 1)
    before = await state_rows(own)

    with pytest.raises(
        StartRefused, match=f"coherence protocol {PROTOCOL + 1}, this version speaks {PROTOCOL}"
    ):
        await claim_state(own, redis_only=None, redis_identity="c/d")

    assert await state_rows(own) == before
    await set_state(own, protocol=PROTOCOL)


async def test_a_process_that_a_newer_protocol_took_the_database_from_neither_writes_nor_believes_redis(
    servers: Servers, unclaimed: Database, store: PostgresChatSessionStore, redis: Redis
) -> None:
    async with AsyncExitStack() as stack:
        identity = await new_hybrid(stack, unclaimed, servers.redis_url, state=None).cache.probe()
        state = await claim_state(unclaimed, redis_only=None, redis_identity=identity)
        hybrid = new_hybrid(stack, unclaimed, servers.redis_url, state=state)
        session_id = await new_session(hybrid.store, "a")
        await set_state(unclaimed, protocol=PROTOCOL + 1, epoch="00000000000000bb")
        before = await state_rows(unclaimed)

        await hybrid.heartbeat.beat()

        assert hybrid.lease.current() is None
        for call in (
            hybrid.store.append(new_append(session_id)),
            hybrid.store.create_session("an"),
            hybrid.store.delete_session(session_id),
            hybrid.store.read_history(session_id, max_messages=1),
            store.append(new_append(session_id)),
            store.delete_session(session_id),
        ):
            with pytest.raises(DurableStoreUnavailable, match=f"coherence protocol {PROTOCOL + 1}"):
                await call
        assert await state_rows(unclaimed) == before

    await set_state(unclaimed, protocol=PROTOCOL)
    assert await texts(store, session_id) == ["a"]


async def test_of_two_that_change_the_same_epoch_one_only_reads(own: Database) -> None:
    keeper = PostgresStateKeeper(own)
    state = await keeper.read()

    first, second = await asyncio.gather(keeper.change(state, state), keeper.change(state, state))

    assert first == second
    assert first.epoch != state.epoch


# session_month


def uuid7_at(milliseconds: int, rest: int = 0) -> UUID:
    return UUID(int=milliseconds << 80 | 0x7 << 76 | 0b10 << 62 | rest)


def moments_around_months() -> list[int]:
    """Milliseconds right before and at the beginning of months of all centuries that UUIDv7 can name."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    months = [
        datetime(year, month, 1, tzinfo=UTC)
        for year in (1970, 1999, 2000, 2024, 2025, 2026, 2099, 2255, 2256, 3000, 5000, 8000, 9999)
        for month in range(1, 13)
    ]
    starts = [(month - epoch) // timedelta(milliseconds=1) for month in months]
    return [start + step for start in starts for step in (-1, 0, 1) if start + step >= 0]


async def months_in_sql(database: Database, ids: list[UUID]) -> list[date]:
    async with database.connection() as conn:
        records = await conn.fetch(
            "SELECT chat.session_month(id) FROM unnest($1::uuid[]) WITH ORDINALITY AS u(id, n) ORDER BY n",
            ids,
        )
    return [record[0] for record in records]


async def test_sql_and_python_agree_on_the_month_of_every_id(own: Database) -> None:
    rng = random.Random(7)
    calendar_end_ms = 253_402_300_800_000
    ids = [
        *(UUID(int=rng.getrandbits(128)) for _ in range(5000)),
        *(UUID(int=rng.getrandbits(128), version=version) for version in range(1, 6) for _ in range(500)),
        *(uuid7_at(rng.randrange(calendar_end_ms), rng.getrandbits(62)) for _ in range(5000)),
        *(uuid7_at(milliseconds) for milliseconds in moments_around_months()),
        *(uuid7_at(calendar_end_ms + step) for step in (-1, 0, 1)),
        *(uuid7_at(milliseconds) for milliseconds in (0, 1, 2**47, 2**48 - 1)),
        *(make() for make in (uuid1, uuid4, new_uuid) for _ in range(10)),
        *(uuid3(UUID(int=0), "a"), uuid5(UUID(int=0), "a")),
        *(UUID(int=0), UUID(int=2**128 - 1)),
        # Version 7 of the other variants, whose versions mean nothing.
        *(UUID(int=2**80 * 10**12 | 0x7 << 76 | variant << 60) for variant in range(16)),
    ]

    in_sql = await months_in_sql(own, ids)

    assert in_sql == [session_month(one) for one in ids]
    assert len(set(in_sql)) > 4000


async def test_the_month_of_an_id_costs_a_statement_no_call(own: Database) -> None:
    async with own.connection() as conn:
        plan = await conn.fetch(
            "EXPLAIN (VERBOSE) SELECT chat.session_month(session_id) FROM chat.chat_sessions"
        )

    assert "get_byte" in str(plan)
    assert "session_month(" not in str(plan)


async def test_known_ids_have_known_months_in_sql(own: Database) -> None:
    ids = [uuid7_at(0), UUID("019a3a04-23ff-7000-8000-000000000000"), uuid7_at(2**48 - 1), uuid4()]

    assert await months_in_sql(own, ids) == [date(1970, 1, 1), date(2025, 10, 1), LEGACY_MONTH, LEGACY_MONTH]


# Partitions


async def test_a_new_database_has_a_partition_for_ids_without_a_time(empty_url: str) -> None:
    await migrate(empty_url)
    database = Database(create_engine(empty_url, application_name="tests"))

    assert await existing_partitions(database) == ["chat_messages_legacy"]
    await database.close()


async def test_partitions_are_made_once(own: Database) -> None:
    months = months_from(date(2040, 11, 17), 3)

    made = await make_partitions(own, months)
    again = await make_partitions(own, months)

    assert made == [f"chat_messages_{month}" for month in ("2040_11", "2040_12", "2041_01", "2041_02")]
    assert again == []
    assert set(made) <= set(await existing_partitions(own))


async def test_partitions_can_be_made_by_many_at_once(own: Database) -> None:
    months = months_from(date(2042, 1, 1), 2)

    made = await asyncio.gather(*(make_partitions(own, months) for _ in range(5)))

    assert sorted(name for names in made for name in names) == [partition_name(month) for month in months]


async def test_a_partition_has_all_that_its_parent_promises(own: Database) -> None:
    await make_partitions(own, [date(2043, 1, 1)])

    async with own.connection() as conn:
        constraints, indexes, bound = (
            await conn.fetchval(
                "SELECT array_agg(contype::text ORDER BY contype) FROM pg_constraint "
                "WHERE conrelid = $1::text::regclass AND contype <> 'n'",
                "chat.chat_messages_2043_01",
            ),
            await conn.fetchval(
                "SELECT count(*) FROM pg_inherits JOIN pg_index ON indexrelid = inhrelid "
                "WHERE indrelid = $1::text::regclass",
                "chat.chat_messages_2043_01",
            ),
            await conn.fetchval(
                "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = $1::text::regclass",
                "chat.chat_messages_2043_01",
            ),
        )

    assert constraints == ["c", "c", "c", "p", "u"]
    assert indexes == 3
    assert bound == "FOR VALUES FROM ('2043-01-01') TO ('2043-02-01')"


@pytest.mark.parametrize("month", [date(1970, 1, 1), date(2031, 12, 1), date(9999, 12, 1)])
async def test_a_session_of_a_month_without_a_partition_gets_one_with_its_first_message(
    own: Database, store: PostgresChatSessionStore, monkeypatch: pytest.MonkeyPatch, month: date
) -> None:
    moment = datetime(month.year, month.month, 28, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    made = uuid7_at(moment // timedelta(milliseconds=1), random.getrandbits(62))
    monkeypatch.setattr("app.postgres.store.new_uuid", lambda: made)
    before = await existing_partitions(own)

    session_id = await new_session(store, "a", "b")

    assert session_id == made
    assert partition_name(month) not in before
    assert partition_name(month) in await existing_partitions(own)
    assert await texts(store, session_id) == ["a", "b"]


async def test_first_messages_of_a_month_at_once_are_all_stored(
    store: PostgresChatSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = datetime(2033, 3, 3, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(
        "app.postgres.store.new_uuid",
        lambda: uuid7_at(moment // timedelta(milliseconds=1), random.getrandbits(62)),
    )
    sessions = [await new_session(store) for _ in range(5)]

    appended = await asyncio.gather(*(store.append(new_append(session_id, "a")) for session_id in sessions))

    assert [one.last_seq for one in appended] == [1] * 5


async def test_ids_without_a_time_live_in_the_legacy_partition(
    own: Database, store: PostgresChatSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.postgres.store.new_uuid", uuid4)

    session_id = await new_session(store, "a")

    async with own.connection() as conn:
        found = await conn.fetchval(
            "SELECT count(*) FROM chat.chat_messages_legacy WHERE session_id = $1", session_id
        )
    assert found == 1


def test_the_month_after_december_is_january() -> None:
    assert next_month(date(2025, 12, 1)) == date(2026, 1, 1)
    assert months_from(date(2025, 11, 30), 2) == [date(2025, 11, 1), date(2025, 12, 1), date(2026, 1, 1)]


# What the statements get from it


@pytest.mark.parametrize("plans", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize(
    ("statement", "rest"),
    [
        (statements.MESSAGES, lambda _: ["1", "100"]),
        (statements.MESSAGES_BY_ID, lambda id_: [f"ARRAY['{id_}']::uuid[]"]),
        (statements.HISTORY, lambda _: ["2147483647", "100"]),
        (statements.DELETE_MESSAGES, lambda _: []),
    ],
    ids=["MESSAGES", "MESSAGES_BY_ID", "HISTORY", "DELETE_MESSAGES"],
)
async def test_a_statement_touches_one_partition(
    own: Database,
    store: PostgresChatSessionStore,
    plans: str,
    statement: str,
    rest: Callable[[UUID], list[str]],
) -> None:
    await make_partitions(own, [date(2050, 1, 1), date(2050, 2, 1)])
    session_id = await new_session(store, "a")
    month = session_month(session_id)
    arguments = ", ".join([f"'{session_id}'", f"'{month}'", *rest(session_id)])

    async with own.connection() as conn:
        await conn.execute(f"SET plan_cache_mode = {plans}")
        await conn.execute(f"PREPARE explained AS {statement}")
        async with conn.transaction():
            records = await conn.fetch(
                f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) EXECUTE explained({arguments})"
            )
        await conn.execute("DEALLOCATE explained; RESET plan_cache_mode")

    plan = "\n".join(record[0] for record in records)
    scanned = set(re.findall(r"Scan.* on (chat_messages_(?:\d{4}_\d\d|legacy))(?:_\d+)? ", plan))
    assert scanned == {partition_name(month)}, plan


@pytest.fixture
async def hot(own: Database) -> None:
    async with own.connection() as conn:
        version = await conn.fetchval("SELECT current_setting('server_version_num')::int")
    if version < 160_000:
        pytest.skip("on 15 any index on last_activity ends HOT updates, so there is none")


async def test_the_counters_updates_are_all_hot(
    own: Database, store: PostgresChatSessionStore, hot: None
) -> None:
    async def updates() -> tuple[int, int]:
        # Statistics are sent when a transaction ends: this one's on the connection that did the updates.
        async with own.connection() as conn:
            await conn.execute("SELECT pg_stat_force_next_flush()")
            await conn.execute("SELECT pg_stat_clear_snapshot()")
            record = await conn.fetchrow(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
                "WHERE schemaname = 'chat' AND relname = 'chat_sessions'"
            )
        return record["n_tup_upd"], record["n_tup_hot_upd"]

    sessions = [await new_session(store) for _ in range(100)]
    before = await updates()

    for _ in range(5):
        for session_id in sessions:
            await store.append(new_append(session_id))

    after = await updates()
    assert (after[0] - before[0], after[1] - before[1]) == (500, 500)
