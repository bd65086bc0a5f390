"""Every key in Redis, its type, its time to live and its meaning.

| key | database | type | lives |
|---|---|---|---|
| `session:{id}` | `REDIS_DB_SESSIONS` (1) | string, JSON | the sliding session TTL, always set |
| `user:{user_id}` | `REDIS_DB_AUX` (2), Redis-only mode | zset: session ids by creation | no TTL; dead members pruned when listed |
| `turn:{id}:{message}` | `REDIS_DB_AUX` (2), Redis-only mode | string `token until` | past the turn's lease |

DB 1 holds nothing but sessions, so that `DBSIZE` is their number.
"""

from uuid import UUID


def session_key(session_id: UUID) -> str:
    return f"session:{session_id}"


def key_text(key: bytes | str) -> str:
    """A key that Redis has named, whatever its bytes. By its types, redis-py may have decoded it."""
    return key.decode(errors="replace") if isinstance(key, bytes) else key


def session_of(key: str) -> UUID | None:
    """Whose key it is; None: no session's."""
    try:
        session_id = UUID(key.partition(":")[2])
    except ValueError:
        return None
    # Another way to write the same id names another key, which no store of ours ever asks for.
    return session_id if session_key(session_id) == key else None


def user_key(user_id: str) -> str:
    return f"user:{user_id}"


def turn_key(session_id: UUID, message_id: UUID) -> str:
    return f"turn:{session_id}:{message_id}"
