"""What clients ask of the instances, and what they see: the history that is checked."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from uuid import UUID

from app.chat import NewMessage
from app.coherence.ports import Entry
from app.errors import ChatError, CommitUnknown, NotYetVisible, SessionNotFound
from app.store import Append, BeginTurn
from tests.failure.checker import Log, Read, Write, violations
from tests.failure.model import messages
from tests.failure.model.redis import run_redis_only_append
from tests.failure.model.world import Instance, World

_PAGE = 1000
_TURN = BeginTurn(answer_id=messages.session_id(0), token=messages.session_id(0), lease_seconds=1.0)

#: How often a client sends a keyed request again whose outcome it does not know.
_RETRIES_MAX = 3


@dataclass(slots=True)
class Sent:
    """A message that a client sent, once or with its retries. `maybe`: an attempt may have stored it."""

    message: NewMessage
    began: float
    acked: float | None = None
    seq: int | None = None
    maybe: bool = False
    retries: int = 0


@dataclass(slots=True)
class Seen:
    """A stretch of a session as one read gave it; `count` is the seq of its last message."""

    began: float
    ended: float
    count: int
    first_seq: int = 1
    ids: tuple[UUID, ...] | None = None


@dataclass(slots=True)
class SessionLog:
    """What the clients of one session saw. `known_seq` is the highest that anybody was told of."""

    session_id: UUID
    sent: list[Sent] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    missing: list[tuple[float, float]] = field(default_factory=list)
    delete_began: float | None = None
    deleted: float | None = None
    known_seq: int = 0
    wrong: list[str] = field(default_factory=list)

    def violations(self, world: World) -> list[str]:
        final = world.final(self.session_id)
        log, wrong = Log(), list(self.wrong)
        place = set(final)
        for sent in self.sent:
            log.writes.append(Write(sent.message.message_id, sent.began, sent.acked))
            if sent.acked is None and not sent.maybe and sent.message.message_id in place:
                wrong.append("kept: a write was refused, and is stored")
            if sent.seq is not None and final[sent.seq - 1 : sent.seq] != [sent.message.message_id]:
                wrong.append(f"misplaced: a write was acknowledged at {sent.seq}")
        for seen in self.seen:
            first = seen.first_seq - 1
            ids = tuple(final[first : seen.count]) if seen.ids is None else seen.ids
            if seen.count > len(final) or ids != tuple(final[first : seen.count]):
                wrong.append(f"no prefix: {seen.first_seq} to {seen.count} of {len(final)}")
            else:
                log.reads.append(Read(tuple(final[: seen.count]), seen.began, seen.ended))
        # A session is there from its creation on, and from the first sight of its end never again.
        if any(self.delete_began is None or ended < self.delete_began for _, ended in self.missing):
            wrong.append("vanished: a session that nobody deleted was not found")
        gone = min(
            [ended for _, ended in self.missing] + ([self.deleted] if self.deleted else []), default=None
        )
        if gone is not None:
            wrong += [
                f"resurrected: a read of {seen.count} messages" for seen in self.seen if seen.began > gone
            ]
        return wrong + violations(log, final)


class Clients:
    """A few clients, one operation at a time each, on any instance; at last each instance reads everything."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._loop = world.loop
        self._chance: Random = world.chance
        self._random = world.random
        self.logs: list[SessionLog] = []
        self._live: list[SessionLog] = []
        self._left = world.plan.operations
        self._final: list[tuple[Instance, SessionLog]] | None = None
        self._busy = 0
        self._messages = 0
        self.outcomes: Counter[str] = Counter()
        #: What an instance is doing for a client; a crash ends it.
        self.under_way: dict[asyncio.Task[None], tuple[Instance, _Operation]] = {}
        self.on_idle = lambda: None

    def inherit(self) -> None:
        """Sessions that Redis owns, of which PostgreSQL has the beginning, or nothing at all."""
        world = self._world
        for _ in range(world.plan.sessions):
            log = SessionLog(world.new_session_id())
            sent = [self._message(log, -1.0, keyed=False) for _ in range(self._chance.randint(0, 4))]
            for one in sent:
                one.acked = -0.5
            world.redis_owns(
                log.session_id,
                [one.message.message_id for one in sent],
                stored=self._chance.choice([None, *range(len(sent) + 1)]),
            )
            self.born(log)
        self._loop.later(self._random(), self._straggle)

    def _straggle(self) -> None:
        """A process in Redis-only mode writes on, where it still may, and acknowledges it."""
        node, log = self._world.primary, self._chance.choice(self.logs)
        entry = node.entries.get(log.session_id)
        if self._final is not None:
            return
        if (
            isinstance(entry, Entry)
            and entry.owner == "redis"
            and not entry.dirty
            and not node.full
            and node.up
        ):
            now = self._loop.time()
            sent = self._message(log, now, keyed=False)
            run_redis_only_append(node, entry, sent.message.message_id)
            sent.acked = now
            self.outcomes["straggler"] += 1
            self._world.note(
                f"-- a straggler appends to {log.session_id.int & 0xFFFF} at {entry.session.message_count + 1}"
            )
        self._loop.later(self._random() * 0.4, self._straggle)

    def start(self) -> None:
        for _ in range(self._world.plan.clients):
            self._busy += 1
            self._loop.later(self._random() * self._world.plan.think_seconds, self._next)

    def read_all(self) -> None:
        """The end: twice, because the first read may mend what the second one would find."""
        self._final = [(instance, log) for log in self.logs for instance in self._world.instances] * 2
        self._chance.shuffle(self._final)
        self.start()

    def crashed(self, instance: Instance) -> None:
        for task, (where, operation) in list(self.under_way.items()):
            if where is instance:
                del self.under_way[task]
                operation.maybe()
                self._done(operation)

    # One operation after the other

    def _next(self) -> None:
        if self._final is not None:
            if self._final:
                instance, log = self._final.pop()
                self._begin(instance, _Operation("history", log, self._loop.time()))
            else:
                self._rest()
            return
        if self._left <= 0:
            self._rest()
            return
        if not self.logs and any(one.kind == "create" for _, one in self.under_way.values()):
            # Nothing can be asked of a session before it is there.
            self._loop.later(0.1, self._next)
            return
        self._left -= 1
        self._begin(self._chance.choice(self._world.instances), self._drawn())

    def _rest(self) -> None:
        self._busy -= 1
        if self._busy == 0:
            self.on_idle()

    def _drawn(self) -> "_Operation":
        plan, now = self._world.plan, self._loop.time()
        if not self.logs or (len(self._live) < plan.sessions and self._random() < 0.4):
            return _Operation("create", None, now)
        # The last one is the likeliest; those deleted are asked for again now and then.
        log = self.logs[-1] if self._random() < 0.7 else self._chance.choice(self.logs)
        kind = self._random()
        if kind < plan.life_share:
            return _Operation("create" if self._random() < 0.4 else "delete", log, now)
        kind = self._random()
        if kind < plan.write_share:
            kind = self._random()
            sent = self._message(log, now, keyed=kind < 0.3)
            return _Operation("turn" if kind > 0.9 else "append", log, now, sent)
        if kind > 0.85:
            return _Operation("session", log, now)
        return _Operation("page" if kind > 0.75 else "history", log, now)

    def _message(self, log: SessionLog, now: float, *, keyed: bool) -> Sent:
        self._messages += 1
        sent = Sent(messages.message(self._messages, keyed=keyed), now)
        log.sent.append(sent)
        return sent

    def _begin(self, instance: Instance, operation: "_Operation") -> None:
        if not instance.owner.alive:
            raise AssertionError("a crash boots a new one at once")
        self.outcomes[operation.kind] += 1
        if self._world.trace is not None:
            self._world.note(f"{instance} begins {operation}")
        task = self._loop.task_of(instance.owner, self._run(instance, operation))
        self.under_way[task] = (instance, operation)
        operation.task = task
        if self._random() < self._world.plan.cancel_share:
            self._loop.later(self._random() * 0.3, operation.cancel)

    async def _run(self, instance: Instance, operation: "_Operation") -> None:
        outcome: object = "done"
        operation.started = True
        try:
            await operation.run(instance, self)
        except asyncio.CancelledError:
            outcome = "cancelled"
            operation.maybe()
        except CommitUnknown:
            outcome = "unknown"
            operation.maybe()
        except SessionNotFound:
            outcome = "not found"
            if operation.log is not None:
                operation.log.missing.append((operation.began, self._loop.time()))
        except NotYetVisible:
            outcome = "not yet visible"
            if operation.log is not None:
                operation.log.wrong.append("stale: a seq that was acknowledged is not visible yet")
        except ChatError as exc:
            outcome = f"refused: {exc.code}"
            self.outcomes["refused"] += 1
        except Exception as exc:  # noqa: BLE001 - whatever else leaves a store is a finding
            outcome = repr(exc)
            self._world.wrong.append(f"leaked: {exc!r} from {operation.kind}")
        if self._world.trace is not None:
            self._world.note(f"{instance} ends {operation}: {outcome} {operation.answer}")
        del self.under_way[operation.task]
        self._done(operation)

    def _done(self, operation: "_Operation") -> None:
        """Called in a step of an instance's: what comes next is the world's."""
        sent = operation.sent
        again = (
            sent is not None
            and sent.acked is None
            and sent.message.request_digest is not None
            and sent.retries < _RETRIES_MAX
            and self._random() < 0.8
        )
        think = self._random() * self._world.plan.think_seconds
        if again:
            sent.retries += 1
            self._loop.later(think, self._retry, operation)
        else:
            self._loop.later(think, self._next)

    def _retry(self, operation: "_Operation") -> None:
        again = _Operation("append", operation.log, self._loop.time(), operation.sent)
        self._begin(self._chance.choice(self._world.instances), again)

    def born(self, log: SessionLog) -> None:
        self.logs.append(log)
        self._live.append(log)

    def buried(self, log: SessionLog) -> None:
        if log in self._live:
            self._live.remove(log)


