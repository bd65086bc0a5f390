"""A walk over every session's key in Redis: whose it is, told from its first bytes."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from app.redis_sessions.client import BoundedRedis
from app.redis_sessions.codec import FIELDS, USER_ID_OFFSET
from app.redis_sessions.keys import key_text, session_of

#: Whose a key is. 'guide': an object that is not of our layout, perhaps a session of the guide's own program.
#: 'other': nothing that any store of ours would read as a session.
Kind = Literal["postgres", "redis", "guide", "other"]

KEYS_PER_STEP = 500

_PATTERN = "session:*"
_OUR_START = b'{"_c":"1'
_OWNER_AT = FIELDS["owner"][0]


@dataclass(frozen=True, slots=True)
class Seen:
    """A key as it was met. `session_id` is None where the key is named like no session of ours."""

    key: str
    session_id: UUID | None
    kind: Kind

    @property
    def adoptable(self) -> bool:
        """Whether PostgreSQL should take it over: Redis owns it, or the guide's program wrote it."""
        return self.session_id is not None and self.kind in {"redis", "guide"}


async def scan_sessions(
    bounded: BoundedRedis, *, keys_per_step: int = KEYS_PER_STEP
) -> AsyncIterator[list[Seen]]:
    """Every key that is there from the beginning to the end at least once, a bounded batch at a time.

    Changes nothing, not even a time to live. Raises `CacheOutage`; a walk over another Redis than it began with
    may miss keys: who must not miss any compares identities.
    """
    cursor = 0
    while True:
        async with bounded.step() as redis:
            cursor, keys = await redis.scan(cursor, match=_PATTERN, count=keys_per_step)
        # A bucket may hold more than was asked for.
        for start in range(0, len(keys), keys_per_step):
            names = [key_text(key) for key in keys[start : start + keys_per_step]]
            yield await look_at(bounded, names)
        if cursor == 0:
            return


async def look_at(bounded: BoundedRedis, keys: Sequence[str]) -> list[Seen]:
    """Those of the keys that are there."""
    async with bounded.step() as redis:
        pipe = redis.pipeline(transaction=False)
        for key in keys:
            pipe.getrange(key, 0, USER_ID_OFFSET - 1)
        # A key of another type fails alone.
        heads = await pipe.execute(raise_on_error=False)
    return [Seen(key, session_of(key), _kind(head)) for key, head in zip(keys, heads, strict=True) if head]


async def key_count(bounded: BoundedRedis) -> int:
    async with bounded.step() as redis:
        count: int = await redis.dbsize()
    return count


def _kind(head: object) -> Kind:
    if not isinstance(head, bytes):
        return "other"
    letter = head[_OWNER_AT : _OWNER_AT + 1]
    if head.startswith(_OUR_START) and letter in {b"p", b"r"}:
        return "postgres" if letter == b"p" else "redis"
    return "guide" if head.startswith(b"{") else "other"
