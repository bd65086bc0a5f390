"""Writes that travel together: each is whole, ordered and fenced as if it were alone, and none pays for another."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Literal
from uuid import UUID, uuid4

import asyncpg
import pytest
from redis.asyncio import Redis
from sqlalchemy import event

from app.chat import session_month
from app.coherence import batches
from app.coherence.ports import CacheState
from app.errors import (
    CommitUnknown,
    IdempotencyKeyReused,
    Overloaded,
    SeqMismatch,
    SessionNotFound,
)
from app.hybrid import HybridChatSessionStore
from app.postgres.engine import Database, create_engine
from app.postgres.statements import IDS, LOCK_FREE_SESSIONS, LOCK_SESSIONS, MESSAGES
from app.redis_sessions.keys import session_key
from app.store import ChatSessionStore
from tests.contract.suite import until
from tests.factories import guide_value, keyed_append, new_append, turn_append
from tests.servers import Servers
from tests.stores import new_hybrid

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(
    servers: Servers, database: Database, state: CacheState
) -> AsyncIterator[HybridChatSessionStore]:
    async with AsyncExitStack() as stack:
        yield new_hybrid(stack, database, servers.redis_url, state=state).store


@pytest.fixture
def statements(database: Database) -> list[str]:
    """What is sent to PostgreSQL, by its first two words."""
    seen: list[str] = []

    def log(connection: asyncpg.Connection, _record: object) -> None:
        connection.driver_connection.add_query_logger(
            lambda record: seen.append(" ".join(record.query.split()[:2]))
        )

    event.listen(database.engine.sync_engine, "connect", log)
    return seen


@pytest.fixture
async def locked(database_url: str) -> AsyncIterator[Callable[[UUID], Awaitable[asyncpg.Connection]]]:
    """Locks a session's row, as somebody does who hangs, until the connection that it gives is closed."""
    opened: list[asyncpg.Connection] = []

    async def lock(session_id: UUID) -> asyncpg.Connection:
        conn = await asyncpg.connect(database_url)
        opened.append(conn)
        await conn.execute("BEGIN")
        await conn.execute("SELECT 1 FROM chat.chat_sessions WHERE session_id = $1 FOR UPDATE", session_id)
        return conn

    yield lock
    for conn in opened:
        await conn.close()


async def sessions(store: ChatSessionStore, count: int) -> list[UUID]:
    created = await asyncio.gather(*(store.create_session("user123") for _ in range(count)))
    return [one.session.session_id for one in created]


async def texts(store: ChatSessionStore, session_id: UUID) -> list[str]:
    history = await store.read_history(session_id, max_messages=1000)
    return [message.content for message in history.messages]


async def test_what_arrives_together_shares_its_transactions(
    store: HybridChatSessionStore, statements: list[str], database: Database
) -> None:
    # This month's partition is there from here on, and from here on each statement is seen.
    await store.append(new_append((await sessions(store, 1))[0]))
    await database.engine.dispose()
    ids = await sessions(store, 20)
    created = Counter(statements)
    statements.clear()

    await asyncio.gather(*(store.append(new_append(session_id, str(session_id))) for session_id in ids))

    appended = Counter(statements)
    # A batch or two each, and room for a fill where Redis was slow: one by one they would be twenty.
    assert 1 <= created["COMMIT"] <= 4
    assert 1 <= appended["WITH head"] <= 4
    assert appended["COMMIT"] <= 8
    assert [await texts(store, session_id) for session_id in ids] == [[str(session_id)] for session_id in ids]


async def test_appends_to_one_session_keep_their_order_and_lose_nothing(
    store: HybridChatSessionStore,
) -> None:
    one, other = await sessions(store, 2)

    appended = await asyncio.gather(
        *(store.append(new_append(one, str(number))) for number in range(30)),
        *(store.append(new_append(other, str(number))) for number in range(3)),
    )

    assert [done.last_seq for done in appended] == [*range(1, 31), *range(1, 4)]
    assert await texts(store, one) == [str(number) for number in range(30)]
    assert await texts(store, other) == ["0", "1", "2"]


