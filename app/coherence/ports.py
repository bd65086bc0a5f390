"""What the write-through protocol needs of its two sides: two small interfaces and their values.

`app/hybrid.py` decides with these; `app/postgres` and `app/redis_sessions` keep them and never meet.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol
from uuid import UUID

from app.chat import ChatSession, Message, NewMessage, SessionStatus, body_of, is_line, messages_of
from app.errors import AdoptionPending, ChatError, DurableStoreUnavailable, NotYetVisible, SessionNotFound
from app.store import Append, Appended, BeginTurn, Cursor, FinishTurn, History, SessionPage, StoreHealth, Turn

Owner = Literal["postgres", "redis"]
Mode = Literal["hybrid", "draining", "redis-only"]

#: The epoch of entries that belong to no era of trust: no lease is ever on it.
EPOCH_ZERO = "0" * 16
TOKEN_ZERO = "0" * 16

#: 0 compared every cached read with its row; 1 marks entries before it commits, and leases trust.
#: Processes of two protocols never write side by side.
PROTOCOL = 1


class Interrupted(Exception):
    """Why a step of the protocol was broken off: its transaction rolls back, its connection stays fit."""


class CacheOutage(Interrupted):
    """Redis gave no usable answer in time. The command may still be carried out later."""


class CacheOutOfMemory(CacheOutage):
    """Redis refused a write that needs memory; everything else still works."""


class CacheMoved(CacheOutage):
    """The socket is not one to the Redis of this epoch. `identity` is whose it is; None: a replica's."""

    def __init__(self, identity: str | None) -> None:
        self.identity = identity
        super().__init__(f"redis is another one now: {identity or 'a replica'}")


class RowBusy(Interrupted):
    """The row's lock was not to be had in time: somebody writes to the session, or hangs while doing so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """The one row `chat.cache_state`: who owns the data, and which era of the cache this is.

    `settled`: every lease on an epoch before this one has ended, so no writer need wait for that.
    """

    protocol: int
    epoch: str
    mode: Mode
    cache: Literal["on", "off"]
    redis_identity: str | None = None
    settled: bool = True

    @property
    def trusting(self) -> bool:
        """Whether a lease on this epoch lets a reader believe Redis."""
        return (
            self.cache == "on"
            and self.mode != "redis-only"
            and self.redis_identity is not None
            # Another protocol's entries may mean something else by the same fields.
            and self.protocol == PROTOCOL
        )


def refuse_other_protocols(state: CacheState) -> None:
    """For every writer: what another protocol's readers are owed, this version does not know."""
    if state.protocol != PROTOCOL:
        raise DurableStoreUnavailable(
            f"the database is served by coherence protocol {state.protocol}, this process speaks {PROTOCOL}",
            hint="restart this process with the newer version",
        )


class ModeChanged(Interrupted):
    """The database is in a mode that this store does not serve."""

    def __init__(self, state: CacheState) -> None:
        self.state = state
        super().__init__(f"the mode is {state.mode} now")


class NotHandedOver(Interrupted):
    """In Redis-only mode over a database: Redis does not hold this session for itself (yet)."""


class CacheTrusted(Interrupted):
    """Somebody may believe Redis, and this writer has none to mark in."""

    def __init__(self, state: CacheState) -> None:
        self.state = state
        super().__init__(f"epoch {state.epoch} lets readers believe Redis")


class Hold(Interrupted):
    """The epoch is new to this process: leases on older ones may last for `seconds` more."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"the epoch changed, {seconds:.3f} s are left to wait")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A session's row: the truth that a cached entry is compared with."""

    session: ChatSession
    chain: bytes
    owner: Owner = "postgres"


def owned(row: Row | None, user_id: str | None) -> Row:
    """The row, if it is this caller's."""
    if row is None or user_id not in {None, row.session.user_id}:
        raise SessionNotFound
    return row


def visible(row: Row | None, user_id: str | None, min_seq: int | None) -> Row:
    """The row as this caller may see it: the contract's first checks, in their order."""
    row = owned(row, user_id)
    if row.owner == "redis":
        raise AdoptionPending
    if min_seq is not None and min_seq > row.session.message_count:
        raise NotYetVisible
    return row