class _Operation:
    __slots__ = ("answer", "began", "kind", "log", "sent", "started", "task")

    def __init__(self, kind: str, log: SessionLog | None, began: float, sent: Sent | None = None) -> None:
        self.kind = kind
        self.log = log
        self.began = began
        self.sent = sent
        self.answer = ""
        self.started = False
        self.task: asyncio.Task[None]

    def __str__(self) -> str:
        where = f" of {self.log.session_id.int & 0xFFFF}" if self.log is not None else ""
        what = f" message {self.sent.message.message_id.int >> 1 & 0xFFFF}" if self.sent is not None else ""
        return f"{self.kind}{where}{what} begun {self.began:.3f}"

    def cancel(self) -> None:
        # A task that is cancelled before its first step ends without one, and nobody would hear of it.
        if self.started:
            self.task.cancel()

    def maybe(self) -> None:
        if self.sent is not None:
            self.sent.maybe = True

    async def run(self, instance: Instance, clients: Clients) -> None:
        await getattr(self, f"_{self.kind}")(instance, clients)

    async def _create(self, instance: Instance, clients: Clients) -> None:
        created = await instance.store.create_session("user")
        clients.born(SessionLog(created.session.session_id))

    async def _append(self, instance: Instance, clients: Clients) -> None:
        append = Append(session_id=self.log.session_id, messages=(self.sent.message,), user_id="user")
        appended = await instance.store.append(append)
        self._acked(appended.first_seq, clients)

    async def _turn(self, instance: Instance, clients: Clients) -> None:
        append = Append(session_id=self.log.session_id, messages=(self.sent.message,), turn=_TURN)
        try:
            turn = await instance.store.begin_turn(append, window=3)
        except BaseException:
            # The question may have been stored when its context can't be read.
            self.maybe()
            raise
        self._acked(turn.question.seq, clients)
        ids = tuple(message.message_id for message in turn.history)
        first_seq = turn.question.seq - len(ids) + 1
        # What it says was so when the write was committed: it is old news by now, but never wrong.
        self.log.seen.append(Seen(self.began, self.sent.acked, turn.question.seq, first_seq, ids))

    def _acked(self, seq: int, clients: Clients) -> None:
        now = clients._loop.time()
        self.sent.acked, self.sent.seq = now, seq
        self.log.known_seq = max(self.log.known_seq, seq)
        self.answer = f"at {seq}"

    async def _session(self, instance: Instance, clients: Clients) -> None:
        log = self.log
        read = await instance.store.get_session(log.session_id, user_id="user", min_seq=log.known_seq)
        if read.freshness.age_seconds is None:
            self._saw(clients, read.session.message_count)
            self.answer += f" from {read.source}"

    async def _history(self, instance: Instance, clients: Clients) -> None:
        history = await instance.store.read_history(self.log.session_id, max_messages=_PAGE)
        self._read(clients, history)

    async def _page(self, instance: Instance, clients: Clients) -> None:
        history = await instance.store.read_history(
            self.log.session_id, max_messages=2, user_id="user", min_seq=self.log.known_seq
        )
        self._read(clients, history)

    def _read(self, clients: Clients, history) -> None:
        if history.freshness.age_seconds is not None:
            self.answer = "unverified"
            clients.outcomes["unverified"] += 1
            return
        ids = tuple(map(messages.id_of, history.lines))
        last = history.first_seq + len(ids) - 1
        if [messages.seq_of(line) for line in history.lines] != list(range(history.first_seq, last + 1)):
            self.log.wrong.append("gap: lines out of their order")
        self._saw(clients, last, history.first_seq, ids)
        self.answer += f" from {history.source}"
        if last != history.session.message_count:
            self.log.wrong.append(f"torn: {last} lines, but {history.session.message_count} messages")

    def _saw(
        self, clients: Clients, count: int, first_seq: int = 1, ids: tuple[UUID, ...] | None = None
    ) -> None:
        self.log.seen.append(Seen(self.began, clients._loop.time(), count, first_seq, ids))
        self.log.known_seq = max(self.log.known_seq, count)
        self.answer = str(count)

    async def _delete(self, instance: Instance, clients: Clients) -> None:
        log = self.log
        clients.buried(log)
        if log.delete_began is None:
            log.delete_began = self.began
        await instance.store.delete_session(log.session_id, user_id="user")
        if log.deleted is None:
            log.deleted = clients._loop.time()
