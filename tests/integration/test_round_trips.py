"""What an operation costs: every command sent to Redis and every statement sent to PostgreSQL.

`COSTS` is the one table. Commands of Redis are what its MONITOR saw clients send, a script under its own name;
MULTI ... EXEC travel together, and so do EXISTS of many keys. Statements of PostgreSQL are what asyncpg sent:
BEGIN ... COMMIT is one transaction, every other statement is one by itself. A mark travels beside the append.

No heartbeat runs here: a process sends a few statements and commands a second more, whatever is asked of it.
"""

import hashlib
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis
from sqlalchemy import event

from app.chat import keyed_message_id, new_uuid
from app.coherence.lease import Lease
from app.coherence.ports import CacheState
from app.errors import SessionNotFound
from app.postgres.cache_state import PostgresStateKeeper
from app.postgres.engine import Database
from app.postgres.store import PostgresChatSessionStore
from app.redis_only import RedisOnlyChatSessionStore
from app.redis_sessions import client as redis_client
from app.redis_sessions.client import script_text
from app.redis_sessions.keys import session_key
from app.redis_sessions.store import RedisChatSessionStore
from app.store import ChatSessionStore, FinishTurn
from tests.contract.suite import new_session
from tests.factories import keyed_append, new_answer, new_append, new_turn, turn_append
from tests.servers import Servers
from tests.stores import new_hybrid

pytestmark = pytest.mark.anyio

MESSAGES_MAX = 10

Cost = tuple[list[str], list[str]]

WATCHED = ["WATCH", "GET"]
FILL = [*WATCHED, "MULTI", "SET", "EXEC"]
STAMP = [*WATCHED, "MULTI", "SETRANGE", "SETRANGE", "PEXPIRE", "EXEC"]
TOUCH = [*WATCHED, "MULTI", "PEXPIRE", "EXEC"]
NOTHING_THERE = [*WATCHED, "UNWATCH"]

CREATE = ["BEGIN", "create", "COMMIT"]
WRITE = ["BEGIN", "lock session", "append", "COMMIT"]
KEYED_WRITE = ["BEGIN", "lock session", "state and stored", "append", "COMMIT"]
REPLAY = ["BEGIN", "lock session", "state and stored", "COMMIT"]
REPLAYED_TURN = ["BEGIN", "lock session", "state and stored", "messages by id", "COMMIT"]
BEGUN = ["BEGIN", "lock session", "state and stored", "hold turn", "append", "COMMIT"]
FINISHED = ["BEGIN", "lock session", "release turn", "append", "COMMIT"]
LOCKED = ["BEGIN", "lock session", "state", "COMMIT"]
LOCKED_NOT_FOUND = ["BEGIN", "lock session", "state", "ROLLBACK"]
WRITE_NOT_FOUND = ["BEGIN", "lock session", "sessions there", "COMMIT"]
LOCKED_READ = ["BEGIN", "lock session", "state", "messages", "COMMIT"]
DELETE = [
    *("BEGIN", "lock session for delete", "state"),
    *("delete messages", "delete turns", "delete session", "COMMIT"),
]
LIST = ["BEGIN", "list", "ROLLBACK"]
#: What Redis held is stored and committed; then the entry is replaced, and with it the row's owner.
ADOPTED = [
    *("BEGIN", "lock session", "state", "messages by id", "append", "COMMIT"),
    *("BEGIN", "lock session", "state", "messages", "give", "COMMIT"),
]
#: Where there was no row, the touch that makes sure of the entry ends the watch: it is looked at once more.
ADOPTED_WITH_A_NEW_ROW = [
    *("BEGIN", "lock session", "state", "create unless there", "messages by id", "append", "COMMIT"),
    *("BEGIN", "lock session", "state", "messages by id", "COMMIT"),
    *("BEGIN", "lock session", "state", "messages", "give", "COMMIT"),
]
HANDED_OVER = ["BEGIN", "lock session", "state", "messages", "give", "COMMIT"]


