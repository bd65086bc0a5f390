"""PostgreSQL as the coherence protocol sees it: rows, their locks, transactions at READ COMMITTED.

A model for checking schedules, not a fake for other tests. Every statement is executed by the server in a step of its
own, whatever has become of its sender; locks are given in the order in which they were asked for; the server may end
a transaction at any time; a commit becomes visible at one step, which its sender may never hear of.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from app.chat import CHAIN_START, ChatSession, Message, NewMessage, body_of, next_chain
from app.coherence.ports import Adopted, CacheState, Committed, Fence, Interrupted, Owner, Row, RowBusy
from app.errors import AdoptionPending, ChatError, CommitUnknown, DurableStoreUnavailable
from app.postgres.store import owned, visible
from app.store import Append, History, Turn
from tests.failure.model import messages

if TYPE_CHECKING:
    from tests.failure.model.world import Instance, World

#: As in `app/postgres`: how long a writer's statement, and a reader's lock, may take.
STATEMENT_TIMEOUT_SECONDS = 3.0
LOCK_TIMEOUT_SECONDS = 0.5

#: How long the server may keep a transaction whose client it can't reach.
IDLE_SECONDS_MAX = 3.0


_Key = UUID | tuple[UUID]


class Transaction:
    """`over` once it was committed or rolled back. `late`: its COMMIT is still to arrive."""

    __slots__ = ("changes", "instance", "keys", "late", "over")

    def __init__(self, instance: "Instance") -> None:
        self.instance = instance
        #: What it has locked: a row by its id, or the right to insert one by a tuple of it.
        self.keys: list[_Key] = []
        self.changes: list[Callable[[], None]] = []
        self.over = False
        self.late = False


class Postgres:
    """The server. `lines` and `ids` are the messages of a session; `ids` stay when it is deleted."""

    def __init__(self, world: "World", state: CacheState) -> None:
        self._world = world
        self.state = state
        self.rows: dict[UUID, Row] = {}
        self.lines: dict[UUID, tuple[str, ...]] = {}
        self.ids: dict[UUID, list[UUID]] = {}
        self._holders: dict[_Key, Transaction] = {}
        self._waiters: dict[_Key, deque[tuple[Transaction, asyncio.Future[Row | None]]]] = {}
        self._epochs = 1

    # Transactions

    def lock(self, tx: Transaction, key: _Key, got: "asyncio.Future[Row | None]", limit: float) -> None:
        """A `limit` of 0 skips what another has locked."""
        if key not in self._holders:
            self._grant(tx, key, got)
            return
        if not limit:
            got.set_result(None)
            return
        waiter = (tx, got)
        self._waiters.setdefault(key, deque()).append(waiter)

        def give_up() -> None:
            if waiter in self._waiters[key]:
                self._waiters[key].remove(waiter)
                _fail(got, RowBusy() if limit == LOCK_TIMEOUT_SECONDS else DurableStoreUnavailable())

        self._world.loop.later(limit, give_up)

    def _grant(self, tx: Transaction, key: _Key, got: "asyncio.Future[Row | None]") -> bool:
        """False: there is no row to lock, and the next one need not wait."""
        row = self.rows.get(key) if isinstance(key, UUID) else None
        if not got.done():
            got.set_result(row)
        if row is None and isinstance(key, UUID):
            return False
        self._holders[key] = tx
        tx.keys.append(key)
        return True

    def end(self, tx: Transaction) -> None:
        """Rolls back what is not committed, and gives its lock to the next."""
        if tx.late:
            return
        tx.over = True
        tx.instance.transactions.pop(tx, None)
        for waiters in self._waiters.values():
            for waiter in [one for one in waiters if one[0] is tx]:
                waiters.remove(waiter)
                _fail(waiter[1], DurableStoreUnavailable())
        keys, tx.keys = tx.keys, []
        for key in keys:
            if self._holders.get(key) is tx:
                del self._holders[key]
                waiting = self._waiters.get(key)
                while waiting and not self._grant(waiting[0][0], key, waiting.popleft()[1]):
                    pass

    def commit(self, tx: Transaction) -> bool:
        """False: the transaction was over before."""
        tx.late = False
        if tx.over:
            return False
        for change in tx.changes:
            change()
        self.end(tx)
        return True

    # What is committed

    def insert(self, row: Row) -> None:
        session_id = row.session.session_id
        self.rows[session_id] = row
        self.lines[session_id] = ()
        self.ids.setdefault(session_id, [])

    def append(self, after: Row, lines: tuple[str, ...], message_id: UUID) -> None:
        session_id = after.session.session_id
        self.rows[session_id] = after
        self.lines[session_id] += lines
        self.ids[session_id].append(message_id)

    def delete(self, session_id: UUID) -> None:
        del self.rows[session_id], self.lines[session_id]

    def give(self, session_id: UUID, owner: Owner) -> None:
        self.rows[session_id] = replace(self.rows[session_id], owner=owner)

    def change(self, old: CacheState, new: CacheState) -> CacheState:
        if self.state.epoch == old.epoch:
            self._epochs += 1
            self.state = replace(new, epoch=f"{self._epochs:016x}")
        return self.state

    def settle(self, state: CacheState) -> None:
        if self.state.epoch == state.epoch and not self.state.settled:
            self.state = replace(self.state, settled=True)


class _Client:
    """What the two kinds of connections of an instance have in common."""

    def __init__(self, world: "World", instance: "Instance") -> None:
        self._world = world
        self._loop = world.loop
        self._server = world.postgres
        self._instance = instance
        self._random = world.random

    async def _ask(self, run: Callable[..., Any], *args: Any) -> Any:
        """One statement and its answer."""
        reply = self._loop.create_future()
        self._send(self._answer, reply, run, args)
        answer = await reply
        if not self._instance.postgres_up:
            raise DurableStoreUnavailable
        return answer

    def _send(self, step: Callable[..., None], *args: Any) -> None:
        plan = self._world.plan
        if self._random() < plan.postgres_slow:
            self._world.faults["slow statement"] += 1
            self._loop.later(self._random() * plan.slow_seconds, step, *args)
        else:
            self._loop.soon(step, *args)

    def _answer(self, reply: "asyncio.Future[Any]", run: Callable[..., Any], args: Any) -> None:
        if reply.done():
            return
        if not self._instance.postgres_up:
            _fail(reply, DurableStoreUnavailable())
            return
        try:
            reply.set_result(run(*args))
        except DurableStoreUnavailable as exc:
            _fail(reply, exc)

    def _begin(self) -> Transaction:
        tx = Transaction(self._instance)
        self._instance.transactions[tx] = None
        return tx

    async def _commit(self, tx: Transaction) -> None:
        loop, plan = self._loop, self._world.plan
        reply = loop.create_future()
        fate = self._random()
        if fate >= plan.commit_faults:
            self._send(self._committed, reply, tx)
        else:
            self._world.faults["unknown commit"] += 1
            kind = int(fate / plan.commit_faults * 3)
            if kind == 0:
                loop.soon(self._server.commit, tx)
            elif kind == 1:
                loop.soon(self._server.end, tx)
            else:
                # It lies in some buffer, and its row stays locked until it arrives.
                tx.late = True
                loop.later(self._random() * IDLE_SECONDS_MAX, self._server.commit, tx)
            loop.soon(_fail, reply, CommitUnknown())
        await reply
        if not self._instance.postgres_up:
            raise CommitUnknown

    def _committed(self, reply: "asyncio.Future[Any]", tx: Transaction) -> None:
        if self._instance.postgres_up and self._server.commit(tx):
            self._send(_succeed, reply)
        else:
            _fail(reply, CommitUnknown())

    async def _leave(self, tx: Transaction, exc: BaseException) -> None:
        """After an error: ROLLBACK, or the connection is dropped, which the server may hear of late."""
        if isinstance(exc, GeneratorExit) or tx.over:
            return
        if not self._instance.postgres_up:
            self._loop.later(self._random() * IDLE_SECONDS_MAX, self._server.end, tx)
        elif isinstance(exc, DurableStoreUnavailable | asyncio.CancelledError):
            self._loop.soon(self._server.end, tx)
        else:
            try:
                await self._ask(self._server.end, tx)
            except DurableStoreUnavailable:
                self._loop.later(self._random() * IDLE_SECONDS_MAX, self._server.end, tx)


class ModelKeeper(_Client):
    """Keeps `StateKeeper`."""

    async def read(self) -> CacheState:
        return await self._ask(self._state)

    async def change(self, old: CacheState, new: CacheState) -> CacheState:
        changed = await self._ask(self._server.change, old, new)
        if self._random() < self._world.plan.commit_faults:
            raise CommitUnknown
        if self._world.trace is not None:
            self._world.note(f"{self._instance} changes the state: {changed}")
        return changed

    async def settle(self, state: CacheState) -> None:
        await self._ask(self._server.settle, state)

    def _state(self) -> CacheState:
        return self._server.state


class _OtherState(Interrupted):
    def __init__(self, state: CacheState) -> None:
        self.state = state
        super().__init__("another epoch")


class ModelDurable(_Client):
    """Keeps `DurableStore`, in the order of `app/postgres/store.py`."""

    #: The mutant without half of rule 3 reads what it fills without the lock.
    locks = True

    #: The mutant without half of rule 4 takes the state that it has heard of for the one after the row lock.
    looks_again = True

    def seconds_since_heard(self) -> float:
        return 1.0

    async def create(
        self,
        user_ids: Sequence[str],
        *,
        owner: Owner,
        before_commit: Callable[[Sequence[Row], CacheState], Awaitable[None]],
    ) -> list[Row]:
        rows = [
            Row(
                session=ChatSession(
                    session_id=self._world.new_session_id(),
                    user_id=user_id,
                    created_at=messages.THEN,
                    last_activity=messages.THEN,
                    message_count=0,
                ),
                chain=CHAIN_START,
                owner=owner,
            )
            for user_id in user_ids
        ]
        tx = self._begin()
        try:
            state = await self._ask(self._in, tx)
            tx.changes += [partial(self._server.insert, row) for row in rows]
            await before_commit(rows, state)
            await self._commit(tx)
        except BaseException as exc:
            await self._leave(tx, exc)
            raise
        return rows

    async def lookup(self, session_id: UUID) -> tuple[Row | None, CacheState]:
        return await self._ask(self._lookup, session_id)

    async def commit(
        self, appends: Sequence[Append], fence: Fence, *, waits: bool
    ) -> list[Committed | Exception]:
        outcomes: dict[UUID, Committed | Exception] = {}
        while left := [append for append in appends if append.session_id not in outcomes]:
            try:
                outcomes.update(await self._commit_all(left, fence, waits=waits))
            except _OtherState as other:
                fence.admit(other.state)
        return [outcomes[append.session_id] for append in appends]

    async def _commit_all(
        self, appends: Sequence[Append], fence: Fence, *, waits: bool
    ) -> dict[UUID, Committed | Exception]:
        """Only those that must not be committed, where there are such: nothing was committed then."""
        tx = self._begin()
        outcomes: dict[UUID, Committed | Exception] = {}
        writes: list[tuple[Append, Row, Row]] = []
        limit = STATEMENT_TIMEOUT_SECONDS if waits else 0.0
        try:
            rows = {}
            for session_id in sorted(append.session_id for append in appends):
                rows[session_id] = await self._locked(tx, session_id, limit)
            missed = [session_id for session_id, row in rows.items() if row is None]
            busy = await self._ask(self._there, tx, missed) if missed and not waits else frozenset()
            now, stored = await self._ask(self._state_and_stored, tx, appends)
            # What a request without a key is made under. Those with one see the state here: the easier case.
            state = (fence.expected() if any(rows.values()) else None) or now
            if any(rows.values()):
                fence.admit(state)
            for append in appends:
                session_id = append.session_id
                if session_id in busy:
                    outcomes[session_id] = RowBusy()
                    continue
                try:
                    row = visible(rows[session_id], append.user_id, None)
                except ChatError as exc:
                    outcomes[session_id] = exc
                    continue
                if (seq := stored.get(session_id)) is not None:
                    outcomes[session_id] = Committed(
                        before=row, after=row, first_seq=seq, last_seq=seq, replayed=True
                    )
                else:
                    writes.append((append, row, _after(row, append.messages[0].message_id)))
            if writes and (refused := await self._stored_and_marked(tx, writes, state, fence)):
                await self._leave(tx, AdoptionPending())
                return refused
            for append, row, after in writes:
                message_id = append.messages[0].message_id
                lines = (messages.line(message_id, after.session.message_count),)
                tx.changes.append(partial(self._append, after, lines, message_id))
                outcomes[append.session_id] = Committed(
                    state=state,
                    before=row,
                    after=after,
                    first_seq=after.session.message_count,
                    last_seq=after.session.message_count,
                    lines=lines,
                )
            await self._commit(tx)
        except BaseException as exc:
            await self._leave(tx, exc)
            raise
        return outcomes

    async def _stored_and_marked(
        self, tx: Transaction, writes: Sequence[tuple[Append, Row, Row]], state: CacheState, fence: Fence
    ) -> dict[UUID, Committed | Exception]:
        rows = [(before, after) for _, before, after in writes]
        marking = asyncio.ensure_future(fence.mark(rows, state))
        try:
            now = await self._ask(self._in, tx)
        except GeneratorExit:
            raise
        except BaseException:
            await asyncio.wait([marking])
            raise
        await asyncio.wait([marking])
        refusals = zip(rows, marking.result(), strict=True)
        if self.looks_again and now.epoch != state.epoch:
            raise _OtherState(now)
        return {after.session.session_id: exc for (_, after), exc in refusals if exc is not None}

    def locked(self, session_id: UUID) -> "_Locking":
        return _Locking(self, session_id)

    async def delete(
        self,
        session_id: UUID,
        *,
        user_id: str | None,
        before_commit: Callable[[Row, CacheState], Awaitable[None]],
    ) -> Row:
        tx = self._begin()
        try:
            row = await self._locked(tx, session_id, STATEMENT_TIMEOUT_SECONDS)
            state = await self._ask(self._in, tx)
            row = owned(row, user_id)
            await before_commit(row, state)
            await self._ask(self._in, tx)
            tx.changes.append(lambda: self._delete(session_id))
            await self._commit(tx)
        except BaseException as exc:
            await self._leave(tx, exc)
            raise
        return row

    async def context(self, turn: Turn, *, window: int) -> tuple[Message, ...]:
        history = await self.read_history(
            turn.session.session_id, max_messages=window, before_seq=turn.question.seq + 1
        )
        return history.messages

    async def read_history(
        self,
        session_id: UUID,
        *,
        max_messages: int,
        before_seq: int | None = None,
        min_seq: int | None = None,
        user_id: str | None = None,
    ) -> History:
        row, lines = await self._ask(self._history, session_id)
        session = visible(row, user_id, min_seq).session
        last = min(session.message_count, (before_seq or session.message_count + 1) - 1)
        lines = lines[max(0, last - max_messages) : last]
        return History(
            session=session, first_seq=last - len(lines) + 1, body=body_of(lines), source="postgres"
        )

    async def _locked(self, tx: Transaction, key: _Key, limit: float) -> Row | None:
        got = self._loop.create_future()
        self._send(self._lock, tx, key, got, limit)
        row = await got
        if not self._instance.postgres_up:
            raise DurableStoreUnavailable
        return row

    # The server's steps

    def _lock(self, tx: Transaction, key: _Key, got: "asyncio.Future[Any]", limit: float) -> None:
        if not self._instance.postgres_up or tx.over:
            _fail(got, DurableStoreUnavailable())
        else:
            self._server.lock(tx, key, got, limit)

    def _in(self, tx: Transaction) -> CacheState:
        """A statement in a transaction."""
        if tx.over:
            raise DurableStoreUnavailable
        return self._server.state

    def _lookup(self, session_id: UUID) -> tuple[Row | None, CacheState]:
        return self._server.rows.get(session_id), self._server.state

    def _history(self, session_id: UUID) -> tuple[Row | None, tuple[str, ...]]:
        return self._server.rows.get(session_id), self._server.lines.get(session_id, ())

    def _state_and_stored(
        self, tx: Transaction, appends: Sequence[Append]
    ) -> tuple[CacheState, dict[UUID, int]]:
        state = self._in(tx)
        stored = {}
        for append in appends:
            message, ids = append.messages[0], self._server.ids.get(append.session_id, [])
            if message.request_digest is not None and message.message_id in ids:
                stored[append.session_id] = ids.index(message.message_id) + 1
        return state, stored

    def _there(self, tx: Transaction, session_ids: Sequence[UUID]) -> frozenset[UUID]:
        self._in(tx)
        return frozenset(one for one in session_ids if one in self._server.rows)

    def _known(self, tx: Transaction, session_id: UUID) -> frozenset[UUID]:
        self._in(tx)
        return frozenset(self._server.ids.get(session_id, ()))

    def _lines(self, tx: Transaction, session_id: UUID) -> tuple[str, ...]:
        self._in(tx)
        return self._server.lines.get(session_id, ())

    def _append(self, after: Row, lines: tuple[str, ...], message_id: UUID) -> None:
        self._server.append(after, lines, message_id)
        self._seen(f"commits message {after.session.message_count}")

    def _delete(self, session_id: UUID) -> None:
        self._server.delete(session_id)
        self._seen("deletes the session")

    def _seen(self, what: str) -> None:
        world = self._world
        for node in world.nodes:
            world.look_at(node)
        if world.trace is not None:
            world.note(f"{self._instance} {what}")


class _Locking:
    """Keeps `LockedSession`, and its context: a transaction that holds the session's row."""

    __slots__ = ("_durable", "_session_id", "_tx", "row", "state")

    def __init__(self, durable: ModelDurable, session_id: UUID) -> None:
        self._durable = durable
        self._session_id = session_id

    async def __aenter__(self) -> Self:
        durable = self._durable
        tx = self._tx = durable._begin()
        try:
            if durable.locks:
                self.row = await durable._locked(tx, self._session_id, LOCK_TIMEOUT_SECONDS)
            else:
                self.row, _ = await durable._ask(durable._lookup, self._session_id)
            self.state = await durable._ask(durable._in, tx)
        except BaseException as exc:
            await durable._leave(tx, exc)
            raise
        return self

    async def __aexit__(self, kind: object, exc: BaseException | None, _: object) -> None:
        if exc is not None:
            await self._durable._leave(self._tx, exc)
            return
        try:
            await self._durable._commit(self._tx)
        except BaseException as broken:
            await self._durable._leave(self._tx, broken)
            raise

    async def newest(self, max_messages: int) -> tuple[str, ...]:
        if self.row is None:
            return ()
        lines = await self._durable._ask(self._durable._lines, self._tx, self._session_id)
        # By the row's own seq: what was committed since, if there is no lock, is not below it.
        last = self.row.session.message_count
        return lines[max(0, last - max_messages) : last]

    async def adopt(self, session: ChatSession, found: Sequence[NewMessage]) -> Adopted:
        durable, tx, session_id, row = self._durable, self._tx, self._session_id, self.row
        if row is None:
            # An insert waits for whoever inserts the same, and then finds it there.
            await durable._locked(tx, (session_id,), LOCK_TIMEOUT_SECONDS)
            if session_id in durable._server.rows:
                raise RowBusy
            created = replace(session, message_count=0, first_available_seq=1)
            row = inserted = Row(session=created, chain=CHAIN_START, owner="redis")
            tx.changes.append(lambda: durable._server.insert(inserted))
        known = await durable._ask(durable._known, tx, session_id)
        new = [message.message_id for message in found if message.message_id not in known]
        for message_id in new:
            row = _after(row, message_id)
            lines = (messages.line(message_id, row.session.message_count),)
            tx.changes.append(partial(durable._append, row, lines, message_id))
        self.row = row
        gone = max(0, session.message_count - row.session.message_count)
        return Adopted(row=row, added=len(new), known=len(found) - len(new), gone=gone)

    async def give_to(self, owner: Owner) -> None:
        await self._durable._ask(self._durable._in, self._tx)
        self._tx.changes.append(lambda: self._durable._server.give(self._session_id, owner))


def _after(row: Row, message_id: UUID) -> Row:
    session = row.session
    return Row(
        session=ChatSession(
            session_id=session.session_id,
            user_id=session.user_id,
            created_at=session.created_at,
            last_activity=session.last_activity,
            message_count=session.message_count + 1,
        ),
        chain=next_chain(row.chain, (message_id,)),
        owner=row.owner,
    )


def _succeed(reply: "asyncio.Future[Any]") -> None:
    if not reply.done():
        reply.set_result(None)


def _fail(reply: "asyncio.Future[Any]", error: Exception) -> None:
    if not reply.done():
        reply.set_exception(error)
        # Its caller may have crashed: nobody's loss.
        reply._log_traceback = False
