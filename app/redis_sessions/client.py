"""How this project talks to Redis: one client, bounded steps, scripts from their files."""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hiredis
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from app.coherence.ports import CacheMoved, CacheOutage, CacheOutOfMemory
from app.redis_sessions.codec import with_layout

log = logging.getLogger("chat_sessions.redis")

_LUA = Path(__file__).parent / "lua"

#: After an outage the next caller that tries Redis does so at the earliest this much later: while Redis
#: hangs, one request in this time waits for its time-out instead of all of them.
_REST_SECONDS = 0.25

POOL_CONNECTIONS_MAX = 32

#: So many steps at once, and so many watches, which keep their connection from one step to another. What is left of
#: the pool is for urgent steps. So nobody waits in the pool: that wait would be taken for an outage of Redis.
_STEPS_MAX = 16
_WATCHES_MAX = 8

# redis-py would read its own version out of the package's files for each connection.
_DRIVER = DriverInfo()

#: What a command meets whose connection breaks. RuntimeError: uvloop's for a socket that was reset since its last
#: command ("the handler is closed"), which redis-py does not translate.
SOCKET_ERRORS = (RedisError, OSError, TimeoutError, RuntimeError)


class _Pool(BlockingConnectionPool):
    """redis-py's pool, with a release that a cancellation cannot break off in the middle.

    A command that is cancelled while it gives its connection back would keep that place in the pool for
    ever: after `POOL_CONNECTIONS_MAX` of them Redis would be out until a restart.
    """

    async def release(self, connection: AbstractConnection) -> None:
        await asyncio.shield(super().release(connection))


class _OtherRedis(RedisConnectionError):
    """A new socket leads to another Redis than the one it was made for. `identity` as in `CacheMoved`."""

    def __init__(self, identity: str | None) -> None:
        self.identity = identity
        super().__init__(f"this is {identity or 'a replica'}")


def create_redis(url: str, *, database: int, timeout_seconds: float, identity: str | None = None) -> Redis:
    """A client for one database. Connects on first use; retries nothing by itself: a command that was
    sent twice, once late, is exactly what the coherence protocol must be able to rule out.

    With an `identity` each socket proves, before it carries a command, that it leads to that Redis: a verdict
    that stands beside a pool would be another socket's.
    """
    more: dict[str, Any] = {}
    if identity is not None:

        async def prove(connection: AbstractConnection) -> None:
            await connection.on_connect()
            found = await _identity(connection)
            if found != identity:
                raise _OtherRedis(found)

        more["redis_connect_func"] = prove
    pool = _Pool.from_url(
        url,
        max_connections=POOL_CONNECTIONS_MAX,
        timeout=timeout_seconds,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        client_name="chat-sessions",
        driver_info=_DRIVER,
        protocol=2,
        # Both are given in the URL's place: a path in REDIS_URL does not move the sessions.
        db=database,
        **more,
    )
    pool.connection_kwargs["db"] = database
    return Redis.from_pool(pool)


async def _identity(connection: AbstractConnection) -> str | None:
    """Which Redis is at the other end; None for a replica.

    `run_id` changes with a restart. `master_replid` changes when the data set does: a primary that was made
    a replica and promoted again keeps its run_id and even its connections.
    """
    facts: dict[str, str] = {}
    for section in ("server", "replication"):
        await connection.send_command("INFO", section)
        text = (await connection.read_response()).decode()
        facts.update(line.partition(":")[::2] for line in text.splitlines())
    return identity_of(facts)


def identity_of(info: Mapping[str, Any]) -> str | None:
    """The same, out of what INFO has said."""
    return f"{info['run_id']}/{info['master_replid']}" if info["role"] == "master" else None


@cache
def script_text(name: str) -> str:
    """A script as it is sent: what all scripts share, the file itself, and the layout written out in both."""
    source = (_LUA / f"{name}.lua").read_text()
    if name == "release_turn":
        return source
    return with_layout((_LUA / "entry.lua").read_text() + source)


