"""One caller in one process: what an append costs when there is nobody to share it with, and what a session weighs."""

import json
from collections.abc import Iterator
from itertools import cycle
from uuid import UUID

import asyncpg
from harness import (
    ANSWER,
    MESSAGES_BEFORE,
    TURN,
    Call,
    Measure,
    Pace,
    Ratio,
    Scenario,
    alone,
    append_of,
    cached,
    filled_sessions,
)
from redis.asyncio import Redis
from stores import bare_connections, hybrid_of, opened_hybrid

from app.api.answers import history_body
from app.chat import format_time, new_uuid, session_month, utc_now
from app.embedded import EmbeddedServers
from app.store import ChatSessionStore

LONG = 10_000
SHORT = 100


async def one_append(servers: EmbeddedServers, pace: Pace) -> Scenario:
    """Hypothesis: alone, a durable append costs what its round trips cost: the transaction's, one to mark the entry
    in Redis (beside the insert) and one to publish. What is above the same moves made bare is Python: values,
    checks, the pool, the batch that it is alone in. Expected: at most 1.4.

    Control: the bare one a second time in each round.
    """
    async with opened_hybrid(servers) as stores, bare_connections(servers) as (conn, redis):
        store = hybrid_of(stores)
        sessions = await filled_sessions(store, 64)
        # What is written bare is not in the entries in Redis: these are not read again.
        own, bare = cycle(sessions[::2]), cycle(sessions[1::2])
        scenario = Scenario(
            name="durable append, one caller",
            hypothesis=one_append.__doc__ or "",
            unit="p50, ms",
            ratios=[
                Ratio(
                    name="hybrid / bare transaction and two of Redis",
                    over="hybrid",
                    under="bare",
                    at_most=1.4,
                ),
                Ratio(name="control: bare again / bare", over="bare again", under="bare"),
            ],
        )
        cases: dict[str, Call] = {
            "hybrid": lambda: store.append(append_of(next(own), ("assistant", ANSWER))),
            "bare": lambda: bare_append(conn, redis, next(bare)),
            "bare again": lambda: bare_append(conn, redis, next(bare)),
        }
        return await alone(scenario, cases, pace)


async def bare_append(conn: asyncpg.Connection, redis: Redis, session_id: UUID) -> None:
    """Begin, lock, insert with the counter, commit; and two commands to Redis, one before the commit."""
    async with conn.transaction():
        count = await conn.fetchval(
            "SELECT message_count FROM chat.chat_sessions WHERE session_id = $1 FOR NO KEY UPDATE", session_id
        )
        await conn.execute(
            "WITH counted AS (UPDATE chat.chat_sessions SET message_count = $3, last_activity = $6 "
            "WHERE session_id = $1) "
            "INSERT INTO chat.chat_messages "
            "(session_id, session_month, seq, message_id, role, content, created_at) "
            "VALUES ($1, $2, $3, $4, 'assistant', $5, $6)",
            session_id,
            session_month(session_id),
            count + 1,
            new_uuid(),
            ANSWER,
            utc_now(),
        )
        await redis.set(f"bare:{session_id}", "dirty", px=3_600_000)
    await redis.set(f"bare:{session_id}", ANSWER, px=3_600_000)


async def long_session(servers: EmbeddedServers, pace: Pace) -> Scenario:
    """Hypothesis: an append reads none of the messages before it, and Redis holds a window of 100 in both cases. So
    it costs the same at the end of a session of 10,000 messages as at the end of one of 100. Expected: at most 1.15.

    Control: the short ones a second time in each round, on other sessions.
    """
    async with opened_hybrid(servers) as stores:
        store = hybrid_of(stores)
        scenario = Scenario(
            name=f"durable append at message {LONG:,}",
            hypothesis=long_session.__doc__ or "",
            unit="p50, ms",
            ratios=[
                Ratio(name=f"long / at message {SHORT}", over="long", under="short", at_most=1.15),
                Ratio(name="control: short again / short", over="short again", under="short"),
            ],
        )
        cases = {
            "long": _appending(store, cycle(await filled_sessions(store, 4, LONG))),
            "short": _appending(store, cycle(await filled_sessions(store, 16, SHORT))),
            "short again": _appending(store, cycle(await filled_sessions(store, 16, SHORT))),
        }
        return await alone(scenario, cases, pace)


def _appending(store: ChatSessionStore, sessions: Iterator[UUID]) -> Call:
    return lambda: store.append(append_of(next(sessions), ("assistant", ANSWER)))


async def bytes_in_redis(servers: EmbeddedServers) -> list[Measure]:
    """Hypothesis: an entry is its session's JSON, as the API gives it, and a head. Expected: at most 1.1 of that.

    Beside the guide's JSON (with `ensure_ascii=False`; its default would escape every Vietnamese letter) it has each
    message's id and seq as well, 62 bytes a message, which retries and pages go by. A string that scripts extend
    has room behind it, so that an append need not copy it: that is Redis' own policy, up to as much again.
    """
    async with opened_hybrid(servers) as stores, bare_connections(servers) as (_, redis):
        store = hybrid_of(stores)
        # Turn by turn, as a chat is written: how it grew decides how much room a value has left.
        session_id = (await cached(store, await filled_sessions(store, 1, of_append=len(TURN))))[0]
        guide = await _in_the_guides_format(store, session_id)
        await redis.set(f"guide:{session_id}", guide, px=3_600_000)
        ours = f"session:{session_id}"
        length = await redis.strlen(ours)
        of_api = len(history_body(await store.read_history(session_id, max_messages=MESSAGES_BEFORE)))
        taken = await redis.memory_usage(ours)
        of_guide = await redis.memory_usage(f"guide:{session_id}")
    assert taken is not None, "the entry was evicted"
    assert of_guide is not None, "the copy was evicted"
    name = f"Redis bytes of a session of {MESSAGES_BEFORE}"
    return [
        Measure(name=f"{name}: STRLEN / its JSON by the API", got=length / of_api, at_most=1.1),
        Measure(name=f"{name}: STRLEN / the guide's JSON", got=length / len(guide.encode())),
        Measure(name=f"{name}: MEMORY USAGE / of the guide's JSON", got=taken / of_guide),
    ]


async def _in_the_guides_format(store: ChatSessionStore, session_id: UUID) -> str:
    history = await store.read_history(session_id, max_messages=MESSAGES_BEFORE)
    assert len(history.messages) == MESSAGES_BEFORE
    assert [message.role for message in history.messages[: len(TURN)]] == [role for role, _ in TURN]
    return json.dumps(
        {
            "session_id": str(session_id),
            "user_id": history.session.user_id,
            "created_at": format_time(history.session.created_at),
            "last_activity": format_time(history.session.last_activity),
            "messages": [
                {
                    "role": message.role,
                    "content": message.content,
                    "timestamp": format_time(message.created_at),
                    "metadata": json.loads(message.metadata),
                }
                for message in history.messages
            ],
        },
        ensure_ascii=False,
    )
