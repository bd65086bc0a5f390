"""Chat sessions, written through: PostgreSQL decides, Redis answers.

`HybridChatSessionStore` wraps a durable store with a cache. An answer given here could have been given by
the durable store alone, except one labelled `unverified` during an outage of PostgreSQL.

This is level 0 of the coherence protocol (`CACHE_VERIFY=always`): nothing that stands in Redis is believed
for itself. A cached session is served only if its length and its chain equal those of its row, read from
the primary while the entry was read. The argument in four lines:

- A row's (message_count, chain) names one history: the chain is a hash over all message ids in order.
- The row is read by a statement that began after the caller did, so it holds every acknowledged write.
- An entry with the same pair holds the same messages as that row. Anything else is a miss.
- So it does not matter what happened to Redis, or which of our commands were lost, late or doubled.

What else is kept here, because the lease protocol builds on it:

- Writes commit first. The publish after the commit changes an entry only if it stands exactly before the
  write; the epoch of all entries is zero, which no lease will ever trust.
- A fill holds the session's row lock from before its snapshot until after its EXEC, and WATCHes the key
  from before that. A delete unlinks under the same lock and touches the key: no fill brings a session back.
- Nothing overwrites or removes an entry that Redis owns, or one in the guide's format without a row:
  such a session raises `AdoptionPending` until it is adopted.

If Redis can't be reached, every call is answered by PostgreSQL; a write is complete when it has committed.
If PostgreSQL can't be reached, writes are refused; cached sessions are served with the time since this
process last heard from the primary (`serve_unverified`), or refused.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar
from uuid import UUID

from app.chat import ChatSession, Message, NewMessage, SessionStatus, Source
from app.coherence.ports import (
    EPOCH_ZERO,
    CachedValue,
    CacheOutage,
    Committed,
    DurableStore,
    Entry,
    GuideEntry,
    Row,
    SessionCache,
    Watch,
    turn_of,
)
from app.errors import (
    AdoptionPending,
    DurableStoreUnavailable,
    FreshnessUnknown,
    NotYetVisible,
    SessionNotFound,
)
from app.store import (
    CURRENT,
    Append,
    Appended,
    Cursor,
    Freshness,
    History,
    SessionPage,
    SessionRead,
    StoreHealth,
    Turn,
)

log = logging.getLogger("chat_sessions.hybrid")

#: The state of a cache that could not be asked: different from an absent entry, it must not be filled.
_OUT: Literal["out"] = "out"

_T = TypeVar("_T")


class HybridChatSessionStore:
    """Keeps `ChatSessionStore` with PostgreSQL as the truth and Redis in front of it.

    `messages_max` bounds a cached window; `serve_unverified` is `PG_OUTAGE_READS=serve`.
    """

    def __init__(
        self, durable: DurableStore, cache: SessionCache, *, messages_max: int, serve_unverified: bool
    ) -> None:
        self._durable = durable
        self._cache = cache
        self._messages_max = messages_max
        self._serve_unverified = serve_unverified
        self._fills: dict[UUID, asyncio.Task[_View]] = {}
        self._writes: set[asyncio.Task[Any]] = set()

    # Writes

    async def create_session(self, user_id: str) -> SessionRead:
        return await self._to_its_end(self._create(user_id))

    async def append(self, append: Append) -> Appended:
        committed, _ = await self._to_its_end(self._write(append, want_entry=False))
        return Appended(
            session=committed.after.session,
            first_seq=committed.first_seq,
            last_seq=committed.last_seq,
            source="postgres",
            replayed=committed.replayed,
        )

    async def begin_turn(self, append: Append, *, window: int) -> Turn:
        committed, entry = await self._to_its_end(self._write(append, want_entry=True))
        turn = turn_of(append, committed)
        if turn.answer is not None:
            return turn
        # The entry as the publish left it needs no look at the row: it stood exactly before this write,
        # under the chain that this write was committed on.
        page = entry.newest(window, turn.question.seq + 1) if entry is not None else None
        if page is not None:
            return replace(turn, history=tuple(Message.from_line(line) for line in page[1]))
        return replace(turn, history=await self._durable.context(turn, window=window))

    async def finish_turn(self, turn: Turn, answer: NewMessage) -> Appended:
        return await self.append(turn.ended_by(answer))

    async def abandon_turn(self, turn: Turn) -> None:
        if turn.lease is not None:
            await self._durable.abandon(turn.session.session_id, turn.lease)

    async def delete_session(self, session_id: UUID, *, user_id: str | None = None) -> ChatSession:
        return await self._to_its_end(self._delete(session_id, user_id))

    # Reads

    async def get_session(
        self, session_id: UUID, *, user_id: str | None = None, min_seq: int | None = None
    ) -> SessionRead:
        view = await self._read(session_id, user_id, min_seq)
        return SessionRead(session=view.session, source=view.source, freshness=view.freshness)

    async def read_history(
        self,
        session_id: UUID,
        *,
        max_messages: int,
        before_seq: int | None = None,
        min_seq: int | None = None,
        user_id: str | None = None,
    ) -> History:
        view = await self._read(session_id, user_id, min_seq)
        page = view.entry.newest(max_messages, before_seq) if view.entry is not None else None
        if page is None:
            # Redis is out, or the window is too short for this page.
            return await self._durable.read_history(
                session_id,
                max_messages=max_messages,
                before_seq=before_seq,
                min_seq=min_seq,
                user_id=user_id,
            )
        return History(
            session=view.session,
            first_seq=page[0],
            lines=page[1],
            source=view.source,
            freshness=view.freshness,
        )

    async def list_sessions(
        self, user_id: str, *, status: SessionStatus = "active", limit: int, after: Cursor | None = None
    ) -> SessionPage:
        return await self._durable.list_sessions(user_id, status=status, limit=limit, after=after)

    async def health(self) -> tuple[StoreHealth, ...]:
        durable, cache = await asyncio.gather(self._durable.health(), self._cache.health())
        if self._serve_unverified:
            durable = tuple(map(_degraded, durable))
        return (*durable, cache)

    # Write-through

    async def _to_its_end(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Runs a write in a task of its own: a caller that goes away after the commit must not take the
        publish with it, and one that goes away before it must not break the connection in between.
        """
        task = asyncio.create_task(write)
        self._writes.add(task)
        task.add_done_callback(self._settle)
        return await asyncio.shield(task)

    def _settle(self, task: asyncio.Task[Any]) -> None:
        self._writes.discard(task)
        _look_at(task)

    async def _create(self, user_id: str) -> SessionRead:
        row = await self._durable.create(user_id)
        with suppress(CacheOutage):
            async with self._cache.watch(row.session.session_id) as watch:
                await watch.fill(row, EPOCH_ZERO, ())
        return SessionRead(session=row.session, source="postgres")

    async def _write(self, append: Append, *, want_entry: bool) -> tuple[Committed, Entry | None]:
        try:
            committed = await self._durable.commit(append)
        except SessionNotFound:
            await self._refuse_unadopted(append.session_id)
            raise
        if committed.replayed:
            return committed, None
        return committed, await self._publish(committed, want_entry=want_entry)

    async def _publish(self, committed: Committed, *, want_entry: bool) -> Entry | None:
        """Carries a committed write to Redis before its caller is answered.

        Best effort: an entry that missed it no longer equals its row, and the next reader fills it.
        """
        try:
            published = await self._cache.publish(committed, EPOCH_ZERO, want_entry=want_entry)
            if published.outcome in {"absent", "behind"}:
                # A session that had left Redis lives there again with its next message.
                return (await self._filled(committed.after)).entry
        except (CacheOutage, AdoptionPending, SessionNotFound, DurableStoreUnavailable) as exc:
            # The write is durable and stays acknowledged, whatever the copy of it met.
            log.debug("not published: %s", exc)
            return None
        return published.entry

    async def _delete(self, session_id: UUID, user_id: str | None) -> ChatSession:
        async def unlink(_row: Row) -> None:
            try:
                removed = await self._cache.remove(session_id)
            except CacheOutage:
                # Without its row the entry is never served again, and it expires.
                return
            if not removed:
                raise AdoptionPending

        try:
            row = await self._durable.delete(session_id, user_id=user_id, before_commit=unlink)
        except SessionNotFound:
            await self._refuse_unadopted(session_id)
            raise
        return row.session

    # Read-through

    async def _read(self, session_id: UUID, user_id: str | None, min_seq: int | None) -> "_View":
        """The session as this caller may see it, out of Redis where that equals the row."""
        cached, found = await asyncio.gather(
            self._cached(session_id), self._durable.lookup(session_id), return_exceptions=True
        )
        if isinstance(cached, BaseException):
            raise cached
        if isinstance(found, DurableStoreUnavailable):
            return self._unverified(cached, found, user_id, min_seq)
        if isinstance(found, BaseException):
            raise found
        row, _ = found
        if row is None:
            await self._refuse_owned_or_clean(session_id, cached)
            raise SessionNotFound
        if user_id not in {None, row.session.user_id}:
            raise SessionNotFound
        if row.owner == "redis" or _owned_by_redis(cached):
            raise AdoptionPending
        if min_seq is not None and min_seq > row.session.message_count:
            raise NotYetVisible
        if cached == _OUT:
            return _View(session=row.session)
        if isinstance(cached, Entry) and cached.equals(row):
            # The messages are the entry's; what is said about the session is the row's, which was read anyway.
            return _View(session=row.session, entry=cached, source="redis")
        return await self._filled(row)

    async def _cached(self, session_id: UUID) -> CachedValue | Literal["out"]:
        try:
            return await self._cache.get(session_id)
        except CacheOutage:
            return _OUT

    def _unverified(
        self,
        cached: CachedValue | Literal["out"],
        outage: DurableStoreUnavailable,
        user_id: str | None,
        min_seq: int | None,
    ) -> "_View":
        """What may be served while PostgreSQL is out: a clean entry of ours, with its age said."""
        if not isinstance(cached, Entry) or _owned_by_redis(cached):
            raise outage
        session = cached.session
        if user_id not in {None, session.user_id}:
            raise SessionNotFound
        if cached.pending > session.message_count or (min_seq or 0) > session.message_count:
            raise outage
        if not self._serve_unverified:
            raise FreshnessUnknown from outage
        return _View(
            session=session,
            entry=cached,
            source="redis",
            freshness=Freshness(age_seconds=self._durable.seconds_since_heard()),
        )

    async def _filled(self, at_least: Row) -> "_View":
        """The session as a fill read it, at least as new as the row given. Single flight in this process."""
        session_id = at_least.session.session_id
        # A fill that began before this caller did may have read an older row than the caller knows; the next
        # one cannot have.
        for _ in range(2):
            task = self._fills.get(session_id)
            if task is None:
                task = asyncio.create_task(self._fill(session_id))
                self._fills[session_id] = task
                task.add_done_callback(_look_at)
            view = await asyncio.shield(task)
            if view.session.message_count >= at_least.session.message_count:
                return view
        raise DurableStoreUnavailable("the session's row went back while it was read", hint="try again")

    async def _fill(self, session_id: UUID) -> "_View":
        try:
            async with self._cache.watch(session_id) as watch:
                return await self._fill_under_lock(session_id, watch)
        except CacheOutage:
            row, _ = await self._durable.lookup(session_id)
            if row is None:
                raise SessionNotFound from None
            return _View(session=row.session)
        finally:
            # In here, and not when the task is found done: to await a finished task does not suspend, so a
            # caller that needs a newer row than it has would go round for ever.
            del self._fills[session_id]

    async def _fill_under_lock(self, session_id: UUID, watch: Watch) -> "_View":
        if _owned_by_redis(watch.value):
            raise AdoptionPending
        async with self._durable.locked(session_id) as locked:
            row = locked.row
            if row is None:
                raise SessionNotFound
            if row.owner == "redis":
                raise AdoptionPending
            if isinstance(watch.value, Entry) and watch.value.equals(row):
                return _View(session=row.session, entry=watch.value, source="redis")
            lines = await locked.newest(self._messages_max)
            # Before the lock is released: nobody can commit between this snapshot and the EXEC.
            with suppress(CacheOutage):
                await watch.fill(row, EPOCH_ZERO, lines)
        return _View(session=row.session, entry=Entry.of(row, lines))

    async def _refuse_unadopted(self, session_id: UUID) -> None:
        """A session without a row may be one that Redis holds alone."""
        cached = await self._cached(session_id)
        if isinstance(cached, GuideEntry) or _owned_by_redis(cached):
            raise AdoptionPending

    async def _refuse_owned_or_clean(self, session_id: UUID, cached: CachedValue | Literal["out"]) -> None:
        if isinstance(cached, GuideEntry) or _owned_by_redis(cached):
            raise AdoptionPending
        if isinstance(cached, Entry):
            # Deleted while Redis was out: its words should not outlive it.
            with suppress(CacheOutage):
                await self._cache.remove(session_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A session as a read found it. `entry` is its window, wherever that was read from; None: not read."""

    session: ChatSession
    entry: Entry | None = None
    source: Source = "postgres"
    freshness: Freshness = CURRENT


def _look_at(task: asyncio.Task[Any]) -> None:
    """An error is the caller's; where the caller is gone, asyncio would report it as nobody's."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("a write or a fill ended with an error: %r", error)


def _owned_by_redis(cached: CachedValue | Literal["out"]) -> bool:
    return isinstance(cached, Entry) and cached.owner == "redis"


def _degraded(health: StoreHealth) -> StoreHealth:
    if health.status != "fail":
        return health
    return replace(health, status="warn", state=f"{health.state}; cached history is served, labelled")
