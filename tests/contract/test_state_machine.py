"""Random calls, one after another, to two instances of each store: they answer like a dict.

`Model` is the dict. A machine asks a store and the model the same thing and wants the same answer or the same
refusal: every field but where an answer came from. What happens to Redis in between changes no answer of the
hybrid store; where Redis is the source of truth, the model says what is gone.

Hypothesis prints the calls that led to a difference, as few as it finds, and keeps them in `.hypothesis` for the
next run. More of it: `MACHINE_EXAMPLES=1000 pytest tests/contract/test_state_machine.py`.
"""

import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from app.chat import ROLES, ChatSession, Message, Role, SessionStatus, Source, body_of, utc_now
from app.errors import (
    ChatError,
    IdempotencyKeyReused,
    NotYetVisible,
    RedisUnavailable,
    SeqMismatch,
    SessionNotFound,
    TurnInProgress,
    TurnTakenOver,
)
from app.redis_sessions.keys import session_key
from app.settings import Settings
from app.store import (
    Append,
    Appended,
    BeginTurn,
    ChatSessionStore,
    Cursor,
    FinishTurn,
    History,
    SessionRead,
    Turn,
)
from app.wiring import Runtime, open_runtime
from tests.contract.suite import CALLS, METADATA, NFC, NFD, TEXTS
from tests.factories import keyed_append, new_answer, new_message, turn_append

T = TypeVar("T")

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES") or 40)

