"""A look at Redis for operators: changes nothing, not even a time to live."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app.coherence.ports import CachedValue
from app.redis_sessions.client import BoundedRedis, WrongType, get_bytes
from app.redis_sessions.codec import decode
from app.redis_sessions.keys import session_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What stands at a session's key: its TTL in seconds (-2: nothing, -1: no TTL), its size, its value."""

    ttl_seconds: int
    size_bytes: int
    value: CachedValue


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """`INFO` as one mapping, the sessions' count, and the server's clock in seconds since 1970."""

    info: Mapping[str, Any]
    session_count: int
    clock_seconds: float


async def find_session(bounded: BoundedRedis, session_id: UUID) -> Found:
    key = session_key(session_id)
    async with bounded.step() as redis:
        ttl_seconds = await redis.ttl(key)
        try:
            raw = await get_bytes(redis.get(key))
        except WrongType:
            raw = b""
    value = decode(raw, session_id) if raw else None
    return Found(ttl_seconds=ttl_seconds, size_bytes=len(raw or b""), value=value)


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