def hybrid(redis: list[str], postgres: list[str]) -> dict[str, Cost]:
    """The same whether reads trust a lease or compare: writes always mark."""
    return {"lease": (redis, postgres), "always": (redis, postgres)}


#: Operation -> store -> (what Redis is sent, what PostgreSQL is sent). The stores: hybrid, whose reads trust
#: a lease; hybrid with CACHE_VERIFY=always; Redis alone; Redis-only mode over a database; PostgreSQL alone.
COSTS: dict[str, dict[str, Cost]] = {
    # Writes: one transaction, one mark, one publish.
    "create": {
        **hybrid(["SET", "settle"], CREATE),
        "redis": (["ZADD", "SET"], []),
        "redis over a database": (["offer", "settle"], CREATE),
        "postgres": ([], CREATE),
    },
    "append": {
        **hybrid(["mark", "publish"], WRITE),
        "redis": (["append"], []),
        "redis over a database": (["append"], []),
        "postgres": ([], WRITE),
    },
    "keyed append": {
        **hybrid(["mark", "publish"], KEYED_WRITE),
        "redis": (["append"], []),
        "redis over a database": (["append"], []),
        "postgres": ([], KEYED_WRITE),
    },
    "replayed append": {
        **hybrid([], REPLAY),
        "redis": (["append"], []),
        "redis over a database": (["append"], []),
        "postgres": ([], REPLAY),
    },
    "append to an evicted session": {
        **hybrid(["mark", "publish", *FILL], WRITE + LOCKED_READ),
        "postgres": ([], WRITE),
    },
    "append to an entry of an older epoch": hybrid(["mark", "publish"], WRITE),
    "append to an unknown session": {
        # Redis may hold it alone.
        **hybrid(["GETEX"], WRITE_NOT_FOUND),
        "redis": (["append"], []),
        "redis over a database": (["append"], LOCKED),
        "postgres": ([], WRITE_NOT_FOUND),
    },
    "message call": {
        **hybrid(["mark", "publish"] * 2, WRITE * 2),
        "redis": (["append"] * 2, []),
        "redis over a database": (["append"] * 2, []),
        "postgres": ([], [*WRITE, "history", *WRITE]),
    },
    "keyed message call": {
        **hybrid(["mark", "publish"] * 2, BEGUN + FINISHED),
        "redis": (["append"] * 2, []),
        "redis over a database": (["append"] * 2, []),
        "postgres": ([], [*BEGUN, "history", *FINISHED]),
    },
    "replayed message call": {
        **hybrid([], REPLAYED_TURN),
        "redis": (["append"], []),
        "redis over a database": (["append"], []),
        "postgres": ([], REPLAYED_TURN),
    },
    "abandoned turn": {
        **hybrid([], ["release turn"]),
        "redis": (["release_turn"], []),
        "redis over a database": (["release_turn"], []),
        "postgres": ([], ["release turn"]),
    },
    "delete": {
        **hybrid(["remove"], DELETE),
        "redis": (["delete", "ZREM"], []),
        "redis over a database": (["EXISTS", "delete", "ZREM"], DELETE),
        "postgres": ([], DELETE),
    },
    # Reads. A trusted hit: one command, and nothing of PostgreSQL.
    "session, a hit": {
        "lease": (["GETEX"], []),
        "always": (["GETEX"], ["lookup"]),
        "redis": (["GETEX"], []),
        "redis over a database": (["GETEX"], []),
        "postgres": ([], ["lookup"]),
    },
    "history, a hit": {
        "lease": (["GETEX"], []),
        "always": (["GETEX"], ["lookup"]),
        "redis": (["GETEX"], []),
        "redis over a database": (["GETEX"], []),
        "postgres": ([], ["history"]),
    },
    "history, an entry of an older epoch": {
        "lease": (["GETEX", *STAMP], LOCKED),
        "always": (["GETEX"], ["lookup"]),
    },
    "history, a miss": {
        "lease": (["GETEX", *FILL], LOCKED_READ),
        "always": (["GETEX", *FILL], ["lookup", *LOCKED_READ]),
        "postgres": ([], ["history"]),
    },
    "history beyond the window": {
        "lease": (["GETEX"], ["history"]),
        "always": (["GETEX"], ["lookup", "history"]),
        "redis": (["GETEX"], []),
        "redis over a database": (["GETEX"], []),
        "postgres": ([], ["history"]),
    },
    "unknown session": {
        "lease": (["GETEX", *NOTHING_THERE], LOCKED_NOT_FOUND),
        "always": (["GETEX"], ["lookup"]),
        "redis": (["GETEX"], []),
        "redis over a database": (["GETEX"], LOCKED),
        "postgres": ([], ["lookup"]),
    },
    "list": {
        **hybrid([], LIST),
        "redis": (["ZREVRANGE", "EXISTS", "GETRANGE"], []),
        # Two sessions that Redis owns, one of them gone: what is alive, together; then the heads of the page.
        "redis over a database": (["EXISTS", "EXISTS", "GETRANGE"], ["owned by redis", *LIST]),
        "postgres": ([], LIST),
    },
    # While the cache is off nothing waits for Redis.
    "create, the cache is off": hybrid([], CREATE),
    "append, the cache is off": hybrid([], WRITE),
    "message call, the cache is off": hybrid([], [*WRITE, "history", *WRITE]),
    "session, the cache is off": hybrid([], ["lookup"]),
    "history, the cache is off": hybrid([], ["lookup", "history"]),
    "delete, the cache is off": hybrid([], DELETE),
    # A session changes hands, once.
    "history, a session that was handed to Redis": {
        "lease": (["GETEX", *FILL, "GETEX"], ADOPTED),
        "always": (["GETEX", *FILL, "GETEX"], ["lookup", *ADOPTED, "lookup"]),
    },
    "history, a session that only Redis has": {
        "lease": (["GETEX", *TOUCH, *FILL, "GETEX"], ADOPTED_WITH_A_NEW_ROW),
        "always": (["GETEX", *TOUCH, *FILL, "GETEX"], ["lookup", *ADOPTED_WITH_A_NEW_ROW, "lookup"]),
    },
    "append to a session that only Redis has": hybrid(
        ["GETEX", *TOUCH, *FILL, "mark", "publish"], WRITE_NOT_FOUND + ADOPTED_WITH_A_NEW_ROW + WRITE
    ),
    "history, a session that PostgreSQL owns": {
        "redis over a database": (["GETEX", "offer", "settle", "GETEX"], HANDED_OVER),
    },
    "append to a session that PostgreSQL owns": {
        "redis over a database": (["append", "offer", "settle", "append"], HANDED_OVER),
    },
    "history, a session that has expired": {
        "redis over a database": (["GETEX", "GET"], LOCKED),
    },
}