bounded = hypothesis_settings(
    stateful_step_count=50,
    deadline=None,
    derandomize=False,
    print_blob=True,
    # Real servers are slow to draw for, and a machine's names are drawn anew in each example.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

#: Of each store, on the same servers.
INSTANCES = 2
#: That an example begins with, and has at most: calls should meet in the same session.
SESSIONS, SESSIONS_MAX = 2, 4
#: Few, so that a handful of calls passes every window.
MESSAGES_MAX = 5
#: Little, so that one large message passes the window in bytes.
WINDOW_BYTES_MAX = 8_000

USERS = ("user123", "Nguyễn Thị Hoa")
LEASE_SECONDS, SHORT_LEASE_SECONDS = 600.0, 0.001

#: What happens to a session's key, besides what another session's value, or a part of its own (percent), does to it.
SPOILS = [
    "evicted",
    "expired",
    "another session's value",
    "a list",
    b"",
    b"garbage",
    b"{}",
    b"null",
    b"\xff\x00",
    b'{"_c":"1',
    b'{"_c":"' + b"1" * 400,
    b'{"_c":"' + b"x" * 400,
    10,
    50,
    99,
]

instances = st.sampled_from(range(INSTANCES))
users = st.sampled_from([USERS[0], USERS[0], USERS[1]])
callers = st.sampled_from(["anybody", "anybody", "anybody", "the owner", "the owner", "a stranger"])
leases = st.sampled_from([LEASE_SECONDS, LEASE_SECONDS, SHORT_LEASE_SECONDS])
#: Relative to the seq that the session has.
matches = st.sampled_from([None, None, None, None, None, 0, 0, -1, 1])
min_seqs = st.sampled_from([None, None, None, 0, -1, 1, 2**40])
befores = st.none() | st.integers(1, 12) | st.just(2**31)
lengths = st.sampled_from([1, 2, 3, MESSAGES_MAX, MESSAGES_MAX + 1, 1000])


@dataclass(frozen=True)
class Draft:
    """What an append says."""

    contents: tuple[str, ...]
    key: str | None = None
    role: Role = "user"
    metadata: object = None

    def to(self, session_id: UUID) -> Append:
        if self.key is not None:
            return keyed_append(session_id, self.key, *self.contents, digest=digest("append", *self.contents))
        messages = [new_message(content, role=self.role, metadata=self.metadata) for content in self.contents]
        return Append(session_id=session_id, messages=messages)


def digest(*parts: str) -> str:
    """Of a call and its body, as the API makes it."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


texts = st.sampled_from([NFC, NFD, "Xin chào " * 400, *TEXTS.values()])
objects = st.sampled_from([{}, {}, {"nguồn": "Điều 5. " * 500}, METADATA])
#: Few keys and few bodies, so that requests come again, also with another body. `k1` is a turn's too.
bodies = st.sampled_from([("a", "b")] * 4 + [("a",), ("b", "c", "d")])
drafts = st.one_of(
    st.builds(Draft, bodies, key=st.just("k")),
    st.builds(Draft, bodies, key=st.just("k1")),
    st.integers(1, 12).map(lambda count: Draft(tuple(map(str, range(count))))),
    st.builds(
        Draft,
        st.lists(texts, min_size=1, max_size=3).map(tuple),
        role=st.sampled_from(ROLES),
        metadata=objects,
    ),
)
turn_keys = st.sampled_from([None, "k1", "k2", "k2"])
questions = st.sampled_from(["a", "a", "a", "b"])

# The model


@dataclass
class Lease:
    """Who answers a turn. Not `running`: the lease has ended, and nobody has taken the turn over."""

    token: UUID
    running: bool


@dataclass
class Kept:
    """A session, and those of its messages that can be read."""

    session: ChatSession
    messages: list[Message] = field(default_factory=list)
    alive: bool = True

    @property
    def id(self) -> UUID:
        return self.session.session_id

    def find(self, message_id: UUID) -> Message | None:
        return next((message for message in self.messages if message.message_id == message_id), None)

    def newest(self, max_messages: int, before_seq: int | None = None) -> list[Message]:
        return [message for message in self.messages if before_seq is None or message.seq < before_seq][
            -max_messages:
        ]


@dataclass
class Model:
    """The contract of `app.store` as a dict keeps it. Raises what a store raises.

    `messages_max` is the window where older messages are gone for good, None where all stay readable.
    """

    messages_max: int | None
    sessions: dict[UUID, Kept] = field(default_factory=dict)
    leases: dict[tuple[UUID, UUID], Lease] = field(default_factory=dict)

    def visible(self, session_id: UUID, user_id: str | None, min_seq: int | None = None) -> Kept:
        kept = self.sessions.get(session_id)
        if kept is None or user_id not in {None, kept.session.user_id}:
            raise SessionNotFound
        if min_seq is not None and min_seq > kept.session.message_count:
            raise NotYetVisible
        return kept

    def get(self, session_id: UUID, user_id: str | None, min_seq: int | None) -> SessionRead:
        return SessionRead(session=self.visible(session_id, user_id, min_seq).session, source="redis")

    def history(
        self,
        session_id: UUID,
        user_id: str | None,
        min_seq: int | None,
        *,
        max_messages: int,
        before_seq: int | None,
    ) -> History:
        kept = self.visible(session_id, user_id, min_seq)
        found = kept.newest(max_messages, before_seq)
        after_last = min(kept.session.message_count + 1, before_seq or 2**63)
        return History(
            session=kept.session,
            first_seq=found[0].seq if found else after_last,
            body=body_of([message.line(message.seq) for message in found]),
            source="redis",
        )

    def append(self, append: Append, moment: datetime | None) -> Appended:
        """`moment` is the last activity that the store gave the session."""
        kept = self.visible(append.session_id, append.user_id)
        size = len(append.messages)
        first, last = self._stored(kept, append, append.messages[-1].message_id)
        if first or last:
            last_seq = last.seq if last else first.seq + size - 1
            return Appended(
                session=kept.session,
                first_seq=last_seq - size + 1,
                last_seq=last_seq,
                source="redis",
                replayed=True,
            )
        self._match(kept, append)
        if isinstance(append.turn, FinishTurn) and not self._release(append.session_id, append.turn):
            raise TurnTakenOver
        self._add(kept, append, moment)
        last_seq = kept.session.message_count
        return Appended(
            session=kept.session, first_seq=last_seq - size + 1, last_seq=last_seq, source="redis"
        )

    def begin(self, append: Append, moment: datetime | None, *, window: int) -> Turn:
        kept = self.visible(append.session_id, append.user_id)
        step, asked = append.turn, append.messages[0]
        assert isinstance(step, BeginTurn)
        question, answer = self._stored(kept, append, step.answer_id)
        if question is None and answer is None:
            self._match(kept, append)
            self._add(kept, append, moment)
            question = kept.messages[-1]
        elif answer is None and (lease := self._lease(append)) is not None and lease.running:
            raise TurnInProgress
        holder = None
        if asked.request_digest is not None:
            holder = FinishTurn(question_id=asked.message_id, token=step.token)
            if answer is None:
                self.leases[append.session_id, asked.message_id] = Lease(
                    step.token, running=step.lease_seconds == LEASE_SECONDS
                )
        return Turn(
            session=kept.session,
            # A question that fell out of the window before its answer did is given as it was asked again.
            question=question or asked.at(answer.seq - 1),
            history=() if answer else tuple(kept.newest(window, question.seq + 1)),
            answer=answer,
            answer_id=step.answer_id,
            lease=holder,
            user_id=append.user_id,
        )

    def abandon(self, turn: Turn) -> None:
        if turn.lease is not None:
            self._release(turn.session.session_id, turn.lease)

    def delete(self, session_id: UUID, user_id: str | None) -> ChatSession:
        kept = self.visible(session_id, user_id)
        self.lose(kept)
        return kept.session

    def lose(self, kept: Kept) -> None:
        kept.alive = False
        self.sessions.pop(kept.id, None)

    def listed(self, user_id: str) -> list[ChatSession]:
        found = [kept.session for kept in self.sessions.values() if kept.session.user_id == user_id]
        return sorted(found, key=lambda session: (session.created_at, session.session_id), reverse=True)

    def _stored(
        self, kept: Kept, append: Append, last_id: UUID
    ) -> tuple[Message, Message | None] | tuple[None, Message | None]:
        """The request's first and last message, where it has a key: a key lives as long as they do."""
        asked = append.messages[0]
        if asked.request_digest is None:
            return None, None
        first = kept.find(asked.message_id)
        if first is not None and first.request_digest != asked.request_digest:
            raise IdempotencyKeyReused
        return first, kept.find(last_id)

    def _match(self, kept: Kept, append: Append) -> None:
        if append.if_match not in {None, kept.session.message_count}:
            raise SeqMismatch(kept.session.message_count)

    def _add(self, kept: Kept, append: Append, moment: datetime | None) -> None:
        # None: the store refused. That is a difference, and the next comparison will say so.
        moment = moment or kept.session.last_activity
        assert kept.session.last_activity <= moment <= utc_now()
        first_seq = kept.session.message_count + 1
        kept.messages += [message.at(seq) for seq, message in enumerate(append.messages, first_seq)]
        if self.messages_max is not None:
            del kept.messages[: -self.messages_max]
        kept.session = replace(
            kept.session,
            last_activity=moment,
            message_count=kept.messages[-1].seq,
            first_available_seq=kept.messages[0].seq,
        )

    def _lease(self, append: Append) -> Lease | None:
        return self.leases.get((append.session_id, append.messages[0].message_id))

    def _release(self, session_id: UUID, held: FinishTurn) -> bool:
        place = session_id, held.question_id
        lease = self.leases.get(place)
        if lease is None or lease.token != held.token:
            return False
        del self.leases[place]
        return True


def attempt(call: Callable[[], T]) -> T | ChatError:
    try:
        return call()
    except ChatError as exc:
        return exc


def said(outcome: object) -> object:
    """What must be equal: an answer but for where it came from, a refusal's kind and what it says to programs."""
    match outcome:
        case SeqMismatch():
            return SeqMismatch, outcome.current_seq
        case ChatError():
            return type(outcome)
        case SessionRead() | History() | Appended():
            return replace(outcome, source="redis")
    return outcome


# The machines


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all examples of a run share: background work of the stores goes on between two calls.

    An example finds empty stores, but connections, and what a store knows of Redis, as the one before left them.
    """

    portal: BlockingPortal
    runtimes: tuple[Runtime, ...]
    redis: Redis
    aux: Redis
    conn: asyncpg.Connection
    sources: set[Source] = field(default_factory=set)

    def empty(self) -> None:
        self.redis.flushdb()
        self.aux.flushdb()
        # Not the state of the cache: the instances live by it.
        self.portal.call(
            self.conn.execute, "TRUNCATE chat.chat_sessions, chat.chat_messages, chat.chat_turns"
        )


@contextmanager
def opened(settings: Settings, *, database_url: str, redis_url: str) -> Iterator[Bench]:
    with ExitStack() as stack:
        redis, aux = (
            stack.enter_context(Redis.from_url(redis_url, db=db))
            for db in (settings.redis_db_sessions, settings.redis_db_aux)
        )
        portal = stack.enter_context(start_blocking_portal())
        conn = portal.call(asyncpg.connect, database_url)
        stack.callback(portal.call, conn.close)
        runtimes = tuple(
            stack.enter_context(portal.wrap_async_context_manager(open_runtime(settings)))
            for _ in range(INSTANCES)
        )
        yield Bench(portal=portal, runtimes=runtimes, redis=redis, aux=aux, conn=conn)


async def wait_for(awaitable: Awaitable[T]) -> T:
    return await awaitable


def wait_until(holds: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline


def user_of(caller: str, kept: Kept) -> str | None:
    return {"anybody": None, "the owner": kept.session.user_id, "a stranger": "user12"}[caller]


def near(kept: Kept, distance: int | None) -> int | None:
    """A seq that far from the session's last one."""
    return None if distance is None else max(0, kept.session.message_count + distance)


sessions = Bundle("sessions")
turns = Bundle("turns")

alive = sessions.filter(lambda kept: kept.alive)
some_alive = precondition(lambda self: self.model.sessions)


class StoreMachine(RuleBasedStateMachine):
    """The calls of the contract, each to one of two instances. Subclasses say how to open a store."""

    bench: ClassVar[Bench]
    opens_with: ClassVar[dict[str, Any]]
    #: Where histories must have come from, or the run has shown nothing.
    sources: ClassVar[set[Source]]
    redis_is_the_truth: ClassVar[bool] = False
    messages_max: ClassVar[int] = MESSAGES_MAX
    examples: ClassVar[int] = EXAMPLES

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(messages_max=self.messages_max if self.redis_is_the_truth else None)
        self.kept: list[Kept] = []
        self.answered: set[UUID] = set()
        #: Sessions that are gone because something else stands at their key.
        self.covered: set[UUID] = set()
        self.as_expected = True
        self.bench.empty()

    @classmethod
    def settings_of(cls, settings: Settings) -> Settings:
        return settings.model_copy(
            update={
                "session_max_messages": cls.messages_max,
                "session_window_bytes_max": WINDOW_BYTES_MAX,
                **cls.opens_with,
            }
        )

    def teardown(self) -> None:
        # A difference was found: it would only be found again.
        if self.as_expected:
            for kept in self.kept:
                for instance in range(INSTANCES):
                    self.read_back(kept, 1000, instance)

    def store(self, instance: int) -> ChatSessionStore:
        return self.bench.runtimes[instance].store

    def outcome(self, call: Awaitable[T]) -> T | ChatError:
        try:
            found = self.bench.portal.call(wait_for, call)
        except ChatError as exc:
            found = exc
        if isinstance(found, History):
            self.bench.sources.add(found.source)
        return found

    def compare(self, found: object, expected: object) -> None:
        self.as_expected = False
        assert said(found) == said(expected)
        self.as_expected = True

    def write(self, call: Awaitable[T], model: Callable[[datetime | None], T]) -> T | ChatError:
        found = self.outcome(call)
        moment = None if isinstance(found, ChatError) else found.session.last_activity
        self.compare(found, attempt(partial(model, moment)))
        return found

    # Sessions

    @initialize(target=sessions)
    def there_are_sessions(self) -> MultipleResults[Kept]:
        return multiple(*(self.create(USERS[0], 0) for _ in range(SESSIONS)))

    @precondition(lambda self: len(self.model.sessions) < SESSIONS_MAX)
    @rule(target=sessions, user_id=users, instance=instances)
    def create(self, user_id: str, instance: int) -> Kept:
        before = utc_now()
        found = self.outcome(self.store(instance).create_session(user_id))
        assert isinstance(found, SessionRead), found
        made = found.session
        self.compare(
            made,
            ChatSession(
                session_id=made.session_id,
                user_id=user_id,
                created_at=made.created_at,
                last_activity=made.created_at,
                message_count=0,
            ),
        )
        assert before <= made.created_at <= utc_now()
        assert made.session_id not in {kept.id for kept in self.kept}
        kept = Kept(made)
        self.kept.append(kept)
        self.model.sessions[kept.id] = kept
        return kept

    @some_alive
    @rule(kept=alive, caller=callers, instance=instances)
    def delete(self, kept: Kept, caller: str, instance: int) -> None:
        user_id = user_of(caller, kept)
        found = self.outcome(self.store(instance).delete_session(kept.id, user_id=user_id))
        self.compare(found, attempt(lambda: self.model.delete(kept.id, user_id)))

    @rule(call=st.sampled_from(list(CALLS)), number=st.integers(0, 3), instance=instances)
    def use_what_is_not_there(self, call: str, number: int, instance: int) -> None:
        """What was deleted, what Redis has lost, or what never was."""
        ids = [kept.id for kept in self.kept if not kept.alive] + [uuid4()]
        session_id = ids[-1 - number % len(ids)]
        found = self.outcome(CALLS[call](self.store(instance), session_id, None))
        self.compare(found, SessionNotFound())

    @rule(
        user_id=users,
        status=st.sampled_from(["active", "all", "archived"]),
        limit=st.integers(1, 4),
        instance=instances,
    )
    def list_to_the_end(self, user_id: str, status: SessionStatus, limit: int, instance: int) -> None:
        expected = [] if status == "archived" else self.model.listed(user_id)
        found: list[ChatSession] = []
        after: Cursor | None = None
        while True:
            page = self.outcome(
                self.store(instance).list_sessions(user_id, status=status, limit=limit, after=after)
            )
            # Where Redis is the truth a list looks at keys and heads: it counts what covers a session, and
            # may show a torn one.
            assert len(expected) <= page.total <= len(expected) + len(self.covered)
            assert len(page.sessions) == min(limit, len(expected) - len(found)) or self.covered
            found += [one for one in page.sessions if one.session_id not in self.covered]
            after = page.next
            if after is None:
                break
        self.compare(found, expected)

    # Messages

    @some_alive
    @rule(kept=alive, draft=drafts, caller=callers, if_match=matches, instance=instances)
    def append(self, kept: Kept, draft: Draft, caller: str, if_match: int | None, instance: int) -> None:
        append = replace(draft.to(kept.id), user_id=user_of(caller, kept), if_match=near(kept, if_match))
        self.write(self.store(instance).append(append), partial(self.model.append, append))

    @some_alive
    @rule(
        kept=alive,
        max_messages=st.none() | lengths,
        before_seq=befores,
        min_seq=min_seqs,
        caller=callers,
        instance=instances,
    )
    def read(
        self,
        kept: Kept,
        max_messages: int | None,
        before_seq: int | None,
        min_seq: int | None,
        caller: str,
        instance: int,
    ) -> None:
        """A page of the history, or (None) the session without it."""
        store, user_id, min_seq = self.store(instance), user_of(caller, kept), near(kept, min_seq)
        if max_messages is None:
            found = self.outcome(store.get_session(kept.id, user_id=user_id, min_seq=min_seq))
            expected = partial(self.model.get, kept.id, user_id, min_seq)
        else:
            page = {"max_messages": max_messages, "before_seq": before_seq}
            found = self.outcome(store.read_history(kept.id, **page, user_id=user_id, min_seq=min_seq))
            expected = partial(self.model.history, kept.id, user_id, min_seq, **page)
        self.compare(found, attempt(expected))

    @some_alive
    @rule(kept=alive, size=lengths, instance=instances)
    def read_back(self, kept: Kept, size: int, instance: int) -> None:
        """All that can be read of a session, page by page."""
        found: list[str] = []
        before_seq: int | None = None
        while True:
            page = {"max_messages": size, "before_seq": before_seq}
            history = self.outcome(self.store(instance).read_history(kept.id, **page))
            self.compare(history, attempt(partial(self.model.history, kept.id, None, None, **page)))
            if isinstance(history, ChatError):
                return
            found[:0] = history.lines
            before_seq = history.next_before_seq
            if before_seq is None:
                break
        self.compare(found, [message.line(message.seq) for message in kept.messages])

    # Turns

    @some_alive
    @rule(
        target=turns,
        kept=alive,
        content=questions,
        key=turn_keys,
        lease_seconds=leases,
        caller=callers,
        if_match=matches,
        window=lengths,
        instance=instances,
    )
    def begin_turn(
        self,
        kept: Kept,
        content: str,
        key: str | None,
        lease_seconds: float,
        caller: str,
        if_match: int | None,
        window: int,
        instance: int,
    ) -> Turn | MultipleResults[Turn]:
        """The first time or again, with the same question or another."""
        append = replace(
            turn_append(
                kept.id, content, key=key, digest=digest("turn", content), lease_seconds=lease_seconds
            ),
            user_id=user_of(caller, kept),
            if_match=near(kept, if_match),
        )
        turn = self.write(
            self.store(instance).begin_turn(append, window=window),
            partial(self.model.begin, append, window=window),
        )
        if isinstance(turn, TurnInProgress):
            assert LEASE_SECONDS / 2 < turn.retry_after_seconds <= LEASE_SECONDS
        if isinstance(turn, ChatError):
            return multiple()
        # A short lease has ended when the next rule begins.
        time.sleep(SHORT_LEASE_SECONDS * 5)
        return turn

    @rule(turn=turns, how=st.sampled_from(["finish", "finish", "abandon"]), instance=instances)
    def end_turn(self, turn: Turn, how: Literal["finish", "abandon"], instance: int) -> None:
        """The newest or an older one, held, given back, taken over, or ended before."""
        store = self.store(instance)
        if how == "abandon":
            self.compare(self.outcome(store.abandon_turn(turn)), None)
            self.model.abandon(turn)
        # A message's id is used once. Without a key it is for the caller to see to that.
        elif turn.lease is not None or turn.answer_id not in self.answered:
            self.answered.add(turn.answer_id)
            answer = new_answer(turn)
            self.write(store.finish_turn(turn, answer), partial(self.model.append, turn.ended_by(answer)))


class PostgresMachine(StoreMachine):
    opens_with: ClassVar = {"enable_redis_sessions": False}
    sources: ClassVar = {"postgres"}


#: Where Redis holds the only copy: not after a flip, and not the last sessions, or there is nothing left to use.
may_lose = precondition(
    lambda self: self.mode == "hybrid" or (not self.flips and len(self.model.sessions) >= SESSIONS)
)


class RedisMachine(StoreMachine):
    """Redis is the source of truth: what happens to a session's key happens to the session.

    In a subclass with PostgreSQL behind it, nothing that happens to Redis changes an answer.
    """

    opens_with: ClassVar = {"redis_only_mode": True, "database_url": None}
    sources: ClassVar = {"redis"}
    redis_is_the_truth = True
    mode: Literal["hybrid", "redis-only"] = "redis-only"

    #: Whether an older value of ours, put back by hand, is found out: only where each read looks at the row.
    rolls_back: ClassVar[bool] = False
    #: Whether a write looks at whose value stands at a key. Redis-only mode's scripts do not.
    compares_ids: ClassVar[bool] = False

    #: Whether the mode changes between the calls: see `flip`.
    flips: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        if self.flips:
            # As the example before left it is not how this one begins.
            self.bench.portal.call(self.set_mode, self.mode)

    async def set_mode(self, mode: Literal["hybrid", "redis-only"]) -> None:
        """Changes the mode of all instances and returns when it has changed. Runs on the stores' event loop."""
        raise AssertionError(f"{type(self).__name__} flips, and does not say how")

    @precondition(lambda self: self.flips)
    @rule(mode=st.sampled_from(["hybrid", "redis-only"]))
    def flip(self, mode: Literal["hybrid", "redis-only"]) -> None:
        """For a subclass of `HybridMachine` with `set_mode` (`self.bench` has the runtimes), `flips = True`, fewer
        `examples`, and `messages_max = 1000`, because what Redis-only mode's own window drops is gone.

        The model knows no modes. It expects that nothing is lost: every session, every message at its seq, every
        key, every lease of a turn and every list are as before, on both instances, whether a session was touched
        since or not. While Redis holds the only copy nobody takes its keys away (`may_lose`).
        """
        self.bench.portal.call(self.set_mode, mode)
        self.mode = mode

    def value(self, kept: Kept) -> bytes | None:
        """What stands at a session's key, if that is the session's own."""
        key = session_key(kept.id)
        value = self.bench.redis.get(key) if self.bench.redis.type(key) == b"string" else None
        return value if value is not None and str(kept.id).encode() in value else None

    def put(self, kept: Kept, value: bytes) -> None:
        self.bench.redis.set(session_key(kept.id), value, px=3_600_000)

    @may_lose
    @rule(kept=sessions, how=st.sampled_from(SPOILS), other=sessions)
    def spoil(self, kept: Kept, how: str | bytes | int, other: Kept) -> None:
        redis, key = self.bench.redis, session_key(kept.id)
        match how:
            case "evicted":
                redis.unlink(key)
            case "expired":
                redis.pexpire(key, 1)
                wait_until(lambda: not redis.exists(key))
            case "a list":
                redis.unlink(key)
                redis.lpush(key, "a")
            case bytes():
                self.put(kept, how)
            case int():
                value = self.value(kept) or b""
                # What ends like a value of ours looks like one.
                self.put(kept, value[: len(value) * how // 100].removesuffix(b"}"))
            case "another session's value":
                self.put(kept, (self.compares_ids and other is not kept and self.value(other)) or b"")
        if self.redis_is_the_truth:
            self.model.lose(kept)
            if redis.exists(key):
                self.covered.add(kept.id)

    @may_lose
    @rule()
    def flush(self) -> None:
        self.bench.redis.flushdb()
        if self.redis_is_the_truth:
            for kept in self.kept:
                self.model.lose(kept)
        else:
            self.bench.aux.flushdb()

    @rule(what=st.sampled_from(["scripts", "connections"]))
    def cut(self, what: Literal["scripts", "connections"]) -> None:
        if what == "scripts":
            self.bench.redis.script_flush()
            return
        self.bench.redis.client_kill_filter(_type="normal", skipme=True)
        if self.mode == "redis-only":
            # The next call may meet a dead socket, and says so.
            for instance in range(INSTANCES):
                wait_until(partial(self.answers, self.store(instance)))

    def answers(self, store: ChatSessionStore) -> bool:
        calls = store.get_session(uuid4()), store.list_sessions("nobody", limit=1)
        return RedisUnavailable not in {type(self.outcome(call)) for call in calls}

    @some_alive
    @precondition(lambda self: self.rolls_back)
    @rule(kept=alive, write=st.sampled_from(["append", "delete"]), instance=instances)
    def roll_back(self, kept: Kept, write: Literal["append", "delete"], instance: int) -> None:
        """A write that Redis forgets."""
        value = self.value(kept)
        if write == "append":
            self.append(kept, Draft(("a",)), "anybody", None, instance)
        else:
            self.delete(kept, "anybody", instance)
        if value is not None:
            self.put(kept, value)


class HybridMachine(RedisMachine):
    opens_with: ClassVar = {}
    sources: ClassVar = {"redis", "postgres"}
    redis_is_the_truth = False
    compares_ids = True
    mode: Literal["hybrid", "redis-only"] = "hybrid"


class VerifyingMachine(HybridMachine):
    opens_with: ClassVar = {"cache_verify": "always"}
    rolls_back = True


# A failing run is made smaller for as long as that takes.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", [PostgresMachine, RedisMachine, HybridMachine, VerifyingMachine])
def test_random_calls_are_answered_as_a_dict_answers_them(
    machine: type[StoreMachine], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.database_url is not None
    assert settings.redis_url is not None
    with opened(
        machine.settings_of(settings), database_url=settings.database_url, redis_url=settings.redis_url
    ) as bench:
        monkeypatch.setattr(machine, "bench", bench, raising=False)
        run_state_machine_as_test(
            machine, settings=hypothesis_settings(bounded, max_examples=machine.examples)
        )
    assert bench.sources == machine.sources
