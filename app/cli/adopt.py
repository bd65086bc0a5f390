"""`chat-sessions adopt`: the sessions of a guide's deployment, and all that Redis holds for itself, into PostgreSQL."""

import asyncio

import typer

from app.cli.adoption import PerSecond, as_json, left_behind, opened, print_tally, shown
from app.cli.output import Json, interruptible, print_json, refusals_are_lines
from app.cli.targets import command_settings
from app.errors import ModeRefused
from app.maintenance.backfill import Tally
from app.settings import Settings


def adopt(per_second: PerSecond = None, json: Json = False) -> None:
    """Take every session that Redis holds for itself over into PostgreSQL, while services serve or before they do.

    These are the sessions of the guide's own program (`session:{id}` as plain JSON) and those of Redis-only mode. They are
    merged by message id: run it as often as you like. Nothing is removed from Redis before PostgreSQL has it.

    Ends with 0 where nothing is left, with 1 where it is refused or sessions can't be taken over.
    """
    with refusals_are_lines(), interruptible(left_behind("adopt")):
        mode, tally = asyncio.run(_adopt(command_settings(), per_second))
    if json:
        print_json({"mode": mode} | as_json(tally))
    elif tally.found_nothing:
        print(f"nothing to adopt; mode {mode}")
    else:
        print(f"mode {mode}")
        print_tally(tally)
    if tally.conflicts.count:
        raise typer.Exit(1)


async def _adopt(settings: Settings, per_second: float | None) -> tuple[str, Tally]:
    async with opened(settings, per_second=per_second) as both:
        mode = (await both.stores.keeper.read()).mode
        if mode == "redis-only":
            raise ModeRefused(
                "the database is in mode redis-only: its sessions belong in Redis",
                hint="run `chat-sessions mode hybrid`: it adopts them",
            )
        if mode == "hybrid" and not await both.backfill.finds_any():
            return mode, Tally()
        with shown() as report:
            tally = await both.backfill.drain(report=report)
        return (await both.stores.keeper.read()).mode, tally
