"""The hybrid store's cache: entries in the guide's layout, each step atomic, each socket bound to one Redis."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from uuid import UUID

from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

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
from app.redis_sessions.client import SOCKET_ERRORS, BoundedRedis, WrongType, create_redis, get_bytes
from app.redis_sessions.codec import FIELDS, PENDING_MAX, decode, encode
from app.redis_sessions.keys import session_key
from app.store import StoreHealth


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
        self._bound: dict[str, BoundedRedis] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._ttl_ms = ttl_seconds * 1000
        self._messages_max = messages_max
        self._bytes_max = bytes_max

    async def close(self) -> None:
        await asyncio.gather(
            *self._closing, *(bounded.redis.aclose() for bounded in (self._any, *self._bound.values()))
        )

    def _to(self, state: CacheState) -> BoundedRedis:
        """The pool whose sockets have proved to be the Redis of `state`."""
        identity = state.redis_identity
        if identity is None:
            raise CacheMoved(None)
        if identity not in self._bound:
            # The one before stays for callers that are still under its epoch, the one before that goes.
            for old in list(self._bound)[:-1]:
                task = asyncio.ensure_future(self._bound.pop(old).redis.aclose())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            self._bound[identity] = self._connect(identity)
        return self._bound[identity]

    def _connect(self, identity: str | None) -> BoundedRedis:
        redis = create_redis(
            self._url, database=self._database, timeout_seconds=self._timeout_seconds, identity=identity
        )
        return BoundedRedis(redis, timeout_seconds=self._timeout_seconds)

    async def get(self, session_id: UUID, state: CacheState) -> CachedValue:
        async with self._to(state).step() as redis:
            try:
                # A write command, so that a replica refuses it instead of answering from the past.
                value = await get_bytes(redis.getex(session_key(session_id), px=self._ttl_ms))
            except WrongType:
                return None
        return decode(value, session_id) if value is not None else None

    async def mark(self, before: Row, after: Row, state: CacheState, *, token: str) -> MarkOutcome:
        outcome: MarkOutcome = (
            await self._to(state).script(
                "mark",
                [session_key(after.session.session_id)],
                [
                    state.epoch,
                    f"{before.session.message_count:010d}",
                    before.chain.hex(),
                    f"{after.session.message_count:010d}",
                    token,
                    self._ttl_ms,
                ],
                # Whether Redis is out is for this very command to find out: it decides on the epoch.
                urgent=True,
            )
        ).decode()
        return outcome

    async def publish(self, committed: Committed, state: CacheState, *, want_entry: bool) -> Published:
        before, after = committed.before, committed.after
        session_id = after.session.session_id
        outcome, *rest = await self._to(state).script(
            "publish",
            [session_key(session_id)],
            [
                state.epoch,
                f"{before.session.message_count:010d}",
                before.chain.hex(),
                f"{after.session.message_count:010d}",
                after.chain.hex(),
                ",\n".join(committed.lines),
                format_time(after.session.last_activity),
                self._ttl_ms,
                self._messages_max,
                self._bytes_max,
                int(want_entry),
            ],
        )
        name: PublishOutcome = outcome.decode()
        value = decode(rest[0], session_id) if rest else None
        return Published(outcome=name, entry=value if isinstance(value, Entry) else None)

    async def skeleton(self, row: Row, state: CacheState, *, token: str) -> None:
        value = encode(row, epoch=state.epoch, lines=(), pending=PENDING_MAX, token=token)
        async with self._to(state).step() as redis:
            await redis.set(session_key(row.session.session_id), value, px=self._ttl_ms, nx=True)

    async def settle(self, session_id: UUID, state: CacheState, *, token: str) -> None:
        await self._to(state).script("settle", [session_key(session_id)], [token])

    async def remove(self, session_id: UUID, state: CacheState) -> bool:
        return bool(await self._to(state).script("remove", [session_key(session_id)], [], urgent=True))

    @asynccontextmanager
    async def watch(self, session_id: UUID, state: CacheState) -> AsyncIterator[Watch]:
        bounded = self._to(state)
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
