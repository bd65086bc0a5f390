"""Redis servers as the scripts in `app/redis_sessions/lua` see them, and the sockets of an instance to them.

A model for checking schedules, not a fake for other tests: it answers what the coherence protocol asks, and nothing
else. Every command is executed by the server in a step of its own, whatever has become of its sender; it can be
dropped, be executed with its reply lost, or be executed long after its sender gave up.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from app.chat import next_chain
from app.coherence.ports import (
    TOKEN_ZERO,
    CachedValue,
    CacheMoved,
    CacheOutage,
    CacheOutOfMemory,
    CacheState,
    Committed,
    Entry,
    GuideEntry,
    MarkOutcome,
    Published,
    Row,
)
from app.redis_sessions.codec import PENDING_MAX
from app.store import StoreHealth
from tests.failure.model import messages

if TYPE_CHECKING:
    from tests.failure.model.world import Instance, World

#: The client's time-out: how long the sender of a dropped command may wait before it gives up.
TIMEOUT_SECONDS = 0.25

#: How long a command or its reply may be under way: a process that hangs while it reads has no time-out.
SLOW_SECONDS_MAX = 1.2

#: How much later than its sender expected it a command may be executed.
LATE_SECONDS_MAX = 2.5


class Node:
    """One Redis with its memory. `versions` are what WATCH compares."""

    __slots__ = ("entries", "full", "identity", "replica", "up", "versions")

    def __init__(self, identity: str, entries: dict[UUID, Entry | GuideEntry]) -> None:
        self.identity = identity
        self.entries = dict(entries)
        self.versions: dict[UUID, int] = {}
        self.up = True
        self.replica = False
        self.full = False

    def touch(self, session_id: UUID) -> None:
        self.versions[session_id] = self.versions.get(session_id, 0) + 1

    def put(self, session_id: UUID, entry: Entry) -> None:
        self.entries[session_id] = entry
        self.touch(session_id)

    def drop(self, session_id: UUID) -> None:
        """With a touch, also where there is nothing."""
        self.entries.pop(session_id, None)
        self.touch(session_id)

    def forget(self, session_id: UUID) -> None:
        """An eviction, an expiry: an absent key is not touched."""
        if session_id in self.entries:
            self.drop(session_id)


def changed(
    entry: Entry,
    epoch: str,
    chain: bytes,
    pending: int,
    token: str,
    session: Any,
    first_seq: int,
    body: bytes,
) -> Entry:
    """`dataclasses.replace`, at a third of its price."""
    return Entry(
        owner=entry.owner,
        epoch=epoch,
        chain=chain,
        pending=pending,
        token=token,
        first_seq=first_seq,
        session=session,
        body=body,
    )


def headed(entry: Entry, epoch: str, pending: int, token: str) -> Entry:
    return changed(entry, epoch, entry.chain, pending, token, entry.session, entry.first_seq, entry.body)


# The scripts. Each is one step; mutants replace them here.


def run_get(node: Node, session_id: UUID, touches: bool) -> CachedValue:
    value = node.entries.get(session_id)
    if value is not None and touches:
        node.touch(session_id)
    return value


def run_mark(node: Node, before: Row, after: Row, epoch: str, token: str) -> MarkOutcome:
    session_id, seq = before.session.session_id, before.session.message_count
    entry = node.entries.get(session_id)
    if isinstance(entry, GuideEntry):
        return "foreign"
    if entry is not None and entry.owner == "redis":
        return "redis-owned"
    if (
        entry is None
        or entry.session.message_count > seq
        or (entry.session.message_count == seq and entry.chain != before.chain)
        or (entry.epoch != epoch and entry.session.message_count != seq)
    ):
        node.drop(session_id)
        return "touched"
    pending = max(entry.pending, after.session.message_count)
    node.put(session_id, headed(entry, epoch, pending, token))
    return "marked"


def stands_before(entry: Entry, committed: Committed, epoch: str) -> bool:
    before = committed.before
    return (
        entry.epoch == epoch
        and entry.session.message_count == before.session.message_count
        and entry.chain == before.chain
    )


def run_publish(
    node: Node, committed: Committed, epoch: str, messages_max: int, want_entry: bool
) -> Published:
    session_id = committed.after.session.session_id
    entry = node.entries.get(session_id)
    if entry is None:
        return Published(outcome="absent")
    if isinstance(entry, GuideEntry):
        return Published(outcome="behind")
    if entry.owner == "redis":
        return Published(outcome="redis-owned")
    if not stands_before(entry, committed, epoch):
        return Published(outcome="behind")
    if node.full:
        return Published(outcome="refused")
    body = b",\n".join(([entry.body] if entry.body else []) + [line.encode() for line in committed.lines])
    first_seq = entry.first_seq
    surplus = committed.after.session.message_count - first_seq + 1 - messages_max
    if surplus > 0:
        body = body.split(b",\n", surplus)[-1]
        first_seq += surplus
    after = committed.after
    entry = changed(
        entry, entry.epoch, after.chain, entry.pending, entry.token, after.session, first_seq, body
    )
    node.put(session_id, entry)
    return Published(outcome="published", entry=entry if want_entry else None)


def run_skeleton(node: Node, row: Row, epoch: str, token: str) -> None:
    if node.full:
        raise CacheOutOfMemory
    if row.session.session_id not in node.entries:
        entry = Entry.of(row, (), epoch=epoch)
        node.put(row.session.session_id, headed(entry, epoch, PENDING_MAX, token))


def run_settle(node: Node, session_id: UUID, token: str) -> None:
    entry = node.entries.get(session_id)
    if isinstance(entry, Entry) and entry.token == token:
        if node.full:
            raise CacheOutOfMemory
        node.put(session_id, headed(entry, entry.epoch, 0, TOKEN_ZERO))


def run_remove(node: Node, session_id: UUID) -> bool:
    entry = node.entries.get(session_id)
    if isinstance(entry, Entry) and entry.owner == "redis" and not entry.dirty:
        return False
    node.drop(session_id)
    return True


def run_watch(node: Node, session_id: UUID) -> tuple[int, CachedValue]:
    return node.versions.get(session_id, 0), node.entries.get(session_id)


def is_untouched(node: Node, session_id: UUID, version: int) -> bool:
    return node.versions.get(session_id, 0) == version


def run_exec(
    node: Node, session_id: UUID, version: int, change: Callable[[Entry | None], Entry | None]
) -> bool:
    if node.full:
        # Refused when it is queued.
        raise CacheOutOfMemory
    if not is_untouched(node, session_id, version):
        return False
    value = node.entries.get(session_id)
    entry = change(value if isinstance(value, Entry) else None)
    if entry is not None:
        node.put(session_id, entry)
    return True


def run_drop(node: Node, session_id: UUID, version: int) -> bool:
    if not is_untouched(node, session_id, version):
        return False
    node.drop(session_id)
    return True


def run_touch(node: Node, session_id: UUID, version: int) -> bool:
    if not is_untouched(node, session_id, version):
        return False
    if session_id in node.entries:
        node.touch(session_id)
    return True


def run_redis_only_append(node: Node, entry: Entry, message_id: UUID) -> None:
    """What a process in Redis-only mode does that has not heard yet that it is over."""
    session = replace(entry.session, message_count=entry.session.message_count + 1)
    body = b",\n".join(
        [*([entry.body] if entry.body else []), messages.line(message_id, session.message_count).encode()]
    )
    chain = next_chain(entry.chain, (message_id,))
    node.put(
        session.session_id,
        changed(entry, entry.epoch, chain, entry.pending, entry.token, session, entry.first_seq, body),
    )


class ModelCache:
    """Keeps `SessionCache` for one instance: its sockets, each proved to lead to the Redis of one identity."""

    #: The mutant without rule 6 has sockets that lead wherever the instance is led now.
    bound = True

    def __init__(self, world: "World", instance: "Instance") -> None:
        self._world = world
        self._loop = world.loop
        self._instance = instance
        self._random = world.random
        self._sockets: dict[str, Node] = {}

    async def get(self, session_id: UUID, state: CacheState) -> CachedValue:
        return await self._command(state, "get", run_get, session_id, self._world.plan.get_touches)

    # What the product sends together is carried out one by one here, as it may be, and may be cut off anywhere.

    async def mark(
        self, writes: Sequence[tuple[Row, Row]], state: CacheState, *, token: str
    ) -> list[MarkOutcome]:
        return [
            await self._command(state, "mark", run_mark, before, after, state.epoch, token)
            for before, after in writes
        ]

    async def publish(
        self, writes: Sequence[Committed], state: CacheState, *, want_entries: Sequence[bool]
    ) -> list[Published]:
        messages_max = self._world.plan.messages_max
        return [
            await self._command(
                state, "publish", run_publish, committed, state.epoch, messages_max, want_entry
            )
            for committed, want_entry in zip(writes, want_entries, strict=True)
        ]

    async def skeleton(self, rows: Sequence[Row], state: CacheState, *, token: str) -> None:
        for row in rows:
            await self._command(state, "skeleton", run_skeleton, row, state.epoch, token)

    async def settle(self, session_ids: Sequence[UUID], state: CacheState, *, token: str) -> None:
        for session_id in session_ids:
            await self._command(state, "settle", run_settle, session_id, token)

    async def remove(self, session_id: UUID, state: CacheState) -> bool:
        return await self._command(state, "remove", run_remove, session_id)

    def watch(self, session_id: UUID, state: CacheState) -> "_Watching":
        return _Watching(self, session_id, state)

    async def probe(self) -> str:
        found = await self._ask(self._seen)
        if found.replica:
            raise CacheMoved(None)
        return found.identity

    async def health(self) -> StoreHealth:
        raise AssertionError("nothing in the model asks for it")

    async def _command(self, state: CacheState, name: str, run: Callable[..., Any], *args: Any) -> Any:
        node = await self._socket(state)
        try:
            ask = self._ask_late if name in {"skeleton", "settle", "publish"} else self._ask_now
            return await ask(name, node, run, args)
        except (CacheOutOfMemory, CacheMoved):
            raise
        except (CacheOutage, asyncio.CancelledError):
            self._hang_up(state, node)
            raise

    async def _socket(self, state: CacheState) -> Node:
        identity = state.redis_identity
        if identity is None:
            raise CacheMoved(None)
        if not self.bound:
            return await self._ask(self._seen)
        node = self._sockets.get(identity)
        if node is None:
            found = await self._ask(self._seen)
            if found.identity != identity or found.replica:
                raise CacheMoved(None if found.replica else found.identity)
            node = self._sockets[identity] = found
        return node

    def _hang_up(self, state: CacheState, node: Node) -> None:
        if self._sockets.get(state.redis_identity or "") is node:
            del self._sockets[state.redis_identity or ""]

    async def _ask_now(self, name: str, node: Node, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        return await self._ask(self._run, name, node, run, args)

    async def _ask_late(self, name: str, node: Node, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        """For commands that make an entry clean: what WATCH and tokens are for is one that comes when the
        row's lock has long been another's.
        """
        if self._random() >= self._world.plan.late_trust:
            return await self._ask(self._run, name, node, run, args)
        self._world.faults["late trust"] += 1
        self._loop.later(self._random() * LATE_SECONDS_MAX, self._execute, self._run, (name, node, run, args))
        raise CacheOutage("late")

    async def _ask(self, run: Callable[..., Any], *args: Any) -> Any:
        """One command and its reply, or what a network makes of it."""
        reply = self._loop.create_future()
        plan = self._world.plan
        fate = self._random()
        if fate >= plan.redis_faults:
            self._loop.soon(self._answer, reply, 0.0, run, args)
        else:
            self._ill_fated(fate / plan.redis_faults, reply, run, args)
        answer = await reply
        if not self._instance.redis_up:
            raise CacheOutage("cut off")
        return answer

    def _answer(
        self, reply: "asyncio.Future[Any]", delay: float, run: Callable[..., Any], args: Sequence[Any]
    ) -> None:
        answer, error = None, None
        try:
            answer = self._arrived(run, args)
        except CacheOutage as exc:
            error = exc
        if delay:
            self._loop.later(delay, _tell, reply, answer, error)
        else:
            _tell(reply, answer, error)

    def _arrived(self, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        if not self._instance.redis_up:
            raise CacheOutage("cut off")
        return run(*args)

    def _ill_fated(
        self, fate: float, reply: "asyncio.Future[Any]", run: Callable[..., Any], args: Sequence[Any]
    ) -> None:
        loop, kinds = self._loop, self._world.plan.redis_fault_kinds
        kind = kinds[int(fate * len(kinds))]
        self._world.faults[kind] += 1
        # Half of the senders are told at once, the others run into their time-out.
        patience = 0.0 if self._random() < 0.5 else TIMEOUT_SECONDS
        match kind:
            case "slow":
                loop.later(self._random() * SLOW_SECONDS_MAX, self._answer, reply, 0.0, run, args)
                return
            case "slow reply":
                loop.soon(self._answer, reply, self._random() * SLOW_SECONDS_MAX, run, args)
                return
            case "lost reply":
                loop.soon(self._execute, run, args)
            case "late":
                loop.later(self._random() * LATE_SECONDS_MAX, self._execute, run, args)
        loop.later(patience, _tell, reply, None, CacheOutage(kind))

    def _execute(self, run: Callable[..., Any], args: Sequence[Any]) -> None:
        """Nobody waits for the answer."""
        try:
            run(*args)
        except CacheOutage:
            return

    def _run(self, name: str, node: Node, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        if not node.up or node.replica:
            raise CacheOutage("gone" if not node.up else "READONLY")
        answer = run(node, *args)
        world = self._world
        if name != "get":
            world.look_at(node)
        if world.trace is not None:
            world.note(f"{self._instance} {name} on {node.identity}: {describe(answer)}")
        return answer

    def _seen(self) -> Node:
        """Where a new socket leads."""
        node = self._instance.sees or self._world.primary
        if not node.up:
            raise CacheOutage("down")
        return node


class _Watching:
    """Keeps `Watch`, and its context: a socket of its own, on which alone EXEC counts."""

    __slots__ = ("_cache", "_node", "_session_id", "_state", "_version", "identity", "value")

    def __init__(self, cache: ModelCache, session_id: UUID, state: CacheState) -> None:
        self._cache = cache
        self._session_id = session_id
        self._state = state

    async def __aenter__(self) -> Self:
        cache = self._cache
        self._node = await cache._socket(self._state)
        self.identity = self._state.redis_identity
        try:
            self._version, self.value = await cache._ask(
                cache._run, "watch", self._node, run_watch, (self._session_id,)
            )
        except CacheOutage:
            cache._hang_up(self._state, self._node)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def fill(self, row: Row, epoch: str, lines: Sequence[str]) -> bool:
        entry = Entry.of(row, lines, epoch=epoch)
        return await self._exec("fill", lambda _: entry)

    async def stamp(self, epoch: str) -> bool:
        # What SETRANGE changes of the value that stands there; it is not absent unless WATCH does not count.
        watched = self.value
        return await self._exec(
            "stamp", lambda entry: headed(entry or watched, epoch, 0, (entry or watched).token)
        )

    async def touch(self) -> bool:
        return await self._cache._ask_late("touch", self._node, run_touch, (self._session_id, self._version))

    async def drop(self) -> bool:
        return await self._cache._ask_late("drop", self._node, run_drop, (self._session_id, self._version))

    async def _exec(self, name: str, change: Callable[[Entry | None], Entry | None]) -> bool:
        args = (self._session_id, self._version, change)
        return await self._cache._ask_late(name, self._node, run_exec, args)


def _tell(reply: "asyncio.Future[Any]", answer: Any, error: CacheOutage | None) -> None:
    if reply.done():
        # Its caller has gone away.
        return
    if error is None:
        reply.set_result(answer)
    else:
        reply.set_exception(error)
        # Its caller may have crashed: nobody's loss.
        reply._log_traceback = False


def describe(value: Any) -> str:
    if isinstance(value, Entry):
        dirty = f" dirty to {value.pending}" if value.dirty else ""
        return f"[{value.session.message_count} epoch {value.epoch.lstrip('0')}{dirty}]"
    if isinstance(value, tuple):
        return describe(value[1])
    if isinstance(value, Published):
        return value.outcome
    return str(value)
