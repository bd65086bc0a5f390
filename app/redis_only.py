"""Redis-only mode over a database: Redis is the truth of a session from the moment it is handed over.

A session that only PostgreSQL has is handed over when it is first touched, never started empty; from then on
reading it and writing to it need Redis alone. Creating and deleting write its row too, so that an absent key
can be told from an unknown session.

Handing over, under the session's row lock: an entry that Redis will own is set, dirty; the row is given to
Redis and committed; the entry becomes clean. A crash in between leaves a dirty entry, which nobody uses before
a look at the row: it says whether the hand-over was committed. So a session is never in nobody's hands, and
never in two: the row's owner is what PostgreSQL goes by, the entry's is what Redis goes by, and the way back
(`app/hybrid.py`, adoption) turns the entry first.

What Redis-only mode costs is in `docs/redis-only.md`: a row owned by Redis whose key is gone has expired.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from secrets import token_hex
from typing import Literal, TypeVar
from uuid import UUID

from app.chat import ChatSession, NewMessage, SessionStatus
from app.coherence.lease import Lease
from app.coherence.ports import (
    CacheState,
    DurableStore,
    Hold,
    ModeChanged,
    NotHandedOver,
    Row,
    RowBusy,
    refuse_other_protocols,
)
from app.errors import AdoptionPending, DurableStoreUnavailable, RedisUnavailable, SessionNotFound
from app.redis_sessions.store import RedisChatSessionStore
from app.store import Append, Appended, Cursor, History, SessionPage, SessionRead, StoreHealth, Turn

_T = TypeVar("_T")

#: 'there': Redis held the session already. 'nothing': no such session, or one that has expired in Redis.
_HandOver = Literal["handed over", "there", "nothing"]

#: How often a session is looked at again that changes hands while it is used.
_HAND_OVERS_MAX = 5


class RedisOnlyChatSessionStore:
    """Keeps `ChatSessionStore` with Redis as the truth and rows in PostgreSQL beside it.

    `redis` serves what it was handed over (`claims=False`); `messages_max` is its window.
    """

    def __init__(
        self, redis: RedisChatSessionStore, durable: DurableStore, *, lease: Lease, messages_max: int
    ) -> None:
        self._redis = redis
        self._durable = durable
        self._lease = lease
        self._messages_max = messages_max

    async def create_session(self, user_id: str) -> SessionRead:
        token = token_hex(8)

        async def set_entry(rows: Sequence[Row], state: CacheState) -> None:
            self._refuse_other_modes(state)
            await self._redis.offer(rows[0], (), token=token)

        (row,) = await self._durable.create([user_id], owner="redis", before_commit=set_entry)
        await self._redis.settle(row.session.session_id, token=token)
        return SessionRead(session=row.session, source="redis")

    async def get_session(
        self, session_id: UUID, *, user_id: str | None = None, min_seq: int | None = None
    ) -> SessionRead:
        return await self._owning(
            session_id, lambda: self._redis.get_session(session_id, user_id=user_id, min_seq=min_seq)
        )

    async def read_history(
        self,
        session_id: UUID,
        *,
        max_messages: int,
        before_seq: int | None = None,
        min_seq: int | None = None,
        user_id: str | None = None,
    ) -> History:
        return await self._owning(
            session_id,
            lambda: self._redis.read_history(
                session_id,
                max_messages=max_messages,
                before_seq=before_seq,
                min_seq=min_seq,
                user_id=user_id,
            ),
        )

    async def append(self, append: Append) -> Appended:
        return await self._owning(append.session_id, lambda: self._redis.append(append))

    async def begin_turn(self, append: Append, *, window: int) -> Turn:
        return await self._owning(append.session_id, lambda: self._redis.begin_turn(append, window=window))

    async def finish_turn(self, turn: Turn, answer: NewMessage) -> Appended:
        return await self.append(turn.ended_by(answer))

    async def abandon_turn(self, turn: Turn) -> None:
        await self._redis.abandon_turn(turn)

    async def list_sessions(
        self, user_id: str, *, status: SessionStatus = "active", limit: int, after: Cursor | None = None
    ) -> SessionPage:
        alive = await self._redis.alive(await self._durable.owned_by_redis(user_id))
        page = await self._durable.list_sessions(
            user_id, status=status, limit=limit, after=after, alive=alive
        )
        # Their rows are as old as the hand-over: what they say of the session is Redis's to say.
        theirs = set(alive)
        current = await self._redis.heads(
            [one.session_id for one in page.sessions if one.session_id in theirs]
        )
        return replace(page, sessions=tuple(current.get(one.session_id, one) for one in page.sessions))

    async def delete_session(self, session_id: UUID, *, user_id: str | None = None) -> ChatSession:
        """The row first: a delete that fails half way leaves an entry that is there, not a row without words."""

        async def check(row: Row, state: CacheState) -> None:
            self._refuse_other_modes(state)
            if row.owner == "redis" and not await self._redis.alive([session_id]):
                raise SessionNotFound

        try:
            row = await self._durable.delete(session_id, user_id=user_id, before_commit=check)
        except SessionNotFound:
            # One without a row: from before there was a database, or left by a delete that failed half way.
            return await self._redis.delete_session(session_id, user_id=user_id)
        if row.owner == "redis":
            # The row is as old as the hand-over. And one that comes after it has no row to delete: of both, Redis says
            # which has found the session. What is not to be read as an entry goes all the same.
            with suppress(AdoptionPending):
                return await self._redis.delete_session(session_id)
        await self._redis.unlink(session_id)
        return row.session

    async def health(self) -> tuple[StoreHealth, ...]:
        redis, durable = await asyncio.gather(self._redis.health(), self._durable.health())
        warned = tuple(
            StoreHealth(name=one.name, status="warn" if one.status == "fail" else one.status, state=state)
            for one in durable
            for state in [
                f"{one.state}; what is in Redis is served, sessions are not made, deleted or handed over"
                if one.status == "fail"
                else "keeps rows and the archive"
            ]
        )
        return (*redis, *warned)

    async def _owning(self, session_id: UUID, call: Callable[[], Awaitable[_T]]) -> _T:
        """Runs `call`; where Redis does not hold the session yet, it is handed over first."""
        was_there = False
        for _ in range(_HAND_OVERS_MAX):
            try:
                return await call()
            except SessionNotFound:
                # What is there may have been handed over by another request since this one looked for it. What
                # was there all along is somebody else's.
                if was_there or (outcome := await self._hand_over(session_id)) == "nothing":
                    raise
                was_there = outcome == "there"
            except NotHandedOver as exc:
                if await self._hand_over(session_id) == "nothing":
                    # What a delete left behind while Redis was out.
                    raise SessionNotFound from exc
        raise RedisUnavailable("the session changes hands again and again", hint="try again")

    async def _hand_over(self, session_id: UUID) -> _HandOver:
        while True:
            try:
                return await self._hand_over_once(session_id)
            except Hold as hold:
                await asyncio.sleep(hold.seconds)
            except RowBusy as busy:
                raise DurableStoreUnavailable("the session's row is locked by something that hangs") from busy

    async def _hand_over_once(self, session_id: UUID) -> _HandOver:
        token: str | None = token_hex(8)
        async with self._durable.locked(session_id) as locked:
            self._refuse_other_modes(locked.state)
            self._lease.learn(locked.state)
            if (left := self._lease.hold_seconds(locked.state)) > 0:
                # A reader in hybrid mode may believe the old entry until its lease has ended.
                raise Hold(left)
            row = locked.row
            if row is None:
                return "nothing"
            found = await self._redis.entry(session_id) if row.owner == "redis" else None
            if row.owner == "redis" and found is None:
                return "nothing"
            if found is not None and found.owner == "redis":
                # The lock is free, so it was committed: what is left to do is to say so in the entry.
                token = found.token if found.dirty else None
            else:
                # Also where Redis went back to a time before it was handed over: what it has forgotten is gone,
                # what PostgreSQL had then is not.
                lines = await locked.newest(self._messages_max)
                if not await self._redis.offer(row, lines, token=token or ""):
                    # Redis-only mode without a database made it Redis's in between: those words are newer.
                    token = None
                await locked.give_to("redis")
        if token is None:
            return "there"
        await self._redis.settle(session_id, token=token)
        return "handed over"

    def _refuse_other_modes(self, state: CacheState) -> None:
        refuse_other_protocols(state)
        if state.mode != "redis-only":
            raise ModeChanged(state)
