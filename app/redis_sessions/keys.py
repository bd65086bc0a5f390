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


def session_of(key: bytes) -> UUID | None:
    """Whose key it is; None: no session's."""
    try:
        session_id = UUID(key.decode().removeprefix("session:"))
    except ValueError:
        return None
    return session_id if session_key(session_id).encode() == key else None


def user_key(user_id: str) -> str:
    return f"user:{user_id}"


def turn_key(session_id: UUID, message_id: UUID) -> str:
    return f"turn:{session_id}:{message_id}"
