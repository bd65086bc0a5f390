"""What one schedule is like, drawn from its seed.

Each schedule gets a random part of the faults (swarm testing: Groce et al., ISSTA 2012): with all of them in every
schedule the subtle ones would drown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

#: What happens to servers, links and processes.
FAULT_KINDS = (
    "crash",
    "pause",
    "redis cut",
    "postgres cut",
    "estranged",
    "redis restart",
    "failover",
    "split end",
    "eviction",
    "flush",
    "operator",
    "out of memory",
    "terminate",
    "postgres restart",
)

#: What takes from Redis what nobody else has, while it owns sessions. (A restart then keeps everything.)
LOSING = frozenset({"failover", "estranged", "flush"})

#: What happens to one command.
REDIS_FAULT_KINDS = ("drop", "lost reply", "late", "slow", "slow reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Rates are chances a step, times are seconds of the model's clock: a lease is one second there, too."""

    #: Redis owns the first sessions, and PostgreSQL is to take them over.
    draining: bool
    tick: float
    instances: int
    always: frozenset[int]
    sessions: int
    clients: int
    operations: int
    think_seconds: float
    messages_max: int
    serve_unverified: bool
    get_touches: bool
    write_share: float
    life_share: float
    cancel_share: float
    kinds: tuple[str, ...]
    pause_between_faults: float
    redis_faults: float
    redis_fault_kinds: tuple[str, ...]
    late_trust: float
    postgres_slow: float
    slow_seconds: float
    commit_faults: float

    @classmethod
    def drawn(cls, chance: Random, *, faults: Sequence[str] | None = None, draining: bool = False) -> "Plan":
        """`faults`: these of `FAULT_KINDS` instead of some drawn at random; none of any sort where it is empty."""
        instances = 2 if chance.random() < 0.7 else 3
        share = chance.choice((0.1, 0.3, 0.6))
        kinds = tuple(kind for kind in FAULT_KINDS if chance.random() < share)
        redis_fault_kinds = tuple(kind for kind in REDIS_FAULT_KINDS if chance.random() < 0.6)
        redis_faults = chance.choice((0.0, 0.01, 0.03, 0.08))
        some = chance.random
        faulty = faults is None or bool(faults)
        kinds = kinds if faults is None else tuple(faults)
        return cls(
            draining=draining,
            tick=chance.choice((0.002, 0.004, 0.008)),
            instances=instances,
            always=frozenset(index for index in range(instances) if some() < 0.08),
            sessions=1 if some() < 0.7 else 2,
            clients=chance.choice((2, 3, 4, 6)),
            operations=chance.randint(26, 50),
            think_seconds=chance.choice((0.01, 0.05, 0.2, 0.5)),
            messages_max=chance.choice((2, 5, 1000)),
            serve_unverified=some() < 0.5,
            get_touches=some() < 0.5,
            write_share=chance.choice((0.25, 0.4, 0.6)),
            life_share=chance.choice((0.0, 0.04, 0.12)),
            cancel_share=chance.choice((0.0, 0.0, 0.1)),
            kinds=tuple(kind for kind in kinds if not (draining and kind in LOSING)),
            pause_between_faults=chance.choice((0.15, 0.4, 1.0, 2.5)),
            redis_faults=redis_faults if redis_fault_kinds and faulty else 0.0,
            redis_fault_kinds=redis_fault_kinds,
            late_trust=chance.choice((0.0, 0.0, 0.1, 0.3)) if faulty else 0.0,
            postgres_slow=chance.choice((0.0, 0.0, 0.02, 0.1)),
            slow_seconds=chance.choice((0.05, 0.3, 1.2)),
            commit_faults=chance.choice((0.0, 0.02, 0.06)) if faulty else 0.0,
        )