async def test_each_append_of_a_batch_is_answered_by_its_own_rules(store: HybridChatSessionStore) -> None:
    moved, replayed, reused, begun, plain = await sessions(store, 5)
    await store.append(new_append(moved, "1"))
    first = await store.append(keyed_append(replayed, "k", "1"))
    await store.append(keyed_append(reused, "k", "1"))

    results = await asyncio.gather(
        store.append(new_append(moved, "2", if_match=0)),
        store.append(keyed_append(replayed, "k", "1")),
        store.append(keyed_append(reused, "k", "2", digest="f" * 32)),
        store.begin_turn(turn_append(begun, "ask", key="k"), window=10),
        store.append(new_append(uuid4(), "nobody")),
        store.append(new_append(plain, "foreign", user_id="somebody else")),
        store.append(new_append(plain, "mine", user_id="user123")),
        return_exceptions=True,
    )

    errors = [type(one) for one in results if isinstance(one, Exception)]
    assert errors == [SeqMismatch, IdempotencyKeyReused, SessionNotFound, SessionNotFound]
    assert results[1].replayed
    assert results[1].last_seq == first.last_seq
    assert [message.content for message in results[3].history] == ["ask"]
    found = [await texts(store, one) for one in (moved, replayed, reused, begun, plain)]
    assert found == [["1"], ["1"], ["1"], ["ask"], ["mine"]]


async def test_a_row_that_somebody_holds_delays_its_own_appends_only(
    store: HybridChatSessionStore, locked: Callable[[UUID], Awaitable[asyncpg.Connection]]
) -> None:
    # As many as there are places for batches, and one more.
    *held, other, another = await sessions(store, 5)
    holders = [await locked(one) for one in held]
    waiting = []
    for one in held * 2:
        waiting.append(asyncio.create_task(store.append(new_append(one, str(len(waiting))))))
        await asyncio.sleep(0.02)

    async with asyncio.timeout(1):
        for round_ in range(3):
            await asyncio.gather(*(store.append(new_append(one, str(round_))) for one in (other, another)))

    assert not any(task.done() for task in waiting)
    for holder in holders:
        await holder.close()
    assert [(await task).last_seq for task in waiting] == [1, 1, 1, 2, 2, 2]
    assert [await texts(store, one) for one in held] == [["0", "3"], ["1", "4"], ["2", "5"]]


async def test_what_postgresql_cannot_take_fails_alone(store: HybridChatSessionStore) -> None:
    bad, *others = await sessions(store, 8)
    # No request gets here with a NUL in it; what else a database may refuse is not known in advance.
    appends = [new_append(other, "good") for other in others]
    appends.insert(3, new_append(bad, "\0"))

    results = await asyncio.gather(*map(store.append, appends), return_exceptions=True)

    assert isinstance(results[3], asyncpg.CharacterNotInRepertoireError)
    assert all(one.last_seq == 1 for index, one in enumerate(results) if index != 3)
    assert [await texts(store, other) for other in others] == [["good"]] * 7
    assert await texts(store, bad) == []


async def test_a_session_that_redis_holds_is_adopted_and_the_others_are_not_kept_waiting(
    store: HybridChatSessionStore, redis: Redis
) -> None:
    theirs, *others = await sessions(store, 4)
    await redis.set(session_key(theirs), guide_value(theirs, "from the guide"), ex=100)

    results = await asyncio.gather(*(store.append(new_append(one, "new")) for one in (theirs, *others)))

    assert [one.last_seq for one in results] == [2, 1, 1, 1]
    assert await texts(store, theirs) == ["from the guide", "new"]
    assert [await texts(store, one) for one in others] == [["new"]] * 3