# Not frozen: one is made for each read from Redis, and a frozen one takes twice as long to make.
@dataclass(slots=True, kw_only=True)
class Entry:
    """A session's value in Redis, taken apart. `body` holds the window's lines, as they stand there. Never changed."""

    owner: Owner
    epoch: str
    chain: bytes
    pending: int
    token: str
    first_seq: int
    session: ChatSession
    body: bytes

    @classmethod
    def of(cls, row: Row, lines: Sequence[str], *, epoch: str = EPOCH_ZERO) -> "Entry":
        """The clean entry that a fill writes for a session whose newest messages are `lines`."""
        return cls(
            owner=row.owner,
            epoch=epoch,
            chain=row.chain,
            pending=0,
            token=TOKEN_ZERO,
            first_seq=row.session.message_count - len(lines) + 1,
            session=row.session,
            body=body_of(lines),
        )

    @property
    def dirty(self) -> bool:
        """Marked by a write whose outcome the entry does not know: not to be believed until validated."""
        return self.pending > self.session.message_count

    @property
    def messages(self) -> tuple[Message, ...]:
        """The window, each message read back. Raises `ValueError` or `KeyError` for a line that is none."""
        return messages_of(self.body)

    def equals(self, row: Row) -> bool:
        """Same length and same chain: the same messages in the same order."""
        return (
            self.session.message_count == row.session.message_count
            and self.chain == row.chain
            and self.session.session_id == row.session.session_id
        )

    def newest(self, max_messages: int, before_seq: int | None) -> tuple[int, bytes] | None:
        """The newest lines below `before_seq`, and the first one's seq; None where the window is too short, or
        where its lines are not those that its head names.
        """
        count = self.session.message_count
        last = count if before_seq is None else min(count, before_seq - 1)
        first = max(1, last - max_messages + 1)
        if last < first:
            return last + 1, b""
        if first < self.first_seq:
            return None
        if first == self.first_seq and last == count:
            return (first, self.body) if self.counts() else None
        # From the end: a page of the newest needs no look at the older lines, and is copied once. The right number of
        # lines between two that are in their places leaves none out.
        end = len(self.body)
        if last < count:
            end = max(0, _start_of(self.body, end, count - last) - len(",\n"))
        start = _start_of(self.body, end, last - first + 1)
        page = self.body[start:end] if start >= 0 else b""
        return (
            (first, page) if is_line(page, first) and is_line(page[page.rfind(b"\n") + 1 :], last) else None
        )

    def counts(self) -> bool:
        """Whether it has as many lines as its head says."""
        lines = self.body.count(b"\n") + 1 if self.body else 0
        return lines == self.session.message_count - self.first_seq + 1