#: What a statement of `app/postgres` is, by text that only it has.
STATEMENTS = {
    r"^BEGIN": "BEGIN",
    r"^COMMIT": "COMMIT",
    r"^ROLLBACK": "ROLLBACK",
    r"ORDER BY session_id FOR NO KEY UPDATE": "lock session",
    r"chat_sessions WHERE session_id = \$1 FOR UPDATE": "lock session for delete",
    r"^WITH head AS": "append",
    r"JOIN chat\.chat_messages m USING": "state and stored",
    r"^WITH created AS": "create",
    r"^INSERT INTO chat\.chat_sessions": "create unless there",
    r"settled FROM chat\.cache_state c WHERE id = 1$": "state",
    r"session_id = ANY\(\$1::uuid\[\]\)$": "sessions there",
    r"LEFT JOIN chat\.chat_sessions s": "lookup",
    r"seq BETWEEN": "messages",
    r"message_id = ANY": "messages by id",
    r"LEFT JOIN LATERAL": "history",
    r"SET owner = \$2": "give",
    r"user_id = \$1 AND owner = 'redis'": "owned by redis",
    r"^INSERT INTO chat\.chat_turns": "hold turn",
    r"^DELETE FROM chat\.chat_turns .* RETURNING": "release turn",
    r"^DELETE FROM chat\.chat_messages": "delete messages",
    r"^DELETE FROM chat\.chat_turns WHERE session_id = \$1$": "delete turns",
    r"^DELETE FROM chat\.chat_sessions": "delete session",
    r"SELECT count\(\*\)": "list",
}