async def test_a_caller_that_goes_away_in_the_middle_of_a_batch_harms_nobody(
    store: HybridChatSessionStore, locked: Callable[[UUID], Awaitable[asyncpg.Connection]]
) -> None:
    ids = await sessions(store, 5)
    calls = [asyncio.create_task(store.append(new_append(one, "a"))) for one in ids]
    while not store._batches.under_way:  # noqa: ASYNC110 - the turn of the loop in which it departs
        await asyncio.sleep(0)
    calls[2].cancel()

    results = await asyncio.gather(*calls, return_exceptions=True)
    await store.close()

    assert [isinstance(one, asyncio.CancelledError) for one in results] == [False, False, True, False, False]
    # It had departed: it is whole, as the others are.
    assert [await texts(store, one) for one in ids] == [["a"]] * 5


async def test_more_than_can_wait_is_refused_and_nothing_of_it_is_kept(
    store: HybridChatSessionStore,
    locked: Callable[[UUID], Awaitable[asyncpg.Connection]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (session_id,) = await sessions(store, 1)
    bounds = batches.Bounds(batches=1, items=1, share=1, size=2**20, waiting_items=2, waiting_size=2**20)
    monkeypatch.setattr(store._batches._alone, "_bounds", bounds)
    holder = await locked(session_id)

    async def append_once(number: int) -> object:
        return await store.append(new_append(session_id, str(number)))

    calls = []
    for number in range(5):
        calls.append(asyncio.create_task(append_once(number)))
        await asyncio.sleep(0.03)
    await holder.close()
    results = await asyncio.gather(*calls, return_exceptions=True)

    refused = [one for one in results if isinstance(one, Exception)]
    assert [type(one) for one in refused] == [Overloaded] * 2
    assert len(await texts(store, session_id)) == 3


async def test_months_that_have_no_partition_yet_are_made_for_the_whole_batch(
    store: HybridChatSessionStore, database: Database
) -> None:
    (here,) = await sessions(store, 1)
    # UUIDv7s of 2090, one in each of three months.
    far = [
        UUID(int=(3_787_000_000_000 + month * 2_700_000_000) << 80 | 7 << 76 | 2 << 62) for month in range(3)
    ]
    async with database.connection() as conn:
        await conn.executemany(
            "INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity) "
            "VALUES ($1, 'user123', now(), now())",
            [(session_id,) for session_id in far],
        )

    appended = await asyncio.gather(*(store.append(new_append(one, "a")) for one in (here, *far)))

    assert [one.last_seq for one in appended] == [1] * 4
    assert [await texts(store, one) for one in far] == [["a"]] * 3


async def test_rows_are_locked_in_the_order_of_their_ids_however_they_are_found(
    store: HybridChatSessionStore,
    database: Database,
    database_url: str,
    locked: Callable[[UUID], Awaitable[asyncpg.Connection]],
) -> None:
    """Two that lock in the orders of two plans would wait for each other."""
    first, second = sorted(await sessions(store, 2))
    async with database.connection() as conn:
        # From here on a walk through the table meets the second one before the first.
        await conn.execute("UPDATE chat.chat_sessions SET user_id = user_id WHERE session_id = $1", first)
        order = await conn.fetch("SELECT session_id FROM chat.chat_sessions ORDER BY ctid")
    holder, walker = await locked(first), await asyncpg.connect(database_url)
    await walker.execute("SET enable_indexscan = off; SET enable_bitmapscan = off; BEGIN")
    locking = asyncio.create_task(walker.fetch(LOCK_SESSIONS, [second, first]))

    async def waits() -> bool:
        async with database.connection() as conn:
            return bool(await conn.fetchval("SELECT pg_blocking_pids($1) <> '{}'", walker.get_server_pid()))

    await until(waits)
    async with database.connection() as conn:
        free = await conn.fetch(LOCK_FREE_SESSIONS, [first, second])
    await holder.close()
    records = await locking
    await walker.close()

    assert [record["session_id"] for record in order] == [second, first]
    assert [record["session_id"] for record in free] == [second]
    assert [record["session_id"] for record in records] == [first, second]


async def leave_half_done(database: Database, session_id: UUID) -> None:
    async with database.transaction() as conn:
        await conn.execute(
            "INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity) "
            "VALUES ($1, 'user123', now(), now())",
            session_id,
        )
        raise ZeroDivisionError


async def test_what_one_caller_left_half_done_is_not_committed_by_the_next(
    database: Database, database_url: str
) -> None:
    ours = Database(create_engine(database_url, application_name="tests", pool_size=1))
    session_id = uuid4()
    try:
        with pytest.raises(ZeroDivisionError):
            await leave_half_done(ours, session_id)
        async with ours.transaction() as conn:
            found = await conn.fetch("SELECT 1 FROM chat.chat_sessions WHERE session_id = $1", session_id)
    finally:
        await ours.close()

    assert found == []
    async with database.connection() as conn:
        assert await conn.fetch("SELECT 1 FROM chat.chat_sessions WHERE session_id = $1", session_id) == []


@pytest.mark.parametrize(
    ("code", "error"), [("57P01", CommitUnknown), ("23514", asyncpg.CheckViolationError)]
)
async def test_a_commit_that_a_server_breaks_off_as_it_goes_down_is_unknown(
    database_url: str, code: str, error: type[Exception]
) -> None:
    """It may have written the commit's record. Of every other error that a COMMIT meets, nothing is left."""
    ours = Database(create_engine(database_url, application_name="tests", pool_size=1))
    try:
        with pytest.raises(error):
            await commit_that_fails(ours, code)
    finally:
        await ours.close()


async def commit_that_fails(database: Database, code: str) -> None:
    async with database.transaction() as conn:
        await conn.execute(
            "CREATE TEMP TABLE noted (a int); "
            "CREATE FUNCTION pg_temp.fail() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION 'as the test says' USING ERRCODE = '{code}'; END $$; "
            "CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON noted DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION pg_temp.fail(); "
            "INSERT INTO noted VALUES (1)"
        )


@pytest.mark.parametrize(("statement", "column"), [(MESSAGES, "seq"), (IDS, "message_id")])
async def test_messages_come_in_the_order_of_their_seqs_however_they_are_found(
    store: HybridChatSessionStore, database: Database, statement: str, column: str
) -> None:
    (session_id,) = await sessions(store, 1)
    appended = new_append(session_id, *"abc")
    await store.append(appended)
    wanted = {"seq": [1, 2, 3], "message_id": [message.message_id for message in appended.messages]}
    async with database.transaction() as conn:
        # From here on a walk through the table meets the first one last.
        await conn.execute(
            "UPDATE chat.chat_messages SET content = content WHERE session_id = $1 AND seq = 1", session_id
        )
        await conn.execute("SET LOCAL enable_indexscan = off")
        await conn.execute("SET LOCAL enable_bitmapscan = off")
        records = await conn.fetch(statement, session_id, session_month(session_id), 1, 3)

    assert [record[column] for record in records] == wanted[column]


@pytest.mark.parametrize("pooler", ["none", "transaction"])
async def test_a_transaction_is_durable_and_bounded_whatever_the_role_says(
    database: Database, database_url: str, pooler: Literal["none", "transaction"]
) -> None:
    settings = {
        "synchronous_commit": ("off", "on"),
        "statement_timeout": ("1h", "3s"),
        "idle_in_transaction_session_timeout": ("1h", "3s"),
    }
    async with database.connection() as conn:
        for name, (role, _) in settings.items():
            await conn.execute(f"ALTER ROLE CURRENT_USER SET {name} = '{role}'")
    ours = Database(create_engine(database_url, application_name="tests", pooler=pooler), pooler=pooler)
    try:
        async with ours.transaction() as conn:
            found = {name: await conn.fetchval(f"SHOW {name}") for name in settings}
    finally:
        await ours.close()
        async with database.connection() as conn:
            await conn.execute("ALTER ROLE CURRENT_USER RESET ALL")

    assert found == {name: wanted for name, (_, wanted) in settings.items()}