def _start_of(body: bytes, end: int, lines: int) -> int:
    """Where the newest so many lines of `body[:end]` begin; -1: there are fewer."""
    line_break_before = body.rfind
    for _ in range(lines - 1):
        end = line_break_before(b"\n", 0, end)
        if end < 0:
            return -1
    return line_break_before(b"\n", 0, end) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideEntry:
    """A valid value in the guide's own format, without our coherence field: it is adopted before anything
    overwrites it. `messages` have ids made from what they say, the same ones at every look.
    """

    session: ChatSession
    messages: tuple[NewMessage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A value that may hold words which nobody else has, in a form that can't be read back: nothing overwrites it.

    `guides`: the guide's program wrote it, or may have.
    """

    why: str
    guides: bool = False


#: None: nothing there, or nothing that anybody could miss.
CachedValue = Entry | GuideEntry | Unreadable | None

#: 'touched': there was no entry to mark, and a fill that was under way is aborted. 'foreign': something
#: that is not ours, and may be the guide's.
MarkOutcome = Literal["marked", "touched", "redis-owned", "foreign"]
#: 'refused': Redis answered with an error, as when it is out of memory.
PublishOutcome = Literal["published", "absent", "behind", "redis-owned", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    outcome: PublishOutcome
    entry: Entry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A write as PostgreSQL committed it: the row before and after, the lines between, and under which state."""

    state: CacheState | None = None
    before: Row
    after: Row
    first_seq: int
    last_seq: int
    lines: tuple[str, ...] = ()
    replayed: bool = False
    question: Message | None = None
    answer: Message | None = None

    @property
    def appended(self) -> Appended:
        """The same as its caller is told of it."""
        return Appended(
            session=self.after.session,
            first_seq=self.first_seq,
            last_seq=self.last_seq,
            source="postgres",
            replayed=self.replayed,
        )


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
    """An entry under WATCH, on a socket of its own to the Redis of one epoch."""

    @property
    def value(self) -> CachedValue: ...

    @property
    def identity(self) -> str | None:
        """The Redis that the socket has proved to be."""
        ...

    async def fill(self, row: Row, epoch: str, lines: Sequence[str]) -> bool:
        """Sets a clean entry, only if nothing touched the key since the watch began. False: it lost.

        Raises `CacheOutage`; the command may then be late, and loses against any later touch.
        """
        ...

    async def touch(self) -> bool:
        """Changes nothing of the entry, under the same condition: True proves that nobody else has. Ends the watch."""
        ...

    async def stamp(self, epoch: str) -> bool:
        """Makes the entry a clean one of `epoch`, under the same condition."""
        ...

    async def drop(self) -> bool:
        """Unlinks the entry, under the same condition: needs no memory."""
        ...


class SessionCache(Protocol):
    """The cached side. Every method is one step in Redis and takes at most its time-out.

    A command runs on a socket that has proved to be the Redis of `state`. Raises `CacheOutage` from each
    method, `CacheMoved` where it is another Redis.
    """

    async def get(self, session_id: UUID, state: CacheState) -> CachedValue:
        """The value; slides its time to live."""
        ...

    async def mark(
        self, writes: Sequence[tuple[Row, Row]], state: CacheState, *, token: str
    ) -> list[MarkOutcome]:
        """Makes the entries dirty for writes that will be committed, rows before and after; touches an absent key."""
        ...

    async def publish(
        self, writes: Sequence[Committed], state: CacheState, *, want_entries: Sequence[bool]
    ) -> list[Published]:
        """Carries each committed append to its entry, only if that stands exactly before it."""
        ...

    async def skeleton(self, rows: Sequence[Row], state: CacheState, *, token: str) -> None:
        """Sets dirty entries for sessions that are being created, each only if there is none."""
        ...

    async def settle(self, session_ids: Sequence[UUID], state: CacheState, *, token: str) -> None:
        """Makes skeletons clean, each only if nobody has marked it since."""
        ...

    async def remove(self, session_id: UUID, state: CacheState) -> bool:
        """Unlinks the entry and touches the key. False: Redis owns it, and it was left alone."""
        ...

    def watch(self, session_id: UUID, state: CacheState) -> AbstractAsyncContextManager[Watch]: ...

    async def probe(self) -> str:
        """Which Redis answers now, on a connection made for this question."""
        ...

    async def health(self) -> StoreHealth: ...


class Fence(Protocol):
    """What a writer owes the readers of a cache. A durable store calls it inside its transaction."""

    def expected(self) -> CacheState | None:
        """The state as it was last heard of: a write may mark under it at once, if it makes sure after the row lock
        that no other has come, and else leaves nothing behind. None: it is to be asked for.
        """
        ...

    def admit(self, state: CacheState) -> None:
        """After the row lock, with the state as it is then. Raises `Interrupted` to roll back."""
        ...

    async def mark(self, writes: Sequence[tuple[Row, Row]], state: CacheState) -> Sequence[ChatError | None]:
        """Beside the insert, before the commit, with the rows before and after. Raises to roll back: no mark, no
        commit. An error in a write's place says that this one must not be committed.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """A session that PostgreSQL has taken over: of its messages in Redis `added` were new and `known` were there.
    `gone` are those that Redis counted but its window had dropped before anybody stored them. `expired`: Redis
    owned the session and has it no more; PostgreSQL has what it had when it gave it away.
    """

    row: Row
    added: int
    known: int
    gone: int = 0
    expired: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of a session's history as a file has it: `messages` from `first_seq` on, after a history with `chain`."""

    session: ChatSession
    metadata: str
    first_seq: int
    chain: bytes
    messages: tuple[NewMessage, ...]

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.messages) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a piece came to: `added` of its messages are new, `known` were there."""

    created: bool
    added: int
    known: int


class LockedSession(Protocol):
    """A session's row, locked `FOR NO KEY UPDATE` until the transaction ends."""

    @property
    def row(self) -> Row | None: ...

    @property
    def state(self) -> CacheState: ...

    async def newest(self, max_messages: int) -> tuple[str, ...]:
        """The newest lines, read in a statement of its own after the lock."""
        ...

    async def adopt(self, session: ChatSession, messages: Sequence[NewMessage]) -> Adopted:
        """Stores the messages that PostgreSQL has not, by id, in their order, at the end. A row that this makes is
        Redis's, as the session is until its entry is replaced: `give_to`.

        Raises `Unadoptable` for what PostgreSQL can't store.
        """
        ...

    async def give_to(self, owner: Owner) -> None: ...


