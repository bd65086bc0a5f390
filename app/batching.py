"""Natural batching: what arrives while a batch is under way goes into the next one, together.

There is no timer. With nothing under way an item departs at the end of the turn of the event loop in which it
came, so one caller alone waits for nobody; under load batches grow until the work keeps up. Databases know it as
group commit (DeWitt et al., "Implementation Techniques for Main Memory Database Systems", SIGMOD 1984).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from app.errors import Overloaded

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What may be under way and what may wait: batches, items and bytes of a batch, items and bytes that wait.

    `share`: of more items than this that are ready, each free place takes its part, so that what one batch waits for
    goes on beside what the other is worked on. Callers that were answered together come back together, and would
    fill one batch and leave the other places empty for ever.
    """

    batches: int
    items: int
    share: int
    size: int
    waiting_items: int
    waiting_size: int


@dataclass(slots=True, eq=False)
class _Place(Generic[_Item, _Result]):
    """An item on its way, and who waits for its result."""

    item: _Item
    key: Hashable
    size: int
    callers: "list[asyncio.Future[_Result]]" = field(default_factory=list)


class Batcher(Generic[_Item, _Result]):
    """Runs items in batches. `run` takes a list and gives a result, or an exception, for each, in its order.

    - Items with the same key never meet in a batch, and are run in the order in which they came; where many wait,
      keys take turns. With `shares`, an item whose key waits already is not run at all: it gets that one's result.
    - An exception out of `run` itself is everybody's where `concerns_all` says so. Else the batch is run again in
      halves, until the item that it is about fails alone: `run` must leave nothing behind when it raises.
    - A caller that is cancelled leaves the others alone. What has departed runs to its end; what has not, and is
      waited for by nobody, is not begun.
    - `submit` raises `Overloaded` at the bounds, before memory grows.
    """

    def __init__(
        self,
        run: Callable[[list[_Item]], Awaitable[Sequence[_Result | BaseException]]],
        *,
        bounds: Bounds,
        key: Callable[[_Item], Hashable] = lambda _: None,
        size: Callable[[_Item], int] = lambda _: 0,
        shares: bool = False,
        concerns_all: Callable[[Exception], bool] = lambda _: True,
    ) -> None:
        self._run = run
        self._bounds = bounds
        self._key = key
        self._size = size
        self._shares = shares
        self._concerns_all = concerns_all
        self._ready: deque[_Place[_Item, _Result]] = deque()
        self._waiting: dict[Hashable, _Place[_Item, _Result]] = {}
        # A key is here while one of its items is ready or under way; the items are those that come after it.
        self._behind: dict[Hashable, deque[_Place[_Item, _Result]]] = {}
        self._waiting_items = 0
        self._waiting_size = 0
        self._departs = False
        self._batches: set[asyncio.Task[None]] = set()

    async def submit(self, item: _Item) -> _Result:
        """The item's result. Raises what `run` said of it, or `Overloaded`."""
        caller: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        key = self._key(item)
        if self._shares and (place := self._waiting.get(key)) is not None:
            place.callers.append(caller)
        else:
            self._admit(_Place(item, key, self._size(item), [caller]))
        return await caller

    @property
    def under_way(self) -> frozenset[asyncio.Task[None]]:
        """The batches that have departed and are not done."""
        return frozenset(self._batches)

    async def close(self) -> None:
        """Waits until everything that was submitted has run to its end."""
        while self._ready or self._batches:
            await asyncio.wait(self._batches) if self._batches else await asyncio.sleep(0)

    def _admit(self, place: _Place[_Item, _Result]) -> None:
        if self._waiting_items >= self._bounds.waiting_items or (
            self._waiting_size and self._waiting_size + place.size > self._bounds.waiting_size
        ):
            raise Overloaded(
                f"{self._waiting_items} requests of {self._waiting_size} bytes wait already",
                hint="try again, or add workers",
            )
        self._waiting_items += 1
        self._waiting_size += place.size
        if self._shares:
            self._waiting[place.key] = place
        elif place.key is not None:
            if (behind := self._behind.get(place.key)) is not None:
                behind.append(place)
                return
            self._behind[place.key] = deque()
        self._ready.append(place)
        self._depart_soon()

    def _depart_soon(self) -> None:
        # Not at once: what arrives in this turn of the loop, as all do whom the last batch has answered, comes too.
        if not self._departs and len(self._batches) < self._bounds.batches:
            self._departs = True
            asyncio.get_running_loop().call_soon(self._depart)

    def _depart(self) -> None:
        self._departs = False
        while self._ready and (free := self._bounds.batches - len(self._batches)) > 0:
            share = max(self._bounds.share, -(-len(self._ready) // free))
            if batch := self._take(min(share, self._bounds.items)):
                task = asyncio.get_running_loop().create_task(self._run_alone_or_in_halves(batch))
                self._batches.add(task)
                task.add_done_callback(partial(self._landed, batch))

    def _take(self, items_max: int) -> list[_Place[_Item, _Result]]:
        batch: list[_Place[_Item, _Result]] = []
        size = 0
        while self._ready and len(batch) < items_max:
            place = self._ready[0]
            if batch and size + place.size > self._bounds.size:
                break
            self._ready.popleft()
            self._waiting_items -= 1
            self._waiting_size -= place.size
            if self._shares:
                del self._waiting[place.key]
            if all(caller.cancelled() for caller in place.callers):
                self._next_of(place.key)
                continue
            size += place.size
            batch.append(place)
        return batch

    def _next_of(self, key: Hashable) -> None:
        behind = self._behind.get(key)
        if behind:
            self._ready.append(behind.popleft())
        elif behind is not None:
            del self._behind[key]

    def _landed(self, batch: list[_Place[_Item, _Result]], task: asyncio.Task[None]) -> None:
        # Here and not in a `finally` of the task's own: one that is cancelled before its first step never enters it,
        # and its callers, and all who come for the same keys after them, would wait for ever.
        self._batches.discard(task)
        failed = None if task.cancelled() else task.exception()
        for place in batch:
            for caller in place.callers:
                if failed is not None:
                    _answer(caller, failed)
                elif task.cancelled():
                    caller.cancel()
            self._next_of(place.key)
        if self._ready:
            self._depart_soon()

    async def _run_alone_or_in_halves(self, batch: list[_Place[_Item, _Result]]) -> None:
        try:
            results = await self._run([place.item for place in batch])
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is its callers'
            if len(batch) == 1 or self._concerns_all(exc):
                results = [exc] * len(batch)
            else:
                half = len(batch) // 2
                await self._run_alone_or_in_halves(batch[:half])
                await self._run_alone_or_in_halves(batch[half:])
                return
        for place, result in zip(batch, results, strict=True):
            for caller in place.callers:
                _answer(caller, result)


def _answer(caller: asyncio.Future[_Result], result: _Result | BaseException) -> None:
    if caller.done():
        return
    if isinstance(result, BaseException):
        caller.set_exception(result)
    else:
        caller.set_result(result)
