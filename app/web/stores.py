"""`/stores`: how both stores stand, and how well they stay one.

Every figure is one that `/metrics`, `/health/ready` or `chat-sessions doctor` tells too, from where they have it.
"""

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, TypeVar

from fastapi import Request, Response
from pydantic import Field

from app import __version__
from app.api.metrics import of_all_workers
from app.chat import milliseconds_of, utc_now
from app.coherence.ports import CacheOutage, CacheState
from app.errors import ChatError
from app.metrics import Observed
from app.postgres.cache_state import alive
from app.postgres.schema import REVISION, current_revision
from app.redis_sessions.inspect import ServerFacts, server_facts
from app.store import StoreHealth
from app.web.frame import render
from app.web.routing import Asked, Pages
from app.wiring import Runtime

pages = Pages()

#: Shorter than a reader's patience: a store that hangs is then one that does not answer.
_ASK_SECONDS_MAX = 3.0

#: Reports are promised what is older.
_LAG_SECONDS_WELL = 5.0

#: Redis evicts, or refuses to cache, from here on soon.
_MEMORY_SHARE_WELL = 0.9

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What the answering processes of this service have counted, together."""

    processes: Mapping[str, Observed | None]

    @property
    def answered(self) -> list[Observed]:
        return [one for one in self.processes.values() if one is not None]

    @property
    def coherent(self) -> bool:
        """Whether there are two stores, or one that is not Redis: else nothing is counted."""
        return any(one.counts for one in self.answered)

    def sum(self, *fields: str) -> float:
        return sum(one.counts.get(field, 0) for one in self.answered for field in fields)

    @property
    def hits(self) -> int:
        return int(self.sum("cache_hits"))

    @property
    def reads(self) -> int:
        """Those that looked in Redis first."""
        return int(self.sum("cache_hits", "cache_fills", "cache_validations", "lease_expired_reads"))

    @property
    def lag_seconds(self) -> float:
        return max((one.rollup_lag_seconds for one in self.answered), default=0.0)

    @property
    def marks(self) -> int:
        return max((one.rollup_dirty for one in self.answered), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lately:
    """Reads since an earlier look. It travels in the address of the next one, so any worker can answer that."""

    hits: int
    reads: int
    seconds: float

    @classmethod
    def between(cls, since: str | None, now: datetime, counted: Counted) -> "Lately | None":
        """None where there was no earlier look, or a worker was replaced since: its counts began anew."""
        if since is None:
            return None
        at_ms, hits, reads = map(int, since.split("."))
        found = cls(
            hits=counted.hits - hits, reads=counted.reads - reads, seconds=now.timestamp() - at_ms / 1000
        )
        return found if 0 <= found.hits <= found.reads and found.seconds > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Both stores at this moment. What did not answer is None."""

    health: Mapping[str, StoreHealth]
    redis: ServerFacts | None
    revision: str | None
    services: list[tuple[str, int]] | None
    state: CacheState | None

    @property
    def versions(self) -> list[str]:
        return sorted({version for version, _ in self.services or []})

    @property
    def memory_used(self) -> int:
        return int(self.redis.info["used_memory"]) if self.redis is not None else 0

    @property
    def memory_limit(self) -> int:
        """0: there is none."""
        return int(self.redis.info.get("maxmemory", 0)) if self.redis is not None else 0

    @property
    def memory_well(self) -> bool:
        return self.memory_used <= _MEMORY_SHARE_WELL * self.memory_limit or not self.memory_limit


async def standing(runtime: Runtime) -> Standing:
    """Asks both stores at once; an outage of one is a finding."""
    database = runtime.database
    health, redis, revision, services = await asyncio.gather(
        _in_time(runtime.health()),
        _in_time(server_facts(runtime.redis) if runtime.redis is not None else None),
        _in_time(current_revision(database) if database is not None else None),
        _in_time(alive(database) if database is not None else None),
    )
    return Standing(
        health={one.name: one for one in health or ()},
        redis=redis,
        revision=revision,
        services=services,
        state=runtime.stores.lease.state if runtime.stores is not None else None,
    )


async def _in_time(asking: Awaitable[_T] | None) -> _T | None:
    if asking is None:
        return None
    try:
        async with asyncio.timeout(_ASK_SECONDS_MAX):
            return await asking
    except (TimeoutError, ChatError, CacheOutage):
        return None


class SinceAsked(Asked):
    """`since` is of the look before."""

    since: Annotated[str | None, Field(pattern=r"^[0-9]{1,15}\.[0-9]{1,18}\.[0-9]{1,18}$")] = None


@pages.get("/stores", Asked)
async def stores(request: Request, runtime: Runtime, _: Asked) -> Response:
    return await _rendered(request, runtime, "stores.html", since=None)


@pages.get("/stores/now", SinceAsked)
async def stores_now(request: Request, runtime: Runtime, asked: SinceAsked) -> Response:
    """The part of the page that changes, for a script that asks again and again."""
    return await _rendered(request, runtime, "stores_now.html", since=asked.since)


async def _rendered(request: Request, runtime: Runtime, template: str, *, since: str | None) -> Response:
    found, processes = await asyncio.gather(standing(runtime), of_all_workers(request, runtime))
    now, counted = utc_now(), Counted(processes=processes)
    return render(
        request,
        template,
        counted=counted,
        lag_well=counted.lag_seconds <= _LAG_SECONDS_WELL,
        lately=Lately.between(since, now, counted),
        next_since=f"{milliseconds_of(now)}.{counted.hits}.{counted.reads}",
        now=now,
        revision_needed=REVISION,
        runtime=runtime,
        standing=found,
        version=__version__,
    )
