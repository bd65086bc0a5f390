"""Changes of the mode under load: `chat-sessions mode redis-only`, `chat-sessions mode hybrid`, over and over."""

import asyncio
import time
from pathlib import Path

from tests.failure.chaos.faults import World
from tests.failure.chaos.proxy import LOOPBACK
from tests.failure.chaos.record import Record
from tests.failure.chaos.servers import command

_EVERY_SECONDS = 1.0

#: What the command line says of a command that this version does not have.
_NO_SUCH_COMMAND = "No such command"

_ATTEMPTS_AT_THE_END = 10


class Flipper:
    """Calls the command past the proxies: an operator sits beside the servers."""

    def __init__(self, world: World, project: Path, record: Record, until: float) -> None:
        self._world = world
        self._project = project
        self._record = record
        self._until = until

    async def flip(self) -> None:
        mode = "redis-only"
        while time.monotonic() + _EVERY_SECONDS < self._until:
            await asyncio.sleep(_EVERY_SECONDS)
            # One that failed is repeated: half-way is no mode to be in.
            if await self._command(mode):
                mode = "hybrid" if mode == "redis-only" else "redis-only"

    async def back_to_hybrid(self) -> None:
        """PostgreSQL is what a run is checked against, so it has to own everything in the end."""
        for _ in range(_ATTEMPTS_AT_THE_END):
            if await self._command("hybrid") or _NO_SUCH_COMMAND in self._record.flips_failed[-1]:
                return
            await asyncio.sleep(1)
        self._record.wrong.append(f"not flipped: {self._record.flips_failed[-1]}")

    async def _command(self, mode: str) -> bool:
        world = self._world
        # The servers may evict, and have far more memory than a run fills.
        more = ["--accept-eviction"] if mode == "redis-only" else []
        code, said = await command(
            *(self._project, world.folder, "mode", mode, *more),
            DATABASE_URL=world.postgres.url(),
            REDIS_URL=f"redis://{LOOPBACK}:{world.primary.port}",
        )
        if code:
            self._record.flips_failed.append(f"mode {mode}: exit code {code}: {said}")
            return False
        self._record.flips[mode] = self._record.flips.get(mode, 0) + 1
        return True
