"""Chat sessions in PostgreSQL: append-only messages, ordered by seq under the session's row lock.

`PostgresChatSessionStore` keeps the public contract by itself, and is the durable side of the hybrid store.
One public method is one transaction, opened and committed inside it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from uuid import UUID

import asyncpg
from sqlalchemy import func, select, tuple_

from app.chat import (
    CHAIN_START,
    ChatSession,
    Message,
    NewMessage,
    SessionStatus,
    new_uuid,
    next_chain,
    session_month,
    utc_now,
)
from app.coherence.ports import PROTOCOL, CacheState, Committed, Row, turn_of
from app.errors import (
    AdoptionPending,
    ChatError,
    DurableStoreUnavailable,
    IdempotencyKeyReused,
    NotYetVisible,
    SeqMismatch,
    SessionNotFound,
    TurnInProgress,
    TurnTakenOver,
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

_SEQ_MAX = 2**31 - 1

#: A cached read waits no longer for its row: then PostgreSQL counts as out.
LOOKUP_TIMEOUT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
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


class PostgresChatSessionStore:
    """Keeps `ChatSessionStore` and `app.coherence.ports.DurableStore`.

    A session is active for `ttl_seconds` after it was created or last appended to.
    """

    def __init__(self, database: Database, *, ttl_seconds: int) -> None:
        self._database = database
        self._ttl = timedelta(seconds=ttl_seconds)

    # -- the public contract

    async def create_session(self, user_id: str) -> SessionRead:
        return SessionRead(session=(await self.create(user_id)).session, source="postgres")

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
        return History(session=session, first_seq=last - len(lines) + 1, lines=lines, source="postgres")

    async def append(self, append: Append) -> Appended:
        committed = await self.commit(append)
        return Appended(
            session=committed.after.session,
            first_seq=committed.first_seq,
            last_seq=committed.last_seq,
            source="postgres",
            replayed=committed.replayed,
        )

    async def begin_turn(self, append: Append, *, window: int) -> Turn:
        committed = await self.commit(append)
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
        self, user_id: str, *, status: SessionStatus = "active", limit: int, after: Cursor | None = None
    ) -> SessionPage:
        t = chat_sessions.c
        matching = [t.user_id == user_id]
        since = utc_now() - self._ttl
        if status == "active":
            matching.append(t.last_activity >= since)
        elif status == "archived":
            matching.append(t.last_activity < since)
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

    async def delete_session(self, session_id: UUID, *, user_id: str | None = None) -> ChatSession:
        async def nothing(_row: Row) -> None:
            pass

        return (await self.delete(session_id, user_id=user_id, before_commit=nothing)).session

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

    async def create(self, user_id: str) -> Row:
        now = utc_now()
        session = ChatSession(
            session_id=new_uuid(), user_id=user_id, created_at=now, last_activity=now, message_count=0
        )
        async with self._database.transaction() as conn:
            await conn.execute(statements.CREATE, [session.session_id], [user_id], [now])
        return Row(session=session, chain=CHAIN_START)

    async def lookup(self, session_id: UUID) -> tuple[Row | None, CacheState]:
        async with self._database.connection() as conn:
            record = await conn.fetchrow(statements.LOOKUP, session_id, timeout=LOOKUP_TIMEOUT_SECONDS)
        if record is None:
            raise DurableStoreUnavailable("chat.cache_state is empty", hint="start the service once")
        return (row_of(record) if record["session_id"] is not None else None), state_of(record)

    @asynccontextmanager
    async def locked(self, session_id: UUID) -> AsyncIterator[_Locked]:
        async with self._database.transaction() as conn:
            record = await conn.fetchrow(statements.LOCK_SESSIONS, [session_id])
            # A statement of its own, after the lock: it sees what was committed while we waited.
            state = await conn.fetchrow(statements.STATE)
            if state is None:
                raise DurableStoreUnavailable("chat.cache_state is empty", hint="start the service once")
            yield _Locked(row_of(record) if record else None, state_of(state), conn)

    async def commit(self, append: Append) -> Committed:
        try:
            return await self._commit(append)
        except asyncpg.CheckViolationError as exc:
            if not is_missing_partition(exc):
                raise
        # Nothing was written. An id of a month that nobody made a partition for ahead of time.
        await make_partitions(self._database, [session_month(append.session_id)])
        return await self._commit(append)

    async def _commit(self, append: Append) -> Committed:
        async with self._database.transaction() as conn:
            record = await conn.fetchrow(statements.LOCK_SESSIONS, [append.session_id])
            row = visible(row_of(record) if record else None, append.user_id, None)
            stored = await self._state_and_stored(conn, append)
            if stored and not isinstance(append.turn, FinishTurn):
                return await _replay(conn, append, row, stored)
            if append.if_match is not None and append.if_match != row.session.message_count:
                raise SeqMismatch(row.session.message_count)
            await _step_turn(conn, append)
            return await _insert(conn, append, row)

    async def _state_and_stored(self, conn: asyncpg.Connection, append: Append) -> dict[UUID, asyncpg.Record]:
        # Fresh UUIDv7s cannot be stored already: only a keyed request is looked for.
        ids = [message.message_id for message in append.messages] if _keyed(append) else []
        if ids and isinstance(append.turn, BeginTurn):
            ids.append(append.turn.answer_id)
        if ids:
            months = [session_month(append.session_id)] * len(ids)
            records = await conn.fetch(
                statements.STATE_AND_STORED, [append.session_id] * len(ids), months, ids
            )
        else:
            records = await conn.fetch(statements.STATE)
        if not records:
            raise DurableStoreUnavailable("chat.cache_state is empty", hint="start the service once")
        state = state_of(records[0])
        if state.protocol != PROTOCOL or state.mode != "hybrid":
            raise DurableStoreUnavailable(
                f"the database is in mode {state.mode}, protocol {state.protocol}; "
                f"this process serves hybrid, protocol {PROTOCOL}",
                hint="restart this process",
            )
        if not ids:
            return {}
        return {record["message_id"]: record for record in records if record["message_id"] is not None}

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
        self, session_id: UUID, *, user_id: str | None, before_commit: Callable[[Row], Awaitable[None]]
    ) -> Row:
        async with self._database.transaction() as conn:
            record = await conn.fetchrow(statements.LOCK_SESSION_FOR_DELETE, session_id)
            row = visible(row_of(record) if record else None, user_id, None)
            await before_commit(row)
            await conn.execute(statements.DELETE_MESSAGES, session_id, session_month(session_id))
            await conn.execute(statements.DELETE_TURNS, session_id)
            await conn.execute(statements.DELETE_SESSION, session_id)
        return row

    async def abandon(self, session_id: UUID, lease: FinishTurn) -> None:
        try:
            async with self._database.connection() as conn:
                await conn.execute(statements.RELEASE_TURN, session_id, lease.question_id, lease.token)
        except DurableStoreUnavailable:
            # The lease ends by itself.
            return


def visible(row: Row | None, user_id: str | None, min_seq: int | None) -> Row:
    """The row as this caller may see it: the contract's first checks, in their order."""
    if row is None or user_id not in {None, row.session.user_id}:
        raise SessionNotFound
    if row.owner == "redis":
        raise AdoptionPending
    if min_seq is not None and min_seq > row.session.message_count:
        raise NotYetVisible
    return row


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
        held = await conn.fetchrow(statements.LOCK_TURN, append.session_id, first["message_id"])
        if held is not None and held["held"]:
            raise TurnInProgress(retry_after_seconds=max(1.0, held["left_seconds"]))
        await _hold_turn(conn, append)
    return Committed(
        before=row,
        after=row,
        first_seq=first["seq"],
        last_seq=answer.seq if answer else first["seq"],
        replayed=True,
        question=found[first["message_id"]],
        answer=answer,
    )


