"""The guide's system: Redis is the source of truth, sessions expire.

It needs no PostgreSQL. Over a database `app/redis_only.py` wraps it: then it serves only what it was handed
over; without one it takes over what the guide's own program wrote, in place, where it meets it. It is as durable
as Redis's own settings and no more. Each write is one script (`lua/`). The session's key lives in the sessions'
database; the per-user index and the leases of turns live in the auxiliary one.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast
from uuid import UUID

from app.chat import (
    CHAIN_START,
    ChatSession,
    Message,
    NewMessage,
    SessionStatus,
    format_time,
    from_milliseconds,
    json_text,
    line_prefix,
    messages_of,
    milliseconds_of,
    new_uuid,
    utc_now,
)
from app.coherence.ports import (
    EPOCH_ZERO,
    CachedValue,
    CacheOutage,
    CacheOutOfMemory,
    Entry,
    GuideEntry,
    NotHandedOver,
    Row,
    Unreadable,
)
from app.errors import (
    AdoptionPending,
    CacheFull,
    IdempotencyKeyReused,
    NotYetVisible,
    RedisUnavailable,
    SeqMismatch,
    SessionNotFound,
    SessionTooLarge,
    TurnInProgress,
    TurnTakenOver,
    Unadoptable,
)
from app.redis_sessions.client import BoundedRedis, WrongType, create_redis, get_bytes
from app.redis_sessions.codec import HEAD_BYTES_MAX, decode, decode_head, encode
from app.redis_sessions.keys import session_key, turn_key, user_key
from app.redis_sessions.scan import scan_sessions
from app.store import (
    Append,
    Appended,
    BeginTurn,
    Cursor,
    FinishTurn,
    History,
    SessionPage,
    SessionRead,
    StoreHealth,
    Turn,
)

#: How often an entry is read again that the guide's program changes while it is claimed.
_CLAIMS_MAX = 5

#: Between two batches of the walk: requests come first.
_CLAIM_PAUSE_SECONDS = 0.02

#: How many members of a user's index are asked for at once.
_INDEX_CHUNK = 1000


@asynccontextmanager
async def _redis_is_the_truth() -> AsyncIterator[None]:
    """The one place where an outage of Redis becomes the caller's error in this mode."""
    try:
        yield
    except CacheOutOfMemory as exc:
        raise CacheFull(hint="raise maxmemory, or shorten SESSION_TTL_SECONDS") from exc
    except CacheOutage as exc:
        raise RedisUnavailable from exc


