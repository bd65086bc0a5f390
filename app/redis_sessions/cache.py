"""The hybrid store's cache: entries in the guide's layout, each step atomic, nothing trusted for itself."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from uuid import UUID

from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError, WatchError

from app.chat import format_time
from app.coherence.ports import (
    CachedValue,
    CacheOutage,
    Committed,
    Entry,
    Published,
    PublishOutcome,
    Row,
    Watch,
)
from app.redis_sessions.client import BoundedRedis, WrongType, get_bytes
from app.redis_sessions.codec import decode, encode
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

    def __init__(self, bounded: BoundedRedis, *, ttl_seconds: int, messages_max: int, bytes_max: int) -> None:
        self._bounded = bounded
        self._ttl_ms = ttl_seconds * 1000
        self._messages_max = messages_max
        self._bytes_max = bytes_max

    async def get(self, session_id: UUID) -> CachedValue:
        async with self._bounded.step() as redis:
            try:
                # A write command, so that a replica refuses it instead of answering from the past.
                value = await get_bytes(redis.getex(session_key(session_id), px=self._ttl_ms))
            except WrongType:
                return None
        return decode(value, session_id) if value is not None else None

    async def publish(self, committed: Committed, epoch: str, *, want_entry: bool) -> Published:
        before, after = committed.before, committed.after
        session_id = after.session.session_id
        outcome, *rest = await self._bounded.script(
            "publish",
            [session_key(session_id)],
            [
                epoch,
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

    async def remove(self, session_id: UUID) -> bool:
        return bool(await self._bounded.script("remove", [session_key(session_id)], []))

    @asynccontextmanager
    async def watch(self, session_id: UUID) -> AsyncIterator[Watch]:
        pipe = self._bounded.redis.pipeline(transaction=True)
        try:
            async with self._bounded.step():
                await pipe.watch(session_key(session_id))
                try:
                    value = await get_bytes(pipe.get(session_key(session_id)))
                except WrongType:
                    value = None
            yield _Watch(
                pipe,
                self._bounded,
                session_id,
                value=decode(value, session_id) if value is not None else None,
                ttl_ms=self._ttl_ms,
                bytes_max=self._bytes_max,
            )
        finally:
            # The UNWATCH that this sends may meet an outage of its own, which concerns nobody.
            with suppress(RedisError, OSError):
                await pipe.reset()  # type: ignore[no-untyped-call]  # redis-py has no type for it

    async def health(self) -> StoreHealth:
        try:
            async with self._bounded.step() as redis:
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
        value: CachedValue,
        ttl_ms: int,
        bytes_max: int,
    ) -> None:
        self._pipe = pipe
        self._bounded = bounded
        self._key = session_key(session_id)
        self._ttl_ms = ttl_ms
        self._bytes_max = bytes_max
        self.value = value

    async def fill(self, row: Row, epoch: str, lines: Sequence[str]) -> bool:
        value = encode(row, epoch=epoch, lines=newest_that_fit(lines, self._bytes_max))
        async with self._bounded.step():
            self._pipe.multi()  # type: ignore[no-untyped-call]  # redis-py has no type for it
            self._pipe.set(self._key, value, px=self._ttl_ms)
            try:
                await self._pipe.execute()
            except WatchError:
                return False
        return True
