"""The row `chat.cache_state`: who owns the data, and which era of the cache this is. And who serves it."""

from collections.abc import Callable
from dataclasses import replace
from secrets import token_hex
from uuid import UUID

from app.coherence.ports import PROTOCOL, CacheState, Mode
from app.errors import DurableStoreUnavailable, StartRefused
from app.postgres import statements
from app.postgres.engine import Database
from app.postgres.rows import state_of

#: An instance that was not heard from for this long counts as gone.
GONE_AFTER_SECONDS = 5

#: How often an instance says that it is there.
_PRESENT_EVERY_BEATS = 5


class PostgresStateKeeper:
    """Keeps `app.coherence.ports.StateKeeper` on a database handle of its own.

    While `instance_id` is given, each few reads also note in `chat.instances` that this process serves. `on_answer` is
    called for each.
    """

    def __init__(
        self,
        database: Database,
        *,
        instance_id: UUID | None = None,
        version: str = "",
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._on_answer = on_answer
        self._instance_id = instance_id
        self._version = version
        self._beats = 0
        self._timeline: str | None = None

    async def read(self) -> CacheState:
        async with self._database.connection() as conn:
            record = await conn.fetchrow(statements.HEARTBEAT, timeout=1.0)
            if record is None:
                raise DurableStoreUnavailable("chat.cache_state is empty", hint="start the service once")
            if record["standby"]:
                raise DurableStoreUnavailable(
                    "a standby answers", hint="point DATABASE_URL at the primary, or add target_session_attrs"
                )
            if self._instance_id is not None and self._beats % _PRESENT_EVERY_BEATS == 0:
                await conn.execute(statements.PRESENT, self._instance_id, self._version, PROTOCOL)
            self._beats += 1
        self._on_answer()
        state = state_of(record)
        timeline, self._timeline = self._timeline, record["timeline"]
        if timeline not in {None, record["timeline"]}:
            # Another server was promoted. Redis may hold what it never received.
            return await self.change(state, replace(state, settled=False))
        return state

    async def change(self, old: CacheState, new: CacheState) -> CacheState:
        async with self._database.transaction() as conn:
            await conn.execute(
                statements.CHANGE_STATE,
                *(old.epoch, token_hex(8), new.mode, new.cache, new.redis_identity, new.settled),
            )
            record = await conn.fetchrow(statements.STATE)
        if record is None:
            raise DurableStoreUnavailable("chat.cache_state is empty", hint="start the service once")
        return state_of(record)

    async def settle(self, state: CacheState) -> None:
        async with self._database.connection() as conn:
            await conn.execute(statements.SETTLE_STATE, state.epoch)

    async def others(self) -> int:
        """How many other instances were heard from lately."""
        async with self._database.connection() as conn:
            count: int = await conn.fetchval(statements.OTHERS, self._instance_id, GONE_AFTER_SECONDS)
        return count

    async def leave(self) -> None:
        """Takes this instance, and those long gone, off the list."""
        async with self._database.connection() as conn:
            await conn.execute(statements.LEAVE, self._instance_id)


async def read_state(database: Database) -> CacheState | None:
    """The state as it stands; None before the first start."""
    async with database.connection() as conn:
        record = await conn.fetchrow(statements.STATE)
    return state_of(record) if record is not None else None


async def alive(database: Database) -> list[tuple[str, int]]:
    """Version and protocol of each instance that was heard from lately."""
    async with database.connection() as conn:
        records = await conn.fetch(statements.ALIVE, GONE_AFTER_SECONDS)
    return [(record["version"], record["protocol"]) for record in records]


async def claim_state(
    database: Database, *, redis_only: bool | None, redis_identity: str | None = None
) -> CacheState:
    """The state of the database, seeded by the first start with the mode and the Redis that it was given.

    A database of protocol 0 is taken over: its processes refuse to write from then on, and what they cached
    carries an epoch that no lease trusts. Raises `StartRefused` for a protocol that this version does not know.
    """
    wanted: Mode = "redis-only" if redis_only else "hybrid"
    cache = "on" if redis_identity is not None else "off"
    async with database.transaction() as conn:
        await conn.execute(statements.SEED_STATE, PROTOCOL, token_hex(8), wanted, cache, redis_identity)
        await conn.execute(statements.TAKE_OVER_STATE, PROTOCOL, token_hex(8), cache, redis_identity)
        record = await conn.fetchrow(statements.STATE)
    if record is None:
        raise StartRefused(
            "chat.cache_state lost its only row while this process started", hint="start again"
        )
    return spoken(state_of(record))


def spoken(state: CacheState) -> CacheState:
    """The state, if it is one of the protocol that this version speaks. Raises `StartRefused`."""
    if state.protocol != PROTOCOL:
        raise StartRefused(
            f"the database is served by coherence protocol {state.protocol}, this version speaks {PROTOCOL}",
            hint="run the same version everywhere",
        )
    return state
