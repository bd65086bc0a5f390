"""A process's own look at the guarantee: now and then one entry, compared with its row.

It never cries wolf (`app.maintenance.audit`): one violation is a bug in this project, in Redis, or in a hand that
wrote where it should not have. It is counted, logged, and unlinked, so that it is served for no longer.
"""

import asyncio
import logging
import random

from app.coherence.counts import Counts
from app.coherence.lease import Lease
from app.coherence.ports import CacheOutage, CacheState, RowBusy
from app.errors import DurableStoreUnavailable
from app.maintenance.audit import Auditor
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.inspect import random_key
from app.redis_sessions.keys import session_of

log = logging.getLogger("chat_sessions.sampler")

#: One row lock and four round trips a second are nothing beside a service's work; and ten processes look at
#: 864,000 entries a day. Whoever wants all of them now has `chat-sessions verify`.
SAMPLE_EVERY_SECONDS = 1.0

#: Processes that were started together shall not look together.
_JITTER = 0.5


class Sampler:
    """Looks at random entries while the cache may be trusted; `sample` is one look."""

    def __init__(self, auditor: Auditor, cache: RedisSessionCache, lease: Lease, counts: Counts) -> None:
        self._auditor = auditor
        self._cache = cache
        self._lease = lease
        self._counts = counts

    async def run(self) -> None:
        """Until it is cancelled."""
        # Its own: whoever seeds Python's one for a reproducible run gets the same numbers with this beside it.
        dice = random.Random()  # noqa: S311 - no secret
        while True:
            await asyncio.sleep(SAMPLE_EVERY_SECONDS * dice.uniform(1 - _JITTER, 1 + _JITTER))
            try:
                await self.sample()
            except (CacheOutage, DurableStoreUnavailable, RowBusy) as exc:
                log.debug("no sample: %s", exc)
            except Exception:
                # It must not end silently: then no violation would ever be counted again.
                log.exception("a sample failed")

    async def sample(self) -> None:
        """One look. Raises where a store is out."""
        state = self._lease.state
        if state is None or not _believed(state):
            return
        key = await random_key(self._cache.reach(state))
        session_id = session_of(key) if key is not None else None
        if session_id is None:
            return
        finding = await self._auditor.distrust(session_id)
        if finding.entry is None:
            return
        self._counts.cache_samples += 1
        if finding.verdict == "violation":
            self._counts.cache_violations += 1
            log.error(
                "VIOLATION: a trusted entry is not what PostgreSQL has, and was unlinked: session %s: %s",
                session_id,
                finding.difference,
            )
        elif finding.verdict == "incomplete":
            log.error("PostgreSQL lacks messages of session %s: %s", session_id, finding.difference)


def _believed(state: CacheState) -> bool:
    return state.trusting and state.mode == "hybrid"
