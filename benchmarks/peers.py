"""Stores of other projects, each used as its documentation says and given the same work: a turn of two messages
appended, and the newest 10 of a session's messages read.

What a peer is given beyond its documentation: session objects that are kept (a service would make one a request),
and where the documentation shows one connection, a pool of as many as it needs. A peer whose package is not
installed is left out, and the report says so.
"""

# Each peer is an extra: what is not installed is found out when it is opened.
# ruff: noqa: PLC0415
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from harness import ANSWER, MESSAGES_BEFORE, QUESTION, TURN, in_parallel
from sqlalchemy.ext.asyncio import create_async_engine
from stores import urls_of

from app.chat import new_uuid
from app.embedded import EmbeddedServers
from app.postgres.engine import sqlalchemy_url

CONNECTIONS = 16
READ_MESSAGES = 10


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One store that is open. A session is whatever it keeps of one."""

    name: str
    session: Callable[[], Awaitable[Any]]
    turn: Callable[[Any], Awaitable[object]]
    read: Callable[[Any], Awaitable[Sequence[object]]]

    async def filled(self, count: int) -> list[Any]:
        async def one(_: int) -> Any:
            session = await self.session()
            for _ in range(MESSAGES_BEFORE // len(TURN)):
                await self.turn(session)
            assert len(await self.read(session)) >= READ_MESSAGES
            return session

        return await in_parallel(one, count)


#: As the scenarios and the report name them.
SQLALCHEMY_SESSION = "openai-agents SQLAlchemySession"
REDIS_SESSION = "openai-agents RedisSession (not durable)"
LANGCHAIN_POSTGRES = "langchain PostgresChatMessageHistory, 16 connections"
LANGCHAIN_ONE = "langchain PostgresChatMessageHistory, one connection"
LANGCHAIN_REDIS = "langchain RedisChatMessageHistory (not durable)"
AGNO = "agno AsyncPostgresDb"

#: Left out for good, and why.
NOT_HERE = {
    "google-adk DatabaseSessionService": "google-adk 2.13.0 wants opentelemetry-api <= 1.44, and the lock, which has "
    "it for FastAPI, a newer one; what can be installed beside that is its release 1.10.0",
    "langchain-redis RedisChatMessageHistory": "langchain-redis 0.2.6 calls FT.INFO of Redis' search module, which Valkey does not have; "
    "langchain-community's, on a plain list, stands for it",
}


@asynccontextmanager
async def _sqlalchemy_session(servers: EmbeddedServers) -> AsyncIterator[Peer]:
    """Items are what the Agents SDK stores: the role and the content."""
    from agents.extensions.memory import SQLAlchemySession

    engine = create_async_engine(sqlalchemy_url(urls_of(servers)[0]))

    async def session() -> Any:
        made = SQLAlchemySession(str(new_uuid()), engine=engine, create_tables=True)
        await made.get_items(limit=1)
        return made

    try:
        yield _agents_peer(SQLALCHEMY_SESSION, session)
    finally:
        await engine.dispose()


@asynccontextmanager
async def _redis_session(servers: EmbeddedServers) -> AsyncIterator[Peer]:
    from agents.extensions.memory import RedisSession
    from redis.asyncio import Redis

    async with Redis.from_url(f"{urls_of(servers)[1]}/6") as redis:

        async def session() -> Any:
            return RedisSession(str(new_uuid()), redis_client=redis, ttl=3600)

        yield _agents_peer(REDIS_SESSION, session)


def _agents_peer(name: str, session: Callable[[], Awaitable[Any]]) -> Peer:
    return Peer(
        name=name,
        session=session,
        turn=lambda session: session.add_items(
            [{"role": role, "content": content} for role, content in TURN]
        ),
        read=lambda session: session.get_items(limit=READ_MESSAGES),
    )


@asynccontextmanager
async def _langchain_postgres(servers: EmbeddedServers) -> AsyncIterator[Peer]:
    """A service would give each request a connection of its own, from a pool."""
    async with _langchain_pool(servers, LANGCHAIN_POSTGRES, CONNECTIONS) as peer:
        yield peer


@asynccontextmanager
async def _langchain_one(servers: EmbeddedServers) -> AsyncIterator[Peer]:
    """To the letter of its documentation: a process has one connection. Callers wait for it, as on a shared one their
    transactions would end each other's.
    """
    async with _langchain_pool(servers, LANGCHAIN_ONE, 1) as peer:
        yield peer


@asynccontextmanager
async def _langchain_pool(servers: EmbeddedServers, name: str, connections: int) -> AsyncIterator[Peer]:
    """It has no limit for reads: all messages come, and are cut here."""
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_postgres import PostgresChatMessageHistory
    from psycopg_pool import AsyncConnectionPool

    table = f"langchain_history_{connections}"
    async with AsyncConnectionPool(
        urls_of(servers)[0], min_size=connections, max_size=connections, open=False, timeout=60
    ) as pool:
        async with pool.connection() as conn:
            await PostgresChatMessageHistory.acreate_tables(conn, table)

        async def session() -> str:
            return str(new_uuid())

        async def turn(session_id: str) -> None:
            async with pool.connection() as conn:
                history = PostgresChatMessageHistory(table, session_id, async_connection=conn)
                await history.aadd_messages([HumanMessage(QUESTION), AIMessage(ANSWER)])

        async def read(session_id: str) -> Sequence[object]:
            async with pool.connection() as conn:
                history = PostgresChatMessageHistory(table, session_id, async_connection=conn)
                messages: list[object] = await history.aget_messages()
                return messages[-READ_MESSAGES:]

        yield Peer(name=name, session=session, turn=turn, read=read)


@asynccontextmanager
async def _langchain_redis(servers: EmbeddedServers) -> AsyncIterator[Peer]:
    """Blocking: its async methods are the blocking ones in threads. It has no limit for reads, either."""
    from langchain_community.chat_message_histories import RedisChatMessageHistory
    from langchain_core.messages import AIMessage, HumanMessage

    url = f"{urls_of(servers)[1]}/7"
    # A client each would be a connection each.
    first = RedisChatMessageHistory("first", url=url, ttl=3600)

    async def session() -> Any:
        made = await asyncio.to_thread(RedisChatMessageHistory, str(new_uuid()), url=url, ttl=3600)
        made.redis_client.close()
        made.redis_client = first.redis_client
        return made

    async def read(history: Any) -> Sequence[object]:
        messages: list[object] = await history.aget_messages()
        return messages[-READ_MESSAGES:]

    try:
        yield Peer(
            name=LANGCHAIN_REDIS,
            session=session,
            turn=lambda history: history.aadd_messages([HumanMessage(QUESTION), AIMessage(ANSWER)]),
            read=read,
        )
    finally:
        first.redis_client.close()


@asynccontextmanager
async def _agno(servers: EmbeddedServers) -> AsyncIterator[Peer]:
    """A turn is a run with its two messages, and the session's row, as an agent saves them after an answer."""
    from agno.db.postgres import AsyncPostgresDb
    from agno.models.message import Message
    from agno.run.agent import RunOutput
    from agno.run.base import RunStatus
    from agno.session import AgentSession

    engine = create_async_engine(sqlalchemy_url(urls_of(servers)[0]))
    db = AsyncPostgresDb(db_engine=engine)

    def row_of(session_id: str) -> AgentSession:
        return AgentSession(
            session_id=session_id, agent_id="bench", user_id="user", created_at=int(time.time())
        )

    async def session() -> str:
        session_id = str(new_uuid())
        await db.upsert_session(row_of(session_id))
        return session_id

    async def turn(session_id: str) -> None:
        messages = [Message(role=role, content=content) for role, content in TURN]
        run = RunOutput(
            run_id=str(new_uuid()),
            session_id=session_id,
            agent_id="bench",
            messages=messages,
            status=RunStatus.completed,
        )
        await db.upsert_run(run, session_id, user_id="user")
        await db.upsert_session(row_of(session_id))

    async def read(session_id: str) -> Sequence[object]:
        found: Any = await db.get_session(session_id, runs_limit=READ_MESSAGES // len(TURN))
        return [message for run in found.runs for message in run.messages]

    # One after the other makes the tables: at once, two would make the same one.
    await turn(await session())
    try:
        yield Peer(name=AGNO, session=session, turn=turn, read=read)
    finally:
        await db.close()
        await engine.dispose()


Opening = Callable[[EmbeddedServers], AbstractAsyncContextManager[Peer]]

#: The goals of issue 4 are against these.
WITH_GOALS: dict[str, Opening] = {
    SQLALCHEMY_SESSION: _sqlalchemy_session,
    LANGCHAIN_POSTGRES: _langchain_postgres,
    LANGCHAIN_ONE: _langchain_one,
}
ALL: dict[str, Opening] = {
    **WITH_GOALS,
    REDIS_SESSION: _redis_session,
    LANGCHAIN_REDIS: _langchain_redis,
    AGNO: _agno,
}


@asynccontextmanager
async def opened_peers(
    servers: EmbeddedServers, openings: dict[str, Opening], notes: list[str]
) -> AsyncIterator[list[Peer]]:
    """Those that can be opened; `notes` says which not, and why."""
    async with AsyncExitStack() as stack:
        peers = []
        for name, opening in openings.items():
            try:
                peers.append(await stack.enter_async_context(opening(servers)))
            except Exception as exc:  # noqa: BLE001 - a peer that fails is left out, whatever it says
                notes.append(f"left out: {name}: {type(exc).__name__}: {str(exc).splitlines()[0]}")
        yield peers


def peer_versions() -> dict[str, str]:
    """Of the packages that are here."""
    found = {}
    for package in ("openai-agents", "langchain-postgres", "langchain-community", "agno", "psycopg"):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found
