"""Who owns the data, changed while processes serve: the mode is one value for all of them."""

import asyncio
from collections.abc import Mapping
from typing import Any

from app.coherence.heartbeat import Heartbeat, next_state
from app.coherence.lease import Lease
from app.coherence.ports import CacheOutage, CacheState, Mode
from app.errors import DurableStoreUnavailable, ModeRefused, StartRefused
from app.postgres.cache_state import GONE_AFTER_SECONDS, PostgresStateKeeper
from app.redis_sessions.client import BoundedRedis
from app.redis_sessions.inspect import server_facts
from app.redis_sessions.scan import scan_sessions

_CHANGES_MAX = 10

#: In leases: a state that has not settled by then won't.
_SETTLING_LEASES_MAX = 10

#: How many keys a start looks at before it serves. The rest is looked at while it does.
_FIRST_LOOK_KEYS_MAX = 1000

_EVICTION_HINT = (
    "CONFIG SET maxmemory-policy noeviction; or accept that a full Redis ends sessions: "
    "`chat-sessions mode redis-only --accept-eviction`"
)


async def set_mode(
    keeper: PostgresStateKeeper,
    heartbeat: Heartbeat,
    lease: Lease,
    mode: Mode,
    *,
    only_from: Mode | None = None,
) -> None:
    """Makes `mode` the mode of all instances, and waits until the last lease on what was before has ended.

    With `only_from`, raises `ModeRefused` where somebody else has changed the mode meanwhile.
    """
    for _ in range(_CHANGES_MAX):
        state = await keeper.read()
        if state.mode == mode:
            break
        if only_from not in {None, state.mode}:
            raise ModeRefused(f"somebody else has changed the mode to {state.mode} meanwhile")
        await heartbeat.change(state, next_state(state, mode=mode))
    else:
        raise DurableStoreUnavailable("the epoch changes again and again", hint="try again")
    deadline = lease.now() + _SETTLING_LEASES_MAX * lease.seconds
    while not state.settled and state.mode == mode:
        if lease.now() > deadline:
            raise DurableStoreUnavailable("the change of the mode does not settle", hint="try again")
        await asyncio.sleep(lease.seconds / 10)
        await heartbeat.beat()
        state = await keeper.read()


def permit_redis_only(info: Mapping[str, Any], *, accept_eviction: bool) -> list[str]:
    """What to warn of before this Redis becomes the only truth. Raises `ModeRefused` where it must not."""
    if info.get("role") != "master":
        raise ModeRefused("this Redis is a replica", hint="point REDIS_URL at the primary")
    policy, limit = str(info.get("maxmemory_policy", "unknown")), int(info.get("maxmemory", 0))
    evicts = bool(limit) and policy != "noeviction"
    if evicts and not accept_eviction:
        raise ModeRefused(
            f"maxmemory-policy is {policy}: where Redis is the only truth, a full one would lose sessions",
            hint=_EVICTION_HINT,
        )
    warnings = []
    if evicts:
        warnings.append(f"maxmemory-policy is {policy}: a full Redis ends sessions before their time")
    if not int(info.get("aof_enabled", 0)):
        warnings.append(
            "the append-only file is off: a restart of Redis loses all that came after its last snapshot "
            "(docs/redis-only.md has figures; CONFIG SET appendonly yes)"
        )
    return warnings


async def ask_for_redis_only(redis: BoundedRedis, *, accept_eviction: bool = False) -> list[str]:
    """`permit_redis_only` of the Redis that answers."""
    try:
        facts = await server_facts(redis)
    except CacheOutage as exc:
        raise ModeRefused(
            f"Redis can't be the only truth, it does not answer: {exc}",
            hint="start Redis, or correct REDIS_URL",
        ) from exc
    return permit_redis_only(facts.info, accept_eviction=accept_eviction)


async def settle_mode(
    keeper: PostgresStateKeeper,
    heartbeat: Heartbeat,
    lease: Lease,
    *,
    redis_only: bool | None,
    redis: BoundedRedis | None,
) -> None:
    """Brings together the mode, a start's `REDIS_ONLY_MODE`, and what stands in Redis.

    The only instance changes the mode; one that finds sessions which Redis holds for itself goes on in mode
    `draining`. Raises `StartRefused` where others are serving: the mode is theirs too.
    """
    state = await keeper.read()
    if redis is None:
        if state.mode != "hybrid":
            raise StartRefused(
                f"ENABLE_REDIS_SESSIONS=false, but this database is in mode {state.mode}",
                hint="set ENABLE_REDIS_SESSIONS=true",
            )
        return
    if redis_only is not None and redis_only != (state.mode == "redis-only"):
        await _change_alone(keeper, heartbeat, lease, state, redis, redis_only=redis_only)
    elif state.mode == "hybrid" and await holds_some_for_itself(redis):
        await set_mode(keeper, heartbeat, lease, "draining", only_from="hybrid")


async def holds_some_for_itself(redis: BoundedRedis) -> bool:
    """Whether PostgreSQL should take sessions over; a first look, which is over soon. False where Redis is out."""
    looked_at = 0
    try:
        async for batch in scan_sessions(redis):
            if any(seen.adoptable for seen in batch):
                return True
            looked_at += len(batch)
            if looked_at >= _FIRST_LOOK_KEYS_MAX:
                return False
    except CacheOutage:
        return False
    return False


async def _change_alone(
    keeper: PostgresStateKeeper,
    heartbeat: Heartbeat,
    lease: Lease,
    state: CacheState,
    redis: BoundedRedis,
    *,
    redis_only: bool,
) -> None:
    flag, command = f"REDIS_ONLY_MODE={str(redis_only).lower()}", "redis-only" if redis_only else "hybrid"
    # One that was killed a moment ago still looks alive.
    for _ in range(GONE_AFTER_SECONDS + 1):
        if not await keeper.others():
            break
        await asyncio.sleep(1)
    else:
        raise StartRefused(
            f"{flag} asks for another mode than {state.mode}, and other instances are serving this database",
            hint=f"run `chat-sessions mode {command}`: it changes the mode of all",
        )
    if not redis_only:
        await set_mode(keeper, heartbeat, lease, "draining")
        return
    try:
        await ask_for_redis_only(redis)
    except ModeRefused as exc:
        raise StartRefused(f"{flag}: {exc.detail}", hint=exc.hint) from exc
    if state.mode == "draining" or await holds_some_for_itself(redis):
        raise StartRefused(
            f"{flag}, but PostgreSQL is still taking sessions over from Redis",
            hint="run `chat-sessions mode redis-only`: it ends that first",
        )
    await set_mode(keeper, heartbeat, lease, "redis-only", only_from="hybrid")
