"""What the write-through protocol needs of its two sides: two small interfaces and their values.

`app/hybrid.py` decides with these; `app/postgres` and `app/redis_sessions` keep them and never meet.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol
from uuid import UUID

from app.chat import ChatSession, Message, SessionStatus
from app.store import Append, BeginTurn, Cursor, FinishTurn, History, SessionPage, StoreHealth, Turn

Owner = Literal["postgres", "redis"]
Mode = Literal["hybrid", "draining", "redis-only"]

#: The epoch of entries that are only ever believed after a look at the session's row. No lease trusts it.
EPOCH_ZERO = "0" * 16
TOKEN_ZERO = "0" * 16

#: Level 0, every cached read is compared with its row. Processes of two protocols never serve together.
PROTOCOL = 0


class CacheOutage(Exception):
    """Redis gave no usable answer in time. The command may still be carried out later."""


class CacheOutOfMemory(CacheOutage):
    """Redis refused a write that needs memory; everything else still works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """The one row `chat.cache_state`: who owns the data, and which era of the cache this is."""

    protocol: int
    epoch: str
    mode: Mode
    cache: Literal["on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A session's row: the truth that a cached entry is compared with."""

    session: ChatSession
    chain: bytes
    owner: Owner = "postgres"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A session's value in Redis, taken apart. `body` holds the window's lines, as they stand there."""

    owner: Owner
    epoch: str
    chain: bytes
    pending: int
    token: str
    first_seq: int
    session: ChatSession
    body: bytes

    @classmethod
    def of(cls, row: Row, lines: Sequence[str]) -> "Entry":
        """The clean entry that a fill writes for a session whose newest messages are `lines`."""
        return cls(
            owner=row.owner,
            epoch=EPOCH_ZERO,
            chain=row.chain,
            pending=0,
            token=TOKEN_ZERO,
            first_seq=row.session.message_count - len(lines) + 1,
            session=row.session,
            body=",\n".join(lines).encode(),
        )

    def equals(self, row: Row) -> bool:
        """Same length and same chain: the same messages in the same order."""
        return (
            self.session.message_count == row.session.message_count
            and self.chain == row.chain
            and self.session.session_id == row.session.session_id
        )

    def newest(self, max_messages: int, before_seq: int | None) -> tuple[int, tuple[str, ...]] | None:
        """The newest lines below `before_seq` with the first one's seq; None where the window is too short."""
        last = self.session.message_count
        if before_seq is not None:
            last = min(last, before_seq - 1)
        first = max(1, last - max_messages + 1)
        if last < first:
            return last + 1, ()
        if first < self.first_seq:
            return None
        # From the end: a page of the newest needs no look at the older lines.
        tail = self.body.rsplit(b",\n", self.session.message_count - first + 1)
        lines = tail[-(self.session.message_count - first + 1) :][: last - first + 1]
        return first, tuple(line.decode() for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideEntry:
    """A valid value in the guide's own format, without our coherence field: nobody may overwrite it
    while its session has no row.
    """

    session_id: UUID


#: None: nothing there, or nothing that could be read back as a session.
CachedValue = Entry | GuideEntry | None

PublishOutcome = Literal["published", "absent", "behind", "redis-owned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    outcome: PublishOutcome
    entry: Entry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A write as PostgreSQL committed it: the row before and after, and the lines between."""

    before: Row
    after: Row
    first_seq: int
    last_seq: int
    lines: tuple[str, ...] = ()
    replayed: bool = False
    question: Message | None = None
    answer: Message | None = None


def turn_of(append: Append, committed: Committed) -> Turn:
    """The turn that a committed user's message begins, or goes on with, without its history."""
    if not isinstance(append.turn, BeginTurn):
        raise TypeError("begin_turn takes an append whose turn is a BeginTurn")
    asked = append.messages[0]
    return Turn(
        session=committed.after.session,
        question=committed.question or asked.at(committed.first_seq),
        answer=committed.answer,
        answer_id=append.turn.answer_id,
        lease=FinishTurn(question_id=asked.message_id, token=append.turn.token)
        if asked.request_digest is not None
        else None,
        user_id=append.user_id,
    )


class Watch(Protocol):
    """An entry under WATCH on a socket of its own."""

    @property
    def value(self) -> CachedValue: ...

    async def fill(self, row: Row, epoch: str, lines: Sequence[str]) -> bool:
        """Sets a clean entry, only if nothing touched the key since the watch began. False: it lost.

        Raises `CacheOutage`; the command may then be late, and loses against any later touch.
        """
        ...


class SessionCache(Protocol):
    """The cached side. Every method is one step in Redis and takes at most its time-out.

    Raises `CacheOutage` from each method.
    """

    async def get(self, session_id: UUID) -> CachedValue:
        """The value; slides its time to live."""
        ...

    async def publish(self, committed: Committed, epoch: str, *, want_entry: bool) -> Published:
        """Carries a committed append to the entry, only if that stands exactly before it."""
        ...

    async def remove(self, session_id: UUID) -> bool:
        """Unlinks the entry and touches the key. False: Redis owns it, and it was left alone."""
        ...

    def watch(self, session_id: UUID) -> AbstractAsyncContextManager[Watch]: ...

    async def health(self) -> StoreHealth: ...


class LockedSession(Protocol):
    """A session's row, locked `FOR NO KEY UPDATE` until the transaction ends."""

    @property
    def row(self) -> Row | None: ...

    @property
    def state(self) -> CacheState: ...

    async def newest(self, max_messages: int) -> tuple[str, ...]:
        """The newest lines, read in a statement of its own after the lock."""
        ...


class DurableStore(Protocol):
    """The durable side: PostgreSQL, or anything that keeps the same promises.

    Raises `DurableStoreUnavailable` from each method.
    """

    async def create(self, user_id: str) -> Row: ...

    async def lookup(self, session_id: UUID) -> tuple[Row | None, CacheState]:
        """The row and the state as one statement sees them."""
        ...

    async def commit(self, append: Append) -> Committed:
        """One transaction: lock, checks in the contract's order, append."""
        ...

    def locked(self, session_id: UUID) -> AbstractAsyncContextManager[LockedSession]: ...

    async def delete(
        self, session_id: UUID, *, user_id: str | None, before_commit: Callable[[Row], Awaitable[None]]
    ) -> Row:
        """Locks the row, calls `before_commit`, deletes the session with all that belongs to it, commits."""
        ...

    async def context(self, turn: Turn, *, window: int) -> tuple[Message, ...]:
        """The newest `window` messages up to the turn's question. Where they can't be read, the turn's lease is
        given back: a retry need not wait for its end.
        """
        ...

    async def abandon(self, session_id: UUID, lease: FinishTurn) -> None: ...

    async def read_history(
        self,
        session_id: UUID,
        *,
        max_messages: int,
        before_seq: int | None = None,
        min_seq: int | None = None,
        user_id: str | None = None,
    ) -> History: ...

    async def list_sessions(
        self, user_id: str, *, status: SessionStatus = "active", limit: int, after: Cursor | None = None
    ) -> SessionPage: ...

    async def health(self) -> tuple[StoreHealth, ...]: ...

    def seconds_since_heard(self) -> float:
        """How long ago this process last had an answer from the primary."""
        ...
