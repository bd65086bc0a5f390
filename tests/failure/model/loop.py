"""An event loop that decides at random what runs next, on a clock of its own.

Every callback belongs to an owner: an instance of the service, which can crash or be paused at each of its awaits,
or the world around it. Tasks and futures are asyncio's own. One seed is one order of steps.
"""

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from itertools import count
from random import Random
from typing import Any

_OWNER: ContextVar["Owner"] = ContextVar("owner")


class Owner:
    """Whose steps these are. `alive` for ever, until it crashed; while it is paused its steps are held."""

    __slots__ = ("alive", "context", "held", "name", "paused", "tasks")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.held: list[tuple[Any, ...]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        # One for all its tasks: asyncio hands it back with each callback, which is how its owner is known.
        self.context = Context()
        self.context.run(_OWNER.set, self)


class Timer:
    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: tuple[Any, ...]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class ModelLoop(asyncio.AbstractEventLoop):
    """Only what tasks, futures, `sleep`, `gather`, `shield` and `wait` need."""

    def __init__(self, chance: Random, *, tick: float) -> None:
        """`tick`: what a step takes. While no step can be made, time jumps to the next timer."""
        self._random = chance.random
        self._tick = tick
        self._now = 0.0
        self._ready: list[tuple[Any, ...]] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self.world = Owner("world")
        self.owner = self.world
        self.owners = [self.world]
        self.steps = 0
        self.stopped = False
        self.errors: list[str] = []

    # What asyncio asks of a loop

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: object = None, context: object = None
    ) -> asyncio.Task[Any]:
        return self.task_of(self.owner, coro)

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> None:
        owner = self.owner if context is None else context[_OWNER]
        self._enqueue((owner, callback, args, context or owner.context))

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Timer:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Timer:
        owner = self.owner if context is None else context[_OWNER]
        timer = Timer((owner, callback, args, context or owner.context))
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        # What a crash leaves behind was not seen by anybody, and need not have been.
        if all(owner.alive for owner in self.owners):
            self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    # What the world asks of it

    def own(self, name: str) -> Owner:
        owner = Owner(name)
        self.owners.append(owner)
        return owner

    def task_of(self, owner: Owner, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name="", context=owner.context)
        task._log_destroy_pending = False
        owner.tasks.append(task)
        return task

    def soon(self, callback: Callable[..., Any], *args: Any) -> None:
        """A step of the world's: a server answers, whatever has become of who asked."""
        self._ready.append((self.world, callback, args, self.world.context))

    def later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        return self.call_at(self._now + delay, callback, *args, context=self.world.context)

    def crash(self, owner: Owner) -> None:
        """None of its steps will ever be made again."""
        owner.alive = False
        owner.held.clear()
        self._ready = [step for step in self._ready if step[0] is not owner]

    def pause(self, owner: Owner) -> None:
        owner.paused = True
        owner.held += [step for step in self._ready if step[0] is owner]
        self._ready = [step for step in self._ready if step[0] is not owner]

    def resume(self, owner: Owner) -> None:
        owner.paused = False
        self._ready += owner.held
        owner.held.clear()

    def run(self, *, steps_max: int) -> bool:
        """Until it is stopped. False: there was nothing left to do before, or too much."""
        asyncio._set_running_loop(self)
        try:
            while not self.stopped and self.steps < steps_max:
                if not self._step():
                    return False
        finally:
            self._close()
            asyncio._set_running_loop(None)
        return self.stopped

    def _step(self) -> bool:
        timers = self._timers
        while timers and (timers[0][0] <= self._now or not self._ready):
            when, _, timer = heapq.heappop(timers)
            if not timer.cancelled:
                self._now = max(self._now, when)
                self._enqueue(timer.callback)
        ready = self._ready
        if not ready:
            return False
        self.steps += 1
        self._now += self._tick
        at = int(self._random() * len(ready))
        self.owner, callback, args, context = ready[at]
        ready[at] = ready[-1]
        ready.pop()
        context.run(callback, *args)
        return True

    def _enqueue(self, step: tuple[Any, ...]) -> None:
        owner = step[0]
        if not owner.paused:
            if owner.alive:
                self._ready.append(step)
        else:
            owner.held.append(step)

    def _close(self) -> None:
        """Ends what is left of tasks now: a garbage collector would choose its own moment."""
        for owner in self.owners:
            owner.alive = False
            for task in owner.tasks:
                if not task.done():
                    task.get_coro().close()
            owner.tasks.clear()
            owner.held.clear()
        self._ready.clear()
        self._timers.clear()
