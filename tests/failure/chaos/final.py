"""What must hold of the servers themselves when everybody has gone."""

import asyncio
import json
import time
from collections.abc import Sequence
from uuid import UUID

from tests.failure.chaos.servers import Postgres, RedisServer

_TTL_MILLISECONDS_MAX = 3_600_000
_LOCK_SECONDS_MAX = 8.0


async def read_truth(postgres: Postgres) -> tuple[dict[UUID, Sequence[UUID]], list[str]]:
    """The messages of every session, in order; and what is wrong with their order."""
    truth: dict[UUID, list[UUID]] = {}
    wrong = []
    async with postgres.connection() as conn:
        sessions = await conn.fetch("SELECT session_id, message_count FROM chat.chat_sessions")
        messages = await conn.fetch(
            "SELECT session_id, seq, message_id FROM chat.chat_messages ORDER BY session_id, seq"
        )
    counts = {row["session_id"]: row["message_count"] for row in sessions}
    truth = {session_id: [] for session_id in counts}
    seqs: dict[UUID, list[int]] = {session_id: [] for session_id in counts}
    for row in messages:
        if row["session_id"] not in truth:
            wrong.append(f"orphan: message {row['message_id']} has no session {row['session_id']}")
            continue
        truth[row["session_id"]].append(row["message_id"])
        seqs[row["session_id"]].append(row["seq"])
    for session_id, count in counts.items():
        if seqs[session_id] != list(range(1, count + 1)):
            wrong.append(f"gaps: session {session_id} counts {count} messages and has {seqs[session_id]}")
    return dict(truth), wrong


async def check_redis(redis: RedisServer) -> list[str]:
    """DB 1 holds sessions and nothing else: each is JSON, says its own id, and expires."""
    wrong = []
    async with redis.admin() as admin:
        keys = {key async for key in admin.scan_iter(count=1000)}
        size = await admin.dbsize()
        if size != len(keys):
            wrong.append(f"redis: DBSIZE is {size}, there are {len(keys)} keys")
        for key in sorted(keys):
            name = key.decode(errors="replace")
            if not name.startswith("session:"):
                wrong.append(f"redis: {name} is no session")
                continue
            try:
                value = json.loads(await admin.get(key))
            except (ValueError, TypeError) as exc:
                wrong.append(f"redis: {name} is no JSON: {exc}")
                continue
            if value.get("session_id") != name.removeprefix("session:"):
                wrong.append(f"redis: {name} holds session {value.get('session_id')}")
            if not 0 < (left := await admin.pttl(key)) <= _TTL_MILLISECONDS_MAX:
                wrong.append(f"redis: {name} lives for {left} ms")
    return wrong


async def check_locks(postgres: Postgres) -> list[str]:
    """A transaction that nobody ends any more holds its locks; what instances do for themselves is brief."""
    until = time.monotonic() + _LOCK_SECONDS_MAX
    async with postgres.connection() as conn:
        while True:
            locks = await conn.fetch(
                "SELECT lock.pid, lock.mode, class.relname, activity.state, activity.query FROM pg_locks lock "
                "JOIN pg_class class ON class.oid = lock.relation "
                "JOIN pg_namespace namespace ON namespace.oid = class.relnamespace "
                "LEFT JOIN pg_stat_activity activity ON activity.pid = lock.pid "
                "WHERE namespace.nspname = 'chat' AND activity.backend_type = 'client backend'"
            )
            if not locks or time.monotonic() > until:
                return [f"lock: {dict(lock)}" for lock in locks]
            await asyncio.sleep(0.1)
