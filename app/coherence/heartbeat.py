"""The pulse of a process: it renews the lease, and sees to it that the epoch names the Redis that answers.

One task a process, on connections of its own: a pool that is exhausted must not end the lease, or all reads
would go to that same pool.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from app.coherence.counts import Counts
from app.coherence.lease import Lease
from app.coherence.ports import PROTOCOL, CacheMoved, CacheOutage, CacheState, StateKeeper
from app.errors import DurableStoreUnavailable

log = logging.getLogger("chat_sessions.heartbeat")

#: A lease outlives four heartbeats that went astray.
BEATS_PER_LEASE = 5

#: For how long Redis must be well before it is trusted again, in leases; doubled for each time it failed
#: again soon after, up to the maximum: a link that flaps must not cost a change of the epoch at every turn.
_DWELL_LEASES = 0.6
_DWELL_LEASES_MAX = 60.0


def next_state(old: CacheState, **changes: object) -> CacheState:
    """What `old` is to become, under an epoch that is still to be drawn.

    It is settled as `old` was where a lease on `old` can do no harm: because it let nobody believe Redis, or
    because writers under the new state mark the very entries that it lets readers believe.
    """
    new = replace(old, **changes)  # type: ignore[arg-type]  # the fields of a state
    harmless = not old.trusting or (new.trusting and new.redis_identity == old.redis_identity)
    return replace(new, settled=old.settled and harmless)


class Heartbeat:
    """Renews `lease` five times in its length; `beat` is one pulse."""

    def __init__(
        self,
        lease: Lease,
        keeper: StateKeeper,
        probe: Callable[[], Awaitable[str]] | None,
        counts: Counts,
    ) -> None:
        self._lease = lease
        self._keeper = keeper
        self._probe = probe
        self._counts = counts
        self._well_since: float | None = None
        self._trusted_since: float | None = None
        self._failures = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        pause = self._lease.seconds / BEATS_PER_LEASE
        while True:
            started = self._lease.now()
            try:
                await self.beat()
            except Exception:
                # Without a pulse the process would serve from PostgreSQL alone until it is restarted.
                log.exception("a heartbeat failed")
            await asyncio.sleep(max(0.0, pause - (self._lease.now() - started)))

    async def beat(self) -> None:
        """One pulse. An outage of either store is not its failure."""
        asked_at = self._lease.now()
        try:
            state = await self._keeper.read()
        except DurableStoreUnavailable as exc:
            self._counts.heartbeats_missed += 1
            log.debug("no heartbeat: %s", exc)
            return
        self._lease.learn(state, asked_at=asked_at)
        if state.protocol != PROTOCOL:
            # A newer version has taken over, and this one does not know its rules.
            return
        try:
            if not state.settled and self._lease.hold_seconds(state) <= 0:
                await self._keeper.settle(state)
            if self._probe is not None and state.mode != "redis-only":
                await self._follow(state, self._probe)
        except DurableStoreUnavailable as exc:
            log.debug("the state was not changed: %s", exc)

    async def change(self, old: CacheState, new: CacheState) -> None:
        """Changes the epoch, unless somebody did it before."""
        state = await self._keeper.change(old, new)
        self._lease.learn(state)
        if state.epoch != old.epoch:
            self._counts.epoch_changes += 1
            level = logging.INFO if state.trusting == old.trusting else logging.WARNING
            log.log(
                level,
                "cache %s (was %s), epoch %s, redis %s",
                *(state.cache, old.cache, state.epoch, state.redis_identity),
            )

    async def _follow(self, state: CacheState, probe: Callable[[], Awaitable[str]]) -> None:
        """Rule 6, and the way back of rule 5."""
        now = self._lease.now()
        try:
            identity = await probe()
        except CacheMoved:
            # A replica now. Connections that were made before say nothing of it.
            self._well_since = None
            if state.cache == "on":
                await self.change(state, next_state(state, cache="off"))
            return
        except CacheOutage:
            # Reads go to PostgreSQL meanwhile. It is turned off by the first writer that cannot mark.
            self._well_since = None
            return
        if self._well_since is None:
            self._well_since = now
        if state.cache == "off":
            await self._turn_on(state, identity, now)
        elif identity != state.redis_identity:
            # Not at once to the new one: of two processes that each see another Redis, as in a failover, each
            # would take the epoch from the other at every beat, and writes would wait all the while.
            await self.change(state, next_state(state, cache="off"))
        elif self._trusted_since is None:
            self._trusted_since = now
        elif now - self._trusted_since > _DWELL_LEASES_MAX * self._lease.seconds:
            self._failures = 0

    async def _turn_on(self, state: CacheState, identity: str, now: float) -> None:
        """Once Redis has been well for a while, and the epoch has settled: then it costs no writer a wait."""
        if self._trusted_since is not None:
            self._trusted_since = None
            self._failures += 1
            self._well_since = now
        if not state.settled:
            # The dwell begins when the writers that wait have had their turn: else one that can't reach Redis
            # where others can would wait again.
            self._well_since = now
        dwell = min(_DWELL_LEASES * 2 ** max(0, self._failures - 1), _DWELL_LEASES_MAX) * self._lease.seconds
        if self._well_since is not None and now - self._well_since >= dwell:
            self._trusted_since = now
            await self.change(state, next_state(state, cache="on", redis_identity=identity))