class RedisChatSessionStore:
    """Keeps `ChatSessionStore` with Redis alone.

    `redis_url`, where given, names the server instead of `redis_host` and `redis_port`. With
    `claims=False` a session is served only once it was handed over: `NotHandedOver` for the others.
    """

    def __init__(
        self,
        redis_host: str = "localhost",
        redis_port: int = 6379,
        redis_db: int = 1,
        session_ttl: int = 3600,
        *,
        redis_url: str | None = None,
        redis_db_aux: int = 2,
        messages_max: int = 100,
        session_bytes_max: int = 8 * 1024 * 1024,
        timeout_seconds: float = 1.0,
        claims: bool = True,
    ) -> None:
        self._claims = claims
        url = redis_url or f"redis://{redis_host}:{redis_port}"
        self._sessions = BoundedRedis(
            create_redis(url, database=redis_db, timeout_seconds=timeout_seconds),
            timeout_seconds=timeout_seconds,
        )
        self._aux = BoundedRedis(
            create_redis(url, database=redis_db_aux, timeout_seconds=timeout_seconds),
            timeout_seconds=timeout_seconds,
        )
        self._databases = redis_db, redis_db_aux
        self._ttl_ms = session_ttl * 1000
        self._messages_max = messages_max
        self._session_bytes_max = session_bytes_max

    async def close(self) -> None:
        await self._sessions.redis.aclose()
        await self._aux.redis.aclose()

    async def create_session(self, user_id: str) -> SessionRead:
        now = utc_now()
        session = ChatSession(
            session_id=new_uuid(), user_id=user_id, created_at=now, last_activity=now, message_count=0
        )
        row = Row(session=session, chain=CHAIN_START, owner="redis")
        async with _redis_is_the_truth():
            # The index first: a member without its session is pruned when listed, a session without its
            # member would never be listed.
            async with self._aux.step() as redis:
                await redis.zadd(user_key(user_id), {str(session.session_id): milliseconds_of(now)})
            async with self._sessions.step() as redis:
                await redis.set(
                    session_key(session.session_id),
                    encode(row, epoch=EPOCH_ZERO, lines=()),
                    px=self._ttl_ms,
                    nx=True,
                )
        return SessionRead(session=session, source="redis")

    async def get_session(
        self, session_id: UUID, *, user_id: str | None = None, min_seq: int | None = None
    ) -> SessionRead:
        entry = await self._entry(session_id, user_id, min_seq)
        return SessionRead(session=entry.session, source="redis")

    async def read_history(
        self,
        session_id: UUID,
        *,
        max_messages: int,
        before_seq: int | None = None,
        min_seq: int | None = None,
        user_id: str | None = None,
    ) -> History:
        entry = await self._entry(session_id, user_id, min_seq)
        first_seq, body = _available(entry, max_messages, before_seq)
        return History(session=entry.session, first_seq=first_seq, body=body, source="redis")

    async def append(self, append: Append) -> Appended:
        written = await self._write(append, want_value=False)
        count = len(append.messages)
        last_seq = written.session.message_count
        if written.stored:
            first, last = (
                written.find(append.messages[0].message_id),
                written.find(append.messages[-1].message_id),
            )
            last_seq = last.seq if last else first.seq + count - 1 if first else last_seq
        return Appended(
            session=written.session,
            first_seq=last_seq - count + 1,
            last_seq=last_seq,
            source="redis",
            replayed=written.stored,
        )

    async def begin_turn(self, append: Append, *, window: int) -> Turn:
        step = _begin(append)
        asked = append.messages[0]
        written = await self._write(append, want_value=True)
        question, answer = written.find(asked.message_id), written.find(step.answer_id)
        if question is None:
            # It fell out of the window, and its answer is still there.
            question = asked.at(answer.seq - 1 if answer else written.session.message_count)
        history = b""
        if answer is None and written.entry is not None:
            _, history = _available(written.entry, window, question.seq + 1)
        return Turn(
            session=written.session,
            question=question,
            history=messages_of(history),
            answer=answer,
            answer_id=step.answer_id,
            lease=FinishTurn(question_id=asked.message_id, token=step.token)
            if asked.request_digest is not None
            else None,
            user_id=append.user_id,
        )

    async def finish_turn(self, turn: Turn, answer: NewMessage) -> Appended:
        return await self.append(turn.ended_by(answer))

    async def abandon_turn(self, turn: Turn) -> None:
        if turn.lease is None:
            return
        key = turn_key(turn.session.session_id, turn.lease.question_id)
        with suppress(CacheOutage):
            await self._aux.script("release_turn", [key], [str(turn.lease.token)])

    async def list_sessions(
        self, user_id: str, *, status: SessionStatus = "active", limit: int, after: Cursor | None = None
    ) -> SessionPage:
        if status == "archived":
            # What has expired is gone: there is no archive in this mode.
            return SessionPage(sessions=(), total=0, next=None, source="redis")
        async with _redis_is_the_truth():
            alive = await self._alive(user_id)
            rest = [
                (score, name)
                for score, name in alive
                if after is None or (score, name) < (milliseconds_of(after.created_at), str(after.session_id))
            ]
            sessions = await self._heads([name for _, name in rest[:limit]])
        more = len(rest) > limit
        last_score, last_name = rest[limit - 1] if more else (0, "")
        return SessionPage(
            sessions=sessions,
            total=len(alive),
            next=Cursor(created_at=from_milliseconds(last_score), session_id=UUID(last_name))
            if more
            else None,
            source="redis",
        )

    async def delete_session(self, session_id: UUID, *, user_id: str | None = None) -> ChatSession:
        async with _redis_is_the_truth():
            outcome, *rest = await self._sessions.script(
                "delete", [session_key(session_id)], [_json_or_empty(user_id)]
            )
            if outcome == b"foreign" and await self.claim(session_id):
                return await self.delete_session(session_id, user_id=user_id)
            session = decode_head(rest[0], session_id) if rest else None
            if session is None:
                raise SessionNotFound
        with suppress(CacheOutage):
            async with self._aux.step() as redis:
                await redis.zrem(user_key(session.user_id), str(session_id))
        return session

    async def health(self) -> tuple[StoreHealth, ...]:
        try:
            async with self._sessions.step() as redis:
                await redis.ping()
        except CacheOutage as exc:
            return (StoreHealth(name="redis", status="fail", state=f"out ({exc})"),)
        return (StoreHealth(name="redis", status="pass", state="source of truth"),)

    # -- what the guide's own program left

    async def claim(self, session_id: UUID) -> bool:
        """Puts a session that the guide's program wrote into our layout, where it stands, and into its user's index.

        Nothing of it is lost or changed: the script compares the value with what was read. False: there is none in that
        format. Raises `AdoptionPending` where a database is to adopt it, and `Unadoptable` for what can't be written down.
        """
        async with _redis_is_the_truth():
            for _ in range(_CLAIMS_MAX):
                async with self._sessions.step() as redis:
                    try:
                        found = await get_bytes(redis.get(session_key(session_id)))
                    except WrongType:
                        return False
                guide = decode(found, session_id) if found is not None else None
                if found is None or not _is_the_guides(guide):
                    return False
                if not self._claims:
                    raise AdoptionPending
                if isinstance(guide, Unreadable):
                    raise _unadoptable(session_id, guide.why)
                value = _in_our_layout(guide)
                # The index first, as for a session that is created.
                async with self._aux.step() as redis:
                    score = milliseconds_of(guide.session.created_at)
                    await redis.zadd(user_key(guide.session.user_id), {str(session_id): score})
                if await self._sessions.script("claim", [session_key(session_id)], [found, value]):
                    return True
        raise AdoptionPending("the guide's program changes this session all the time", hint="try again")

    async def claim_all(self) -> int:
        """Claims every such session, so that lists have those that nobody touches. How many there were. Safe to repeat."""
        claimed = 0
        async with _redis_is_the_truth():
            async for seen in scan_sessions(self._sessions):
                for one in seen:
                    if one.session_id is not None and one.kind == "guide":
                        with suppress(AdoptionPending):
                            claimed += await self.claim(one.session_id)
                await asyncio.sleep(_CLAIM_PAUSE_SECONDS)
        return claimed

    # -- what Redis-only mode over a database needs

    async def offer(self, row: Row, lines: Sequence[str], *, token: str) -> bool:
        """Sets an entry that Redis will own, dirty until `settle`. False: Redis holds the session already."""
        pending = row.session.message_count + 1
        value = encode(
            replace(row, owner="redis"), epoch=EPOCH_ZERO, lines=lines, pending=pending, token=token
        )
        async with _redis_is_the_truth():
            done = await self._sessions.script(
                "offer", [session_key(row.session.session_id)], [value, self._ttl_ms]
            )
        return bool(done)

    async def settle(self, session_id: UUID, *, token: str) -> None:
        """The row says now that Redis owns the session: its entry becomes clean."""
        async with _redis_is_the_truth():
            await self._sessions.script("settle", [session_key(session_id)], [token])

    async def entry(self, session_id: UUID) -> Entry | None:
        """The entry as it stands, whoever owns it; slides nothing."""
        async with _redis_is_the_truth(), self._sessions.step() as redis:
            try:
                value = await get_bytes(redis.get(session_key(session_id)))
            except WrongType:
                return None
        entry = decode(value, session_id) if value is not None else None
        return entry if isinstance(entry, Entry) else None

    async def unlink(self, session_id: UUID) -> None:
        """Removes the entry, whoever owns it."""
        async with _redis_is_the_truth(), self._sessions.step() as redis:
            await redis.unlink(session_key(session_id))

    async def alive(self, session_ids: Sequence[UUID]) -> list[UUID]:
        """Those whose entry is there."""
        async with _redis_is_the_truth(), self._sessions.step() as redis:
            pipe = redis.pipeline(transaction=False)
            for session_id in session_ids:
                pipe.exists(session_key(session_id))
            found = await pipe.execute()
        return [session_id for session_id, there in zip(session_ids, found, strict=True) if there]

    async def heads(self, session_ids: Sequence[UUID]) -> dict[UUID, ChatSession]:
        """What Redis says of those sessions whose entry is there."""
        async with _redis_is_the_truth():
            found = await self._heads([str(session_id) for session_id in session_ids])
        return {session.session_id: session for session in found}

    async def _entry(self, session_id: UUID, user_id: str | None, min_seq: int | None) -> Entry:
        async with _redis_is_the_truth(), self._sessions.step() as redis:
            try:
                value = await get_bytes(redis.getex(session_key(session_id), px=self._ttl_ms))
            except WrongType:
                value = None
        entry = decode(value, session_id) if value is not None else None
        if _is_the_guides(entry):
            await self.claim(session_id)
            return await self._entry(session_id, user_id, min_seq)
        if not isinstance(entry, Entry):
            entry = None
        if entry is not None and not self._claims and (entry.owner != "redis" or entry.dirty):
            raise NotHandedOver
        if entry is None or user_id not in {None, entry.session.user_id}:
            raise SessionNotFound
        if min_seq is not None and min_seq > entry.session.message_count:
            raise NotYetVisible
        return _as_truth(entry)

    async def _write(self, append: Append, *, want_value: bool) -> "_Written":
        step, first = append.turn, append.messages[0]
        finishing = isinstance(step, FinishTurn)
        keyed = first.request_digest is not None and not finishing
        last_id = step.answer_id if isinstance(step, BeginTurn) else append.messages[-1].message_id
        keys = [session_key(append.session_id)]
        if isinstance(step, FinishTurn):
            keys.append(turn_key(append.session_id, step.question_id))
        elif step is not None and keyed:
            keys.append(turn_key(append.session_id, first.message_id))
        async with _redis_is_the_truth():
            outcome, *rest = await self._sessions.script(
                "append",
                keys,
                [
                    _json_or_empty(append.user_id),
                    "" if append.if_match is None else append.if_match,
                    format_time(utc_now()),
                    self._ttl_ms,
                    self._messages_max,
                    self._session_bytes_max,
                    int(want_value),
                    line_prefix(first.message_id) if keyed else "",
                    first.line_end() if keyed else "",
                    line_prefix(last_id),
                    "finish" if finishing else "begin" if step else "",
                    str(step.token) if step else "",
                    int(step.lease_seconds * 1000) if isinstance(step, BeginTurn) else 0,
                    *self._databases,
                    int(self._claims),
                    *(text for message in append.messages for text in _split_line(message)),
                ],
            )
        if outcome == b"foreign" and await self.claim(append.session_id):
            return await self._write(append, want_value=want_value)
        return self._outcome(append.session_id, outcome.decode(), rest)

    def _outcome(self, session_id: UUID, outcome: str, rest: list[Any]) -> "_Written":
        if outcome not in {"appended", "replayed", "taken-over"}:
            raise self._refusal(outcome, rest)
        entry = decode(rest[0], session_id)
        if isinstance(entry, Entry):
            entry = _as_truth(entry)
            return _Written(session=entry.session, entry=entry, stored=outcome != "appended")
        if session := decode_head(rest[0], session_id):
            return _Written(session=session, entry=None, stored=False)
        raise SessionNotFound

    def _refusal(self, outcome: str, rest: list[Any]) -> Exception:
        match outcome:
            case "not-ours":
                return NotHandedOver()
            case "running":
                return TurnInProgress(retry_after_seconds=max(1, int(rest[0]) / 1000))
            case "reused":
                return IdempotencyKeyReused()
            case "lost":
                return TurnTakenOver()
            case "moved":
                return SeqMismatch(int(rest[0]))
            case "full":
                return SessionTooLarge(
                    f"the session has reached its limit of {self._session_bytes_max} bytes in Redis",
                    hint="begin a new session",
                )
        return SessionNotFound()

    async def _alive(self, user_id: str) -> list[tuple[int, str]]:
        """A user's sessions that still exist, newest first; prunes the index of the others."""
        async with self._aux.step() as redis:
            members: list[tuple[bytes, float]] = cast(
                "Any", await redis.zrevrange(user_key(user_id), 0, -1, withscores=True)
            )
        alive: list[tuple[int, str]] = []
        dead: list[str] = []
        # A session is indexed before it is created: a young member without its session may be on its way.
        settled_before = milliseconds_of(utc_now()) - 60_000
        for start in range(0, len(members), _INDEX_CHUNK):
            chunk = [(int(score), name.decode()) for name, score in members[start : start + _INDEX_CHUNK]]
            async with self._sessions.step() as redis:
                pipe = redis.pipeline(transaction=False)
                for _, name in chunk:
                    pipe.exists(f"session:{name}")
                found = await pipe.execute()
            for (score, name), exists in zip(chunk, found, strict=True):
                if exists:
                    alive.append((score, name))
                elif score < settled_before:
                    dead.append(name)
        if dead:
            async with self._aux.step() as redis:
                await redis.zrem(user_key(user_id), *dead)
        return alive

    async def _heads(self, names: list[str]) -> tuple[ChatSession, ...]:
        async with self._sessions.step() as redis:
            pipe = redis.pipeline(transaction=False)
            for name in names:
                pipe.getrange(f"session:{name}", 0, HEAD_BYTES_MAX)
            # A key of another type fails alone, and is no session.
            heads = await pipe.execute(raise_on_error=False)
        sessions = (
            decode_head(head, UUID(name))
            for name, head in zip(names, heads, strict=True)
            if isinstance(head, bytes)
        )
        return tuple(session for session in sessions if session is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """What a write left: the session, and its entry where that was asked for. `stored`: it was there before."""

    session: ChatSession
    entry: Entry | None
    stored: bool

    def find(self, message_id: UUID) -> Message | None:
        if self.entry is None:
            return None
        prefix = line_prefix(message_id).encode()
        lines = (line for line in self.entry.body.split(b",\n") if line.startswith(prefix))
        return next((Message.from_line(line.decode()) for line in lines), None)


def _is_the_guides(value: CachedValue) -> TypeGuard[GuideEntry | Unreadable]:
    return isinstance(value, GuideEntry) or (isinstance(value, Unreadable) and value.guides)


def _in_our_layout(guide: GuideEntry) -> bytes:
    session = guide.session
    row = Row(session=session, chain=CHAIN_START, owner="redis")
    lines = [message.line(seq) for seq, message in enumerate(guide.messages, 1)]
    try:
        value = encode(row, epoch=EPOCH_ZERO, lines=lines)
    except UnicodeEncodeError as exc:
        # An id or a user's name: of the messages their own ids would have told.
        raise _unadoptable(session.session_id, "it holds a lone surrogate, which is no Unicode text") from exc
    if decode_head(value[:HEAD_BYTES_MAX], session.session_id) is None:
        raise _unadoptable(session.session_id, "its user id is too long")
    return value


def _unadoptable(session_id: UUID, why: str) -> Unadoptable:
    return Unadoptable(
        f"Redis holds this session for itself, and it can't be read back: {why}",
        hint=f"look at session:{session_id} in Redis, and correct it there",
    )


def _begin(append: Append) -> BeginTurn:
    if not isinstance(append.turn, BeginTurn):
        raise TypeError("begin_turn takes an append whose turn is a BeginTurn")
    return append.turn


def _as_truth(entry: Entry) -> Entry:
    """In this mode what the window has dropped is gone, whoever wrote the entry."""
    return replace(entry, session=replace(entry.session, first_available_seq=entry.first_seq))


def _available(entry: Entry, max_messages: int, before_seq: int | None) -> tuple[int, bytes]:
    """The newest lines below `before_seq` that the window still has."""
    last = (
        entry.session.message_count
        if before_seq is None
        else min(entry.session.message_count, before_seq - 1)
    )
    page = entry.newest(min(max_messages, max(0, last - entry.first_seq + 1)), before_seq)
    return page or (last + 1, b"")


def _split_line(message: NewMessage) -> tuple[str, str]:
    return line_prefix(message.message_id), message.line_tail()


def _json_or_empty(user_id: str | None) -> str:
    return "" if user_id is None else json_text(user_id)
