"""`chat-sessions mode`: who owns the sessions, and changing it while services serve."""

import asyncio
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import typer

from app.cli.adoption import PerSecond, as_json, left_behind, opened, print_tally, shown
from app.cli.output import Json, interruptible, print_json, print_table, refusals_are_lines
from app.cli.targets import command_settings, patient, required_database_url
from app.maintenance.backfill import Tally
from app.maintenance.modes import ask_for_redis_only, set_mode
from app.postgres.cache_state import alive, read_state
from app.postgres.schema import require_revision
from app.settings import Settings
from app.wiring import open_database, open_redis

Target = Literal["redis-only", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    mode: str
    before: str
    warnings: list[str] = field(default_factory=list)
    tally: Tally | None = None


def mode(
    target: Annotated[
        Target | None, typer.Argument(help="the mode to change to; without it, say which one it is")
    ] = None,
    accept_eviction: Annotated[
        bool,
        typer.Option(
            "--accept-eviction", help="go to redis-only although Redis may evict sessions when it is full"
        ),
    ] = False,
    per_second: PerSecond = None,
    json: Json = False,
) -> None:
    """Say in which mode the database is, or change it for all instances while they serve.

    To `redis-only`: each session is handed over to Redis when it is first used. To `hybrid`: every session that Redis
    owns is taken over into PostgreSQL; meanwhile the mode is `draining`, in which everything is served. A change that is
    refused changes nothing.

    Ends with 0 where it is done, with 1 where it is refused or sessions can't be taken over.
    """
    with refusals_are_lines():
        settings = command_settings()
        required_database_url(settings)
        if target is None:
            facts = asyncio.run(_look(settings))
            if json:
                print_json(facts)
            else:
                print_table(["database", ""], list(facts.items()))
            return
        with interruptible(left_behind(f"mode {target}")):
            outcome = asyncio.run(_change(settings, target, per_second, accept_eviction=accept_eviction))
    _say(outcome, target, json=json)
    if outcome.tally is not None and outcome.tally.conflicts.count:
        raise typer.Exit(1)


def _say(outcome: _Outcome, target: Target, *, json: bool) -> None:
    for warning in outcome.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    if json:
        print_json(
            {"mode": outcome.mode, "before": outcome.before, "warnings": outcome.warnings}
            | (as_json(outcome.tally) if outcome.tally is not None else {})
        )
        return
    as_before = ", as before" if outcome.mode == outcome.before else f", was {outcome.before}"
    print(f"mode {outcome.mode}{as_before}")
    if outcome.tally is not None and not outcome.tally.found_nothing:
        print_tally(outcome.tally)
    if outcome.mode != target:
        print(
            f"\nThe conflicts named above hold it there; everything else is served. "
            f"Mend or remove them in Redis, then run `chat-sessions mode {target}` again."
        )


async def _look(settings: Settings) -> dict[str, Any]:
    async with open_database(settings) as database:
        await require_revision(database)
        state = await read_state(database)
        instances = len(await alive(database))
    if state is None:
        return {"mode": "not set yet: the first `serve` decides", "instances": instances}
    return {
        "mode": state.mode,
        "cache": state.cache,
        "epoch": state.epoch,
        "settled": state.settled,
        "redis": state.redis_identity,
        "instances": instances,
    }


async def _change(
    settings: Settings, target: Target, per_second: float | None, *, accept_eviction: bool
) -> _Outcome:
    if target == "hybrid":
        return await _to_hybrid(settings, per_second)
    warnings = []
    if settings.enable_redis_sessions:
        async with open_redis(patient(settings)) as redis:
            # Before anything is opened that would claim a new database.
            warnings = await ask_for_redis_only(redis, accept_eviction=accept_eviction)
    return await _to_redis_only(settings, per_second, warnings)


async def _to_hybrid(settings: Settings, per_second: float | None) -> _Outcome:
    async with opened(settings, per_second=per_second) as both:
        before = (await both.stores.keeper.read()).mode
        if before == "hybrid" and not await both.backfill.finds_any():
            return _Outcome(mode="hybrid", before=before)
        with shown() as report:
            tally = await both.backfill.drain(report=report)
        after = (await both.stores.keeper.read()).mode
    return _Outcome(mode=after, before=before, tally=tally)


async def _to_redis_only(settings: Settings, per_second: float | None, warnings: list[str]) -> _Outcome:
    async with opened(settings, per_second=per_second) as both:
        stores, tally = both.stores, None
        state = await stores.keeper.read()
        if state.mode == "redis-only":
            return _Outcome(mode=state.mode, before=state.mode, warnings=warnings)
        # What Redis holds from an earlier time would otherwise hide what PostgreSQL has been told since.
        if state.mode == "draining" or await both.backfill.finds_any():
            with shown() as report:
                tally = await both.backfill.drain(report=report)
        await set_mode(stores.keeper, stores.heartbeat, stores.lease, "redis-only")
    return _Outcome(mode="redis-only", before=state.mode, warnings=warnings, tally=tally)