class DurableStore(Protocol):
    """The durable side: PostgreSQL, or anything that keeps the same promises.

    Raises `DurableStoreUnavailable` from each method.
    """

    async def create(
        self,
        user_ids: Sequence[str],
        *,
        owner: Owner,
        before_commit: Callable[[Sequence[Row], CacheState], Awaitable[None]],
    ) -> list[Row]:
        """A new session for each, in one transaction."""
        ...

    async def lookup(self, session_id: UUID) -> tuple[Row | None, CacheState]:
        """The row and the state as one statement sees them."""
        ...

    async def commit(
        self, appends: Sequence[Append], fence: Fence, *, waits: bool
    ) -> list[Committed | Exception]:
        """One transaction for all, of different sessions: lock, checks in the contract's order, `fence.admit`, the
        state and the appends beside `fence.mark`, commit. A request that is stored already is not marked again. What one append
        fails with stands in its place, and keeps no other from being committed.

        Without `waits` a session whose row another has locked is `RowBusy`.
        """
        ...

    async def restore(self, pieces: Sequence[Piece], fence: Fence) -> list[Restored | ChatError]:
        """One transaction for pieces of different sessions: makes the sessions that are missing, and appends what the
        stored history has not, where one of the two is the beginning of the other. Nothing that is stored changes.
        What is known already is neither locked nor marked. In a piece's place stands what it was refused with:
        `HistoryDiffers`, or `AdoptionPending`.

        Raises `ModeRefused` in any mode but hybrid.
        """
        ...

    def locked(self, session_id: UUID) -> AbstractAsyncContextManager[LockedSession]:
        """Raises `RowBusy` where the lock is not to be had for half a second."""
        ...

    async def delete(
        self,
        session_id: UUID,
        *,
        user_id: str | None,
        before_commit: Callable[[Row, CacheState], Awaitable[None]],
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
        self,
        user_id: str,
        *,
        status: SessionStatus = "active",
        limit: int,
        after: Cursor | None = None,
        alive: Collection[UUID] | None = None,
    ) -> SessionPage:
        """`alive`, in Redis-only mode: of the sessions that Redis owns, those that are there still."""
        ...

    async def owned_by_redis(self, user_id: str) -> list[UUID]:
        """A user's sessions that Redis owns, alive there or not."""
        ...

    async def health(self) -> tuple[StoreHealth, ...]: ...

    def seconds_since_heard(self) -> float:
        """How long ago this process last had an answer from the primary."""
        ...


class StateKeeper(Protocol):
    """`chat.cache_state`, on connections of its own: they are there when the others are all taken.

    Raises `DurableStoreUnavailable` from each method, also where it is a standby that answers.
    """

    async def read(self) -> CacheState: ...

    async def change(self, old: CacheState, new: CacheState) -> CacheState:
        """Makes `new` the state under a new epoch, if the epoch is still that of `old`. Returns what stands
        there then: of two that change the same epoch, one only reads.
        """
        ...

    async def settle(self, state: CacheState) -> None:
        """Notes that every lease on an epoch before this one has ended."""
        ...