#: A script's digest -> its file's name.
SCRIPTS = {
    hashlib.sha1(script_text(path.stem).encode(), usedforsecurity=False).hexdigest(): path.stem
    for path in (Path(redis_client.__file__).parent / "lua").glob("*.lua")
    if path.stem != "entry"
}


def statement_name(query: str) -> str:
    query = " ".join(query.split())
    return next((name for pattern, name in STATEMENTS.items() if re.search(pattern, query)), query)


def command_name(command: str) -> str:
    name, *arguments = command.split()
    return SCRIPTS[arguments[0]] if name.upper() == "EVALSHA" else name.upper()


@dataclass
class Sent:
    """What has been sent since it was asked last."""

    _statements: list[str]
    _monitor: Any
    _client: Redis

    async def take(self) -> Cost:
        """The commands of clients (not of scripts) in Redis, and the statements in PostgreSQL."""
        marker = str(new_uuid())
        await self._client.echo(marker)
        commands: list[dict[str, Any]] = []
        while not commands or marker not in commands[-1]["command"]:
            commands.append(await self._monitor.next_command())
        statements = self._statements.copy()
        self._statements.clear()
        names = [command_name(one["command"]) for one in commands[:-1] if one["client_type"] != "lua"]
        return names, statements


@pytest.fixture
async def sent(servers: Servers, database: Database, state: CacheState) -> AsyncIterator[Sent]:
    statements: list[str] = []
    engine = database.engine.sync_engine

    def log_driver(connection: Any, _record: object) -> None:
        connection.driver_connection.add_query_logger(
            lambda record: statements.append(statement_name(record.query))
        )

    def log_core(*arguments: Any) -> None:
        # The driver logs no prepared statement, and SQLAlchemy prepares each of its own.
        statements.append(statement_name(arguments[2]))

    # The connection that made the database empty is dropped: each one from here on is counted.
    await database.engine.dispose()
    event.listen(engine, "connect", log_driver)
    event.listen(engine, "after_cursor_execute", log_core)
    async with Redis.from_url(servers.redis_url, db=1) as client, client.monitor() as monitor:
        yield Sent(statements, monitor, client)


@pytest.fixture
async def aux(servers: Servers) -> AsyncIterator[Redis]:
    async with Redis.from_url(servers.redis_url, db=2) as aux:
        yield aux


@dataclass(kw_only=True)
class World:
    """The stores on one database, and the state that they serve in; it can be changed behind their backs."""

    keeper: PostgresStateKeeper
    trusted: CacheState
    redis: Redis
    redis_alone: RedisChatSessionStore
    postgres_alone: PostgresChatSessionStore
    stores: dict[str, ChatSessionStore]
    leases: list[Lease] = field(default_factory=list)

    async def begin_epoch(self, **changes: object) -> None:
        """A new epoch that has settled: all know of it, and have a lease on it that does not end."""
        state = await self.keeper.change(await self.keeper.read(), replace(self.trusted, **changes))
        for lease in self.leases:
            lease.learn(state, asked_at=math.inf)

    async def begin_epoch_of(self, kind: str) -> None:
        changes = {"redis over a database": {"mode": "redis-only"}, "postgres": {"cache": "off"}}
        await self.begin_epoch(**changes.get(kind, {}))


