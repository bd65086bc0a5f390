"""Takes over into PostgreSQL what Redis holds for itself: every session, while both serve.

A walk over all keys adopts the sessions that Redis owns and those in the guide's format, one transaction each;
then come the rows that Redis owned and whose keys are gone. It can be stopped at any line and run again: what is
adopted is told by its first bytes. Only when a whole walk, on one Redis from its beginning to its end, has found
nothing left may the mode become `hybrid`.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

from app.coherence.heartbeat import Heartbeat
from app.coherence.lease import Lease
from app.coherence.ports import Adopted, CacheOutage, Interrupted, ModeChanged
from app.errors import (
    ChatError,
    DurableStoreUnavailable,
    ModeRefused,
    RedisUnavailable,
    Unadoptable,
    Unavailable,
)
from app.hybrid import HybridChatSessionStore
from app.maintenance.modes import set_mode
from app.postgres import statements
from app.postgres.cache_state import PostgresStateKeeper
from app.postgres.engine import Database
from app.redis_sessions.client import BoundedRedis
from app.redis_sessions.keys import session_key
from app.redis_sessions.scan import Seen, key_count, look_at, scan_sessions
from app.tasks import all_of, heed_cancellation

log = logging.getLogger("chat_sessions.backfill")

#: Whoever adopts in the background holds this advisory lock, for one transaction.
_LOCK = 7311520260003

#: How many sessions of a kind a report names; the others are counted.
NAMED_MAX = 100

_ROWS_PER_PAGE = 500

#: A session that failed this often while both stores were well is reported and left where it is.
_FAILURES_MAX = 3

#: Each walk but the last found something. Where so many did, a program that knows of no database goes on writing.
_WALKS_MAX = 50

_RETRY_SECONDS = 1.0

#: How often a service looks whether there is something to do, and how long it leaves conflicts to a person.
_EVERY_SECONDS = 2.0
_CONFLICTS_AGAIN_SECONDS = 60.0


@dataclass(slots=True)
class Named:
    """Sessions by name up to a bound, each with what is said of it; the rest are counted."""

    count: int = 0
    shown: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, what: str) -> None:
        if name in self.shown:
            return
        self.count += 1
        if len(self.shown) < NAMED_MAX:
            self.shown[name] = what


@dataclass(slots=True)
class Tally:
    """What a backfill did. `total` and `scanned` are of the walk that is under way."""

    total: int = 0
    scanned: int = 0
    sessions_adopted: int = 0
    messages_added: int = 0
    messages_known: int = 0
    #: Messages that Redis had counted and its window had dropped before anybody stored them.
    messages_gone: int = 0
    gone: Named = field(default_factory=Named)
    #: Sessions that ended in Redis while it owned them: PostgreSQL has what it had when it gave them away.
    expired: Named = field(default_factory=Named)
    #: Sessions that stay in Redis, and why.
    conflicts: Named = field(default_factory=Named)

    @property
    def found_nothing(self) -> bool:
        return not (self.sessions_adopted or self.expired.count or self.conflicts.count)

    def add(self, session_id: UUID, adopted: Adopted) -> None:
        if adopted.expired:
            self.expired.add(str(session_id), f"{adopted.row.session.message_count} messages in PostgreSQL")
            return
        self.sessions_adopted += 1
        self.messages_added += adopted.added
        self.messages_known += adopted.known
        self.messages_gone += adopted.gone
        if adopted.gone:
            self.gone.add(str(session_id), f"{adopted.gone} messages")


class Backfill:
    """Adopts through `hybrid`, at most `per_second` sessions a second, `at_once` of them at the same time.

    An outage is waited out for `patience_seconds` after the last success; then it is raised. `batch_pause_seconds`
    is a rest for Redis between two steps of the walk.
    """

    def __init__(
        self,
        *,
        hybrid: HybridChatSessionStore,
        database: Database,
        redis: BoundedRedis,
        keeper: PostgresStateKeeper,
        heartbeat: Heartbeat,
        lease: Lease,
        per_second: float | None = None,
        at_once: int = 4,
        patience_seconds: float = 20.0,
        batch_pause_seconds: float = 0.0,
    ) -> None:
        self._hybrid = hybrid
        self._database = database
        self._redis = redis
        self._keeper = keeper
        self._heartbeat = heartbeat
        self._lease = lease
        self._interval = 1 / per_second if per_second else 0.0
        self._at_once = at_once
        self._patience_seconds = patience_seconds
        self._batch_pause_seconds = batch_pause_seconds
        self._next_at = float("-inf")
        self._last_success = float("-inf")
        self._failures: dict[UUID, int] = {}

    async def drain(self, *, report: Callable[[Tally], None] = lambda _: None) -> Tally:
        """Adopts everything and makes the mode `hybrid`; it stays `draining` where there are conflicts."""
        before = await self._keeper.read()
        await set_mode(self._keeper, self._heartbeat, self._lease, "draining")
        if before.mode == "redis-only":
            # What is under way in that mode ends meanwhile, and is found.
            await asyncio.sleep(self._lease.seconds)
        return await self.go_on(report=report)

    async def go_on(self, *, report: Callable[[Tally], None] = lambda _: None) -> Tally:
        """The same in mode `draining`. Raises `ModeRefused` where somebody changes the mode meanwhile."""
        tally = Tally()
        await self.adopt_all(tally, report=report)
        if not tally.conflicts.count:
            await set_mode(self._keeper, self._heartbeat, self._lease, "hybrid", only_from="draining")
        return tally

    async def adopt_all(self, tally: Tally, *, report: Callable[[Tally], None] = lambda _: None) -> None:
        """Until a whole walk has found nothing left but conflicts."""
        self._last_success = self._lease.now()
        walks = 0
        while True:
            try:
                await self._trusted()
                done = await self._walk(tally, report)
            except ModeChanged as changed:
                raise ModeRefused(f"somebody else has changed the mode to {changed.state.mode}") from changed
            except (CacheOutage, Unavailable) as exc:
                if self._lease.now() - self._last_success > self._patience_seconds:
                    raise exc if isinstance(exc, ChatError) else RedisUnavailable(str(exc)) from exc
                log.debug("the backfill waits: %s", exc)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if done:
                return
            walks += 1
            if walks > _WALKS_MAX:
                raise ModeRefused(
                    "sessions appear in Redis as fast as they are adopted",
                    hint="stop the program that writes them without this database",
                )

    async def finds_any(self) -> bool:
        """Whether there is anything to adopt, looking at everything and changing nothing."""
        async with self._database.connection() as conn:
            if await conn.fetchrow(statements.PAGE_OWNED_BY_REDIS, UUID(int=0), 1) is not None:
                return True
        async for batch in scan_sessions(self._redis):
            if any(seen.adoptable for seen in batch):
                return True
            await asyncio.sleep(self._batch_pause_seconds)
        return False

    async def _trusted(self) -> None:
        """Adopting takes a Redis that the state names: a heartbeat, ours or a service's, sees to it."""
        while self._lease.current() is None:
            # An outage of PostgreSQL is said as what it is.
            await self._keeper.read()
            if self._lease.now() - self._last_success > self._patience_seconds:
                raise RedisUnavailable("nobody trusts Redis now", hint="is it well? `chat-sessions doctor`")
            await asyncio.sleep(self._lease.seconds / 20)
            await self._heartbeat.beat()

    async def _walk(self, tally: Tally, report: Callable[[Tally], None]) -> bool:
        """One walk; True where it was whole and found nothing left."""
        before = await self._redis.identity()
        state = self._lease.state
        if state is None or before != state.redis_identity:
            # A heartbeat will follow, or this is not the Redis of the services.
            raise RedisUnavailable(
                "REDIS_URL leads to another Redis than the one of this database",
                hint="give this command the URL that the services use",
            )
        tally.total, tally.scanned, tally.conflicts = await key_count(self._redis), 0, Named()
        found = 0
        async for batch in scan_sessions(self._redis):
            adoptable = [seen for seen in batch if seen.adoptable]
            found += await self._adopt_each(adoptable, tally, lambda: report(tally))
            tally.scanned += len(batch)
            tally.total = max(tally.total, tally.scanned)
            self._last_success = self._lease.now()
            report(tally)
            heed_cancellation()
            await asyncio.sleep(self._batch_pause_seconds)
        found += await self._rows(tally, report)
        return await self._redis.identity() == before and found == 0

    async def _rows(self, tally: Tally, report: Callable[[Tally], None]) -> int:
        """Rows that Redis owns: their keys are gone, or were made behind the walk."""
        found, last = 0, UUID(int=0)
        while True:
            async with self._database.connection() as conn:
                records = await conn.fetch(statements.PAGE_OWNED_BY_REDIS, last, _ROWS_PER_PAGE)
            if not records:
                return found
            last = records[-1]["session_id"]
            rows = (Seen(session_key(one["session_id"]), one["session_id"], "redis") for one in records)
            unknown = [seen for seen in rows if str(seen.session_id) not in tally.conflicts.shown]
            found += await self._adopt_each(unknown, tally, lambda: report(tally))

    async def _adopt_each(self, sessions: Sequence[Seen], tally: Tally, report: Callable[[], None]) -> int:
        """Adopts them, and says how many there were besides conflicts."""
        waiting = iter(sessions)
        results: list[bool] = []
        at_once = min(self._at_once, len(sessions))
        await all_of([self._work(waiting, tally, results, report) for _ in range(at_once)])
        return sum(results)

    async def _work(
        self, waiting: Iterable[Seen], tally: Tally, results: list[bool], report: Callable[[], None]
    ) -> None:
        for seen in waiting:
            heed_cancellation()
            await self._throttle()
            if seen.session_id is not None:
                results.append(await self._adopt(seen.key, seen.session_id, tally))
                self._last_success = self._lease.now()
                report()

    async def _throttle(self) -> None:
        if not self._interval:
            return
        now = self._lease.now()
        self._next_at = max(now, self._next_at + self._interval)
        await asyncio.sleep(self._next_at - now)

    async def _adopt(self, key: str, session_id: UUID, tally: Tally) -> bool:
        """One session; False where it is a conflict."""
        try:
            adopted = await self._hybrid.adopt(session_id)
        except Unadoptable as exc:
            tally.conflicts.add(str(session_id), exc.detail)
            return False
        except Unavailable as exc:
            if not await self._both_are_well():
                raise
            failures = self._failures[session_id] = self._failures.get(session_id, 0) + 1
            if failures < _FAILURES_MAX:
                # The walk after this one comes by here again.
                return True
            tally.conflicts.add(str(session_id), f"could not be taken over: {exc.detail}")
            return False
        self._failures.pop(session_id, None)
        if adopted is not None:
            tally.add(session_id, adopted)
            return True
        if any(seen.adoptable for seen in await look_at(self._redis, [key])):
            tally.conflicts.add(str(session_id), "is no session that can be read back")
            return False
        return True

    async def _both_are_well(self) -> bool:
        try:
            state = await self._keeper.read()
            return state.trusting and await self._redis.identity() == state.redis_identity
        except (CacheOutage, Unavailable):
            return False