@cache
def _script(name: str) -> tuple[str, str]:
    text = script_text(name)
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _is_closed(connection: AbstractConnection) -> bool:
    """Whether the server has hung up since the last command: the event loop knows, nothing is asked."""
    reader = connection._reader  # noqa: SLF001 - what the pool asks instead is a read with a time-out
    return reader is None or reader.at_eof() or reader.exception() is not None


async def _replies(connection: AbstractConnection, count: int) -> list[Any]:
    """So many replies, in their order; what Redis refused is its `ResponseError`.

    Most have arrived together with the first. redis-py's way to the next is longer than all else that is done for it.
    """
    arrived = connection._parser._reader.gets  # type: ignore[attr-defined]  # noqa: SLF001 - see above
    replies: list[Any] = []
    for _ in range(count):
        reply = arrived()
        if reply is NOT_ENOUGH_DATA:
            try:
                # The step has a limit of its own, so none is set up for each reply.
                reply = await connection.read_response(timeout=math.inf)
            except ResponseError as exc:
                reply = exc
        elif isinstance(reply, RedisConnectionError):
            # Redis is loading its data, say. As redis-py does it.
            await connection.disconnect(nowait=True)
            raise reply
        replies.append(reply)
    return replies


def refusal(exc: ResponseError) -> CacheOutage:
    """Redis answers, so it is not out; it refused one command."""
    # 6.2 wraps what a script met in an error of its own.
    if isinstance(exc, OutOfMemoryError) or "OOM command not allowed" in str(exc):
        return CacheOutOfMemory(f"redis is out of memory: {exc}")
    log.warning("redis refused a command: %s", exc)
    return CacheOutage(f"redis: {exc}")


class WrongType(Exception):
    """The key holds something that is not a string, so it is no session of ours."""


def is_wrong_type(exc: ResponseError) -> bool:
    return str(exc).startswith("WRONGTYPE")


async def get_bytes(command: Awaitable[Any]) -> bytes | None:
    """The reply of a GET-like command."""
    try:
        value: bytes | None = await command
    except ResponseError as exc:
        if is_wrong_type(exc):
            raise WrongType from exc
        raise
    return value


