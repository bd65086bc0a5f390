"""Who decides which fault comes next: seeded, at most two at once, never two on the same thing.

Times of everything alternate with times in which only Redis is disturbed (there no read may fail, and a write that
waits waits for Redis) and with times of peace (there a cache is trusted again, or there would be nothing to lose).
"""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress

import asyncpg
from redis.exceptions import RedisError

from app.embedded import EmbeddedServerError
from tests.failure.chaos.faults import KINDS, Kind, World
from tests.failure.chaos.record import Fault, Record

_LANES = 2

#: (seconds, what may be disturbed), over and over.
_PHASES: tuple[tuple[float, str], ...] = (
    (2.0, "nothing"),
    (8.0, "anything"),
    (9.0, "redis"),
    (1.0, "nothing"),
    (8.0, "anything"),
    (4.0, "nothing"),
)

#: Not among the quick ones: recovery or an instance's start take their time.
_SLOW_KINDS = frozenset({"postgres_out_of_connections"})

_SNAPSHOT_EVERY_SECONDS = 0.7

_FAILED = (
    RedisError,
    OSError,
    TimeoutError,
    EmbeddedServerError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
)


def kinds_of(profile: str) -> list[Kind]:
    if profile == "flips":
        return [kind for kind in KINDS if not kind.loses]
    if profile == "short":
        return [kind for kind in KINDS if kind.name not in _SLOW_KINDS]
    return list(KINDS)


class Nemesis:
    def __init__(self, world: World, record: Record, profile: str, until: float) -> None:
        self._world = world
        self._chance = world.chance
        self._record = record
        self._kinds = kinds_of(profile)
        self._until = until
        self._busy: set[str] = set()
        self._began = time.monotonic()
        self._pace_seconds = 0.25
        self._snapshots = profile != "flips"

    async def torment(self) -> None:
        """Until the time is over and everything that was disturbed is healed."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_LANES):
                tasks.create_task(self._lane())
            if self._snapshots:
                tasks.create_task(self._keep_snapshots())
            tasks.create_task(self._revive())

    @property
    def _over(self) -> bool:
        return time.monotonic() >= self._until

    def _phase(self) -> str:
        at = math.fmod(time.monotonic() - self._began, sum(seconds for seconds, _ in _PHASES))
        for seconds, phase in _PHASES:
            if at < seconds:
                return phase
            at -= seconds
        return "nothing"

    async def _lane(self) -> None:
        while not self._over:
            phase = self._phase()
            found = self._choose(phase) if phase != "nothing" else None
            if found is None:
                await asyncio.sleep(0.05)
                continue
            await self._commit(*found)
            await asyncio.sleep(min(self._chance.expovariate(1 / self._pace_seconds), 2))

    def _choose(self, phase: str) -> tuple[Kind, frozenset[int], frozenset[str]] | None:
        """A kind, the instances that it is for, and what it touches."""
        kinds = [
            kind
            for kind in self._kinds
            if (phase == "anything" or kind.scope in {"redis", "redis links"}) and kind.ready(self._world)
        ]
        # A server that is busy must not make its faults rarer than they were meant to be.
        [kind] = self._chance.choices(kinds, [kind.weight for kind in kinds])
        count = len(self._world.apps)
        everywhere = kind.scope.endswith("links") and self._chance.random() < 0.25
        targets = frozenset(range(count) if everywhere else [self._chance.randrange(count)])
        touches = frozenset(_touched(kind, targets))
        # One instance at a time: nobody would learn anything while all of them stand still.
        claims = touches | {kind.scope} if kind.scope == "app" else touches
        return (kind, targets, claims) if self._busy.isdisjoint(claims) else None

    async def _commit(self, kind: Kind, targets: frozenset[int], touches: frozenset[str]) -> None:
        fault = Fault(kind.name, time.monotonic(), touches)
        self._record.faults.append(fault)
        self._busy |= touches
        try:
            fault.detail = await kind.run(self._world, targets) or ""
            fault.done = True
        except _FAILED as exc:
            fault.detail = f"not done: {exc!r}"
        finally:
            fault.ended = time.monotonic()
            self._busy -= touches

    async def _keep_snapshots(self) -> None:
        due = 0.0
        while not self._over:
            await asyncio.sleep(0.01)
            if time.monotonic() < due or "redis" in self._busy:
                continue
            due = time.monotonic() + _SNAPSHOT_EVERY_SECONDS * self._chance.uniform(0.5, 1.5)
            self._busy.add("redis")
            try:
                with suppress(*_FAILED):
                    await self._world.take_snapshot()
            finally:
                self._busy.discard("redis")

    async def _revive(self) -> None:
        while not self._over:
            await asyncio.sleep(0.2)
            for app in self._world.apps:
                await app.revive()


def _touched(kind: Kind, targets: frozenset[int]) -> list[str]:
    names: dict[str, Callable[[int], list[str]]] = {
        "app": lambda index: [f"app {index}"],
        "redis links": lambda index: [f"redis link {index}"],
        "postgres links": lambda index: [f"postgres link {index}"],
        "both links": lambda index: [f"redis link {index}", f"postgres link {index}"],
    }
    if kind.scope not in names:
        return [kind.scope]
    return [name for index in sorted(targets) for name in names[kind.scope](index)]
