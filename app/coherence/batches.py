"""How writes travel together: in batches that wait for nobody, and alone where a row is not to be had at once."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from uuid import UUID

from app.batching import Batcher, Bounds
from app.coherence.ports import Interrupted, RowBusy
from app.errors import Unavailable
from app.store import Append

_Write = TypeVar("_Write")
_Written = TypeVar("_Written")

MIB = 1024 * 1024

#: Two transactions at once: while one waits for the disk, the other is made ready.
_TOGETHER = Bounds(batches=2, items=256, share=8, size=8 * MIB, waiting_items=8192, waiting_size=64 * MIB)

#: Those that wait for a lock that others hold. Each may take as long as a statement.
_ALONE = Bounds(batches=3, items=1, share=1, size=MIB, waiting_items=1024, waiting_size=16 * MIB)

CREATIONS = Bounds(batches=1, items=256, share=256, size=MIB, waiting_items=8192, waiting_size=MIB)


def size_of(append: Append) -> int:
    """About how many bytes of memory an append holds."""
    return sum(len(message.content) + len(message.metadata) + 200 for message in append.messages)


def concerns_all(exc: Exception) -> bool:
    """An outage, a change of the epoch, a commit whose outcome is unknown: not about one of the writes."""
    return isinstance(exc, Unavailable | Interrupted)


class _Run(Protocol):
    def __call__(self, writes: list[Any], /, *, waits: bool) -> Awaitable[Sequence[Any]]: ...


class WriteBatches(Generic[_Write, _Written]):
    """Runs writes in batches, those to one session one after the other.

    A batch never waits for a lock, so one session that somebody else holds on to delays no other, and no two batches
    can wait for each other (deadlock). What was `RowBusy` there is run again by itself, and waits.
    """

    def __init__(
        self,
        run: _Run,
        *,
        session_of: Callable[[_Write], UUID],
        size: Callable[[_Write], int],
    ) -> None:
        self._together: Batcher[_Write, _Written] = Batcher(
            partial(run, waits=False), bounds=_TOGETHER, key=session_of, size=size, concerns_all=concerns_all
        )
        self._alone: Batcher[_Write, _Written] = Batcher(
            partial(run, waits=True), bounds=_ALONE, key=session_of, size=size, concerns_all=concerns_all
        )

    async def submit(self, write: _Write) -> _Written:
        """What became of it. Raises what it failed with; `Overloaded` where too many wait already."""
        try:
            return await self._together.submit(write)
        except RowBusy:
            return await self._alone.submit(write)

    @property
    def under_way(self) -> frozenset[asyncio.Task[None]]:
        return self._together.under_way | self._alone.under_way

    async def close(self) -> None:
        """Waits until everything that was submitted has run to its end."""
        await self._together.close()
        await self._alone.close()
