"""The contract that every store of chat sessions keeps.

Three stores keep it: `HybridChatSessionStore` (Redis in front of PostgreSQL), `RedisChatSessionStore`
(Redis is the source of truth), `PostgresChatSessionStore` (no Redis at all). Two more are made of them:
`RedisOnlyChatSessionStore` (Redis is the source of truth, rows in PostgreSQL beside it), and
`LiveChatSessionStore`, which is the one that the mode of the moment asks for. One suite of tests runs against
all of them on real servers, so a caller never needs to know which one it holds.

Guarantees that hold for each method:

- An answer is linearizable per session in the store's source of truth, unless its `freshness` says
  `unverified`.
- A write that returns is durable in the source of truth. A write that raises anything but
  `CommitUnknown`, or `RedisUnavailable` in Redis-only mode, left nothing behind: after those two, a retry
  with the same key finds out. Only `begin_turn` may have stored the question when it raises an outage, and
  then a retry with the same key goes on at once.
- An outage raises a subclass of `Unavailable`. It never reads as `SessionNotFound` or as an empty list.
- `user_id`, where given, must own the session: otherwise the session does not exist for this caller
  (`SessionNotFound`).
- An entry that Redis owns, where PostgreSQL is the source of truth, raises `AdoptionPending`.
- Order of checks for a write: `SessionNotFound`, then the idempotent replay or its refusal
  (`IdempotencyKeyReused`, `TurnInProgress`), then `SeqMismatch`, then the append.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Literal, Protocol
from uuid import UUID

from app.chat import ChatSession, Message, NewMessage, SessionStatus, Source, lines_of, messages_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """How current an answer is. `age_seconds` is None for an answer that is known to be current;
    otherwise the time since this process last heard from PostgreSQL's primary.
    """

    age_seconds: float | None = None


CURRENT = Freshness()


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRead:
    session: ChatSession
    source: Source
    freshness: Freshness = CURRENT


@dataclass(frozen=True, kw_only=True)
class History:
    """A stretch of a session: its messages as JSON (`app.chat`), oldest first, without gaps.

    `body` has them as a store keeps them, a comma and a line break between two: what only passes through is never taken apart.
    `first_seq` is the seq of the first one, or one more than the last message's where there is none.
    """

    session: ChatSession
    first_seq: int
    body: bytes
    source: Source
    freshness: Freshness = CURRENT

    @cached_property
    def lines(self) -> tuple[str, ...]:
        return lines_of(self.body)

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        return messages_of(self.body)

    @property
    def last_seq(self) -> int:
        """The seq of the last one; one less than `first_seq` where there is none."""
        return self.first_seq + self.body.count(b",\n") if self.body else self.first_seq - 1

    @property
    def next_before_seq(self) -> int | None:
        """Where the page before this one ends; None at the start of what can be read."""
        return self.first_seq if self.body and self.first_seq > self.session.first_available_seq else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """What to append, all or none, with what must hold for it.

    Messages carry their ids; those of a request with an idempotency key are `keyed_message_id`s, and the
    first one carries the request's digest and size. `if_match` is the seq that the session must have.
    `turn` makes the append the first or the second half of a turn.
    """

    session_id: UUID
    messages: Sequence[NewMessage]
    user_id: str | None = None
    if_match: int | None = None
    turn: "BeginTurn | FinishTurn | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginTurn:
    """The append is a user's message; a lease of `lease_seconds` keeps retries of it away meanwhile."""

    answer_id: UUID
    token: UUID
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishTurn:
    """The append is the answer to `question_id`, by the holder of `token`."""

    question_id: UUID
    token: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """The session after the append, and where its messages stand. `replayed`: they stood there before."""

    session: ChatSession
    first_seq: int
    last_seq: int
    source: Source
    replayed: bool = False


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A user's message that is durable, and what is needed to answer it.

    `history` ends with the user's message. `answer` is the stored answer where the request was answered
    before: there is nothing left to do then. `lease` is None for a request without an idempotency key.
    """

    session: ChatSession
    question: Message
    history: tuple[Message, ...] = ()
    answer: Message | None = None
    answer_id: UUID
    lease: FinishTurn | None = None
    user_id: str | None = None

    def ended_by(self, answer: NewMessage) -> Append:
        """The append that ends the turn: refused where a retry holds its lease now."""
        return Append(
            session_id=self.session.session_id, messages=(answer,), user_id=self.user_id, turn=self.lease
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """A place in a user's list of sessions, newest first."""

    created_at: datetime
    session_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPage:
    """`total` counts all sessions that match, on every page; `next` is None on the last one."""

    sessions: tuple[ChatSession, ...]
    total: int
    next: Cursor | None
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreHealth:
    """One dependency as it was a moment ago. `state` is for people, `status` for machines."""

    name: Source
    status: Literal["pass", "warn", "fail"]
    state: str


class ChatSessionStore(Protocol):
    """Keeps chat sessions. See the module for what holds for every method."""

    async def create_session(self, user_id: str) -> SessionRead:
        """Makes an empty session with a new UUIDv7."""
        ...

    async def get_session(
        self, session_id: UUID, *, user_id: str | None = None, min_seq: int | None = None
    ) -> SessionRead:
        """The session without its messages. Slides its time to live in Redis.

        Raises `NotYetVisible` where its last message is older than `min_seq`.
        """
        ...

    async def read_history(
        self,
        session_id: UUID,
        *,
        max_messages: int,
        before_seq: int | None = None,
        min_seq: int | None = None,
        user_id: str | None = None,
    ) -> History:
        """The newest `max_messages` messages (below `before_seq`, where given), oldest first.

        Slides the session's time to live in Redis. Raises `NotYetVisible` like `get_session`.
        """
        ...

    async def append(self, append: Append) -> Appended:
        """Appends all of the messages or none, in their order, at the end of the session.

        A request that was stored before appends nothing and returns where its messages stand.
        Raises `SeqMismatch`, `IdempotencyKeyReused`, `SessionTooLarge` and `CacheFull` (Redis-only mode).
        """
        ...

    async def begin_turn(self, append: Append, *, window: int) -> Turn:
        """Appends a user's message (`append.turn` is a `BeginTurn`) and returns it with its context, the
        newest `window` messages. No connection and no lock is held when it returns.

        A retry of the same request returns the stored answer, or takes over where the first attempt ended
        without one. Raises `TurnInProgress` while the first attempt's lease lasts.
        """
        ...

    async def finish_turn(self, turn: Turn, answer: NewMessage) -> Appended:
        """Appends the answer. Raises `TurnTakenOver` where a retry holds the turn now."""
        ...

    async def abandon_turn(self, turn: Turn) -> None:
        """Gives the lease back after a failure, so that a retry need not wait for its end.

        The user's message stays. Does nothing where the lease is held by another; never raises for an
        outage: the lease ends by itself.
        """
        ...

    async def list_sessions(
        self, user_id: str, *, status: SessionStatus = "active", limit: int, after: Cursor | None = None
    ) -> SessionPage:
        """A user's sessions, newest first.

        Active: created or appended to within the time to live; in Redis-only mode those that still exist.
        """
        ...

    async def delete_session(self, session_id: UUID, *, user_id: str | None = None) -> ChatSession:
        """Deletes the session and its messages from both stores, and returns what it was."""
        ...

    async def health(self) -> tuple[StoreHealth, ...]:
        """The state of each dependency, asked now. Never raises, takes at most a second."""
        ...
