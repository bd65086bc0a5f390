"""Chat sessions, written through: PostgreSQL decides, Redis answers.

`HybridChatSessionStore` wraps a durable store with a cache. A write is acknowledged only after PostgreSQL has
committed it and no reader anywhere may trust an older copy. From then on every read, on every instance,
returns it: linearizable per session, whatever Redis, a process or a connection does. Not so for an answer
labelled `unverified` during an outage of PostgreSQL.

An entry is *trusted* if it is clean, carries epoch e, and is read by the holder of an unexpired lease on e
from e's Redis. The claim: a trusted entry equals what PostgreSQL had committed at some moment of the read.
It rests on eight rules, each named where it is kept:

1. Mark inside the transaction: after the row lock and before the commit a script makes the entry dirty. So a
   crash, a lost publish or an unknown commit costs a validation, never a stale read. No mark, no commit.
2. Publish after the commit, only on an entry that stands exactly before the write. Best effort: late, lost or
   doubled, a publish harms nothing, because a dirty entry is not believed.
3. Fill and validate under the row lock, with WATCH and EXEC before the transaction ends: never from a snapshot
   that a writer is about to outdate; and an EXEC that comes late fails, because that writer touched the key.
4. One epoch, in PostgreSQL. A reader's lease on it must be valid after Redis has answered (`app.coherence.lease`).
   A writer reads it after the row lock (what it had marked under another counts for nothing) and waits until the
   leases on older ones have ended.
5. A writer that cannot mark rolls back, turns the cache off under a new epoch, waits, and goes on with
   PostgreSQL alone. The heartbeat turns it on again, under another epoch: older entries are validated when touched.
6. Sockets are bound to the Redis of an epoch: a restart from an old snapshot, a failover, a replica are refused
   by the socket itself, and the epoch changes (`app.redis_sessions.client`, `app.coherence.heartbeat`).
7. A duplicate is acknowledged without a mark: the first attempt marked before it could commit.
8. Late and cancelled commands: no retries, a dropped socket, the session's id checked in every answer; a write
   runs to its end in a task of its own, whatever becomes of its caller.

The row lock is the only barrier: writers read the epoch after it, validators stamp under it. Nothing is global.

With `verify="always"` a read compares the entry with its row instead of trusting a lease: behind a proxy that
hides failovers. All other rules hold there too, so instances of both kinds serve side by side.

Entries that Redis owns (Redis-only mode) and entries in the guide's format are adopted when they are touched: no
script overwrites or removes one before its messages are committed in PostgreSQL.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import Any, Literal, TypeVar
from uuid import UUID

from app.batching import Batcher
from app.chat import ChatSession, NewMessage, SessionStatus, Source, messages_of
from app.coherence.batches import CREATIONS, WriteBatches, concerns_all, size_of
from app.coherence.counts import Counts
from app.coherence.heartbeat import Heartbeat, next_state
from app.coherence.lease import Lease
from app.coherence.ports import (
    Adopted,
    CachedValue,
    CacheMoved,
    CacheOutage,
    CacheOutOfMemory,
    CacheState,
    Committed,
    DurableStore,
    Entry,
    GuideEntry,
    Hold,
    Interrupted,
    LockedSession,
    MarkOutcome,
    ModeChanged,
    Piece,
    Published,
    Restored,
    Row,
    RowBusy,
    SessionCache,
    Unreadable,
    Watch,
    refuse_other_protocols,
    turn_of,
    visible,
)
from app.errors import (
    AdoptionPending,
    ChatError,
    DurableStoreUnavailable,
    FreshnessUnknown,
    SessionNotFound,
    Unadoptable,
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

#: In leases: how long a write is tried before it is refused. One epoch to leave behind takes one, and two may
#: follow closely.
_WRITE_LEASES_MAX = 8

#: How often an entry is looked at again that changed while it was adopted.
_ADOPTIONS_MAX = 5

_T = TypeVar("_T")


class HybridChatSessionStore:
    """Keeps `ChatSessionStore` with PostgreSQL as the truth and Redis in front of it.

    `messages_max` bounds a cached window; `serve_unverified` is `PG_OUTAGE_READS=serve`, `verify` is
    `CACHE_VERIFY`. `lease` is renewed by `heartbeat`, which is somebody else's to run.
    """

    def __init__(
        self,
        durable: DurableStore,
        cache: SessionCache,
        *,
        lease: Lease,
        heartbeat: Heartbeat,
        counts: Counts,
        messages_max: int,
        serve_unverified: bool,
        verify: Literal["lease", "always"] = "lease",
    ) -> None:
        self._durable = durable
        self._cache = cache
        self._lease = lease
        self._heartbeat = heartbeat
        self._counts = counts
        self._messages_max = messages_max
        self._serve_unverified = serve_unverified
        self._verify = verify
        self._fence = _Fence(cache, lease)
        self._fills: dict[UUID, _Fill] = {}
        self._batches: WriteBatches[_Write, _Written] = WriteBatches(
            self._write_all,
            session_of=lambda write: write.append.session_id,
            size=lambda write: size_of(write.append),
        )
        self._creations: Batcher[str, Row] = Batcher(
            self._create_all, bounds=CREATIONS, concerns_all=concerns_all
        )
        self._to_their_end: set[asyncio.Task[Any]] = set()
        self._distrusting: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Waits for the writes whose callers have gone away."""
        await self._creations.close()
        await self._batches.close()
        await asyncio.gather(*self._to_their_end, return_exceptions=True)

    # Writes

    async def create_session(self, user_id: str) -> SessionRead:
        row = await self._creations.submit(user_id)
        return SessionRead(session=row.session, source="postgres")

    async def append(self, append: Append) -> Appended:
        return (await self._write(_Write(append))).committed.appended

    async def begin_turn(self, append: Append, *, window: int) -> Turn:
        written = await self._write(_Write(append, want_entry=True))
        turn = turn_of(append, written.committed)
        if turn.answer is not None:
            return turn
        # The entry as the publish left it needs no look at the row: it stood exactly before this write,
        # under the chain that this write was committed on.
        entry = written.published.entry if written.published is not None else None
        page = entry.newest(window, turn.question.seq + 1) if entry is not None else None
        if page is not None:
            return replace(turn, history=messages_of(page[1]))
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
        view = await self._seen(session_id, user_id, min_seq)
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
        view = await self._seen(session_id, user_id, min_seq)
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
            body=page[1],
            source=view.source,
            freshness=view.freshness,
        )

    async def list_sessions(
        self, user_id: str, *, status: SessionStatus = "active", limit: int, after: Cursor | None = None
    ) -> SessionPage:
        return await self._durable.list_sessions(user_id, status=status, limit=limit, after=after)

    async def health(self) -> tuple[StoreHealth, ...]:
        durable, cache = await asyncio.gather(self._durable.health(), self._cache.health())
        # With Redis out as well there is no cached history either.
        if self._serve_unverified and cache.status == "pass":
            durable = tuple(map(_degraded, durable))
        return (*durable, cache)

    # Write-through

    async def _to_its_end(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Rule 8: a caller that goes away must not break a connection off in the middle."""
        task = asyncio.create_task(call)
        self._to_their_end.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._to_their_end.discard(task)
        _look_at(task)

    async def _admitted(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Runs a write's transaction until the epoch admits it. It waits with no lock and no connection held."""
        deadline = self._lease.now() + _WRITE_LEASES_MAX * self._lease.seconds
        while True:
            try:
                return await attempt()
            except Hold as hold:
                self._counts.writes_held += 1
                self._counts.hold_seconds += hold.seconds
                interruption: Interrupted = hold
                await asyncio.sleep(hold.seconds)
            except _NotMarked as failed:
                interruption = failed
                await self._distrust(failed)
            except RowBusy as busy:
                interruption = busy
            if self._lease.now() > deadline:
                raise DurableStoreUnavailable(f"the write was held for too long: {interruption}")

    async def _distrust(self, failed: "_NotMarked") -> None:
        """Rule 5, once for all writes that have met it."""
        epoch = failed.state.epoch
        task = self._distrusting.get(epoch)
        if task is None:
            log.warning("writes could not mark their entries: %s", failed.cause)
            off = next_state(failed.state, cache="off")
            task = asyncio.create_task(self._heartbeat.change(failed.state, off))
            self._distrusting[epoch] = task
            task.add_done_callback(lambda _: self._distrusting.pop(epoch))
            task.add_done_callback(_look_at)
        await asyncio.shield(task)

    async def _create_all(self, user_ids: Sequence[str]) -> Sequence[Row]:
        return await self._admitted(lambda: self._create_once(user_ids))

    async def _create_once(self, user_ids: Sequence[str]) -> Sequence[Row]:
        token = token_hex(8)
        set_under: CacheState | None = None

        async def set_skeletons(rows: Sequence[Row], state: CacheState) -> None:
            # A clean entry set from here could come late, and hide the first append: a dirty one can't.
            nonlocal set_under
            self._fence.refuse_other_modes(state)
            if state.trusting:
                with suppress(CacheOutage):
                    await self._cache.skeleton(rows, state, token=token)
                    set_under = state

        rows = await self._durable.create(user_ids, owner="postgres", before_commit=set_skeletons)
        if set_under is not None:
            with suppress(CacheOutage):
                await self._cache.settle([row.session.session_id for row in rows], set_under, token=token)
        return rows

    async def _write(self, write: "_Write") -> "_Written":
        async def submit() -> _Written:
            return await self._admitted(lambda: self._batches.submit(write))

        written = await self._adopting(write.append.session_id, submit)
        if written.published is not None and written.published.outcome in {"absent", "behind"}:
            with suppress(Interrupted, AdoptionPending, SessionNotFound, DurableStoreUnavailable):
                # A session that had left Redis lives there again with its next message.
                filled = await self._filled(write.append.session_id)
                written = replace(written, published=Published(outcome="published", entry=filled.entry))
        return written

    async def _write_all(self, writes: "list[_Write]", *, waits: bool) -> "list[_Written | Exception]":
        outcomes = await self._durable.commit([write.append for write in writes], self._fence, waits=waits)
        written = [_Written(outcome) if isinstance(outcome, Committed) else outcome for outcome in outcomes]
        # Rule 7: what was stored before is not published again.
        fresh = [
            (one, write)
            for one, write in zip(written, writes, strict=True)
            if isinstance(one, _Written) and not one.committed.replayed
        ]
        if fresh:
            await self._publish([one for one, _ in fresh], [write.want_entry for _, write in fresh])
        return written

    async def _publish(self, written: "Sequence[_Written]", want_entries: Sequence[bool]) -> None:
        """Rule 2. The writes are durable and stay acknowledged, whatever the copies of them meet."""
        state = written[0].committed.state
        if state is None or not state.trusting:
            return
        try:
            published = await self._cache.publish(
                [one.committed for one in written], state, want_entries=want_entries
            )
        except CacheOutage as exc:
            log.debug("not published: %s", exc)
            return
        for one, its in zip(written, published, strict=True):
            one.published = its

    async def _delete(self, session_id: UUID, user_id: str | None) -> ChatSession:
        async def unlink(row: Row, state: CacheState) -> None:
            if row.owner == "redis":
                raise AdoptionPending
            self._fence.admit(state)
            if not state.trusting:
                if state.mode == "draining":
                    # Redis may hold the session too, and would bring it back.
                    raise AdoptionPending
                return
            try:
                removed = await self._cache.remove(session_id, state)
            except CacheOutage as exc:
                raise _NotMarked(state, exc) from exc
            if not removed:
                raise AdoptionPending

        async def delete() -> Row:
            return await self._admitted(
                lambda: self._durable.delete(session_id, user_id=user_id, before_commit=unlink)
            )

        return (await self._adopting(session_id, delete)).session

    # Read-through

    async def _seen(self, session_id: UUID, user_id: str | None, min_seq: int | None) -> "_View":
        """The session as this caller may see it, adopted where Redis held it for itself."""
        try:
            return await self._read(session_id, user_id, min_seq)
        except AdoptionPending:
            await self._to_its_end(self.adopt(session_id))
        return await self._adopting(
            session_id, lambda: self._read(session_id, user_id, min_seq), looked_in_redis=True
        )

    async def _read(self, session_id: UUID, user_id: str | None, min_seq: int | None) -> "_View":
        if self._verify == "lease" and (state := self._lease.current()) is not None:
            view = await self._trusted(session_id, state)
            if view is not None and (min_seq or 0) <= view.session.message_count:
                if user_id not in {None, view.session.user_id}:
                    raise SessionNotFound
                return view
        return await self._compared(session_id, user_id, min_seq)

    async def _trusted(self, session_id: UUID, state: CacheState) -> "_View | None":
        """Out of Redis alone, or filled from PostgreSQL. None: Redis, or the right to believe it, is out."""
        try:
            cached = await self._cache.get(session_id, state)
        except CacheOutage:
            return None
        if not self._lease.still(state):
            # Rule 4: Redis, or this process, took so long that a writer need not have waited for us.
            self._counts.lease_expired_reads += 1
            return None
        if isinstance(cached, Entry) and _trustworthy(cached, state):
            self._counts.cache_hits += 1
            return _View(session=cached.session, entry=cached, source="redis")
        if _adoptable(cached):
            # Not left to the fill: when Redis goes out before it, it would take a session without a row for none.
            raise AdoptionPending
        return await self._filled(session_id)

    async def _compared(self, session_id: UUID, user_id: str | None, min_seq: int | None) -> "_View":
        """The entry and its row at the same time: equal length and equal chain are the same messages."""
        cached, found = await asyncio.gather(
            self._cached(session_id), self._durable.lookup(session_id), return_exceptions=True
        )
        if isinstance(cached, BaseException):
            raise cached
        if isinstance(found, DurableStoreUnavailable):
            return self._unverified(cached, found, user_id, min_seq)
        if isinstance(found, BaseException):
            raise found
        row, state = found
        self._fence.refuse_other_modes(state)
        if row is None:
            return await self._without_row(session_id, cached, state)
        if _adoptable(cached):
            raise AdoptionPending
        visible(row, user_id, min_seq)
        if cached == _OUT:
            return _View(session=row.session)
        if isinstance(cached, Entry) and cached.equals(row):
            # The messages are the entry's; what is said about the session is the row's, which was read anyway.
            return _View(session=row.session, entry=cached, source="redis")
        return await self._filled(session_id)

    async def _without_row(
        self, session_id: UUID, cached: CachedValue | Literal["out"], state: CacheState
    ) -> "_View":
        if _adoptable(cached) or (cached == _OUT and state.mode == "draining"):
            # Redis may hold it alone.
            raise AdoptionPending
        if isinstance(cached, Entry):
            # Deleted, and brought back by an old snapshot; or adopted since the look-up. The lock will tell.
            return await self._filled(session_id)
        raise SessionNotFound

    async def _cached(self, session_id: UUID) -> CachedValue | Literal["out"]:
        state = self._lease.state
        if state is None or not state.trusting:
            return _OUT
        try:
            return await self._cache.get(session_id, state)
        except CacheOutage:
            return _OUT

    def _unverified(
        self,
        cached: CachedValue | Literal["out"],
        outage: DurableStoreUnavailable,
        user_id: str | None,
        min_seq: int | None,
    ) -> "_View":
        """What may be served while PostgreSQL is out: an entry that could be trusted when it was last heard
        from, with the time since then.
        """
        state = self._lease.state
        if not isinstance(cached, Entry) or state is None or not _trustworthy(cached, state):
            raise outage
        session = cached.session
        if user_id not in {None, session.user_id}:
            raise SessionNotFound
        if (min_seq or 0) > session.message_count:
            raise outage
        if not self._serve_unverified:
            raise FreshnessUnknown from outage
        self._counts.unverified_reads += 1
        return _View(
            session=session,
            entry=cached,
            source="redis",
            freshness=Freshness(age_seconds=self._durable.seconds_since_heard()),
        )

    async def _filled(self, session_id: UUID) -> "_View":
        """The session as PostgreSQL has it at some moment of this call, and in Redis again. Single flight in this
        process; between processes the row lock queues the fills, and the second one finds the entry there.
        """
        fill = self._fills.get(session_id)
        if fill is None or not fill.open:
            fill = self._fills[session_id] = _Fill()
            fill.task = asyncio.create_task(self._fill(session_id, fill))
            fill.task.add_done_callback(_look_at)
        return await asyncio.shield(fill.task)

    async def _fill(self, session_id: UUID, fill: "_Fill") -> "_View":
        state = self._lease.state
        try:
            if state is not None and state.trusting:
                with suppress(CacheOutage, RowBusy):
                    async with self._cache.watch(session_id, state) as watch:
                        return await self._fill_under_lock(session_id, watch, fill)
            fill.open = False
            row, _ = await self._durable.lookup(session_id)
        finally:
            if self._fills.get(session_id) is fill:
                del self._fills[session_id]
        if row is None:
            raise SessionNotFound
        if row.owner == "redis":
            raise AdoptionPending
        return _View(session=row.session)

    async def _fill_under_lock(self, session_id: UUID, watch: Watch, fill: "_Fill") -> "_View":
        """Rule 3. What was read under the lock is current until the lock is released, at the end of the block:
        whoever joins before that joins something that is newer than his call.
        """
        value = watch.value
        async with self._durable.locked(session_id) as locked:
            self._fence.refuse_other_modes(locked.state)
            self._lease.learn(locked.state)
            row = locked.row
            if _adoptable(value) or (row is not None and row.owner == "redis"):
                raise AdoptionPending
            if row is None:
                if value is not None:
                    # Deleted, and brought back by an old snapshot: its words should not outlive it.
                    await self._cache.remove(session_id, locked.state)
                raise SessionNotFound
            if isinstance(value, Entry) and value.equals(row):
                view = _View(session=row.session, entry=value, source="redis")
                if not _trustworthy(value, locked.state):
                    self._counts.cache_validations += 1
                    await self._into(watch, locked, watch.stamp)
            else:
                lines = await locked.newest(self._messages_max)
                if len(lines) < min(row.session.message_count, self._messages_max):
                    # A damaged table: what stands in Redis may be the only copy of what is missing here.
                    log.error("session %s has fewer messages than its row counts: not filled", session_id)
                    fill.open = False
                    return _View(session=row.session)
                view = _View(session=row.session, entry=Entry.of(row, lines))
                self._counts.cache_fills += 1
                await self._into(watch, locked, lambda epoch: watch.fill(row, epoch, lines))
            fill.open = False
        return view

    async def _into(
        self, watch: Watch, locked: LockedSession, write: Callable[[str], Awaitable[bool]]
    ) -> None:
        """Writes to Redis under the row lock, if this is the Redis of the epoch as it is under the lock."""
        state = locked.state
        if state.trusting and watch.identity == state.redis_identity:
            with suppress(CacheOutage):
                await write(state.epoch)

    # Adoption

    async def _adopting(
        self, session_id: UUID, call: Callable[[], Awaitable[_T]], *, looked_in_redis: bool = False
    ) -> _T:
        """Runs `call`; where Redis holds the session for itself, PostgreSQL takes it over first."""
        for _ in range(_ADOPTIONS_MAX):
            try:
                return await call()
            except AdoptionPending:
                await self._to_its_end(self.adopt(session_id))
            except SessionNotFound:
                if looked_in_redis:
                    raise
                cached = await self._cached(session_id)
                if cached == _OUT and self._draining:
                    # Perhaps one that Redis holds alone.
                    raise AdoptionPending from None
                if _adoptable(cached):
                    await self._to_its_end(self.adopt(session_id))
                elif isinstance(cached, Entry) or self._draining:
                    # Another process may have adopted it since we looked for a row.
                    return await call()
                else:
                    raise
        raise AdoptionPending

    @property
    def _draining(self) -> bool:
        return self._lease.state is not None and self._lease.state.mode == "draining"

    async def adopt(self, session_id: UUID) -> Adopted | None:
        """Makes PostgreSQL the owner of a session that Redis holds for itself, message by message, by id.

        None: there is nothing to adopt. Safe to repeat, also after a crash at any line: what is committed is
        recognised by its ids, the entry is only replaced if it is still the one that was read, and the row is
        PostgreSQL's only after that: as long as Redis-only writers may write to the entry, nobody else writes.
        Raises `AdoptionPending` while Redis can't be asked, `Unadoptable` for what PostgreSQL can't take.
        """
        adoption = _Adoption()
        for _ in range(_ADOPTIONS_MAX):
            try:
                settled = await self._admitted(lambda: self._adopt(session_id, adoption))
            except CacheOutOfMemory:
                adoption.drops = True
                continue
            except CacheOutage as exc:
                raise AdoptionPending("Redis may hold this session for itself, and is out") from exc
            if settled:
                return self._told(session_id, adoption.adopted)
        raise AdoptionPending

    async def _adopt(self, session_id: UUID, adoption: "_Adoption") -> bool:
        """One attempt, and whether the entry was still the one that was read when it was replaced."""
        state = self._lease.state
        if state is None or not state.trusting:
            raise CacheOutage
        async with self._cache.watch(session_id, state) as watch:
            value = watch.value
            async with self._durable.locked(session_id) as locked:
                self._admit_adoption(locked.state, watch)
                made = locked.row is None
                adopted = await _take_over(value, locked)
                made = made and adopted is not None
                if made and not await watch.touch():
                    # Adopted by another since the entry was read, and perhaps deleted again: to commit the row
                    # now would bring it back (found by the model).
                    raise RowBusy
                adoption.add(adopted)
                if adopted is None and locked.row is None and _is_left_over(value):
                    await self._cache.remove(session_id, locked.state)
            if adopted is None and (locked.row is None or isinstance(value, Entry)):
                return True
            # Committed: all that was read of the entry is in PostgreSQL.
            if made:
                # The touch has ended the watch: the entry is looked at again.
                return False
            async with self._durable.locked(session_id) as locked:
                self._admit_adoption(locked.state, watch)
                row = locked.row
                if row is None or adoption.drops:
                    # Deleted in between; or Redis has no memory for an entry of ours.
                    replaced = await watch.drop()
                else:
                    ours = replace(row, owner="postgres")
                    replaced = await watch.fill(
                        ours, locked.state.epoch, await locked.newest(self._messages_max)
                    )
                if replaced and row is not None and row.owner == "redis":
                    await locked.give_to("postgres")
        return replaced

    async def restore(self, pieces: Sequence[Piece]) -> list[Restored | ChatError]:
        """Takes over what files have of sessions, as `DurableStore.restore` says. A write like any other: marked
        before it commits, so that no reader believes a copy that was made before it. Nothing is published: what is
        old may stay out of Redis until somebody asks for it.
        """
        return await self._to_its_end(self._restore(pieces))

    async def _restore(self, pieces: Sequence[Piece]) -> list[Restored | ChatError]:
        outcomes = await self._admitted(lambda: self._durable.restore(pieces, self._fence))
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, AdoptionPending):
                outcomes[index] = await self._restored_after_adoption(pieces[index])
        return outcomes

    async def _restored_after_adoption(self, piece: Piece) -> Restored | ChatError:
        """Redis holds the session for itself: what it holds comes first, and the file is compared with that."""
        session_id = piece.session.session_id
        try:
            adopted = await self.adopt(session_id)
        except AdoptionPending as exc:
            return exc
        [outcome] = await self._admitted(lambda: self._durable.restore([piece], self._fence))
        if adopted is None and isinstance(outcome, AdoptionPending):
            # To try again would help nobody: there is nothing that could be adopted.
            return Unadoptable(
                f"session:{session_id} in Redis is no session, and nothing is stored over it",
                hint="look at it, and remove it there",
            )
        return outcome

    def _admit_adoption(self, state: CacheState, watch: Watch) -> None:
        self._fence.admit(state)
        if not state.trusting or watch.identity != state.redis_identity:
            raise CacheMoved(state.redis_identity)

    def _told(self, session_id: UUID, adopted: Adopted | None) -> Adopted | None:
        if adopted is None:
            return None
        self._counts.sessions_adopted += 1
        if adopted.gone:
            log.warning(
                "session %s was adopted; %d of its messages had left Redis's window before",
                *(session_id, adopted.gone),
            )
        if adopted.expired:
            log.warning("session %s had expired in Redis: it has what PostgreSQL had", session_id)
        return replace(adopted, row=replace(adopted.row, owner="postgres"))


