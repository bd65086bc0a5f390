"""The store of the moment: the mode is one value in PostgreSQL, and changes while requests are served."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar
from uuid import UUID

from app.chat import ChatSession, NewMessage, SessionStatus
from app.coherence.heartbeat import Heartbeat, next_state
from app.coherence.lease import Lease
from app.coherence.ports import CacheTrusted, Mode, ModeChanged
from app.errors import DurableStoreUnavailable
from app.store import (
    Append,
    Appended,
    ChatSessionStore,
    Cursor,
    History,
    SessionPage,
    SessionRead,
    StoreHealth,
    Turn,
)

_T = TypeVar("_T")

#: A call that meets this many changes of the mode is refused.
_CHANGES_MAX = 5


class LiveChatSessionStore:
    """Keeps `ChatSessionStore` in whichever mode the database is.

    A call that finds the mode changed has done nothing yet, and is made again on the other store. So no answer
    comes from a mode that has ended, and none is refused for the change. `with_database` serves `hybrid` and
    `draining`; `redis_only` is None where there is no Redis.
    """

    def __init__(
        self,
        *,
        with_database: ChatSessionStore,
        redis_only: ChatSessionStore | None,
        lease: Lease,
        heartbeat: Heartbeat,
    ) -> None:
        self._with_database = with_database
        self._redis_only = redis_only
        self._lease = lease
        self._heartbeat = heartbeat

    @property
    def mode(self) -> Mode:
        return self._lease.state.mode if self._lease.state is not None else "hybrid"

    async def create_session(self, user_id: str) -> SessionRead:
        return await self._now(lambda store: store.create_session(user_id))

    async def get_session(
        self, session_id: UUID, *, user_id: str | None = None, min_seq: int | None = None
    ) -> SessionRead:
        return await self._now(lambda store: store.get_session(session_id, user_id=user_id, min_seq=min_seq))

    async def read_history(
        self,
        session_id: UUID,
        *,
        max_messages: int,
        before_seq: int | None = None,
        min_seq: int | None = None,
        user_id: str | None = None,
    ) -> History:
        return await self._now(
            lambda store: store.read_history(
                session_id,
                max_messages=max_messages,
                before_seq=before_seq,
                min_seq=min_seq,
                user_id=user_id,
            )
        )

    async def append(self, append: Append) -> Appended:
        return await self._now(lambda store: store.append(append))

    async def begin_turn(self, append: Append, *, window: int) -> Turn:
        return await self._now(lambda store: store.begin_turn(append, window=window))

    async def finish_turn(self, turn: Turn, answer: NewMessage) -> Appended:
        return await self._now(lambda store: store.finish_turn(turn, answer))

    async def abandon_turn(self, turn: Turn) -> None:
        await self._now(lambda store: store.abandon_turn(turn))

    async def list_sessions(
        self, user_id: str, *, status: SessionStatus = "active", limit: int, after: Cursor | None = None
    ) -> SessionPage:
        return await self._now(
            lambda store: store.list_sessions(user_id, status=status, limit=limit, after=after)
        )

    async def delete_session(self, session_id: UUID, *, user_id: str | None = None) -> ChatSession:
        return await self._now(lambda store: store.delete_session(session_id, user_id=user_id))

    async def health(self) -> tuple[StoreHealth, ...]:
        return await self._now(lambda store: store.health())

    async def _now(self, call: Callable[[ChatSessionStore], Awaitable[_T]]) -> _T:
        for _ in range(_CHANGES_MAX):
            store = self._redis_only if self.mode == "redis-only" else self._with_database
            if store is None:
                raise DurableStoreUnavailable(
                    "the database is in mode redis-only, and this process serves without Redis",
                    hint="set ENABLE_REDIS_SESSIONS=true and restart it",
                )
            try:
                return await call(store)
            except ModeChanged as changed:
                self._lease.learn(changed.state)
            except CacheTrusted as trusted:
                # A process without Redis next to others with it: nobody may believe what it can't mark.
                if trusted.state.trusting:
                    await self._heartbeat.change(trusted.state, next_state(trusted.state, cache="off"))
                else:
                    self._lease.learn(trusted.state)
                    await asyncio.sleep(max(0.0, self._lease.hold_seconds(trusted.state)))
                    await self._heartbeat.beat()
        raise DurableStoreUnavailable("the mode changes again and again", hint="try again")