async def _step_turn(conn: asyncpg.Connection, append: Append) -> None:
    match append.turn:
        case BeginTurn() if _keyed(append):
            await _hold_turn(conn, append)
        case FinishTurn(question_id=question_id, token=token):
            if await conn.fetchval(statements.RELEASE_TURN, append.session_id, question_id, token) is None:
                raise TurnTakenOver


async def _hold_turn(conn: asyncpg.Connection, append: Append) -> None:
    step = append.turn
    if isinstance(step, BeginTurn):
        await conn.execute(
            statements.HOLD_TURN,
            append.session_id,
            append.messages[0].message_id,
            step.token,
            step.lease_seconds,
        )


async def _insert(conn: asyncpg.Connection, append: Append, row: Row) -> Committed:
    messages: Sequence[NewMessage] = append.messages
    first_seq = row.session.message_count + 1
    after = Row(
        session=replace(
            row.session,
            message_count=row.session.message_count + len(messages),
            # A clock behind another instance's must not turn a session's activity back.
            last_activity=max(row.session.last_activity, utc_now()),
        ),
        chain=next_chain(row.chain, [message.message_id for message in messages]),
    )
    columns = MessageColumns()
    for seq, message in enumerate(messages, first_seq):
        columns.add(append.session_id, message.at(seq))
    await conn.execute(
        statements.APPEND,
        [append.session_id],
        [after.session.message_count],
        [after.chain],
        [after.session.last_activity],
        *columns.arrays,
    )
    return Committed(
        before=row,
        after=after,
        first_seq=first_seq,
        last_seq=after.session.message_count,
        lines=tuple(message.line(seq) for seq, message in enumerate(messages, first_seq)),
    )