class _Fence:
    """Keeps `app.coherence.ports.Fence` for every write of a process."""

    def __init__(self, cache: SessionCache, lease: Lease) -> None:
        self._cache = cache
        self._lease = lease

    def refuse_other_modes(self, state: CacheState) -> None:
        refuse_other_protocols(state)
        if state.mode == "redis-only":
            raise ModeChanged(state)

    def expected(self) -> CacheState | None:
        # One that this process would wait for may have settled: PostgreSQL says.
        state = self._lease.state
        return state if state is not None and self._lease.hold_seconds(state) <= 0 else None

    def admit(self, state: CacheState) -> None:
        """Rule 4, the writer's half."""
        self.refuse_other_modes(state)
        self._lease.learn(state)
        if (left := self._lease.hold_seconds(state)) > 0:
            raise Hold(left)

    async def mark(self, writes: Sequence[tuple[Row, Row]], state: CacheState) -> Sequence[ChatError | None]:
        """Rule 1."""
        if not state.trusting:
            return [None] * len(writes)
        token = token_hex(8)
        try:
            outcomes = await self._mark_twice(writes, state, token)
        except CacheOutage as exc:
            raise _NotMarked(state, exc) from exc
        return [AdoptionPending() if outcome in {"redis-owned", "foreign"} else None for outcome in outcomes]

    async def _mark_twice(
        self, writes: Sequence[tuple[Row, Row]], state: CacheState, token: str
    ) -> Sequence[MarkOutcome]:
        started = self._lease.now()
        try:
            return await self._cache.mark(writes, state, token=token)
        except CacheMoved:
            raise
        except CacheOutage:
            # A connection that was cut says so at once, and the next one may be whole. Who was kept waiting
            # has waited long enough.
            if self._lease.now() - started > _SOON_SECONDS:
                raise
        return await self._cache.mark(writes, state, token=token)


