"""The product with one rule less, each: a model and a checker that don't find them wrong are at fault themselves.

A mutant is a patch of the product's own code, or of what a server does for a rule.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import app.coherence.heartbeat
import app.hybrid
from app.coherence.lease import Lease
from app.coherence.ports import TOKEN_ZERO, CacheMoved, CacheOutage, Entry
from tests.failure.model import faults, redis
from tests.failure.model.postgres import ModelDurable
from tests.failure.model.redis import ModelCache

_Patch = tuple[Any, str, Any]


def _no_mark() -> list[_Patch]:
    async def mark(_fence: object, writes: Sequence[object], _state: object) -> list[None]:
        return [None] * len(writes)

    return [(app.hybrid._Fence, "mark", mark)]


def _no_row_lock() -> list[_Patch]:
    return [(ModelDurable, "locks", False)]


def _no_watch() -> list[_Patch]:
    return [(redis, "is_untouched", lambda *_: True)]


def _no_hold() -> list[_Patch]:
    return [(Lease, "hold_seconds", lambda *_: 0.0)]


def _no_lease() -> list[_Patch]:
    def current(lease: Lease) -> object:
        return lease.state if lease.state is not None and lease.state.trusting else None

    return [(Lease, "current", current)]


def _no_identity() -> list[_Patch]:
    return [(ModelCache, "bound", False)]


def _clean_skeleton() -> list[_Patch]:
    def run_skeleton(node: redis.Node, row: Any, epoch: str, _: str) -> None:
        if row.session.session_id not in node.entries:
            node.put(row.session.session_id, Entry.of(row, (), epoch=epoch))

    return [(redis, "run_skeleton", run_skeleton)]


def _skeleton_ended_by_a_publish() -> list[_Patch]:
    """The first thing that this model found in the product."""
    return [(redis, "PENDING_MAX", 1)]


def _settle_anything() -> list[_Patch]:
    def run_settle(node: redis.Node, session_id: Any, _: str) -> None:
        if (entry := node.entries.get(session_id)) is not None:
            node.put(session_id, redis.headed(entry, entry.epoch, 0, TOKEN_ZERO))

    return [(redis, "run_settle", run_settle)]


def _publish_anywhere() -> list[_Patch]:
    return [(redis, "stands_before", lambda *_: True)]


def _publish_is_clean() -> list[_Patch]:
    """As if a publish made the entry clean: another write's mark would be lost."""
    publish = redis.run_publish

    def run_publish(node: redis.Node, committed: Any, epoch: str, *more: Any) -> Any:
        published = publish(node, committed, epoch, *more)
        session_id = committed.after.session.session_id
        if published.outcome == "published":
            node.put(session_id, redis.headed(node.entries[session_id], epoch, 0, TOKEN_ZERO))
        return published

    return [(redis, "run_publish", run_publish)]


def _join_closed_fill() -> list[_Patch]:
    return [(app.hybrid._Fill, "open", property(lambda _: True, lambda *_: None))]


def _lease_checked_before() -> list[_Patch]:
    return [(Lease, "still", lambda *_: True)]


def _always_settled() -> list[_Patch]:
    next_state = app.coherence.heartbeat.next_state

    def always(old: Any, **changes: Any) -> Any:
        return replace(next_state(old, **changes), settled=True)

    return [
        (app.coherence.heartbeat, "next_state", always),
        (app.hybrid, "next_state", always),
        (faults, "next_state", always),
    ]


def _commit_unmarked() -> list[_Patch]:
    """Rule 5 the other way round: what can't be marked is committed all the same."""

    async def mark_twice(fence: Any, writes: Any, state: Any, token: str) -> Any:
        try:
            return await fence._cache.mark(writes, state, token=token)
        except CacheMoved:
            raise
        except CacheOutage:
            return ["marked"] * len(writes)

    return [(app.hybrid._Fence, "_mark_twice", mark_twice)]


def _state_of_the_heartbeat() -> list[_Patch]:
    """Rule 4: a writer that asks its own memory for the epoch instead of PostgreSQL, after the row lock."""
    return [(ModelDurable, "looks_again", False)]


def _believe_dirty() -> list[_Patch]:
    return [(Entry, "dirty", property(lambda _: False))]


def _believe_old_epochs() -> list[_Patch]:
    def trustworthy(entry: Entry, state: Any) -> bool:
        return not entry.dirty and entry.owner == "postgres" and state.trusting

    return [(app.hybrid, "_trustworthy", trustworthy)]


def _remove_without_touch() -> list[_Patch]:
    def run_remove(node: redis.Node, session_id: Any) -> bool:
        node.forget(session_id)
        return True

    return [(redis, "run_remove", run_remove)]


def _mark_without_touch() -> list[_Patch]:
    mark = redis.run_mark

    def run_mark(node: redis.Node, before: Any, *args: Any) -> Any:
        return mark(node, before, *args) if before.session.session_id in node.entries else "touched"

    return [(redis, "run_mark", run_mark)]


def _adopt_without_proof() -> list[_Patch]:
    """Found by this model in the product: who looked long ago brought a deleted session back."""

    async def touch(_: object) -> bool:
        return True

    return [(redis._Watching, "touch", touch)]


#: The six without which nothing is shown; each is to be found within 10,000 schedules.
SIX: dict[str, Callable[[], list[_Patch]]] = {
    "no mark": _no_mark,
    "no row lock": _no_row_lock,
    "no watch": _no_watch,
    "no hold": _no_hold,
    "no lease": _no_lease,
    "no identity": _no_identity,
}

MUTANTS: dict[str, Callable[[], list[_Patch]]] = {
    **SIX,
    "clean skeleton": _clean_skeleton,
    "skeleton ended by a publish": _skeleton_ended_by_a_publish,
    "settle anything": _settle_anything,
    "publish anywhere": _publish_anywhere,
    "publish is clean": _publish_is_clean,
    "join closed fill": _join_closed_fill,
    "lease checked before": _lease_checked_before,
    "always settled": _always_settled,
    "commit unmarked": _commit_unmarked,
    "state of the heartbeat": _state_of_the_heartbeat,
    "believe dirty": _believe_dirty,
    "believe old epochs": _believe_old_epochs,
    "adopt without proof": _adopt_without_proof,
    "adopt without watch": _no_watch,
    "mark without touch": _mark_without_touch,
    "remove without touch": _remove_without_touch,
}


#: Those that only matter while Redis owns sessions.
DRAINING = frozenset({"adopt without proof", "adopt without watch"})

#: Those that can't be found, with the reason.
EQUIVALENT: dict[str, str] = {
    "lease checked before": "a lease that was valid at some moment of the read is enough: the entry was true then, "
    "and what is read later was true then or since"
}


@contextmanager
def without(name: str | None) -> Iterator[None]:
    """The product as it is, or with the mutant's patches."""
    patches = [patch.object(*one) for one in MUTANTS[name]()] if name is not None else []
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()
