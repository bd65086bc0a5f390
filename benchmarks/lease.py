"""What the protocol between both stores costs one caller: a read under a lease, a mark in a write.

python benchmarks/lease.py
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from uuid import UUID

import uvloop
from harness import ANSWER, Call, Pace, Ratio, Scenario, alone, append_of, cached, filled_sessions
from quick import started_servers
from redis.asyncio import Redis
from report import Results
from stores import bare_connections, facts, hybrid_of, opened_hybrid

from app.coherence.ports import CacheState, MarkOutcome, Row
from app.embedded import EmbeddedServers
from app.redis_sessions.cache import RedisSessionCache
from app.store import ChatSessionStore

SESSIONS = 64


class UnmarkedCache(RedisSessionCache):
    """Unsafe, to measure against: nothing says that a write is under way. The publish stays."""

    async def mark(
        self,
        writes: Sequence[tuple[Row, Row]],
        state: CacheState,  # noqa: ARG002 - in the place of one that needs it
        *,
        token: str,  # noqa: ARG002 - as above
    ) -> list[MarkOutcome]:
        return ["marked"] * len(writes)


@asynccontextmanager
async def _opened_unmarked(servers: EmbeddedServers) -> AsyncIterator[ChatSessionStore]:
    async with opened_hybrid(servers) as stores:
        assert stores.cache is not None
        # The very same store in all but this one step.
        stores.cache.__class__ = UnmarkedCache
        yield hybrid_of(stores)


async def one_mark(servers: EmbeddedServers, pace: Pace) -> Scenario:
    """Hypothesis: the mark is sent beside the insert and answered before it, so at low load it costs the
    processor's time for one command, and no wait. Expected: at most 1.05.

    Control: the one without marks a second time in each round.
    """
    async with opened_hybrid(servers) as stores, _opened_unmarked(servers) as unmarked:
        marked = hybrid_of(stores)
        sessions = await filled_sessions(marked, SESSIONS)
        third = len(sessions) // 3
        owned = [cycle(sessions[third * index : third * (index + 1)]) for index in range(3)]

        def append(store: ChatSessionStore, its: Iterator[UUID]) -> Call:
            return lambda: store.append(append_of(next(its), ("assistant", ANSWER)))

        scenario = Scenario(
            name="the mark in a durable append, one caller",
            hypothesis=one_mark.__doc__ or "",
            unit="p50, ms",
            ratios=[
                Ratio(name="marked / unmarked", over="marked", under="unmarked", at_most=1.05),
                Ratio(name="control: unmarked again / unmarked", over="unmarked again", under="unmarked"),
            ],
        )
        cases = {
            "marked": append(marked, owned[0]),
            "unmarked": append(unmarked, owned[1]),
            "unmarked again": append(unmarked, owned[2]),
        }
        return await alone(scenario, cases, pace)


async def one_hit(servers: EmbeddedServers, pace: Pace) -> Scenario:
    """Hypothesis: a trusted hit is one GETEX and the reading of the entry's head; PostgreSQL is not asked. With
    CACHE_VERIFY=always its row is looked up at the same time. Expected: at most 2 times a bare GETEX, whose
    reply is left as it is, and clearly less than always.

    Control: the bare one a second time in each round.
    """
    async with (
        opened_hybrid(servers) as leased,
        opened_hybrid(servers, cache_verify="always") as always,
        bare_connections(servers) as (_, redis),
    ):
        store = hybrid_of(leased)
        sessions = await cached(store, await filled_sessions(store, SESSIONS))
        scenario = Scenario(
            name="history hit, one caller",
            hypothesis=one_hit.__doc__ or "",
            unit="p50, ms",
            ratios=[
                Ratio(name="lease / bare GETEX", over="lease", under="bare GETEX", at_most=2),
                Ratio(name="always / lease", over="always", under="lease"),
                Ratio(name="control: bare again / bare GETEX", over="bare again", under="bare GETEX"),
            ],
        )
        cases = {
            "lease": _hit(store, cycle(sessions)),
            "always": _hit(hybrid_of(always), cycle(sessions)),
            "bare GETEX": _bare_hit(redis, cycle(sessions)),
            "bare again": _bare_hit(redis, cycle(sessions)),
        }
        return await alone(scenario, cases, pace)


def _hit(store: ChatSessionStore, sessions: Iterator[UUID]) -> Call:
    async def one() -> None:
        history = await store.read_history(next(sessions), max_messages=10)
        assert history.source == "redis"

    return one


def _bare_hit(redis: Redis, sessions: Iterator[UUID]) -> Call:
    async def one() -> None:
        assert await redis.getex(f"session:{next(sessions)}", px=3_600_000) is not None

    return one


async def scenarios(servers: EmbeddedServers, pace: Pace) -> list[Scenario]:
    return [await one_hit(servers, pace), await one_mark(servers, pace)]


async def _measured(servers: EmbeddedServers, folder: Path) -> Results:
    results = Results(facts=await facts(servers, folder))
    for name, value in results.facts.items():
        print(f"{name:<8} {value}")
    for scenario in await scenarios(servers, Pace(seconds=0, rounds=12, calls=60)):
        results.add(scenario)
    return results


def main() -> None:
    with (
        started_servers() as (servers, folder),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        print(runner.run(_measured(servers, folder)).text())


if __name__ == "__main__":
    main()