@pytest.fixture
async def world(
    servers: Servers, database: Database, redis: Redis, state: CacheState
) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:

        def redis_store(*, claims: bool) -> RedisChatSessionStore:
            store = RedisChatSessionStore(
                redis_url=servers.redis_url, messages_max=MESSAGES_MAX, claims=claims
            )
            stack.push_async_callback(store.close)
            return store

        lease, always = (
            new_hybrid(
                stack, database, servers.redis_url, state=state, messages_max=MESSAGES_MAX, verify=verify
            )
            for verify in ("lease", "always")
        )
        redis_alone, its_lease = redis_store(claims=True), Lease()
        yield World(
            keeper=lease.keeper,
            trusted=state,
            redis=redis,
            redis_alone=redis_alone,
            postgres_alone=lease.durable,
            leases=[lease.lease, always.lease, its_lease],
            stores={
                "lease": lease.store,
                "always": always.store,
                "redis": redis_alone,
                "redis over a database": RedisOnlyChatSessionStore(
                    redis_store(claims=False), lease.durable, lease=its_lease, messages_max=MESSAGES_MAX
                ),
                "postgres": lease.durable,
            },
        )


Operation = Callable[[ChatSessionStore, UUID], Awaitable[Any]]


async def history(store: ChatSessionStore, session_id: UUID) -> None:
    await store.read_history(session_id, max_messages=5)


async def append(store: ChatSessionStore, session_id: UUID) -> None:
    await store.append(new_append(session_id, "a", "b"))


async def keyed(store: ChatSessionStore, session_id: UUID) -> None:
    await store.append(keyed_append(session_id, "key", "a", "b"))


async def call_assistant(store: ChatSessionStore, session_id: UUID, *, key: str | None = None) -> None:
    turn = await store.begin_turn(turn_append(session_id, key=key), window=5)
    await store.finish_turn(turn, new_answer(turn))


async def keyed_call(store: ChatSessionStore, session_id: UUID) -> None:
    await call_assistant(store, session_id, key="turn")


async def begin(store: ChatSessionStore, session_id: UUID) -> None:
    await store.begin_turn(turn_append(session_id, key="turn"), window=5)


async def abandon(store: ChatSessionStore, session_id: UUID) -> None:
    lease = FinishTurn(question_id=keyed_message_id(session_id, "turn", 0), token=new_uuid())
    await store.abandon_turn(new_turn(session_id, lease=lease))


async def fill_the_window(store: ChatSessionStore, session_id: UUID) -> None:
    await store.append(new_append(session_id, *"abcdefgh"))


async def read_too_much(store: ChatSessionStore, session_id: UUID) -> None:
    await store.read_history(session_id, max_messages=12)


async def look(store: ChatSessionStore, session_id: UUID) -> None:
    await store.get_session(session_id)


async def create(store: ChatSessionStore, _session_id: UUID) -> None:
    await store.create_session("user123")


async def delete(store: ChatSessionStore, session_id: UUID) -> None:
    await store.delete_session(session_id)


async def list_all(store: ChatSessionStore, _session_id: UUID) -> None:
    await store.list_sessions("user123", limit=100)


def refused(call: Operation, *, unknown: bool = False) -> Operation:
    async def refused_call(store: ChatSessionStore, session_id: UUID) -> None:
        with pytest.raises(SessionNotFound):
            await call(store, new_uuid() if unknown else session_id)

    return refused_call


#: What happens between the session's making and what is counted: gives the session that is then used.
Before = Callable[[World, ChatSessionStore, UUID], Awaitable[UUID]]


def after(*calls: Operation) -> Before:
    async def before(_world: World, store: ChatSessionStore, session_id: UUID) -> UUID:
        for call in calls:
            await call(store, session_id)
        return session_id

    return before


def in_a_new_epoch(**changes: object) -> Before:
    async def before(world: World, _store: ChatSessionStore, session_id: UUID) -> UUID:
        await world.begin_epoch(**changes)
        return session_id

    return before


async def evicted(world: World, _store: ChatSessionStore, session_id: UUID) -> UUID:
    await world.redis.delete(session_key(session_id))
    return session_id


async def only_in_redis(world: World, _store: ChatSessionStore, _session_id: UUID) -> UUID:
    return await new_session(world.redis_alone, *"abcde")


