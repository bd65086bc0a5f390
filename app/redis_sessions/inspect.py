"""A look at Redis for operators: changes nothing, not even a time to live."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app.coherence.ports import CachedValue
from app.redis_sessions.client import BoundedRedis, identity_of
from app.redis_sessions.codec import decode
from app.redis_sessions.keys import key_text, session_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What stands at a session's key: its TTL in seconds (-2: nothing, -1: no TTL), its size, its value."""

    ttl_seconds: int
    size_bytes: int
    value: CachedValue

    @property
    def there(self) -> bool:
        return self.ttl_seconds != -2  # noqa: PLR2004 - TTL's reply for no key

    @property
    def expires(self) -> bool:
        return self.ttl_seconds != -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """`INFO` as one mapping, the sessions' count, and the server's clock in seconds since 1970."""

    info: Mapping[str, Any]
    session_count: int
    clock_seconds: float

    @property
    def identity(self) -> str | None:
        """Which Redis it is, as the sockets of the cache prove it; None for a replica."""
        return identity_of(self.info)


async def find_session(bounded: BoundedRedis, session_id: UUID) -> Found:
    key = session_key(session_id)
    async with bounded.step() as redis, redis.pipeline(transaction=True) as pipe:
        pipe.ttl(key)
        pipe.get(key)
        ttl_seconds, raw = await pipe.execute(raise_on_error=False)
    # Another type is refused by GET alone.
    raw = raw if isinstance(raw, bytes) else b""
    return Found(ttl_seconds=ttl_seconds, size_bytes=len(raw), value=decode(raw, session_id) if raw else None)


async def random_key(bounded: BoundedRedis) -> str | None:
    """Any key of the database, each as likely as the next; None: it is empty."""
    async with bounded.step() as redis:
        key = await redis.randomkey()
    return key_text(key) if key is not None else None


async def server_facts(bounded: BoundedRedis) -> ServerFacts:
    info: dict[str, Any] = {}
    async with bounded.step() as redis:
        for section in ("server", "memory", "persistence", "replication", "stats"):
            info.update(await redis.info(section))
        seconds, microseconds = await redis.time()
        return ServerFacts(
            info=info,
            session_count=await redis.dbsize(),
            clock_seconds=seconds + microseconds / 1e6,
        )
