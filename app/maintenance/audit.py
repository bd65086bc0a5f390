"""One session in both stores, compared exactly; and mended where they differ.

The row's lock first, the look into Redis after it. Whoever changes a session holds that lock, marks the entry before
the commit, and makes it clean only after: so while we hold it, an entry is dirty, or of another epoch, or equal to
its row. A trusted entry that differs is a violation of the guarantee, never a race that the look has lost: looked at
in the other order, a write could be committed and published in between.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Literal
from uuid import UUID

from app.coherence.ports import (
    CacheOutage,
    CacheState,
    DurableStore,
    Entry,
    GuideEntry,
    LockedSession,
    Row,
    Unreadable,
)
from app.hybrid import HybridChatSessionStore
from app.redis_sessions.cache import RedisSessionCache
from app.redis_sessions.inspect import Found, find_session

Verdict = Literal[
    # Wrong. `incomplete`: PostgreSQL lacks messages that its own row counts.
    "violation",
    "incomplete",
    "without-row",
    "unreadable",
    "no-ttl",
    # Waits until somebody touches it.
    "redis-owned",
    "guide",
    # Well, or not believed by anybody.
    "same",
    "dirty",
    "older",
    "different",
    "absent",
]

#: What is wrong with an entry, and what is only left to be adopted; each is well without the others.
WRONG: tuple[Verdict, ...] = ("violation", "incomplete", "without-row", "unreadable", "no-ttl")
WAITING: tuple[Verdict, ...] = ("redis-owned", "guide")

#: 'left': it is for a person to decide.
Mending = Literal["filled", "removed", "adopted", "left"]

#: A writer waits for the row that is looked at: Redis gets no more of its time than this.
_LOOK_SECONDS_MAX = 1.0

#: SESSION_MAX_MESSAGES is no higher, so no window of ours is longer.
_LINES_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What stood in both stores while the row was locked. `difference` says where the entry is not its row."""

    session_id: UUID
    verdict: Verdict
    state: CacheState
    row: Row | None
    entry: Entry | None = None
    difference: str = ""


class Auditor:
    """Compares and mends. Raises `CacheOutage`, `DurableStoreUnavailable`, and `RowBusy` from each method.

    `messages_max` is the window of an entry that is filled anew.
    """

    def __init__(
        self,
        durable: DurableStore,
        cache: RedisSessionCache,
        hybrid: HybridChatSessionStore,
        *,
        messages_max: int,
    ) -> None:
        self._durable = durable
        self._cache = cache
        self._hybrid = hybrid
        self._messages_max = messages_max

    async def audit(self, session_id: UUID) -> Finding:
        """Changes nothing, not even a time to live."""
        async with self._looked(session_id) as (_, finding):
            return finding

    async def distrust(self, session_id: UUID) -> Finding:
        """The same, and a violation is unlinked before anybody else can read it."""
        async with self._looked(session_id) as (locked, finding):
            if finding.verdict == "violation":
                # Redis is out: then nobody reads it either, and the next look finds it again.
                with suppress(CacheOutage):
                    await self._cache.remove(session_id, locked.state)
            return finding

    async def repair(self, session_id: UUID) -> tuple[Finding, Mending | None]:
        """Mends what is wrong, and adopts what Redis holds for itself. None: there is nothing to do.

        What Redis owns and what is in the guide's format is only ever replaced by what PostgreSQL has taken over
        from it. In Redis-only mode nothing is changed, and nothing while the cache is off.
        """
        async with self._looked(session_id) as (locked, finding):
            if finding.verdict in WRONG:
                return finding, await self._mend(locked, finding)
        if finding.verdict not in WAITING or finding.state.mode == "redis-only":
            return finding, None
        return finding, "adopted" if await self._hybrid.adopt(session_id) is not None else None

    @asynccontextmanager
    async def _looked(self, session_id: UUID) -> AsyncIterator[tuple[LockedSession, Finding]]:
        for last in (False, True):
            async with self._durable.locked(session_id) as locked:
                found = await self._find(session_id, locked.state)
                # There was no row to lock: one that was committed since then is there at the second look, and ids
                # are not used twice.
                if last or locked.row is not None or not isinstance(found.value, Entry):
                    yield locked, await _judged(session_id, found, locked)
                    return

    async def _find(self, session_id: UUID, state: CacheState) -> Found:
        try:
            async with asyncio.timeout(_LOOK_SECONDS_MAX):
                return await find_session(self._cache.reach(state), session_id)
        except TimeoutError as exc:
            raise CacheOutage("redis took too long while a row was locked") from exc

    async def _mend(self, locked: LockedSession, finding: Finding) -> Mending:
        """Under the row lock and in time for it, like every fill: rule 3 of `app.hybrid`."""
        state, row = locked.state, locked.row
        if not state.trusting or finding.verdict == "incomplete":
            return "left"
        if row is None and finding.verdict == "unreadable":
            # Nobody else has these words, whatever they are.
            return "left"
        async with self._cache.watch(finding.session_id, state) as watch:
            # Looked at again: the guide's own program takes no lock of ours.
            if not (
                watch.value is None or (isinstance(watch.value, Entry) and watch.value.owner == "postgres")
            ):
                return "left"
            if row is None:
                return "removed" if await watch.drop() else "left"
            lines = await locked.newest(self._messages_max)
            if len(lines) != min(row.session.message_count, self._messages_max):
                # Never over the only copy of what PostgreSQL has lost.
                return "left"
            return "filled" if await watch.fill(row, state.epoch, lines) else "left"


