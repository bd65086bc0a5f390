"""The hybrid store's cache: entries in the guide's layout, each step atomic, each socket bound to one Redis."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import UUID

from redis.asyncio.client import Pipeline
from redis.exceptions import ResponseError, WatchError

from app.batching import Batcher, Bounds
from app.chat import format_time
from app.coherence.ports import (
    CachedValue,
    CacheMoved,
    CacheOutage,
    CacheState,
    Committed,
    Entry,
    MarkOutcome,
    Published,
    PublishOutcome,
    Row,
    Watch,
)
from app.redis_sessions.client import (
    SOCKET_ERRORS,
    BoundedRedis,
    WrongType,
    create_redis,
    get_bytes,
    is_wrong_type,
    refusal,
)
from app.redis_sessions.codec import FIELDS, PENDING_MAX, decode, encode
from app.redis_sessions.keys import session_key
from app.store import StoreHealth

log = logging.getLogger("chat_sessions.redis")


def newest_that_fit(lines: Sequence[str], bytes_max: int) -> Sequence[str]:
    """The newest lines whose text, separators included, stays within `bytes_max`."""
    size = 0
    for index in range(len(lines) - 1, -1, -1):
        size += len(lines[index].encode()) + 2
        if size > bytes_max:
            return lines[index + 1 :]
    return lines


class RedisSessionCache:
    """Keeps `app.coherence.ports.SessionCache`.

    An entry holds the newest messages within both `messages_max` and `bytes_max`, and lives `ttl_seconds`
    from its last use.
    """

    def __init__(
        self,
        url: str,
        *,
        database: int,
        timeout_seconds: float,
        ttl_seconds: int,
        messages_max: int,
        bytes_max: int,
    ) -> None:
        self._url = url
        self._database = database
        self._timeout_seconds = timeout_seconds
        self._any = self._connect(None)
        self._reaches: dict[str, _Reach] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._ttl_ms = ttl_seconds * 1000
        self._messages_max = messages_max
        self._bytes_max = bytes_max

    async def close(self) -> None:
        bounded = [self._any, *(reach.bounded for reach in self._reaches.values())]
        await asyncio.gather(*self._closing, *(one.redis.aclose() for one in bounded))

    def _to(self, state: CacheState) -> BoundedRedis:
        return self._reach(state).bounded

    def _reach(self, state: CacheState) -> "_Reach":
        """The pool whose sockets have proved to be the Redis of `state`."""
        identity = state.redis_identity
        if identity is None:
            raise CacheMoved(None)
        if (reach := self._reaches.get(identity)) is None:
            # The one before stays for callers that are still under its epoch, the one before that goes.
            for old in list(self._reaches)[:-1]:
                task = asyncio.ensure_future(self._reaches.pop(old).bounded.redis.aclose())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            reach = self._reaches[identity] = _Reach(self._connect(identity), ttl_ms=self._ttl_ms)
        return reach

    def _connect(self, identity: str | None) -> BoundedRedis:
        redis = create_redis(
            self._url, database=self._database, timeout_seconds=self._timeout_seconds, identity=identity
        )
        return BoundedRedis(redis, timeout_seconds=self._timeout_seconds)

    async def get(self, session_id: UUID, state: CacheState) -> CachedValue:
        get = _Get(session_key(session_id), session_id, time.monotonic())
        return await self._reach(state).gets.submit(get)

    async def mark(
        self, writes: Sequence[tuple[Row, Row]], state: CacheState, *, token: str
    ) -> list[MarkOutcome]:
        replies = await self._to(state).scripts(
            "mark",
            [
                (
                    (session_key(after.session.session_id),),
                    (
                        state.epoch,
                        f"{before.session.message_count:010d}",
                        before.chain.hex(),
                        f"{after.session.message_count:010d}",
                        token,
                        self._ttl_ms,
                    ),
                )
                for before, after in writes
            ],
            # Whether Redis is out is for this very command to find out: it decides on the epoch.
            urgent=True,
        )
        return [_answered(reply).decode() for reply in replies]

    async def publish(
        self, writes: Sequence[Committed], state: CacheState, *, want_entries: Sequence[bool]
    ) -> list[Published]:
        replies = await self._to(state).scripts(
            "publish",
            [
                (
                    (session_key(after.session.session_id),),
                    (
                        state.epoch,
                        f"{before.session.message_count:010d}",
                        before.chain.hex(),
                        f"{after.session.message_count:010d}",
                        after.chain.hex(),
                        "".join(f",\n{line}" for line in committed.lines) + "]}",
                        format_time(after.session.last_activity),
                        self._ttl_ms,
                        self._messages_max,
                        self._bytes_max,
                        int(want_entry),
                    ),
                )
                for committed, want_entry in zip(writes, want_entries, strict=True)
                for before, after in [(committed.before, committed.after)]
            ],
        )
        return [
            _published(reply, committed.after.session.session_id)
            for reply, committed in zip(replies, writes, strict=True)
        ]

    async def skeleton(self, rows: Sequence[Row], state: CacheState, *, token: str) -> None:
        replies = await self._to(state).commands(
            [
                ("SET", session_key(row.session.session_id), value, "PX", self._ttl_ms, "NX")
                for row in rows
                for value in [encode(row, epoch=state.epoch, lines=(), pending=PENDING_MAX, token=token)]
            ]
        )
        _note_refusals(replies)

    async def settle(self, session_ids: Sequence[UUID], state: CacheState, *, token: str) -> None:
        replies = await self._to(state).scripts(
            "settle", [((session_key(session_id),), (token,)) for session_id in session_ids]
        )
        _note_refusals(replies)

    async def remove(self, session_id: UUID, state: CacheState) -> bool:
        return bool(await self._to(state).script("remove", [session_key(session_id)], [], urgent=True))

    @asynccontextmanager
    async def watch(self, session_id: UUID, state: CacheState) -> AsyncIterator[Watch]:
        bounded = self._to(state)
        async with bounded.watches:
            pipe = bounded.redis.pipeline(transaction=True)
            try:
                async with bounded.step():
                    await pipe.watch(session_key(session_id))
                    try:
                        value = await get_bytes(pipe.get(session_key(session_id)))
                    except WrongType:
                        value = None
                yield _Watch(
                    pipe,
                    bounded,
                    session_id,
                    identity=state.redis_identity,
                    value=decode(value, session_id) if value is not None else None,
                    ttl_ms=self._ttl_ms,
                    bytes_max=self._bytes_max,
                )
            finally:
                # The UNWATCH that this sends may meet an outage of its own, which concerns nobody.
                with suppress(*SOCKET_ERRORS):
                    await pipe.reset()  # type: ignore[no-untyped-call]  # redis-py has no type for it

    async def probe(self) -> str:
        return await self._any.identity()

    def reach(self, state: CacheState) -> BoundedRedis:
        """The Redis of `state`, for who looks after it; whichever answers while none is trusted."""
        return self._to(state) if state.trusting else self._any

    async def health(self) -> StoreHealth:
        try:
            async with self._any.step() as redis:
                await redis.ping()
        except CacheOutage as exc:
            return StoreHealth(name="redis", status="warn", state=f"out, answering from PostgreSQL ({exc})")
        return StoreHealth(name="redis", status="pass", state="cache")


class _Reach:
    """One Redis: its sockets, and the reads that are on their way to it. What is asked for by many at once is
    asked once: whoever joins a read that has not departed yet joins one that is newer than his call.
    """

    def __init__(self, bounded: BoundedRedis, *, ttl_ms: int) -> None:
        self.bounded = bounded
        self._ttl_ms = ttl_ms
        self.gets: Batcher[_Get, CachedValue] = Batcher(
            self._get_all, bounds=_GETS, key=itemgetter(0), shares=True
        )

    async def _get_all(self, gets: Sequence["_Get"]) -> list[CachedValue | Exception]:
        replies = await self.bounded.commands(
            # A write command, so that a replica refuses it instead of answering from the past.
            [("GETEX", get.key, "PX", self._ttl_ms) for get in gets],
            since=gets[0].asked_at,
        )
        return [_cached(reply, get.session_id) for reply, get in zip(replies, gets, strict=True)]


class _Get(NamedTuple):
    key: str
    session_id: UUID
    asked_at: float


#: Few batches at once, so that they grow when many ask; and few enough entries of a MiB that one fits in memory.
_GETS = Bounds(batches=4, items=64, share=32, size=2**62, waiting_items=16_384, waiting_size=2**62)


def _cached(reply: Any, session_id: UUID) -> CachedValue | Exception:
    if isinstance(reply, ResponseError):
        return None if is_wrong_type(reply) else refusal(reply)
    return decode(reply, session_id, counts=False) if reply is not None else None


def _published(reply: Any, session_id: UUID) -> Published:
    if isinstance(reply, ResponseError):
        _note_refusals([reply])
        return Published(outcome="refused")
    outcome: PublishOutcome = reply[0].decode()
    value = decode(reply[1], session_id, counts=False) if len(reply) > 1 else None
    return Published(outcome=outcome, entry=value if isinstance(value, Entry) else None)


def _note_refusals(replies: Sequence[Any]) -> None:
    """For what is done as well as it can be: one session's error is not another's."""
    for reply in replies:
        if isinstance(reply, ResponseError):
            log.debug("one of %d commands: %s", len(replies), refusal(reply))


def _answered(reply: Any) -> Any:
    if isinstance(reply, ResponseError):
        raise refusal(reply) from reply
    return reply


class _Watch:
    def __init__(
        self,
        pipe: Pipeline,
        bounded: BoundedRedis,
        session_id: UUID,
        *,
        identity: str | None,
        value: CachedValue,
        ttl_ms: int,
        bytes_max: int,
    ) -> None:
        self._pipe = pipe
        self._bounded = bounded
        self._key = session_key(session_id)
        self._ttl_ms = ttl_ms
        self._bytes_max = bytes_max
        self.identity = identity
        self.value = value

    async def fill(self, row: Row, epoch: str, lines: Sequence[str]) -> bool:
        value = encode(row, epoch=epoch, lines=newest_that_fit(lines, self._bytes_max))
        self._multi()
        self._pipe.set(self._key, value, px=self._ttl_ms)
        return await self._exec()

    async def touch(self) -> bool:
        self._multi()
        self._pipe.pexpire(self._key, self._ttl_ms)
        return await self._exec()

    async def stamp(self, epoch: str) -> bool:
        self._multi()
        self._pipe.setrange(self._key, FIELDS["epoch"][0], epoch)
        self._pipe.setrange(self._key, FIELDS["pending"][0], "0" * FIELDS["pending"][1])
        self._pipe.pexpire(self._key, self._ttl_ms)
        return await self._exec()

    async def drop(self) -> bool:
        self._multi()
        self._pipe.unlink(self._key)
        return await self._exec()

    def _multi(self) -> None:
        self._pipe.multi()  # type: ignore[no-untyped-call]  # redis-py has no type for it

    async def _exec(self) -> bool:
        async with self._bounded.step():
            try:
                await self._pipe.execute()
            except WatchError:
                return False
        return True
