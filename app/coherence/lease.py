"""A process's right to believe Redis: bounded in time, on one epoch (Gray and Cheriton, "Leases", SOSP 1989).

A reader may trust an entry of epoch e while it holds a lease on e: `LEASE_SECONDS` from the moment at which
it *asked* PostgreSQL and was told that the epoch is e. A writer that meets an epoch which is new waits that
long from when it learned of it, unless the state says that it is settled. So when a write under a new epoch
becomes visible, no lease on an older one is left, on any instance.

Clocks are compared with themselves only. What is assumed is that they run at the same rate, within a few
per cent, for a second.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from app.coherence.ports import CacheState

#: D in the argument. Longer than a heartbeat and the worst stall of an event loop, else reads only get slower.
LEASE_SECONDS = 1.0

#: How many epochs' first sights are remembered: an answer that was overtaken must not start a wait anew.
_EPOCHS_REMEMBERED = 8

_BOOT_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def boot_time() -> float:
    """Seconds on a clock that goes on while the machine is suspended, where there is one."""
    return time.clock_gettime(_BOOT_CLOCK) if _BOOT_CLOCK is not None else time.monotonic()


class Lease:
    """What this process knows of `chat.cache_state`, and until when it may act on it."""

    def __init__(self, *, seconds: float = LEASE_SECONDS, clock: Callable[[], float] = boot_time) -> None:
        self.seconds = seconds
        self.now = clock
        self.state: CacheState | None = None
        self._believed: CacheState | None = None
        self._until = float("-inf")
        self._seen_at: dict[str, float] = {}

    def learn(self, state: CacheState, *, asked_at: float | None = None) -> None:
        """Takes in a state that PostgreSQL's primary gave. With `asked_at`, when it was asked: a lease on it."""
        if self.state is None or state.epoch != self.state.epoch:
            self._until = float("-inf")
            if state.epoch not in self._seen_at:
                self._seen_at[state.epoch] = self.now()
                while len(self._seen_at) > _EPOCHS_REMEMBERED:
                    del self._seen_at[next(iter(self._seen_at))]
        elif self.state.settled and not state.settled:
            # An answer that was overtaken: what has settled stays so.
            state = replace(state, settled=True)
        self.state = state
        self._believed = state if state.trusting else None
        if asked_at is not None:
            self._until = max(self._until, asked_at + self.seconds)

    def current(self) -> CacheState | None:
        """The state whose entries may be trusted now; None: ask PostgreSQL."""
        state = self._believed
        return state if state is not None and self.now() < self._until else None

    def still(self, state: CacheState) -> bool:
        """Whether it may be trusted even now, after Redis has answered."""
        current = self.current()
        return current is not None and current.epoch == state.epoch

    def seconds_left(self) -> float:
        """How long it lasts unless it is renewed; 0 once it has ended."""
        return max(0.0, self._until - self.now())

    def hold_seconds(self, state: CacheState) -> float:
        """How long a writer under `state`, which was learned, must still wait; 0 or less: not at all."""
        if state.settled:
            return 0.0
        return self._seen_at.get(state.epoch, self.now()) + self.seconds - self.now()