async def _judged(session_id: UUID, found: Found, locked: LockedSession) -> Finding:
    entry = found.value if isinstance(found.value, Entry) else None
    if not found.there:
        verdict, difference = _ABSENT
    elif isinstance(found.value, GuideEntry):
        verdict, difference = _GUIDE
    elif isinstance(found.value, Unreadable):
        verdict, difference = "unreadable", found.value.why
    elif entry is None:
        verdict, difference = _UNREADABLE
    elif entry.owner == "redis":
        verdict, difference = _REDIS_OWNED
    else:
        kind, difference = await _difference(entry, locked)
        verdict = _verdict(entry, kind, locked, expires=found.expires)
    return Finding(
        session_id=session_id,
        verdict=verdict,
        state=locked.state,
        row=locked.row,
        entry=entry,
        difference=difference,
    )


_ABSENT: tuple[Verdict, str] = ("absent", "")
_GUIDE: tuple[Verdict, str] = ("guide", "not adopted yet")
_UNREADABLE: tuple[Verdict, str] = ("unreadable", "what stands there is no session's value")
_REDIS_OWNED: tuple[Verdict, str] = ("redis-owned", "Redis holds it for itself")


def _verdict(entry: Entry, kind: Verdict, locked: LockedSession, *, expires: bool) -> Verdict:
    """Of an entry that says that PostgreSQL owns its session: the first that applies, the worst before the others."""
    row, state = locked.row, locked.state
    trusted = state.trusting and not entry.dirty and entry.epoch == state.epoch
    if kind == "incomplete":
        return kind
    if trusted and kind == "different":
        return "violation"
    if row is None:
        # The skeleton of a session that is being made, until its row is committed.
        being_made = entry.dirty and entry.session.message_count == 0 and expires
        return "dirty" if being_made else "without-row"
    if row.owner == "redis":
        return "redis-owned"
    if not expires:
        return "no-ttl"
    if entry.dirty:
        return "dirty"
    if kind == "different":
        return kind
    return "same" if trusted else "older"


async def _difference(entry: Entry, locked: LockedSession) -> tuple[Verdict, str]:
    """Whether a reader of the entry would see something else than PostgreSQL has, and where."""
    row = locked.row
    of_entry = f"entry {_at(entry.session.message_count, entry.chain)}"
    if row is None:
        return "different", f"{of_entry}, no row"
    of_row = f"row {_at(row.session.message_count, row.chain)}"
    if not entry.equals(row):
        return "different", f"{of_entry}, {of_row}"
    if wrong := [one.name for one in fields(row.session) if _differs(one.name, entry, row)]:
        # Not what they say: that is somebody's data, and this goes to the log.
        return "different", f"{of_entry}, {of_row}, the entry has another {' and '.join(wrong)}"
    count = row.session.message_count - entry.first_seq + 1
    if count > _LINES_MAX:
        return "different", f"{of_entry}, {of_row}, the entry has {count} messages, no window of ours has"
    # Byte for byte: a message's text is made once and carried to both.
    lines = [line.encode() for line in await locked.newest(count)]
    if len(lines) != count:
        # It is PostgreSQL that is wrong: by its chain the entry is what was written.
        return "incomplete", f"{of_entry}, {of_row}, which has {len(lines)} of the newest {count} messages"
    if entry.body == b",\n".join(lines):
        return "same", ""
    cached = entry.body.split(b",\n") if entry.body else []
    pairs = enumerate(zip_longest(cached, lines), entry.first_seq)
    seq = next((seq for seq, (one, other) in pairs if one != other), entry.first_seq)
    return "different", f"{of_entry}, {of_row}, the text of message {seq} differs"


def _differs(name: str, entry: Entry, row: Row) -> bool:
    return bool(getattr(entry.session, name) != getattr(row.session, name))


def _at(seq: int, chain: bytes) -> str:
    return f"(seq {seq}, chain {chain.hex()})"