class BackgroundBackfill:
    """Adopts while a process serves: in mode `draining`, one process at a time; and once after a start it looks
    whether there is anything to adopt at all.

    `open_lock` gives a database handle of its own for the election, for as long as it is needed.
    """

    def __init__(
        self,
        backfill: Backfill,
        *,
        keeper: PostgresStateKeeper,
        heartbeat: Heartbeat,
        lease: Lease,
        open_lock: Callable[[], AbstractAsyncContextManager[Database]],
    ) -> None:
        self._backfill = backfill
        self._keeper = keeper
        self._heartbeat = heartbeat
        self._lease = lease
        self._open_lock = open_lock
        self._looked = False
        self._conflicts: dict[str, str] = {}

    async def run(self) -> None:
        """Until it is cancelled. An outage ends an attempt; the next one goes on where it was."""
        # Its own, as the sampler's.
        dice = random.Random()  # noqa: S311 - no secret
        pause = _EVERY_SECONDS
        while True:
            # Jitter: processes that started at once, and a command that has just changed the mode, come first.
            await asyncio.sleep(pause * dice.uniform(0.5, 1.5))
            pause = _EVERY_SECONDS
            try:
                if await self._once():
                    pause = _CONFLICTS_AGAIN_SECONDS
            except (ChatError, Interrupted) as exc:
                log.info("sessions are not taken over from Redis now, will try again: %s", exc)
            except Exception:
                # It must not end silently: the mode would stay between the two for ever.
                log.exception("the backfill failed, will try again")

    async def _once(self) -> bool:
        """Whether conflicts are left, which somebody has to mend first."""
        state = self._lease.state
        if state is None or state.mode == "redis-only" or (state.mode == "hybrid" and self._looked):
            return False
        async with elected(self._open_lock) as alone:
            if not alone:
                # Somebody else is at it.
                self._looked = True
                return False
            if state.mode == "hybrid":
                if await self._backfill.finds_any():
                    await set_mode(self._keeper, self._heartbeat, self._lease, "draining", only_from="hybrid")
                self._looked = True
                return False
            tally = await self._backfill.go_on()
        self._tell(tally)
        return bool(tally.conflicts.count)

    def _tell(self, tally: Tally) -> None:
        if tally.sessions_adopted or tally.expired.count:
            log.warning(
                "%d sessions taken over from Redis (%d messages were new, %d known, %d gone), %d had expired there",
                *(tally.sessions_adopted, tally.messages_added, tally.messages_known),
                *(tally.messages_gone, tally.expired.count),
            )
        if tally.conflicts.count and tally.conflicts.shown != self._conflicts:
            self._conflicts = tally.conflicts.shown
            log.warning(
                "%d sessions can't be taken over from Redis, the mode stays draining "
                "(`chat-sessions adopt` names them all): %s",
                tally.conflicts.count,
                "; ".join(f"{name}: {why}" for name, why in list(self._conflicts.items())[:5]),
            )


@asynccontextmanager
async def elected(open_lock: Callable[[], AbstractAsyncContextManager[Database]]) -> AsyncIterator[bool]:
    """True for one holder at a time, for as long as its connection lasts. That two may overlap for a moment does
    no harm: adopting is safe to repeat, and safe to do at once.
    """
    done = False
    try:
        async with open_lock() as database, database.transaction() as conn:
            # It holds no snapshot: it may idle.
            await conn.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield bool(await conn.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK))
            done = True
    except DurableStoreUnavailable:
        # There is nothing to commit: that the connection broke meanwhile is nobody's concern.
        if not done:
            raise
