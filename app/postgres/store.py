"""Chat sessions in PostgreSQL: append-only messages, ordered by seq under the session's row lock.

`PostgresChatSessionStore` keeps the public contract by itself, and is the durable side of the hybrid store.
One public method is one transaction, opened and committed inside it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

import asyncpg
from sqlalchemy import func, or_, select, tuple_

from app.batching import Batcher
from app.chat import (
    CHAIN_START,
    ChatSession,
    Message,
    NewMessage,
    SessionStatus,
    body_of,
    new_uuid,
    next_chain,
    session_month,
    utc_now,
)
from app.coherence.batches import CREATIONS, WriteBatches, size_of
from app.coherence.ports import (
    Adopted,
    CacheState,
    CacheTrusted,
    Committed,
    Fence,
    Interrupted,
    ModeChanged,
    Owner,
    Piece,
    Restored,
    Row,
    RowBusy,
    owned,
    refuse_other_protocols,
    turn_of,
    visible,
)
from app.errors import (
    AdoptionPending,
    ChatError,
    DurableStoreUnavailable,
    HistoryDiffers,
    IdempotencyKeyReused,
    ModeRefused,
    SeqMismatch,
    TurnInProgress,
    TurnTakenOver,
    Unadoptable,
)
from app.postgres import statements
from app.postgres.engine import Database
from app.postgres.partitions import is_missing_partition, make_partitions
from app.postgres.rows import MessageColumns, message_of, row_of, state_of
from app.postgres.tables import chat_sessions
from app.store import (
    Append,
    Appended,
    BeginTurn,
    Cursor,
    FinishTurn,
    History,
    SessionPage,
    SessionRead,
    StoreHealth,
    Turn,
)

_T = TypeVar("_T")

_SEQ_MAX = 2**31 - 1

#: A cached read waits no longer for its row: then PostgreSQL counts as out.
LOOKUP_TIMEOUT_SECONDS = 1.0

#: A read waits no longer for the lock of a writer that hangs: it can do without.
_LOCK_TIMEOUT_MS = 500


@dataclass(slots=True)
class _Locked:
    """Keeps `app.coherence.ports.LockedSession`."""

    row: Row | None
    state: CacheState
    _conn: asyncpg.Connection = field(repr=False)

    async def newest(self, max_messages: int) -> tuple[str, ...]:
        if self.row is None:
            return ()
        session = self.row.session
        records = await self._conn.fetch(
            statements.MESSAGES,
            session.session_id,
            session_month(session.session_id),
            session.message_count - max_messages + 1,
            session.message_count,
        )
        return tuple(_line(message_of(record)) for record in records)

    async def adopt(self, session: ChatSession, messages: Sequence[NewMessage]) -> Adopted:
        try:
            return await self._adopt(session, messages)
        except (
            asyncpg.DataError,
            asyncpg.NotNullViolationError,
            asyncpg.ProgramLimitExceededError,  # a user id that is too long for its index
            ValueError,
            TypeError,
            AttributeError,
        ) as exc:
            # The driver's own text quotes what it was given; its cause does not.
            raise Unadoptable(
                f"Redis holds this session for itself, and PostgreSQL can't store it: {exc.__cause__ or exc}",
                hint=f"look at session:{session.session_id} in Redis, and correct it there",
            ) from exc

    async def _adopt(self, session: ChatSession, messages: Sequence[NewMessage]) -> Adopted:
        row = self.row
        session_id = session.session_id
        if row is None:
            done = await self._conn.execute(
                statements.INSERT_UNLESS_THERE,
                *(session_id, session.user_id, session.created_at, session.last_activity),
            )
            if not done.endswith(" 1"):
                # Made since we looked for its lock: the next attempt finds it.
                raise RowBusy
            row = replace(_empty(session), owner="redis")
        known = {
            record["message_id"]
            for record in await self._conn.fetch(
                statements.MESSAGES_BY_ID,
                session_id,
                session_month(session_id),
                [message.message_id for message in messages],
            )
        }
        new = [message for message in messages if message.message_id not in known]
        if new:
            # Keeps the time of the last word, which may be long ago.
            after = _after(row, new, last_activity=session.last_activity)
            await _store(self._conn, [(new, row, after)])
            row = after
        self.row = row
        gone = max(0, session.message_count - row.session.message_count)
        return Adopted(row=row, added=len(new), known=len(known), gone=gone)

    async def give_to(self, owner: Owner) -> None:
        assert self.row is not None  # noqa: S101 - what has no row has no owner
        await self._conn.execute(statements.GIVE_TO, self.row.session.session_id, owner)


class PostgresChatSessionStore:
    """Keeps `ChatSessionStore` and `app.coherence.ports.DurableStore`.

    A session is active for `ttl_seconds` after it was created or last appended to. `fence` is what its own
    writes owe the readers of a cache, where it serves by itself; the hybrid store brings one for its writes.
    """

    def __init__(self, database: Database, *, ttl_seconds: int, fence: Fence | None = None) -> None:
        self._database = database
        self._ttl = timedelta(seconds=ttl_seconds)
        self._fence = fence or _NoCache()
        self._writes: WriteBatches[Append, Committed] = WriteBatches(
            self._commit_fenced, session_of=lambda append: append.session_id, size=size_of
        )
        self._creations: Batcher[str, Row] = Batcher(self._create_unfenced, bounds=CREATIONS)

    # -- the public contract

    async def create_session(self, user_id: str) -> SessionRead:
        row = await self._creations.submit(user_id)
        return SessionRead(session=row.session, source="postgres")

    async def get_session(
        self, session_id: UUID, *, user_id: str | None = None, min_seq: int | None = None
    ) -> SessionRead:
        row, _ = await self.lookup(session_id)
        return SessionRead(session=visible(row, user_id, min_seq).session, source="postgres")

    async def read_history(
        self,
        session_id: UUID,
        *,
        max_messages: int,
        before_seq: int | None = None,
        min_seq: int | None = None,
        user_id: str | None = None,
    ) -> History:
        # The statement's own bounds would overflow beyond any seq that can be stored.
        before = min(before_seq or _SEQ_MAX, _SEQ_MAX)
        async with self._database.connection() as conn:
            records = await conn.fetch(
                statements.HISTORY, session_id, session_month(session_id), before, max_messages
            )
        row = row_of(records[0], created_at="session_created_at") if records else None
        session = visible(row, user_id, min_seq).session
        lines = tuple(_line(message_of(record)) for record in records if record["seq"] is not None)
        last = min(session.message_count, before - 1)
        return History(
            session=session, first_seq=last - len(lines) + 1, body=body_of(lines), source="postgres"
        )

    async def append(self, append: Append) -> Appended:
        return (await self._writes.submit(append)).appended

    async def begin_turn(self, append: Append, *, window: int) -> Turn:
        committed = await self._writes.submit(append)
        turn = turn_of(append, committed)
        if turn.answer is not None:
            return turn
        return replace(turn, history=await self.context(turn, window=window))

    async def finish_turn(self, turn: Turn, answer: NewMessage) -> Appended:
        return await self.append(turn.ended_by(answer))

    async def abandon_turn(self, turn: Turn) -> None:
        if turn.lease is not None:
            await self.abandon(turn.session.session_id, turn.lease)

    async def list_sessions(
        self,
        user_id: str,
        *,
        status: SessionStatus = "active",
        limit: int,
        after: Cursor | None = None,
        alive: Collection[UUID] | None = None,
    ) -> SessionPage:
        t = chat_sessions.c
        since = utc_now() - self._ttl
        is_active, is_archived = t.last_activity >= since, t.last_activity < since
        if alive is not None:
            # A session that Redis owns is there while its key is, whenever it was last active.
            here = t.owner == "postgres"
            is_active, is_archived = or_(t.session_id.in_(alive), here & is_active), here & is_archived
        which = {"active": is_active, "archived": is_archived, "all": or_(is_active, is_archived)}
        matching = [t.user_id == user_id, which[status]]
        total = select(func.count()).select_from(chat_sessions).where(*matching).scalar_subquery()
        page = select(chat_sessions, total.label("total")).where(*matching)
        if after is not None:
            page = page.where(tuple_(t.created_at, t.session_id) < tuple_(after.created_at, after.session_id))
        page = page.order_by(t.created_at.desc(), t.session_id.desc()).limit(limit + 1)
        async with self._database.core() as conn:
            rows = (await conn.execute(page)).mappings().all()
            # Past the end of a list there is no row to carry the total.
            count = rows[0]["total"] if rows else (await conn.execute(select(total))).scalar_one()
        sessions = tuple(row_of(row).session for row in rows[:limit])
        return SessionPage(
            sessions=sessions,
            total=count,
            next=Cursor(created_at=sessions[-1].created_at, session_id=sessions[-1].session_id)
            if len(rows) > limit
            else None,
            source="postgres",
        )

    async def owned_by_redis(self, user_id: str) -> list[UUID]:
        async with self._database.connection() as conn:
            records = await conn.fetch(statements.OWNED_BY_REDIS, user_id)
        return [record["session_id"] for record in records]

    async def delete_session(self, session_id: UUID, *, user_id: str | None = None) -> ChatSession:
        async def fenced(row: Row, state: CacheState) -> None:
            self._fence.admit(state)
            await self._fence.mark([(row, row)], state)

        return (await self.delete(session_id, user_id=user_id, before_commit=fenced)).session

    async def health(self) -> tuple[StoreHealth, ...]:
        try:
            async with self._database.connection() as conn:
                await conn.fetchval("SELECT 1", timeout=1.0)
        except ChatError as exc:
            return (StoreHealth(name="postgres", status="fail", state=f"out ({exc.detail})"),)
        return (StoreHealth(name="postgres", status="pass", state="source of truth"),)

    # -- the durable side of the hybrid store

    def seconds_since_heard(self) -> float:
        return self._database.seconds_since_heard()

    async def create(
        self,
        user_ids: Sequence[str],
        *,
        owner: Owner,
        before_commit: Callable[[Sequence[Row], CacheState], Awaitable[None]],
    ) -> list[Row]:
        now = utc_now()
        rows = [
            Row(
                session=ChatSession(
                    session_id=new_uuid(), user_id=user_id, created_at=now, last_activity=now, message_count=0
                ),
                chain=CHAIN_START,
                owner=owner,
            )
            for user_id in user_ids
        ]
        count = len(rows)
        async with self._database.transaction() as conn:
            state = await conn.fetchrow(
                statements.CREATE,
                [row.session.session_id for row in rows],
                list(user_ids),
                [now] * count,
                [owner] * count,
            )
            await before_commit(rows, _state(state))
        return rows

    async def _create_unfenced(self, user_ids: Sequence[str]) -> list[Row]:
        async def nothing(_rows: Sequence[Row], state: CacheState) -> None:
            # Nobody can have a copy of what is only being made: there is nothing to fence.
            pass

        return await self.create(user_ids, owner="postgres", before_commit=nothing)

    async def lookup(self, session_id: UUID) -> tuple[Row | None, CacheState]:
        async with self._database.connection() as conn:
            record = await conn.fetchrow(statements.LOOKUP, session_id, timeout=LOOKUP_TIMEOUT_SECONDS)
        if record is None:
            raise DurableStoreUnavailable("chat.cache_state is empty", hint="start the service once")
        return (row_of(record) if record["session_id"] is not None else None), state_of(record)

    @asynccontextmanager
    async def locked(self, session_id: UUID) -> AsyncIterator[_Locked]:
        try:
            async with self._database.transaction(lock_timeout_ms=_LOCK_TIMEOUT_MS) as conn:
                try:
                    record = await conn.fetchrow(statements.LOCK_SESSIONS, [session_id])
                except asyncpg.LockNotAvailableError as exc:
                    raise RowBusy from exc
                # A statement of its own, after the lock: it sees what was committed while we waited.
                state = _state(await conn.fetchrow(statements.STATE))
                yield _Locked(row_of(record) if record else None, state, conn)
        except asyncpg.CheckViolationError as exc:
            if not is_missing_partition(exc):
                raise
            # Adopted from a month that nobody made a partition for. Nothing was written; the next attempt will.
            await make_partitions(self._database, [session_month(session_id)])
            raise RowBusy from exc

    async def commit(
        self, appends: Sequence[Append], fence: Fence, *, waits: bool
    ) -> list[Committed | Exception]:
        outcomes: dict[int, Committed | Exception] = {}
        made_partitions = False
        while len(outcomes) < len(appends):
            left = [index for index in range(len(appends)) if index not in outcomes]
            try:
                done = await self._commit([appends[index] for index in left], fence, waits=waits)
            except _Refused as refused:
                # Rolled back, and the others once more without these.
                outcomes.update((left[index], exc) for index, exc in refused.writes.items())
            except _OtherState as other:
                # Rolled back. Those that are left do not meet this one again.
                fence.admit(other.state)
            except asyncpg.CheckViolationError as exc:
                if made_partitions or not is_missing_partition(exc):
                    raise
                # Nothing was written. An id of a month that nobody made a partition for ahead of time.
                months = {session_month(appends[index].session_id) for index in left}
                await make_partitions(self._database, sorted(months))
                made_partitions = True
            else:
                outcomes.update(zip(left, done, strict=True))
        return [outcomes[index] for index in range(len(appends))]

    async def _commit_fenced(self, appends: list[Append], *, waits: bool) -> list[Committed | Exception]:
        return await self.commit(appends, self._fence, waits=waits)

    async def _commit(
        self, appends: Sequence[Append], fence: Fence, *, waits: bool
    ) -> list[Committed | Exception]:
        lock = statements.LOCK_SESSIONS if waits else statements.LOCK_FREE_SESSIONS
        outcomes: list[Committed | Exception | None] = [None] * len(appends)
        writes: list[_Write] = []
        committed: list[Committed] = []
        async with self._database.transaction() as conn:
            records = await conn.fetch(lock, [append.session_id for append in appends])
            rows = {record["session_id"]: row_of(record) for record in records}
            busy = set() if waits else await _busy(conn, appends, rows)
            expected = fence.expected()
            state, stored = await self._state_and_stored(conn, appends, expected)
            if rows:
                fence.admit(state)
            for index, append in enumerate(appends):
                try:
                    if append.session_id in busy:
                        raise RowBusy  # noqa: TRY301 - one of the conditions that an append fails with
                    row = visible(rows.get(append.session_id), append.user_id, None)
                    mine = stored.get(append.session_id, {})
                    if mine and not isinstance(append.turn, FinishTurn):
                        outcomes[index] = await _replay(conn, append, row, mine)
                        continue
                    if append.if_match is not None and append.if_match != row.session.message_count:
                        raise SeqMismatch(row.session.message_count)
                except (ChatError, RowBusy) as exc:
                    outcomes[index] = exc
                else:
                    writes.append(_Write(index, append, row, _after(row, append.messages)))
            writes = await _step_turns(conn, writes, outcomes)
            if writes or (rows and state is expected):
                committed = await _store_and_mark(conn, writes, state, fence)
        for write, its in zip(writes, committed, strict=True):
            outcomes[write.index] = its
        return [outcome for outcome in outcomes if outcome is not None]

    async def _state_and_stored(
        self, conn: asyncpg.Connection, appends: Sequence[Append], expected: CacheState | None
    ) -> tuple[CacheState, dict[UUID, dict[UUID, asyncpg.Record]]]:
        """The state, or the one that is expected where nothing else is to be asked: `_store_and_mark` looks."""
        # Fresh UUIDv7s cannot be stored already: only keyed requests are looked for.
        ids: list[UUID] = []
        session_ids: list[UUID] = []
        for append in appends:
            if _keyed(append):
                its = [message.message_id for message in append.messages]
                if isinstance(append.turn, BeginTurn):
                    its.append(append.turn.answer_id)
                ids += its
                session_ids += [append.session_id] * len(its)
        if not ids:
            return expected or _state(await conn.fetchrow(statements.STATE)), {}
        months = [session_month(session_id) for session_id in session_ids]
        records = await conn.fetch(statements.STATE_AND_STORED, session_ids, months, ids)
        stored: dict[UUID, dict[UUID, asyncpg.Record]] = {}
        for record in records:
            if record["message_id"] is not None:
                stored.setdefault(record["session_id"], {})[record["message_id"]] = record
        return _state(records[0] if records else None), stored

    async def restore(self, pieces: Sequence[Piece], fence: Fence) -> list[Restored | ChatError]:
        outcomes: dict[UUID, Restored | ChatError] = {}
        async with self._database.connection() as conn:
            await _compare(conn, statements.SESSIONS, pieces, outcomes)
        # Locks in the order of the ids, also those of rows that are being made.
        new = sorted(_left(pieces, outcomes), key=lambda piece: piece.session.session_id)
        if new:
            await make_partitions(
                self._database, sorted({session_month(piece.session.session_id) for piece in new})
            )
        while new:
            try:
                outcomes |= await self._restore(new, fence)
                break
            except _OtherState as other:
                fence.admit(other.state)
            except RowBusy:
                # Another made one of them since we looked for its lock: the next attempt finds it.
                continue
            except _Refused as refused:
                outcomes.update({new[index].session.session_id: exc for index, exc in refused.writes.items()})
                new = _left(new, outcomes)
        return [outcomes[piece.session.session_id] for piece in pieces]

    async def restore_unfenced(self, pieces: Sequence[Piece]) -> list[Restored | ChatError]:
        """The same where no cache is served. Raises `ModeRefused` where there may be one."""
        try:
            return await self.restore(pieces, self._fence)
        except (CacheTrusted, ModeChanged) as exc:
            raise ModeRefused(
                f"the database is served with Redis: {exc}",
                hint="set ENABLE_REDIS_SESSIONS as the services have it",
            ) from exc

    async def _restore(self, pieces: Sequence[Piece], fence: Fence) -> dict[UUID, Restored | ChatError]:
        outcomes: dict[UUID, Restored | ChatError] = {}
        async with self._database.transaction() as conn:
            rows = await _compare(conn, statements.LOCK_SESSIONS, pieces, outcomes)
            # Rule 4: read after the row lock.
            state = _state(await conn.fetchrow(statements.STATE))
            if state.mode != "hybrid":
                raise ModeRefused(
                    f"the database is in mode {state.mode}: Redis may hold what is imported, with newer messages",
                    hint="run `chat-sessions mode hybrid` first, then this again",
                )
            fence.admit(state)
            made = [piece for piece in _left(pieces, outcomes) if piece.session.session_id not in rows]
            if made:
                await _make_sessions(conn, made)
            writes: list[_Write] = []
            for index, piece in enumerate(pieces):
                session_id = piece.session.session_id
                if session_id in outcomes:
                    continue
                row = rows.get(session_id) or _empty(piece.session)
                known = row.session.message_count - piece.first_seq + 1
                new = piece.messages[known:]
                append = Append(session_id=session_id, messages=new)
                after = _after(row, new, last_activity=piece.session.last_activity)
                writes.append(_Write(index, append, row, after))
                outcomes[session_id] = Restored(created=session_id not in rows, added=len(new), known=known)
            if writes:
                await _store_and_mark(conn, writes, state, fence)
        return outcomes

    async def context(self, turn: Turn, *, window: int) -> tuple[Message, ...]:
        try:
            history = await self.read_history(
                turn.session.session_id, max_messages=window, before_seq=turn.question.seq + 1
            )
        except DurableStoreUnavailable:
            await self.abandon_turn(turn)
            raise
        return history.messages

    async def delete(
        self,
        session_id: UUID,
        *,
        user_id: str | None,
        before_commit: Callable[[Row, CacheState], Awaitable[None]],
    ) -> Row:
        async with self._database.transaction() as conn:
            record = await conn.fetchrow(statements.LOCK_SESSION_FOR_DELETE, session_id)
            state = _state(await conn.fetchrow(statements.STATE))
            row = owned(row_of(record) if record else None, user_id)
            await before_commit(row, state)
            await conn.execute(statements.DELETE_MESSAGES, session_id, session_month(session_id))
            await conn.execute(statements.DELETE_TURNS, session_id)
            await conn.execute(statements.DELETE_SESSION, session_id)
        return row

    async def abandon(self, session_id: UUID, lease: FinishTurn) -> None:
        try:
            async with self._database.connection() as conn:
                await conn.execute(statements.RELEASE_TURNS, [session_id], [lease.question_id], [lease.token])
        except DurableStoreUnavailable:
            # The lease ends by itself.
            return


class _NoCache:
    """The fence of a store that has no cache: it may only write where nobody believes one."""

    def __init__(self) -> None:
        self._admitted: CacheState | None = None

    def expected(self) -> CacheState | None:
        return self._admitted

    def admit(self, state: CacheState) -> None:
        refuse_other_protocols(state)
        if state.mode == "redis-only":
            raise ModeChanged(state)
        if state.trusting or not state.settled:
            raise CacheTrusted(state)
        self._admitted = state

    async def mark(
        self,
        writes: Sequence[tuple[Row, Row]],
        state: CacheState,  # noqa: ARG002 - there is nothing to mark in any
    ) -> Sequence[ChatError | None]:
        return [None] * len(writes)


@dataclass(slots=True)
class _Write:
    """An append that will be committed: its place in the batch, and the row before and after it."""

    index: int
    append: Append
    before: Row
    after: Row


class _OtherState(Interrupted):
    """The state is not the one that a transaction was made under."""

    def __init__(self, state: CacheState) -> None:
        self.state = state
        super().__init__(f"the epoch is {state.epoch} now")


class _Refused(Interrupted):
    """Writes of a batch that must not be committed, by their place in it."""

    def __init__(self, writes: dict[int, ChatError]) -> None:
        self.writes = writes
        super().__init__("; ".join(map(str, writes.values())))


def _state(record: asyncpg.Record | None) -> CacheState:
    if record is None:
        raise DurableStoreUnavailable("chat.cache_state is empty", hint="start the service once")
    return state_of(record)


def _keyed(append: Append) -> bool:
    return append.messages[0].request_digest is not None


def _line(message: Message) -> str:
    return message.line(message.seq)


async def _replay(
    conn: asyncpg.Connection, append: Append, row: Row, stored: dict[UUID, asyncpg.Record]
) -> Committed:
    """Answers a request that was stored before; takes an unanswered turn over where its lease has ended."""
    first = stored[append.messages[0].message_id]
    digest = first["request_digest"]
    if digest is None or digest.hex() != append.messages[0].request_digest:
        raise IdempotencyKeyReused
    if not isinstance(append.turn, BeginTurn):
        last_seq = first["seq"] + first["request_size"] - 1
        return Committed(before=row, after=row, first_seq=first["seq"], last_seq=last_seq, replayed=True)
    found = {
        message.message_id: message
        for message in map(
            message_of,
            await conn.fetch(
                statements.MESSAGES_BY_ID,
                append.session_id,
                session_month(append.session_id),
                [first["message_id"], append.turn.answer_id],
            ),
        )
    }
    answer = found.get(append.turn.answer_id)
    if answer is None:
        held = await conn.fetchrow(statements.TURN, append.session_id, first["message_id"])
        if held is not None and held["held"]:
            raise TurnInProgress(retry_after_seconds=max(1.0, held["left_seconds"]))
        await _hold_turns(conn, [append])
    return Committed(
        before=row,
        after=row,
        first_seq=first["seq"],
        last_seq=answer.seq if answer else first["seq"],
        replayed=True,
        question=found[first["message_id"]],
        answer=answer,
    )


def _left(pieces: Sequence[Piece], outcomes: Mapping[UUID, Restored | ChatError]) -> list[Piece]:
    return [piece for piece in pieces if piece.session.session_id not in outcomes]


def _empty(session: ChatSession) -> Row:
    return Row(session=replace(session, message_count=0, first_available_seq=1), chain=CHAIN_START)


async def _make_sessions(conn: asyncpg.Connection, pieces: Sequence[Piece]) -> None:
    sessions = [piece.session for piece in pieces]
    done = await conn.execute(
        statements.RESTORE,
        [session.session_id for session in sessions],
        [session.user_id for session in sessions],
        [session.created_at for session in sessions],
        [session.last_activity for session in sessions],
        [piece.metadata for piece in pieces],
    )
    if int(done.rpartition(" ")[2]) != len(pieces):
        raise RowBusy


async def _compare(
    conn: asyncpg.Connection,
    rows_of: str,
    pieces: Sequence[Piece],
    outcomes: dict[UUID, Restored | ChatError],
) -> dict[UUID, Row]:
    """The rows that are there; notes the outcome of each piece that needs no write, or must not have one."""
    records = await conn.fetch(rows_of, [piece.session.session_id for piece in pieces])
    rows = {record["session_id"]: row_of(record) for record in records}
    for piece in pieces:
        row = rows.get(piece.session.session_id)
        try:
            known = await _known(conn, piece, row)
        except ChatError as exc:
            outcomes[piece.session.session_id] = exc
        else:
            if row is not None and known == len(piece.messages):
                outcomes[piece.session.session_id] = Restored(created=False, added=0, known=known)
    return rows


async def _known(conn: asyncpg.Connection, piece: Piece, row: Row | None) -> int:
    """How many messages of the piece are stored, if its history and the stored one are the same as far as both go."""
    count = row.session.message_count if row is not None else 0
    ids = [message.message_id for message in piece.messages]
    if row is not None and row.session.user_id != piece.session.user_id:
        raise HistoryDiffers(f"session {piece.session.session_id} is stored as another user's: left as it is")
    if row is not None and row.owner == "redis":
        raise AdoptionPending
    if piece.first_seq - 1 <= count <= piece.last_seq:
        known = count - piece.first_seq + 1
        same = next_chain(piece.chain, ids[:known]) == (row.chain if row is not None else CHAIN_START)
    elif count > piece.last_seq:
        known = len(ids)
        records = await conn.fetch(
            statements.IDS,
            *(piece.session.session_id, session_month(piece.session.session_id)),
            *(piece.first_seq, piece.last_seq),
        )
        same = [record["message_id"] for record in records] == ids
    else:
        raise HistoryDiffers(
            f"session {piece.session.session_id} has {count} messages, those from {piece.first_seq} on can't follow"
        )
    if not same:
        raise HistoryDiffers(
            f"session {piece.session.session_id} is stored with another history ({count} messages): left as it is"
        )
    return known


async def _busy(conn: asyncpg.Connection, appends: Sequence[Append], rows: Mapping[UUID, Row]) -> set[UUID]:
    """The sessions that are there, and that somebody else has locked."""
    missed = [append.session_id for append in appends if append.session_id not in rows]
    if not missed:
        return set()
    return {record["session_id"] for record in await conn.fetch(statements.SESSIONS_THERE, missed)}


async def _step_turns(
    conn: asyncpg.Connection, writes: list[_Write], outcomes: list[Committed | Exception | None]
) -> list[_Write]:
    """Takes the leases of turns that begin, and gives back those of turns that end. An answer whose lease another
    holds by now is not among the writes that are left.
    """
    begins = [write.append for write in writes if isinstance(write.append.turn, BeginTurn)]
    if keyed := [append for append in begins if _keyed(append)]:
        await _hold_turns(conn, keyed)
    ends = [(write, step) for write in writes if isinstance(step := write.append.turn, FinishTurn)]
    if not ends:
        return writes
    records = await conn.fetch(
        statements.RELEASE_TURNS,
        [write.append.session_id for write, _ in ends],
        [step.question_id for _, step in ends],
        [step.token for _, step in ends],
    )
    released = {record["session_id"] for record in records}
    late = {write.index for write, _ in ends if write.append.session_id not in released}
    for index in late:
        outcomes[index] = TurnTakenOver()
    return [write for write in writes if write.index not in late]


async def _hold_turns(conn: asyncpg.Connection, appends: Sequence[Append]) -> None:
    steps = [(append, append.turn) for append in appends if isinstance(append.turn, BeginTurn)]
    await conn.execute(
        statements.HOLD_TURNS,
        [append.session_id for append, _ in steps],
        [append.messages[0].message_id for append, _ in steps],
        [step.token for _, step in steps],
        [step.lease_seconds for _, step in steps],
    )


async def _store_and_mark(
    conn: asyncpg.Connection, writes: Sequence[_Write], state: CacheState, fence: Fence
) -> list[Committed]:
    """Rule 1. The marks are made beside the insert: one of the two round trips is for nothing. Rule 4: the state is
    read after the row lock, by the insert's statement; if it is not `state`, the marks count for nothing.

    Returns what will have been committed, made while both servers work: it takes a tenth of the time.
    """
    if not writes:
        _same(state, _state(await conn.fetchrow(statements.STATE)))
        return []

    async def make() -> list[Committed]:
        return [_committed(write, state) for write in writes]

    # Neither is left behind to run into the next transaction on these sessions, also where the other has failed.
    now, refusals, committed = await asyncio.gather(
        _store(conn, [(write.append.messages, write.before, write.after) for write in writes]),
        fence.mark([(write.before, write.after) for write in writes], state),
        make(),
        return_exceptions=True,
    )
    refused = {
        write.index: exc for write, exc in zip(writes, _result(refusals), strict=True) if exc is not None
    }
    _same(state, _result(now))
    if refused:
        raise _Refused(refused)
    return _result(committed)


def _result(outcome: _T | BaseException) -> _T:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _after(row: Row, messages: Sequence[NewMessage], *, last_activity: datetime | None = None) -> Row:
    """The row once `messages` stand at the end of its session."""
    session = row.session
    # Not `dataclasses.replace`, which takes longer than all else here.
    return Row(
        session=ChatSession(
            session_id=session.session_id,
            user_id=session.user_id,
            created_at=session.created_at,
            # A clock behind another instance's must not turn a session's activity back.
            last_activity=max(session.last_activity, last_activity or utc_now()),
            message_count=session.message_count + len(messages),
            first_available_seq=session.first_available_seq,
        ),
        chain=next_chain(row.chain, [message.message_id for message in messages]),
        owner=row.owner,
    )


def _same(expected: CacheState, now: CacheState) -> None:
    """Whatever changes about a state but that it has settled, it changes under another epoch."""
    if now.epoch != expected.epoch:
        raise _OtherState(now)


async def _store(
    conn: asyncpg.Connection, writes: Sequence[tuple[Sequence[NewMessage], Row, Row]]
) -> CacheState:
    """Stores the messages, and says the state of the cache as it is now."""
    columns = MessageColumns()
    for messages, before, _ in writes:
        columns.add(before.session.session_id, messages, first_seq=before.session.message_count + 1)
    record = await conn.fetchrow(
        statements.APPEND,
        [after.session.session_id for _, _, after in writes],
        [after.session.message_count for _, _, after in writes],
        [after.chain for _, _, after in writes],
        [after.session.last_activity for _, _, after in writes],
        *columns.arrays,
    )
    return _state(record)


def _committed(write: _Write, state: CacheState) -> Committed:
    first_seq = write.before.session.message_count + 1
    return Committed(
        state=state,
        before=write.before,
        after=write.after,
        first_seq=first_seq,
        last_seq=write.after.session.message_count,
        lines=tuple(message.line(seq) for seq, message in enumerate(write.append.messages, first_seq)),
    )
