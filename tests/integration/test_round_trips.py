"""What an operation costs at level 0: every command sent to Redis and every statement sent to PostgreSQL.

`COSTS` is the one table. Commands of Redis are what its MONITOR saw clients send; MULTI, SET and EXEC
travel together. Statements of PostgreSQL are what asyncpg sent: BEGIN ... COMMIT is one transaction, every
other statement is one by itself.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis
from sqlalchemy import event

from app.chat import keyed_message_id, new_uuid
from app.errors import SessionNotFound
from app.hybrid import HybridChatSessionStore
from app.postgres.engine import Database
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.client import BoundedRedis, create_redis
from app.redis_sessions.keys import session_key
from app.redis_sessions.store import RedisChatSessionStore
from app.store import ChatSessionStore, FinishTurn
from tests.factories import keyed_append, new_answer, new_append, new_turn, turn_append
from tests.servers import Servers

pytestmark = pytest.mark.anyio

MESSAGES_MAX = 10

FILL = ["WATCH", "GET", "MULTI", "SET", "EXEC"]
WRITE = ["BEGIN", "lock session", "state", "append", "COMMIT"]
KEYED_WRITE = ["BEGIN", "lock session", "state and stored", "append", "COMMIT"]
LOCKED_READ = ["BEGIN", "lock session", "state", "messages", "COMMIT"]
LIST = ["BEGIN", "list", "ROLLBACK"]
DELETE = ["BEGIN", "lock session for delete", "delete messages", "delete turns", "delete session", "COMMIT"]
BEGUN = ["BEGIN", "lock session", "state and stored", "hold turn", "append", "COMMIT"]
FINISHED = ["BEGIN", "lock session", "state", "release turn", "append", "COMMIT"]

#: Operation -> store -> (what Redis is sent, what PostgreSQL is sent).
COSTS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "create": {
        "hybrid": (FILL, ["BEGIN", "create", "COMMIT"]),
        "redis": (["ZADD", "SET"], []),
        "postgres": ([], ["BEGIN", "create", "COMMIT"]),
    },
    "append": {
        "hybrid": (["EVALSHA"], WRITE),
        "redis": (["EVALSHA"], []),
        "postgres": ([], WRITE),
    },
    "keyed append": {
        "hybrid": (["EVALSHA"], KEYED_WRITE),
        "redis": (["EVALSHA"], []),
        "postgres": ([], KEYED_WRITE),
    },
    "replayed append": {
        "hybrid": ([], ["BEGIN", "lock session", "state and stored", "COMMIT"]),
        "redis": (["EVALSHA"], []),
        "postgres": ([], ["BEGIN", "lock session", "state and stored", "COMMIT"]),
    },
    "append to an evicted session": {
        "hybrid": (["EVALSHA", *FILL], WRITE + LOCKED_READ),
        "postgres": ([], WRITE),
    },
    "message call": {
        "hybrid": (["EVALSHA", "EVALSHA"], WRITE + WRITE),
        "redis": (["EVALSHA", "EVALSHA"], []),
        "postgres": ([], [*WRITE, "history", *WRITE]),
    },
    "keyed message call": {
        "hybrid": (["EVALSHA", "EVALSHA"], BEGUN + FINISHED),
        "redis": (["EVALSHA", "EVALSHA"], []),
        "postgres": ([], [*BEGUN, "history", *FINISHED]),
    },
    "replayed message call": {
        "hybrid": ([], ["BEGIN", "lock session", "state and stored", "messages by id", "COMMIT"]),
        "redis": (["EVALSHA"], []),
        "postgres": ([], ["BEGIN", "lock session", "state and stored", "messages by id", "COMMIT"]),
    },
    "get_session": {
        "hybrid": (["GETEX"], ["lookup"]),
        "redis": (["GETEX"], []),
        "postgres": ([], ["lookup"]),
    },
    "history, a hit": {
        "hybrid": (["GETEX"], ["lookup"]),
        "redis": (["GETEX"], []),
        "postgres": ([], ["history"]),
    },
    "history, a miss": {
        "hybrid": (["GETEX", *FILL], ["lookup", *LOCKED_READ]),
        "postgres": ([], ["history"]),
    },
    "history beyond the window": {
        "hybrid": (["GETEX"], ["lookup", "history"]),
        "redis": (["GETEX"], []),
        "postgres": ([], ["history"]),
    },
    "unknown session": {
        "hybrid": (["GETEX"], ["lookup"]),
        "redis": (["GETEX"], []),
        "postgres": ([], ["lookup"]),
    },
    "list": {
        "hybrid": ([], LIST),
        "redis": (["ZREVRANGE", "EXISTS", "GETRANGE"], []),
        "postgres": ([], LIST),
    },
    "delete": {
        "hybrid": (["EVALSHA"], DELETE),
        "redis": (["EVALSHA", "ZREM"], []),
        "postgres": ([], DELETE),
    },
    "abandoned turn": {
        "hybrid": ([], ["release turn"]),
        "redis": (["EVALSHA"], []),
        "postgres": ([], ["release turn"]),
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
    r"cache FROM chat\.cache_state WHERE id = 1": "state",
    r"^INSERT INTO chat\.chat_sessions": "create",
    r"LEFT JOIN chat\.chat_sessions s": "lookup",
    r"seq BETWEEN": "messages",
    r"message_id = ANY": "messages by id",
    r"LEFT JOIN LATERAL": "history",
    r"^INSERT INTO chat\.chat_turns": "hold turn",
    r"^DELETE FROM chat\.chat_turns .* RETURNING": "release turn",
    r"^DELETE FROM chat\.chat_messages": "delete messages",
    r"^DELETE FROM chat\.chat_turns WHERE session_id = \$1$": "delete turns",
    r"^DELETE FROM chat\.chat_sessions": "delete session",
    r"SELECT count\(\*\)": "list",
}


def statement_name(query: str) -> str:
    query = " ".join(query.split())
    return next((name for pattern, name in STATEMENTS.items() if re.search(pattern, query)), query)


@dataclass
class Sent:
    """What has been sent since it was asked last."""

    _statements: list[str]
    _monitor: Any
    _client: Redis

    async def take(self) -> tuple[list[str], list[str]]:
        """The commands of clients (not of scripts) in Redis, and the statements in PostgreSQL."""
        marker = str(new_uuid())
        await self._client.echo(marker)
        commands: list[dict[str, Any]] = []
        while not commands or marker not in commands[-1]["command"]:
            commands.append(await self._monitor.next_command())
        statements = self._statements.copy()
        self._statements.clear()
        names = [one["command"].split()[0].upper() for one in commands[:-1] if one["client_type"] != "lua"]
        return names, statements


@pytest.fixture
async def sent(servers: Servers, database: Database) -> AsyncIterator[Sent]:
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


@pytest.fixture
async def stores(
    servers: Servers, database: Database, redis: Redis
) -> AsyncIterator[dict[str, ChatSessionStore]]:
    async with AsyncExitStack() as stack:
        client = create_redis(servers.redis_url, database=1, timeout_seconds=2)
        stack.push_async_callback(client.aclose)
        redis_store = RedisChatSessionStore(redis_url=servers.redis_url, messages_max=MESSAGES_MAX)
        stack.push_async_callback(redis_store.close)
        durable = PostgresChatSessionStore(database, ttl_seconds=3600)
        cache = RedisSessionCache(
            BoundedRedis(client, timeout_seconds=2),
            ttl_seconds=3600,
            messages_max=MESSAGES_MAX,
            bytes_max=1024 * 1024,
        )
        yield {
            "hybrid": HybridChatSessionStore(
                durable, cache, messages_max=MESSAGES_MAX, serve_unverified=True
            ),
            "redis": redis_store,
            "postgres": durable,
        }


Operation = Callable[[ChatSessionStore, UUID], Awaitable[Any]]


async def nothing(_store: ChatSessionStore, _session_id: UUID) -> None:
    pass


async def call_assistant(store: ChatSessionStore, session_id: UUID, key: str | None) -> None:
    turn = await store.begin_turn(turn_append(session_id, key=key), window=5)
    await store.finish_turn(turn, new_answer(turn))


async def begin(store: ChatSessionStore, session_id: UUID) -> None:
    await store.begin_turn(turn_append(session_id, key="turn"), window=5)


async def abandon(store: ChatSessionStore, session_id: UUID) -> None:
    lease = FinishTurn(question_id=keyed_message_id(session_id, "turn", 0), token=new_uuid())
    await store.abandon_turn(new_turn(session_id, lease=lease))


async def ask_for_unknown(store: ChatSessionStore, _session_id: UUID) -> None:
    with pytest.raises(SessionNotFound):
        await store.get_session(new_uuid())


#: Operation -> (what happens before, what is counted), on a session of five messages.
OPERATIONS: dict[str, tuple[Operation, Operation]] = {
    "create": (nothing, lambda store, _: store.create_session("user123")),
    "append": (nothing, lambda store, id_: store.append(new_append(id_, "a", "b"))),
    "keyed append": (nothing, lambda store, id_: store.append(keyed_append(id_, "key", "a", "b"))),
    "replayed append": (
        lambda store, id_: store.append(keyed_append(id_, "key")),
        lambda store, id_: store.append(keyed_append(id_, "key")),
    ),
    "append to an evicted session": (nothing, lambda store, id_: store.append(new_append(id_, "a"))),
    "message call": (nothing, lambda store, id_: call_assistant(store, id_, None)),
    "keyed message call": (nothing, lambda store, id_: call_assistant(store, id_, "turn")),
    "replayed message call": (
        lambda store, id_: call_assistant(store, id_, "turn"),
        lambda store, id_: store.begin_turn(turn_append(id_, key="turn"), window=5),
    ),
    "get_session": (nothing, lambda store, id_: store.get_session(id_)),
    "history, a hit": (nothing, lambda store, id_: store.read_history(id_, max_messages=5)),
    "history, a miss": (nothing, lambda store, id_: store.read_history(id_, max_messages=5)),
    "history beyond the window": (
        lambda store, id_: store.append(new_append(id_, *"abcdefgh")),
        lambda store, id_: store.read_history(id_, max_messages=12),
    ),
    "unknown session": (nothing, ask_for_unknown),
    "list": (nothing, lambda store, _: store.list_sessions("user123", limit=100)),
    "delete": (nothing, lambda store, id_: store.delete_session(id_)),
    "abandoned turn": (begin, abandon),
}

EVICTED = {"append to an evicted session", "history, a miss"}


@pytest.mark.parametrize(
    ("operation", "kind"), [(operation, kind) for operation, costs in COSTS.items() for kind in costs]
)
async def test_an_operation_costs_what_the_table_says(
    stores: dict[str, ChatSessionStore], sent: Sent, redis: Redis, aux: Redis, operation: str, kind: str
) -> None:
    store = stores[kind]
    before, measured = OPERATIONS[operation]
    took = []

    # The first round warms connections, prepared statements and scripts.
    for _ in range(2):
        session_id = (await store.create_session("user123")).session.session_id
        await store.append(new_append(session_id, *"abcde"))
        await before(store, session_id)
        await redis.delete(*[session_key(session_id)] * (operation in EVICTED), "nothing")
        await sent.take()
        await measured(store, session_id)
        took.append(await sent.take())
        await redis.flushdb()
        await aux.flushdb()

    assert took[1] == COSTS[operation][kind]


def test_every_operation_has_a_cost() -> None:
    assert set(COSTS) == set(OPERATIONS)
    assert set(COSTS) >= EVICTED
