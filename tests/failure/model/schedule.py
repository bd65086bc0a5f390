"""One schedule, from its seed to what was wrong with it."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.failure.model.clients import Clients
from tests.failure.model.faults import Nemesis
from tests.failure.model.world import World

#: A schedule takes a few thousand steps; one that takes this many is stuck.
_STEPS_MAX = 60_000

#: From the last operation to the last reads: time for what is late, and for heartbeats.
_CALM_SECONDS = 1.5


@dataclass(slots=True)
class Result:
    seed: int
    wrong: list[str]
    operations: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    trace: list[str] | None = None


class _Errors(logging.Handler):
    """What the product logs as an error would be one in a running service, too."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self.texts.append(f"logged: {record.getMessage()}: {cause!r}")


_errors = _Errors()


@contextmanager
def quiet() -> Iterator[None]:
    """The product's warnings are what faults are for; its errors are collected."""
    log = logging.getLogger("chat_sessions")
    level, propagate = log.level, log.propagate
    log.setLevel(logging.ERROR)
    log.propagate = False
    log.addHandler(_errors)
    try:
        yield
    finally:
        log.removeHandler(_errors)
        log.setLevel(level)
        log.propagate = propagate


def run(
    seed: int, *, faults: Sequence[str] | None = None, draining: bool = False, trace: bool = False
) -> Result:
    world = World(seed, faults=faults, draining=draining, trace=trace)
    clients = Clients(world)
    nemesis = Nemesis(world, clients)

    def calm() -> None:
        world.note("-- all is healed")
        nemesis.heal()
        clients.on_idle = stop
        world.loop.later(_CALM_SECONDS, clients.read_all)

    def stop() -> None:
        world.loop.stopped = True

    clients.on_idle = calm
    if draining:
        clients.inherit()
    clients.start()
    nemesis.start()
    _errors.texts.clear()
    if trace:
        world.note(str(world.plan))
    if not world.loop.run(steps_max=_STEPS_MAX):
        world.wrong.append("stuck: operations that never end")
    counts: Counter[str] = Counter()
    for one in world.counts:
        counts["hits"] += one.cache_hits
        counts["fills"] += one.cache_fills
        counts["validations"] += one.cache_validations
        counts["epochs"] += one.epoch_changes
        counts["held"] += one.writes_held
        counts["adopted"] += one.sessions_adopted
        counts["expired"] += one.lease_expired_reads
    counts["steps"] = world.loop.steps
    wrong = world.wrong + world.loop.errors + _errors.texts
    for log in clients.logs:
        wrong += log.violations(world)
    operations = sum(clients.outcomes[kind] for kind in OPERATIONS)
    return Result(seed, wrong, operations, clients.outcomes, world.faults, counts, world.trace)


def is_seen(wrong: str) -> bool:
    """Whether a client saw it, or only who looks into the servers at every step."""
    return not wrong.startswith("untrue")


OPERATIONS = ("create", "append", "turn", "history", "page", "session", "delete")
