"""Every session in Redis, looked at one after the other while both stores are in use."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

from app.coherence.ports import CacheOutage, RowBusy
from app.errors import ChatError, DurableStoreUnavailable
from app.maintenance.audit import WRONG, Finding, Mending, Verdict
from app.redis_sessions.client import BoundedRedis
from app.redis_sessions.inspect import random_key
from app.redis_sessions.scan import Seen, look_at
from app.tasks import all_of

log = logging.getLogger("chat_sessions.survey")

#: Rows that are locked at the same moment: the services come first.
AT_ONCE = 4

#: How often a row is tried for that somebody else holds. Each try waits half a second.
_TRIES = 4

#: Of each verdict that wants a look, so many are named.
_NAMED_MAX = 5

#: 'busy': its row was locked all the time. 'failed': it could not be looked at, which is in the log.
#: 'stranger': a key that is no session's.
Outcome = Verdict | Literal["busy", "failed", "stranger"]
NOT_WELL: tuple[Outcome, ...] = (*WRONG, "busy", "failed", "stranger")

Examine = Callable[[UUID], Awaitable[tuple[Finding, Mending | None]]]


@dataclass(frozen=True, slots=True)
class Named:
    """One of those found. `what` is a session's id, or the key where that names no session."""

    outcome: Outcome
    what: str
    difference: str


@dataclass(slots=True, kw_only=True)
class Survey:
    """What a walk has found and mended. `named` are the first few of each outcome that wants a look."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    mended: Counter[Mending] = field(default_factory=Counter)
    named: list[Named] = field(default_factory=list)
    #: How many are wrong and were not mended.
    left: int = 0

    def add(self, outcome: Outcome, what: str, difference: str = "", mending: Mending | None = None) -> None:
        self.outcomes[outcome] += 1
        if mending is not None:
            self.mended[mending] += 1
        left = mending == "left" or (outcome in NOT_WELL and mending is None)
        self.left += left
        named = sum(one.outcome == outcome for one in self.named)
        if (outcome in NOT_WELL or left) and named < _NAMED_MAX:
            self.named.append(Named(outcome, what, difference))


async def survey(
    entries: AsyncIterator[list[Seen]], examine: Examine, *, advance: Callable[[int], None]
) -> Survey:
    """Examines every one of `entries`, page by page. Raises `CacheOutage` and `DurableStoreUnavailable`."""
    done = Survey()
    places = asyncio.Semaphore(AT_ONCE)

    async def look(seen: Seen) -> None:
        async with places:
            await _examined(seen, examine, done)
        advance(1)

    async for page in entries:
        await all_of([look(seen) for seen in page])
    return done


async def _examined(seen: Seen, examine: Examine, done: Survey) -> None:
    session_id = seen.session_id
    if session_id is None:
        done.add("stranger", seen.key)
        return
    for _ in range(_TRIES):
        try:
            finding, mending = await examine(session_id)
        except RowBusy:
            continue
        except (CacheOutage, DurableStoreUnavailable):
            raise
        except ChatError as exc:
            done.add("failed", str(session_id), str(exc))
        except Exception as exc:
            # One that is stranger than anything we thought of must not hide the others.
            log.exception("session %s could not be examined", session_id)
            done.add("failed", str(session_id), repr(exc))
        else:
            done.add(finding.verdict, str(session_id), finding.difference, mending)
        return
    done.add("busy", str(session_id))


async def random_entries(bounded: BoundedRedis, count: int) -> AsyncIterator[list[Seen]]:
    """`count` keys, each any one of all."""
    for _ in range(count):
        key = await random_key(bounded)
        if key is None:
            return
        yield await look_at(bounded, [key])