class BoundedRedis:
    """Steps in Redis that take at most `timeout_seconds` and end in an answer or in `CacheOutage`.

    A cancelled or timed-out command drops its socket (redis-py does so on any exception while it waits
    for a reply), so nobody is ever given the reply to somebody else's command.
    """

    def __init__(self, redis: Redis, *, timeout_seconds: float) -> None:
        self.redis = redis
        self._timeout_seconds = timeout_seconds
        self._out_until = 0.0
        self._out = False
        self._answered_at = 0.0
        self._at_hand: list[AbstractConnection] = []
        self._places = asyncio.Semaphore(_STEPS_MAX)
        #: To be held by who watches a key.
        self.watches = asyncio.Semaphore(_WATCHES_MAX)

    @asynccontextmanager
    async def step(self, *, urgent: bool = False, since: float | None = None) -> AsyncIterator[Redis]:
        """`urgent`: tried even right after an outage that somebody else met, and before others. `since`: when its first
        caller began to wait, on the clock of `time.monotonic`; else now. Waiting while Redis answers others does not
        count, nor does waiting for a place, first come, first served.
        """
        if not urgent:
            await self._places.acquire()
        try:
            async with asyncio.timeout(self._time_left(urgent=urgent, since=since)):
                yield self.redis
        except ResponseError as exc:
            if isinstance(exc, ReadOnlyError):
                self._note_outage(exc)
            raise refusal(exc) from exc
        except _OtherRedis as exc:
            raise CacheMoved(exc.identity) from exc
        except SOCKET_ERRORS as exc:
            self._note_outage(exc)
            raise CacheOutage(f"redis: {str(exc) or type(exc).__name__}") from exc
        finally:
            if not urgent:
                self._places.release()
        self._note_answer()

    def _time_left(self, *, urgent: bool, since: float | None) -> float:
        """How long Redis may take now, in seconds. Raises `CacheOutage` where that is over already."""
        now = time.monotonic()
        if not urgent and now < self._out_until:
            raise CacheOutage("redis was out a moment ago")
        # Else a process that is behind would give up on a Redis that answers, ask PostgreSQL for all of it, which takes
        # longer, fall further behind, and never come out of that again.
        waited = now - max(since, self._answered_at) if since is not None else 0.0
        if waited >= self._timeout_seconds:
            # Not left to a timeout that has ended before it begins: Python 3.11's wait_for, in redis-py, may lose it.
            late = TimeoutError("no answer in time")
            self._note_outage(late)
            raise CacheOutage(f"redis: {late}")
        return self._timeout_seconds - waited

    async def identity(self) -> str:
        """Which Redis answers now, asked on a connection made for this. Raises `CacheMoved` for a replica."""
        async with self.step(urgent=True) as redis:
            connection = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # as above
            try:
                await connection.connect()
                found = await _identity(connection)
            finally:
                await connection.disconnect(nowait=True)
        if found is None:
            raise CacheMoved(None)
        return found

    async def commands(
        self, commands: Sequence[tuple[Any, ...]], *, urgent: bool = False, since: float | None = None
    ) -> list[Any]:
        """Sends all in one round trip. A reply each, in their order; what Redis refused is its `ResponseError`."""
        async with self.step(urgent=urgent, since=since) as redis:
            async with self._connection(redis.connection_pool) as connection:
                # redis-py's asyncio connections pack in Python, which cost as much as all else of a mark.
                await connection.send_packed_command(b"".join(map(hiredis.pack_command, commands)))
                replies = await _replies(connection, len(commands))
            for reply in replies:
                if isinstance(reply, ReadOnlyError):
                    raise reply
            return replies

    @asynccontextmanager
    async def _connection(self, pool: ConnectionPool) -> AsyncIterator[AbstractConnection]:
        """One of the pool's, kept at hand afterwards: to take it out and to put it back cost as much as a command."""
        while self._at_hand:
            connection = self._at_hand.pop()
            if not _is_closed(connection):
                break
            await pool.release(connection)
        else:
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py has no type for it
        try:
            yield connection
        finally:
            # One that owes a reply has lost its socket by now (see the class), and is found closed.
            if len(self._at_hand) < _STEPS_MAX:
                self._at_hand.append(connection)
            else:
                await pool.release(connection)

    async def scripts(
        self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]], *, urgent: bool = False
    ) -> list[Any]:
        """Runs a script of `lua/` for each (keys, arguments), in one round trip: two where Redis does not know it yet.
        A reply each; what Redis refused is its `ResponseError`.
        """
        started = time.monotonic()
        text, digest = _script(name)
        commands = [("EVALSHA", digest, len(keys), *keys, *args) for keys, args in calls]
        replies = await self.commands(commands, urgent=urgent, since=started)
        unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            _, *again = await self.commands(
                [("SCRIPT", "LOAD", text), *(commands[index] for index in unknown)],
                urgent=urgent,
                since=started,
            )
            for index, reply in zip(unknown, again, strict=True):
                replies[index] = reply
        return replies

    async def script(
        self, name: str, keys: Sequence[str], args: Sequence[Any], *, urgent: bool = False
    ) -> Any:
        """The same once."""
        (reply,) = await self.scripts(name, [(keys, args)], urgent=urgent)
        if isinstance(reply, ResponseError):
            raise refusal(reply) from reply
        return reply

    def _note_outage(self, exc: BaseException) -> None:
        self._out_until = time.monotonic() + _REST_SECONDS
        if not self._out:
            self._out = True
            log.warning("redis is out: %s", str(exc) or type(exc).__name__)

    def _note_answer(self) -> None:
        self._out_until = 0.0
        self._answered_at = time.monotonic()
        if self._out:
            self._out = False
            log.warning("redis is back")