#: A mark that fails sooner than this did not run into its time-out.
_SOON_SECONDS = 0.05


class _NotMarked(Interrupted):
    """The entry could not be marked under `state`."""

    def __init__(self, state: CacheState, cause: CacheOutage) -> None:
        self.state = state
        self.cause = cause
        super().__init__(str(cause))


@dataclass(frozen=True, slots=True)
class _Write:
    """An append on its way. `want_entry`: with the window that it leaves."""

    append: Append
    want_entry: bool = False


@dataclass(slots=True)
class _Written:
    """A committed append, and what became of its publish; None: nobody tried, or Redis was out."""

    committed: Committed
    published: Published | None = None


@dataclass(slots=True)
class _Fill:
    """A fill under way. `open` until its row lock is about to be released: then it is too old for newcomers."""

    open: bool = True
    task: "asyncio.Task[_View]" = field(init=False)


@dataclass(slots=True)
class _Adoption:
    """What all attempts to adopt one session have in common."""

    adopted: Adopted | None = None
    drops: bool = False

    def add(self, adopted: Adopted | None) -> None:
        if self.adopted is not None and adopted is not None:
            before = self.adopted
            adopted = replace(adopted, added=before.added + adopted.added, known=before.known)
        self.adopted = adopted or self.adopted


@dataclass(slots=True, kw_only=True)
class _View:
    """A session as a read found it. `entry` is its window, wherever that was read from; None: not read."""

    session: ChatSession
    entry: Entry | None = None
    source: Source = "postgres"
    freshness: Freshness = CURRENT


