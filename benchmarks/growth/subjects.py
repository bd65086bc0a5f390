"""What is measured: a hybrid store on one archive, as `wiring` builds it, with the calls that a chat makes of it.

Each call gives a `Timed`: what it needs (a session that is not in Redis, one that may be deleted) is prepared
outside of the time.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter_ns
from typing import Any
from uuid import UUID

from asyncpg import Record
from redis.asyncio import Redis
from sqlalchemy import select

from app.chat import NewMessage, Role, new_uuid, session_month, utc_now
from app.postgres.rows import row_of
from app.postgres.tables import chat_sessions
from app.redis_sessions.keys import session_key
from app.settings import Settings
from app.store import Append, ChatSessionStore
from app.wiring import Stores, open_stores
from benchmarks.growth.series import Timed, milliseconds
from benchmarks.growth.texts import ANSWER_BYTES_MEDIAN, QUESTION_BYTES_MEDIAN, text_of_bytes

QUESTION, ANSWER = text_of_bytes(QUESTION_BYTES_MEDIAN), text_of_bytes(ANSWER_BYTES_MEDIAN)
PAGE = 20

#: Sessions and users of an archive that are alike in size whatever its own: so many messages, so many sessions.
_MESSAGES_ALIKE = (20, 24)
_SESSIONS_ALIKE = (20, 40)
_SAMPLE = 4_000

_ATTEMPTS_MAX = 20
_TRUST_SECONDS_MAX = 15

_PICK_SESSIONS = """
SELECT session_id, message_count, chain, last_activity FROM chat.chat_sessions
WHERE message_count BETWEEN $1 AND $2 AND user_id LIKE 'user%' ORDER BY random() LIMIT $3
"""
# What a call has added to a session of the archive.
_TAKE_BACK = """
WITH added AS (
    DELETE FROM chat.chat_messages WHERE session_id = $1 AND session_month = $2 AND seq > $3
)
UPDATE chat.chat_sessions SET message_count = $3, chain = $4, last_activity = $5 WHERE session_id = $1
"""
_PICK_USERS = """
SELECT user_id FROM chat.chat_sessions WHERE user_id LIKE 'user%'
GROUP BY user_id HAVING count(*) BETWEEN $1 AND $2 ORDER BY random() LIMIT $3
"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A store and the sessions of it that calls are made on. `redis` is its sessions' database."""

    store: ChatSessionStore
    stores: Stores
    redis: Redis
    _picked: dict[UUID, Record] = field(default_factory=dict, repr=False)

    async def archived_sessions(self) -> list[UUID]:
        """Sessions out of all months, at random, with one page of messages."""
        async with self.stores.database.connection() as conn:
            records = await conn.fetch(_PICK_SESSIONS, *_MESSAGES_ALIKE, _SAMPLE, timeout=120)
        picked = {record["session_id"]: record for record in records}
        self._picked.update(picked)
        return list(picked)

    async def users(self) -> list[str]:
        """Users with a few sessions, all over the months."""
        async with self.stores.database.connection() as conn:
            records = await conn.fetch(_PICK_USERS, *_SESSIONS_ALIKE, _SAMPLE, timeout=120)
        return [record["user_id"] for record in records]

    async def sessions_of(self, user_id: str) -> list[UUID]:
        async with self.stores.database.connection() as conn:
            records = await conn.fetch(
                "SELECT session_id FROM chat.chat_sessions WHERE user_id = $1", user_id, timeout=60
            )
        return [record["session_id"] for record in records]

    async def new_session(self, messages: int = PAGE) -> UUID:
        session_id = (await self.store.create_session("growth")).session.session_id
        if messages:
            await self.store.append(turns(session_id, messages // 2))
        return session_id

    def append(self, sessions: Sequence[UUID]) -> Timed:
        """A turn, to sessions that are in Redis."""
        its = cycle(sessions)
        return lambda: milliseconds(self.store.append(turns(next(its))))

    def append_to_archived(self, sessions: Sequence[UUID]) -> Timed:
        """A turn, to sessions that have left Redis: they live there again. Taken back, so that a session which is
        used again (a small archive has few) is as long as it was.
        """
        its = cycle(sessions)

        async def one() -> float:
            session_id = await self._forgotten(next(its))
            try:
                return await milliseconds(self.store.append(turns(session_id)))
            finally:
                await self._take_back(session_id)

        return one

    def cached_history(self, sessions: Sequence[UUID], *, messages: int = PAGE) -> Timed:
        """Answered by Redis: after a stall that has ended the lease, the call is made again."""
        its = cycle(sessions)

        async def one() -> float:
            session_id = next(its)
            for _ in range(_ATTEMPTS_MAX):
                began = perf_counter_ns()
                history = await self.store.read_history(session_id, max_messages=messages)
                elapsed = perf_counter_ns() - began
                if history.source == "redis":
                    return elapsed / 1e6
            raise RuntimeError("Redis does not answer, it is not trusted")

        return one

    def cold_history(self, sessions: Sequence[UUID], *, messages: int = PAGE) -> Timed:
        """It is read from PostgreSQL, and put into Redis."""
        its = cycle(sessions)

        async def one() -> float:
            session_id = await self._forgotten(next(its))
            return await milliseconds(self.store.read_history(session_id, max_messages=messages))

        return one

    def older_page(self, sessions: Sequence[UUID], *, before_seq: int) -> Timed:
        """Below what Redis holds: PostgreSQL alone answers."""
        its = cycle(sessions)
        return lambda: milliseconds(
            self.store.read_history(next(its), max_messages=PAGE, before_seq=before_seq)
        )

    def list_with_total(self, users: Sequence[str]) -> Timed:
        its = cycle(users)
        return lambda: milliseconds(self.store.list_sessions(next(its), status="all", limit=PAGE))

    def list_without_total(self, users: Sequence[str]) -> Timed:
        """The store's own statement on the store's own way, but for the count: no call leaves it out yet."""
        its = cycle(users)
        t = chat_sessions.c

        async def page() -> tuple[Any, ...]:
            statement = (
                select(chat_sessions)
                .where(t.user_id == next(its))
                .order_by(t.created_at.desc(), t.session_id.desc())
                .limit(PAGE + 1)
            )
            async with self.stores.database.core() as conn:
                rows = (await conn.execute(statement)).mappings().all()
            return tuple(row_of(row).session for row in rows[:PAGE])

        return lambda: milliseconds(page())

    def create(self) -> Timed:
        return lambda: milliseconds(self.store.create_session("growth"))

    def delete(self) -> Timed:
        """Of sessions with one page of messages, which are made for it."""

        async def one() -> float:
            return await milliseconds(self.store.delete_session(await self.new_session()))

        return one

    async def _forgotten(self, session_id: UUID) -> UUID:
        await self.redis.delete(session_key(session_id))
        return session_id

    async def _take_back(self, session_id: UUID) -> None:
        record = self._picked[session_id]
        async with self.stores.database.connection() as conn:
            await conn.execute(
                _TAKE_BACK,
                session_id,
                session_month(session_id),
                record["message_count"],
                record["chain"],
                record["last_activity"],
            )
        await self._forgotten(session_id)

    async def leave(self) -> None:
        """Removes what was made for the measurements: the next one finds the same archive."""
        async with self.stores.database.connection() as conn:
            its = await conn.fetch(
                "SELECT session_id FROM chat.chat_sessions WHERE user_id = 'growth'", timeout=60
            )
            ids = [record["session_id"] for record in its]
            if ids:
                await conn.execute(
                    "DELETE FROM chat.chat_messages WHERE session_id = ANY($1::uuid[]) "
                    "AND session_month = chat.session_month($2)",
                    ids,
                    new_uuid(),
                    timeout=60,
                )
                await conn.execute(
                    "DELETE FROM chat.chat_sessions WHERE session_id = ANY($1::uuid[])", ids, timeout=60
                )


@asynccontextmanager
async def opened(database_url: str, redis_url: str, number: int) -> AsyncIterator[Subject]:
    """Without the service around it: its samples would be in some of the rounds. Its Redis database is emptied."""
    settings = Settings(
        _env_file=None,
        database_url=database_url,
        redis_url=redis_url,
        redis_db_sessions=number,
    )
    async with Redis.from_url(f"{redis_url}/{number}") as redis, open_stores(settings) as stores:
        await redis.flushdb()
        assert stores.hybrid is not None
        # An archive of an earlier run has trusted that run's Redis: it is another one's turn.
        async with asyncio.timeout(_TRUST_SECONDS_MAX):
            while stores.lease.current() is None:  # noqa: ASYNC110 - a lease announces nothing
                await asyncio.sleep(0.1)
        subject = Subject(store=stores.hybrid, stores=stores, redis=redis)
        try:
            yield subject
        finally:
            await subject.leave()


def turns(session_id: UUID, count: int = 1) -> Append:
    """So many questions and answers, as one append."""
    return append_of(session_id, *((("user", QUESTION), ("assistant", ANSWER)) * count))


def append_of(session_id: UUID, *messages: tuple[Role, str]) -> Append:
    return Append(
        session_id=session_id,
        messages=tuple(
            NewMessage(message_id=new_uuid(), role=role, content=content, created_at=utc_now())
            for role, content in messages
        ),
    )