async def handed_to_redis(world: World, _store: ChatSessionStore, _session_id: UUID) -> UUID:
    await world.begin_epoch_of("redis over a database")
    session_id = await new_session(world.stores["redis over a database"], *"abcde")
    await world.begin_epoch(mode="draining")
    return session_id


async def owned_by_postgres(world: World, _store: ChatSessionStore, _session_id: UUID) -> UUID:
    await world.begin_epoch_of("postgres")
    session_id = await new_session(world.postgres_alone, *"abcde")
    await world.begin_epoch_of("redis over a database")
    return session_id


#: Operation -> (what happens before, what is counted), on a session of five messages.
OPERATIONS: dict[str, tuple[Before, Operation]] = {
    "create": (after(), create),
    "append": (after(), append),
    "keyed append": (after(), keyed),
    "replayed append": (after(keyed), keyed),
    "append to an evicted session": (evicted, append),
    "append to an entry of an older epoch": (in_a_new_epoch(), append),
    "append to an unknown session": (after(), refused(append, unknown=True)),
    "message call": (after(), call_assistant),
    "keyed message call": (after(), keyed_call),
    "replayed message call": (after(keyed_call), begin),
    "abandoned turn": (after(begin), abandon),
    "delete": (after(), delete),
    "session, a hit": (after(), look),
    "history, a hit": (after(), history),
    "history, an entry of an older epoch": (in_a_new_epoch(), history),
    "history, a miss": (evicted, history),
    "history beyond the window": (after(fill_the_window), read_too_much),
    "unknown session": (after(), refused(look, unknown=True)),
    "list": (after(), list_all),
    "create, the cache is off": (in_a_new_epoch(cache="off"), create),
    "append, the cache is off": (in_a_new_epoch(cache="off"), append),
    "message call, the cache is off": (in_a_new_epoch(cache="off"), call_assistant),
    "session, the cache is off": (in_a_new_epoch(cache="off"), look),
    "history, the cache is off": (in_a_new_epoch(cache="off"), history),
    "delete, the cache is off": (in_a_new_epoch(cache="off"), delete),
    "history, a session that was handed to Redis": (handed_to_redis, history),
    "history, a session that only Redis has": (only_in_redis, history),
    "append to a session that only Redis has": (only_in_redis, append),
    "history, a session that PostgreSQL owns": (owned_by_postgres, history),
    "append to a session that PostgreSQL owns": (owned_by_postgres, append),
    "history, a session that has expired": (evicted, refused(history)),
}


@pytest.mark.parametrize(
    ("operation", "kind"), [(operation, kind) for operation, costs in COSTS.items() for kind in costs]
)
async def test_an_operation_costs_what_the_table_says(
    world: World, sent: Sent, redis: Redis, aux: Redis, operation: str, kind: str
) -> None:
    store = world.stores[kind]
    before, measured = OPERATIONS[operation]
    took = []

    # The first round warms connections, prepared statements and scripts.
    for _ in range(2):
        await world.begin_epoch_of(kind)
        session_id = await new_session(store, *"abcde")
        session_id = await before(world, store, session_id)
        await sent.take()
        await measured(store, session_id)
        took.append(await sent.take())
        await redis.flushdb()
        await aux.flushdb()

    assert took[1] == COSTS[operation][kind]


def test_every_operation_has_a_cost() -> None:
    assert set(COSTS) == set(OPERATIONS)


def test_what_is_promised_of_the_hybrid_store_stands_in_the_table() -> None:
    """Issue 3: "an append is one transaction, one mark, one publish; a trusted hit is one command, no PostgreSQL"."""
    redis, postgres = COSTS["append"]["lease"]

    assert redis == ["mark", "publish"]
    assert (postgres[0], postgres.count("BEGIN"), postgres[-1]) == ("BEGIN", 1, "COMMIT")
    assert COSTS["history, a hit"]["lease"] == COSTS["session, a hit"]["lease"] == (["GETEX"], [])