async def _take_over(value: CachedValue, locked: LockedSession) -> Adopted | None:
    if isinstance(value, Unreadable):
        raise Unadoptable(
            f"Redis holds this session for itself, and it can't be read back: {value.why}",
            hint="correct or remove its entry in Redis",
        )
    if locked.row is None and _is_left_over(value):
        return None
    if isinstance(value, GuideEntry | Entry) and _adoptable(value):
        try:
            messages = value.messages
        except (ValueError, KeyError, TypeError) as exc:
            raise Unadoptable(
                f"Redis holds this session for itself, and a line of it is no message: {exc}",
                hint=f"look at session:{value.session.session_id} in Redis, and correct it there",
            ) from exc
        return await locked.adopt(value.session, messages)
    if locked.row is not None and locked.row.owner == "redis":
        # It expired in Redis-only mode: PostgreSQL keeps what it has. (Or all that was left to do is to give it.)
        expired = not (isinstance(value, Entry) and value.equals(locked.row))
        return replace(await locked.adopt(locked.row.session, ()), expired=expired)
    return None


def _is_left_over(value: CachedValue) -> bool:
    """An entry that was to be Redis's when its row was committed. Without a row it never was, or it was deleted."""
    return isinstance(value, Entry) and value.owner == "redis" and value.dirty


def _trustworthy(entry: Entry, state: CacheState) -> bool:
    return entry.epoch == state.epoch and not entry.dirty and entry.owner == "postgres" and state.trusting


def _adoptable(cached: CachedValue | Literal["out"]) -> bool:
    return isinstance(cached, GuideEntry | Unreadable) or (
        isinstance(cached, Entry) and cached.owner == "redis"
    )


def _look_at(task: asyncio.Task[Any]) -> None:
    """An error is the caller's; where the caller is gone, asyncio would report it as nobody's."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("a write or a fill ended with an error: %r", error)


def _degraded(health: StoreHealth) -> StoreHealth:
    if health.status != "fail":
        return health
    return replace(health, status="warn", state=f"{health.state}; cached history is served, labelled")
